//! Complete archives that still wait for their box, or for their final name, when the mount ends.
//! They become boxes of their own: the program that copied one got success from close, so its
//! source may be gone.

use std::sync::Arc;

use crate::store::{self, Store};
use crate::tree::nodes::names::{archive_stem, decode, is_nameless_archive};
use crate::tree::nodes::node::Node;
use crate::tree::staging::nameless::shown_name;
use crate::tree::staging::role::temporary_for;
use crate::tree::staging::staged_file::{Stage, StagedContent, StagedFile, StagedState};
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// The name of a box made of an archive that has no name of its own.
const NAMELESS: &str = "archive";

/// Keeps archives that wait.
pub struct WaitingArchives {
    store: Arc<Store>,
    staging: Arc<StagingArea>,
}

impl WaitingArchives {
    /// Returns the waiting archives of a staging area.
    pub fn new(store: Arc<Store>, staging: Arc<StagingArea>) -> WaitingArchives {
        WaitingArchives { store, staging }
    }

    /// Makes a box of each waiting archive. The log has the name of each box, and each failure.
    pub fn keep_all(&self) {
        self.staging.boxes.warn_of_unmade();
        for file in self.staging.waiting_files() {
            let mut state = file.state();
            let wanted = self.name_for(&file, &state);
            let events = self.store.events();
            match self.keep(&file, &mut state, &wanted) {
                Ok(name) => events.info(&format!(
                    "the archive {wanted} waited when the mount ended; it is the box {name} now"
                )),
                // Its source is in the home, and was not removed for it.
                Err(error) if matches!(state.content, StagedContent::FromHome { .. }) => {
                    events.warn(&format!(
                        "the copy {wanted} waited when the mount ended, and is dropped: {error}; copy it again"
                    ));
                }
                Err(error) => events.warn(&format!(
                    "the archive {wanted} waited when the mount ended, and waits for the next mount: {error}"
                )),
            }
        }
    }

    /// Makes an archive wait, before its close is answered. It then outlives this process, even one
    /// that is killed. No note is needed for what shares a disk of this home: nothing was removed
    /// for it.
    ///
    /// # Errors
    /// ENOSPC, EIO; the file is refused then.
    pub fn accept(&self, file: &StagedFile, state: &mut StagedState) -> Result<()> {
        let noted = self.write_note(file, state).inspect_err(|error| {
            state.refuse(error);
            let boxes = &self.staging.boxes;
            boxes.with(&file.box_id, |staged| staged.fail(file.source_keeper));
        });
        noted.map(|()| file.set_stage(state, Stage::Waiting))
    }

    fn write_note(&self, file: &StagedFile, state: &mut StagedState) -> Result<()> {
        let wanted = self.name_for(file, state);
        match &mut state.content {
            StagedContent::Archive(arrival) => store::note_waiting(arrival, &wanted, file.created),
            _ => Ok(()),
        }
    }

    /// Updates the notes of the archives that wait in a box being made, whose names may have
    /// changed. An archive whose note can't be updated was accepted before, so it stays, and keeps
    /// its earlier note.
    pub fn note_names(&self, box_id: &str) {
        let files = self
            .staging
            .boxes
            .with(box_id, |staged| staged.files().cloned().collect::<Vec<_>>());
        for file in files.unwrap_or_default() {
            let mut state = file.state();
            if file.is_waiting()
                && let Err(error) = self.write_note(&file, &mut state)
            {
                let events = self.store.events();
                events.warn(&format!(
                    "an archive that waits keeps its earlier name: {error}"
                ));
            }
        }
    }

    /// Returns the name of a box that would be made of an archive: that of its file, or those of
    /// the box and the snapshot that it is copied into.
    fn name_for(&self, file: &StagedFile, state: &StagedState) -> String {
        let place = &state.place;
        // None: no box is being made; Some(None): the file is not in a snapshot of it.
        let snapshot = self.staging.boxes.with(&file.box_id, |staged| {
            let (snapshot, _) = staged.find(&place.parent)?;
            matches!(place.parent, Node::Snapshot(..)).then(|| snapshot.to_owned())
        });
        let Some(snapshot) = snapshot else {
            if let Some(id) = place.parent.box_id() {
                return self.store.exports().disks.name_of(id);
            }
            let stem = temporary_for(&place.name).unwrap_or(&place.name);
            if let (true, StagedContent::Archive(arrival)) =
                (is_nameless_archive(stem), &state.content)
            {
                let name = arrival.manifest().ok().and_then(|it| it.box_name.clone());
                return name.unwrap_or_else(|| shown_name(None));
            }
            let stem = archive_stem(stem).unwrap_or(stem).trim_start_matches('.');
            return decode(stem).unwrap_or_else(|_| NAMELESS.to_owned());
        };
        let of_box = self.staging.boxes.name_of(&file.box_id).map_or_else(
            || self.store.exports().disks.name_of(&file.box_id),
            |name| decode(&name).unwrap_or_else(|_| NAMELESS.to_owned()),
        );
        match snapshot {
            Some(snapshot) => format!("{of_box}-{snapshot}"),
            None => of_box,
        }
    }

    /// Makes a box of a waiting archive, and returns the name of the box.
    fn keep(&self, file: &StagedFile, state: &mut StagedState, wanted: &str) -> Result<String> {
        let name = match &mut state.content {
            StagedContent::Archive(arrival) => store::keep_archive(&self.store, arrival, wanted)?,
            StagedContent::FromHome {
                source, contents, ..
            } => store::keep_copy(&self.store, source, contents, wanted)?,
            _ => return Err(Error::new(libc::ENODATA, "it has no bytes")),
        };
        file.set_stage(state, Stage::Committed);
        state.content = StagedContent::Nothing;
        Ok(name)
    }
}
