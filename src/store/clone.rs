//! `cp -r web web2`: a new box that starts from a state of another, copy-on-write.

use std::path::Path;

use super::crash::crash_point;
use super::freeze::{Draft, FrozenDisk};
use super::marks::{UNRECORDED, mark_unrecorded};
use super::names::{refuse_bad_name, refuse_taken_name};
use super::prepare::{Prepared, now};
use super::workspace::Scratch;
use super::{Contents, Source, Store, durable};
use crate::Result;
use crate::disk;
use crate::home::{BoxRecord, Change, NewBox, container_id, normalize_imported};

/// A box about to be made.
#[derive(Clone, Debug)]
pub struct NewClone {
    /// The id it gets, chosen by the caller ([`crate::home::box_id`]).
    pub id: String,
    /// The name it gets.
    pub name: String,
}

/// A snapshot about to be made of something that was copied.
#[derive(Clone, Debug)]
pub struct NewSnapshotName {
    /// The id it gets, chosen by the caller ([`crate::home::snapshot_id`]).
    pub id: String,
    /// The name it gets.
    pub name: String,
    /// Seconds since 1970; None for now.
    pub created_at: Option<i64>,
}

impl Store {
    /// Makes a box that starts from `source`: no data moves, whatever its size. `read` is what was read
    /// of the source.
    ///
    /// # Errors
    /// EEXIST when the name is taken, EBUSY, ENODATA, ENOENT, EIO when the source is not as it was read.
    pub fn clone_box(&self, source: &Source, read: &Contents, new: &NewClone) -> Result<()> {
        let what = format!("clone {} of {}", new.name, self.describe(source));
        let result = self.make_clone(source, read, new);
        self.events.log_outcome(&what, result)
    }

    /// A source in a message.
    pub(crate) fn describe(&self, source: &Source) -> String {
        let name = self.name_of(source.box_id());
        match source {
            Source::Live { .. } => format!("box {name}"),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => {
                let catalog = self.home.catalog().ok();
                let snapshot = catalog
                    .as_ref()
                    .and_then(|catalog| catalog.snapshot_by_id(box_id, snapshot_id))
                    .map_or(snapshot_id.as_str(), |snapshot| snapshot.name.as_str());
                format!("snapshot {snapshot} of box {name}")
            }
        }
    }

    /// Order: freeze the source (or adopt the snapshot's layer), build the box in the workspace,
    /// move its directory into `boxes/`, then everything of it in one transaction. A crash before
    /// the transaction leaves a directory without a row, which is removed (BoxLite's own start
    /// removes it too). The row first would leave a box without a disk.
    fn make_clone(&self, source: &Source, read: &Contents, new: &NewClone) -> Result<()> {
        let draft = self.draft_of(source, read, &|| self.draft_clone(source))?;
        let mut prepared = self.prepare_source(source.box_id())?;
        self.refuse_changed(source, read)?;
        refuse_taken_name(&prepared.change, &new.name)?;
        let frozen = prepared.frozen(source, &draft)?;
        crash_point("clone.frozen");
        let dir = prepared.build(&frozen)?;
        crash_point("clone.built");
        let record = prepared.record.clone();
        let bases = prepared.bases_reached(&dir.join("disks/disk.qcow2"))?;
        self.install(&mut prepared.change, &dir, new, Some(&record), None, &bases)
    }

    /// Moves a finished directory into `boxes/` and records the box.
    pub(super) fn install(
        &self,
        change: &mut Change<'_>,
        dir: &Path,
        new: &NewClone,
        source: Option<&BoxRecord>,
        options: Option<serde_json::Value>,
        bases: &[String],
    ) -> Result<()> {
        let created_at = now();
        let config = source.map(BoxRecord::config).transpose()?;
        let options = match (options, &config) {
            (Some(options), _) => options,
            (None, Some(config)) => normalize_imported(config["options"].clone(), None),
            (None, None) => normalize_imported(serde_json::Value::Null, None),
        };
        let target = self.home.box_dir(&new.id);
        let row = NewBox {
            id: new.id.clone(),
            name: new.name.clone(),
            container_id: container_id()?,
            box_home: target.display().to_string(),
            created_at,
            options,
            config_of_source: config,
            state_of_source: source.map(BoxRecord::state).transpose()?,
            lock_id: change.new_lock_id()?,
        };
        let take_back = || {
            // Nothing else is there: its id is new.
            let _ = std::fs::remove_dir_all(&target);
            let _ = std::fs::remove_file(self.home.box_lock(row.lock_id));
        };
        change.begin_exclusive()?;
        place(dir, &target).inspect_err(|_| take_back())?;
        crash_point("install.renamed");
        let recorded = change.transaction(|rows| {
            rows.insert_box(&row)?;
            bases
                .iter()
                .try_for_each(|base| rows.insert_ref(base, &new.id))
        });
        // A runtime that began before the row was there removes the directory.
        let recorded = recorded.and_then(|()| {
            change.refuse_other_runtime().inspect_err(|_| {
                // What it says does not count: the box is looked for below.
                let _ = change.transaction(|rows| rows.delete_box(&new.id));
            })
        });
        if let Err(error) = recorded {
            // A commit that reports an error can be durable all the same. Where the row is there, or
            // can't be looked for, the directory stays, and its mark for recovery.
            if change
                .box_by_id(&new.id)
                .is_err_and(|e| e.errno() == libc::ENOENT)
            {
                take_back();
            }
            return Err(error);
        }
        crash_point("install.recorded");
        durable::unlink(&target.join(UNRECORDED))
    }

    /// Makes a state of one box a snapshot of another, which shares its layer: how the snapshots of
    /// a cloned box come along. `read` is what was read of the source.
    ///
    /// # Errors
    /// EINVAL, EEXIST, EBUSY, ENOENT, EIO when the source is not as it was read.
    pub fn share_snapshot(
        &self,
        source: &Source,
        read: &Contents,
        box_id: &str,
        new: &NewSnapshotName,
    ) -> Result<()> {
        let name = &new.name;
        let what = format!(
            "snapshot {name} of box {} from {}",
            self.name_of(box_id),
            self.describe(source)
        );
        let result = self.make_shared(source, read, box_id, new);
        self.events.log_outcome(&what, result)
    }

    /// Order: the source as for a clone; references of the new reader; then as a snapshot.
    /// Surplus references, which a crash leaves, are harmless.
    fn make_shared(
        &self,
        source: &Source,
        read: &Contents,
        box_id: &str,
        new: &NewSnapshotName,
    ) -> Result<()> {
        let name = &new.name;
        refuse_bad_name(name)?;
        let draft = self.draft_of(source, read, &|| self.draft_share(source))?;
        let mut prepared = self.prepare_source(source.box_id())?;
        self.refuse_changed(source, read)?;
        let frozen = prepared.frozen(source, &draft)?;
        prepared.turn_to_add(box_id)?;
        prepared.refuse_taken(name)?;
        let bases = prepared.bases_reached(frozen.backing().0)?;
        prepared.change.transaction(|rows| {
            bases
                .iter()
                .try_for_each(|base| rows.insert_ref(base, box_id))
        })?;
        crash_point("share.referred");
        prepared.name_layer(&frozen, &new.id, name, new.created_at)?;
        Ok(())
    }
}

/// Marks a box's directory as one without a row and moves it to its place.
fn place(dir: &Path, target: &Path) -> Result<()> {
    durable::sync_dir(&dir.join("disks"))?;
    mark_unrecorded(dir)?;
    durable::rename(dir, target)
}

impl Prepared<'_> {
    /// The source as something an overlay can start from.
    pub(super) fn frozen(&mut self, source: &Source, draft: &Draft) -> Result<FrozenDisk> {
        if let Some(state) = &draft.running {
            return self.freeze_running(state);
        }
        // Of a snapshot it is no matter whether the box runs; its live disk is left alone then.
        if let Source::Live { .. } = source {
            self.store.refuse_active(&self.record)?;
        }
        let layer = match source {
            Source::Live { box_id } => self.store.home.live_disk(box_id),
            Source::Snapshot { snapshot_id, .. } => {
                self.store.snapshot_layer(&self.snapshot(snapshot_id)?)
            }
        };
        if let Some(flat) = self.frozen_flat(draft, &layer)? {
            return Ok(flat);
        }
        match source {
            Source::Live { .. } => self.freeze(draft),
            Source::Snapshot { .. } => self.frozen_snapshot(&layer),
        }
    }

    /// A box's directory in the workspace whose disk is an empty overlay on the frozen state.
    fn build(&self, frozen: &FrozenDisk) -> Result<Scratch> {
        let home = &self.store.home;
        let dir = self.store.scratch("box")?;
        home.make_dir(&dir)?;
        home.make_dir(&dir.join("disks"))?;
        let overlay = dir.join("disks/disk.qcow2");
        self.make_overlay(frozen, &overlay)?;
        Ok(dir)
    }

    /// An empty overlay on the frozen state, with the time of that.
    pub(super) fn make_overlay(&self, frozen: &FrozenDisk, overlay: &Path) -> Result<()> {
        let (backing, format) = frozen.backing();
        disk::create_overlay(overlay, backing, format, frozen.virtual_size)?;
        self.store.home.give_to_owner(overlay)?;
        durable::copy_times(&frozen.top, overlay)?;
        durable::sync_file(overlay)
    }
}
