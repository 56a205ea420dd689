//! A finished compressed archive in an unnamed file.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::archive::FrameKey;
use crate::{Context, Result};

/// Where the frames of an archive lie, by key. They take some 60 bytes of memory for 2 MiB of disk.
pub(crate) type FramePlaces = HashMap<FrameKey, FramePlace>;

/// Where a frame lies in a spool.
pub(crate) struct FramePlace {
    start: u64,
    len: u32,
    /// A hash of its bytes. The spool is never flushed, so the kernel may lose what the disk did
    /// not take, and tell nobody.
    hash: blake3::Hash,
}

impl FramePlace {
    /// Returns the place of a frame with these bytes, `start` bytes into the archive. None for one
    /// of 4 GiB or more.
    pub fn of(start: u64, bytes: &[u8]) -> Option<FramePlace> {
        Some(FramePlace {
            start,
            len: u32::try_from(bytes.len()).ok()?,
            hash: blake3::hash(bytes),
        })
    }
}

/// A finished compressed archive in an unnamed file. Dropping it frees the space.
pub struct Spool {
    file: File,
    size: u64,
    number: u64,
    frames: FramePlaces,
}

impl Spool {
    /// Returns a spool of a file that holds a whole archive of `size` bytes, with its `frames`.
    pub(crate) fn new(file: File, size: u64, frames: FramePlaces) -> Spool {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Spool {
            file,
            size,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            frames,
        }
    }

    /// Returns the file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the length of the archive in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns a number that no other spool of this process has.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Reads bytes from `offset` on into `buf`. Fills `buf`, unless the archive ends. Returns the
    /// number of bytes read.
    ///
    /// # Errors
    /// Those of reading the file.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        let buf = buf.get_mut(..len).unwrap_or_default();
        self.file
            .read_exact_at(buf, offset)
            .context(|| "cannot read the compressed archive back")?;
        Ok(len)
    }

    /// Replaces the contents of `bytes` by the frame with this key. Returns false if the archive
    /// has none, or it does not come back as it was written.
    pub(crate) fn find(&self, key: &FrameKey, bytes: &mut Vec<u8>) -> bool {
        let Some(place) = self.frames.get(key) else {
            return false;
        };
        bytes.resize(place.len as usize, 0);
        let is_read = match self.read_at(place.start, bytes) {
            Ok(_) => blake3::hash(bytes) == place.hash,
            Err(_) => false,
        };
        if !is_read {
            log::warn!("a compressed archive that was kept is damaged; a part of it is made again");
        }
        is_read
    }
}
