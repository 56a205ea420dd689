//! `rm -r web`: removes a box with all its snapshots. Layers that others read from stay.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::disk::FileId;
use crate::exports::{Source, display_name};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::listing::names_in;
use crate::files::markers::{UNRECORDED, mark_unrecorded};
use crate::files::workspace::discard;
use crate::home::{BaseRecord, SnapshotRecord};
use crate::store::Store;
use crate::store::access::deletion_space::delete_with_room;
use crate::store::access::lock::{lock_shared, made_again_on};
use crate::store::access::locked_box::LockedBox;
use crate::store::kept::keep::{flush_early, keep_box};
use crate::store::layers::adopt::adopt;
use crate::store::layers::collect::{free_bases, free_without_lock};
use crate::store::layers::graph::LayerGraph;
use crate::{Context, Error, Result, mountinfo};

/// What may be removed with a box: what the caller has seen of it.
#[derive(Clone, Debug, Default)]
pub struct SeenBox {
    /// The snapshots: id → name.
    pub snapshots: BTreeMap<String, String>,
    /// The live disk when the removal began; None to remove any.
    pub disk: Option<SeenDisk>,
}

/// Identifies a state of a live disk: another disk, or the same one after a write, is not equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenDisk {
    file: FileId,
    /// Length in bytes.
    length: u64,
    modified: SystemTime,
}

/// Returns the current state of a box's live disk; None if it has none.
pub fn see_disk(store: &Store, box_id: &str) -> Option<SeenDisk> {
    let meta = fs::metadata(store.home().live_disk(box_id)).ok()?;
    Some(SeenDisk {
        file: FileId::of(&meta),
        length: meta.len(),
        modified: meta.modified().ok()?,
    })
}

/// Removes a box with all its snapshots, if nothing was added or changed since the caller saw it.
///
/// # Errors
/// ENOTEMPTY when the box has a snapshot that is not in `seen`, or another disk; EBUSY; EPERM when
/// another box reads from its live disk; ENOENT.
pub fn remove_box(store: &Store, box_id: &str, seen: &SeenBox) -> Result<()> {
    let action = format!("removal of box {}", store.exports.disks.name_of(box_id));
    let live = Source::Live {
        box_id: box_id.to_owned(),
    };
    let result = delete_with_room(store, &|| {
        made_again_on(store, &live, &|| delete_box(store, box_id, seen))
    });
    store.events().log_outcome(&action, result)
}

/// Order: adopt the layers that others read from; complete the references of all other boxes; keep
/// what is removed; mark the directory; delete all rows of the box in one transaction; remove the directory; free the
/// bases that are no longer read.
///
/// A crash before the transaction leaves the box unchanged but marked; recovery removes the mark.
/// A crash after it leaves a marked directory without a row, which recovery removes, as BoxLite's
/// own start does.
///
/// Beside a runtime, what BoxLite does with the box at that moment fails, or makes files in a
/// directory without a row, which its next start removes.
fn delete_box(store: &Store, box_id: &str, seen: &SeenBox) -> Result<()> {
    flush_early(store, box_id);
    let mut locked = lock_shared(store, box_id)?;
    refuse_other_snapshots(&locked, seen)?;
    refuse_other_disk(&locked, seen)?;
    let dir = store.home().box_dir(box_id);
    if let Some(mountpoint) = mountinfo::below(&dir)? {
        return Err(Error::busy(format!(
            "something is mounted on {} and its contents would be deleted with the box; unmount it first",
            mountpoint.display()
        )));
    }
    adopt_for_others(&mut locked)?;
    complete_refs_of_others(&mut locked)?;
    let bases = bases_of_box(&locked)?;
    let lock_id = locked.record.lock_id().ok().flatten();
    crash_point("remove-box.adopted");
    let kept = keep_box(&mut locked)?;
    let aside = store.workspace().fresh_path("removed")?;
    let has_directory = dir.is_dir();
    let marked = if has_directory {
        mark_unrecorded(&dir)
    } else {
        Ok(())
    };
    crash_point("remove-box.marked");
    let unrecorded = marked
        .and_then(|()| refuse_changed_files(&locked, seen))
        .and_then(|()| locked.change.transaction(|rows| rows.delete_box(box_id)));
    if let Err(error) = unrecorded {
        // A failed commit may be durable all the same. If the row is gone, or cannot be looked up,
        // the mark stays for recovery.
        if locked.change.box_by_id(box_id).is_ok() {
            let _ = durable::unlink(&dir.join(UNRECORDED));
            if let Some(kept) = kept {
                kept.withdraw(&mut locked);
            }
        }
        return Err(error);
    }
    crash_point("remove-box.unrecorded");
    if let Some(kept) = kept {
        kept.finish(store);
    }
    // The box is removed. A failure from here on is only logged.
    let moved = if has_directory {
        put_aside(store, &dir, &aside)
    } else {
        Ok(())
    };
    let cleaned_up = moved.and_then(|()| {
        crash_point("remove-box.moved");
        free_with_box(&mut locked, &bases)
    });
    // Last: while it is there, a runtime that starts is noticed by its removal.
    let unlocked = lock_id.map_or(Ok(()), |id| durable::unlink(&store.home().box_lock(id)));
    let cleaned_up = cleaned_up.and(unlocked);
    drop(locked);
    if let Err(error) = cleaned_up {
        store.events().info(&format!(
            "{error}; the next mount of the home removes the rest of the box"
        ));
    }
    remove_aside(aside);
    Ok(())
}

/// Frees the bases that only the removed box read. Those of BoxLite's, among `bases`, take the
/// runtime lock; where a runtime has it, they wait for the next recovery of the home.
fn free_with_box(locked: &mut LockedBox<'_>, bases: &BTreeSet<String>) -> Result<()> {
    let may_go = |row: &BaseRecord| row.is_ours() || bases.contains(&row.id);
    if locked.store.layers.is_large() {
        locked.store.unfreed.add_bases(bases);
        return Ok(());
    }
    if locked.change.is_shared() {
        let rows = locked.change.bases()?;
        let has_others = rows.iter().any(|row| !row.is_ours() && may_go(row));
        if !(has_others && locked.change.is_alone() && locked.change.take_lock()?) {
            return free_without_lock(locked.store, &mut locked.change);
        }
    }
    free_bases(locked.store, &mut locked.change, &may_go)
}

/// Refuses if BoxLite changed the box's files since the removal looked at them: it records nothing
/// of a restore, and a clone only at its end.
fn refuse_changed_files(locked: &LockedBox<'_>, seen: &SeenBox) -> Result<()> {
    locked.change.begin_exclusive()?;
    refuse_other_disk(locked, seen)?;
    let layers = locked.all_readers()?;
    if !locked.change.is_shared()
        || (layers.unseen(locked.store.home()).is_none()
            && read_by_others(locked, &layers).is_none())
    {
        return Ok(());
    }
    Err(Error::busy(format!(
        "BoxLite is changing the disk of box {}; try again",
        display_name(&locked.record)
    ))
    .for_a_moment())
}

/// Refuses if the live disk is another than the caller has seen, or has changed.
fn refuse_other_disk(locked: &LockedBox<'_>, seen: &SeenBox) -> Result<()> {
    if seen.disk.is_none() || seen.disk == see_disk(locked.store, &locked.record.id) {
        return Ok(());
    }
    Err(Error::new(
        libc::ENOTEMPTY,
        format!(
            "the disk of box {} changed since its removal began; remove it again",
            display_name(&locked.record)
        ),
    ))
}

/// Moves a box's directory into the workspace, which the next mount removes after a crash. Names of
/// bases in it are removed at once, because a base is freed only when it has no other name.
fn put_aside(store: &Store, dir: &Path, aside: &Path) -> Result<()> {
    match durable::rename(dir, aside) {
        // A runtime that has just started removed it.
        Err(error) if error.errno() == libc::ENOENT => return Ok(()),
        moved => moved?,
    }
    durable::sync_dir(&store.home().boxes_dir())?;
    durable::count_change();
    let snapshots = aside.join("snapshots");
    let mut layers = vec![aside.join("disks/disk.qcow2")];
    for name in names_in(&snapshots)? {
        layers.push(snapshots.join(name).join("disk.qcow2"));
    }
    for layer in layers {
        if fs::symlink_metadata(&layer).is_ok_and(|meta| meta.nlink() > 1) {
            fs::remove_file(&layer).context(|| format!("cannot remove {}", layer.display()))?;
        }
    }
    Ok(())
}

/// Removes the directory that was put aside, if any, in a separate thread. Removing large files
/// takes long, and the kernel keeps the parent directory locked until the caller has its reply.
fn remove_aside(aside: PathBuf) {
    let remove = {
        let aside = aside.clone();
        move || discard(&aside)
    };
    let started = std::thread::Builder::new().name("remove".into());
    if started.spawn(remove).is_err() {
        discard(&aside);
    }
}

fn refuse_other_snapshots(locked: &LockedBox<'_>, seen: &SeenBox) -> Result<()> {
    let snapshots = locked.snapshots()?;
    // A snapshot that was renamed meanwhile counts as another one.
    let was_seen = |row: &SnapshotRecord| seen.snapshots.get(&row.id) == Some(&row.name);
    match snapshots.iter().find(|row| !was_seen(row)) {
        None => Ok(()),
        Some(row) => Err(Error::new(
            libc::ENOTEMPTY,
            format!(
                "box {} has a snapshot {} that was not there when its removal began; remove it again",
                display_name(&locked.record),
                row.name
            ),
        )),
    }
}

/// Adopts every layer in the box's directory that a layer outside of it reads from.
fn adopt_for_others(locked: &mut LockedBox<'_>) -> Result<()> {
    loop {
        let layers = locked.all_readers()?;
        match read_by_others(locked, &layers) {
            Some(path) => adopt(locked, &path)?,
            None => return Ok(()),
        };
    }
}

/// Returns a layer in the box's directory that a layer outside of it reads from.
fn read_by_others(locked: &LockedBox<'_>, layers: &LayerGraph) -> Option<PathBuf> {
    let own = layers.of_box(&locked.record.id);
    let mut read = own.filter(|file| {
        layers
            .readers_of(&file.path)
            .any(|reader| reader.box_id() != Some(&locked.record.id))
    });
    read.next().map(|file| file.path.clone())
}

/// Adds the missing references from every other box to the bases that it reads from and that have
/// rows. Once the references of this box are gone, only theirs keep BoxLite from collecting a base.
fn complete_refs_of_others(locked: &mut LockedBox<'_>) -> Result<()> {
    let layers = locked.all_readers()?;
    let bases = locked.store.home().bases_dir();
    let mut missing = BTreeSet::new();
    for box_id in layers.boxes().filter(|id| *id != locked.record.id) {
        if locked.change.box_by_id(box_id).is_err() {
            continue;
        }
        let referred = locked.change.refs_of(box_id)?;
        let chains = layers
            .of_box(box_id)
            .flat_map(|file| layers.chain(&file.path));
        let reached: BTreeSet<&Path> = chains.filter(|path| path.starts_with(&bases)).collect();
        for path in reached {
            let row = locked.base_at(path)?;
            missing.extend(
                row.filter(|row| !referred.contains(&row.id))
                    .map(|row| (row.id, box_id.to_owned())),
            );
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    locked.change.transaction(|rows| {
        missing
            .iter()
            .try_for_each(|(base, box_id)| rows.insert_ref(base, box_id))
    })
}

/// Returns the ids of the bases that the box refers to or that were made from it, without the
/// cached disks of images.
fn bases_of_box(locked: &LockedBox<'_>) -> Result<BTreeSet<String>> {
    let referred = locked.change.bases_of(&locked.record.id)?.into_iter();
    let rows = referred.chain(locked.change.bases_from(&locked.record.id)?);
    let rows = rows.filter(|row| row.kind != "rootfs");
    Ok(rows.map(|row| row.id).collect())
}
