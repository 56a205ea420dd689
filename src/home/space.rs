//! How much room there is on the home's file system.

use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

use super::Home;
use crate::{Context, Error, Result};

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
    /// Bytes of all blocks.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size.into())
    }

    /// Bytes that are free for users that are not root.
    pub fn available_bytes(&self) -> u64 {
        self.available.saturating_mul(self.block_size.into())
    }
}

impl Home {
    /// Space on the file system it is on.
    ///
    /// # Errors
    /// What statvfs says.
    pub fn space(&self) -> Result<Space> {
        let root = self.root();
        let path = std::ffi::CString::new(root.as_os_str().as_bytes())
            .map_err(|_| Error::damaged("the home's path has a NUL"))?;
        let found = statvfs(&path).context(|| format!("cannot look at {}", root.display()))?;
        Ok(Space {
            block_size: u32::try_from(found.f_frsize).unwrap_or(4096),
            blocks: found.f_blocks,
            free: found.f_bfree,
            available: found.f_bavail,
            files: found.f_files,
            files_free: found.f_ffree,
        })
    }
}

fn statvfs(path: &std::ffi::CStr) -> std::io::Result<libc::statvfs> {
    let mut found = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends with a NUL and `found` has room for what is written; it is read only
    // after success.
    unsafe {
        match libc::statvfs(path.as_ptr(), found.as_mut_ptr()) {
            0 => Ok(found.assume_init()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}
