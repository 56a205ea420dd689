//! `rmdir web/snapshots/NAME`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Store;
use super::crash::crash_point;
use super::durable;
use super::layers::{Layers, Role, resolve};
use crate::home::Change;
use crate::{Error, Result};

impl Store {
    /// Deletes a snapshot. Its layer stays in `bases/` while any chain reads from it.
    ///
    /// # Errors
    /// ENOENT when it is gone, EBUSY.
    pub fn remove_snapshot(&self, box_id: &str, snapshot_id: &str) -> Result<()> {
        let name = self
            .home
            .catalog()?
            .snapshot_by_id(box_id, snapshot_id)
            .map_or_else(|| snapshot_id.to_owned(), |snapshot| snapshot.name.clone());
        let what = format!("removal of snapshot {name} of box {}", self.name_of(box_id));
        let result = self.delete_snapshot(box_id, snapshot_id);
        self.noted(&what, result)
    }

    /// Order: adopt if any chain names its path, delete the row, unlink the layer's name. A crash
    /// after the row leaves a directory without one: recovery unlinks it.
    fn delete_snapshot(&self, box_id: &str, snapshot_id: &str) -> Result<()> {
        let mut prepared = self.prepare(box_id)?;
        let snapshot = prepared
            .snapshots()?
            .into_iter()
            .find(|snapshot| snapshot.id == snapshot_id)
            .ok_or_else(|| Error::new(libc::ENOENT, "the snapshot is gone"))?;
        // The directory BoxLite would remove: that of the row's path, where it is one of this box's.
        let recorded = self.snapshot_layer(&snapshot);
        let own = self.home.snapshot_disk(box_id, &snapshot.name);
        let in_own_directory = recorded.parent().and_then(Path::parent)
            == Some(self.home.snapshots_dir(box_id).as_path());
        let layer = if in_own_directory { recorded } else { own };
        if prepared.layers()?.readers_of(&layer).next().is_some() {
            prepared.adopt(&layer)?;
        }
        crash_point("remove.adopted");
        prepared
            .change
            .transaction(|rows| rows.delete_snapshot(box_id, snapshot_id))?;
        crash_point("remove.unrecorded");
        durable::unlink(&layer)?;
        crash_point("remove.unlinked");
        // The snapshot is gone; what follows does not bring it back.
        if let Some(dir) = layer.parent()
            && let Err(error) = durable::remove_dir(dir)
        {
            self.journal
                .note(&format!("{error}; the rest is left there"));
        }
        if let Err(error) = self.free_unreached(&mut prepared.change) {
            self.journal
                .note(&format!("{error}; its space is not freed"));
        }
        Ok(())
    }
}

impl Store {
    /// Frees the bases we made that no header names any more and that are no snapshot's layer.
    /// The file goes first: a row of ours without a file is recognised as a leftover by the next
    /// recovery, while a file without a row could be BoxLite's (a crash inside its clone leaves such,
    /// and it can be a box's only disk).
    pub(super) fn free_unreached(&self, change: &mut Change<'_>) -> Result<()> {
        loop {
            let layers = self.scan_layers()?;
            let Some(needed) = self.needed(change, &layers)? else {
                return Ok(());
            };
            let rows = change.bases()?;
            let free = layers.files().iter().find_map(|file| {
                let Role::Base { .. } = file.role else {
                    return None;
                };
                // One name known and one name in all: no snapshot, no live disk, no backup.
                if needed.contains(file.path.as_path()) || file.names != 1 {
                    return None;
                }
                rows.iter()
                    .find(|row| {
                        row.is_ours()
                            && resolve(Path::new(&row.base_path)).is_ok_and(|p| p == file.path)
                    })
                    .map(|row| (row.id.clone(), file.path.clone()))
            });
            let Some((id, path)) = free else {
                return Ok(());
            };
            durable::unlink(&path)?;
            crash_point("free.unlinked");
            change.transaction(|rows| rows.delete_base(&id))?;
        }
    }

    /// Every path that a header or a snapshot's row names. None while that can't be told: a header
    /// that can't be read may name anything, and a box whose rows say it has a disk that is not
    /// where it belongs may have it put aside.
    fn needed(&self, change: &Change<'_>, layers: &Layers) -> Result<Option<BTreeSet<PathBuf>>> {
        if layers.damaged().is_some() {
            return Ok(None);
        }
        let headers = layers
            .files()
            .iter()
            .filter_map(|file| file.backing.clone());
        let mut needed: BTreeSet<PathBuf> = headers.collect();
        for record in change.boxes()? {
            let snapshots = change.snapshots_of(&record.id)?;
            let started = !snapshots.is_empty() || !change.refs_of(&record.id)?.is_empty();
            if started && layers.at(&self.home.live_disk(&record.id)).is_none() {
                return Ok(None);
            }
            for snapshot in &snapshots {
                let layer = self.snapshot_layer(snapshot);
                if layers.at(&layer).is_none() {
                    return Ok(None);
                }
                needed.insert(layer);
                // As it is spelled, wherever that is.
                let recorded = snapshot.base_path().unwrap_or_default();
                needed.extend(resolve(Path::new(&recorded)));
            }
        }
        Ok(Some(needed))
    }
}
