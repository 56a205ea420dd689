//! Names of members, as BoxLite's unpacking by path understands them.
//!
//! BoxLite unpacks all members into an empty directory and looks for two files in it. Both ignore
//! members of other names. A member that BoxLite could not unpack ends the import, there and here.
//! Nothing is unpacked here, so names are only compared.

use std::collections::HashMap;

use super::refusal::refused;
use crate::Result;

/// Longest name of a file.
const MAX_COMPONENT: usize = 255;
/// The longest path, without the part that BoxLite's own directory takes.
const MAX_PATH: usize = 4096 - 256;
/// The most members besides manifest and disk, and the most bytes of their names. They are kept to
/// tell files from directories.
const MOST_OTHERS: usize = 4096;
const MOST_BYTES: usize = 1 << 20;

/// The meaning of a member.
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
    /// Returns the meaning of a regular member of this name. BoxLite skips a name with `..`
    /// anywhere; a root and `.` do not count.
    ///
    /// # Errors
    /// EBADMSG for a member that BoxLite could not unpack.
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
        // tar-rs makes a directory of a regular member whose name ends with a slash.
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

    /// Verifies that a path is either a directory or a file.
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
