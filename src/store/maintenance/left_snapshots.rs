//! Frees the layers of snapshots that were deleted beside a runtime, once BoxLite can no longer be
//! about to restore them.

use std::time::Duration;

use crate::Result;
use crate::files::listing::names_in;
use crate::files::markers::UNRECORDED;
use crate::store::Store;
use crate::store::verbs::remove_snapshot::free_left_snapshot;

/// Frees the layers that have been left for `time` at least. What can't be freed now is tried again
/// after that time.
pub fn free_left_snapshots(store: &Store, time: Duration) {
    for left in store.left.take_due(time) {
        match free_left_snapshot(store, &left.box_id, &left.layer) {
            Ok(()) => {}
            // The box is gone, and its directory with it.
            Err(error) if error.errno() == libc::ENOENT => {}
            Err(error) => {
                log::debug!("{} is left for now: {error}", left.layer.display());
                store.left.add(&left.box_id, &left.layer);
            }
        }
    }
}

/// Finds the layers that an earlier mount left, when a runtime keeps this one from recovering.
///
/// # Errors
/// Those of reading the directories.
pub fn find_left_snapshots(store: &Store) -> Result<()> {
    for box_id in names_in(&store.home().boxes_dir())? {
        let snapshots = store.home().snapshots_dir(&box_id);
        for name in names_in(&snapshots)? {
            if snapshots.join(&name).join(UNRECORDED).exists() {
                let layer = store.home().snapshot_disk(&box_id, &name);
                store.left.add(&box_id, &layer);
            }
        }
    }
    Ok(())
}
