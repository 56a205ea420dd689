//! Links, renames and directories that are on disk when the call returns. To flush a link or a
//! rename, its directory is flushed.

use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes, Metadata};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::disk::flush_headers;
use crate::{Context, Error, Result};

/// Flushes a file's contents and metadata.
///
/// # Errors
/// Those of opening and of fsync.
pub fn sync_file(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .context(|| format!("cannot flush {}", path.display()))
}

/// How often this process has changed names or headers of image files.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// Returns a number that differs after every change of names by this module, and after
/// [`count_change`]. What was seen of a directory before proves nothing after it.
pub fn changes() -> u64 {
    CHANGES.load(Ordering::Acquire)
}

/// Counts a change of names, or of the headers of image files, that is made by other means.
pub fn count_change() {
    CHANGES.fetch_add(1, Ordering::AcqRel);
}

/// Directories that this process changed and could not flush. The caller got the error, but a power
/// loss may still remove the names in them, and the next change would build on those. The kernel
/// keeps names that it failed to flush for the next flush, or stops the file system; it does not do
/// so for file contents.
static UNFLUSHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Flushes the names in a directory. A failure is remembered for [`sync_unflushed`].
///
/// # Errors
/// Those of opening and of fsync.
pub fn sync_dir(path: &Path) -> Result<()> {
    let flushed = sync_file(path);
    let mut unflushed = UNFLUSHED.lock();
    match &flushed {
        Ok(()) => unflushed.remove(path),
        Err(_) => unflushed.insert(path.to_owned()),
    };
    flushed
}

/// Flushes headers and directories that could not be flushed before. Must run before a change looks
/// at anything it builds on.
///
/// # Errors
/// Those of fsync: it still fails.
pub fn sync_unflushed() -> Result<()> {
    flush_headers()?;
    let unflushed = UNFLUSHED.lock().clone();
    for dir in unflushed {
        match fs::symlink_metadata(&dir) {
            // The directory is gone, and its removal was flushed with its parent.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                UNFLUSHED.lock().remove(&dir);
            }
            _ => sync_dir(&dir)?,
        }
    }
    Ok(())
}

/// Flushes the name of a file in its directory.
///
/// # Errors
/// EINVAL when the path has no directory; those of [`sync_dir`].
pub fn sync_parent(path: &Path) -> Result<()> {
    sync_dir(parent(path)?)
}

/// Flushes the whole file system that a directory is on, whichever process wrote to it.
///
/// # Errors
/// Those of opening and of syncfs.
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

/// Links `file` to the further name `name`, durably. If the link can't be flushed, it is removed
/// again: the next change would take it for durable.
///
/// # Errors
/// Those of link and of fsync.
pub fn link(file: &Path, name: &Path) -> Result<()> {
    count_change();
    fs::hard_link(file, name)
        .context(|| format!("cannot link {} to {}", file.display(), name.display()))?;
    sync_dir(parent(name)?).inspect_err(|_| {
        let _ = unlink(name);
    })
}

/// Moves `from` over `to`, durably.
///
/// # Errors
/// Those of rename and of fsync.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    count_change();
    fs::rename(from, to)
        .context(|| format!("cannot move {} to {}", from.display(), to.display()))?;
    sync_dir(parent(to)?)
}

/// Removes a name, durably. A name that does not exist is not an error.
///
/// # Errors
/// Those of unlink and of fsync.
pub fn unlink(path: &Path) -> Result<()> {
    if unlink_unflushed(path)? {
        sync_dir(parent(path)?)?;
    }
    Ok(())
}

/// Removes a name that may come back after a power loss. Returns whether it existed.
///
/// # Errors
/// Those of unlink.
pub fn unlink_unflushed(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => {
            count_change();
            Ok(true)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io(format!("cannot remove {}", path.display()), e)),
    }
}

/// Removes an empty directory, durably. A directory that does not exist is not an error.
///
/// # Errors
/// ENOTEMPTY; those of rmdir and of fsync.
pub fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => {
            count_change();
            sync_dir(parent(path)?)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(format!("cannot remove {}", path.display()), e)),
    }
}

/// Sets the access and modification times of `to` to those of `from`: making the file did not
/// change the disk state it stands for.
///
/// # Errors
/// Those of system calls.
pub fn copy_times(from: &Path, to: &Path) -> Result<()> {
    let meta = fs::metadata(from).context(|| format!("cannot look at {}", from.display()))?;
    let message = || format!("cannot set the times of {}", to.display());
    File::open(to)
        .and_then(|file| set_times(&file, &meta))
        .context(message)
}

/// Sets the modification time of a file.
///
/// # Errors
/// Those of system calls.
pub fn set_modified(path: &Path, modified: SystemTime) -> Result<()> {
    File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.set_modified(modified))
        .context(|| format!("cannot set the times of {}", path.display()))
}

/// Sets the access and modification times of a file to those in `of`.
///
/// # Errors
/// Those of system calls.
pub fn set_times(file: &File, of: &Metadata) -> std::io::Result<()> {
    let times = FileTimes::new()
        .set_accessed(of.accessed()?)
        .set_modified(of.modified()?);
    file.set_times(times)
}
