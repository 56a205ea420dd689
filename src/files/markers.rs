//! Marks in directories that have no row yet, or will lose it.

use std::path::Path;

use crate::files::durable;
use crate::{Context, Result};

/// The mark in the directory of a box or a snapshot from before its row is recorded until after,
/// and again before its row is removed. A directory without a row is ours to remove if it has this
/// file, and only then.
pub const UNRECORDED: &str = ".boxlitefs-unrecorded";

/// Marks a directory whose row is removed in the next step, durably.
///
/// # Errors
/// Those of system calls.
pub fn mark_unrecorded(dir: &Path) -> Result<()> {
    write_mark(dir)?;
    durable::sync_dir(dir)
}

/// Removes the mark, if any, from a directory whose row is on disk. This is not flushed: if a power
/// loss brings the mark back, the directory has a row, and recovery removes the mark.
///
/// # Errors
/// Those of system calls.
pub fn unmark(dir: &Path) -> Result<()> {
    durable::unlink_unflushed(&dir.join(UNRECORDED)).map(drop)
}

/// Marks a directory that is flushed later.
///
/// # Errors
/// Those of system calls.
pub fn write_mark(dir: &Path) -> Result<()> {
    let mark = dir.join(UNRECORDED);
    std::fs::File::create(&mark)
        .and_then(|file| file.sync_all())
        .context(|| format!("cannot make {}", mark.display()))
}
