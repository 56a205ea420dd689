//! Sharing blocks between files, as btrfs and xfs can.

use std::fs::File;
use std::os::fd::AsRawFd;

/// `struct file_clone_range` (linux/fs.h).
#[repr(C)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    from_length: u64,
    to_offset: u64,
}

/// `_IOW(0x94, 13, struct file_clone_range)` (linux/fs.h), as most machines encode it. Elsewhere
/// the call fails, and callers do without it.
const FICLONERANGE: libc::Ioctl = 0x4020_940d_u32 as libc::Ioctl;

/// Makes two files share blocks, as btrfs and xfs can.
pub(super) fn clone_range(
    from: &File,
    from_offset: u64,
    from_length: u64,
    to: &File,
    to_offset: u64,
) -> std::io::Result<()> {
    let request = CloneRange {
        from: i64::from(from.as_raw_fd()),
        from_offset,
        from_length,
        to_offset,
    };
    // SAFETY: both descriptors are open, and `request` is a struct file_clone_range, which is only
    // read.
    match unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE, &raw const request) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Makes an empty file share all blocks of another, as btrfs and xfs can; false if the file system
/// can't.
pub fn share_contents(from: &File, to: &File) -> bool {
    // A length of 0 reaches to the end.
    clone_range(from, 0, 0, to, 0).is_ok()
}
