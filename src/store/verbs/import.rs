//! `cp b.boxlite MNT/NEW.boxlite`: makes a box, or a snapshot of one, from a received archive.

use std::path::Path;

use serde_json::Value;

use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::workspace::discard;
use crate::store::Store;
use crate::store::access::lock::{begin_shared_change, lock_shared, made_again};
use crate::store::access::names::{refuse_bad_snapshot_name, refuse_taken_box_name};
use crate::store::layers::snapshot_place::{
    NewSnapshotIdentity, marked_dir, place_of, record_snapshot, settle_place, snapshot_place,
};
use crate::store::verbs::import_stream::ImportStream;
use crate::store::verbs::install::{NewBoxIdentity, install};
use crate::store::verbs::replace_snapshot::{begin_new_snapshot, finish_new_snapshot};
use crate::{Context, Error, Result};

/// Makes a box from a complete archive.
///
/// # Errors
/// EBADMSG when the archive is incomplete or BoxLite could not read its options, EPERM when its
/// options are not allowed here, EEXIST when the name is taken, EBUSY.
pub fn import_box(store: &Store, stream: &ImportStream, new: &NewBoxIdentity) -> Result<()> {
    let result = made_again(store, &|| make_imported(store, stream, new));
    store
        .events()
        .log_outcome(&format!("import of box {}", new.name), result)
}

/// Order: the disk was unpacked and checked in the workspace; build the box's directory there; then
/// as for a clone.
fn make_imported(store: &Store, stream: &ImportStream, new: &NewBoxIdentity) -> Result<()> {
    store.refuse_read_only()?;
    if !stream.is_complete() {
        return Err(Error::bad_archive("the archive is incomplete"));
    }
    import_disk(store, stream.disk(), stream.box_options()?, new)
}

/// Makes a box from a disk in the workspace, and removes the disk from there.
///
/// # Errors
/// EROFS, EEXIST when the name is taken, EBUSY, EIO.
pub fn import_disk(store: &Store, disk: &Path, options: Value, new: &NewBoxIdentity) -> Result<()> {
    let dir = store.workspace().scratch("box")?;
    store.home().make_dir(&dir)?;
    store.home().make_dir(&dir.join("disks"))?;
    store.home().give_to_owner(disk)?;
    let mut change = begin_shared_change(store)?;
    refuse_taken_box_name(&change, &new.name)?;
    give_disk(disk, &dir.join("disks/disk.qcow2"))?;
    crash_point("import.built");
    install(store, &mut change, &dir, new, None, Some(options), &[])?;
    discard(disk);
    Ok(())
}

/// Records when a snapshot from a backup was taken, in seconds since 1970.
///
/// # Errors
/// EROFS, EBUSY; those of the database.
pub fn date_snapshot(store: &Store, box_id: &str, id: &str, created_at: i64) -> Result<()> {
    begin_shared_change(store)?.transaction(|rows| rows.date_snapshot(box_id, id, created_at))
}

/// Makes a snapshot of a box from a complete archive. This is how the snapshots in a backup of a
/// whole box come back.
///
/// # Errors
/// EBADMSG when the archive is incomplete, EINVAL for a name that BoxLite would refuse, EEXIST when
/// the name is taken, EBUSY.
pub fn import_snapshot(
    store: &Store,
    stream: &ImportStream,
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<()> {
    let name = &new.name;
    let result = made_again(store, &|| {
        make_imported_snapshot(store, stream, box_id, new)
    });
    store.events().log_outcome(
        &format!(
            "import of snapshot {name} of box {}",
            store.exports.disks.name_of(box_id)
        ),
        result,
    )
}

/// Order: build the directory with a mark in it in the workspace; move it into place; record the
/// row; remove the mark. A crash before the row leaves a marked directory without a row, which
/// recovery removes.
fn make_imported_snapshot(
    store: &Store,
    stream: &ImportStream,
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<()> {
    let name = &new.name;
    refuse_bad_snapshot_name(name)?;
    if !stream.is_complete() {
        return Err(Error::bad_archive("the archive is incomplete"));
    }
    store.home().give_to_owner(stream.disk())?;
    let mut locked = lock_shared(store, box_id)?;
    begin_new_snapshot(&mut locked, new)?;
    let dir = marked_dir(store)?;
    give_disk(stream.disk(), &dir.join("disk.qcow2"))?;
    durable::sync_dir(&dir)?;
    locked.change.begin_exclusive()?;
    let place = place_of(&locked, new);
    let path = snapshot_place(&locked, &place, Some(&dir))?;
    crash_point("import.snapshot");
    let recorded = record_snapshot(&mut locked, new, &path, stream.virtual_size());
    let made = settle_place(&locked, &path, recorded);
    finish_new_snapshot(&mut locked, made)?;
    discard(stream.disk());
    Ok(())
}

/// Puts the disk of an archive into a directory that is being built. The disk is hard-linked, so
/// that the archive keeps it if a later step fails. On a file system without hard links it is
/// moved.
fn give_disk(disk: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(disk, to)
        .or_else(|_| std::fs::rename(disk, to))
        .context(|| format!("cannot move the disk to {}", to.display()))
}
