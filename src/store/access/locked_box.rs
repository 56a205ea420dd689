//! A box that may be changed, and the files and rows it consists of.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::disk::chain_paths;
use crate::files::listing::resolve;
use crate::home::{BaseRecord, BoxRecord, Change, SnapshotRecord};
use crate::store::Store;
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
}

impl LockedBox<'_> {
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

    /// Returns all chains of the box as resolved paths, top layers included. A broken chain is left
    /// out: reading it fails anyway, and its box can still be removed or restored.
    ///
    /// # Errors
    /// Those of the database.
    pub fn chains(&self) -> Result<Vec<Vec<PathBuf>>> {
        let layers = self.near()?;
        let mut lowest = HashMap::new();
        let tops = self.tops()?.into_iter();
        Ok(tops
            .filter_map(|top| whole_chain(&layers, &top, &mut lowest))
            .collect())
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
    ///
    /// # Errors
    /// EIO; those of SQLite.
    pub fn near(&self) -> Result<LayerGraph> {
        self.near_box(&self.record.id)
    }

    /// Scans what a change touches that removes a layer inside the box, or replaces its disk: as
    /// [`LockedBox::near`], and nobody else reads a layer inside the box. Before the first scan of the
    /// whole home, this is one.
    ///
    /// # Errors
    /// EIO; those of SQLite.
    pub fn all_readers(&self) -> Result<LayerGraph> {
        let layers = &self.store.layers;
        match layers.is_read_from_outside(&self.record.id) {
            None => layers.scan(),
            Some(_) => self.near(),
        }
    }

    /// Scans the image files that a change of the layers inside this box touches.
    ///
    /// # Errors
    /// EIO; those of SQLite.
    pub fn near_box(&self, box_id: &str) -> Result<LayerGraph> {
        self.store.layers.near(&self.change, box_id)
    }

    /// Scans all image files of the home.
    ///
    /// # Errors
    /// EIO.
    pub fn layers(&self) -> Result<LayerGraph> {
        self.store.layers.scan()
    }
}

/// Returns the chain of a disk as resolved paths, or None if it can't be followed to its end. The
/// lowest path in the graph may be an image, which may have layers of its own; `lowest` remembers
/// them.
fn whole_chain(
    layers: &LayerGraph,
    top: &Path,
    lowest: &mut HashMap<PathBuf, Option<Vec<PathBuf>>>,
) -> Option<Vec<PathBuf>> {
    let known = layers.chain(top);
    let (last, upper) = known.split_last()?;
    let is_followed = |path: &&Path| layers.at(path).is_some_and(|file| file.damaged.is_none());
    let is_cycle = layers.at(last).is_some_and(|file| file.backing.is_some());
    if is_cycle || !upper.iter().all(is_followed) {
        return None;
    }
    let follow = || {
        let paths = chain_paths(last).ok()?;
        paths.iter().map(|path| resolve(path).ok()).collect()
    };
    let rest = lowest.entry(last.to_path_buf()).or_insert_with(follow);
    let upper = upper.iter().map(|path| path.to_path_buf());
    Some(upper.chain(rest.clone()?).collect())
}
