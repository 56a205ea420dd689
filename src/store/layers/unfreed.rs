//! Bases that changes have left for later. In a large home, it takes too long to find out during a
//! change whether a base is still needed.

use std::collections::BTreeSet;
use std::thread::Thread;
use std::time::Instant;

use parking_lot::Mutex;

/// What may have become free.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freeable {
    /// Ids of the boxes that may refer to bases which they no longer need.
    pub boxes: BTreeSet<String>,
    /// Ids of bases of removed boxes, which may go even if BoxLite made them.
    pub bases: BTreeSet<String>,
}

/// What may have become free, and the thread that frees it.
#[derive(Default)]
pub struct Unfreed {
    left: Mutex<Option<(Freeable, Instant)>>,
    upkeep: Mutex<Option<Thread>>,
}

impl Unfreed {
    /// Adds a box that may refer to bases which it no longer needs.
    pub fn add_box(&self, box_id: &str) {
        self.add(Freeable {
            boxes: BTreeSet::from([box_id.to_owned()]),
            bases: BTreeSet::new(),
        });
    }

    /// Adds the bases of a box that was removed.
    pub fn add_bases(&self, bases: &BTreeSet<String>) {
        self.add(Freeable {
            boxes: BTreeSet::new(),
            bases: bases.clone(),
        });
    }

    /// Adds what could not be freed yet, and wakes the thread.
    pub fn add(&self, more: Freeable) {
        let mut left = self.left.lock();
        let (known, _) = left.get_or_insert_with(|| (Freeable::default(), Instant::now()));
        known.boxes.extend(more.boxes);
        known.bases.extend(more.bases);
        drop(left);
        if let Some(thread) = &*self.upkeep.lock() {
            thread.unpark();
        }
    }

    /// Returns when the oldest entry was added; None if there is none.
    pub fn since(&self) -> Option<Instant> {
        self.left.lock().as_ref().map(|(_, since)| *since)
    }

    /// Takes everything out.
    pub fn take(&self) -> Option<Freeable> {
        self.left.lock().take().map(|(left, _)| left)
    }

    /// Sets the thread to wake when something is added.
    pub fn wake(&self, thread: Thread) {
        *self.upkeep.lock() = Some(thread);
    }
}
