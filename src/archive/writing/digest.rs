//! The sha256 of a disk, computed from the bytes that readers read.
//!
//! The thread that brings the next bytes in order hashes them, outside the lock. Others leave their
//! bytes and go on. Bytes too far ahead are dropped, and read again when the digest is needed.

use std::collections::BTreeMap;
use std::ops::Range;

use parking_lot::{Condvar, Mutex};
use sha2::{Digest as _, Sha256};

use crate::Result;

/// The most bytes that are kept ahead of their turn. (The kernel's read-ahead comes in several
/// requests at once, and compressing takes several frames at a time, in any order.)
const MOST_AHEAD: usize = 16 << 20;
/// Bytes read at a time when the digest has to catch up.
const CATCH_UP: u64 = 1 << 20;
/// Buffers that are kept for later pieces: a new one would be faulted in page by page.
const SPARE: usize = 4;

/// A digest in progress.
pub(super) struct DiskDigest {
    /// Bytes of the disk.
    len: u64,
    progress: Mutex<HashProgress>,
    /// Signalled when a thread stops hashing.
    stopped: Condvar,
    /// Held while the disk is read only to catch up, so that no two threads read the same bytes.
    catching_up: Mutex<()>,
}

struct HashProgress {
    /// None while a thread hashes.
    hasher: Option<Sha256>,
    /// Bytes of the disk that are hashed, or being hashed.
    hashed: u64,
    /// Pieces that came ahead, by their offset.
    ahead: BTreeMap<u64, Vec<u8>>,
    ahead_bytes: usize,
    spare: Vec<Vec<u8>>,
    finished: Option<[u8; 32]>,
}

impl DiskDigest {
    /// The digest of a disk of `len` bytes.
    pub(super) fn new(len: u64) -> DiskDigest {
        DiskDigest {
            len,
            progress: Mutex::new(HashProgress {
                hasher: Some(Sha256::new()),
                hashed: 0,
                ahead: BTreeMap::new(),
                ahead_bytes: 0,
                spare: Vec::new(),
                finished: None,
            }),
            stopped: Condvar::new(),
            catching_up: Mutex::new(()),
        }
    }

    /// The digest, once it is known.
    pub(super) fn finished(&self) -> Option<[u8; 32]> {
        self.progress.lock().finished
    }

    /// Sets the digest, known from before.
    pub(super) fn set(&self, digest: [u8; 32]) {
        let mut progress = self.progress.lock();
        progress.finished = Some(digest);
        progress.forget_pieces();
    }

    /// Returns whether more than this many bytes wait for a thread that hashes.
    pub(super) fn lags(&self, bytes: usize) -> bool {
        let progress = self.progress.lock();
        progress.hasher.is_none() && progress.ahead_bytes > bytes
    }

    /// Returns whether these bytes of the disk are neither hashed nor too far ahead to be kept.
    pub(super) fn wants(&self, range: Range<u64>) -> bool {
        let progress = self.progress.lock();
        let kept_up_to = progress.hashed.saturating_add(MOST_AHEAD as u64);
        progress.finished.is_none() && range.end > progress.hashed && range.end <= kept_up_to
    }

    /// Takes `bytes` of the disk, `at` bytes into it. If they are next, hashes them now, with all
    /// that follows and is here already; else later.
    pub(super) fn take(&self, at: u64, bytes: &[u8]) {
        let mut progress = self.progress.lock();
        if progress.finished.is_some() || bytes.is_empty() {
            return;
        }
        if at <= progress.hashed
            && let Some(hasher) = progress.hasher.take()
        {
            let known = usize::try_from(progress.hashed - at).unwrap_or(usize::MAX);
            let new = bytes.get(known..).unwrap_or_default();
            progress.hashed += new.len() as u64;
            drop(progress);
            self.hash(hasher, new);
        } else {
            progress.keep(at, bytes);
        }
    }

    /// Hashes `bytes`, which `hashed` counts already, and every piece that follows and is here.
    fn hash(&self, mut hasher: Sha256, bytes: &[u8]) {
        hasher.update(bytes);
        let mut done = Vec::new();
        loop {
            let mut progress = self.progress.lock();
            progress.reuse(std::mem::take(&mut done));
            match progress.next_piece() {
                Some((known, piece)) => {
                    drop(progress);
                    hasher.update(piece.get(known..).unwrap_or_default());
                    done = piece;
                }
                None => {
                    if progress.hashed == self.len && progress.finished.is_none() {
                        progress.finished = Some(hasher.finalize_reset().into());
                        progress.forget_pieces();
                    }
                    progress.hasher = Some(hasher);
                    self.stopped.notify_all();
                    return;
                }
            }
        }
    }

    /// Returns the digest. Bytes that did not come are read now by `read`, which fills a buffer
    /// with the disk's bytes from an offset on.
    ///
    /// # Errors
    /// Those of `read`.
    pub(super) fn complete(&self, read: impl Fn(u64, &mut [u8]) -> Result<()>) -> Result<[u8; 32]> {
        if let Some(digest) = self.finished() {
            return Ok(digest);
        }
        let _alone = self.catching_up.lock();
        let mut piece = vec![0; usize::try_from(self.len.min(CATCH_UP)).unwrap_or(0)];
        loop {
            // The lock is not held while reading: other threads go on, and what they read counts.
            let hashed = {
                let mut progress = self.progress.lock();
                while progress.finished.is_none() && progress.hasher.is_none() {
                    self.stopped.wait(&mut progress);
                }
                match progress.finished {
                    Some(digest) => return Ok(digest),
                    None => progress.hashed,
                }
            };
            let left = usize::try_from(self.len - hashed).unwrap_or(usize::MAX);
            let len = left.min(piece.len());
            let piece = piece.get_mut(..len).unwrap_or_default();
            read(hashed, piece)?;
            self.take(hashed, piece);
        }
    }
}

impl HashProgress {
    /// Keeps a piece for its turn, if there is room.
    fn keep(&mut self, at: u64, bytes: &[u8]) {
        let behind = at.saturating_add(bytes.len() as u64) <= self.hashed;
        if behind || self.ahead.contains_key(&at) {
            return;
        }
        // Earlier bytes are worth more: a reader may have looked at the end and gone.
        while self.ahead_bytes.saturating_add(bytes.len()) > MOST_AHEAD {
            match self.ahead.last_entry() {
                Some(last) if *last.key() > at => self.ahead_bytes -= last.remove().len(),
                _ => return,
            }
        }
        let mut piece = self.spare.pop().unwrap_or_default();
        piece.clear();
        piece.extend_from_slice(bytes);
        self.ahead_bytes += piece.len();
        self.ahead.insert(at, piece);
    }

    /// Returns the next piece, and how many of its bytes are hashed already. It counts as hashed
    /// from now on.
    fn next_piece(&mut self) -> Option<(usize, Vec<u8>)> {
        loop {
            let first = self.ahead.first_entry()?;
            if *first.key() > self.hashed {
                return None;
            }
            let (at, piece) = first.remove_entry();
            self.ahead_bytes -= piece.len();
            let known = usize::try_from(self.hashed - at).unwrap_or(usize::MAX);
            if known < piece.len() {
                self.hashed += (piece.len() - known) as u64;
                return Some((known, piece));
            }
            self.reuse(piece);
        }
    }

    fn reuse(&mut self, piece: Vec<u8>) {
        if piece.capacity() > 0 && self.spare.len() < SPARE && self.finished.is_none() {
            self.spare.push(piece);
        }
    }

    fn forget_pieces(&mut self) {
        self.ahead.clear();
        self.ahead_bytes = 0;
        self.spare = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 3 % 251) as u8).collect()
    }

    fn sha256(bytes: &[u8]) -> [u8; 32] {
        Sha256::digest(bytes).into()
    }

    #[test]
    fn pieces_in_any_order_twice_and_overlapping_give_the_digest_of_all() {
        let all = bytes(1 << 20);
        let digest = DiskDigest::new(all.len() as u64);
        let take = |from: usize, to: usize| digest.take(from as u64, &all[from..to]);
        take(1000, 5000);
        take(0, 10);
        take(4000, 300_000);
        take(1000, 5000);
        assert_eq!(digest.finished(), None);
        take(5, 1500);
        take(700_000, 1 << 20);
        take(0, 700_000);
        assert_eq!(digest.finished(), Some(sha256(&all)));
        take(0, 10);
        assert_eq!(digest.finished(), Some(sha256(&all)));
    }

    #[test]
    fn what_did_not_come_or_was_too_far_ahead_is_read_when_the_digest_is_needed() {
        let all = bytes(40 << 20);
        let digest = DiskDigest::new(all.len() as u64);
        for piece in (1..40).rev() {
            digest.take(piece << 20, &all[(piece as usize) << 20..][..1 << 20]);
        }
        let progress = digest.progress.lock();
        assert!(progress.ahead_bytes <= MOST_AHEAD);
        drop(progress);
        let read = |at: u64, buf: &mut [u8]| {
            buf.copy_from_slice(&all[at as usize..][..buf.len()]);
            Ok(())
        };
        assert_eq!(digest.complete(read).unwrap(), sha256(&all));
        assert_eq!(digest.progress.lock().ahead.len(), 0);
    }

    #[test]
    fn many_at_once_give_the_digest_of_all() {
        let all = bytes(24 << 20);
        let digest = DiskDigest::new(all.len() as u64);
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                let (digest, all) = (&digest, &all);
                scope.spawn(move || {
                    for piece in (thread..24).step_by(4) {
                        digest.take((piece << 20) as u64, &all[piece << 20..][..1 << 20]);
                    }
                });
            }
        });
        let read = |at: u64, buf: &mut [u8]| {
            buf.copy_from_slice(&all[at as usize..][..buf.len()]);
            Ok(())
        };
        assert_eq!(digest.complete(read).unwrap(), sha256(&all));
    }

    #[test]
    fn a_read_that_fails_is_told_and_can_be_tried_again() {
        let all = bytes(100_000);
        let digest = DiskDigest::new(all.len() as u64);
        let fails = |_: u64, _: &mut [u8]| Err(Error::damaged("broken"));
        assert!(digest.complete(fails).is_err());
        let read = |at: u64, buf: &mut [u8]| {
            buf.copy_from_slice(&all[at as usize..][..buf.len()]);
            Ok(())
        };
        assert_eq!(digest.complete(read).unwrap(), sha256(&all));
    }
}
