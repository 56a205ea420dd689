//! Rows for layers that become bases.

use std::path::Path;

use crate::Result;
use crate::home::{NewBase, base_id};

/// Returns a row of ours for the base at `path`, with the sizes of `file`.
///
/// # Errors
/// Those of reading the file.
pub fn new_base(path: &Path, file: &Path) -> Result<NewBase> {
    use crate::Context;
    let header = crate::disk::Header::open(file)?;
    let meta = std::fs::metadata(file).context(|| format!("cannot look at {}", path.display()))?;
    // BoxLite uses the file stem as the id. A stem that is unsafe as an id gets a fresh one.
    let id = match path.file_stem().and_then(|stem| stem.to_str()) {
        Some(stem) if crate::home::is_safe_component(stem) => stem.to_owned(),
        _ => base_id()?,
    };
    Ok(NewBase {
        id,
        path: path.display().to_string(),
        virtual_size: header.map_or(meta.len(), |header| header.virtual_size),
        file_size: meta.len(),
        created_at: now(),
    })
}

/// Returns the current time in seconds since 1970.
pub fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
}
