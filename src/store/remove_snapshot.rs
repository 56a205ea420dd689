//! `rmdir web/snapshots/NAME`.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use super::Store;
use super::crash::crash_point;
use super::durable;
use super::layers::{Layers, Role, is_row_of, resolve};
use super::marks::mark_unrecorded;
use super::prepare::Prepared;
use crate::Result;
use crate::home::{BaseRecord, Change, Home, SnapshotRecord};

impl Store {
    /// Deletes a snapshot. Its layer stays in `bases/` while any chain reads from it.
    ///
    /// # Errors
    /// ENOENT when it is gone, EBUSY.
    pub fn remove_snapshot(&self, box_id: &str, snapshot_id: &str) -> Result<()> {
        let what = format!(
            "removal of snapshot {} of box {}",
            self.snapshot_name(box_id, snapshot_id)?,
            self.name_of(box_id)
        );
        let result = self.delete_with_room(&|| self.delete_snapshot(box_id, snapshot_id));
        self.events.log_outcome(&what, result)
    }

    /// How a snapshot is called in the log.
    pub(super) fn snapshot_name(&self, box_id: &str, snapshot_id: &str) -> Result<String> {
        Ok(self
            .home
            .catalog()?
            .snapshot_by_id(box_id, snapshot_id)
            .map_or_else(|| snapshot_id.to_owned(), |snapshot| snapshot.name.clone()))
    }

    /// Order: adopt if any chain names its path, mark the directory, delete the row, unlink the layer's
    /// name. A crash after the row leaves a marked directory without one: recovery removes it, also
    /// where the layer had no other name.
    fn delete_snapshot(&self, box_id: &str, snapshot_id: &str) -> Result<()> {
        let mut prepared = self.prepare(box_id)?;
        let snapshot = prepared.snapshot(snapshot_id)?;
        let layer = prepared.unread_layer(&snapshot)?;
        crash_point("remove.adopted");
        prepared.mark_unrecorded_snapshot(&layer)?;
        crash_point("remove.marked");
        let unrecorded = prepared
            .change
            .transaction(|rows| rows.delete_snapshot(box_id, snapshot_id));
        if let Err(error) = unrecorded {
            // Recovery sees whether the row is there.
            let _ = prepared.recover();
            return Err(error);
        }
        crash_point("remove.unrecorded");
        durable::unlink(&layer)?;
        crash_point("remove.unlinked");
        // The snapshot is gone; what follows does not bring it back.
        self.remove_snapshot_dir(layer.parent());
        if let Err(error) = prepared.free_surplus() {
            self.events
                .info(&format!("{error}; its space is not freed"));
        }
        Ok(())
    }
}

impl Prepared<'_> {
    /// The name of a snapshot's layer that may go: in the directory BoxLite would remove, that of the
    /// row's path, where it is one of this box's. Adopted first if any chain names it.
    pub(super) fn unread_layer(&mut self, snapshot: &SnapshotRecord) -> Result<PathBuf> {
        let home = &self.store.home;
        let recorded = self.store.snapshot_layer(snapshot);
        let own = home.snapshot_disk(&self.record.id, &snapshot.name);
        let in_own_directory = recorded.parent().and_then(Path::parent)
            == Some(home.snapshots_dir(&self.record.id).as_path());
        let layer = if in_own_directory { recorded } else { own };
        if self.layers()?.readers_of(&layer).next().is_some() {
            self.adopt(&layer)?;
        }
        Ok(layer)
    }

    /// Marks the directory of a snapshot's layer, whose row is about to go or to name another.
    pub(super) fn mark_unrecorded_snapshot(&self, layer: &Path) -> Result<()> {
        match layer.parent() {
            Some(dir) if dir.is_dir() => mark_unrecorded(dir),
            _ => Ok(()),
        }
    }
}

impl Store {
    /// Frees the bases we made that no header names any more and that are no snapshot's layer.
    /// The file goes first: a row of ours without a file is recognised as a leftover by the next
    /// recovery, while a file without a row could be BoxLite's (a crash inside its clone leaves such,
    /// and it can be a box's only disk).
    pub(super) fn free_unreached(&self, change: &mut Change<'_>) -> Result<()> {
        self.free_bases(change, &BaseRecord::is_ours)
    }

    /// Likewise, of those that `may_go` says; one of BoxLite's only when no box refers to it any more.
    /// That one is made ours first, so that a crash leaves nothing of BoxLite's half gone.
    pub(super) fn free_bases(
        &self,
        change: &mut Change<'_>,
        may_go: &dyn Fn(&BaseRecord) -> bool,
    ) -> Result<()> {
        let mut layers = self.scan_layers()?;
        let Some(named) = self.named_by_rows(change, &layers)? else {
            return Ok(());
        };
        let mut rows = change.bases()?;
        rows.retain(may_go);
        let referred = change.referred_bases()?;
        rows.retain(|row| row.is_ours() || !referred.contains(&row.id));
        loop {
            let free = layers.files().iter().find_map(|file| {
                // One name known and one name in all: no snapshot, no live disk, no backup.
                let is_needed =
                    layers.readers_of(&file.path).next().is_some() || named.contains(&file.path);
                if !matches!(file.role, Role::Base { .. }) || is_needed || file.names != 1 {
                    return None;
                }
                let row = rows.iter().find(|row| is_row_of(row, &file.path))?;
                Some((row.clone(), file.path.clone()))
            });
            let Some((row, path)) = free else {
                return Ok(());
            };
            self.drop_base(change, &row, &path)?;
            layers = layers.without(&[path]);
        }
    }

    /// Removes a base that nothing reads from and that has no other name: the file, then the row.
    pub(super) fn drop_base(
        &self,
        change: &mut Change<'_>,
        row: &BaseRecord,
        path: &Path,
    ) -> Result<()> {
        if !row.is_ours() {
            change.transaction(|rows| rows.claim_base(&row.id))?;
            crash_point("free.claimed");
        }
        durable::unlink(path)?;
        crash_point("free.unlinked");
        self.free_spare(path);
        change.transaction(|rows| rows.delete_base(&row.id))
    }

    /// Every path that a snapshot's row names. None while it can't be told what else is needed: a header
    /// that can't be read may name anything, a layer that a box reads and that is not there may have
    /// another name, and a box whose rows say it has a disk that is not where it belongs may have it put aside.
    pub(super) fn named_by_rows(
        &self,
        change: &Change<'_>,
        layers: &Layers,
    ) -> Result<Option<BTreeSet<PathBuf>>> {
        if layers.damaged().is_some() {
            return Ok(None);
        }
        let mut tops = layers.files().iter().filter(|file| file.box_id().is_some());
        let is_broken = |top: &Path| {
            let chain = layers.chain(top);
            chain
                .iter()
                .any(|path| is_gone_from(path, layers, &self.home))
        };
        if tops.any(|top| is_broken(&top.path)) {
            return Ok(None);
        }
        let snapshots = change.snapshots()?;
        let mut started = change.referring_boxes()?;
        started.extend(snapshots.iter().map(|snapshot| snapshot.box_id.clone()));
        let boxes = change.boxes()?;
        let has_disk = |id: &str| layers.at(&self.home.live_disk(id)).is_some();
        if boxes
            .iter()
            .any(|record| started.contains(&record.id) && !has_disk(&record.id))
        {
            return Ok(None);
        }
        let boxes: HashSet<&str> = boxes.iter().map(|record| record.id.as_str()).collect();
        let mut named = BTreeSet::new();
        for snapshot in snapshots
            .iter()
            .filter(|it| boxes.contains(it.box_id.as_str()))
        {
            if layers.at(&self.snapshot_layer(snapshot)).is_none() {
                return Ok(None);
            }
            named.extend(self.named_by(snapshot));
        }
        Ok(Some(named))
    }

    /// The paths that a snapshot's row names: of its layer in this home, and as it is spelled, wherever
    /// that is.
    pub(super) fn named_by(&self, snapshot: &SnapshotRecord) -> Vec<PathBuf> {
        let mut named = vec![self.snapshot_layer(snapshot)];
        let recorded = PathBuf::from(snapshot.base_path().unwrap_or_default());
        if !named.contains(&recorded) {
            named.extend(resolve(&recorded));
        }
        named
    }
}

/// Whether a path of the home that something names has nothing there.
fn is_gone_from(path: &Path, layers: &Layers, home: &Home) -> bool {
    layers.at(path).is_none()
        && home.contains(path)
        && std::fs::symlink_metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}
