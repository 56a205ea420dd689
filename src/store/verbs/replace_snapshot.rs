//! Puts a snapshot that is copied in into the place of another one.
//!
//! That is done only while the live disk of the box has the same contents as the other one, so that
//! nothing is lost. Both rows change in one transaction: a crash leaves one snapshot or the other.

use std::path::PathBuf;

use crate::disk::{FileId, Format, Header, Layer};
use crate::exports::Source;
use crate::files::listing::resolve;
use crate::store::Store;
use crate::store::access::lock::{make_ready, refuse_unfit};
use crate::store::access::locked_box::LockedBox;
use crate::store::access::recovery::recover_box;
use crate::store::layers::snapshot_place::{NewSnapshotIdentity, refuse_taken_snapshot_name};
use crate::store::verbs::remove_snapshot::free_removed;
use crate::{Error, Result};

/// Returns whether the live disk of a box has the same contents as the snapshot: it reads from the
/// snapshot's layer and holds no data of its own.
///
/// # Errors
/// ENOENT when the snapshot is gone, EIO.
pub fn live_equals_snapshot(store: &Store, box_id: &str, snapshot_id: &str) -> Result<bool> {
    let snapshot = Source::Snapshot {
        box_id: box_id.to_owned(),
        snapshot_id: snapshot_id.to_owned(),
    };
    let layer = FileId::at(&store.exports.disks.top_of(&snapshot)?)?;
    let live = store.home().live_disk(box_id);
    let Some(backing) = Header::open(&live)?.and_then(|header| header.backing_path(&live)) else {
        return Ok(false);
    };
    Ok(FileId::at(&resolve(&backing)?)? == layer
        && !Layer::open(&live, Format::Qcow2)?.holds_data()?)
}

/// Checks under the lock that a snapshot may be made, and makes the box ready if the snapshot
/// replaces another.
///
/// # Errors
/// EEXIST when its name is taken. If it replaces another: EPERM when the live disk has other
/// contents than that, EBUSY beside a runtime, and those of recovering the box.
pub fn begin_new_snapshot(locked: &mut LockedBox<'_>, new: &NewSnapshotIdentity) -> Result<()> {
    let Some(replaced) = &new.replaces else {
        return refuse_taken_snapshot_name(locked, &new.name);
    };
    if !locked.change.take_lock()? {
        return Err(Error::busy(format!(
            "snapshot {} can't be replaced while a BoxLite program has the home open; copy to another name",
            new.name
        )));
    }
    refuse_unfit(locked)?;
    make_ready(locked)?;
    if live_equals_snapshot(locked.store, &locked.record.id, replaced)? {
        return Ok(());
    }
    Err(Error::new(
        libc::EPERM,
        format!(
            "the box changed since snapshot {} was taken, so the snapshot is not replaced; copy to another name",
            new.name
        ),
    ))
}

/// Removes the layer of the snapshot that was replaced, if any. `made` is the result of recording
/// the new one. If that failed, recovery removes what was prepared.
///
/// # Errors
/// That of `made`, and those of removing the layer.
pub fn finish_new_snapshot(
    locked: &mut LockedBox<'_>,
    made: Result<Option<PathBuf>>,
) -> Result<()> {
    match made {
        Ok(None) => Ok(()),
        Ok(Some(layer)) => free_removed(locked, &layer),
        Err(error) => {
            // The rows may be changed all the same: recovery checks.
            if !locked.change.is_shared() {
                let _ = recover_box(locked);
            }
            Err(error)
        }
    }
}
