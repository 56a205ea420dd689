//! Archives that wait for their box or name: a note `disk-X.waiting` beside a disk in the
//! workspace.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::files::durable;
use crate::files::listing::names_in;
use crate::{Context, Result};

/// The extension of the note beside a disk.
const NOTE: &str = "waiting";

/// A complete archive in the workspace: its disk, and the name and options of the box made of it.
pub struct WaitingArchive {
    /// The disk in the workspace.
    pub disk: PathBuf,
    /// The name of its box, if that is free.
    pub name: String,
    /// The options of its box, as JSON.
    pub options: Value,
    /// The id of the snapshot that it becomes in another image than its disk. If there is a row with
    /// that id, it does not wait any more.
    pub becomes: Option<String>,
}

impl WaitingArchive {
    /// Returns the path of the note about the archive with this disk.
    pub fn note_of(disk: &Path) -> PathBuf {
        disk.with_extension(NOTE)
    }

    /// Writes the note. The note and the disk are durable when this returns.
    ///
    /// # Errors
    /// Those of system calls.
    pub fn write_note(&self) -> Result<()> {
        durable::sync_file(&self.disk)?;
        let note = WaitingArchive::note_of(&self.disk);
        let text = json!({
            "name": self.name,
            "options": self.options,
            "becomes": self.becomes,
        });
        // An earlier note with the archive's former name may exist: replace it in one step.
        let new = self.disk.with_extension("note");
        fs::write(&new, text.to_string()).context(|| format!("cannot write {}", new.display()))?;
        durable::sync_file(&new)?;
        fs::rename(&new, &note).context(|| format!("cannot write {}", note.display()))?;
        // Nothing flushed the name of the workspace and of its directory before.
        let dirs = note.ancestors().skip(1).take(3);
        dirs.into_iter().try_for_each(durable::sync_dir)
    }

    /// Returns the archive that a note is about. Returns None for a truncated note, and for a disk
    /// that has become a box's.
    fn read(note: &Path) -> Option<WaitingArchive> {
        let text = fs::read_to_string(note).ok()?;
        let mut value: Value = serde_json::from_str(&text).ok()?;
        let disk = note.with_extension("");
        disk.is_file().then_some(())?;
        Some(WaitingArchive {
            name: value["name"].as_str()?.to_owned(),
            options: value["options"].take(),
            becomes: value["becomes"].as_str().map(str::to_owned),
            disk,
        })
    }
}

/// Returns the archives that wait in a workspace.
pub fn waiting_in(workspace: &Path) -> Vec<WaitingArchive> {
    let names = names_in(workspace).unwrap_or_default();
    let notes = names.iter().map(|name| workspace.join(name));
    let notes = notes.filter(|path| path.extension().is_some_and(|end| end == NOTE));
    notes
        .filter_map(|note| WaitingArchive::read(&note))
        .collect()
}
