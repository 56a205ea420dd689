//! Lists and resolves names in directories of the home.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Context, Error, Result};

/// Returns the names in a directory, sorted; none if it does not exist. Skips names that are not
/// UTF-8.
///
/// # Errors
/// Those of reading the directory.
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

/// Returns whether the error says that nothing has the name. Any other error leaves open what is
/// there.
pub fn is_absent(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}

/// Resolves the symlinks in a path's directory, so that two spellings of a name become one. The
/// last component stays as it is, because it tells hard links apart.
///
/// # Errors
/// ENOENT when the directory does not exist; EIO when the path names no file.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::damaged(format!("{} names no file", path.display())));
    };
    let dir = fs::canonicalize(dir).context(|| format!("cannot find {}", dir.display()))?;
    Ok(dir.join(name))
}
