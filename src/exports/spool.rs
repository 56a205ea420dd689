//! A finished compressed archive in an unnamed file.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::archive::FrameKey;
use crate::{Context, Result};

/// Where the frames of an archive lie: offset and length, by key. 32 bytes for 2 MiB of disk.
pub(crate) type FramePlaces = HashMap<FrameKey, (u64, u32)>;

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

    /// Replaces the contents of `bytes` by the frame with this key. Returns false if the archive has
    /// none, or it can't be read.
    pub(crate) fn find(&self, key: &FrameKey, bytes: &mut Vec<u8>) -> bool {
        let Some((start, len)) = self.frames.get(key) else {
            return false;
        };
        bytes.resize(*len as usize, 0);
        let read = self.read_at(*start, bytes);
        if let Err(error) = &read {
            log::info!("a frame is compressed again: {error}");
        }
        read.is_ok()
    }
}
