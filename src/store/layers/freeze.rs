//! Freezing the live disk: it becomes a base, and an empty overlay takes the writes.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::disk::{FileId, Format, Header, Layer};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::listing::resolve;
use crate::store::access::locked_box::LockedBox;
use crate::store::access::shared::{replace_live, replaced_just_now};
use crate::store::layers::adopt::adopt;
use crate::store::layers::draft::Draft;
use crate::store::layers::frozen::{Frozen, FrozenDisk, record_frozen};
use crate::store::layers::live_disk::{live_header, open_disk};
use crate::store::layers::mergeable::MOST_BACKING;
use crate::{Context, Error, Result, disk};

/// Freezes the live disk. Not stacked upon when it holds no data: then what is below has its
/// contents already, and several snapshots of an unchanged box are names of one layer.
///
/// Order: overlay in the workspace, flush the live disk, the row of the base, the live disk's
/// second name in `bases/`, the overlay over the live name. A crash before the last step leaves a
/// row and perhaps a name for the inode that is still the live disk: recovery drops both (undo,
/// never finish). The row comes first for the reason that [`Prepared::adopt`] gives.
pub fn freeze_live(locked: &mut LockedBox<'_>, draft: &Draft) -> Result<FrozenDisk> {
    let live = locked.store.home().live_disk(&locked.record.id);
    let (file, old) = open_disk(&live)?;
    let file = Arc::new(file);
    let header = live_header(&live)?;
    let virtual_size = header.virtual_size;
    let below = layer_below_empty(locked, &live, &header)?;
    // What was looked at by name was this file.
    if FileId::at(&live)? != old {
        return Err(replaced_just_now(locked));
    }
    if let Some(layer) = below {
        locked.change.hold()?;
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
        // It held nothing when the draft was made.
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
            // Unless the overlay is in place all the same, and could not be taken back.
            let is_in_place = FileId::at(&live).is_ok_and(|now| now == new);
            return Err(if is_in_place {
                error
            } else {
                undo_freeze(locked, &draft.base, error)
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

/// The live disk gets its second name, and the overlay its first.
fn freeze_as(
    locked: &mut LockedBox<'_>,
    base: &Path,
    overlay: &Path,
    live: &Path,
    old: FileId,
) -> Result<()> {
    locked.change.hold()?;
    durable::link(live, base)?;
    crash_point("freeze.linked");
    if FileId::at(base)? != old {
        return Err(replaced_just_now(locked));
    }
    replace_live(locked, overlay, live, old)
}

/// Beside a runtime nobody undoes later what did not come to its end: the second name, which nothing
/// reads by, and the row go now. Else recovery does it, before the next change.
fn undo_freeze(locked: &mut LockedBox<'_>, base: &Path, error: Error) -> Error {
    if locked.change.is_beside_a_runtime() {
        let row = locked.base_at(base).ok().flatten();
        let undone = durable::unlink(base).and_then(|()| match row {
            Some(row) => locked.change.transaction(|rows| rows.delete_base(&row.id)),
            None => Ok(()),
        });
        if let Err(error) = undone {
            locked.store.events().info(&format!(
                "{error}; {} is freed when the home is mounted next",
                base.display()
            ));
        }
    }
    error
}

/// Puts the layers that were written out as one into `bases/`. The row comes first: with a row of ours and
/// no file, or a file that nothing reads from, recovery knows what to free.
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
    locked.change.hold()?;
    durable::rename(&flat.file, &draft.base)?;
    crash_point("flat.installed");
    locked.store.spares.keep(&draft.base);
    Ok(())
}

/// A disk state whose chain was too long, as the image that its upper layers were written out as.
pub fn frozen_flat(
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

/// A snapshot's layer as something to start from: a base, adopted if it is not one yet, or
/// what is below it where it holds no data itself.
pub fn frozen_snapshot(locked: &mut LockedBox<'_>, layer: &Path) -> Result<FrozenDisk> {
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

/// The layer that stands for a disk whose top layer itself holds nothing.
fn layer_below_empty(
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
