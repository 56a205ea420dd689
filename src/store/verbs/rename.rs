//! `mv web api` renames a box; `mv web/snapshots/a web/snapshots/b` renames a snapshot.

use std::path::Path;
use std::time::Duration;

use crate::Result;
use crate::exports::Source;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::UNRECORDED;
use crate::home::SnapshotRecord;
use crate::store::Store;
use crate::store::access::lock::{lock_shared, lock_unprepared, made_again_on};
use crate::store::access::locked_box::LockedBox;
use crate::store::access::names::{refuse_bad_snapshot_name, refuse_taken_box_name};
use crate::store::access::recovery::recover_box;
use crate::store::layers::snapshot_place::{
    has_own_place, mark_unrecorded_snapshot, marked_dir, own_place, refuse_taken_snapshot_name,
    remove_place, snapshot_place, unread_layer,
};
use crate::store::verbs::remove_snapshot::{adopt_if_restored, free_or_leave, refuse_restored};

/// How often, and after which pause, a removal by BoxLite is looked for that waited for a rename:
/// SQLite looks every 100 ms at least whether it may go on.
const REMOVAL_LOOKS: u32 = 15;
const REMOVAL_PAUSE: Duration = Duration::from_millis(10);

/// Renames a box.
///
/// # Errors
/// EEXIST when the name is taken, EBUSY, ENOENT.
pub fn rename_box(store: &Store, box_id: &str, name: &str) -> Result<()> {
    let action = format!(
        "rename of box {} to {name}",
        store.exports.disks.name_of(box_id)
    );
    let result = rename_box_row(store, box_id, name);
    store.events().log_outcome(&action, result)
}

/// Updates one row: only the box's row has its name.
fn rename_box_row(store: &Store, box_id: &str, name: &str) -> Result<()> {
    let mut locked = lock_unprepared(store, box_id)?;
    if locked.record.name.as_deref() == Some(name) {
        return Ok(());
    }
    refuse_taken_box_name(&locked.change, name)?;
    locked
        .change
        .transaction(|rows| rows.rename_box(box_id, name))?;
    crash_point("rename-box.recorded");
    Ok(())
}

/// Renames a snapshot.
///
/// # Errors
/// EINVAL for a name that BoxLite would refuse, EEXIST when the name is taken, EBUSY, ENOENT.
pub fn rename_snapshot(store: &Store, box_id: &str, snapshot_id: &str, name: &str) -> Result<()> {
    let action = format!(
        "rename of snapshot {} of box {} to {name}",
        store.exports.disks.snapshot_name(box_id, snapshot_id)?,
        store.exports.disks.name_of(box_id)
    );
    let source = Source::Snapshot {
        box_id: box_id.to_owned(),
        snapshot_id: snapshot_id.to_owned(),
    };
    let result = made_again_on(store, &source, &|| {
        move_snapshot(store, box_id, snapshot_id, name)
    });
    store.events().log_outcome(&action, result)
}

/// Order: adopt the layer if any chain names its path; move a marked directory with a further name
/// of the layer into place; mark the old directory, too; update the row; unlink the old name, at
/// once or when BoxLite can no longer need it (see [`remove_snapshot`]).
///
/// A crash before the row was updated leaves the new directory marked and without a row; a crash
/// after it leaves the old directory in that state. Recovery removes either, even if BoxLite
/// removed the other meanwhile.
///
/// [`remove_snapshot`]: super::remove_snapshot
fn move_snapshot(store: &Store, box_id: &str, snapshot_id: &str, name: &str) -> Result<()> {
    refuse_bad_snapshot_name(name)?;
    let mut locked = lock_shared(store, box_id)?;
    let snapshot = locked.snapshot(snapshot_id)?;
    if snapshot.name == name {
        return Ok(());
    }
    refuse_taken_snapshot_name(&locked, name)?;
    let layer = unread_layer(&mut locked, &snapshot)?;
    crash_point("rename.adopted");
    let recorded = store.exports.disks.snapshot_layer(&snapshot);
    if layer == recorded && has_own_place(&layer) {
        // Only the row has the name.
        return record_name(&mut locked, &snapshot, name, &layer);
    }
    let dir = marked_dir(store)?;
    // The row may name a file outside of the snapshot's own directory.
    durable::link(&recorded, &dir.join("disk.qcow2"))?;
    locked.change.begin_exclusive()?;
    let place = if locked.change.is_shared() {
        own_place()?
    } else {
        name.to_owned()
    };
    let path = snapshot_place(&locked, &place, Some(&dir))?;
    crash_point("rename.linked");
    let renamed = mark_unrecorded_snapshot(&layer)
        .and_then(|()| refuse_restored(&locked, &layer))
        .and_then(|()| record_name(&mut locked, &snapshot, name, &path));
    if let Err(error) = renamed {
        undo_move(&mut locked, &snapshot, &layer, &path);
        return Err(error);
    }
    refuse_removed(&locked, &snapshot, &path)?;
    durable::unlink(&path.with_file_name(UNRECORDED))?;
    free_or_leave(&mut locked, &layer)?;
    drop(locked);
    adopt_if_restored(store, box_id, &layer);
    Ok(())
}

/// Fails if BoxLite removes the snapshot at this moment. It had found the row by the old name and
/// waited for our transaction; then it deletes the row by its id, and the old directory.
///
/// # Errors
/// ENOENT.
fn refuse_removed(locked: &LockedBox<'_>, snapshot: &SnapshotRecord, new: &Path) -> Result<()> {
    if !locked.change.is_shared() || locked.change.is_alone() {
        return Ok(());
    }
    for _ in 0..REMOVAL_LOOKS {
        if let Err(error) = locked.snapshot(&snapshot.id) {
            remove_place(locked, new);
            return Err(error);
        }
        std::thread::sleep(REMOVAL_PAUSE);
    }
    Ok(())
}

fn record_name(
    locked: &mut LockedBox<'_>,
    snapshot: &SnapshotRecord,
    name: &str,
    layer: &Path,
) -> Result<()> {
    let (box_id, path) = (locked.record.id.clone(), layer.display().to_string());
    locked
        .change
        .transaction(|rows| rows.rename_snapshot(&box_id, &snapshot.id, name, &path))?;
    crash_point("rename.recorded");
    Ok(())
}

/// Cleans up after a rename that failed. Recovery removes whichever of the two directories has no
/// row. Beside a runtime no recovery runs, so the new directory is removed here, unless the row may
/// already name it.
fn undo_move(locked: &mut LockedBox<'_>, snapshot: &SnapshotRecord, old: &Path, new: &Path) {
    if !locked.change.is_shared() {
        let _ = recover_box(locked);
    } else if locked
        .snapshot(&snapshot.id)
        .is_ok_and(|row| row == *snapshot)
    {
        remove_place(locked, new);
        let _ = durable::unlink(&old.with_file_name(UNRECORDED));
    }
}
