//! Makes a box, a snapshot, or the new disk of one, of what was written.

use std::sync::Arc;

use parking_lot::MutexGuard;
use serde_json::Value;

use crate::exports::Source;
use crate::home::snapshot_id;
use crate::store::{self, NewBoxIdentity, NewSnapshotIdentity, Store};
use crate::tree::nodes::box_json;
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::names::{
    BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS, archive_stem, decode, is_nameless_archive,
};
use crate::tree::nodes::node::Node;
use crate::tree::nodes::refusal::refuse_copied_box;
use crate::tree::staging::box_edit::BoxEdits;
use crate::tree::staging::caller_history::CallerHistory;
use crate::tree::staging::nameless::name_in_archive;
use crate::tree::staging::role::FileRole;
use crate::tree::staging::staged_boxes::directory_is_gone;
use crate::tree::staging::staged_file::{Stage, StagedContent, StagedFile, StagedState};
use crate::tree::staging::staging_area::StagingArea;
use crate::tree::staging::waiting_archives::WaitingArchives;
use crate::{Error, Result};

/// Commits what was written.
pub struct Committer {
    store: Arc<Store>,
    boxes: Arc<Boxes>,
    staging: Arc<StagingArea>,
    history: Arc<CallerHistory>,
    edits: Arc<BoxEdits>,
    waiting: WaitingArchives,
}

impl Committer {
    /// Returns one for what is in a staging area.
    pub fn new(
        store: Arc<Store>,
        boxes: Arc<Boxes>,
        staging: Arc<StagingArea>,
        history: Arc<CallerHistory>,
        edits: Arc<BoxEdits>,
    ) -> Committer {
        Committer {
            waiting: WaitingArchives::new(store.clone(), staging.clone()),
            store,
            boxes,
            staging,
            history,
            edits,
        }
    }

    /// Returns the part that keeps archives that wait.
    pub fn waiting(&self) -> &WaitingArchives {
        &self.waiting
    }

    /// Makes a file what its name says, if its data is complete. Called when a descriptor is closed
    /// and when the file gets another name, whichever is last.
    ///
    /// # Errors
    /// The refusal that the file got before, EBADMSG for an incomplete archive, and those of the
    /// change that its name stands for.
    pub fn commit_if_ready(&self, file: &Arc<StagedFile>) -> Result<()> {
        let mut state = file.state();
        if file.is_committed() {
            return Ok(());
        }
        if let Err(error) = state.refused() {
            // Its name goes with this close: the kernel reports the last close later.
            drop(state);
            self.staging.drop_file(file, !file.is_edit());
            return Err(error);
        }
        if file.is_edit() {
            return self.commit_edit(file, state);
        }
        let role = state.role();
        if role == FileRole::Json {
            // This decides nothing: a FLUSH comes for every copy of a descriptor that is closed.
            state.refuse_partial_text()?;
            if !self.staging.boxes.is_unfinished(&file.box_id) {
                self.edits.describe(file, &state, true)?;
            }
            drop(state);
            self.date_snapshot(file);
            return Ok(());
        }
        if role == FileRole::Placeholder || !state.finish(file.size())? {
            return Ok(());
        }
        let result = match role {
            FileRole::BoxDisk if file.is_over_export() => self.commit_restore(file, &state),
            FileRole::NewBox | FileRole::BoxDisk => self.commit_box(file, &state),
            FileRole::SnapshotDisk if file.is_over_export() => self.replace_snapshot(file, &state),
            FileRole::SnapshotDisk if self.staging.boxes.is_unfinished(&file.box_id) => {
                return self.waiting.accept(file, &mut state);
            }
            FileRole::SnapshotDisk => self.commit_snapshot(file, &state),
            FileRole::TemporaryArchive => return self.waiting.accept(file, &mut state),
            FileRole::Json | FileRole::Placeholder => return Ok(()),
        };
        if let Err(error) = result {
            // An earlier close succeeded for a file that waits, so it is kept.
            if !file.is_waiting() && !self.waits_after(file, &mut state, &error) {
                // The store has logged it.
                state.refuse(&error);
                self.fail_box(file);
                if state.open == 0 {
                    // Refused at its rename: no closing will come to let go of it.
                    state.content = StagedContent::Nothing;
                    drop(state);
                    self.staging.drop_file(file, true);
                }
            }
            return Err(error);
        }
        if file.is_over_export() {
            // Before the export is seen in place of the file: the writer may have removed the
            // export.
            let directory = Node::Box(file.box_id.clone());
            self.history.bring_back(&file.box_id, &directory, EXPORT);
        }
        file.set_stage(&mut state, Stage::Committed);
        state.operation = None;
        // Its data is used up; the disk was moved into the box.
        state.content = StagedContent::Nothing;
        // Before another close of the same file is answered: by then the box has to be seen.
        let waiting = if role == FileRole::BoxDisk && !file.is_over_export() {
            self.staging.boxes.commit(file)
        } else {
            Vec::new()
        };
        drop(state);
        self.commit_waiting(file, &waiting)
    }

    /// Makes a whole archive wait whose name was taken while it was written, or whose home is in use
    /// only now: all writes succeeded, and many programs ignore the result of close. Returns false if
    /// the archive has to go.
    fn waits_after(&self, file: &StagedFile, state: &mut StagedState, error: &Error) -> bool {
        // A copy of what is in the home is made again by copying it again.
        let is_archive = matches!(state.content, StagedContent::Archive(_));
        let is_loose =
            is_archive && state.role() == FileRole::NewBox && state.place.parent == Node::Root;
        let may_end = matches!(error.errno(), libc::EEXIST | libc::EBUSY);
        if !is_loose || !may_end || self.waiting.accept(file, state).is_err() {
            return false;
        }
        self.staging.loose.fail_file(file);
        if file.source_keeper.is_none() {
            self.store.events().warn(&format!(
                "{} waits: {error}; rename it to NAME.boxlite to make a box of it",
                state.place.name
            ));
        }
        true
    }

    fn commit_edit(
        &self,
        file: &Arc<StagedFile>,
        mut state: MutexGuard<'_, StagedState>,
    ) -> Result<()> {
        let result = self.edits.commit(file, &mut state);
        // Refused at its rename: no closing will come to let go of it.
        let is_left = state.is_refused() && state.open == 0;
        drop(state);
        if is_left {
            self.staging.loose.drop_file(file);
        }
        result
    }

    /// Checks an edit of box.json that was cut, which may have completed it.
    ///
    /// # Errors
    /// Those of [`BoxEdits::check`].
    pub fn check_edit(&self, file: &StagedFile) -> Result<()> {
        let mut state = file.state();
        let checked = self.edits.check(file, &state);
        checked.inspect_err(|error| state.refuse(error))
    }

    /// Commits the snapshots that waited for a box.
    fn commit_waiting(&self, file: &StagedFile, waiting: &[Arc<StagedFile>]) -> Result<()> {
        let mut result = Ok(());
        for other in waiting {
            // A file that is still open is committed by its own close, unless that was answered.
            let is_open = other.state().open > 0 && !other.is_waiting();
            if let Err(error) = self.commit_if_ready(other)
                && !is_open
            {
                let path = self.path_of(other);
                self.store.events().warn(&format!(
                    "{path} waits: its box was made, but the snapshot could not be: {error}; \
                     `touch` the file to try again"
                ));
                // The box was made, but not all of its snapshots: the close fails.
                result = Err(error);
                self.fail_box(file);
            }
        }
        result
    }

    fn fail_box(&self, file: &StagedFile) {
        let boxes = &self.staging.boxes;
        boxes.with(&file.box_id, |staged| staged.fail(file.source_keeper));
    }

    /// Returns the path of a waiting archive below its box, for the log.
    fn path_of(&self, file: &StagedFile) -> String {
        let place = file.state().place.clone();
        let directory = self.staging.boxes.with(&file.box_id, |staged| {
            staged
                .find(&place.parent)
                .map(|(directory, _)| directory.to_owned())
        });
        let directory = directory.flatten().unwrap_or_else(|| "?".to_owned());
        format!("{SNAPSHOTS}/{directory}/{}", place.name)
    }

    fn commit_box(&self, file: &StagedFile, state: &StagedState) -> Result<()> {
        let shown = match &state.place.parent {
            Node::Root if is_nameless_archive(&state.place.name) => {
                name_in_archive((&self.store, &self.boxes, &self.staging), &state.content)?
            }
            Node::Root => {
                let name = &state.place.name;
                archive_stem(name).unwrap_or(name).to_owned()
            }
            _ => {
                let name = self.staging.boxes.name_of(&file.box_id);
                name.ok_or_else(directory_is_gone)?
            }
        };
        let new = NewBoxIdentity {
            id: file.box_id.clone(),
            name: decode(&shown)?,
            description: self.description_of(&state.place.parent)?,
        };
        match &state.content {
            StagedContent::Archive(arrival) => {
                let (options, version) = arrival.came_with()?;
                self.note_original(&file.box_id, options, Some(version));
                store::import_box(&self.store, arrival, &new)
            }
            StagedContent::FromHome {
                source, contents, ..
            } => {
                let options = self.boxes.record(source.box_id())?.options_for_copy()?;
                self.note_original(&file.box_id, options, None);
                store::clone_box(&self.store, source, contents, &new)
            }
            _ => Ok(()),
        }
    }

    fn note_original(&self, box_id: &str, options: Value, version: Option<u64>) {
        let boxes = &self.staging.boxes;
        boxes.with(box_id, |staged| {
            staged.original_options = Some((options, version));
        });
    }

    /// Returns the box.json in the directory of a box being made, if it is there and complete.
    fn description_of(&self, directory: &Node) -> Result<Option<Value>> {
        let Some(id) = directory.box_id() else {
            return Ok(None);
        };
        let json = self.staging.boxes.with(id, |staged| {
            let child = staged.child(directory, BOX_JSON)?;
            child.file().cloned()
        });
        let Some(json) = json.flatten() else {
            return Ok(None);
        };
        let state = json.state();
        match &state.content {
            StagedContent::Text(text) => box_json::parse_object(text),
            _ => Ok(None),
        }
    }

    /// Makes what was written over a box's export the disk of the box. Refused to a process that
    /// tried to write box.json meanwhile: tools that copy several files at once (rclone) may begin
    /// with the export.
    fn commit_restore(&self, file: &StagedFile, state: &StagedState) -> Result<()> {
        let history = &self.history;
        if history.tried_to_copy(&file.box_id, &file.writer, file.begun) {
            return Err(refuse_copied_box(&self.store, EXPORT));
        }
        self.boxes.change(&file.box_id, || match &state.content {
            StagedContent::Archive(arrival) => {
                store::restore_archive(&self.store, &file.box_id, arrival)
            }
            StagedContent::FromHome {
                source, contents, ..
            } => store::restore_box(&self.store, &file.box_id, source, contents),
            _ => Ok(()),
        })
    }

    /// Puts what was written over the export of a snapshot in place of the snapshot. The store does
    /// so only as long as the box's disk is the same, so that nothing is lost.
    fn replace_snapshot(&self, file: &StagedFile, state: &StagedState) -> Result<()> {
        let (box_id, snapshot) = snapshot_of(state)?;
        let row = self.boxes.snapshot(box_id, snapshot)?;
        let new = NewSnapshotIdentity {
            id: snapshot_id()?,
            name: row.name.clone(),
            created_at: Some(row.created_at),
            replaces: Some(row.id.clone()),
        };
        let boxes = &self.boxes;
        boxes.change(box_id, || self.make_snapshot(state, box_id, &new))?;
        self.staging.boxes.with(&file.box_id, |staged| {
            if let Some(made) = staged.unlisted.remove(snapshot) {
                staged.unlisted.insert(new.id.clone(), made);
            }
            staged.arrived.insert(new.id);
        });
        Ok(())
    }

    fn commit_snapshot(&self, file: &StagedFile, state: &StagedState) -> Result<()> {
        let (box_id, snapshot_id) = snapshot_of(state)?;
        let directory = &state.place.parent;
        let boxes = &self.staging.boxes;
        let (name, json) = boxes.snapshot_being_made(&file.box_id, directory)?;
        let mut new = NewSnapshotIdentity {
            id: snapshot_id.to_owned(),
            name,
            created_at: json.and_then(|json| self.created_at_of(&json)),
            replaces: None,
        };
        if let (None, StagedContent::FromHome { source, .. }) = (new.created_at, &state.content) {
            new.created_at = self.created_at_of_source(source);
        }
        self.make_snapshot(state, box_id, &new)?;
        boxes.with(box_id, |staged| {
            staged.arrived.insert(snapshot_id.to_owned())
        });
        // Another thread may have closed its description after the look above and before the
        // snapshot existed.
        if let Ok((_, Some(json))) = boxes.snapshot_being_made(&file.box_id, directory) {
            self.date_snapshot(&json);
        }
        Ok(())
    }

    fn make_snapshot(
        &self,
        state: &StagedState,
        box_id: &str,
        new: &NewSnapshotIdentity,
    ) -> Result<()> {
        match &state.content {
            StagedContent::Archive(arrival) => {
                store::import_snapshot(&self.store, arrival, box_id, new)
            }
            StagedContent::FromHome {
                source, contents, ..
            } => store::clone_snapshot(&self.store, source, contents, box_id, new),
            _ => Ok(()),
        }
    }

    /// Dates a snapshot by a snapshot.json that came after its export (rsync goes by names).
    fn date_snapshot(&self, json: &StagedFile) {
        let parent = {
            let state = json.state();
            let is_final = state.place.name == SNAPSHOT_JSON;
            is_final.then(|| state.place.parent.clone())
        };
        let Some(Node::Snapshot(box_id, snapshot_id)) = parent else {
            return;
        };
        let Ok(row) = self.boxes.snapshot(&box_id, &snapshot_id) else {
            // Not made yet: its own commit will look here.
            return;
        };
        if let StagedContent::Text(text) = &json.state().content
            && let unkept = box_json::unkept_fields(text)
            && !unkept.is_empty()
        {
            self.store.events().warn(&format!(
                "{SNAPSHOT_JSON} of snapshot {}: {} is not kept; BoxLite has no place for it",
                row.name,
                unkept.join(", ")
            ));
        }
        if let Some(created_at) = self.created_at_of(json)
            && created_at != row.created_at
            && let Err(error) = store::date_snapshot(&self.store, &box_id, &snapshot_id, created_at)
        {
            let message = format!("snapshot {} keeps the time of its copy: {error}", row.name);
            self.store.events().info(&message);
        }
    }

    fn created_at_of(&self, json: &StagedFile) -> Option<i64> {
        match &json.state().content {
            StagedContent::Text(text) => box_json::created_at(text),
            StagedContent::JsonFromHome(source) => self.created_at_of_source(source),
            _ => None,
        }
    }

    fn created_at_of_source(&self, source: &Source) -> Option<i64> {
        match source {
            Source::Live { .. } => None,
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => {
                let row = self.boxes.snapshot(box_id, snapshot_id).ok()?;
                Some(row.shown_at)
            }
        }
    }
}

/// Returns the ids of the box and the snapshot that a file is written for.
fn snapshot_of(state: &StagedState) -> Result<(&str, &str)> {
    match &state.place.parent {
        Node::Snapshot(box_id, snapshot_id) => Ok((box_id, snapshot_id)),
        _ => Err(Error::new(
            libc::EINVAL,
            "that is not the directory of a snapshot",
        )),
    }
}
