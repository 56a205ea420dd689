//! What changes have left to be freed: in a large home, finding out that nothing needs a base any more
//! takes longer than anybody should wait for.

use std::collections::BTreeSet;
use std::thread::Thread;
use std::time::Instant;

use parking_lot::Mutex;

/// What is to be freed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freeable {
    /// Ids of the boxes whose references may be surplus.
    pub boxes: BTreeSet<String>,
    /// Ids of bases of removed boxes, which may go even if BoxLite made them.
    pub bases: BTreeSet<String>,
}

/// What is to be freed, and who does it.
#[derive(Default)]
pub struct Unfreed {
    left: Mutex<Option<(Freeable, Instant)>>,
    upkeep: Mutex<Option<Thread>>,
}

impl Unfreed {
    /// Adds a box whose references may be surplus.
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

    /// Adds what could not be freed yet, too.
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

    /// Returns since when something has been left; None if nothing is.
    pub fn since(&self) -> Option<Instant> {
        self.left.lock().as_ref().map(|(_, since)| *since)
    }

    /// Takes out what is left.
    pub fn take(&self) -> Option<Freeable> {
        self.left.lock().take().map(|(left, _)| left)
    }

    /// Has this thread woken when something is added.
    pub fn wake(&self, thread: Thread) {
        *self.upkeep.lock() = Some(thread);
    }
}
