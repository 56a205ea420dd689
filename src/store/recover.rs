//! Recovery by looking at files and rows: what a crash of ours, or of BoxLite, left is undone or
//! finished the way the table in `docs/design/layers.md` says. Always under the lock, and only for a box
//! that is not running.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::durable;
use super::layers::{Layers, Role, resolve};
use super::listing::names_in;
use super::marks::UNRECORDED;
use super::prepare::Prepared;
use super::workspace::{self, Abandoned, remove_but_waiting};
use super::{Store, display_name};
use crate::disk::{FileId, Header};
use crate::home::{Activity, BaseRecord, Change, is_snapshot_name, snapshot_id};
use crate::{Context, Error, Result};

impl Store {
    /// Everything that can be recovered when a mount begins. What can't be done now (a runtime
    /// holds the lock, a box runs) is done before the next change of each box.
    pub(super) fn recover_at_mount(&self) {
        let abandoned = workspace::abandoned(&self.home.staging_dir());
        if !abandoned.is_empty()
            && let Err(error) = durable::sync_file_system(self.home.root())
        {
            // Its owner was killed: what he had done, and had not come to flush, is built on below. The error
            // may be an old one, of anybody's file: each step flushes what it needs, and tells its own.
            self.events.info(&error.to_string());
        }
        let abandoned: Vec<Abandoned> = abandoned
            .into_iter()
            .filter_map(Abandoned::take_over)
            .collect();
        for workspace in &abandoned {
            if let Err(error) = remove_but_waiting(workspace.dir()) {
                self.events.info(&error.to_string());
            }
        }
        // What recovery and all after it write, and look for, are canonical paths.
        let change = self.put_paths_right().and_then(|()| self.home.change());
        let has_recovered = match change {
            Ok(change) => {
                let recovered = self.recover_home(change, false);
                // What was put back may name others by another path.
                let recovered = recovered.and_then(|()| self.put_paths_right());
                if let Err(error) = &recovered {
                    self.events.info(&format!("recovery stopped: {error}"));
                }
                recovered.is_ok()
            }
            Err(error) => {
                self.events.info(&format!("recovery waits: {error}"));
                self.warn_of_paths(&error.to_string());
                false
            }
        };
        self.keep_left_archives(abandoned, has_recovered);
    }

    /// Frees all that nothing needs any more, after recovering what can be.
    ///
    /// # Errors
    /// EBUSY when a runtime holds the lock, EROFS, EIO.
    pub(super) fn free_unneeded(&self) -> Result<()> {
        self.put_paths_right()?;
        let change = self.home.change()?;
        durable::sync_unflushed()?;
        self.recover_home(change, true)
    }

    /// Recovers all boxes that are idle, and frees what nothing needs any more. `thorough`: also what
    /// BoxLite made of a box and would free with it.
    fn recover_home(&self, mut change: Change<'_>, thorough: bool) -> Result<()> {
        self.remove_unrecorded(&change)?;
        let mut boxes = change.boxes()?;
        let Some(first) = boxes.pop() else {
            self.drop_rows_without_files(&mut change)?;
            self.free_unreached(&mut change)?;
            return self.tidy_spares(&change);
        };
        boxes.push(first.clone());
        let mut prepared = Prepared {
            store: self,
            change,
            record: first,
        };
        // One look at all layers for all boxes, before and after: the lock is held.
        let mut layers = self.scan_layers()?;
        if boxes.iter().all(|record| self.is_at_home(record))
            && self.put_back_bases(&mut prepared.change, &layers)? > 0
        {
            layers = self.scan_layers()?;
        }
        let mut all_are_at_home = true;
        let mut recovered = Vec::new();
        for record in boxes {
            prepared.record = record;
            if let Err(error) = prepared.refuse_strangers_in(&layers) {
                all_are_at_home = false;
                self.events.info(&error.to_string());
                continue;
            }
            if self.home.activity(&prepared.record) != Activity::Idle {
                continue;
            }
            match prepared.recover() {
                Ok(()) => recovered.push(prepared.record.clone()),
                Err(error) => {
                    let name = display_name(&prepared.record);
                    self.events
                        .info(&format!("recovery of box {name} failed: {error}"));
                }
            }
        }
        if !all_are_at_home {
            // Paths in rows and headers may be those of another home.
            return Ok(());
        }
        let layers = self.scan_layers()?;
        let mut given_up = BTreeSet::new();
        let mut refs = prepared.change.refs()?;
        let bases = prepared.change.bases()?.into_iter();
        let bases: HashMap<String, BaseRecord> = bases.map(|row| (row.id.clone(), row)).collect();
        for record in recovered {
            let referred = refs.remove(&record.id).unwrap_or_default();
            let referred = referred.iter().filter_map(|id| bases.get(id).cloned());
            prepared.record = record;
            let dropped = prepared.drop_leftover_refs(&layers, referred.collect(), thorough)?;
            given_up.extend(dropped.into_iter().map(|row| row.id));
        }
        self.drop_rows_without_files(&mut prepared.change)?;
        self.free_bases(&mut prepared.change, &|row| {
            row.is_ours() || given_up.contains(&row.id)
        })?;
        self.tidy_spares(&prepared.change)
    }

    /// Directories of boxes that were being made: without a row they go, with one the mark goes.
    /// Directories without a row that we did not make are left for BoxLite, or for their owner.
    fn remove_unrecorded(&self, change: &Change<'_>) -> Result<()> {
        for id in names_in(&self.home.boxes_dir())? {
            let dir = self.home.box_dir(&id);
            let mark = dir.join(UNRECORDED);
            if !mark.exists() {
                continue;
            }
            match change.box_by_id(&id) {
                Ok(_) => durable::unlink(&mark)?,
                Err(error) if error.errno() == libc::ENOENT => {
                    self.events
                        .info(&format!("removed box {id}, which was not finished"));
                    fs::remove_dir_all(&dir)
                        .context(|| format!("cannot remove {}", dir.display()))?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Prepared<'_> {
    /// Brings the box into a state that a change may start from.
    pub(super) fn recover(&mut self) -> Result<()> {
        // It has a row.
        durable::unlink(&self.store.home.box_dir(&self.record.id).join(UNRECORDED))?;
        self.honour_pending()?;
        self.undo_freeze()?;
        self.settle_snapshot_directories()
    }

    /// BoxLite's own crash marker. With its snapshot half made, the live disk lies in the
    /// snapshot's directory and has to come back (litebox/local_snapshot.rs does the same at the
    /// next start of a runtime); a snapshot that was finished on disk is settled further down.
    fn honour_pending(&mut self) -> Result<()> {
        let home = &self.store.home;
        let marker = home.pending_marker(&self.record.id);
        let Ok(text) = fs::read_to_string(&marker) else {
            return Ok(());
        };
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if value["copy"] == Value::Bool(true) {
            // Its half-made copy is BoxLite's to remove: only it knows whether the copy is whole.
            return Err(Error::busy(format!(
                "BoxLite was copying a snapshot of box {} when it ended; start BoxLite once, it cleans up",
                display_name(&self.record)
            )));
        }
        let live = home.live_disk(&self.record.id);
        if !live.exists() {
            let taken = self.pending_layer(&value).ok_or_else(|| {
                Error::busy(format!(
                    "BoxLite left box {} in the middle of a snapshot ({}); start BoxLite once, it recovers it",
                    display_name(&self.record),
                    marker.display()
                ))
            })?;
            durable::rename(&taken, &live)?;
            if let Some(dir) = taken.parent() {
                // Anything else in it is not ours to remove.
                let _ = durable::remove_dir(dir);
            }
            self.store.events.info(&format!(
                "box {}: brought back the disk from a snapshot that BoxLite had not finished",
                display_name(&self.record)
            ));
        }
        durable::unlink(&marker)
    }

    /// Where BoxLite's marker says the live disk went, if that is in this box and is no snapshot.
    fn pending_layer(&self, marker: &Value) -> Option<PathBuf> {
        let dir = resolve(Path::new(marker["snapshot_dir"].as_str()?)).ok()?;
        let snapshots = self.store.home.snapshots_dir(&self.record.id);
        let name = dir.file_name()?.to_str()?.to_owned();
        let has_row = self.snapshots().ok()?.iter().any(|row| row.name == name);
        let layer = dir.join("disk.qcow2");
        (dir.parent() == Some(snapshots.as_path()) && !has_row && layer.is_file()).then_some(layer)
    }

    /// A live disk has one name. A second one in `bases/` is a freeze that did not come to its end:
    /// the row, the references and the name go. Never finished: BoxLite may have let a guest write
    /// to it since.
    fn undo_freeze(&mut self) -> Result<()> {
        let live = self.store.home.live_disk(&self.record.id);
        let Ok(meta) = fs::symlink_metadata(&live) else {
            return Ok(());
        };
        if meta.nlink() < 2 {
            return Ok(());
        }
        let layers = self.layers()?;
        let id = FileId::of(&meta);
        // Made last, but without a flush: it may be on disk without what came before it.
        for spare in layers.spares().all().iter().filter(|it| it.id == id) {
            durable::unlink(&spare.path)?;
        }
        for name in layers.names_of(id) {
            if !matches!(name.role, Role::Base { .. }) {
                continue;
            }
            if layers.readers_of(&name.path).next().is_some() {
                return Err(Error::damaged(format!(
                    "{} is the live disk of box {} and others read from it; nothing is changed. Stop using the box and export what reads from it",
                    name.path.display(),
                    display_name(&self.record)
                )));
            }
            let rows = self.change.bases()?;
            let ours: Vec<&str> = rows
                .iter()
                .filter(|row| row.is_ours() && is_at(&row.base_path, &name.path))
                .map(|row| row.id.as_str())
                .collect();
            if ours.is_empty() && rows.iter().any(|row| is_at(&row.base_path, &name.path)) {
                continue;
            }
            self.change
                .transaction(|rows| ours.iter().try_for_each(|id| rows.delete_base(id)))?;
            durable::unlink(&name.path)?;
        }
        Ok(())
    }

    /// Directories under `snapshots/` that have no row.
    fn settle_snapshot_directories(&mut self) -> Result<()> {
        let rows = self.snapshots()?;
        let snapshots = self.store.home.snapshots_dir(&self.record.id);
        for name in names_in(&snapshots)? {
            let has_row = rows.iter().any(|row| {
                let recorded = row.base_path().unwrap_or_default();
                let resolved = resolve(Path::new(&recorded));
                row.name == name || resolved.is_ok_and(|p| p.starts_with(snapshots.join(&name)))
            });
            if has_row {
                durable::unlink(&snapshots.join(&name).join(UNRECORDED))?;
                continue;
            }
            // One of ours that was made beside a runtime has a name that no snapshot can have.
            let is_marked = snapshots.join(&name).join(UNRECORDED).exists();
            if !is_snapshot_name(&name) && !is_marked {
                continue;
            }
            self.settle_snapshot_directory(&name)?;
        }
        Ok(())
    }

    /// Read by path: a snapshot BoxLite finished on disk, it gets its row. Its layer named
    /// elsewhere too: ours, being made or being deleted, it goes. Marked: an import, a rename or a
    /// deletion of ours that did not come to its end, likewise. None of these: left where it is.
    fn settle_snapshot_directory(&mut self, name: &str) -> Result<()> {
        let home = &self.store.home;
        let path = home.snapshot_disk(&self.record.id, name);
        let dir = home.snapshots_dir(&self.record.id).join(name);
        let mark = dir.join(UNRECORDED);
        if !path.exists() {
            if mark.exists() {
                durable::unlink(&mark)?;
            }
            // Only an empty directory goes.
            let _ = durable::remove_dir(&dir);
            return Ok(());
        }
        let layers = self.layers()?;
        if layers.readers_of(&path).next().is_some() && is_snapshot_name(name) {
            let virtual_size = Header::open(&path)?.map_or(0, |header| header.virtual_size);
            self.adopt(&path)?;
            self.record_snapshot(&snapshot_id()?, name, &path, virtual_size, None)?;
            self.store.events.info(&format!(
                "box {}: recorded snapshot {name}, which BoxLite had made but not recorded",
                display_name(&self.record)
            ));
        } else if mark.exists() || has_another_name(&layers, &path)? {
            durable::unlink(&path)?;
            durable::unlink(&mark)?;
            durable::remove_dir(&dir)?;
        }
        Ok(())
    }
}

impl Store {
    /// Rows of bases of ours whose file is gone and that no header names.
    fn drop_rows_without_files(&self, change: &mut Change<'_>) -> Result<()> {
        let layers = self.scan_layers()?;
        let gone: Vec<String> = change
            .bases()?
            .into_iter()
            .filter(|row| {
                let Ok(path) = self.path_of_base(row) else {
                    return false;
                };
                let is_absent = || {
                    fs::symlink_metadata(&path)
                        .is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
                };
                row.is_ours()
                    && layers.at(&path).is_none()
                    && is_absent()
                    && path.parent() == Some(self.home.bases_dir().as_path())
                    && layers.damaged().is_none()
                    && layers.readers_of(&path).next().is_none()
            })
            .map(|row| row.id)
            .collect();
        if gone.is_empty() {
            return Ok(());
        }
        change.transaction(|rows| gone.iter().try_for_each(|id| rows.delete_base(id)))
    }
}

fn is_at(row_path: &str, path: &Path) -> bool {
    resolve(Path::new(row_path)).is_ok_and(|resolved| resolved == path)
}

fn has_another_name(layers: &Layers, path: &Path) -> Result<bool> {
    let id = FileId::at(path)?;
    Ok(layers.names_of(id).any(|name| name.path != path))
}
