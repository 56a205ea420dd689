//! Space on the home's file system.

use super::Home;
use crate::{Context, Result};

/// Space on the file system the home is on.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Bytes in a block.
    pub block_size: u32,
    /// All blocks.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Free blocks for users that are not root.
    pub available: u64,
    /// All inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
}

impl Space {
    /// Returns the space on a home's file system.
    ///
    /// # Errors
    /// Those of statvfs.
    pub fn of(home: &Home) -> Result<Space> {
        let root = home.root();
        let found = rustix::fs::statvfs(root)
            .map_err(std::io::Error::from)
            .context(|| format!("cannot look at {}", root.display()))?;
        Ok(Space {
            block_size: u32::try_from(found.f_frsize).unwrap_or(4096),
            blocks: found.f_blocks,
            free: found.f_bfree,
            available: found.f_bavail,
            files: found.f_files,
            files_free: found.f_ffree,
        })
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size.into())
    }

    /// Bytes that are free for users that are not root.
    pub fn available_bytes(&self) -> u64 {
        self.available.saturating_mul(self.block_size.into())
    }
}
