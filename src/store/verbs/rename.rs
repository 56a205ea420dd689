//! `mv web api` renames a box; `mv web/snapshots/a web/snapshots/b` renames a snapshot.

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::UNRECORDED;
use crate::store::Store;
use crate::store::access::lock::{lock_box, lock_unprepared};
use crate::store::access::names::{refuse_bad_snapshot_name, refuse_taken_box_name};
use crate::store::access::recovery::recover_box;
use crate::store::layers::snapshot_place::{
    mark_unrecorded_snapshot, marked_dir, refuse_taken_snapshot_name, remove_snapshot_dir,
    snapshot_place, unread_layer,
};

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
    let result = move_snapshot(store, box_id, snapshot_id, name);
    store.events().log_outcome(&action, result)
}

/// Order: adopt the layer if any chain names its path; move a marked directory with a further name
/// of the layer into place; mark the old directory, too; update the row; unlink the old name.
///
/// A crash before the row was updated leaves the new directory marked and without a row; a crash
/// after it leaves the old directory in that state. Recovery removes either, even if BoxLite
/// removed the other meanwhile.
fn move_snapshot(store: &Store, box_id: &str, snapshot_id: &str, name: &str) -> Result<()> {
    refuse_bad_snapshot_name(name)?;
    let mut locked = lock_box(store, box_id)?;
    let snapshot = locked.snapshot(snapshot_id)?;
    if snapshot.name == name {
        return Ok(());
    }
    refuse_taken_snapshot_name(&locked, name)?;
    let layer = unread_layer(&mut locked, &snapshot)?;
    crash_point("rename.adopted");
    let dir = marked_dir(store)?;
    // The row may name a file outside of the snapshot's own directory.
    durable::link(
        &store.exports.disks.snapshot_layer(&snapshot),
        &dir.join("disk.qcow2"),
    )?;
    let path = snapshot_place(&locked, name, Some(&dir))?;
    crash_point("rename.linked");
    mark_unrecorded_snapshot(&layer)?;
    let recorded = locked.change.transaction(|rows| {
        rows.rename_snapshot(box_id, snapshot_id, name, &path.display().to_string())
    });
    if let Err(error) = recorded {
        // Whichever name the row has now, one of the two directories has no row; recovery removes
        // it.
        let _ = recover_box(&mut locked);
        return Err(error);
    }
    crash_point("rename.recorded");
    durable::unlink(&path.with_file_name(UNRECORDED))?;
    durable::unlink(&layer)?;
    crash_point("rename.unlinked");
    remove_snapshot_dir(store, layer.parent());
    Ok(())
}
