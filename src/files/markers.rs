//! Marks in directories that have no row yet, or no more.

use std::path::Path;

use crate::files::durable;
use crate::{Context, Result};

/// Left in the directory of a box or a snapshot until its row is recorded, and before its row goes:
/// without a row, a directory with this file is ours to remove, and any other is not.
pub const UNRECORDED: &str = ".boxlitefs-unrecorded";

/// Leaves that mark in a directory whose row goes in the next step; on disk when this returns.
pub fn mark_unrecorded(dir: &Path) -> Result<()> {
    write_mark(dir)?;
    durable::sync_dir(dir)
}

/// Leaves that mark in a directory that is flushed later.
pub fn write_mark(dir: &Path) -> Result<()> {
    let mark = dir.join(UNRECORDED);
    std::fs::File::create(&mark)
        .and_then(|file| file.sync_all())
        .context(|| format!("cannot make {}", mark.display()))
}
