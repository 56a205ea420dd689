//! Finds the data of a file by the file system's own map (FIEMAP).
//!
//! SEEK_DATA is not enough. It reports space that was allocated and never written (mke2fs leaves
//! such) as data while the kernel has pages of it. So what was read lately would decide what an
//! export contains.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOWR('f', 11, struct fiemap)` (linux/fs.h), as most machines encode it. Elsewhere the call
/// fails, and callers do without it.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b_u32 as libc::Ioctl;
/// Dirty pages are written first (linux/fiemap.h), so no extent is reported as unwritten that has
/// data.
const FLAG_SYNC: u32 = 1;
/// The extent was allocated and never written: zeros.
const EXTENT_UNWRITTEN: u32 = 0x800;
/// Extents asked for at once.
const EXTENTS: usize = 64;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FileExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for extents.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [FileExtent; EXTENTS],
}

/// Returns whether data is at `at` of `file`, or zeros that take no space, and for how many bytes
/// (1 to `max`) that goes on at least.
///
/// # Errors
/// Those of the file system: EOPNOTSUPP or ENOTTY where it has no such map.
pub(super) fn run_at(file: &File, at: u64, max: u64) -> io::Result<(bool, u64)> {
    let mut request = Request {
        start: at,
        length: max,
        flags: FLAG_SYNC,
        mapped: 0,
        count: EXTENTS as u32,
        reserved: 0,
        extents: [FileExtent::default(); EXTENTS],
    };
    map(file, &mut request)?;
    let count = usize::try_from(request.mapped).unwrap_or(EXTENTS);
    let extents = request.extents.get(..count).unwrap_or(&request.extents);
    Ok(first_run(extents, at, at.saturating_add(max)))
}

/// Returns the first run of one kind in `at..end`, of which these are the first extents, in order.
fn first_run(extents: &[FileExtent], at: u64, end: u64) -> (bool, u64) {
    let mut reached = at;
    let mut kind = None;
    for extent in extents {
        let start = extent.logical.clamp(reached, end);
        let stop = extent.logical.saturating_add(extent.length).min(end);
        for (is_data, until) in [(false, start), (extent.flags & EXTENT_UNWRITTEN == 0, stop)] {
            if until <= reached {
                continue;
            }
            if *kind.get_or_insert(is_data) != is_data {
                return (!is_data, reached - at);
            }
            reached = until;
        }
    }
    match kind {
        // There are more.
        Some(is_data) if is_data || extents.len() == EXTENTS => (is_data, reached - at),
        // After the last there is nothing.
        _ => (false, end - at),
    }
}

fn map(file: &File, request: &mut Request) -> io::Result<()> {
    // SAFETY: the descriptor is open, and `request` is a struct fiemap with room for as many
    // extents as `count` says.
    match unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut *request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(logical: u64, length: u64, flags: u32) -> FileExtent {
        FileExtent {
            logical,
            length,
            flags,
            ..FileExtent::default()
        }
    }

    #[test]
    fn extents_of_one_kind_are_one_run() {
        let unwritten = EXTENT_UNWRITTEN;
        for (extents, at, end, wanted) in [
            (vec![], 5, 50, (false, 45)),
            (vec![extent(0, 10, 0), extent(10, 10, 1)], 5, 50, (true, 15)),
            (vec![extent(0, 100, 0)], 5, 50, (true, 45)),
            (vec![extent(20, 10, 0)], 5, 50, (false, 15)),
            (vec![extent(0, 10, unwritten)], 5, 50, (false, 45)),
            (
                vec![
                    extent(0, 10, unwritten),
                    extent(20, 9, unwritten),
                    extent(30, 9, 0),
                ],
                5,
                50,
                (false, 25),
            ),
            (
                vec![extent(0, 10, 0), extent(10, 10, unwritten)],
                5,
                50,
                (true, 5),
            ),
            (vec![extent(0, 10, 0), extent(20, 10, 0)], 5, 50, (true, 5)),
        ] {
            assert_eq!(first_run(&extents, at, end), wanted);
        }
        let many: Vec<FileExtent> = (0..EXTENTS as u64)
            .map(|n| extent(2 * n, 2, unwritten))
            .collect();
        assert_eq!(first_run(&many, 0, 1 << 20), (false, 2 * EXTENTS as u64));
    }
}
