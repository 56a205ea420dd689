//! `rm -r web`: a box goes, and with it every snapshot of it. Layers that others read from stay.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::disk::FileId;
use crate::exports::display_name;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::listing::names_in;
use crate::files::markers::{UNRECORDED, mark_unrecorded};
use crate::files::workspace::discard;
use crate::home::{BaseRecord, SnapshotRecord};
use crate::store::Store;
use crate::store::access::lock::lock_box;
use crate::store::access::locked_box::LockedBox;
use crate::store::access::room::delete_with_room;
use crate::store::layers::adopt::adopt;
use crate::store::layers::collect::free_bases;
use crate::store::layers::graph::Directories;
use crate::{Context, Error, Result, mountinfo};

/// What is meant to go with a box: what its remover has seen of it.
#[derive(Clone, Debug, Default)]
pub struct Gone {
    /// Its snapshots: id → name.
    pub snapshots: BTreeMap<String, String>,
    /// Its live disk when the removal began.
    pub disk: Option<SeenDisk>,
}

/// A live disk as it was seen; another disk, or one that was written to, is not equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenDisk {
    file: FileId,
    /// Length in bytes.
    length: u64,
    modified: SystemTime,
}

/// The live disk of a box as it is now; None where it has none.
pub fn see_disk(store: &Store, box_id: &str) -> Option<SeenDisk> {
    let meta = fs::metadata(store.home().live_disk(box_id)).ok()?;
    Some(SeenDisk {
        file: FileId::of(&meta),
        length: meta.len(),
        modified: meta.modified().ok()?,
    })
}

/// Removes a box with all its snapshots, if it is what its remover has seen.
///
/// # Errors
/// ENOTEMPTY when it has a snapshot beside `gone` or another disk, EBUSY, EPERM when another box reads from its
/// live disk, ENOENT.
pub fn remove_box(store: &Store, box_id: &str, gone: &Gone) -> Result<()> {
    let what = format!("removal of box {}", store.exports.disks.name_of(box_id));
    let result = delete_with_room(store, &|| delete_box(store, box_id, gone));
    store.events().log_outcome(&what, result)
}

/// Order: adopt the layers that others read from, complete the references of all; a mark in the
/// directory; one transaction for all rows of the box; the directory; then bases that nothing reads
/// from any more. A crash before the transaction leaves the box as it was, with a mark that
/// recovery takes away; after it a marked directory without a row, which recovery removes, as
/// BoxLite's own start does.
pub fn delete_box(store: &Store, box_id: &str, gone: &Gone) -> Result<()> {
    let mut locked = lock_box(store, box_id)?;
    refuse_other_snapshots(&locked, gone)?;
    if gone.disk.is_some() && gone.disk != see_disk(store, box_id) {
        return Err(Error::new(
            libc::ENOTEMPTY,
            format!(
                "the disk of box {} changed since its removal began; remove it again",
                display_name(&locked.record)
            ),
        ));
    }
    let dir = store.home().box_dir(box_id);
    if let Some(mountpoint) = mountinfo::below(&dir)? {
        return Err(Error::busy(format!(
            "something is mounted on {}; unmount it first, or its contents would be deleted",
            mountpoint.display()
        )));
    }
    adopt_for_others(&mut locked)?;
    complete_refs_of_others(&mut locked)?;
    let bases = bases_of_box(&locked)?;
    let lock = locked.record.state().ok();
    let lock = lock.and_then(|state| u32::try_from(state["lock_id"].as_u64()?).ok());
    crash_point("remove-box.adopted");
    let aside = store.workspace().fresh_path("removed")?;
    let has_directory = dir.is_dir();
    if has_directory {
        mark_unrecorded(&dir)?;
    }
    crash_point("remove-box.marked");
    let unrecorded = locked.change.transaction(|rows| rows.delete_box(box_id));
    if let Err(error) = unrecorded {
        // A commit that reports an error can be durable all the same: where the row is gone, or
        // can't be looked for, the mark stays for recovery.
        if locked.change.box_by_id(box_id).is_ok() {
            let _ = durable::unlink(&dir.join(UNRECORDED));
        }
        return Err(error);
    }
    crash_point("remove-box.unrecorded");
    // The box is gone; what follows does not bring it back.
    let moved = match has_directory {
        true => put_aside(store, &dir, &aside),
        false => Ok(()),
    };
    let tidied = moved.and_then(|()| {
        crash_point("remove-box.moved");
        if let Some(lock) = lock {
            durable::unlink(&store.home().box_lock(lock))?;
        }
        free_bases(store, &mut locked.change, &|row| {
            row.is_ours() || bases.contains(&row.id)
        })
    });
    drop(locked);
    if let Err(error) = tidied {
        store.events().info(&format!(
            "{error}; what is left of the box goes when the home is mounted next"
        ));
    }
    remove_aside(aside);
    Ok(())
}

/// Moves a box's directory into the workspace, where a crash leaves it to be removed. Further names
/// of bases go at once: whether a base may be freed is told by its having no other.
fn put_aside(store: &Store, dir: &Path, aside: &Path) -> Result<()> {
    durable::rename(dir, aside)?;
    durable::sync_dir(&store.home().boxes_dir())?;
    let snapshots = aside.join("snapshots");
    for name in names_in(&snapshots)? {
        let layer = snapshots.join(name).join("disk.qcow2");
        if fs::symlink_metadata(&layer).is_ok_and(|meta| meta.nlink() > 1) {
            fs::remove_file(&layer).context(|| format!("cannot remove {}", layer.display()))?;
        }
    }
    Ok(())
}

/// Removes what was put aside, if anything was, in a thread of its own: large files take long to remove,
/// and whoever removed a name keeps all others out of its directory until he is answered.
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

fn refuse_other_snapshots(locked: &LockedBox<'_>, gone: &Gone) -> Result<()> {
    let snapshots = locked.snapshots()?;
    // One that got another name meanwhile is meant to stay.
    let is_gone = |row: &SnapshotRecord| gone.snapshots.get(&row.id) == Some(&row.name);
    match snapshots.iter().find(|row| !is_gone(row)) {
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

/// Adopts every layer in the box's directory that something outside reads from.
fn adopt_for_others(locked: &mut LockedBox<'_>) -> Result<()> {
    loop {
        let layers = locked.layers()?;
        let own = layers.files().iter();
        let own = own.filter(|file| file.box_id() == Some(&locked.record.id));
        let read = own
            .filter(|file| {
                layers
                    .readers_of(&file.path)
                    .any(|reader| reader.box_id() != Some(&locked.record.id))
            })
            .map(|file| file.path.clone())
            .next();
        match read {
            Some(path) => adopt(locked, &path)?,
            None => return Ok(()),
        };
    }
}

/// Makes every other box refer to the bases that it reads from, as far as they have rows: once this
/// box's references are gone, BoxLite goes by the others'.
fn complete_refs_of_others(locked: &mut LockedBox<'_>) -> Result<()> {
    let layers = locked.layers()?;
    let mut ids: HashMap<PathBuf, Vec<String>> = HashMap::new();
    let mut directories = Directories::default();
    for row in locked.change.bases()? {
        let path = directories.resolve(PathBuf::from(row.base_path));
        ids.entry(path).or_default().push(row.id);
    }
    let refs = locked.change.refs()?;
    let mut missing = BTreeSet::new();
    for record in locked.change.boxes()? {
        if record.id == locked.record.id {
            continue;
        }
        let referred = refs.get(&record.id);
        let has = |id: &String| referred.is_some_and(|referred| referred.contains(id));
        for file in layers.of_box(&record.id) {
            for path in layers.chain(&file.path) {
                let known = ids.get(path).into_iter().flatten();
                for id in known.filter(|id| !has(id)) {
                    missing.insert((id.clone(), record.id.clone()));
                }
            }
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

/// The ids of the bases that the box refers to or that were made from it, images' caches aside.
fn bases_of_box(locked: &LockedBox<'_>) -> Result<BTreeSet<String>> {
    let referred = locked.change.refs_of(&locked.record.id)?;
    let is_of_box =
        |row: &BaseRecord| row.source_box_id == locked.record.id || referred.contains(&row.id);
    let rows = locked.change.bases()?.into_iter();
    let rows = rows.filter(|row| row.kind != "rootfs" && is_of_box(row));
    Ok(rows.map(|row| row.id).collect())
}
