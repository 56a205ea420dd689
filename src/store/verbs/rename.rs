//! `mv web api` and `mv web/snapshots/a web/snapshots/b`.

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::UNRECORDED;
use crate::store::Store;
use crate::store::access::lock::{lock_box, lock_unprepared};
use crate::store::access::names::{refuse_bad_name, refuse_taken_name};
use crate::store::access::recovery::recover_box;
use crate::store::layers::snapshot_place::{
    mark_unrecorded_snapshot, marked_dir, refuse_taken, remove_snapshot_dir, snapshot_place,
    unread_layer,
};

/// Gives a box another name.
///
/// # Errors
/// EEXIST when it is taken, EBUSY.
pub fn rename_box(store: &Store, box_id: &str, name: &str) -> Result<()> {
    let what = format!(
        "rename of box {} to {name}",
        store.exports.disks.name_of(box_id)
    );
    let result = give_name(store, box_id, name);
    store.events().log_outcome(&what, result)
}

/// One update of one row: nothing else has the name of a box.
fn give_name(store: &Store, box_id: &str, name: &str) -> Result<()> {
    let mut locked = lock_unprepared(store, box_id)?;
    if locked.record.name.as_deref() == Some(name) {
        return Ok(());
    }
    refuse_taken_name(&locked.change, name)?;
    locked
        .change
        .transaction(|rows| rows.rename_box(box_id, name))?;
    crash_point("rename-box.recorded");
    Ok(())
}

/// Gives a snapshot another name.
///
/// # Errors
/// EINVAL for a name BoxLite would refuse, EEXIST when it is taken, EBUSY, ENOENT.
pub fn rename_snapshot(store: &Store, box_id: &str, snapshot_id: &str, name: &str) -> Result<()> {
    let what = format!(
        "rename of snapshot {} of box {} to {name}",
        store.exports.disks.snapshot_name(box_id, snapshot_id)?,
        store.exports.disks.name_of(box_id)
    );
    let result = move_snapshot(store, box_id, snapshot_id, name);
    store.events().log_outcome(&what, result)
}

/// Order: adopt the layer if any chain names its path; a marked directory with a further name of
/// it, moved into place; the old directory is marked, too; the row; the old name. A crash before
/// the row leaves a marked directory without one, and after it the old directory likewise:
/// recovery removes either, also if BoxLite removed the other meanwhile.
fn move_snapshot(store: &Store, box_id: &str, snapshot_id: &str, name: &str) -> Result<()> {
    refuse_bad_name(name)?;
    let mut locked = lock_box(store, box_id)?;
    let snapshot = locked.snapshot(snapshot_id)?;
    if snapshot.name == name {
        return Ok(());
    }
    refuse_taken(&locked, name)?;
    let layer = unread_layer(&mut locked, &snapshot)?;
    crash_point("rename.adopted");
    let dir = marked_dir(store)?;
    // Its row may name another place than the one that is its own.
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
        // Whatever the row says now, one of the two directories has none, and recovery sees which.
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
