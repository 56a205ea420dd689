//! The guest's disk as file systems read it: a part of a chain, in pieces that are kept for a
//! while.

use super::name_cache::NameCache;
use crate::disk::Chain;
use crate::{Error, Result};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that are read and kept together. Large enough to read the inodes of a directory's files,
/// which are adjacent, at once; small enough that a single inode costs little.
const PIECE: usize = 64 << 10;
/// The most bytes of structures (inodes, directories, block maps) kept for all disks together.
const METADATA: u64 = 28 << 20;
/// The most bytes of files' contents kept for all disks together. The kernel caches contents
/// itself; this is for small files that share a piece.
const CONTENTS: u64 = 4 << 20;

/// What is read: contents that stream by must not push out structures.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Structures of the file system.
    Metadata,
    /// Contents of files.
    Contents,
}

/// The caches of all guests' disks: one bound for all of them, however many are open.
pub struct Caches {
    /// The next disk or file system gets this number.
    next: AtomicU64,
    metadata: Pieces,
    contents: Pieces,
    pub(super) names: NameCache,
}

/// By disk, and place in it.
type Pieces = Cache<(u64, u64), Arc<[u8]>, ByLength>;

#[derive(Clone)]
struct ByLength;

impl Weighter<(u64, u64), Arc<[u8]>> for ByLength {
    fn weight(&self, _: &(u64, u64), piece: &Arc<[u8]>) -> u64 {
        piece.len() as u64
    }
}

impl Default for Caches {
    fn default() -> Self {
        let pieces = |bytes: u64| Pieces::with_weighter(bytes as usize / PIECE, bytes, ByLength);
        Caches {
            next: AtomicU64::new(0),
            metadata: pieces(METADATA),
            contents: pieces(CONTENTS),
            names: NameCache::new(),
        }
    }
}

impl Caches {
    /// Returns a number that nothing in the caches has.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// A chain that is read through the caches.
pub(super) struct Disk {
    chain: Arc<Chain>,
    number: u64,
    caches: Arc<Caches>,
}

impl Disk {
    /// The disk that `chain` makes.
    pub fn new(chain: Arc<Chain>, caches: Arc<Caches>) -> Disk {
        Disk {
            chain,
            number: caches.number(),
            caches,
        }
    }

    /// What was read lately.
    pub fn caches(&self) -> &Arc<Caches> {
        &self.caches
    }

    /// What the disk is read from.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.chain.virtual_size()
    }

    /// Fills `buf` from `at` on. Long reads go straight into it, others through pieces.
    fn read(&self, what: Use, mut at: u64, mut buf: &mut [u8]) -> Result<()> {
        if buf.len() >= PIECE {
            return self.chain.read_at(at, buf);
        }
        while !buf.is_empty() {
            let piece = self.piece(what, at / PIECE as u64)?;
            let within = (at % PIECE as u64) as usize;
            let bytes = piece.get(within..).unwrap_or_default();
            let (now, later) = buf.split_at_mut(bytes.len().min(buf.len()));
            now.copy_from_slice(bytes.get(..now.len()).unwrap_or_default());
            at += now.len() as u64;
            buf = later;
        }
        Ok(())
    }

    /// Returns a piece, from the cache or read now. Concurrent callers read it once.
    fn piece(&self, what: Use, number: u64) -> Result<Arc<[u8]>> {
        let pieces = match what {
            Use::Metadata => &self.caches.metadata,
            Use::Contents => &self.caches.contents,
        };
        pieces.get_or_insert_with(&(self.number, number), || {
            let mut bytes = vec![0; PIECE];
            self.chain
                .read_at(number.saturating_mul(PIECE as u64), &mut bytes)?;
            Ok(bytes.into())
        })
    }
}

/// The part of a disk that a file system is in.
pub(super) struct Volume {
    disk: Arc<Disk>,
    start: u64,
    len: u64,
    name: String,
}

impl Volume {
    /// The `len` bytes from `start` on, as far as the disk reaches; `name` is its name in messages.
    pub fn new(disk: Arc<Disk>, start: u64, len: u64, name: String) -> Volume {
        let len = len.min(disk.len().saturating_sub(start));
        Volume {
            disk,
            start,
            len,
            name,
        }
    }

    /// What was read lately.
    pub fn caches(&self) -> &Arc<Caches> {
        self.disk.caches()
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Fills `buf` from `at` on. EIO for what reaches past its end.
    pub fn read(&self, what: Use, at: u64, buf: &mut [u8]) -> Result<()> {
        match at.checked_add(buf.len() as u64) {
            Some(end) if end <= self.len => self.disk.read(what, self.start + at, buf),
            _ => Err(Error::damaged(format!(
                "{} ends at byte {}, and byte {at} was to be read: is it cut short?",
                self.name, self.len
            ))),
        }
    }

    /// Fills `buf` from `at` on, with zeros past the end.
    pub fn peek(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        buf.fill(0);
        let there = self.len.saturating_sub(at).min(buf.len() as u64) as usize;
        match buf.get_mut(..there) {
            Some(there) if !there.is_empty() => self.read(Use::Metadata, at, there),
            _ => Ok(()),
        }
    }
}
