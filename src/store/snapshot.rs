//! `mkdir web/snapshots/NAME`.

use std::fs::{self, File};
use std::path::Path;

use super::crash::crash_point;
use super::durable;
use super::freeze::{Frozen, FrozenDisk};
use super::marks::UNRECORDED;
use super::names::refuse_bad_name;
use super::prepare::{Prepared, now};
use super::{Store, display_name};
use crate::home::{NewSnapshot, snapshot_id};
use crate::{Context, Error, Result};

impl Store {
    /// Takes a snapshot of a box's live disk and returns its id.
    ///
    /// # Errors
    /// EINVAL for a name BoxLite would refuse, EEXIST, EBUSY, ENODATA for a box without a disk.
    pub fn snapshot(&self, box_id: &str, name: &str) -> Result<String> {
        let result = self.take_snapshot(box_id, name);
        self.events.log_outcome(
            &format!("snapshot {name} of box {}", self.name_of(box_id)),
            result,
        )
    }

    fn take_snapshot(&self, box_id: &str, name: &str) -> Result<String> {
        refuse_bad_name(name)?;
        let draft = self.draft_freeze(box_id)?;
        let mut prepared = self.prepare_beside(box_id)?;
        prepared.refuse_taken(name)?;
        let frozen = prepared.freeze(&draft)?;
        prepared.name_layer(&frozen, &snapshot_id()?, name, None)
    }

    /// How a box is called in the log.
    pub(crate) fn name_of(&self, box_id: &str) -> String {
        self.home
            .catalog()
            .ok()
            .and_then(|catalog| {
                catalog
                    .box_by_id(box_id)
                    .map(|record| display_name(record).to_owned())
            })
            .unwrap_or_else(|| box_id.to_owned())
    }
}

impl Prepared<'_> {
    /// EEXIST when the box has a snapshot of that name, or a directory that would be in its way.
    pub(super) fn refuse_taken(&self, name: &str) -> Result<()> {
        if self
            .snapshots()?
            .iter()
            .any(|snapshot| snapshot.name == name)
        {
            return Err(Error::new(
                libc::EEXIST,
                format!(
                    "box {} has a snapshot {name} already",
                    display_name(&self.record)
                ),
            ));
        }
        let dir = self.store.home.snapshots_dir(&self.record.id).join(name);
        if dir.exists() {
            return Err(Error::new(
                libc::EEXIST,
                format!(
                    "{} is there without a snapshot of that name; look at it with boxlitefs check",
                    dir.display()
                ),
            ));
        }
        Ok(())
    }

    /// Makes a snapshot of a frozen state and returns its id. Without `created_at` it is of now.
    ///
    /// Order: the directory, the layer's further name in it, the row. A crash before the row leaves
    /// a directory without one, whose layer has another name: recovery unlinks it. Beside a runtime nobody
    /// does later: then it goes at once.
    pub(super) fn name_layer(
        &mut self,
        frozen: &FrozenDisk,
        id: &str,
        name: &str,
        created_at: Option<i64>,
    ) -> Result<String> {
        // By its mark recovery knows a directory whose name no snapshot has.
        let is_beside = self.change.is_shared();
        let marked = is_beside.then(|| self.store.marked_dir()).transpose()?;
        self.change.begin_exclusive()?;
        let path = self.snapshot_place(&self.place_of(name, id), marked.as_deref())?;
        crash_point("snapshot.directory");
        let named = match &frozen.layer {
            Frozen::Base { path: base } => durable::link(base, &path),
            // An empty overlay on an image: the snapshot is a copy of it, a few clusters long.
            Frozen::Below { .. } => self.copy_empty_overlay(frozen, &path),
        };
        crash_point("snapshot.linked");
        let recorded = named
            .and_then(|()| self.record_snapshot(id, name, &path, frozen.virtual_size, created_at));
        self.settle_place(&path, recorded)
    }

    /// Takes the mark, if there is one, from the directory of a snapshot that was recorded. Beside a runtime
    /// the directory goes if it was not.
    pub(super) fn settle_place<T>(&self, path: &Path, recorded: Result<T>) -> Result<T> {
        match &recorded {
            Ok(_) => durable::unlink(&path.with_file_name(UNRECORDED))?,
            Err(_) if self.change.is_shared() => self.take_place_back(path),
            Err(_) => {}
        }
        recorded
    }

    /// Removes the directory of a snapshot that was not recorded. What can't be removed is for recovery.
    fn take_place_back(&self, path: &Path) {
        let mark = path.with_file_name(UNRECORDED);
        let removed = durable::unlink(path).and_then(|()| durable::unlink(&mark));
        if let Err(error) = removed.and_then(|()| path.parent().map_or(Ok(()), durable::remove_dir))
        {
            self.store.events.info(&error.to_string());
        }
    }

    /// The name of a snapshot's directory. Beside a runtime one that BoxLite, asked for a snapshot of the same
    /// name at that moment, does not use: it puts the live disk there, over this one, or where this one
    /// would be taken back from.
    pub(super) fn place_of(&self, name: &str, id: &str) -> String {
        match self.change.is_shared() {
            true => format!(".{id}"),
            false => name.to_owned(),
        }
    }

    /// `snapshots/PLACE/disk.qcow2`, its directories made; `ready` is a directory to be moved there.
    pub(super) fn snapshot_place(
        &self,
        place: &str,
        ready: Option<&Path>,
    ) -> Result<std::path::PathBuf> {
        let home = &self.store.home;
        let snapshots = home.snapshots_dir(&self.record.id);
        if !snapshots.is_dir() {
            home.make_dir(&snapshots)?;
        }
        // Also where it is there: who made it may not have come to flush that, or it failed.
        durable::sync_dir(&home.box_dir(&self.record.id))?;
        let dir = snapshots.join(place);
        match ready {
            Some(ready) => durable::rename(ready, &dir)?,
            None => {
                home.make_dir(&dir)?;
                durable::sync_dir(&snapshots)?;
            }
        }
        Ok(home.snapshot_disk(&self.record.id, place))
    }

    fn copy_empty_overlay(&self, frozen: &FrozenDisk, path: &Path) -> Result<()> {
        let copy = self.store.scratch("overlay")?;
        let message = || format!("cannot copy {}", frozen.top.display());
        let mode = frozen.file.metadata().context(message)?.permissions();
        let mut out = File::create_new(&*copy).context(message)?;
        std::io::copy(&mut &*frozen.file, &mut out).context(message)?;
        out.set_permissions(mode).context(message)?;
        self.store.home.give_to_owner(&copy)?;
        durable::copy_times(&frozen.top, &copy)?;
        durable::sync_file(&copy)?;
        durable::rename(&copy, path)
    }

    /// The time of a snapshot that is made now: later than those of all that the box has, though
    /// there be several in a second. Both BoxLite and tools that go by times see which one is the
    /// newest.
    fn next_time(&self) -> Result<i64> {
        let newest = self.snapshots()?.iter().map(|it| it.shown_at).max();
        Ok(newest.map_or(now(), |newest| now().max(newest.saturating_add(1))))
    }

    /// The row of a snapshot whose layer is in place.
    pub(super) fn record_snapshot(
        &mut self,
        id: &str,
        name: &str,
        path: &Path,
        virtual_size: u64,
        created_at: Option<i64>,
    ) -> Result<String> {
        let created_at = match created_at {
            Some(created_at) => created_at,
            None => self.next_time()?,
        };
        let meta = fs::metadata(path).context(|| format!("cannot look at {}", path.display()))?;
        let row = NewSnapshot {
            id: id.to_owned(),
            box_id: self.record.id.clone(),
            name: name.to_owned(),
            path: path.display().to_string(),
            virtual_size,
            file_size: meta.len(),
            created_at,
        };
        self.change.transaction(|rows| rows.insert_snapshot(&row))?;
        crash_point("snapshot.recorded");
        Ok(row.id)
    }
}
