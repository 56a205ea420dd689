//! `rmdir web/snapshots/NAME`: deletes a snapshot.
//!
//! Beside a runtime, BoxLite may be about to restore the snapshot: it has read the row, and next it
//! removes the live disk and makes an overlay on the layer, by the layer's path. So the row goes at
//! once and the layer stays where it is, in a marked directory, until that restore is over.

use std::path::Path;
use std::time::Duration;

use crate::disk::Header;
use crate::exports::{Source, display_name};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::UNRECORDED;
use crate::store::Store;
use crate::store::access::deletion_space::delete_with_room;
use crate::store::access::lock::{lock_shared, made_again, made_again_on};
use crate::store::access::locked_box::LockedBox;
use crate::store::access::recovery::{has_row, recover_box};
use crate::store::kept::keep::keep_snapshot;
use crate::store::layers::draft::draft_shorter;
use crate::store::layers::freeze::put_on_flat;
use crate::store::layers::references::free_surplus;
use crate::store::layers::snapshot_place::{
    has_own_place, mark_unrecorded_snapshot, remove_snapshot_dir, unread_layer,
};
use crate::{Error, Result};

/// How often, and after which pause, a restore by BoxLite is looked for that began before a
/// deletion: it takes a few milliseconds.
const RESTORE_LOOKS: u32 = 5;
const RESTORE_PAUSE: Duration = Duration::from_millis(10);

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
    let source = Source::Snapshot {
        box_id: box_id.to_owned(),
        snapshot_id: snapshot_id.to_owned(),
    };
    let result = delete_with_room(store, &|| {
        made_again_on(store, &source, &|| {
            delete_snapshot(store, box_id, snapshot_id)
        })
    });
    store.events().log_outcome(&action, result)
}

/// Order: adopt the layer if any chain names its path; keep it; mark the directory; delete the row; unlink
/// the layer's name, at once or when BoxLite can no longer need it. A crash after the row was
/// deleted leaves a marked directory without a row, which recovery removes even if the layer has no
/// other name.
fn delete_snapshot(store: &Store, box_id: &str, snapshot_id: &str) -> Result<()> {
    let mut locked = lock_shared(store, box_id)?;
    let snapshot = locked.snapshot(snapshot_id)?;
    let layer = unread_layer(&mut locked, &snapshot)?;
    crash_point("remove.adopted");
    let kept = keep_snapshot(&mut locked, &snapshot)?;
    let marked = mark_unrecorded_snapshot(&layer);
    crash_point("remove.marked");
    let unrecorded = marked
        .and_then(|()| refuse_restored(&locked, &layer))
        .and_then(|()| {
            locked
                .change
                .transaction(|rows| rows.delete_snapshot(box_id, snapshot_id))
        });
    if let Err(error) = unrecorded {
        if let Some(kept) = kept
            && locked.snapshot(snapshot_id).is_ok()
        {
            kept.withdraw(&mut locked);
        }
        remove_mark_or_recover(&mut locked, snapshot_id, &layer);
        return Err(error);
    }
    crash_point("remove.unrecorded");
    if let Some(kept) = kept {
        kept.finish(store);
    }
    free_or_leave(&mut locked, &layer)?;
    drop(locked);
    adopt_if_restored(store, box_id, &layer);
    if layer.exists()
        && let Err(error) = shorten(store, box_id)
    {
        let name = store.exports.disks.name_of(box_id);
        let message = format!("the backing chain of box {name} is long: {error}");
        store.events().info(&message);
    }
    Ok(())
}

/// Shortens the chain of a live disk if a virtual machine can't start with it. BoxLite adds a layer
/// with each of its snapshots. It keeps a snapshot that the disk reads; once that may be deleted
/// here, nothing else would end the chain's growth while a runtime has the home.
fn shorten(store: &Store, box_id: &str) -> Result<()> {
    made_again(store, &|| {
        let Some(draft) = draft_shorter(store, box_id)? else {
            return Ok(());
        };
        let mut locked = lock_shared(store, box_id)?;
        put_on_flat(&mut locked, &draft)?;
        free_surplus(&mut locked)
    })
}

/// Refuses if BoxLite has restored the snapshot since its layer was adopted. It records nothing of
/// that.
///
/// # Errors
/// EBUSY, for a moment.
pub fn refuse_restored(locked: &LockedBox<'_>, layer: &Path) -> Result<()> {
    locked.change.begin_exclusive()?;
    if locked.all_readers()?.readers_of(layer).next().is_none() {
        return Ok(());
    }
    Err(Error::busy(format!(
        "BoxLite restored box {} to this snapshot just now; try again",
        display_name(&locked.record)
    ))
    .for_a_moment())
}

/// Cleans up after the row of a snapshot could not be deleted: removes the mark, if the row is still
/// there. A failed commit may have reached the disk all the same; then the mark stays for recovery.
fn remove_mark_or_recover(locked: &mut LockedBox<'_>, snapshot_id: &str, layer: &Path) {
    if !locked.change.is_shared() {
        let _ = recover_box(locked);
    } else if locked.snapshot(snapshot_id).is_ok() {
        let _ = durable::unlink(&layer.with_file_name(UNRECORDED));
    }
}

/// Removes the layer of a snapshot whose row has been deleted, if it is certain that no runtime had
/// the home since [`refuse_restored`] found no reader of the layer. Otherwise the layer stays, and
/// `maintenance::left_snapshots` removes it later.
///
/// # Errors
/// EIO when the layer can't be unlinked.
pub fn free_or_leave(locked: &mut LockedBox<'_>, layer: &Path) -> Result<()> {
    if locked.change.is_surely_alone()? {
        return free_removed(locked, layer);
    }
    locked.store.left.add(&locked.record.id, layer);
    Ok(())
}

/// Adopts the layer of a deleted snapshot if BoxLite restores it at this moment. The next change
/// would do so as well, but BoxLite may be asked for a snapshot of the same name before that: it
/// would move the live disk over the layer which that disk reads.
pub fn adopt_if_restored(store: &Store, box_id: &str, layer: &Path) {
    if !layer.exists() || has_own_place(layer) {
        return;
    }
    let live = store.home().live_disk(box_id);
    for _ in 0..RESTORE_LOOKS {
        std::thread::sleep(RESTORE_PAUSE);
        let header = Header::open(&live).ok().flatten();
        if header
            .and_then(|header| header.backing_path(&live))
            .as_deref()
            == Some(layer)
        {
            // If it can't be adopted now, the next change does it.
            let _ = lock_shared(store, box_id);
        }
    }
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

/// Removes the layer of a snapshot that was deleted beside a runtime some time ago.
///
/// # Errors
/// EBUSY while the box is used or the runtime's process is stopped; those of system calls.
pub fn free_left_snapshot(store: &Store, box_id: &str, layer: &Path) -> Result<()> {
    let mut locked = lock_shared(store, box_id)?;
    let Some(dir) = layer.parent() else {
        return Ok(());
    };
    if !dir.join(UNRECORDED).exists() || has_row(&locked.snapshots()?, dir) {
        return Ok(());
    }
    locked.change.begin_exclusive()?;
    if locked.change.is_runtime_stopped() || locked.live().is_none() {
        return Err(Error::busy(format!(
            "BoxLite may be restoring box {}",
            display_name(&locked.record)
        )));
    }
    refuse_restored(&locked, layer)?;
    free_removed(&mut locked, layer)
}
