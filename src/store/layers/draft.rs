//! Drafts: the slow part of a change, done before the lock is taken.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk::{Format, Layer};
use crate::exports::{Contents, Source};
use crate::files::durable;
use crate::files::listing::resolve;
use crate::files::workspace::discard;
use crate::home::{base_id, is_kept_id};
use crate::store::Store;
use crate::store::access::lock::lock_box;
use crate::store::layers::flatten::{FlattenedLayers, plan_flatten, write_flattened};
use crate::store::layers::live_disk::live_header;
use crate::store::layers::merge::merge_layers;
use crate::store::layers::mergeable::{BACKING_LEFT, MOST_BACKING, mergeable};
use crate::store::layers::running::{RunningState, write_running};
use crate::{Error, Result, disk};

/// The slow part of a change, done before the lock is taken. The change checks the draft's
/// assumptions again under the lock.
pub struct Draft {
    /// Path in `bases/` that the frozen layer will get.
    pub base: PathBuf,
    /// The overlay that will replace the live disk, if the live disk will be frozen.
    pub overlay: Option<PathBuf>,
    /// Virtual size of the disk in bytes.
    pub virtual_size: u64,
    /// The upper layers of the chain as one image. Set if the chain is too long for another overlay.
    pub flat: Option<FlattenedLayers>,
    /// The copy of a disk whose box was running when it was read.
    pub running: Option<RunningState>,
}

/// Returns the draft of a change that starts from `source`, of which `read` was read: the
/// written-out copy if a running box's disk was copied, otherwise what `make` returns.
///
/// # Errors
/// EROFS, those of writing the copy, and those of `make`.
pub fn draft_of(
    store: &Store,
    source: &Source,
    read: &Contents,
    make: &dyn Fn() -> Result<Draft>,
) -> Result<Draft> {
    store.refuse_read_only()?;
    let Some(export) = store.exports.copies.copy_read_as(source, read) else {
        return make();
    };
    Ok(Draft {
        base: store.home().base_disk(&base_id()?),
        overlay: None,
        virtual_size: 0,
        flat: None,
        running: Some(write_running(store, source.box_id(), &export)?),
    })
}

/// Drafts the freezing of a box's live disk.
///
/// # Errors
/// EROFS; ENODATA when the box has no disk; EBUSY when its chain has to be shortened while it is
/// running; ENOSPC, EIO.
pub fn draft_freeze(store: &Store, box_id: &str) -> Result<Draft> {
    store.refuse_read_only()?;
    let live = store.home().live_disk(box_id);
    put_back_missing(store, box_id, &live)?;
    let header = live_header(&live)?;
    let mut draft = Draft {
        base: store.home().base_disk(&base_id()?),
        overlay: None,
        virtual_size: header.virtual_size,
        flat: None,
        running: None,
    };
    let holds_data = Layer::open(&live, Format::Qcow2)?.holds_data()?;
    if holds_data && disk::chain_paths(&live)?.len() > MOST_BACKING {
        refuse_active_box(store, box_id)?;
        draft.flat = shortened(store, &live)?;
    }
    let overlay = store.workspace().fresh_path("overlay")?;
    draft.overlay = Some(overlay.clone());
    disk::create_overlay(&overlay, &draft.base, Format::Qcow2, header.virtual_size)?;
    store.home().give_to_owner(&overlay)?;
    // Writes most dirty pages back now, so the flush under the lock is short.
    durable::sync_file(&live)?;
    Ok(draft)
}

/// Drafts a shorter chain for a live disk that has more layers than a virtual machine starts with.
/// None if it has not, or merging was enough.
///
/// # Errors
/// As [`draft_freeze`].
pub fn draft_shorter(store: &Store, box_id: &str) -> Result<Option<Draft>> {
    let live = store.home().live_disk(box_id);
    if disk::chain_paths(&live)?.len() <= MOST_BACKING + 1 {
        return Ok(None);
    }
    let virtual_size = live_header(&live)?.virtual_size;
    let Some(flat) = shortened(store, &live)? else {
        return Ok(None);
    };
    let base = store.home().base_disk(&base_id()?);
    let overlay = store.workspace().fresh_path("overlay")?;
    disk::create_overlay(&overlay, &base, Format::Qcow2, virtual_size)?;
    store.home().give_to_owner(&overlay)?;
    Ok(Some(Draft {
        base,
        overlay: Some(overlay),
        virtual_size,
        flat: Some(flat),
        running: None,
    }))
}

/// Drafts a new box that starts from a disk state. If the chain is too long, its upper layers are
/// written out as one image; the source stays as it is.
///
/// # Errors
/// As [`draft_freeze`].
pub fn draft_clone(store: &Store, source: &Source) -> Result<Draft> {
    store.refuse_read_only()?;
    let top = store.exports.disks.top_of(source)?;
    put_back_missing(store, source.box_id(), &top)?;
    let header = live_header(&top)?;
    let holds_data = Layer::open(&top, Format::Qcow2)?.holds_data()?;
    let below = disk::chain_paths(&top)?.len() - usize::from(!holds_data);
    if below <= MOST_BACKING {
        return draft_snapshot_clone(store, source);
    }
    refuse_active_box(store, source.box_id())?;
    let Some(flat) = shortened(store, &top)? else {
        return draft_snapshot_clone(store, source);
    };
    Ok(Draft {
        base: store.home().base_disk(&base_id()?),
        overlay: None,
        virtual_size: header.virtual_size,
        flat: Some(flat),
        running: None,
    })
}

/// Drafts a snapshot that shares the layer of a disk state, whatever the length of the chain.
///
/// # Errors
/// As [`draft_freeze`].
pub fn draft_snapshot_clone(store: &Store, source: &Source) -> Result<Draft> {
    match source {
        Source::Live { box_id } if !is_kept_id(box_id) => draft_freeze(store, box_id),
        _ => Ok(Draft {
            base: store.home().base_disk(&base_id()?),
            overlay: None,
            virtual_size: 0,
            flat: None,
            running: None,
        }),
    }
}

/// Puts deleted bases back if the chain can't be followed without them.
fn put_back_missing(store: &Store, box_id: &str, top: &Path) -> Result<()> {
    let is_broken = disk::chain_paths(top).is_err_and(|e| e.errno() == libc::ENOENT);
    if is_broken && top.exists() && !is_kept_id(box_id) {
        drop(lock_box(store, box_id)?);
    }
    Ok(())
}

fn refuse_active_box(store: &Store, box_id: &str) -> Result<()> {
    match store.home().catalog()?.box_by_id(box_id) {
        Some(record) => store.exports.disks.refuse_active(record),
        None => Err(Error::new(libc::ENOENT, "the box is gone")),
    }
}

/// Shortens a chain that is too long to start from, in the way that writes less: merges layers that
/// nothing else needs, or writes as many upper layers as necessary out as one image. Returns None
/// if merging was enough.
fn shortened(store: &Store, top: &Path) -> Result<Option<FlattenedLayers>> {
    loop {
        let chain = disk::chain_paths(top)?;
        let chain: Vec<PathBuf> = chain.iter().flat_map(|path| resolve(path)).collect();
        if chain.len() <= MOST_BACKING {
            return Ok(None);
        }
        let upper = (chain.len() + 1).saturating_sub(BACKING_LEFT);
        let written = chain.iter().take(upper);
        let bytes: u64 = written
            .filter_map(|path| Some(std::fs::symlink_metadata(path).ok()?.blocks() * 512))
            .sum();
        // In a large home, finding out which layers nothing else needs takes too long.
        let merges = if store.layers.is_large() {
            Vec::new()
        } else {
            mergeable(store)?
        };
        let mut merges = merges.into_iter();
        let merge =
            merges.find(|merge| merge.frees() && merge.is_in(&chain) && merge.allocated() <= bytes);
        let merged = merge.map(|merge| merge_layers(store, &merge, &mut |_| Ok(())));
        if let Some(Ok(_)) = merged {
            continue;
        }
        // The merge failed, for example because a layer is being read: write the image.
        let flatten = plan_flatten(store, top, upper)?;
        return write_flattened(store, flatten, &mut |_| Ok(())).map(Some);
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // The overlay is either moved into place or no longer needed.
        if let Some(overlay) = &self.overlay {
            discard(overlay);
        }
    }
}

/// Refuses to use what was read of a disk state if the state has changed since: the result would
/// mix two states.
///
/// # Errors
/// EIO when the state changed, and those of reading it.
pub fn refuse_changed(store: &Store, source: &Source, read: &Contents) -> Result<()> {
    let is_copied = || store.exports.copies.copy_read_as(source, read).is_some();
    if is_copied() || store.exports.plain.contents_now(source)? == Some(*read) {
        return Ok(());
    }
    Err(Error::new(
        libc::EIO,
        format!(
            "{} changed while it was copied; copy it again",
            store.exports.disks.describe(source)
        ),
    ))
}
