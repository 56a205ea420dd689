//! The file a disk is unpacked into: hashed as the archive has it, stored with holes for zeros.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Context, Error, Result};

/// Zeros are left out in aligned blocks of this many bytes: a page, the block of most file systems.
const BLOCK: usize = 4096;
/// Zeros to hash and to compare with.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Written bytes after which the kernel is asked to begin writing back: it then works while more
/// arrives, and the flush in the write that completes the archive finds little left.
const WRITE_BACK: u64 = 8 << 20;
/// No disk is larger: 64 TiB, as for the virtual size.
const MAX_LENGTH: u64 = 64 << 40;
/// A sparse disk may expand to this many times the free space: hashing its zeros takes time.
const MAX_EXPANSION: u64 = 1024;
/// … but at least to that many times 1 GiB.
const MIN_EXPANSION_BASE: u64 = 1 << 30;

/// The file, its digest so far, and the block that is not whole yet.
pub(super) struct DiskFile {
    path: PathBuf,
    file: File,
    sha256: Sha256,
    /// Bytes of the block at `at` that have come; fewer than [`BLOCK`].
    partial: Vec<u8>,
    /// Bytes of whole blocks so far.
    at: u64,
    /// Where writing back was last begun.
    written_back: u64,
}

impl DiskFile {
    pub(super) fn create(path: &Path) -> Result<DiskFile> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .context(|| format!("cannot create {} for the disk", path.display()))?;
        Ok(DiskFile {
            path: path.to_owned(),
            file,
            sha256: Sha256::new(),
            partial: Vec::with_capacity(BLOCK),
            at: 0,
            written_back: 0,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses a disk that can't fit before any of it is written: `stored` bytes are in the archive,
    /// which expand to `expanded`.
    pub(super) fn check_room(&self, stored: u64, expanded: u64) -> Result<()> {
        let free = free_space(&self.file)
            .context(|| format!("cannot tell the free space for {}", self.path.display()))?;
        if expanded > MAX_LENGTH {
            return Err(Error::bad_archive(format!(
                "the archive is refused: its disk.qcow2 of {expanded} bytes is over 64 TiB"
            )));
        }
        if stored > free {
            return Err(Error::new(
                libc::ENOSPC,
                format!(
                    "the archive's disk.qcow2 has {stored} bytes, but only {free} are free; make room and copy it again"
                ),
            ));
        }
        if expanded > free.max(MIN_EXPANSION_BASE).saturating_mul(MAX_EXPANSION) {
            return Err(Error::new(
                libc::ENOSPC,
                format!(
                    "the archive's sparse disk.qcow2 expands to {expanded} bytes, over {MAX_EXPANSION} times the {free} that are free"
                ),
            ));
        }
        Ok(())
    }

    /// Appends data.
    pub(super) fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.sha256.update(bytes);
        self.store(bytes)
    }

    /// Appends `count` zeros.
    pub(super) fn zeros(&mut self, mut count: u64) -> Result<()> {
        while count > 0 {
            let some = zeros(count);
            self.data(some)?;
            count = count.saturating_sub(some.len() as u64);
        }
        Ok(())
    }

    /// Stores the last block, sets the length and returns the digest of the whole disk.
    pub(super) fn end(&mut self) -> Result<[u8; 32]> {
        let last = std::mem::take(&mut self.partial);
        if !is_zero(&last) {
            self.put(&last, self.at)?;
        }
        let length = self.at.saturating_add(last.len() as u64);
        self.file
            .set_len(length)
            .map_err(|e| unwritable(&self.path, e))?;
        Ok(self.sha256.finalize_reset().into())
    }

    /// Makes the disk survive a power cut. Its directory entry is the caller's to keep.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| unwritable(&self.path, e))
    }

    fn store(&mut self, mut bytes: &[u8]) -> Result<()> {
        if !self.partial.is_empty() {
            let (head, rest) = bytes.split_at(bytes.len().min(BLOCK - self.partial.len()));
            self.partial.extend_from_slice(head);
            bytes = rest;
            if self.partial.len() < BLOCK {
                return Ok(());
            }
            let block = std::mem::take(&mut self.partial);
            self.store_blocks(&block)?;
            self.partial = block;
            self.partial.clear();
        }
        let (blocks, rest) = bytes.split_at(bytes.len() - bytes.len() % BLOCK);
        self.store_blocks(blocks)?;
        self.partial.extend_from_slice(rest);
        Ok(())
    }

    /// Writes whole blocks, those next to each other at once, and leaves zeros out.
    fn store_blocks(&mut self, blocks: &[u8]) -> Result<()> {
        let mut at = self.at;
        for run in blocks
            .as_chunks::<BLOCK>()
            .0
            .chunk_by(|a, b| is_zero(a) == is_zero(b))
        {
            let run = run.as_flattened();
            if !run
                .first_chunk::<BLOCK>()
                .is_some_and(|block| is_zero(block))
            {
                self.put(run, at)?;
            }
            at = at.saturating_add(run.len() as u64);
        }
        self.at = at;
        if at.saturating_sub(self.written_back) >= WRITE_BACK {
            begin_write_back(&self.file, self.written_back, at);
            self.written_back = at;
        }
        Ok(())
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file
            .write_all_at(bytes, at)
            .map_err(|e| unwritable(&self.path, e))
    }
}

/// Asks the kernel to begin writing a range back. Only speed depends on it: what fails here is found
/// by the flush.
fn begin_write_back(file: &File, start: u64, end: u64) {
    let (Ok(start), Ok(length)) = (
        i64::try_from(start),
        i64::try_from(end.saturating_sub(start)),
    ) else {
        return;
    };
    // SAFETY: sync_file_range takes a descriptor, which `file` keeps open, and integers; std has no
    // call for it.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), start, length, libc::SYNC_FILE_RANGE_WRITE);
    }
}

fn unwritable(path: &Path, cause: std::io::Error) -> Error {
    Error::io(
        format!("cannot write the archive's disk to {}", path.display()),
        cause,
    )
}

/// At most `count` zeros.
fn zeros(count: u64) -> &'static [u8] {
    let len = usize::try_from(count).unwrap_or(usize::MAX);
    ZEROS.get(..len).unwrap_or(&ZEROS)
}

fn is_zero(bytes: &[u8]) -> bool {
    ZEROS.get(..bytes.len()) == Some(bytes)
}

/// Whether all of `bytes` are zeros, however many.
pub(super) fn all_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(is_zero)
}

/// Bytes a user without privileges may still write to the file system of `file`.
fn free_space(file: &File) -> std::io::Result<u64> {
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the descriptor is open and `stat` has room for what fstatvfs fills in.
    let stat = unsafe {
        if libc::fstatvfs(file.as_raw_fd(), stat.as_mut_ptr()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        stat.assume_init()
    };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
