//! A finished compressed archive in an unnamed file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Context, Result};

/// A finished compressed archive in an unnamed file. Dropping it frees the space.
pub struct Spool {
    file: File,
    size: u64,
    number: u64,
}

impl Spool {
    /// Returns a spool of a file that holds a whole archive of `size` bytes.
    pub(crate) fn new(file: File, size: u64) -> Spool {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Spool {
            file,
            size,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
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
}
