//! The files that images are: opened, told apart, read and stamped.

use crate::{Context, Error, Result};
use rustix::fs::{Timespec, Timestamps, UTIME_NOW};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The identity of a file, whatever its names: `(st_dev, st_ino)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct FileId {
    /// `st_dev`: the filesystem.
    pub dev: u64,
    /// `st_ino`: the inode in it.
    pub ino: u64,
}

impl FileId {
    /// Returns the identity of the file that `meta` describes.
    pub fn of(meta: &Metadata) -> FileId {
        FileId {
            dev: meta.dev(),
            ino: meta.ino(),
        }
    }

    /// Returns the identity of an open file; `path` is for messages. Errors: those of fstat.
    pub fn of_open(file: &File, path: &Path) -> Result<FileId> {
        let meta = file.metadata();
        let meta = meta.context(|| format!("cannot look at {}", path.display()))?;
        Ok(FileId::of(&meta))
    }

    /// Returns the identity of the file at `path`; a symlink is not followed. Errors: those of
    /// lstat.
    pub fn at(path: &Path) -> Result<FileId> {
        let meta = std::fs::symlink_metadata(path)
            .context(|| format!("cannot look at {}", path.display()))?;
        Ok(FileId::of(&meta))
    }
}

/// Opens an image. O_NONBLOCK, because opening a FIFO would hang. EINVAL if it is not a regular
/// file.
pub(super) fn open_image(path: &Path, writable: bool) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .context(|| format!("cannot open the image {}", path.display()))?;
    let meta = file
        .metadata()
        .context(|| format!("cannot look at the image {}", path.display()))?;
    if !meta.is_file() {
        return Err(Error::new(
            libc::EINVAL,
            format!("the image {} is not a regular file", path.display()),
        ));
    }
    Ok(file)
}

/// Fills `buf` from `offset` of `file`, with zeros past its end: qemu leaves the last cluster of an
/// image short.
pub(crate) fn read_zero_padded(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => {
                buf.fill(0);
                break;
            }
            Ok(n) => {
                buf = buf.get_mut(n..).unwrap_or_default();
                offset = offset.saturating_add(n as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The access and modification times of a file, to restore them after a write that leaves the
/// contents as they are.
///
/// std's `File::set_times` cannot name every timestamp that stat returns.
#[derive(Clone)]
pub(super) struct FileTimes(Timestamps);

impl FileTimes {
    /// Returns the times in `meta`.
    pub fn of(meta: &Metadata) -> FileTimes {
        FileTimes(Timestamps {
            last_access: Timespec {
                tv_sec: meta.atime(),
                tv_nsec: meta.atime_nsec(),
            },
            last_modification: Timespec {
                tv_sec: meta.mtime(),
                tv_nsec: meta.mtime_nsec(),
            },
        })
    }

    /// Returns the present time of whichever file system it is set on.
    pub fn now() -> FileTimes {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        FileTimes(Timestamps {
            last_access: now,
            last_modification: now,
        })
    }

    /// Sets the times of a file.
    ///
    /// # Errors
    /// Those of futimens(2).
    pub fn set(&self, file: &File) -> io::Result<()> {
        Ok(rustix::fs::futimens(file, &self.0)?)
    }
}
