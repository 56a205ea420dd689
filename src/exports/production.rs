//! A compressed archive being made, and those who wait for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::archive::{Export, Stream};
use crate::exports::plain::Contents;
use crate::exports::spool::Spool;
use crate::{Error, Result};

/// Archives made at a time: each takes all cores and its share of memory.
const MOST_AT_A_TIME: usize = 2;
/// How often those who wait are looked at: a killed one must not wait on.
pub(crate) const LOOKED_AT: Duration = Duration::from_millis(10);

/// What a compressed archive opened for reading is read from.
#[derive(Clone)]
pub enum Packed {
    /// The whole of it, in a file.
    Spooled(Arc<Spool>),
    /// Frames made as they are read.
    Streamed(Arc<Stream>),
}

impl Packed {
    /// Length of the archive in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Packed::Spooled(spool) => spool.size(),
            Packed::Streamed(stream) => stream.len(),
        }
    }

    /// Fills `buf` with the archive's bytes from `offset` on, completely unless it ends; returns how
    /// many bytes that are.
    ///
    /// # Errors
    /// EIO when the disk changed meanwhile.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match self {
            Packed::Streamed(stream) => stream.read_at(offset, buf),
            Packed::Spooled(spool) => spool.read_at(offset, buf),
        }
    }
}

/// A compressed archive that was opened, and what it is of.
pub struct OpenedCompressed {
    /// What to read from.
    pub packed: Packed,
    /// With the exact size of the compressed archive.
    pub contents: Contents,
    /// What it is made of; as long as that is kept, so is a copy of a running box's disk.
    pub export: Arc<Export>,
}

/// Somebody who waits for a compressed archive.
pub struct Waiter {
    /// Whether it is about to die, and must not wait on.
    pub is_dying: Box<dyn Fn() -> bool + Send>,
    /// Takes the answer.
    pub answer: Box<dyn FnOnce(Result<OpenedCompressed>) + Send>,
}

/// An archive being made, and who waits for it. None: it is done, or nobody did.
#[derive(Default)]
pub(crate) struct Production {
    pub waiters: Mutex<Option<Vec<Waiter>>>,
    pub closing: AtomicBool,
}

impl Production {
    /// Answers those who are about to die; false if nobody is left.
    pub fn goes_on(&self) -> bool {
        let mut waiters = self.waiters.lock();
        let Some(all) = waiters.as_mut() else {
            return false;
        };
        let closing = self.closing.load(Ordering::Relaxed);
        for gone in all.extract_if(.., |waiter| closing || (waiter.is_dying)()) {
            (gone.answer)(Err(Error::new(libc::EINTR, "interrupted while waiting")));
        }
        if all.is_empty() {
            *waiters = None;
        }
        waiters.is_some()
    }

    /// Waits along; gives the waiter back when it is over already.
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

/// At most so many at a time.
#[derive(Default)]
pub(crate) struct Turns {
    taken: Mutex<usize>,
    free: Condvar,
}

impl Turns {
    /// Waits for a turn; None once `go_on` says no.
    pub fn take(&self, go_on: &dyn Fn() -> bool) -> Option<Turn<'_>> {
        let mut taken = self.taken.lock();
        while *taken >= MOST_AT_A_TIME {
            let waited = self.free.wait_for(&mut taken, LOOKED_AT);
            if waited.timed_out() && !go_on() {
                return None;
            }
        }
        *taken += 1;
        Some(Turn(self))
    }
}

pub(crate) struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock() -= 1;
        self.0.free.notify_one();
    }
}
