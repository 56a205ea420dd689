//! Notes on archives that wait: `disk-X.waiting` beside a disk in the workspace.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::files::durable;
use crate::files::listing::names_in;
use crate::{Context, Result};

/// Suffix of the note beside a disk.
const NOTE: &str = "waiting";

/// A complete archive in the workspace: its disk, and what a box made of it gets.
pub struct WaitingArchive {
    pub disk: PathBuf,
    /// The name its box gets, if that is free.
    pub name: String,
    pub options: Value,
}

impl WaitingArchive {
    /// The path of the note on the archive whose disk this is.
    pub fn note_of(disk: &Path) -> PathBuf {
        disk.with_extension(NOTE)
    }

    /// Writes the note; it and the disk are durable when this returns.
    pub fn write_note(&self) -> Result<()> {
        durable::sync_file(&self.disk)?;
        let note = WaitingArchive::note_of(&self.disk);
        let text = json!({"name": self.name, "options": self.options}).to_string();
        // Another may be there, with the name that the archive had.
        let new = self.disk.with_extension("note");
        fs::write(&new, text).context(|| format!("cannot write {}", new.display()))?;
        durable::sync_file(&new)?;
        fs::rename(&new, &note).context(|| format!("cannot write {}", note.display()))?;
        // The workspace's own name was not flushed before, nor that of the directory it is in.
        let dirs = note.ancestors().skip(1).take(3);
        dirs.into_iter().try_for_each(durable::sync_dir)
    }

    /// Returns the archive that a note is about; None for one that ends in the middle, and where the disk
    /// has become a box's.
    fn read(note: &Path) -> Option<WaitingArchive> {
        let text = fs::read_to_string(note).ok()?;
        let mut value: Value = serde_json::from_str(&text).ok()?;
        let disk = note.with_extension("");
        disk.is_file().then_some(())?;
        Some(WaitingArchive {
            name: value["name"].as_str()?.to_owned(),
            options: value["options"].take(),
            disk,
        })
    }
}

/// The archives that wait in a workspace.
pub fn waiting_in(workspace: &Path) -> Vec<WaitingArchive> {
    let names = names_in(workspace).unwrap_or_default();
    let notes = names.iter().map(|name| workspace.join(name));
    let notes = notes.filter(|path| path.extension().is_some_and(|end| end == NOTE));
    notes
        .filter_map(|note| WaitingArchive::read(&note))
        .collect()
}
