//! The production of a compressed archive, and its waiters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::archive::{Export, Stream};
use crate::exports::plain::Contents;
use crate::exports::spool::Spool;
use crate::{Error, Result};

/// Most productions at a time. Each uses all cores, and memory for each of its threads.
const MOST_AT_A_TIME: usize = 2;
/// How often to check whether a waiter is dying: a killed process must not wait on.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Returns the error for a waiter that is dying, or whose mount ends.
pub(crate) fn interrupted() -> Error {
    Error::new(libc::EINTR, "interrupted while waiting")
}

/// Where the bytes of an open compressed archive come from.
#[derive(Clone)]
pub enum Packed {
    /// A file with the whole archive.
    Spooled(Arc<Spool>),
    /// Frames made as they are read.
    Streamed(Arc<Stream>),
}

impl Packed {
    /// Returns the length of the archive in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Packed::Spooled(spool) => spool.size(),
            Packed::Streamed(stream) => stream.len(),
        }
    }

    /// Reads the archive's bytes from `offset` on into `buf`. Fills `buf`, unless the archive ends.
    /// Returns the number of bytes read.
    ///
    /// # Errors
    /// EIO when the disk changed meanwhile; those of reading a spool's file.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match self {
            Packed::Streamed(stream) => stream.read_at(offset, buf),
            Packed::Spooled(spool) => spool.read_at(offset, buf),
        }
    }
}

/// An open compressed archive.
pub struct OpenedCompressed {
    /// Where its bytes come from.
    pub packed: Packed,
    /// Its contents, with its exact size.
    pub contents: Contents,
    /// The plain archive it is made of. It holds a copy of a running box's disk open.
    pub export: Arc<Export>,
}

/// A caller that waits for a compressed archive.
pub struct Waiter {
    /// Returns whether the caller is about to die: then it is answered with EINTR.
    pub is_dying: Box<dyn Fn() -> bool + Send>,
    /// Takes the answer.
    pub answer: Box<dyn FnOnce(Result<OpenedCompressed>) + Send>,
}

/// A compressed archive being made.
#[derive(Default)]
pub(crate) struct Production {
    /// Callers that wait for it. None once it has ended, or all callers have died.
    pub waiters: Mutex<Option<Vec<Waiter>>>,
    /// Whether the mount ends, and the production with it.
    pub closing: AtomicBool,
}

impl Production {
    /// Answers the waiters that are dying, or all if the mount ends. Returns whether any are left;
    /// without waiters the production ends.
    pub fn goes_on(&self) -> bool {
        let mut waiters = self.waiters.lock();
        let Some(all) = waiters.as_mut() else {
            return false;
        };
        let closing = self.closing.load(Ordering::Relaxed);
        for waiter in all.extract_if(.., |waiter| closing || (waiter.is_dying)()) {
            (waiter.answer)(Err(interrupted()));
        }
        if all.is_empty() {
            *waiters = None;
        }
        waiters.is_some()
    }

    /// Adds a waiter.
    ///
    /// # Errors
    /// Returns the waiter if the production has ended.
    pub fn join(&self, waiter: Waiter) -> std::result::Result<(), Waiter> {
        match self.waiters.lock().as_mut() {
            Some(waiters) => {
                waiters.push(waiter);
                Ok(())
            }
            None => Err(waiter),
        }
    }
}

/// Limits how many productions run at a time.
#[derive(Default)]
pub(crate) struct Turns {
    taken: Mutex<usize>,
    free: Condvar,
}

impl Turns {
    /// Waits for a turn. Returns None once `go_on` returns false.
    pub fn take(&self, go_on: &dyn Fn() -> bool) -> Option<Turn<'_>> {
        let mut taken = self.taken.lock();
        while *taken >= MOST_AT_A_TIME {
            let waited = self.free.wait_for(&mut taken, POLL_INTERVAL);
            if waited.timed_out() && !go_on() {
                return None;
            }
        }
        *taken += 1;
        Some(Turn(self))
    }
}

/// The right to run a production, until it is dropped.
pub(crate) struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock() -= 1;
        self.0.free.notify_one();
    }
}
