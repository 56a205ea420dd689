//! `cp web/snapshots/NAME/export.boxlite web/export.boxlite`: the live disk becomes another state, one
//! that is kept in the home or one that arrived as an archive.

use std::path::PathBuf;

use crate::exports::{Contents, Source, display_name};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::store::Store;
use crate::store::access::lock::{lock_shared, switch_to_source};
use crate::store::access::locked_box::LockedBox;
use crate::store::access::shared::{refuse_other_size, replace_live};
use crate::store::layers::draft::{draft_clone, draft_of, refuse_changed};
use crate::store::layers::freeze_source::freeze_source;
use crate::store::layers::frozen::make_overlay;
use crate::store::layers::live_disk::open_disk;
use crate::store::layers::references::free_surplus;
use crate::store::verbs::import_stream::ImportStream;
use crate::{Error, Result};

/// Makes the live disk of a box a copy-on-write copy of `source`: no data moves, whatever its size,
/// and snapshots stay, also later ones. `read` is what was read of the source.
///
/// # Errors
/// EBUSY, ENODATA for a box that has no disk, EIO when the source is not as it was read.
pub fn restore_box(store: &Store, box_id: &str, source: &Source, read: &Contents) -> Result<()> {
    let what = format!(
        "restore of box {} from {}",
        store.exports.disks.name_of(box_id),
        store.exports.disks.describe(source)
    );
    let result = restore_state(store, box_id, source, read);
    store.events().log_outcome(&what, result)
}

/// Order: freeze the source (or adopt the snapshot's layer), an overlay on it in the workspace, the
/// references, the overlay over the live name. A crash before the last step leaves surplus
/// references, which recovery drops.
fn restore_state(store: &Store, box_id: &str, source: &Source, read: &Contents) -> Result<()> {
    let is_itself = matches!(source, Source::Live { box_id: other } if other == box_id);
    if is_itself {
        return refuse_changed(store, source, read);
    }
    let draft = draft_of(store, source, read, &|| draft_clone(store, source))?;
    let mut locked = lock_shared(store, box_id)?;
    let live = replaceable_live(&locked)?;
    let (file, old) = open_disk(&live)?;
    let target = locked.record.clone();
    if source.box_id() != box_id {
        switch_to_source(&mut locked, source.box_id())?;
    }
    refuse_changed(store, source, read)?;
    let frozen = freeze_source(&mut locked, source, &draft)?;
    crash_point("restore.frozen");
    locked.record = target;
    refuse_other_size(&locked, &live, frozen.virtual_size)?;
    let overlay = store.workspace().scratch("overlay")?;
    make_overlay(&locked, &frozen, &overlay)?;
    let bases = locked.bases_reached(&overlay)?;
    locked.change.transaction(|rows| {
        bases
            .iter()
            .try_for_each(|base| rows.insert_ref(base, box_id))
    })?;
    crash_point("restore.referred");
    replace_live(&mut locked, &overlay, &live, old)?;
    drop(file);
    crash_point("restore.replaced");
    live_was_replaced(&mut locked);
    Ok(())
}

/// Makes the disk of a complete archive the live disk of a box; the box's identity, name and
/// configuration stay.
///
/// # Errors
/// EBADMSG when it is not complete, EBUSY, ENODATA for a box that has no disk.
pub fn restore_archive(store: &Store, box_id: &str, arrival: &ImportStream) -> Result<()> {
    let result = restore_arrived(store, box_id, arrival);
    store.events().log_outcome(
        &format!(
            "restore of box {} from an archive",
            store.exports.disks.name_of(box_id)
        ),
        result,
    )
}

/// Order: the disk was unpacked and checked in the workspace; it is moved over the live name. A
/// crash leaves the one or the other, and surplus references, which recovery drops.
fn restore_arrived(store: &Store, box_id: &str, arrival: &ImportStream) -> Result<()> {
    if !arrival.is_complete() {
        return Err(Error::bad_archive("the archive is incomplete"));
    }
    store.home().give_to_owner(arrival.disk())?;
    durable::sync_file(arrival.disk())?;
    let mut locked = lock_shared(store, box_id)?;
    let live = replaceable_live(&locked)?;
    let (file, old) = open_disk(&live)?;
    refuse_other_size(&locked, &live, arrival.virtual_size())?;
    crash_point("restore.arrived");
    replace_live(&mut locked, arrival.disk(), &live, old)?;
    drop(file);
    crash_point("restore.replaced");
    live_was_replaced(&mut locked);
    Ok(())
}

/// The live disk that another is to take the place of. EPERM where something reads from it: that
/// would become another disk, too.
fn replaceable_live(locked: &LockedBox<'_>) -> Result<PathBuf> {
    let name = display_name(&locked.record);
    let live = locked.live().ok_or_else(|| {
        Error::new(
            libc::ENODATA,
            format!(
                "box {name} has no disk yet; start it once with BoxLite, or import under a new name"
            ),
        )
    })?;
    if let Some(reader) = locked.layers()?.readers_of(&live).next() {
        return Err(Error::new(
            libc::EPERM,
            format!(
                "{} reads from the disk of box {name}, and would change with it; export what still reads right and import it again",
                reader.path.display()
            ),
        ));
    }
    Ok(live)
}

/// What is to be tidied up after the live disk became another; none of it takes that back.
fn live_was_replaced(locked: &mut LockedBox<'_>) {
    let rootfs = locked.store.home().guest_rootfs(&locked.record.id);
    let tidied = durable::unlink(&rootfs).and_then(|()| free_surplus(locked));
    if let Err(error) = tidied {
        let name = display_name(&locked.record);
        let message = format!("box {name} was restored, but {error}");
        locked.store.events().info(&message);
    }
}
