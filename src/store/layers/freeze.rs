//! Freezes disk states. A frozen live disk becomes a base, and an empty overlay takes the writes.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::disk::{FileId, Format, Header, Layer};
use crate::exports::Source;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::listing::resolve;
use crate::store::access::beside_runtime::{replace_live, replaced_just_now};
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::adopt::adopt;
use crate::store::layers::draft::Draft;
use crate::store::layers::frozen::{Frozen, FrozenDisk, record_frozen};
use crate::store::layers::live_disk::{live_header, open_disk};
use crate::store::layers::mergeable::MOST_BACKING;
use crate::{Context, Error, Result, disk};

/// Freezes the live disk. A live disk without data is not stacked upon: the layer below already has
/// its contents, so several snapshots of an unchanged box are names of one layer.
///
/// Order: the overlay in the workspace, the flush of the live disk, the row of the base, the second
/// name of the live disk in `bases/`, the overlay over the live name. A crash before the last step
/// leaves a row, and perhaps a name, of the file that is still the live disk. Recovery drops both:
/// it undoes, and never finishes. The row comes first for the reason given at [`adopt`].
///
/// # Errors
/// ENODATA when the box has no disk. EBUSY when the disk was replaced meanwhile. EIO, ENOSPC and
/// others of system calls and of SQLite.
pub fn freeze_live(locked: &mut LockedBox<'_>, draft: &Draft) -> Result<FrozenDisk> {
    let live = locked.store.home().live_disk(&locked.record.id);
    let source = Source::Live {
        box_id: locked.record.id.clone(),
    };
    locked.store.exports.disks.refuse_written(&source, &live)?;
    let (file, old) = open_disk(&live)?;
    let file = Arc::new(file);
    let header = live_header(&live)?;
    let virtual_size = header.virtual_size;
    let below = layer_below_empty(locked, &live, &header)?;
    // The checks above opened the disk by name: make sure they read this file.
    if FileId::at(&live)? != old {
        return Err(replaced_just_now(locked));
    }
    if let Some(layer) = below {
        locked.change.begin_exclusive()?;
        return Ok(FrozenDisk {
            layer,
            virtual_size,
            top: live,
            file,
        });
    }
    let overlay = match &draft.overlay {
        Some(overlay) if draft.virtual_size == virtual_size => overlay,
        _ => return Err(replaced_just_now(locked)),
    };
    durable::copy_times(&live, overlay)?;
    durable::sync_file(overlay)?;
    if draft.flat.is_none() && disk::chain_paths(&live)?.len() > MOST_BACKING {
        // The disk held no data when the draft was made.
        return Err(replaced_just_now(locked));
    }
    if draft.flat.is_some() {
        let box_id = locked.record.id.clone();
        install_flat(locked, draft, &live, Some(&box_id))?;
        replace_live(locked, overlay, &live, old)?;
    } else {
        durable::sync_file(&live)?;
        record_frozen(
            locked,
            &draft.base,
            &live,
            virtual_size,
            Some(&locked.record.id.clone()),
        )?;
        crash_point("freeze.recorded");
        let new = FileId::at(overlay)?;
        let replaced = freeze_as(locked, &draft.base, overlay, &live, old);
        if let Err(error) = replaced {
            // If the overlay could not be moved back, the disk is frozen despite the error.
            let is_in_place = FileId::at(&live).is_ok_and(|now| now == new);
            return Err(if is_in_place {
                error
            } else {
                undo_freeze(locked, &draft.base, &live, error)
            });
        }
    }
    crash_point("freeze.replaced");
    locked.store.spares.keep(&draft.base);
    Ok(FrozenDisk {
        layer: Frozen::Base {
            path: draft.base.clone(),
        },
        virtual_size,
        top: live,
        file,
    })
}

/// Gives the live disk its name in `bases/`, and moves the overlay over its live name.
fn freeze_as(
    locked: &mut LockedBox<'_>,
    base: &Path,
    overlay: &Path,
    live: &Path,
    old: FileId,
) -> Result<()> {
    locked.change.begin_exclusive()?;
    durable::link(live, base)?;
    crash_point("freeze.linked");
    if FileId::at(base)? != old {
        return Err(replaced_just_now(locked));
    }
    replace_live(locked, overlay, live, old)
}

/// Undoes a failed freeze beside a runtime and returns `error`. Shared access runs no recovery, so
/// the second name and the row are removed here. Otherwise recovery does that before the next
/// change.
///
/// The live name is flushed first. The overlay may have been in its place for a moment, and a power
/// loss would bring it back, which reads from the second name. If the flush fails, the name stays.
fn undo_freeze(locked: &mut LockedBox<'_>, base: &Path, live: &Path, error: Error) -> Error {
    if locked.change.is_shared() {
        let row = locked.base_at(base).ok().flatten();
        let flushed = durable::sync_parent(live).and_then(|()| durable::unlink(base));
        let undone = flushed.and_then(|()| match row {
            Some(row) => locked.change.withdraw(|rows| rows.delete_base(&row.id)),
            None => Ok(()),
        });
        if let Err(error) = undone {
            locked.store.events().info(&format!(
                "{error}; the next mount of the home frees {}",
                base.display()
            ));
        }
    }
    error
}

/// Moves the flattened layers into `bases/`. The row comes first: recovery knows that it may free a
/// row of ours without a file, or with a file that nothing reads.
fn install_flat(
    locked: &mut LockedBox<'_>,
    draft: &Draft,
    top: &Path,
    reader: Option<&str>,
) -> Result<()> {
    let Some(flat) = &draft.flat else {
        return Ok(());
    };
    let message = || format!("cannot look at {}", top.display());
    let meta = fs::symlink_metadata(top).context(message)?;
    let is_same = FileId::of(&meta) == flat.top
        && meta.modified().context(message)? == flat.changed
        && flat.lies_on_chain_of(top)?;
    if !is_same {
        return Err(replaced_just_now(locked));
    }
    record_frozen(locked, &draft.base, &flat.file, draft.virtual_size, reader)?;
    crash_point("flat.recorded");
    locked.change.begin_exclusive()?;
    durable::rename(&flat.file, &draft.base)?;
    crash_point("flat.installed");
    locked.store.spares.keep(&draft.base);
    Ok(())
}

/// Returns the disk state as the image that its upper layers were written out as, or None if the
/// draft has no such image.
///
/// # Errors
/// EBUSY when the disk changed meanwhile; those of system calls and of SQLite.
pub fn install_flattened(
    locked: &mut LockedBox<'_>,
    draft: &Draft,
    top: &Path,
) -> Result<Option<FrozenDisk>> {
    if draft.flat.is_none() || draft.overlay.is_some() {
        return Ok(None);
    }
    install_flat(locked, draft, top, None)?;
    Ok(Some(FrozenDisk {
        layer: Frozen::Base {
            path: draft.base.clone(),
        },
        virtual_size: draft.virtual_size,
        top: top.to_path_buf(),
        file: Arc::new(open_disk(top)?.0),
    }))
}

/// Puts the live disk on the image that its upper layers were written out as. Its contents stay.
///
/// # Errors
/// EBUSY when the disk changed meanwhile; those of system calls and of SQLite.
pub fn put_on_flat(locked: &mut LockedBox<'_>, draft: &Draft) -> Result<()> {
    let live = locked.store.home().live_disk(&locked.record.id);
    let (file, old) = open_disk(&live)?;
    let overlay = match &draft.overlay {
        Some(overlay) if draft.virtual_size == live_header(&live)?.virtual_size => overlay,
        _ => return Err(replaced_just_now(locked)),
    };
    durable::copy_times(&live, overlay)?;
    durable::sync_file(overlay)?;
    let box_id = locked.record.id.clone();
    install_flat(locked, draft, &live, Some(&box_id))?;
    replace_live(locked, overlay, &live, old)?;
    drop(file);
    crash_point("freeze.replaced");
    Ok(())
}

/// Freezes a snapshot: returns its layer as a base, adopted if necessary, or the layer below it if
/// it holds no data itself.
///
/// # Errors
/// EIO when the layer is not a qcow2 image, and those of [`adopt`].
pub fn adopt_snapshot_layer(locked: &mut LockedBox<'_>, layer: &Path) -> Result<FrozenDisk> {
    let header = Header::open(layer)?
        .ok_or_else(|| Error::damaged(format!("{} is not a qcow2 image", layer.display())))?;
    let virtual_size = header.virtual_size;
    let backing = match layer_below_empty(locked, layer, &header)? {
        Some(below) => below,
        None => Frozen::Base {
            path: adopt(locked, layer)?,
        },
    };
    Ok(FrozenDisk {
        layer: backing,
        virtual_size,
        top: layer.to_path_buf(),
        file: Arc::new(open_disk(layer)?.0),
    })
}

/// Returns the layer that stands for a disk whose top layer holds no data. Returns None if the top
/// layer holds data or has no layer below it.
///
/// # Errors
/// Those of reading the layers.
pub fn layer_below_empty(
    locked: &LockedBox<'_>,
    top: &Path,
    header: &Header,
) -> Result<Option<Frozen>> {
    let Some(backing) = header.backing_path(top) else {
        return Ok(None);
    };
    if Layer::open(top, Format::Qcow2)?.holds_data()? {
        return Ok(None);
    }
    let path = resolve(&backing)?;
    let below = Header::open(&path)?;
    let stored = header.backing.as_ref().and_then(|backing| backing.format);
    let is_qcow2 = below.is_some() && stored != Some(Format::Raw);
    let same_size = below.is_some_and(|below| below.virtual_size == header.virtual_size);
    let in_bases = path.parent() == Some(locked.store.home().bases_dir().as_path());
    Ok(Some(if is_qcow2 && in_bases && same_size {
        Frozen::Base { path }
    } else {
        let format = if is_qcow2 { Format::Qcow2 } else { Format::Raw };
        Frozen::Below { path, format }
    }))
}
