//! A box that may be changed, and what it is made of at this moment.

use std::path::{Path, PathBuf};

use crate::disk::chain_paths;
use crate::files::listing::resolve;
use crate::home::{BaseRecord, BoxRecord, Change, SnapshotRecord};
use crate::store::Store;
use crate::store::layers::graph::{LayerGraph, is_row_of};
use crate::{Error, Result};

/// A box that may be changed: the lock is held, it is not running, recovery is done, every layer
/// below it is in `bases/` (or is an image) and every base it reaches is referred to.
pub struct LockedBox<'s> {
    pub store: &'s Store,
    pub change: Change<'s>,
    pub record: BoxRecord,
}

impl LockedBox<'_> {
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
        let live = self.store.home().live_disk(&self.record.id);
        live.is_file().then_some(live)
    }

    /// The files of this box that have rows: the live disk and the snapshots' layers.
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

    /// Every layer of every chain of the box, resolved; tops included. A chain that can't be followed to
    /// its end is left out: what would read it fails by itself, and its box can be removed or restored
    /// all the same.
    pub fn chains(&self) -> Result<Vec<Vec<PathBuf>>> {
        let chain = |top: &PathBuf| -> Result<Vec<PathBuf>> {
            let paths = chain_paths(top)?;
            paths.iter().map(|path| resolve(path)).collect()
        };
        let tops = self.tops()?;
        Ok(tops.iter().filter_map(|top| chain(top).ok()).collect())
    }

    /// The ids of the bases that a chain reaches, all of which have rows after `prepare`.
    pub fn bases_reached(&self, top: &Path) -> Result<Vec<String>> {
        let mut ids = Vec::new();
        for path in chain_paths(top)? {
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
    pub fn layers(&self) -> Result<LayerGraph> {
        self.store.layers.scan()
    }
}
