//! Which member of an archive a name stands for, as BoxLite's unpacking by path finds it.
//!
//! BoxLite unpacks all members into an empty directory and looks for two files in it. A member by another name
//! is ignored there, and here; one that could not be unpacked ends the import, there and here. Nothing is
//! unpacked here, so names are only compared.

use std::collections::HashMap;

use super::refusal::refused;
use crate::Result;

/// Longest name of a file.
const MAX_COMPONENT: usize = 255;
/// Longest path, less what BoxLite's own directory takes of it.
const MAX_PATH: usize = 4096 - 256;
/// Most members besides manifest and disk, and most bytes of their names: they are kept to see what is a file and
/// what a directory.
const MOST_OTHERS: usize = 4096;
const MOST_BYTES: usize = 1 << 20;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// `manifest.json`.
    Manifest,
    /// `disk.qcow2`.
    Disk,
    /// Anything else: read and dropped.
    Other,
}

/// The names that came.
#[derive(Default)]
pub(super) struct Names {
    /// Whether each is a directory.
    known: HashMap<Vec<u8>, bool>,
    bytes: usize,
}

impl Names {
    /// What a regular member by this name is. A `..` anywhere has BoxLite skip it; a root and `.` do not count.
    ///
    /// # Errors
    /// EBADMSG for what BoxLite could not unpack.
    pub fn meaning(&mut self, name: &[u8]) -> Result<Meaning> {
        if name.contains(&0) {
            return Err(refused(format!(
                "the member {} has a NUL in its name",
                shown(name)
            )));
        }
        let parts = name.split(|byte| *byte == b'/');
        let parts: Vec<&[u8]> = parts.filter(|part| !matches!(*part, b"" | b".")).collect();
        if parts.is_empty() || parts.contains(&&b".."[..]) {
            return Ok(Meaning::Other);
        }
        let path = parts.join(&b'/');
        if path.len() > MAX_PATH || parts.iter().any(|part| part.len() > MAX_COMPONENT) {
            return Err(refused(format!(
                "the member {} has a name that is too long for a file",
                shown(name)
            )));
        }
        // tar-rs makes a directory of a regular member whose name ends so.
        let is_directory = name.ends_with(b"/");
        let meaning = match (path.as_slice(), is_directory) {
            (b"manifest.json", false) => Meaning::Manifest,
            (b"disk.qcow2", false) => Meaning::Disk,
            _ => Meaning::Other,
        };
        for end in 1..parts.len() {
            self.add(parts[..end].join(&b'/'), true, name)?;
        }
        self.add(path, is_directory, name)?;
        Ok(meaning)
    }

    /// A path is a directory or a file, not both.
    fn add(&mut self, path: Vec<u8>, is_directory: bool, name: &[u8]) -> Result<()> {
        let is_needed = matches!(path.as_slice(), b"manifest.json" | b"disk.qcow2");
        match self.known.get(&path) {
            Some(known) if *known == is_directory && !(is_directory && is_needed) => return Ok(()),
            Some(_) => {
                return Err(refused(format!(
                    "the member {} can't be a file and a directory",
                    shown(name)
                )));
            }
            None if is_directory && is_needed => {
                return Err(refused(format!(
                    "the member {} makes {} a directory",
                    shown(name),
                    shown(&path)
                )));
            }
            None => {}
        }
        self.bytes = self.bytes.saturating_add(path.len());
        if self.known.len() >= MOST_OTHERS || self.bytes > MOST_BYTES {
            return Err(refused(format!(
                "it has over {MOST_OTHERS} members; an archive has manifest.json and disk.qcow2"
            )));
        }
        self.known.insert(path, is_directory);
        Ok(())
    }
}

/// A name from the archive, fit for a message.
pub(super) fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let short: String = text.chars().take(100).collect();
    format!("{short:?}")
}
