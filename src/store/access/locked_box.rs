//! A box that may be changed, and the files and rows it consists of.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::disk::chain_paths;
use crate::files::durable;
use crate::files::listing::resolve;
use crate::home::{BaseRecord, BoxRecord, Change, SnapshotRecord, is_kept_id};
use crate::store::Store;
use crate::store::layers::chains::Chains;
use crate::store::layers::graph::{LayerGraph, is_row_of};
use crate::{Error, Result};

/// A box that may be changed. After [`super::lock::lock_box`] the lock is held, the box is idle and
/// recovered, every layer below its disk is in `bases/` or is an image, and the box refers to every
/// base it reaches. The other functions of [`super::lock`] say what they guarantee.
pub struct LockedBox<'s> {
    /// The store of the home.
    pub store: &'s Store,
    /// The change of the home that this is a part of; it holds the lock.
    pub change: Change<'s>,
    /// The row of the box.
    pub record: BoxRecord,
    /// The last scan of the files near a box.
    scanned: RefCell<Option<(Moment, Rc<LayerGraph>)>>,
    /// The chains of the box, and when they were followed.
    chains: RefCell<Option<(Moment, Rc<Chains>)>>,
}

/// [`Change::epoch`], [`durable::changes`] and the id of the box: what was seen of a box is true as
/// long as these are the same.
type Moment = (u64, u64, String);

impl<'s> LockedBox<'s> {
    /// Returns the box with this row, within a change that is under way.
    pub fn new(store: &'s Store, change: Change<'s>, record: BoxRecord) -> LockedBox<'s> {
        LockedBox {
            store,
            change,
            record,
            scanned: RefCell::default(),
            chains: RefCell::default(),
        }
    }

    /// Returns the current row of the snapshot with this id.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn snapshot(&self, id: &str) -> Result<SnapshotRecord> {
        let mut snapshots = self.snapshots()?.into_iter();
        snapshots
            .find(|snapshot| snapshot.id == id)
            .ok_or_else(|| Error::new(libc::ENOENT, "the snapshot is gone"))
    }

    /// Returns the current rows of the box's snapshots.
    ///
    /// # Errors
    /// Those of the database.
    pub fn snapshots(&self) -> Result<Vec<SnapshotRecord>> {
        if is_kept_id(&self.record.id) {
            let catalog = self.store.home().catalog()?;
            return Ok(catalog.snapshots_of(&self.record.id).to_vec());
        }
        self.change.snapshots_of(&self.record.id)
    }

    /// Returns the path of the live disk; None if the box never started.
    pub fn live(&self) -> Option<PathBuf> {
        let live = self.store.home().live_disk(&self.record.id);
        live.is_file().then_some(live)
    }

    /// Returns the existing top layers of the box: the live disk and the layers of its snapshots.
    ///
    /// # Errors
    /// Those of the database.
    pub fn tops(&self) -> Result<Vec<PathBuf>> {
        let mut tops: Vec<PathBuf> = self.live().into_iter().collect();
        for snapshot in self.snapshots()? {
            let path = self.store.exports.disks.snapshot_layer(&snapshot);
            if path.is_file() {
                tops.push(path);
            }
        }
        Ok(tops)
    }

    /// Returns the layers of all chains of the box. A broken chain is left out: reading it fails
    /// anyway, and its box can still be removed or restored.
    ///
    /// # Errors
    /// Those of the database.
    pub fn chains(&self) -> Result<Rc<Chains>> {
        let moment = self.moment(&self.record.id);
        if let Some((then, chains)) = &*self.chains.borrow()
            && *then == moment
        {
            return Ok(chains.clone());
        }
        let layers = self.near()?;
        let mut tops = vec![self.store.home().live_disk(&self.record.id)];
        let disks = &self.store.exports.disks;
        for snapshot in self.snapshots()? {
            let is_there = |path: &Path| layers.at(path).is_some();
            tops.push(disks.snapshot_layer_among(&snapshot, &is_there));
        }
        let chains = Rc::new(Chains::below(tops, &layers));
        self.chains.replace(Some((moment, chains.clone())));
        Ok(chains)
    }

    fn moment(&self, box_id: &str) -> Moment {
        let changes = (self.change.epoch(), durable::changes());
        (changes.0, changes.1, box_id.to_owned())
    }

    /// Returns the ids of the bases in the chain of `top`. They all have rows in a box that
    /// [`super::lock::lock_box`] made ready.
    ///
    /// # Errors
    /// EIO when the chain cannot be followed.
    pub fn bases_reached(&self, top: &Path) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for path in chain_paths(top)? {
            let row = self.base_at(&resolve(&path)?)?;
            ids.extend(row.map(|row| row.id));
        }
        Ok(ids)
    }

    /// Records references from the box to the bases in the chain of `top`, in one transaction.
    ///
    /// # Errors
    /// EIO when the chain cannot be followed; those of a transaction.
    pub fn refer_to_chain(&mut self, top: &Path) -> Result<()> {
        let bases = self.bases_reached(top)?;
        let box_id = &self.record.id;
        self.change.transaction(|rows| {
            let mut bases = bases.iter();
            bases.try_for_each(|base| rows.insert_ref(base, box_id))
        })
    }

    /// Returns the row of the base with this resolved path; None if it has none.
    ///
    /// # Errors
    /// Those of the database.
    pub fn base_at(&self, path: &Path) -> Result<Option<BaseRecord>> {
        let mut rows = self.change.bases_at(path)?.into_iter();
        Ok(rows.find(|row| is_row_of(row, path)))
    }

    /// Scans the image files that a change of this box touches: its own, those below and above them.
    /// As long as this change does nothing, and others can do no more than before, the last scan
    /// is returned.
    ///
    /// # Errors
    /// EIO; those of SQLite.
    pub fn near(&self) -> Result<Rc<LayerGraph>> {
        self.near_box(&self.record.id)
    }

    /// Scans what a change touches that removes a layer inside the box, or replaces its disk: as
    /// [`LockedBox::near`], and nobody else reads a layer inside the box. Before the first scan of the
    /// whole home, this is one.
    ///
    /// # Errors
    /// EIO; those of SQLite.
    pub fn all_readers(&self) -> Result<Rc<LayerGraph>> {
        let layers = &self.store.layers;
        match layers.is_read_from_outside(&self.record.id) {
            None => layers.scan().map(Rc::new),
            Some(_) => self.near(),
        }
    }

    /// Scans the image files that a change of the layers inside this box touches, as
    /// [`LockedBox::near`] does.
    ///
    /// # Errors
    /// EIO; those of SQLite.
    pub fn near_box(&self, box_id: &str) -> Result<Rc<LayerGraph>> {
        let moment = self.moment(box_id);
        let mut scanned = self.scanned.borrow_mut();
        if let Some((then, layers)) = &*scanned
            && *then == moment
        {
            return Ok(layers.clone());
        }
        let layers = Rc::new(self.store.layers.near(&self.change, box_id)?);
        *scanned = Some((moment, layers.clone()));
        Ok(layers)
    }

    /// Scans all image files of the home.
    ///
    /// # Errors
    /// EIO.
    pub fn layers(&self) -> Result<LayerGraph> {
        self.store.layers.scan()
    }
}
