//! `cp b.boxlite MNT/NEW.boxlite`: makes a box, or a snapshot of one, from a received archive.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::disk::{Chain, Layer};
use crate::exports::{Contents, Source};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::workspace::discard;
use crate::store::Store;
use crate::store::access::lock::{begin_shared_change, lock_shared, made_again};
use crate::store::access::names::{refuse_bad_snapshot_name, refuse_taken_box_name};
use crate::store::kept::expire::with_room;
use crate::store::layers::flatten::{
    FlattenPlan, FlattenedLayers, plan_difference, write_flattened,
};
use crate::store::layers::reference_state::{
    ComingSnapshot, ReferenceState, freeze_nearer, freeze_reference,
};
use crate::store::layers::snapshot_place::{
    NewSnapshotIdentity, marked_dir, place_of, record_snapshot, settle_place, snapshot_place,
};
use crate::store::verbs::clone::{share_with_box, share_with_snapshot};
use crate::store::verbs::import_stream::ImportStream;
use crate::store::verbs::install::{NewBoxIdentity, install};
use crate::store::verbs::replace_snapshot::{begin_new_snapshot, finish_new_snapshot};
use crate::{Context, Error, Result};

/// The space that an image of what differs takes, in bytes, from which on it is worth finding out
/// whether another state is nearer.
const WORTH_ANOTHER_LOOK: u64 = 1 << 20;

/// Makes a box from a complete archive.
///
/// # Errors
/// EBADMSG when the archive is incomplete or BoxLite could not read its options, EPERM when its
/// options are not allowed here, EEXIST when the name is taken, EBUSY.
pub fn import_box(store: &Store, stream: &ImportStream, new: &NewBoxIdentity) -> Result<()> {
    let same = stream.same_state(store);
    let result = with_room(store, None, &|| {
        made_again(store, &|| make_imported(store, stream, same.as_ref(), new))
    });
    store
        .events()
        .log_outcome(&format!("import of box {}", new.name), result)
}

/// Order: the disk was unpacked and checked in the workspace; build the box's directory there; then
/// as for a clone. An archive of a state that the home has, copied by a tool that reads and writes,
/// becomes a clone of that state.
fn make_imported(
    store: &Store,
    stream: &ImportStream,
    same: Option<&(Source, Contents)>,
    new: &NewBoxIdentity,
) -> Result<()> {
    store.refuse_read_only()?;
    if !stream.is_complete() {
        return Err(Error::bad_archive("the archive is incomplete"));
    }
    let options = stream.described_options(new.description.as_ref())?;
    if let Some(same) = same
        && share_with_box(store, same, new, options.clone())?
    {
        discard(stream.place());
        return Ok(());
    }
    import_disk(store, stream.disk()?, options, new)
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
    let same = stream.same_state(store);
    let result = with_room(store, None, &|| {
        made_again(store, &|| {
            make_imported_snapshot(store, stream, same.as_ref(), box_id, new)
        })
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
///
/// What differs from a frozen state of the box is put on that, if the archive's disk was compared
/// with one: first the box refers to the layers of that state, as for a clone.
fn make_imported_snapshot(
    store: &Store,
    stream: &ImportStream,
    same: Option<&(Source, Contents)>,
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<()> {
    let name = &new.name;
    refuse_bad_snapshot_name(name)?;
    if !stream.is_complete() {
        return Err(Error::bad_archive("the archive is incomplete"));
    }
    if let Some(same) = same
        && share_with_snapshot(store, same, box_id, new)?
    {
        discard(stream.place());
        return Ok(());
    }
    let difference = written_difference(store, stream, box_id, new).unwrap_or_else(|error| {
        // The whole disk needs nothing of the other state, and less space meanwhile.
        log::debug!("snapshot {name} is stored whole: {error}");
        None
    });
    let mut locked = lock_shared(store, box_id)?;
    begin_new_snapshot(&mut locked, new)?;
    let dir = marked_dir(store)?;
    let disk = dir.join("disk.qcow2");
    let difference = difference.filter(|(_, reference)| {
        reference.is_in_place() && locked.refer_to_chain(&reference.base).is_ok()
    });
    if let Some((image, _)) = &difference {
        stream.note_becoming(&new.id)?;
        give_disk(&image.file, &disk)?;
    } else {
        // The archive's own disk has the time of the write that completed it.
        let whole = stream.disk()?;
        store.home().give_to_owner(whole)?;
        give_disk(whole, &disk)?;
    }
    crash_point("import.compared");
    durable::sync_dir(&dir)?;
    locked.change.begin_exclusive()?;
    let place = place_of(&locked, new);
    let path = snapshot_place(&locked, &place, Some(&dir))?;
    crash_point("import.snapshot");
    let recorded = record_snapshot(&mut locked, new, &path, stream.virtual_size());
    let made = settle_place(&locked, &path, recorded);
    finish_new_snapshot(&mut locked, made)?;
    discard(stream.place());
    Ok(())
}

/// Writes what differs in the archive's disk from a state of the box, as an image on top of that
/// state: the one that it was compared with while it arrived, or, for a snapshot that came before its
/// box, one that there is now. None if nothing is gained by that.
fn written_difference(
    store: &Store,
    stream: &ImportStream,
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<Option<(FlattenedLayers, Arc<ReferenceState>)>> {
    let compared = match stream.reference() {
        Some(reference) => stream.difference()?.map(|plan| (plan, reference.clone())),
        None => compared_now(store, stream, box_id, new)?,
    };
    let Some((plan, reference)) = compared else {
        return Ok(None);
    };
    if reference.box_id != box_id || !reference.is_in_place() {
        return Ok(None);
    }
    let image = write_flattened(store, plan, &mut |_| Ok(()))?;
    let whole = fs::metadata(stream.place()).map_or(0, |meta| meta.len());
    if allocated(&image) > whole / 4 * 3 {
        return Ok(None);
    }
    let coming = coming_snapshot(box_id, new);
    let nearer = smaller_difference(store, coming, &image, &reference).unwrap_or_else(|error| {
        log::debug!("no other state of box {box_id} is looked at: {error}");
        None
    });
    Ok(Some(nearer.unwrap_or((image, reference))))
}

fn coming_snapshot<'n>(box_id: &'n str, new: &'n NewSnapshotIdentity) -> ComingSnapshot<'n> {
    ComingSnapshot {
        box_id,
        replaces: new.replaces.as_deref(),
        created_at: new.created_at,
    }
}

/// Writes the image on top of another state of the box, if that makes it smaller: which state is
/// nearest was not known when the snapshot began to arrive.
fn smaller_difference(
    store: &Store,
    coming: ComingSnapshot<'_>,
    image: &FlattenedLayers,
    reference: &ReferenceState,
) -> Result<Option<(FlattenedLayers, Arc<ReferenceState>)>> {
    if allocated(image) < WORTH_ANOTHER_LOOK {
        return Ok(None);
    }
    let chain = Arc::new(store.exports.disks.open_chain(&image.file)?);
    let Some(nearer) = freeze_nearer(store, coming, reference, &chain)? else {
        return Ok(None);
    };
    let (upper, other_upper) = layers_apart(&chain, &nearer.chain);
    let other = (nearer.chain.clone(), other_upper);
    let plan = plan_difference((chain, upper), other, &image.file)?;
    let smaller = write_flattened(store, plan, &mut |_| Ok(()))?;
    let is_smaller = allocated(&smaller) < allocated(image);
    Ok(is_smaller.then(|| (smaller, Arc::new(nearer))))
}

/// Returns how many bytes an image takes on disk. Zeros that hide what lies below are holes.
fn allocated(image: &FlattenedLayers) -> u64 {
    fs::metadata(&image.file).map_or(u64::MAX, |meta| meta.blocks() * 512)
}

/// Returns how many layers each of two disks has on top of those that both share.
fn layers_apart(one: &Chain, other: &Chain) -> (usize, usize) {
    let (ours, theirs) = (one.layers(), other.layers());
    let shared = |layer: &Layer| theirs.iter().position(|it| it.id() == layer.id());
    let mut all = ours.iter().enumerate();
    all.find_map(|(upper, layer)| Some((upper, shared(layer)?)))
        .unwrap_or((ours.len(), theirs.len()))
}

/// Compares a whole disk with a state of the box.
fn compared_now(
    store: &Store,
    stream: &ImportStream,
    box_id: &str,
    new: &NewSnapshotIdentity,
) -> Result<Option<(FlattenPlan, Arc<ReferenceState>)>> {
    let Some(reference) = freeze_reference(store, coming_snapshot(box_id, new)) else {
        return Ok(None);
    };
    let disk = stream.disk()?;
    let chain = Arc::new(store.exports.disks.open_chain(disk)?);
    let other = reference.chain.clone();
    if chain.virtual_size() != other.virtual_size() {
        return Ok(None);
    }
    let layers = other.layers().len();
    let plan = plan_difference((chain, 1), (other, layers), disk)?;
    Ok(Some((plan, Arc::new(reference))))
}

/// Puts the disk of an archive into a directory that is being built. The disk is hard-linked, so
/// that the archive keeps it if a later step fails. On a file system without hard links it is
/// moved.
fn give_disk(disk: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(disk, to)
        .or_else(|_| std::fs::rename(disk, to))
        .context(|| format!("cannot move the disk to {}", to.display()))
}
