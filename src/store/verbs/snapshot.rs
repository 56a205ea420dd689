//! `mkdir web/snapshots/NAME`: takes a snapshot.

use crate::Result;
use crate::archive::Export;
use crate::exports::Source;
use crate::files::crash_points::crash_point;
use crate::store::Store;
use crate::store::access::lock::{lock_shared, lock_source, made_again_on};
use crate::store::access::names::refuse_bad_snapshot_name;
use crate::store::kept::expire::with_room;
use crate::store::layers::draft::draft_freeze;
use crate::store::layers::freeze::freeze_live;
use crate::store::layers::running::{freeze_running, write_running};
use crate::store::layers::snapshot_place::{
    NewSnapshotIdentity, name_layer, refuse_taken_snapshot_name,
};

/// Takes a snapshot of a box's live disk and returns its id. The box may be running: then the
/// snapshot has a state between the call and the return. Polls `go_on` while that disk is copied,
/// and gives up once it returns false.
///
/// # Errors
/// EINVAL for a name that BoxLite would refuse, EEXIST when the name is taken, EBUSY, ENODATA for a
/// box without a disk, EINTR.
pub fn snapshot_box(
    store: &Store,
    box_id: &str,
    name: &str,
    go_on: &dyn Fn() -> bool,
) -> Result<String> {
    let result = take_snapshot(store, box_id, name, go_on);
    store.events().log_outcome(
        &format!(
            "snapshot {name} of box {}",
            store.exports.disks.name_of(box_id)
        ),
        result,
    )
}

/// Copies the disk of a running box once, however often the rest is made again.
fn take_snapshot(
    store: &Store,
    box_id: &str,
    name: &str,
    go_on: &dyn Fn() -> bool,
) -> Result<String> {
    refuse_bad_snapshot_name(name)?;
    let live = Source::Live {
        box_id: box_id.to_owned(),
    };
    let copies = &store.exports.copies;
    if copies.is_running(&live) {
        made_again_on(store, &live, &|| {
            refuse_taken_snapshot_name(&lock_source(store, box_id)?, name)
        })?;
        if let Some(copy) = copies.copy_now(&live, go_on)? {
            return with_room(store, None, &|| {
                made_again_on(store, &live, &|| keep_copy(store, box_id, name, &copy))
            });
        }
    }
    with_room(store, None, &|| {
        made_again_on(store, &live, &|| freeze_and_name(store, box_id, name))
    })
}

/// Order: draft what takes long before the lock is taken; freeze the live disk; name the frozen
/// layer.
fn freeze_and_name(store: &Store, box_id: &str, name: &str) -> Result<String> {
    let draft = draft_freeze(store, box_id)?;
    let mut locked = lock_shared(store, box_id)?;
    refuse_taken_snapshot_name(&locked, name)?;
    let frozen = freeze_live(&mut locked, &draft)?;
    let new = NewSnapshotIdentity::taken_now(name)?;
    name_layer(&mut locked, &frozen, &new)?;
    Ok(new.id)
}

/// Makes a snapshot of a copy of a running box's disk. The live disk is left alone.
///
/// Order: write the copied layer as an image in the workspace; record and move it as a base; add
/// the references of the box; name the base as the layer of the snapshot. A crash leaves a base
/// that nothing reads, which recovery frees.
fn keep_copy(store: &Store, box_id: &str, name: &str, copy: &Export) -> Result<String> {
    let state = write_running(store, box_id, copy)?;
    let mut locked = lock_source(store, box_id)?;
    refuse_taken_snapshot_name(&locked, name)?;
    let frozen = freeze_running(&mut locked, &state)?;
    locked.refer_to_chain(frozen.backing().0)?;
    crash_point("running.referred");
    let new = NewSnapshotIdentity::taken_now(name)?;
    name_layer(&mut locked, &frozen, &new)?;
    Ok(new.id)
}
