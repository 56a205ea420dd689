//! The end of a mount: complete archives that still wait for their box, or for their final name, become
//! boxes of their own. The program that copied one got success from close, so its source may be gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::tree::Tree;
use crate::tree::nodes::names::{archive_stem, decode};
use crate::tree::nodes::node::Node;
use crate::tree::staging::staged_file::{Content, FileState, StagedFile, temporary_for};
use crate::{Error, Result};

/// The name of a box made of an archive that has no name of its own.
const NAMELESS: &str = "archive";

impl Tree {
    /// Makes a box of each waiting archive. The log has the name of each box, and each failure.
    pub fn keep_waiting(&self) {
        for file in self.waiting_archives() {
            let mut state = file.state.lock();
            let wanted = self.name_of_waiting(&file, &state);
            let events = self.store.events();
            match self.keep(&file, &mut state, &wanted) {
                Ok(name) => events.info(&format!(
                    "the archive {wanted} waited when the mount ended; it is the box {name} now"
                )),
                Err(error) => events.warn(&format!(
                    "the archive {wanted} waited when the mount ended, and waits for the next mount: {error}"
                )),
            }
        }
    }

    /// Makes sure that an archive that waits outlives this process, also one that is killed. Does nothing
    /// for what shares a disk of this home: nothing was removed for it.
    ///
    /// # Errors
    /// ENOSPC, EIO; the file is refused then.
    pub(in crate::tree) fn note_waiting(
        &self,
        file: &StagedFile,
        state: &mut FileState,
    ) -> Result<()> {
        let wanted = self.name_of_waiting(file, state);
        let Content::Archive(arrival) = &mut state.content else {
            return Ok(());
        };
        let noted = self.store.note_waiting(arrival, &wanted, file.created);
        noted.inspect_err(|error| {
            state.refuse(error);
            let mut staging = self.staging.lock();
            if let Some(staged) = staging.boxes.get_mut(&file.box_id) {
                staged.fail(file.copier);
            }
        })
    }

    /// The archives that wait in a box being made may have another name than their notes say.
    pub(in crate::tree) fn note_names(&self, box_id: &str) {
        let files: Vec<Arc<StagedFile>> = {
            let staging = self.staging.lock();
            let staged = staging.boxes.get(box_id);
            staged
                .into_iter()
                .flat_map(|staged| staged.files().cloned())
                .collect()
        };
        for file in files {
            let mut state = file.state.lock();
            if file.waits.load(Ordering::Relaxed) {
                // There is a note, so it does not fail.
                let _ = self.note_waiting(&file, &mut state);
            }
        }
    }

    fn waiting_archives(&self) -> Vec<Arc<StagedFile>> {
        let mut staging = self.staging.lock();
        staging.sweep();
        let loose = staging.files.iter().map(|loose| &loose.file);
        let in_boxes = staging.boxes.values().flat_map(|staged| staged.files());
        let mut waiting: Vec<Arc<StagedFile>> = loose.chain(in_boxes).cloned().collect();
        waiting.retain(|file| file.waits.load(Ordering::Relaxed));
        waiting
    }

    /// Returns the name of a box that would be made of an archive: that of its file, or those of the box
    /// and the snapshot that it is copied into.
    fn name_of_waiting(&self, file: &StagedFile, state: &FileState) -> String {
        let name = &state.place.name;
        let staging = self.staging.lock();
        let Some(staged) = staging.boxes.get(&file.box_id) else {
            if let Some(id) = state.place.parent.box_id() {
                return self.store.name_of(id);
            }
            let stem = temporary_for(name).unwrap_or(name);
            let stem = archive_stem(stem).unwrap_or(stem).trim_start_matches('.');
            return decode(stem).unwrap_or_else(|_| NAMELESS.to_owned());
        };
        let of_box = staging.names.iter().find(|(_, id)| **id == file.box_id);
        let of_box = of_box.map_or_else(
            || self.store.name_of(&file.box_id),
            |(name, _)| decode(name).unwrap_or_else(|_| NAMELESS.to_owned()),
        );
        match staged.find(&state.place.parent) {
            Some((snapshot, _)) if matches!(state.place.parent, Node::Snapshot(..)) => {
                format!("{of_box}-{snapshot}")
            }
            _ => of_box,
        }
    }

    /// Makes a box of a waiting archive, and returns the name of the box.
    fn keep(&self, file: &StagedFile, state: &mut FileState, wanted: &str) -> Result<String> {
        let name = match &mut state.content {
            Content::Archive(arrival) => self.store.keep_archive(arrival, wanted)?,
            Content::Shared {
                source, contents, ..
            } => self.store.keep_copy(source, contents, wanted)?,
            _ => return Err(Error::new(libc::ENODATA, "it has no bytes")),
        };
        state.committed = true;
        state.content = Content::Nothing;
        file.waits.store(false, Ordering::Relaxed);
        Ok(name)
    }
}
