//! Before every change: the lock, fresh rows, recovery, and everything that refuses it.

use std::path::{Path, PathBuf};

use super::layers::{Layers, is_row_of, resolve};
use super::{Store, display_name};
use crate::disk::FileId;
use crate::home::{
    Activity, BaseRecord, BoxRecord, Change, NewBase, SnapshotRecord, VmProcess, base_id,
    reject_linked_box,
};
use crate::{Error, Result};

/// A box that may be changed: the lock is held, it is not running, recovery is done, every layer
/// below it is in `bases/` (or is an image) and every base it reaches is referred to.
pub(super) struct Prepared<'s> {
    pub store: &'s Store,
    pub change: Change<'s>,
    pub record: BoxRecord,
}

impl Store {
    /// Takes the lock and makes the box ready for a change. Keep it short: the lock is held until
    /// the value is dropped.
    ///
    /// # Errors
    /// EBUSY when a runtime holds the lock or the box is active, EROFS on a read-only mount, EPERM
    /// in a copied home or when a chain leaves the home.
    pub(super) fn prepare(&self, box_id: &str) -> Result<Prepared<'_>> {
        let mut prepared = self.look_at_box(box_id)?;
        prepared.make_ready()?;
        Ok(prepared)
    }

    /// Likewise, for a change that is safe beside a BoxLite runtime: with the option `shared` it is made
    /// also while one has the lock.
    ///
    /// # Errors
    /// As [`Store::prepare`]; EBUSY also when BoxLite is at work on the box.
    pub(super) fn prepare_beside(&self, box_id: &str) -> Result<Prepared<'_>> {
        let mut prepared = self.look_beside(box_id)?;
        prepared.make_ready()?;
        Ok(prepared)
    }

    /// Likewise, for a box of which something is only read: that may run.
    ///
    /// # Errors
    /// As [`Store::prepare_beside`].
    pub(super) fn prepare_source(&self, box_id: &str) -> Result<Prepared<'_>> {
        let change = self.change_beside()?;
        let record = change.box_by_id(box_id)?;
        let mut prepared = Prepared {
            store: self,
            change,
            record,
        };
        prepared.make_source_ready()?;
        Ok(prepared)
    }

    /// As [`Store::look_at_box`], for such a change.
    pub(super) fn look_beside(&self, box_id: &str) -> Result<Prepared<'_>> {
        self.look_within(self.change_beside()?, box_id)
    }

    /// Takes the lock and makes sure that the box may be changed, without making it ready: enough for
    /// what touches no layer.
    ///
    /// # Errors
    /// As [`Store::prepare`].
    pub(super) fn look_at_box(&self, box_id: &str) -> Result<Prepared<'_>> {
        self.look_within(self.change_alone()?, box_id)
    }

    fn look_within<'s>(&'s self, change: Change<'s>, box_id: &str) -> Result<Prepared<'s>> {
        let record = change.box_by_id(box_id)?;
        let prepared = Prepared {
            store: self,
            change,
            record,
        };
        prepared.refuse_unfit()?;
        Ok(prepared)
    }

    /// EBUSY while somebody may write to the box's disk.
    pub(super) fn refuse_active(&self, record: &BoxRecord) -> Result<()> {
        match self.home.activity(record) {
            Activity::Idle => Ok(()),
            Activity::Active(why) => Err(Error::busy(format!(
                "box {} is busy: {why}; stop it first",
                display_name(record)
            ))),
        }
    }

    /// Whether a box lives in this home, by its configuration.
    pub(super) fn is_at_home(&self, record: &BoxRecord) -> bool {
        self.refuse_copied(record).is_ok()
    }

    fn is_box_home(&self, box_home: &Path, here: &Path) -> bool {
        // A box that never started may have no directory at all. Whoever comes by a link is at home, too.
        box_home == here
            || std::fs::metadata(box_home)
                .and_then(|there| Ok(FileId::of(&there) == FileId::of(&std::fs::metadata(here)?)))
                .unwrap_or(false)
    }

    /// In a copied home the configuration still names the original's directory, and changes by
    /// BoxLite or by us would hit the original.
    fn refuse_copied(&self, record: &BoxRecord) -> Result<()> {
        let config = record.config()?;
        let box_home = config["box_home"].as_str().unwrap_or_default();
        let here = self.home.box_dir(&record.id);
        if self.is_box_home(Path::new(box_home), &here) {
            return Ok(());
        }
        Err(Error::new(
            libc::EPERM,
            format!(
                "box {} says it lives in {box_home}, not in {}: this home is a copy, and changes could hit the original; export its boxes and import them into a new home",
                display_name(record),
                here.display()
            ),
        ))
    }
}

impl Prepared<'_> {
    /// Makes sure that the box may be changed, and stays so.
    fn refuse_unfit(&self) -> Result<()> {
        self.change.watch(&self.record)?;
        self.store.refuse_active(&self.record)?;
        self.refuse_strangers()
    }

    fn make_ready(&mut self) -> Result<()> {
        match self.change.is_shared() {
            true => self.refuse_unsettled()?,
            false => {
                self.recover()?;
                self.put_back_own_bases()?;
            }
        }
        self.adopt_own_chains()?;
        self.complete_refs()
    }

    /// Goes on with another box, which is made ready too, under the same lock.
    ///
    /// # Errors
    /// As [`Store::prepare`].
    pub fn turn_to(&mut self, box_id: &str) -> Result<()> {
        self.turn_to_look(box_id)?;
        self.make_ready()
    }

    /// Likewise with one of which something is only read.
    ///
    /// # Errors
    /// As [`Store::prepare_source`].
    pub fn turn_to_source(&mut self, box_id: &str) -> Result<()> {
        self.record = self.change.box_by_id(box_id)?;
        self.make_source_ready()
    }

    /// A box that runs is left alone: neither recovered, nor is the header of its disk touched.
    fn make_source_ready(&mut self) -> Result<()> {
        self.change.watch(&self.record)?;
        self.refuse_strangers()?;
        if self.store.home.activity(&self.record) == Activity::Idle {
            return self.make_ready();
        }
        if VmProcess::of(&self.store.home, &self.record).is_none() {
            return self.store.refuse_active(&self.record);
        }
        self.refuse_pending()?;
        self.adopt_frozen_chains()?;
        self.complete_refs()
    }

    /// Goes on with another box, no layer of which is touched.
    ///
    /// # Errors
    /// ENOENT; beside a runtime as [`Store::prepare`].
    pub fn turn_to_add(&mut self, box_id: &str) -> Result<()> {
        if self.change.is_shared() {
            self.turn_to_look(box_id)?;
            return self.refuse_unsettled();
        }
        self.record = self.change.box_by_id(box_id)?;
        Ok(())
    }

    fn turn_to_look(&mut self, box_id: &str) -> Result<()> {
        self.record = self.change.box_by_id(box_id)?;
        self.refuse_unfit()
    }

    /// The snapshot with this id as it is now.
    ///
    /// # Errors
    /// ENOENT when it is gone.
    pub fn snapshot(&self, id: &str) -> Result<SnapshotRecord> {
        let mut snapshots = self.snapshots()?.into_iter();
        snapshots
            .find(|snapshot| snapshot.id == id)
            .ok_or_else(|| Error::new(libc::ENOENT, "the snapshot is gone"))
    }

    /// The snapshots as they are now.
    pub fn snapshots(&self) -> Result<Vec<SnapshotRecord>> {
        self.change.snapshots_of(&self.record.id)
    }

    /// The live disk, if the box ever started.
    pub fn live(&self) -> Option<PathBuf> {
        let live = self.store.home.live_disk(&self.record.id);
        live.is_file().then_some(live)
    }

    /// The files of this box that have rows: the live disk and the snapshots' layers.
    pub fn tops(&self) -> Result<Vec<PathBuf>> {
        let mut tops: Vec<PathBuf> = self.live().into_iter().collect();
        for snapshot in self.snapshots()? {
            let path = self.store.snapshot_layer(&snapshot);
            if path.is_file() {
                tops.push(path);
            }
        }
        Ok(tops)
    }

    /// Every layer of every chain of the box, resolved; tops included. A chain that can't be followed to
    /// its end is left out: what would read it fails by itself, and its box can be removed or restored
    /// all the same.
    pub fn chains(&self) -> Result<Vec<Vec<PathBuf>>> {
        let chain = |top: &PathBuf| -> Result<Vec<PathBuf>> {
            let paths = crate::disk::chain_paths(top)?;
            paths.iter().map(|path| resolve(path)).collect()
        };
        let tops = self.tops()?;
        Ok(tops.iter().filter_map(|top| chain(top).ok()).collect())
    }

    /// EPERM when rows or headers of the box speak of another home.
    pub(super) fn refuse_strangers(&self) -> Result<()> {
        self.store.refuse_copied(&self.record)?;
        reject_linked_box(&self.store.home, &self.record.id)?;
        self.refuse_foreign_layers()
    }

    /// Likewise, by headers that were read already.
    pub(super) fn refuse_strangers_in(&self, layers: &Layers) -> Result<()> {
        self.store.refuse_copied(&self.record)?;
        reject_linked_box(&self.store.home, &self.record.id)?;
        let tops = self.tops()?;
        let mut paths = tops.iter().flat_map(|top| layers.chain(top));
        paths
            .find(|path| !self.store.home.contains(path))
            .map_or(Ok(()), |outside| Err(self.outside(outside)))
    }

    /// EPERM when a chain leaves the home.
    fn refuse_foreign_layers(&self) -> Result<()> {
        for chain in self.chains()? {
            if let Some(outside) = chain.iter().find(|path| !self.store.home.contains(path)) {
                return Err(self.outside(outside));
            }
        }
        Ok(())
    }

    fn outside(&self, layer: &Path) -> Error {
        Error::new(
            libc::EPERM,
            format!(
                "the disk of box {} reads from {}, outside this home; nothing is changed, for that file may be another home's. Export the box and import it again to make it whole",
                display_name(&self.record),
                layer.display()
            ),
        )
    }

    /// Puts bases back that were deleted, where a chain of the box can't be followed without.
    fn put_back_own_bases(&mut self) -> Result<()> {
        let is_broken = |top: &PathBuf| {
            crate::disk::chain_paths(top).is_err_and(|error| error.errno() == libc::ENOENT)
        };
        if self.tops()?.iter().any(is_broken) {
            let layers = self.layers()?;
            self.store.put_back_bases(&mut self.change, &layers)?;
        }
        Ok(())
    }

    /// Makes every base in any chain of the box referred to by the box, so that BoxLite does not
    /// collect it (it goes by references, and its own are incomplete). A base without a row gets
    /// one of ours: a crash inside BoxLite's clone leaves such.
    fn complete_refs(&mut self) -> Result<()> {
        let bases_dir = self.store.home.bases_dir();
        let mut reached: Vec<PathBuf> = self.chains()?.into_iter().flatten().collect();
        reached.retain(|path| path.parent() == Some(bases_dir.as_path()));
        reached.sort();
        reached.dedup();
        let referred = self.change.refs_of(&self.record.id)?;
        let mut new_bases = Vec::new();
        let mut new_refs = Vec::new();
        for path in reached {
            let id = match self.base_at(&path)? {
                Some(row) => {
                    // One of an older version has no spare name yet.
                    if row.is_ours() {
                        self.store.keep_spare(&path);
                    }
                    row.id
                }
                None if self.change.is_shared() => {
                    return Err(self.cloned_just_now(&path));
                }
                None => {
                    let base = self.store.new_base(&path, &path)?;
                    let id = base.id.clone();
                    new_bases.push(base);
                    id
                }
            };
            if !referred.contains(&id) {
                new_refs.push(id);
            }
        }
        if new_refs.is_empty() {
            return Ok(());
        }
        let box_id = self.record.id.clone();
        self.change.transaction(|rows| {
            new_bases
                .iter()
                .try_for_each(|base| rows.insert_base(base))?;
            new_refs
                .iter()
                .try_for_each(|base| rows.insert_ref(base, &box_id))
        })
    }

    /// The ids of the bases that a chain reaches, all of which have rows after `prepare`.
    pub fn bases_reached(&self, top: &Path) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for path in crate::disk::chain_paths(top)? {
            let row = self.base_at(&resolve(&path)?)?;
            ids.extend(row.map(|row| row.id));
        }
        Ok(ids)
    }

    /// The row of the base with this (resolved) path.
    pub fn base_at(&self, path: &Path) -> Result<Option<BaseRecord>> {
        let mut rows = self.change.bases_at(path)?.into_iter();
        Ok(rows.find(|row| is_row_of(row, path)))
    }

    /// All image files of the home as they are now.
    pub fn layers(&self) -> Result<Layers> {
        self.store.scan_layers()
    }
}

impl Store {
    /// A row of ours for a file in `bases/`.
    pub(super) fn new_base(&self, path: &Path, file: &Path) -> Result<NewBase> {
        use crate::Context;
        let header = crate::disk::Header::open(file)?;
        let meta =
            std::fs::metadata(file).context(|| format!("cannot look at {}", path.display()))?;
        // The stem is the id, as BoxLite has it, unless it could not be one.
        let id = match path.file_stem().and_then(|stem| stem.to_str()) {
            Some(stem) if crate::home::is_safe_component(stem) => stem.to_owned(),
            _ => base_id()?,
        };
        Ok(NewBase {
            id,
            path: path.display().to_string(),
            virtual_size: header.map_or(meta.len(), |header| header.virtual_size),
            file_size: meta.len(),
            created_at: now(),
        })
    }
}

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
}
