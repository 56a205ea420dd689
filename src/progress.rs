//! The operations under way: each export, import and merge, and its progress. They are for display
//! only: nothing waits for them, and they wait for nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::files::priority::is_upkeep;

/// All operations under way.
#[derive(Default)]
pub struct Operations {
    /// By number, which is the order in which they began.
    running: Mutex<BTreeMap<u64, Arc<Running>>>,
    next: AtomicU64,
}

/// An operation under way. Dropping it ends the operation.
pub struct Operation {
    all: Arc<Operations>,
    number: u64,
    running: Arc<Running>,
}

/// The description and the progress of an operation.
pub struct Running {
    /// A short description, such as `export of box web`.
    pub what: String,
    /// When the operation began.
    pub since: SystemTime,
    done: AtomicU64,
    /// 0 means unknown.
    total: AtomicU64,
}

impl Running {
    /// Returns the bytes processed so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Returns the bytes to process, if known.
    pub fn total(&self) -> Option<u64> {
        Some(self.total.load(Ordering::Relaxed)).filter(|total| *total > 0)
    }

    /// Returns the progress in percent, 0 to 100, if the total is known.
    pub fn percent(&self) -> Option<f64> {
        let total = self.total()?;
        let permille = u128::from(self.done().min(total)) * 1000 / u128::from(total);
        Some(f64::from(u16::try_from(permille).unwrap_or(1000)) / 10.0)
    }
}

impl Operations {
    /// Begins an operation of `total` bytes, if known. It is listed from its first byte on: many
    /// files are opened only to be inspected.
    pub fn begin(self: &Arc<Self>, what: String, total: Option<u64>) -> Operation {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let running = Arc::new(Running {
            what,
            since: SystemTime::now(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(total.unwrap_or(0)),
        });
        self.running.lock().insert(number, running.clone());
        Operation {
            all: self.clone(),
            number,
            running,
        }
    }

    /// Returns the operations that have processed a byte, in the order in which they began.
    pub fn running(&self) -> Vec<Arc<Running>> {
        let running = self.running.lock();
        running
            .values()
            .filter(|it| it.done() > 0)
            .cloned()
            .collect()
    }
}

impl Operation {
    /// Adds to the bytes processed.
    pub fn advance(&self, bytes: u64) {
        self.running.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts all bytes up to `end` as processed. This is an estimate: readers and writers may
    /// seek.
    pub fn reaches(&self, end: u64) {
        self.running.done.fetch_max(end, Ordering::Relaxed);
    }

    /// Sets the total of bytes to process.
    pub fn set_total(&self, bytes: u64) {
        self.running.total.store(bytes, Ordering::Relaxed);
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.all.running.lock().remove(&self.number);
    }
}

/// The activity of users in this mount, for which upkeep waits.
#[derive(Default)]
pub struct Foreground {
    under_way: AtomicUsize,
    last: Mutex<Option<Instant>>,
}

/// An activity. Dropping it ends the activity.
pub struct UnderWay(Arc<Foreground>);

impl Foreground {
    /// Records activity at this moment. Upkeep does not count.
    pub fn touch(&self) {
        if !is_upkeep() {
            *self.last.lock() = Some(Instant::now());
        }
    }

    /// Begins an activity.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(self.clone())
    }

    /// Returns whether nothing is under way and nothing was for the time `idle`.
    pub(crate) fn is_quiet(&self, idle: Duration) -> bool {
        let last = *self.last.lock();
        self.under_way.load(Ordering::Relaxed) == 0 && last.is_none_or(|at| at.elapsed() >= idle)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.touch();
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_listed_from_its_first_byte_until_it_ends() {
        let operations = Arc::<Operations>::default();
        let export = operations.begin("export of box web".into(), Some(1000));
        let import = operations.begin("import of box new".into(), None);
        assert!(operations.running().is_empty());
        export.reaches(333);
        export.reaches(20);
        import.advance(7);
        let running = operations.running();
        let [first, second] = running.as_slice() else {
            panic!("two operations");
        };
        assert_eq!(
            (first.done(), first.total(), first.percent()),
            (333, Some(1000), Some(33.3))
        );
        assert_eq!(
            (second.done(), second.total(), second.percent()),
            (7, None, None)
        );
        // The total was too small.
        export.reaches(2000);
        assert_eq!(first.percent(), Some(100.0));
        drop(export);
        assert_eq!(operations.running().len(), 1);
    }
}
