//! `cp -r web web2`: makes a new box that starts from a state of another one, copy-on-write.

use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::exports::{Contents, Source};
use crate::files::crash_points::crash_point;
use crate::files::workspace::Scratch;
use crate::home::{BoxRecord, described_options};
use crate::store::Store;
use crate::store::access::lock::{lock_source, made_again_on, switch_to_target};
use crate::store::access::locked_box::LockedBox;
use crate::store::access::names::{refuse_bad_snapshot_name, refuse_taken_box_name};
use crate::store::kept::expire::with_room;
use crate::store::layers::draft::{draft_clone, draft_of, draft_snapshot_clone, refuse_changed};
use crate::store::layers::freeze_source::freeze_source;
use crate::store::layers::frozen::{FrozenDisk, make_overlay};
use crate::store::layers::reference_state::flush;
use crate::store::layers::snapshot_place::{NewSnapshotIdentity, name_layer};
use crate::store::verbs::install::{NewBoxIdentity, install};
use crate::store::verbs::replace_snapshot::{begin_new_snapshot, finish_new_snapshot};

/// Makes a box that starts from `source`. Copies no data, whatever the size of the disk. `read` is
/// the state of the source that the caller read.
///
/// # Errors
/// EEXIST when the name is taken, EBUSY, ENODATA for a source without a disk, ENOENT, EIO when the
/// source has changed since it was read.
pub fn clone_box(
    store: &Store,
    source: &Source,
    read: &Contents,
    new: &NewBoxIdentity,
) -> Result<()> {
    let action = format!(
        "clone {} of {}",
        new.name,
        store.exports.disks.describe(source)
    );
    let result = with_room(store, Some(source.box_id()), &|| {
        made_again_on(store, source, &|| make_clone(store, source, read, new))
    });
    store.events().log_outcome(&action, result)
}

/// Order: freeze the source (or adopt the snapshot's layer); build the box in the workspace; move
/// its directory into `boxes/`; record all its rows in one transaction.
///
/// A crash before the transaction leaves a directory without a row, which recovery removes, as
/// BoxLite's own start does. With the row first, a crash would leave a box without a disk.
fn make_clone(store: &Store, source: &Source, read: &Contents, new: &NewBoxIdentity) -> Result<()> {
    let mut built = build_clone(store, source, read, new)?;
    let record = built.locked.record.clone();
    let options = match &new.description {
        Some(description) => {
            let (options, untrusted) = (record.options_for_copy()?, store.imports.untrusted);
            Some(described_options(&options, None, description, untrusted)?.options)
        }
        None => None,
    };
    built.install(new, Some(&record), options)
}

/// Makes a box with a configuration of its own that starts from `source`, of which `read` was read:
/// the archive that the box is made from has the same disk. Returns false if the source can't be
/// started from now.
///
/// # Errors
/// EEXIST when the name is taken, EBUSY, EIO.
pub fn share_with_box(
    store: &Store,
    (source, read): &(Source, Contents),
    new: &NewBoxIdentity,
    options: Value,
) -> Result<bool> {
    match build_clone(store, source, read, new) {
        Ok(mut built) => {
            flush_chain(store, &built.dir.join("disks/disk.qcow2"))?;
            built.install(new, None, Some(options)).map(|()| true)
        }
        Err(error) => {
            log::debug!("the disk of {} is not shared: {error}", new.name);
            Ok(false)
        }
    }
}

/// Flushes the layers that an archive's disk is shared with: the archive may be the only other copy.
fn flush_chain(store: &Store, top: &Path) -> Result<()> {
    flush(&store.exports.disks.open_chain(top)?)
}

/// A clone whose directory is in the workspace.
struct BuiltClone<'s> {
    locked: LockedBox<'s>,
    dir: Scratch,
    /// The ids of the bases that its disk reads from.
    bases: Vec<String>,
}

fn build_clone<'s>(
    store: &'s Store,
    source: &Source,
    read: &Contents,
    new: &NewBoxIdentity,
) -> Result<BuiltClone<'s>> {
    let draft = draft_of(store, source, read, &|| draft_clone(store, source))?;
    let mut locked = lock_source(store, source.box_id())?;
    refuse_changed(store, source, read)?;
    refuse_taken_box_name(&locked.change, &new.name)?;
    let frozen = freeze_source(&mut locked, source, &draft)?;
    crash_point("clone.frozen");
    let dir = build_box(&locked, &frozen)?;
    crash_point("clone.built");
    let bases = locked.bases_reached(&dir.join("disks/disk.qcow2"))?;
    Ok(BuiltClone { locked, dir, bases })
}

impl BuiltClone<'_> {
    fn install(
        &mut self,
        new: &NewBoxIdentity,
        source: Option<&BoxRecord>,
        options: Option<Value>,
    ) -> Result<()> {
        let change = &mut self.locked.change;
        let bases = &self.bases;
        install(
            self.locked.store,
            change,
            &self.dir,
            new,
            source,
            options,
            bases,
        )
    }
}

/// Makes a snapshot of box `box_id` from a state of another box, whose layer both then share. This
/// is how a clone gets the snapshots of its source. `read` is the state of the source that the
/// caller read.
///
/// # Errors
/// EINVAL for a name that BoxLite would refuse, EEXIST when the name is taken, EBUSY, ENOENT, EIO
/// when the source has changed since it was read.
pub fn clone_snapshot(
    store: &Store,
    source: &Source,
    read: &Contents,
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<()> {
    let name = &new.name;
    let action = format!(
        "snapshot {name} of box {} from {}",
        store.exports.disks.name_of(box_id),
        store.exports.disks.describe(source)
    );
    let result = with_room(store, Some(source.box_id()), &|| {
        made_again_on(store, source, &|| {
            make_snapshot_clone(store, source, read, box_id, new)
        })
    });
    store.events().log_outcome(&action, result)
}

/// Order: freeze or adopt the source as for a clone; add the references of the box; name the layer
/// as for a snapshot. A crash leaves surplus references, which are harmless.
fn make_snapshot_clone(
    store: &Store,
    source: &Source,
    read: &Contents,
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<()> {
    let name = &new.name;
    refuse_bad_snapshot_name(name)?;
    let frozen = freeze_for_snapshot(store, source, read)?;
    name_shared_layer(frozen, box_id, new)
}

/// Makes a snapshot of box `box_id` from `source`, of which `read` was read: the archive that the
/// snapshot is made from has the same disk. Returns false if the source can't be shared now.
///
/// # Errors
/// EEXIST when the name is taken, EBUSY, EIO.
pub fn share_with_snapshot(
    store: &Store,
    (source, read): &(Source, Contents),
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<bool> {
    match freeze_for_snapshot(store, source, read) {
        Ok(frozen) => {
            flush_chain(store, frozen.1.backing().0)?;
            name_shared_layer(frozen, box_id, new).map(|()| true)
        }
        Err(error) => {
            log::debug!("the disk of snapshot {} is not shared: {error}", new.name);
            Ok(false)
        }
    }
}

fn freeze_for_snapshot<'s>(
    store: &'s Store,
    source: &Source,
    read: &Contents,
) -> Result<(LockedBox<'s>, FrozenDisk)> {
    let draft = draft_of(store, source, read, &|| draft_snapshot_clone(store, source))?;
    let mut locked = lock_source(store, source.box_id())?;
    refuse_changed(store, source, read)?;
    let frozen = freeze_source(&mut locked, source, &draft)?;
    Ok((locked, frozen))
}

fn name_shared_layer(
    (mut locked, frozen): (LockedBox<'_>, FrozenDisk),
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<()> {
    switch_to_target(&mut locked, box_id)?;
    begin_new_snapshot(&mut locked, new)?;
    locked.refer_to_chain(frozen.backing().0)?;
    crash_point("share.referred");
    let made = name_layer(&mut locked, &frozen, new);
    finish_new_snapshot(&mut locked, made)
}

/// Builds a box's directory in the workspace. Its disk is an empty overlay on the frozen state.
fn build_box(locked: &LockedBox<'_>, frozen: &FrozenDisk) -> Result<Scratch> {
    let home = locked.store.home();
    let dir = locked.store.workspace().scratch("box")?;
    home.make_dir(&dir)?;
    home.make_dir(&dir.join("disks"))?;
    let overlay = dir.join("disks/disk.qcow2");
    make_overlay(locked, frozen, &overlay)?;
    Ok(dir)
}
