//! `cp b.boxlite MNT/NEW.boxlite`: a box, or a snapshot of one, from an archive that arrived.

use std::path::Path;

use serde_json::Value;

use super::crash::crash_point;
use super::layers::resolve;
use super::marks::write_mark;
use super::names::refuse_bad_name;
use super::names::refuse_taken_name;
use super::workspace::{Scratch, discard};
use super::{Arrival, Contents, NewClone, NewSnapshotName, Source, Store, durable};
use crate::disk::{FileId, Format, Header, Layer};
use crate::{Context, Error, Result};

/// What a snapshot is made of that is copied in.
pub enum SnapshotContents<'a> {
    /// A complete archive.
    Archive(&'a Arrival),
    /// A disk state of this home, and what its export was read as.
    Shared(&'a Source, &'a Contents),
}

impl Store {
    /// Makes a box of a complete archive.
    ///
    /// # Errors
    /// EBADMSG when it is not complete or BoxLite could not read its options, EPERM when those are not
    /// allowed here, EEXIST when the name is taken, EBUSY.
    pub fn import_box(&self, arrival: &Arrival, new: &NewClone) -> Result<()> {
        let result = self.make_imported(arrival, new);
        self.events
            .log_outcome(&format!("import of box {}", new.name), result)
    }

    /// Order: the directory is built in the workspace, where the disk was unpacked and checked;
    /// then as for a clone.
    fn make_imported(&self, arrival: &Arrival, new: &NewClone) -> Result<()> {
        self.refuse_read_only()?;
        if !arrival.is_complete() {
            return Err(Error::bad_archive("the archive is incomplete"));
        }
        self.import_disk(arrival.disk(), arrival.box_options()?, new)
    }

    /// Makes a box of a disk in the workspace, which it no longer needs there.
    ///
    /// # Errors
    /// EEXIST when the name is taken, EBUSY.
    pub(super) fn import_disk(&self, disk: &Path, options: Value, new: &NewClone) -> Result<()> {
        let dir = self.scratch("box")?;
        self.home.make_dir(&dir)?;
        self.home.make_dir(&dir.join("disks"))?;
        self.home.give_to_owner(disk)?;
        let mut change = self.change_beside()?;
        refuse_taken_name(&change, &new.name)?;
        give_disk(disk, &dir.join("disks/disk.qcow2"))?;
        crash_point("import.built");
        self.install(&mut change, &dir, new, None, Some(options), &[])?;
        discard(disk);
        Ok(())
    }

    /// Gives a snapshot that came back from a backup the time it was taken at.
    ///
    /// # Errors
    /// EBUSY, or what the database says.
    pub fn date_snapshot(&self, box_id: &str, id: &str, created_at: i64) -> Result<()> {
        self.change_beside()?
            .transaction(|rows| rows.date_snapshot(box_id, id, created_at))
    }

    /// Whether a snapshot is what the box's disk is: the layer that it reads from, and nothing over it.
    ///
    /// # Errors
    /// ENOENT when the snapshot is gone, EIO.
    pub fn is_live(&self, box_id: &str, snapshot_id: &str) -> Result<bool> {
        let snapshot = Source::Snapshot {
            box_id: box_id.to_owned(),
            snapshot_id: snapshot_id.to_owned(),
        };
        let layer = FileId::at(&self.top_of(&snapshot)?)?;
        let live = self.home.live_disk(box_id);
        let Some(backing) = Header::open(&live)?.and_then(|header| header.backing_path(&live))
        else {
            return Ok(false);
        };
        Ok(FileId::at(&resolve(&backing)?)? == layer
            && !Layer::open(&live, Format::Qcow2)?.holds_data()?)
    }

    /// Puts a snapshot that is copied in the place of one that is what the box's disk is. The archive
    /// is complete by then, so that only the file system can fail; then the snapshot is gone, and
    /// its contents are those of the disk.
    ///
    /// # Errors
    /// EPERM when the disk changed meanwhile, and those of removing and importing a snapshot.
    pub fn replace_snapshot(
        &self,
        box_id: &str,
        snapshot_id: &str,
        with: &SnapshotContents,
        new: &NewSnapshotName,
    ) -> Result<()> {
        if !self.is_live(box_id, snapshot_id)? {
            return Err(Error::new(
                libc::EPERM,
                format!(
                    "the box changed since snapshot {} was taken, so the snapshot stays; copy to another name",
                    new.name
                ),
            ));
        }
        self.remove_snapshot(box_id, snapshot_id)?;
        match with {
            SnapshotContents::Archive(arrival) => self.import_snapshot(arrival, box_id, new),
            SnapshotContents::Shared(source, read) => {
                self.share_snapshot(source, read, box_id, new)
            }
        }
    }

    /// Makes a snapshot of a box of a complete archive: how the snapshots of a
    /// whole box's backup come back.
    ///
    /// # Errors
    /// EBADMSG, EINVAL, EEXIST, EBUSY.
    pub fn import_snapshot(
        &self,
        arrival: &Arrival,
        box_id: &str,
        new: &NewSnapshotName,
    ) -> Result<()> {
        let name = &new.name;
        let result = self.make_imported_snapshot(arrival, box_id, new);
        self.events.log_outcome(
            &format!("import of snapshot {name} of box {}", self.name_of(box_id)),
            result,
        )
    }

    /// Order: the directory is built in the workspace with a mark in it and moved into place, then
    /// the row, then the mark goes. A crash before the row leaves a marked directory without one:
    /// recovery removes it.
    fn make_imported_snapshot(
        &self,
        arrival: &Arrival,
        box_id: &str,
        new: &NewSnapshotName,
    ) -> Result<()> {
        let name = &new.name;
        refuse_bad_name(name)?;
        if !arrival.is_complete() {
            return Err(Error::bad_archive("the archive is incomplete"));
        }
        self.home.give_to_owner(arrival.disk())?;
        let mut prepared = self.prepare_beside(box_id)?;
        prepared.refuse_taken(name)?;
        let dir = self.marked_dir()?;
        give_disk(arrival.disk(), &dir.join("disk.qcow2"))?;
        durable::sync_dir(&dir)?;
        prepared.change.begin_exclusive()?;
        let place = prepared.place_of(name, &new.id);
        let path = prepared.snapshot_place(&place, Some(&dir))?;
        crash_point("import.snapshot");
        let recorded =
            prepared.record_snapshot(&new.id, name, &path, arrival.virtual_size(), new.created_at);
        prepared.settle_place(&path, recorded)?;
        discard(arrival.disk());
        Ok(())
    }

    /// A directory in the workspace for a snapshot whose row is still to come.
    pub(super) fn marked_dir(&self) -> Result<Scratch> {
        let dir = self.scratch("snapshot")?;
        self.home.make_dir(&dir)?;
        write_mark(&dir)?;
        Ok(dir)
    }
}

/// Puts the disk of an archive into a directory that is being built, as a hard link: if a later step fails,
/// the archive still has its disk. On a file system without hard links it is moved.
fn give_disk(disk: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(disk, to)
        .or_else(|_| std::fs::rename(disk, to))
        .context(|| format!("cannot move the disk to {}", to.display()))
}
