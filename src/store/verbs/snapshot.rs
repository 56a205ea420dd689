//! `mkdir web/snapshots/NAME`: takes a snapshot.

use crate::Result;
use crate::home::snapshot_id;
use crate::store::Store;
use crate::store::access::lock::lock_shared;
use crate::store::access::names::refuse_bad_name;
use crate::store::layers::draft::draft_freeze;
use crate::store::layers::freeze::freeze_live;
use crate::store::layers::snapshot_place::{name_layer, refuse_taken};

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
    refuse_bad_name(name)?;
    let draft = draft_freeze(store, box_id)?;
    let mut locked = lock_shared(store, box_id)?;
    refuse_taken(&locked, name)?;
    let frozen = freeze_live(&mut locked, &draft)?;
    name_layer(&mut locked, &frozen, &snapshot_id()?, name, None)
}
