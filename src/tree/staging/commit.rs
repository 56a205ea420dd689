//! What was written becomes what its name says: a box, or a snapshot of one. Called when a descriptor
//! is closed and when a file gets another name, whichever is last.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::home::snapshot_id;
use crate::store::{NewClone, NewSnapshotName, SnapshotContents, Source};
use crate::tree::Tree;
use crate::tree::nodes::box_json;
use crate::tree::nodes::names::{EXPORT, SNAPSHOT_JSON, SNAPSHOTS, archive_stem, decode};
use crate::tree::nodes::node::Node;
use crate::tree::staging::staged_file::{Content, FileState, Role, StagedFile, is_complete};
use crate::tree::staging::staging_area::What;
use crate::{Error, Result};

impl Tree {
    /// Makes a file what its name says, if its data is complete. Called when a descriptor is
    /// closed and when it gets another name, whichever is last.
    pub(in crate::tree) fn settle(&self, file: &Arc<StagedFile>) -> Result<()> {
        let mut state = file.state.lock();
        if state.committed {
            return Ok(());
        }
        if let Err(error) = state.refused() {
            // Its name goes with this close, and not with the kernel's later word of the last one.
            drop(state);
            self.drop_staged_file(file, true);
            return Err(error);
        }
        let role = state.role();
        if role == Role::Json {
            // No verdict: closing happens for every copy of a descriptor.
            state.refuse_partial_text()?;
            drop(state);
            self.date_snapshot(file);
            return Ok(());
        }
        if role == Role::Placeholder || !is_complete(&mut state, file.size())? {
            return Ok(());
        }
        let result = match role {
            Role::BoxDisk if file.restores => self.commit_restore(file, &state),
            Role::NewBox | Role::BoxDisk => self.commit_box(file, &state),
            Role::SnapshotDisk if file.restores => self.replace_snapshot(file, &state),
            Role::SnapshotDisk if self.waits_for_box(file) => {
                return self.note_waiting(file, &mut state);
            }
            Role::SnapshotDisk => self.commit_snapshot(file, &state),
            Role::TemporaryArchive => return self.note_waiting(file, &mut state),
            Role::Json | Role::Placeholder => return Ok(()),
        };
        match result {
            Ok(()) => {
                state.committed = true;
                file.waits.store(false, Ordering::Relaxed);
                file.is_there.store(true, Ordering::Relaxed);
                state.operation = None;
            }
            Err(error) if file.waits.load(Ordering::Relaxed) => {
                // An earlier close succeeded for it, so it is kept.
                return Err(error);
            }
            Err(error) => {
                // Not noted again: the store's log has it.
                state.refuse(&error);
                if let Some(staged) = self.staging.lock().boxes.get_mut(&file.box_id) {
                    staged.fail(file.copier);
                }
                if state.open == 0 {
                    // Refused at its rename: no closing will come to let go of it.
                    state.content = Content::Nothing;
                    drop(state);
                    self.drop_staged_file(file, true);
                }
                return Err(error);
            }
        }
        // Its data is used up; the disk was moved into the box.
        state.content = Content::Nothing;
        // Before another close of the same file can answer: by then it is the box that is seen.
        let waiting = self.show_committed(file, &role);
        drop(state);
        let mut result = Ok(());
        for other in waiting {
            // A file that is still open is settled by its own close.
            let is_open = other.state.lock().open > 0;
            if let Err(error) = self.settle(&other)
                && !is_open
            {
                let path = self.waiting_path(&other);
                self.store.events().warn(&format!(
                    "{path} waits, for its box is there and the snapshot could not be made: {error}; \
                     `touch` the file to try again"
                ));
                // The box was made, but not all of its snapshots: the close fails.
                result = Err(error);
                if let Some(staged) = self.staging.lock().boxes.get_mut(&file.box_id) {
                    staged.fail(file.copier);
                }
            }
        }
        result
    }

    /// Returns the path of a waiting archive below its box, for the log.
    fn waiting_path(&self, file: &StagedFile) -> String {
        let place = file.state.lock().place.clone();
        let staging = self.staging.lock();
        let staged = staging.boxes.get(&file.box_id);
        let directory = staged.and_then(|staged| staged.find(&place.parent));
        let directory = directory.map_or("?", |(name, _)| name);
        format!("{SNAPSHOTS}/{directory}/{}", place.name)
    }

    fn commit_box(&self, file: &StagedFile, state: &FileState) -> Result<()> {
        let shown = match &state.place.parent {
            Node::Root => {
                let name = &state.place.name;
                archive_stem(name).unwrap_or(name).to_owned()
            }
            _ => self.staged_name(&file.box_id)?,
        };
        let new = NewClone {
            id: file.box_id.clone(),
            name: decode(&shown)?,
        };
        match &state.content {
            Content::Archive(arrival) => self.store.import_box(arrival, &new),
            Content::Shared {
                source, contents, ..
            } => self.store.clone_box(source, contents, &new),
            _ => Ok(()),
        }
    }

    /// What was written over a box's export becomes its disk. Not for who tried to write box.json
    /// meanwhile: tools that copy several files at once (rclone) may begin with the export.
    fn commit_restore(&self, file: &StagedFile, state: &FileState) -> Result<()> {
        let copies_box = {
            let dealings = self.dealings.lock();
            dealings.tried_to_copy(&file.box_id, &file.writer, file.begun)
        };
        if copies_box {
            return Err(self.refuse_copied_box(EXPORT));
        }
        match &state.content {
            Content::Archive(arrival) => self.store.restore_archive(&file.box_id, arrival),
            Content::Shared {
                source, contents, ..
            } => self.store.restore(&file.box_id, source, contents),
            _ => Ok(()),
        }
    }

    /// What was written over the export of a snapshot takes its place: only as long as the box's disk
    /// is the same, so that nothing is lost.
    fn replace_snapshot(&self, file: &StagedFile, state: &FileState) -> Result<()> {
        let Node::Snapshot(box_id, snapshot) = &state.place.parent else {
            return Err(Error::new(libc::EINVAL, "that is no snapshot's directory"));
        };
        let row = self.snapshot(box_id, snapshot)?;
        let new = NewSnapshotName {
            id: snapshot_id()?,
            name: row.name.clone(),
            created_at: Some(row.created_at),
        };
        let with = match &state.content {
            Content::Archive(arrival) => SnapshotContents::Archive(arrival),
            Content::Shared {
                source, contents, ..
            } => SnapshotContents::Shared(source, contents),
            _ => return Ok(()),
        };
        self.store.replace_snapshot(box_id, snapshot, &with, &new)?;
        let mut staging = self.staging.lock();
        if let Some(staged) = staging.boxes.get_mut(&file.box_id) {
            if let Some(made) = staged.unlisted.remove(snapshot) {
                staged.unlisted.insert(new.id.clone(), made);
            }
            staged.arrived.insert(new.id);
        }
        Ok(())
    }

    pub(in crate::tree) fn staged_name(&self, box_id: &str) -> Result<String> {
        let staging = self.staging.lock();
        staging
            .names
            .iter()
            .find(|(_, id)| *id == box_id)
            .map(|(name, _)| name.clone())
            .ok_or_else(|| Error::new(libc::ENOENT, "its directory is gone"))
    }

    /// Whether the box of a snapshot that came is not made yet.
    pub(in crate::tree) fn waits_for_box(&self, file: &StagedFile) -> bool {
        let staging = self.staging.lock();
        staging
            .boxes
            .get(&file.box_id)
            .is_some_and(|staged| !staged.committed)
    }

    fn commit_snapshot(&self, file: &StagedFile, state: &FileState) -> Result<()> {
        let Node::Snapshot(box_id, snapshot_id) = &state.place.parent else {
            return Err(Error::new(libc::EINVAL, "that is no snapshot's directory"));
        };
        let (name, json) = self.snapshot_being_made(&file.box_id, &state.place.parent)?;
        let mut new = NewSnapshotName {
            id: snapshot_id.clone(),
            name,
            created_at: json.and_then(|json| self.created_at_of(&json)),
        };
        match &state.content {
            Content::Archive(arrival) => self.store.import_snapshot(arrival, box_id, &new),
            Content::Shared {
                source, contents, ..
            } => {
                new.created_at = new.created_at.or_else(|| self.created_at_of_source(source));
                self.store.share_snapshot(source, contents, box_id, &new)
            }
            _ => Ok(()),
        }?;
        if let Some(staged) = self.staging.lock().boxes.get_mut(box_id) {
            staged.arrived.insert(snapshot_id.clone());
        }
        // Another thread may have closed its description after the look above and before it was there.
        if let Ok((_, Some(json))) = self.snapshot_being_made(&file.box_id, &state.place.parent) {
            self.date_snapshot(&json);
        }
        Ok(())
    }

    /// The name of a snapshot's directory being made, and the snapshot.json in it.
    fn snapshot_being_made(
        &self,
        box_id: &str,
        directory: &Node,
    ) -> Result<(String, Option<Arc<StagedFile>>)> {
        let staging = self.staging.lock();
        let staged = staging.boxes.get(box_id);
        let (name, _) = staged
            .and_then(|staged| staged.find(directory))
            .ok_or_else(|| Error::new(libc::ENOENT, "its directory is gone"))?;
        let json = staged
            .and_then(|staged| staged.child(directory, SNAPSHOT_JSON))
            .and_then(|child| match &child.what {
                What::File(file) => Some(file.clone()),
                _ => None,
            });
        Ok((name.to_owned(), json))
    }

    /// A snapshot.json that came after its export (rsync goes by names) dates the snapshot.
    fn date_snapshot(&self, json: &StagedFile) {
        let parent = {
            let state = json.state.lock();
            let is_final = state.place.name == SNAPSHOT_JSON;
            is_final.then(|| state.place.parent.clone())
        };
        let Some(Node::Snapshot(box_id, snapshot_id)) = parent else {
            return;
        };
        let Ok(row) = self.snapshot(&box_id, &snapshot_id) else {
            // Not made yet: its own commit will look here.
            return;
        };
        if let Some(created_at) = self.created_at_of(json)
            && created_at != row.created_at
            && let Err(error) = self.store.date_snapshot(&box_id, &snapshot_id, created_at)
        {
            let message = format!("snapshot {} keeps the time of its copy: {error}", row.name);
            self.store.events().info(&message);
        }
    }

    fn created_at_of(&self, json: &StagedFile) -> Option<i64> {
        match &json.state.lock().content {
            Content::Text(text) => box_json::created_at(text),
            Content::SharedJson(source) => self.created_at_of_source(source),
            _ => None,
        }
    }

    fn created_at_of_source(&self, source: &Source) -> Option<i64> {
        match source {
            Source::Live { .. } => None,
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => self
                .snapshot(box_id, snapshot_id)
                .ok()
                .map(|row| row.shown_at),
        }
    }

    /// A box that was made is shown; snapshots that waited for it follow.
    fn show_committed(&self, file: &Arc<StagedFile>, role: &Role) -> Vec<Arc<StagedFile>> {
        let mut waiting = Vec::new();
        {
            let mut staging = self.staging.lock();
            for loose in &mut staging.files {
                loose.committed |= Arc::ptr_eq(&loose.file, file);
            }
            if file.restores {
                let directory = Node::Box(file.box_id.clone());
                let mut dealings = self.dealings.lock();
                dealings.bring_back(&file.box_id, &directory, EXPORT);
            } else if *role == Role::BoxDisk {
                staging.names.retain(|_, id| *id != file.box_id);
                if let Some(staged) = staging.boxes.get_mut(&file.box_id) {
                    staged.committed = true;
                    let others = staged.files().filter(|other| !Arc::ptr_eq(other, file));
                    waiting.extend(others.cloned());
                }
            }
        }
        waiting
    }
}
