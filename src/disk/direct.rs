//! Writes past the page cache. A disk that was just written is not read soon; through the cache,
//! its bytes would be copied once more and push others out.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// The alignment of offsets, lengths and memory that O_DIRECT takes on every common file system
/// (statx's `stx_dio_offset_align` is at most a page). Where it needs more, writes go through the
/// cache.
pub const BLOCK: usize = 4096;

/// A second descriptor of a file, opened with O_DIRECT if the file system supports that.
pub struct Direct(Option<File>);

impl Direct {
    /// Opens one for a file that is open for writing, whatever its name.
    pub fn of(file: &File) -> Direct {
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let options = File::options()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(own);
        Direct(options.ok())
    }

    /// Does without direct I/O, whatever the file system supports.
    pub fn none() -> Direct {
        Direct(None)
    }

    /// Returns whether writes go to the disk at once.
    pub fn is_direct(&self) -> bool {
        self.0.is_some()
    }

    /// Writes bytes at an offset of `file`, which this was opened for: whole blocks directly where
    /// offset and memory allow, the rest through the page cache. In both cases the file has to be
    /// flushed at the end.
    ///
    /// # Errors
    /// Those of pwrite(2).
    pub fn write_all_at(&mut self, file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        let Some(direct) = &self.0 else {
            return file.write_all_at(bytes, at);
        };
        let (blocks, tail) = bytes.split_at(bytes.len() - bytes.len() % BLOCK);
        let is_aligned =
            at.is_multiple_of(BLOCK as u64) && blocks.as_ptr().align_offset(BLOCK) == 0;
        if !is_aligned {
            return file.write_all_at(bytes, at);
        }
        match direct.write_all_at(blocks, at) {
            // The file system needs another alignment.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                self.0 = None;
                return file.write_all_at(bytes, at);
            }
            other => other?,
        }
        file.write_all_at(tail, at + blocks.len() as u64)
    }
}

/// Memory of a fixed length that begins at an address O_DIRECT takes.
pub struct Aligned {
    memory: Vec<u8>,
    /// Where in `memory` the aligned part begins.
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Aligned {
        // Never grown, so that it stays where it is.
        let memory = vec![0; len.saturating_add(BLOCK)];
        // Without an aligned place, writes would go through the cache.
        let start = memory.as_ptr().align_offset(BLOCK).min(BLOCK);
        Aligned { memory, start, len }
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        self.memory
            .get(self.start..self.start + self.len)
            .unwrap_or_default()
    }

    /// All of it, to be written to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory
            .get_mut(self.start..self.start + self.len)
            .unwrap_or_default()
    }
}

/// Asks the kernel to begin writing these bytes of a file to the disk, and does not wait. Only
/// speed depends on it: the flush at the end finds what fails here.
pub fn begin_write_back(file: &File, range: Range<u64>) {
    let offset = i64::try_from(range.start).unwrap_or(i64::MAX);
    let length = i64::try_from(range.end - range.start).unwrap_or(0);
    // SAFETY: the descriptor is open; no memory is passed.
    unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            offset,
            length,
            libc::SYNC_FILE_RANGE_WRITE,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_are_written_whatever_the_alignment_and_the_file_system() {
        for place in [std::env::temp_dir(), "/dev/shm".into()] {
            let dir = tempfile::tempdir_in(place).unwrap();
            let path = dir.path().join("file");
            let mut memory = Aligned::zeros(5 * BLOCK);
            for (n, byte) in memory.bytes_mut().iter_mut().enumerate() {
                *byte = (n % 251) as u8 + 1;
            }
            for (shift, at, len) in [
                (0, 0, 5 * BLOCK),
                (0, 2 * BLOCK, 3 * BLOCK + 77),
                (0, 0, 100),
                (1, 0, 4 * BLOCK),
                (0, 513, 4 * BLOCK),
            ] {
                for mut direct in [Direct::of(&File::create(&path).unwrap()), Direct::none()] {
                    let file = File::create(&path).unwrap();
                    let bytes = &memory.bytes()[shift..shift + len];
                    direct.write_all_at(&file, bytes, at as u64).unwrap();
                    let written = std::fs::read(&path).unwrap();
                    assert!(written[..at].iter().all(|byte| *byte == 0));
                    assert!(written[at..] == *bytes, "{shift} {at} {len}");
                }
            }
        }
    }
}
