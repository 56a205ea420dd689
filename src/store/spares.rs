//! A further name of every layer of ours, below `.boxlitefs/layers/`. It takes no room, and goes only when we
//! free the layer. So what somebody else deletes in `bases/` (BoxLite's collection of orphans gone wrong, a
//! slip of `rm`) comes back with the next mount, the next change, or `boxlitefs check --repair`.
//!
//! A spare name is made when its layer is where it belongs, and is not flushed: without it, everything works.
//! That it never stands for another state than its base is what matters: it goes before a base becomes a live
//! disk, and is on disk before what the old file read from is freed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::crash::crash_point;
use super::layers::{Layers, Role, is_row_of};
use super::spare_names::Spare;
use super::{Store, durable};
use crate::disk::{FileId, Header};
use crate::home::{BaseRecord, Change};
use crate::{Context, Result};

/// Names made with the lock held once.
const AT_ONCE: usize = 256;

impl Store {
    /// Gives a base of ours its spare name, if it has not got it. What can't be done is done without.
    pub(super) fn keep_spare(&self, base: &Path) {
        if let Err(error) = self.renew_spare(base) {
            log::info!("{} has no spare name: {error}", base.display());
        }
    }

    /// Has the spare name of a base be one of the file that the base is now.
    ///
    /// # Errors
    /// Those of the system calls.
    pub(super) fn renew_spare(&self, base: &Path) -> Result<()> {
        let Some(spare) = self.spare_of(base) else {
            return Ok(());
        };
        let id = FileId::at(base)?;
        let is_there = match FileId::at(&spare) {
            Ok(found) if found == id => return Ok(()),
            Ok(_) => true,
            Err(_) => false,
        };
        self.make_spares_dir()?;
        let message = || format!("cannot link {} to {}", base.display(), spare.display());
        if !is_there {
            return fs::hard_link(base, &spare).context(message);
        }
        let link = self.scratch("spare")?;
        fs::hard_link(base, &*link).context(message)?;
        fs::rename(&*link, &spare).context(message)
    }

    fn make_spares_dir(&self) -> Result<()> {
        let dir = self.spares_dir();
        if fs::symlink_metadata(&dir).is_ok() {
            return Ok(());
        }
        self.home.make_staging_dir()?;
        self.home.make_dir(&dir)
    }

    /// Has the spare name of a base whose file is another now follow it, on disk when this returns: what the
    /// old file read from is about to go.
    ///
    /// # Errors
    /// Those of the system calls.
    pub(super) fn move_spare(&self, base: &Path) -> Result<()> {
        let Some(spare) = self.spare_of(base) else {
            return Ok(());
        };
        if self.renew_spare(base).is_err() {
            durable::unlink(&spare)?;
        }
        match self.spares_dir() {
            dir if dir.is_dir() => durable::sync_dir(&dir),
            _ => Ok(()),
        }
    }

    /// Takes the spare name from a base that is about to become a live disk; on disk when this returns.
    ///
    /// # Errors
    /// Those of the system calls.
    pub(super) fn drop_spare(&self, base: &Path) -> Result<()> {
        self.spare_of(base)
            .map_or(Ok(()), |spare| durable::unlink(&spare))
    }

    /// Removes the spare name of a base that is freed. It need not be flushed: if a power loss brings
    /// the name back, no header refers to it.
    pub(super) fn free_spare(&self, base: &Path) {
        if let Some(spare) = self.spare_of(base)
            && let Err(error) = fs::remove_file(&spare)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", spare.display());
        }
    }

    /// Gives spare names to all bases of ours that have none: those of an older version.
    ///
    /// # Errors
    /// EBUSY when a runtime has the lock, what SQLite says.
    pub(super) fn keep_spares(&self) -> Result<()> {
        let spares = self.scan_spares()?;
        let lacks = |row: &BaseRecord| {
            let path = self.path_of_base(row).ok()?;
            let is_ours = row.is_ours() && path.extension().is_some_and(|it| it == "qcow2");
            (is_ours && spares.of_base(&path).is_none() && path.is_file()).then_some(path)
        };
        let lacking: Vec<PathBuf> = self.home.bases()?.iter().filter_map(lacks).collect();
        for some in lacking.chunks(AT_ONCE) {
            let _change = self.home.change()?;
            let layers = self.scan_layers()?;
            for base in some {
                if layers
                    .at(base)
                    .is_some_and(|file| !is_live(&layers, file.id))
                {
                    self.keep_spare(base);
                }
            }
        }
        Ok(())
    }

    /// Puts bases back that are gone from `bases/` and have a name left elsewhere: those that any header names, and
    /// all of ours. Returns how many.
    ///
    /// Order: rows for those that have none, then the names, flushed. A crash leaves rows of ours without
    /// files, which headers name, and the next time does the rest.
    ///
    /// # Errors
    /// Those of the system calls and of SQLite.
    pub(super) fn put_back_bases(&self, change: &mut Change<'_>, layers: &Layers) -> Result<usize> {
        let rows = change.bases()?;
        let gone = self.gone_with_a_name(change, layers, &rows)?;
        if gone.is_empty() {
            return Ok(0);
        }
        let mut new = Vec::new();
        for (base, file) in &gone {
            if !rows.iter().any(|row| is_row_of(row, base)) {
                new.push(self.new_base(base, file)?);
            }
        }
        change.transaction(|rows| new.iter().try_for_each(|base| rows.insert_base(base)))?;
        crash_point("put-back.recorded");
        let dir = self.home.bases_dir();
        if !dir.is_dir() {
            self.home.make_dir(&dir)?;
            durable::sync_parent(&dir)?;
        }
        for (base, file) in &gone {
            fs::hard_link(file, base)
                .context(|| format!("cannot link {} to {}", file.display(), base.display()))?;
            crash_point("put-back.linked");
        }
        durable::sync_dir(&dir)?;
        // Their headers were not looked at.
        self.paths_are_right.store(false, Ordering::Release);
        for (base, _) in &gone {
            self.keep_spare(base);
        }
        let names: Vec<String> = gone.iter().map(|(base, _)| name_of(base)).collect();
        self.events.warn(&format!(
            "{} layers had been deleted from {} and are back: {}",
            gone.len(),
            dir.display(),
            names.join(", ")
        ));
        Ok(gone.len())
    }

    /// Bases that are gone, each with a name that its file has left.
    pub(super) fn gone_with_a_name(
        &self,
        change: &Change<'_>,
        layers: &Layers,
        rows: &[BaseRecord],
    ) -> Result<Vec<(PathBuf, PathBuf)>> {
        let wanted = self.gone(layers, rows);
        let spares = layers.spares();
        let mut found = Vec::new();
        let mut without = Vec::new();
        for base in wanted {
            match spares.of_base(&base) {
                Some(spare) if !is_live(layers, spare.id) => {
                    found.push((base, spare.path.clone()));
                }
                Some(_) => {}
                None => without.push(base),
            }
        }
        if !without.is_empty() {
            found.extend(self.snapshots_of_gone(change, layers, rows, &without)?);
        }
        Ok(found)
    }

    /// Bases that a header names, or a row of ours, and that have no file.
    fn gone(&self, layers: &Layers, rows: &[BaseRecord]) -> BTreeSet<PathBuf> {
        let dir = self.home.bases_dir();
        let named = layers.named().map(Path::to_owned);
        let ours = rows.iter().filter(|row| row.is_ours());
        let ours = ours.filter_map(|row| self.path_of_base(row).ok());
        named
            .chain(ours)
            .filter(|path| {
                path.parent() == Some(dir.as_path())
                    && path.extension().is_some_and(|it| it == "qcow2")
                    && fs::symlink_metadata(path)
                        .is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
            })
            .collect()
    }

    /// For bases of an older version, which had no spare names: the snapshots that were made with them. Only
    /// where nothing else can be meant: the rows were made at the same moment, and say the same of the file,
    /// of one file and one base alone.
    fn snapshots_of_gone(
        &self,
        change: &Change<'_>,
        layers: &Layers,
        rows: &[BaseRecord],
        gone: &[PathBuf],
    ) -> Result<Vec<(PathBuf, PathBuf)>> {
        /// Seconds between the row of a base and that of its snapshot.
        const STEP: std::ops::RangeInclusive<i64> = 0..=1;
        let snapshots = change.snapshots()?;
        let mut matches: Vec<(PathBuf, PathBuf, FileId)> = Vec::new();
        for base in gone {
            let row = rows
                .iter()
                .find(|row| row.is_ours() && is_row_of(row, base));
            let Some(made) = row.and_then(BaseRecord::file) else {
                continue;
            };
            for snapshot in &snapshots {
                let path = self.snapshot_layer(snapshot);
                let Some(file) = layers.at(&path) else {
                    continue;
                };
                let has_base = layers
                    .names_of(file.id)
                    .any(|name| !matches!(name.role, Role::Snapshot { .. }));
                let is_same = STEP.contains(&(snapshot.created_at - made.created_at))
                    && file.stamp.0 == made.size_bytes
                    && Header::open(&path)
                        .is_ok_and(|it| it.is_some_and(|it| it.virtual_size == made.virtual_size));
                let is_new = !matches
                    .iter()
                    .any(|(of, _, id)| of == base && *id == file.id);
                if is_same && is_new && !has_base && file.backing.as_ref() != Some(base) {
                    matches.push((base.clone(), path, file.id));
                }
            }
        }
        let is_alone = |base: &Path, id: FileId| {
            let is_other = |(of, _, it): &&(PathBuf, PathBuf, FileId)| of == base || *it == id;
            matches.iter().filter(is_other).count() == 1
        };
        let alone = matches.iter().filter(|(base, _, id)| is_alone(base, *id));
        Ok(alone
            .map(|(base, path, _)| (base.clone(), path.clone()))
            .collect())
    }

    /// Removes spare names that stand for nothing any more, and has those follow whose base is another file by
    /// now. Nothing is removed while it can't be told what is needed.
    ///
    /// # Errors
    /// Those of the system calls.
    pub(super) fn tidy_spares(&self, change: &Change<'_>) -> Result<()> {
        let is_right = |spare: &Spare| FileId::at(&spare.base).is_ok_and(|id| id == spare.id);
        if self.scan_spares()?.all().iter().all(is_right) {
            return Ok(());
        }
        let layers = self.scan_layers()?;
        let spares = layers.spares();
        let is_known = self.named_by_rows(change, &layers)?.is_some();
        for spare in spares.all() {
            match layers.at(&spare.base) {
                Some(base) if base.id == spare.id => {}
                Some(base) if !is_live(&layers, base.id) => self.keep_spare(&spare.base),
                Some(_) => {}
                None if is_live(&layers, spare.id) => durable::unlink(&spare.path)?,
                None if is_known && layers.readers_of(&spare.base).next().is_none() => {
                    durable::unlink(&spare.path)?;
                }
                None => {}
            }
        }
        Ok(())
    }
}

/// Whether a file is a live disk, which is written to and stands for no layer.
fn is_live(layers: &Layers, id: FileId) -> bool {
    layers
        .names_of(id)
        .any(|name| matches!(name.role, Role::Live { .. }))
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
