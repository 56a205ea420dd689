//! `mv web api` and `mv web/snapshots/a web/snapshots/b`.

use std::path::Path;

use super::crash::crash_point;
use super::marks::UNRECORDED;
use super::names::refuse_bad_name;
use super::names::refuse_taken_name;
use super::{Store, durable};
use crate::Result;

impl Store {
    /// Gives a box another name.
    ///
    /// # Errors
    /// EEXIST when it is taken, EBUSY.
    pub fn rename_box(&self, box_id: &str, name: &str) -> Result<()> {
        let what = format!("rename of box {} to {name}", self.name_of(box_id));
        let result = self.give_name(box_id, name);
        self.events.log_outcome(&what, result)
    }

    /// One update of one row: nothing else has the name of a box.
    fn give_name(&self, box_id: &str, name: &str) -> Result<()> {
        let mut prepared = self.look_at_box(box_id)?;
        if prepared.record.name.as_deref() == Some(name) {
            return Ok(());
        }
        refuse_taken_name(&prepared.change, name)?;
        prepared
            .change
            .transaction(|rows| rows.rename_box(box_id, name))?;
        crash_point("rename-box.recorded");
        Ok(())
    }

    /// Gives a snapshot another name.
    ///
    /// # Errors
    /// EINVAL for a name BoxLite would refuse, EEXIST when it is taken, EBUSY, ENOENT.
    pub fn rename_snapshot(&self, box_id: &str, snapshot_id: &str, name: &str) -> Result<()> {
        let what = format!(
            "rename of snapshot {} of box {} to {name}",
            self.snapshot_name(box_id, snapshot_id)?,
            self.name_of(box_id)
        );
        let result = self.move_snapshot(box_id, snapshot_id, name);
        self.events.log_outcome(&what, result)
    }

    /// Order: adopt the layer if any chain names its path; a marked directory with a further name of
    /// it, moved into place; the old directory is marked, too; the row; the old name. A crash before
    /// the row leaves a marked directory without one, and after it the old directory likewise:
    /// recovery removes either, also if BoxLite removed the other meanwhile.
    fn move_snapshot(&self, box_id: &str, snapshot_id: &str, name: &str) -> Result<()> {
        refuse_bad_name(name)?;
        let mut prepared = self.prepare(box_id)?;
        let snapshot = prepared.snapshot(snapshot_id)?;
        if snapshot.name == name {
            return Ok(());
        }
        prepared.refuse_taken(name)?;
        let layer = prepared.unread_layer(&snapshot)?;
        crash_point("rename.adopted");
        let dir = self.marked_dir()?;
        // Its row may name another place than the one that is its own.
        durable::link(&self.snapshot_layer(&snapshot), &dir.join("disk.qcow2"))?;
        let path = prepared.snapshot_place(name, Some(&dir))?;
        crash_point("rename.linked");
        prepared.mark_unrecorded_snapshot(&layer)?;
        let recorded = prepared.change.transaction(|rows| {
            rows.rename_snapshot(box_id, snapshot_id, name, &path.display().to_string())
        });
        if let Err(error) = recorded {
            // Whatever the row says now, one of the two directories has none, and recovery sees which.
            let _ = prepared.recover();
            return Err(error);
        }
        crash_point("rename.recorded");
        durable::unlink(&path.with_file_name(UNRECORDED))?;
        durable::unlink(&layer)?;
        crash_point("rename.unlinked");
        self.remove_snapshot_dir(layer.parent());
        Ok(())
    }

    /// Removes the marked directory a snapshot was in. That something else lies in it takes nothing
    /// back.
    pub(super) fn remove_snapshot_dir(&self, dir: Option<&Path>) {
        if let Some(dir) = dir
            && let Err(error) =
                durable::unlink(&dir.join(UNRECORDED)).and_then(|()| durable::remove_dir(dir))
        {
            self.events
                .info(&format!("{error}; the rest is left there"));
        }
    }
}
