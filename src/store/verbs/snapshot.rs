//! `mkdir web/snapshots/NAME`: takes a snapshot.

use crate::Result;
use crate::store::Store;
use crate::store::access::lock::lock_shared;
use crate::store::access::names::refuse_bad_snapshot_name;
use crate::store::layers::draft::draft_freeze;
use crate::store::layers::freeze::freeze_live;
use crate::store::layers::snapshot_place::{
    NewSnapshotIdentity, name_layer, refuse_taken_snapshot_name,
};

/// Takes a snapshot of a box's live disk and returns its id.
///
/// # Errors
/// EINVAL for a name that BoxLite would refuse, EEXIST when the name is taken, EBUSY, ENODATA for a
/// box without a disk.
pub fn snapshot_box(store: &Store, box_id: &str, name: &str) -> Result<String> {
    let result = take_snapshot(store, box_id, name);
    store.events().log_outcome(
        &format!(
            "snapshot {name} of box {}",
            store.exports.disks.name_of(box_id)
        ),
        result,
    )
}

/// Order: draft what takes long before the lock is taken; freeze the live disk; name the frozen
/// layer.
fn take_snapshot(store: &Store, box_id: &str, name: &str) -> Result<String> {
    refuse_bad_snapshot_name(name)?;
    let draft = draft_freeze(store, box_id)?;
    let mut locked = lock_shared(store, box_id)?;
    refuse_taken_snapshot_name(&locked, name)?;
    let frozen = freeze_live(&mut locked, &draft)?;
    let new = NewSnapshotIdentity::taken_now(name)?;
    name_layer(&mut locked, &frozen, &new)?;
    Ok(new.id)
}
