//! Names in directories of the home.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Context, Error, Result};

/// Names in a directory; none when it is not there.
pub fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if is_absent(&e) => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(format!("cannot list {}", dir.display()), e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.context(|| format!("cannot list {}", dir.display()))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Nothing has that name. Any other error says nothing of what is there.
pub fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

/// The path with its directory's symlinks resolved: two spellings of a name become one. The last
/// component stays, for hard links are told apart by it.
///
/// # Errors
/// ENOENT when the directory is gone.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::damaged(format!("{} names no file", path.display())));
    };
    let dir = fs::canonicalize(dir).context(|| format!("cannot find {}", dir.display()))?;
    Ok(dir.join(name))
}
