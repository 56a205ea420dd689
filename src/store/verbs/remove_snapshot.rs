//! `rmdir web/snapshots/NAME`: deletes a snapshot.

use std::path::Path;

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::store::Store;
use crate::store::access::deletion_space::delete_with_room;
use crate::store::access::lock::lock_box;
use crate::store::access::locked_box::LockedBox;
use crate::store::access::recovery::recover_box;
use crate::store::layers::references::free_surplus;
use crate::store::layers::snapshot_place::{
    mark_unrecorded_snapshot, remove_snapshot_dir, unread_layer,
};

/// Deletes a snapshot. Its layer stays in `bases/` while any chain reads from it.
///
/// # Errors
/// ENOENT when there is no such snapshot, EBUSY.
pub fn remove_snapshot(store: &Store, box_id: &str, snapshot_id: &str) -> Result<()> {
    let action = format!(
        "removal of snapshot {} of box {}",
        store.exports.disks.snapshot_name(box_id, snapshot_id)?,
        store.exports.disks.name_of(box_id)
    );
    let result = delete_with_room(store, &|| delete_snapshot(store, box_id, snapshot_id));
    store.events().log_outcome(&action, result)
}

/// Order: adopt the layer if any chain names its path; mark the directory; delete the row; unlink
/// the layer's name. A crash after the row was deleted leaves a marked directory without a row,
/// which recovery removes even if the layer has no other name.
fn delete_snapshot(store: &Store, box_id: &str, snapshot_id: &str) -> Result<()> {
    let mut locked = lock_box(store, box_id)?;
    let snapshot = locked.snapshot(snapshot_id)?;
    let layer = unread_layer(&mut locked, &snapshot)?;
    crash_point("remove.adopted");
    mark_unrecorded_snapshot(&layer)?;
    crash_point("remove.marked");
    let unrecorded = locked
        .change
        .transaction(|rows| rows.delete_snapshot(box_id, snapshot_id));
    if let Err(error) = unrecorded {
        // The row may be deleted all the same: recovery checks.
        let _ = recover_box(&mut locked);
        return Err(error);
    }
    crash_point("remove.unrecorded");
    free_removed(&mut locked, &layer)
}

/// Removes the layer of a snapshot whose row is deleted, and frees what only that needed. A failure
/// after the layer is unlinked is only logged.
///
/// # Errors
/// EIO when the layer can't be unlinked.
pub fn free_removed(locked: &mut LockedBox<'_>, layer: &Path) -> Result<()> {
    durable::unlink(layer)?;
    crash_point("remove.unlinked");
    remove_snapshot_dir(locked.store, layer.parent());
    if let Err(error) = free_surplus(locked) {
        let events = locked.store.events();
        events.info(&format!("{error}; the space of the snapshot is not freed"));
    }
    Ok(())
}
