//! Links, renames and directories that are on disk when the call returns. "fsync of a link or
//! rename" means its directory.

use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes, Metadata};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::disk::flush_headers;
use crate::{Context, Error, Result};

/// Flushes a file's contents and metadata.
pub fn sync_file(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .context(|| format!("cannot flush {}", path.display()))
}

/// Directories that this process changed and could not flush. Whoever asked for it was told, but what is
/// found in them may go with a loss of power, and the next change would build on it. Unlike contents of
/// files, names that a flush did not bring to the disk stay to be flushed, or the file system stops.
static UNFLUSHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Flushes the names in a directory.
pub fn sync_dir(path: &Path) -> Result<()> {
    let flushed = sync_file(path);
    let mut unflushed = UNFLUSHED.lock();
    match &flushed {
        Ok(()) => unflushed.remove(path),
        Err(_) => unflushed.insert(path.to_owned()),
    };
    flushed
}

/// Flushes what could not be flushed before, headers too. To be called before anything is looked at to be built
/// on.
///
/// # Errors
/// Those of fsync: it can't be flushed now either.
pub fn sync_unflushed() -> Result<()> {
    flush_headers()?;
    let unflushed = UNFLUSHED.lock().clone();
    for dir in unflushed {
        match fs::symlink_metadata(&dir) {
            // With all that was in it; and that it is gone was flushed in another.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                UNFLUSHED.lock().remove(&dir);
            }
            _ => sync_dir(&dir)?,
        }
    }
    Ok(())
}

/// Flushes the name of a file in its directory.
pub fn sync_parent(path: &Path) -> Result<()> {
    sync_dir(parent(path)?)
}

/// Flushes all that anybody has done to the file system that a directory is on.
pub fn sync_file_system(path: &Path) -> Result<()> {
    let message = || format!("cannot flush the file system of {}", path.display());
    let dir = File::open(path).context(message)?;
    rustix::fs::syncfs(&dir)
        .map_err(std::io::Error::from)
        .context(message)
}

fn parent(path: &Path) -> Result<&Path> {
    path.parent()
        .ok_or_else(|| Error::new(libc::EINVAL, format!("{} has no directory", path.display())))
}

/// Gives `file` a further name; it is on disk when this returns. Where that can't be made certain, it has
/// not got it: what is found there the next time would be taken for being on disk.
pub fn link(file: &Path, name: &Path) -> Result<()> {
    fs::hard_link(file, name)
        .context(|| format!("cannot link {} to {}", file.display(), name.display()))?;
    sync_dir(parent(name)?).inspect_err(|_| {
        let _ = unlink(name);
    })
}

/// Moves `from` over `to`; on disk when this returns.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .context(|| format!("cannot move {} to {}", from.display(), to.display()))?;
    sync_dir(parent(to)?)
}

/// Removes a name; not finding it is fine, somebody was here before.
pub fn unlink(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)?),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(format!("cannot remove {}", path.display()), e)),
    }
}

/// Removes an empty directory; not finding it is fine.
pub fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => sync_dir(parent(path)?),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(format!("cannot remove {}", path.display()), e)),
    }
}

/// Gives `to` the access and modification time of `from`: the disk state it stands for did not
/// change when its file was made.
pub fn copy_times(from: &Path, to: &Path) -> Result<()> {
    let meta = fs::metadata(from).context(|| format!("cannot look at {}", from.display()))?;
    let message = || format!("cannot set the times of {}", to.display());
    File::open(to)
        .and_then(|file| set_times(&file, &meta))
        .context(message)
}

/// Gives a file the times that `of` has.
pub fn set_times(file: &File, of: &Metadata) -> std::io::Result<()> {
    let times = FileTimes::new()
        .set_accessed(of.accessed()?)
        .set_modified(of.modified()?);
    file.set_times(times)
}
