//! The end of a mount: complete archives that still wait for their box, or for their final name, become
//! boxes of their own. The program that copied one got success from close, so its source may be gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Tree;
use super::names::{archive_stem, decode};
use super::staged_file::{Content, StagedFile, temporary_for};
use super::staging::What;
use crate::home::box_id;
use crate::store::NewClone;
use crate::{Error, Result};

impl Tree {
    /// Makes a box of each waiting archive. The log has the name of each box, and each failure.
    pub fn keep_waiting(&self) {
        for (file, wanted) in self.waiting_archives() {
            let journal = self.store.journal();
            match self.keep(&file, &wanted) {
                Ok(name) => journal.note(&format!(
                    "the archive {wanted} waited when the mount ended; it is the box {name} now"
                )),
                Err(error) => journal.complain(&format!(
                    "the archive {wanted} waited when the mount ended, and is lost: {error}"
                )),
            }
        }
    }

    /// Returns the waiting archives, each with a name for the log and for its box.
    fn waiting_archives(&self) -> Vec<(Arc<StagedFile>, String)> {
        let staging = self.staging.lock();
        let mut waiting = Vec::new();
        for loose in &staging.files {
            waiting.push((loose.file.clone(), loose.name.clone()));
        }
        for (id, staged) in &staging.boxes {
            let of_box = staging.names.iter().find(|(_, of)| *of == id);
            let of_box = of_box.map_or_else(|| self.store.name_of(id), |(name, _)| name.clone());
            for (directory, names) in &staged.children {
                let mut others = staged.children.values().flatten();
                let directory = others.find(|(_, child)| child.node.ino() == *directory);
                let directory = directory.map_or_else(String::new, |(name, _)| format!("-{name}"));
                for child in names.values() {
                    if let What::File(file) = &child.what {
                        waiting.push((file.clone(), format!("{of_box}{directory}")));
                    }
                }
            }
        }
        waiting.retain(|(file, _)| file.waits.load(Ordering::Relaxed));
        waiting
    }

    /// Makes a box of a waiting archive, and returns the name of the box.
    fn keep(&self, file: &StagedFile, wanted: &str) -> Result<String> {
        let mut state = file.state.lock();
        let stem = temporary_for(wanted).unwrap_or(wanted);
        let stem = archive_stem(stem).unwrap_or(stem).trim_start_matches('.');
        let names = self.names()?;
        let mut candidates =
            std::iter::once(stem.to_owned()).chain((2..).map(|number| format!("{stem}-{number}")));
        let name = candidates
            .find(|name| names.id_of(name).is_none())
            .ok_or_else(|| Error::new(libc::EEXIST, "no name is free"))?;
        let new = NewClone {
            id: box_id()?,
            name: decode(&name)?,
        };
        let Content::Archive(arrival) = &state.content else {
            return Err(Error::new(libc::ENODATA, "it has no bytes"));
        };
        self.store.import_box(arrival, &new)?;
        state.committed = true;
        state.content = Content::Nothing;
        file.waits.store(false, Ordering::Relaxed);
        Ok(name)
    }
}
