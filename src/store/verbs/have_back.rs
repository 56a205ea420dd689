//! `mv .boxlite/undo/X web`: brings back what was removed or restored over.

use std::path::{Path, PathBuf};

use crate::disk::{self, FileId, Format, Header};
use crate::exports::Source;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::{UNRECORDED, unmark};
use crate::files::workspace::Scratch;
use crate::home::{
    BaseRecord, Change, KeptBox, KeptBoxRows, KeptFrom, SnapshotRecord, snapshot_id,
};
use crate::store::Store;
use crate::store::access::lock::{begin_shared_change, made_again};
use crate::store::access::names::refuse_taken_box_name;
use crate::store::kept::entries::remove_entry;
use crate::store::kept::expire::{free, tell_of_unfreed, with_room};
use crate::store::layers::graph::{LayerGraph, Role, is_row_of};
use crate::store::layers::mergeable::MOST_BACKING;
use crate::store::layers::snapshot_place::NewSnapshotIdentity;
use crate::store::verbs::clone::clone_snapshot;
use crate::store::verbs::install::place;
use crate::{Context, Error, Result};

/// Brings a removed box back as `name`, with the id, the configuration and the snapshots that it had.
/// The entry is used up.
///
/// # Errors
/// EEXIST when the id or the name is taken, EPERM for an entry of a snapshot or of a disk, ENOENT,
/// EBUSY.
pub fn have_back_box(store: &Store, kept_id: &str, name: &str) -> Result<()> {
    let result = with_room(store, Some(kept_id), &|| {
        made_again(store, &|| bring_back(store, kept_id, name))
    });
    let action = format!("return of removed box {name}");
    store.events().log_outcome(&action, result)
}

/// Makes a snapshot of the state that an entry keeps, in the box that it is of. One that was removed
/// has its time again. The entry is used up.
///
/// # Errors
/// EPERM for an entry of a whole box, or of another box; those of [`clone_snapshot`].
pub fn have_back_snapshot(store: &Store, kept_id: &str, box_id: &str, name: &str) -> Result<()> {
    let entry = entry_of(store, kept_id)?;
    if entry.rows.action == KeptFrom::BoxRemoved || entry.box_id() != box_id {
        return Err(Error::new(
            libc::EPERM,
            "only what was a snapshot or the disk of this box can become a snapshot of it; copy it into the root to make a box of it",
        ));
    }
    let removed = entry.rows.removed_snapshot();
    let new = NewSnapshotIdentity {
        id: snapshot_id()?,
        name: name.to_owned(),
        created_at: removed.map(|row| row.created_at),
        replaces: None,
    };
    let source = Source::Live {
        box_id: kept_id.to_owned(),
    };
    let read = store.exports.plain.contents_now(&source)?;
    let read = read.ok_or_else(|| Error::new(libc::ENODATA, "it has no disk"))?;
    clone_snapshot(store, &source, &read, box_id, &new)?;
    crash_point("undo.snapshot-back");
    match begin_shared_change(store) {
        Ok(mut change) => {
            use_up(store, kept_id, Ok(()));
            // The snapshot is on the layer below, if the disk had no data of its own.
            tell_of_unfreed(store, free(store, &mut change, false));
        }
        Err(error) => use_up(store, kept_id, Err(error)),
    }
    Ok(())
}

fn entry_of(store: &Store, kept_id: &str) -> Result<std::sync::Arc<KeptBox>> {
    let catalog = store.home().catalog()?;
    let entry = catalog.kept_by_id(kept_id).cloned();
    entry.ok_or_else(|| Error::new(libc::ENOENT, "that is no longer kept"))
}

/// What becomes the live disk of a box that comes back.
enum Returning {
    /// The box had none.
    Nothing,
    /// The disk that it had: no one else has a name of it, or reads it. The base goes.
    Disk {
        file: PathBuf,
        base: BaseRecord,
        path: PathBuf,
    },
    /// An overlay on that disk: others read it by now.
    Overlay {
        base: PathBuf,
        virtual_size: u64,
        file: PathBuf,
    },
}

/// Order: the spare name of the disk's base goes; the box's directory is built in the workspace; it is
/// moved to its place, marked; one transaction: all rows of the box, and without the row of that base;
/// the mark goes, the base's name, and the entry.
///
/// A crash before the transaction leaves a marked directory without a row, which recovery removes: all
/// its disks are further names of what the entry has. A crash after it leaves a live disk with a second
/// name in `bases/`, which recovery removes, and an entry of a box that is there, which it removes.
fn bring_back(store: &Store, kept_id: &str, name: &str) -> Result<()> {
    let mut change = begin_shared_change(store)?;
    let entry = entry_of(store, kept_id)?;
    refuse(store, &change, &entry, name)?;
    let layers = store.layers.scan()?;
    refuse_foreign(store, &layers, &entry)?;
    if change.is_shared() && layers.unseen(store.home()).is_some() {
        return Err(Error::busy("BoxLite is moving disks; try again").for_a_moment());
    }
    let bases = change.bases()?;
    let returning = returning(store, &layers, &bases, &entry)?;
    if let Returning::Disk { path, .. } = &returning {
        store.spares.drop_durably(path)?;
    }
    let (dir, snapshots) = build(store, &entry, &returning)?;
    let refs = references(store, &layers, &bases, &entry, &returning);
    let box_id = entry.box_id().to_owned();
    let target = store.home().box_dir(&box_id);
    let lock_id = change.new_lock_id()?;
    let undo = || {
        // Nothing else was there, and its disks are names of the entry's.
        let _ = std::fs::remove_dir_all(&target);
        let _ = std::fs::remove_file(store.home().box_lock(lock_id));
    };
    change.begin_exclusive().inspect_err(|_| undo())?;
    place(&dir, &target).inspect_err(|_| undo())?;
    crash_point("undo.box-placed");
    let rows = KeptBoxRows {
        record: &entry.rows.record,
        name,
        box_home: target.display().to_string(),
        lock_id,
        snapshots: &snapshots,
    };
    let recorded = change.transaction(|transaction| {
        transaction.insert_kept_box(&rows)?;
        if let Returning::Disk { base, .. } = &returning {
            transaction.delete_base(&base.id)?;
        }
        refs.iter()
            .try_for_each(|base| transaction.insert_ref(base, &box_id))
    });
    // A runtime that started before the rows existed removes the directory.
    let recorded = recorded.and_then(|()| {
        change.refuse_other_runtime().inspect_err(|_| {
            // The result does not matter: whether the row exists is checked below.
            let _ = change.withdraw(|transaction| {
                transaction.delete_box(&box_id)?;
                match &returning {
                    Returning::Disk { base, .. } => transaction.restore_base(base),
                    _ => Ok(()),
                }
            });
        })
    });
    if let Err(error) = recorded {
        let gone = |e: &Error| e.errno() == libc::ENOENT;
        if change.box_by_id(&box_id).as_ref().is_err_and(gone) {
            undo();
        }
        return Err(error);
    }
    crash_point("undo.box-back");
    // The box is back. A failure from here on is only logged.
    let unlinked = unmark(&target).and_then(|()| match &returning {
        Returning::Disk { path, .. } => durable::unlink(path),
        _ => Ok(()),
    });
    use_up(store, kept_id, unlinked);
    Ok(())
}

/// Removes an entry whose contents are back, if the steps before it succeeded. After a failure,
/// recovery removes the rest, or the entry expires.
fn use_up(store: &Store, kept_id: &str, before: Result<()>) {
    if let Err(error) = before.and_then(|()| remove_entry(store, kept_id)) {
        let message = format!("{error}; the next mount of the home removes the rest");
        store.events().info(&message);
    }
}

fn refuse(store: &Store, change: &Change<'_>, entry: &KeptBox, name: &str) -> Result<()> {
    if entry.rows.action != KeptFrom::BoxRemoved {
        return Err(Error::new(
            libc::EPERM,
            "it is a snapshot, or a disk that was replaced: move it to snapshots/NAME of its box, or copy it to make a box of it",
        ));
    }
    let box_id = entry.box_id();
    if change.box_by_id(box_id).is_ok() {
        return Err(Error::new(
            libc::EEXIST,
            format!("box {box_id} is there already; copy what is kept to make another box of it"),
        ));
    }
    refuse_taken_box_name(change, name)?;
    let dir = store.home().box_dir(box_id);
    if std::fs::symlink_metadata(&dir).is_ok() && !remove_left(store, change, &dir)? {
        return Err(Error::busy(format!(
            "{} is left of the removal of the box; mount the home again without a BoxLite program, which removes it, or copy what is kept to make another box of it",
            dir.display()
        )));
    }
    Ok(())
}

/// Removes the marked directory that the removal of the box left, or an earlier attempt to have it
/// back. Returns false if it is not marked, or a runtime may look at it. All disks in it that can be
/// read have another name in the entry.
fn remove_left(store: &Store, change: &Change<'_>, dir: &Path) -> Result<bool> {
    if !dir.join(UNRECORDED).exists() || !change.is_surely_alone()? {
        return Ok(false);
    }
    std::fs::remove_dir_all(dir).context(|| format!("cannot remove {}", dir.display()))?;
    durable::count_change();
    durable::sync_dir(&store.home().boxes_dir())?;
    Ok(true)
}

/// Refuses an entry of another home: this home is a copy, or a layer lies outside of it.
fn refuse_foreign(store: &Store, layers: &LayerGraph, entry: &KeptBox) -> Result<()> {
    let catalog = store.home().catalog()?;
    if let Some(record) = catalog.box_by_id(entry.id()) {
        store.exports.disks.refuse_copied(record)?;
    }
    let tops = tops_of(store, entry);
    let mut paths = tops.iter().flat_map(|top| layers.chain(top));
    match paths.find(|path| !store.home().contains(path)) {
        None => Ok(()),
        Some(outside) => Err(Error::new(
            libc::EPERM,
            format!(
                "what is kept reads from {}, outside this home, and that file may belong to another; copy its export.boxlite to NEW.boxlite instead",
                outside.display()
            ),
        )),
    }
}

/// Returns the paths of an entry's disks.
fn tops_of(store: &Store, entry: &KeptBox) -> Vec<PathBuf> {
    let home = store.home();
    let rows = entry.rows.snapshots.iter();
    let mut tops: Vec<PathBuf> = rows
        .map(|row| home.snapshot_disk(entry.id(), &row.id))
        .collect();
    tops.push(home.live_disk(entry.id()));
    tops
}

fn row_at<'r>(bases: &'r [BaseRecord], path: &Path) -> Option<&'r BaseRecord> {
    bases.iter().find(|row| is_row_of(row, path))
}

fn returning(
    store: &Store,
    layers: &LayerGraph,
    bases: &[BaseRecord],
    entry: &KeptBox,
) -> Result<Returning> {
    let file = store.home().live_disk(entry.id());
    if !file.is_file() {
        return Ok(Returning::Nothing);
    }
    let id = FileId::at(&file)?;
    let base = layers.base_of(id).map(|name| name.path.clone());
    let path = base.ok_or_else(|| {
        Error::busy(format!(
            "{} has no name in bases/ any more; mount the home again, which gives it one",
            file.display()
        ))
    })?;
    let is_own = |name: &crate::store::layers::graph::ImageFile| match &name.role {
        Role::Base { .. } => name.path == path,
        Role::Kept { id } => id == entry.id(),
        _ => false,
    };
    let names: Vec<_> = layers.names_of(id).collect();
    let is_alone = names
        .iter()
        .all(|name| is_own(name) && name.names == names.len() as u64)
        && layers.readers_of(&path).next().is_none();
    let row = row_at(bases, &path).filter(|row| row.is_ours());
    if let Some(row) = row.filter(|_| is_alone) {
        return Ok(Returning::Disk {
            file,
            base: row.clone(),
            path,
        });
    }
    let header = Header::open(&file)?
        .ok_or_else(|| Error::damaged(format!("{} is not a qcow2 image", file.display())))?;
    if layers.chain(&path).len() > MOST_BACKING {
        return Err(Error::new(
            libc::EPERM,
            "others read its disk, and a virtual machine could not start with one layer more; copy it with cp -r instead",
        ));
    }
    Ok(Returning::Overlay {
        base: path,
        virtual_size: header.virtual_size,
        file,
    })
}

/// Builds the directory of the box in the workspace. Returns it with the rows of the snapshots.
fn build(
    store: &Store,
    entry: &KeptBox,
    returning: &Returning,
) -> Result<(Scratch, Vec<SnapshotRecord>)> {
    let home = store.home();
    let dir = store.workspace().scratch("box")?;
    home.make_dir(&dir)?;
    home.make_dir(&dir.join("disks"))?;
    let live = dir.join("disks/disk.qcow2");
    match returning {
        Returning::Nothing => {}
        Returning::Disk { file, .. } => durable::link(file, &live)?,
        Returning::Overlay {
            base,
            virtual_size,
            file,
        } => {
            disk::create_overlay(&live, base, Format::Qcow2, *virtual_size)?;
            home.give_to_owner(&live)?;
            durable::copy_times(file, &live)?;
            durable::sync_file(&live)?;
        }
    }
    let mut snapshots = entry.rows.snapshots.clone();
    if !snapshots.is_empty() {
        home.make_dir(&dir.join("snapshots"))?;
    }
    for row in &mut snapshots {
        let place = dir.join("snapshots").join(&row.name);
        home.make_dir(&place)?;
        let kept = home.snapshot_disk(entry.id(), &row.id);
        durable::link(&kept, &place.join("disk.qcow2"))?;
        let path = home.snapshot_disk(entry.box_id(), &row.name);
        let mut value = row.value()?;
        value["base_path"] = path.display().to_string().into();
        row.json = value.to_string();
    }
    if !snapshots.is_empty() {
        durable::sync_dir(&dir.join("snapshots"))?;
    }
    Ok((dir, snapshots))
}

/// Returns the ids of the bases that the box reads from, or that have one of its snapshots as another
/// name.
fn references(
    store: &Store,
    layers: &LayerGraph,
    bases: &[BaseRecord],
    entry: &KeptBox,
    returning: &Returning,
) -> Vec<String> {
    let tops = tops_of(store, entry);
    let mut reached: Vec<PathBuf> = Vec::new();
    for top in &tops {
        reached.extend(layers.chain(top).into_iter().map(Path::to_owned));
        let base = layers.at(top).and_then(|file| layers.base_of(file.id));
        reached.extend(base.map(|name| name.path.clone()));
    }
    if let Returning::Disk { path, .. } = returning {
        reached.retain(|reached| reached != path);
    }
    reached.sort();
    reached.dedup();
    let rows = reached.iter().filter_map(|path| row_at(bases, path));
    let mut ids: Vec<String> = rows.map(|row| row.id.clone()).collect();
    ids.dedup();
    ids
}
