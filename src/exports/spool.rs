//! A finished compressed archive in a file without a name.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Context, Result};

/// A finished archive in a file without a name.
pub struct Spool {
    file: File,
    size: u64,
    number: u64,
}

impl Spool {
    /// Returns the spool that a file of this length is.
    pub(crate) fn new(file: File, size: u64) -> Spool {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Spool {
            file,
            size,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A number no other spool of this process has.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Fills `buf` from `offset` on, completely unless the archive ends; returns how much that is.
    ///
    /// # Errors
    /// Those of reading.
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
