//! Freezing the live disk: it becomes a base, and an empty overlay takes the writes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::combine::Combined;
use super::crash::crash_point;
use super::durable;
use super::layers::resolve;
use super::prepare::{Prepared, now};
use super::workspace::discard;
use super::{Contents, Source, Store, display_name};
use crate::disk::{self, FileId, Format, Header, Layer};
use crate::home::{NewBase, base_id};
use crate::{Context, Error, Result};

/// Most backing files a live disk may have: with one more libkrun can't start the box.
pub(super) const MOST_BACKING: usize = 8;

/// Most backing files that a chain which was too long is left with: so that the next few changes find
/// room.
pub(super) const BACKING_LEFT: usize = 4;

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
    /// That file, open: as long as it is, no other gets its inode number.
    pub file: Arc<File>,
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

/// What a change needs that takes long to make: made before the lock is taken. What it assumed is
/// looked at again under the lock.
pub(super) struct Draft {
    /// Where the frozen layer will be.
    base: PathBuf,
    /// The overlay that will replace the live disk, where that will be frozen.
    overlay: Option<PathBuf>,
    virtual_size: u64,
    /// The upper layers of its chain as one, where that is too long to be stacked upon.
    flat: Option<Combined>,
    /// The state of a disk that was running when it was read.
    pub running: Option<RunningState>,
}

/// The state of a running box's disk, written out as an image in the workspace.
pub(super) struct RunningState {
    pub image: Combined,
    /// Virtual size in bytes.
    pub virtual_size: u64,
}

impl Store {
    /// For what starts from `source`, of which `read` was read: a copy of a running box's disk, else `make`.
    pub(super) fn draft_of(
        &self,
        source: &Source,
        read: &Contents,
        make: &dyn Fn() -> Result<Draft>,
    ) -> Result<Draft> {
        self.refuse_read_only()?;
        let Some(export) = self.running_export(source, read) else {
            return make();
        };
        Ok(Draft {
            base: self.home.base_disk(&base_id()?),
            overlay: None,
            virtual_size: 0,
            flat: None,
            running: Some(self.write_running(&export)?),
        })
    }

    /// For freezing the live disk of a box.
    pub(super) fn draft_freeze(&self, box_id: &str) -> Result<Draft> {
        self.refuse_read_only()?;
        let live = self.home.live_disk(box_id);
        self.mend_chain(box_id, &live)?;
        let header = live_header(&live)?;
        let mut draft = Draft {
            base: self.home.base_disk(&base_id()?),
            overlay: None,
            virtual_size: header.virtual_size,
            flat: None,
            running: None,
        };
        let holds_data = Layer::open(&live, Format::Qcow2)?.holds_data()?;
        if holds_data && disk::chain_paths(&live)?.len() > MOST_BACKING {
            self.refuse_active_box(box_id)?;
            draft.flat = self.shortened(&live)?;
        }
        let overlay = self.fresh_path("overlay")?;
        draft.overlay = Some(overlay.clone());
        disk::create_overlay(&overlay, &draft.base, Format::Qcow2, header.virtual_size)?;
        self.home.give_to_owner(&overlay)?;
        // Most of what is dirty is written back here, so that the flush under the lock is short.
        durable::sync_file(&live)?;
        Ok(draft)
    }

    /// For a new box that starts from a disk state. Of one whose chain is too long the upper layers are
    /// written out as one instead, and the source left alone.
    pub(super) fn draft_clone(&self, source: &Source) -> Result<Draft> {
        self.refuse_read_only()?;
        let top = self.top_of(source)?;
        self.mend_chain(source.box_id(), &top)?;
        let header = live_header(&top)?;
        let holds_data = Layer::open(&top, Format::Qcow2)?.holds_data()?;
        let below = disk::chain_paths(&top)?.len() - usize::from(!holds_data);
        if below <= MOST_BACKING {
            return self.draft_share(source);
        }
        self.refuse_active_box(source.box_id())?;
        let Some(flat) = self.shortened(&top)? else {
            return self.draft_share(source);
        };
        Ok(Draft {
            base: self.home.base_disk(&base_id()?),
            overlay: None,
            virtual_size: header.virtual_size,
            flat: Some(flat),
            running: None,
        })
    }

    /// For a snapshot that shares the layer of a disk state, however long its chain.
    pub(super) fn draft_share(&self, source: &Source) -> Result<Draft> {
        match source {
            Source::Live { box_id } => self.draft_freeze(box_id),
            Source::Snapshot { .. } => Ok(Draft {
                base: self.home.base_disk(&base_id()?),
                overlay: None,
                virtual_size: 0,
                flat: None,
                running: None,
            }),
        }
    }

    /// Has bases that were deleted put back, where a chain can't be followed without.
    fn mend_chain(&self, box_id: &str, top: &Path) -> Result<()> {
        let is_broken = disk::chain_paths(top).is_err_and(|e| e.errno() == libc::ENOENT);
        if is_broken && top.exists() {
            drop(self.prepare(box_id)?);
        }
        Ok(())
    }

    fn refuse_active_box(&self, box_id: &str) -> Result<()> {
        match self.home.catalog()?.box_by_id(box_id) {
            Some(record) => self.refuse_active(record),
            None => Err(Error::new(libc::ENOENT, "the box is gone")),
        }
    }

    /// Makes a chain that is too long to start from short enough, whichever way writes less: layers that
    /// nothing else needs are merged, or as many upper layers as it takes are written out as one. None
    /// if it became short enough by merging.
    fn shortened(&self, top: &Path) -> Result<Option<Combined>> {
        loop {
            let layers = self.scan_layers()?;
            let chain = disk::chain_paths(top)?;
            let chain: Vec<PathBuf> = chain.iter().flat_map(|path| resolve(path)).collect();
            if chain.len() <= MOST_BACKING {
                return Ok(None);
            }
            let upper = (chain.len() + 1).saturating_sub(BACKING_LEFT);
            let written = chain.iter().take(upper);
            let written: u64 = written
                .filter_map(|path| Some(layers.at(path)?.allocated))
                .sum();
            let mut merges = self.mergeable()?.into_iter();
            let merge = merges
                .find(|merge| merge.frees() && merge.is_in(&chain) && merge.allocated() <= written);
            let merged = merge.map(|merge| self.merge(&merge, &mut |_| Ok(())));
            if let Some(Ok(_)) = merged {
                continue;
            }
            // Where somebody reads, say, it is done without.
            let combining = self.combining(top, upper)?;
            return self.combine(combining, &mut |_| Ok(())).map(Some);
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Moved into place, or not needed.
        if let Some(overlay) = &self.overlay {
            discard(overlay);
        }
    }
}

/// A disk, open, and which file it is: as long as it is open, no other gets its inode number.
pub(super) fn open_disk(path: &Path) -> Result<(File, FileId)> {
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => no_disk(),
        _ => Error::io(format!("cannot open {}", path.display()), e),
    })?;
    let id = FileId::of_open(&file, path)?;
    Ok((file, id))
}

fn no_disk() -> Error {
    Error::new(
        libc::ENODATA,
        "the box has no disk yet; start it once with BoxLite",
    )
}

/// The header of a live disk, which is always qcow2.
fn live_header(live: &Path) -> Result<Header> {
    if !live.exists() {
        return Err(no_disk());
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
    /// Order: overlay in the workspace, flush the live disk, the row of the base, the live disk's
    /// second name in `bases/`, the overlay over the live name. A crash before the last step leaves a
    /// row and perhaps a name for the inode that is still the live disk: recovery drops both (undo,
    /// never finish). The row comes first for the reason that [`Prepared::adopt`] gives.
    pub(super) fn freeze(&mut self, draft: &Draft) -> Result<FrozenDisk> {
        let live = self.store.home.live_disk(&self.record.id);
        let (file, old) = open_disk(&live)?;
        let file = Arc::new(file);
        let header = live_header(&live)?;
        let virtual_size = header.virtual_size;
        let below = self.layer_below_empty(&live, &header)?;
        // What was looked at by name was this file.
        if FileId::at(&live)? != old {
            return Err(self.replaced_just_now());
        }
        if let Some(layer) = below {
            self.change.begin_exclusive()?;
            return Ok(FrozenDisk {
                layer,
                virtual_size,
                top: live,
                file,
            });
        }
        let overlay = match &draft.overlay {
            Some(overlay) if draft.virtual_size == virtual_size => overlay,
            _ => return Err(self.replaced_just_now()),
        };
        durable::copy_times(&live, overlay)?;
        durable::sync_file(overlay)?;
        if draft.flat.is_none() && disk::chain_paths(&live)?.len() > MOST_BACKING {
            // It held nothing when the draft was made.
            return Err(self.replaced_just_now());
        }
        if draft.flat.is_some() {
            let box_id = self.record.id.clone();
            self.install_flat(draft, &live, Some(&box_id))?;
            self.replace_live(overlay, &live, old)?;
        } else {
            durable::sync_file(&live)?;
            self.record_frozen(
                &draft.base,
                &live,
                virtual_size,
                Some(&self.record.id.clone()),
            )?;
            crash_point("freeze.recorded");
            let new = FileId::at(overlay)?;
            let replaced = self.freeze_as(&draft.base, overlay, &live, old);
            if let Err(error) = replaced {
                // Unless the overlay is in place all the same, and could not be taken back.
                let is_in_place = FileId::at(&live).is_ok_and(|now| now == new);
                return Err(match is_in_place {
                    true => error,
                    false => self.not_frozen(&draft.base, error),
                });
            }
        }
        crash_point("freeze.replaced");
        self.store.keep_spare(&draft.base);
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
    fn freeze_as(&mut self, base: &Path, overlay: &Path, live: &Path, old: FileId) -> Result<()> {
        self.change.begin_exclusive()?;
        durable::link(live, base)?;
        crash_point("freeze.linked");
        if FileId::at(base)? != old {
            return Err(self.replaced_just_now());
        }
        self.replace_live(overlay, live, old)
    }

    /// Beside a runtime nobody undoes later what did not come to its end: the second name, which nothing
    /// reads by, and the row go now. Else recovery does it, before the next change.
    fn not_frozen(&mut self, base: &Path, error: Error) -> Error {
        if self.change.is_shared() {
            let row = self.base_at(base).ok().flatten();
            let undone = durable::unlink(base).and_then(|()| match row {
                Some(row) => self.change.transaction(|rows| rows.delete_base(&row.id)),
                None => Ok(()),
            });
            if let Err(error) = undone {
                self.store.events.info(&format!(
                    "{error}; {} is freed when the home is mounted next",
                    base.display()
                ));
            }
        }
        error
    }

    pub(super) fn replaced_just_now(&self) -> Error {
        Error::busy(format!(
            "the disk of box {} was changed just now; try again",
            display_name(&self.record)
        ))
    }

    /// Puts the layers that were written out as one into `bases/`. The row comes first: with a row of ours and
    /// no file, or a file that nothing reads from, recovery knows what to free.
    fn install_flat(&mut self, draft: &Draft, top: &Path, reader: Option<&str>) -> Result<()> {
        let Some(flat) = &draft.flat else {
            return Ok(());
        };
        let message = || format!("cannot look at {}", top.display());
        let meta = fs::symlink_metadata(top).context(message)?;
        let is_same = FileId::of(&meta) == flat.top
            && meta.modified().context(message)? == flat.changed
            && flat.lies_on_chain_of(top)?;
        if !is_same {
            return Err(self.replaced_just_now());
        }
        self.record_frozen(&draft.base, &flat.file, draft.virtual_size, reader)?;
        crash_point("flat.recorded");
        self.change.begin_exclusive()?;
        durable::rename(&flat.file, &draft.base)?;
        crash_point("flat.installed");
        self.store.keep_spare(&draft.base);
        Ok(())
    }

    /// A disk state whose chain was too long, as the image that its upper layers were written out as.
    pub(super) fn frozen_flat(&mut self, draft: &Draft, top: &Path) -> Result<Option<FrozenDisk>> {
        if draft.flat.is_none() || draft.overlay.is_some() {
            return Ok(None);
        }
        self.install_flat(draft, top, None)?;
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
            file: Arc::new(open_disk(layer)?.0),
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
        let path = resolve(&backing)?;
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

    /// The row of a base that is about to be there, with the contents of `file`.
    pub(super) fn record_frozen(
        &mut self,
        base: &Path,
        file: &Path,
        virtual_size: u64,
        reader: Option<&str>,
    ) -> Result<()> {
        let id = base
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default()
            .to_owned();
        let meta = fs::metadata(file).context(|| format!("cannot look at {}", file.display()))?;
        let row = NewBase {
            id: id.clone(),
            path: base.display().to_string(),
            virtual_size,
            file_size: meta.len(),
            created_at: now(),
        };
        self.change.transaction(|rows| {
            rows.insert_base(&row)?;
            match reader {
                Some(box_id) => rows.insert_ref(&id, box_id),
                None => Ok(()),
            }
        })
    }
}
