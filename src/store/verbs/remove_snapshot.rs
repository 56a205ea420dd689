//! `rmdir web/snapshots/NAME`.

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::store::Store;
use crate::store::access::lock::lock_box;
use crate::store::access::recovery::recover_box;
use crate::store::access::room::delete_with_room;
use crate::store::layers::references::free_surplus;
use crate::store::layers::snapshot_place::{
    mark_unrecorded_snapshot, remove_snapshot_dir, unread_layer,
};

/// Deletes a snapshot. Its layer stays in `bases/` while any chain reads from it.
///
/// # Errors
/// ENOENT when it is gone, EBUSY.
pub fn remove_snapshot(store: &Store, box_id: &str, snapshot_id: &str) -> Result<()> {
    let what = format!(
        "removal of snapshot {} of box {}",
        store.exports.disks.snapshot_name(box_id, snapshot_id)?,
        store.exports.disks.name_of(box_id)
    );
    let result = delete_with_room(store, &|| delete_snapshot(store, box_id, snapshot_id));
    store.events().log_outcome(&what, result)
}

/// Order: adopt if any chain names its path, mark the directory, delete the row, unlink the layer's
/// name. A crash after the row leaves a marked directory without one: recovery removes it, also
/// where the layer had no other name.
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
        // Recovery sees whether the row is there.
        let _ = recover_box(&mut locked);
        return Err(error);
    }
    crash_point("remove.unrecorded");
    durable::unlink(&layer)?;
    crash_point("remove.unlinked");
    // The snapshot is gone; what follows does not bring it back.
    remove_snapshot_dir(store, layer.parent());
    if let Err(error) = free_surplus(&mut locked) {
        store
            .events()
            .info(&format!("{error}; its space is not freed"));
    }
    Ok(())
}
