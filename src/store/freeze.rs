//! Freezing the live disk: it becomes a base, and an empty overlay takes the writes.

use std::fs;
use std::path::{Path, PathBuf};

use super::crash::crash_point;
use super::durable;
use super::prepare::{Prepared, now};
use super::{Store, called};
use crate::disk::{self, Format, Header, Layer};
use crate::home::{NewBase, base_id};
use crate::{Context, Error, Result};

/// What the live disk was when it was frozen.
#[derive(Clone, Debug)]
pub(super) enum Frozen {
    /// A layer in `bases/` that has exactly the contents and the virtual size of the live disk.
    Base { path: PathBuf },
    /// The live disk is an empty overlay on this: a raw image, or a layer of another virtual size.
    Below { path: PathBuf, format: Format },
}

/// A disk state that stays as it is.
#[derive(Clone, Debug)]
pub(super) struct FrozenDisk {
    pub layer: Frozen,
    /// Virtual size of the disk in bytes.
    pub virtual_size: u64,
    /// The file that was on top: has the time of the state, and is what to copy where the layer
    /// can't stand for it.
    pub top: PathBuf,
}

impl FrozenDisk {
    /// What an overlay that starts from this state has to name as its backing file.
    pub fn backing(&self) -> (&Path, Format) {
        match &self.layer {
            Frozen::Base { path } => (path, Format::Qcow2),
            Frozen::Below { path, format } => (path, *format),
        }
    }
}

/// The overlay that will replace the live disk, made before the lock is taken.
pub(super) struct Draft {
    base: PathBuf,
    overlay: PathBuf,
    virtual_size: u64,
}

impl Store {
    /// Makes the overlay for a freeze that may follow. Slow work, so without the lock; what it
    /// assumed is looked at again under the lock.
    pub(super) fn draft_freeze(&self, box_id: &str) -> Result<Draft> {
        self.refuse_read_only()?;
        let live = self.home.live_disk(box_id);
        let header = live_header(&live)?;
        let base = self.home.base_disk(&base_id()?);
        let overlay = self.fresh_path("overlay")?;
        disk::create_overlay(&overlay, &base, Format::Qcow2, header.virtual_size)?;
        self.home.give_to_owner(&overlay)?;
        // Most of what is dirty is written back here, so that the flush under the lock is short.
        durable::sync_file(&live)?;
        Ok(Draft {
            base,
            overlay,
            virtual_size: header.virtual_size,
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Renamed into place, or not needed: then it goes with the workspace at the latest.
        let _ = fs::remove_file(&self.overlay);
    }
}

/// The header of a live disk, which is always qcow2.
fn live_header(live: &Path) -> Result<Header> {
    if !live.exists() {
        return Err(Error::new(
            libc::ENODATA,
            "the box has no disk yet; start it once with BoxLite",
        ));
    }
    Header::open(live)?.ok_or_else(|| {
        Error::damaged(format!(
            "{} is not a qcow2 image, BoxLite's disks are; nothing was changed",
            live.display()
        ))
    })
}

impl Prepared<'_> {
    /// Freezes the live disk. Not stacked upon when it holds no data: then what is below has its
    /// contents already, and several snapshots of an unchanged box are names of one layer.
    ///
    /// Order: overlay in the workspace, flush the live disk, its second name in `bases/`, the row,
    /// the overlay over the live name. A crash before the last step leaves a name and perhaps a row
    /// for the inode that is still the live disk: recovery drops both (undo, never finish).
    pub(super) fn freeze(&mut self, draft: &Draft) -> Result<FrozenDisk> {
        let live = self.store.home.live_disk(&self.record.id);
        let header = live_header(&live)?;
        let virtual_size = header.virtual_size;
        if let Some(layer) = self.layer_below_empty(&live, &header)? {
            return Ok(FrozenDisk {
                layer,
                virtual_size,
                top: live,
            });
        }
        if virtual_size != draft.virtual_size {
            return Err(Error::busy(format!(
                "the disk of box {} was replaced just now; try again",
                called(&self.record)
            )));
        }
        durable::copy_times(&live, &draft.overlay)?;
        durable::sync_file(&draft.overlay)?;
        durable::sync_file(&live)?;
        durable::link(&live, &draft.base)?;
        crash_point("freeze.linked");
        self.record_frozen(&draft.base, &live, virtual_size)?;
        crash_point("freeze.recorded");
        durable::rename(&draft.overlay, &live)?;
        crash_point("freeze.replaced");
        Ok(FrozenDisk {
            layer: Frozen::Base {
                path: draft.base.clone(),
            },
            virtual_size,
            top: live,
        })
    }

    /// A snapshot's layer as something to start from: a base, adopted if it is not one yet, or
    /// what is below it where it holds no data itself.
    pub(super) fn frozen_snapshot(&mut self, layer: &Path) -> Result<FrozenDisk> {
        let header = Header::open(layer)?
            .ok_or_else(|| Error::damaged(format!("{} is not a qcow2 image", layer.display())))?;
        let virtual_size = header.virtual_size;
        let layer_for_readers = match self.layer_below_empty(layer, &header)? {
            Some(below) => below,
            None => Frozen::Base {
                path: self.adopt(layer)?,
            },
        };
        Ok(FrozenDisk {
            layer: layer_for_readers,
            virtual_size,
            top: layer.to_path_buf(),
        })
    }

    /// The layer that stands for a disk whose top layer itself holds nothing.
    fn layer_below_empty(&self, top: &Path, header: &Header) -> Result<Option<Frozen>> {
        let Some(backing) = header.backing_path(top) else {
            return Ok(None);
        };
        if Layer::open(top, Format::Qcow2)?.holds_data()? {
            return Ok(None);
        }
        let path = super::layers::resolve(&backing)?;
        let below = Header::open(&path)?;
        let stored = header.backing.as_ref().and_then(|backing| backing.format);
        let is_qcow2 = below.is_some() && stored != Some(Format::Raw);
        let same_size = below.is_some_and(|below| below.virtual_size == header.virtual_size);
        let in_bases = path.parent() == Some(self.store.home.bases_dir().as_path());
        Ok(Some(match (is_qcow2, in_bases && same_size) {
            (true, true) => Frozen::Base { path },
            (true, false) => Frozen::Below {
                path,
                format: Format::Qcow2,
            },
            (false, _) => Frozen::Below {
                path,
                format: Format::Raw,
            },
        }))
    }

    fn record_frozen(&mut self, base: &Path, live: &Path, virtual_size: u64) -> Result<()> {
        let id = base
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default()
            .to_owned();
        let meta = fs::metadata(live).context(|| format!("cannot look at {}", live.display()))?;
        let row = NewBase {
            id: id.clone(),
            path: base.display().to_string(),
            virtual_size,
            file_size: meta.len(),
            created_at: now(),
        };
        let box_id = self.record.id.clone();
        self.change.transaction(|rows| {
            rows.insert_base(&row)?;
            rows.insert_ref(&id, &box_id)
        })
    }
}
