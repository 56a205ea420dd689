//! `cp web/snapshots/NAME/export.boxlite web/export.boxlite`: replaces the live disk with another
//! state, from the home or from a received archive.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::disk::FileId;
use crate::exports::{Contents, Source, display_name};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::store::Store;
use crate::store::access::beside_runtime::{refuse_other_size, replace_live};
use crate::store::access::lock::{lock_shared, made_again, made_again_on, switch_to_source};
use crate::store::access::locked_box::LockedBox;
use crate::store::kept::expire::with_room;
use crate::store::kept::keep::{flush_early, keep_disk};
use crate::store::layers::draft::{draft_clone, draft_of, refuse_changed};
use crate::store::layers::freeze_source::freeze_source;
use crate::store::layers::frozen::make_overlay;
use crate::store::layers::live_disk::open_disk;
use crate::store::layers::references::free_surplus;
use crate::store::verbs::import_stream::ImportStream;
use crate::{Error, Result};

/// Makes the live disk of a box a copy-on-write copy of `source`. Copies no data, whatever the size
/// of the disk, and keeps all snapshots, later ones too. `read` is the state of the source that the
/// caller read. The disk is shown as modified now, even in an older state and whatever time its
/// writer set: a tool that copies only what is newer has to see that it changed.
///
/// # Errors
/// EBUSY, ENODATA for a box without a disk, EPERM when others read from the live disk, EIO when the
/// source has changed since it was read.
pub fn restore_box(store: &Store, box_id: &str, source: &Source, read: &Contents) -> Result<()> {
    let action = format!(
        "restore of box {} from {}",
        store.exports.disks.name_of(box_id),
        store.exports.disks.describe(source)
    );
    let result = with_room(store, Some(source.box_id()), &|| {
        made_again_on(store, source, &|| {
            restore_state(store, box_id, source, read, &action)
        })
    });
    store.events().log_outcome(&action, result)
}

/// Order: freeze the source (or adopt the snapshot's layer); make an overlay on it in the
/// workspace; add the references; keep the live disk; move the overlay over it. A crash before the last step
/// leaves surplus references, which recovery drops.
fn restore_state(
    store: &Store,
    box_id: &str,
    source: &Source,
    read: &Contents,
    action: &str,
) -> Result<()> {
    let is_itself = matches!(source, Source::Live { box_id: other } if other == box_id);
    if is_itself {
        return refuse_changed(store, source, read);
    }
    let draft = draft_of(store, source, read, &|| draft_clone(store, source))?;
    flush_early(store, box_id);
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
    durable::set_modified(&overlay, SystemTime::now())?;
    durable::sync_file(&overlay)?;
    locked.refer_to_chain(&overlay)?;
    crash_point("restore.referred");
    replace_kept(&mut locked, &overlay, &live, old, action)?;
    drop(file);
    crash_point("restore.replaced");
    clean_up_after_restore(&mut locked);
    Ok(())
}

/// Makes the disk of a complete archive the live disk of a box. The box keeps its id, name,
/// configuration and snapshots. The disk is shown as modified now.
///
/// # Errors
/// EBADMSG when the archive is incomplete, EBUSY, ENODATA for a box without a disk, EPERM when
/// others read from the live disk.
pub fn restore_archive(store: &Store, box_id: &str, stream: &ImportStream) -> Result<()> {
    let name = store.exports.disks.name_of(box_id);
    let action = format!("restore of box {name} from an archive");
    let result = with_room(store, None, &|| {
        made_again(store, &|| restore_arrived(store, box_id, stream, &action))
    });
    store.events().log_outcome(&action, result)
}

/// Order: the disk was unpacked and checked in the workspace; flush it; keep the live disk; move the
/// new one over it.
/// A crash leaves the old or the new disk, and surplus references, which recovery drops.
fn restore_arrived(store: &Store, box_id: &str, stream: &ImportStream, action: &str) -> Result<()> {
    if !stream.is_complete() {
        return Err(Error::bad_archive("the archive is incomplete"));
    }
    let disk = stream.disk()?;
    store.home().give_to_owner(disk)?;
    durable::set_modified(disk, SystemTime::now())?;
    durable::sync_file(disk)?;
    flush_early(store, box_id);
    let mut locked = lock_shared(store, box_id)?;
    let live = replaceable_live(&locked)?;
    let (file, old) = open_disk(&live)?;
    refuse_other_size(&locked, &live, stream.virtual_size())?;
    crash_point("restore.arrived");
    replace_kept(&mut locked, disk, &live, old, action)?;
    drop(file);
    crash_point("restore.replaced");
    clean_up_after_restore(&mut locked);
    Ok(())
}

/// Moves `new` over the live disk, whose file was `old`. What that has is kept first.
fn replace_kept(
    locked: &mut LockedBox<'_>,
    new: &Path,
    live: &Path,
    old: FileId,
    action: &str,
) -> Result<()> {
    let kept = keep_disk(locked, live, old, action.to_owned())?;
    let replaced = replace_live(locked, new, live, old);
    let Some(kept) = kept else {
        return replaced;
    };
    match &replaced {
        Ok(()) => kept.finish(locked.store),
        // If the old disk could not be moved back, it is kept despite the error.
        Err(_) if FileId::at(live).is_ok_and(|now| now == old) => kept.withdraw(locked),
        Err(_) => {}
    }
    replaced
}

/// Returns the path of the live disk, if it may be replaced. EPERM when a layer reads from it,
/// because the contents of that layer would change as well.
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
    if let Some(reader) = locked.all_readers()?.readers_of(&live).next() {
        return Err(Error::new(
            libc::EPERM,
            format!(
                "{} reads from the disk of box {name} and would change with it; the disk is not replaced. Export the boxes that still read correctly and import them again",
                reader.path.display()
            ),
        ));
    }
    Ok(live)
}

/// Cleans up after the live disk was replaced. The restore has succeeded, so a failure is only
/// logged.
fn clean_up_after_restore(locked: &mut LockedBox<'_>) {
    let rootfs = locked.store.home().guest_rootfs(&locked.record.id);
    let cleaned_up = durable::unlink(&rootfs).and_then(|()| free_surplus(locked));
    if let Err(error) = cleaned_up {
        let name = display_name(&locked.record);
        let message = format!("box {name} was restored, but not cleaned up: {error}");
        locked.store.events().info(&message);
    }
}
