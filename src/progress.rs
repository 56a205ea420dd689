//! What is going on: each export, import and merge under way, and how far it is. For whoever asks; nothing
//! waits for it, and it waits for nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::files::priority::is_upkeep;

/// All that is going on.
#[derive(Default)]
pub struct Operations {
    /// In the order in which they began.
    running: Mutex<BTreeMap<u64, Arc<Running>>>,
    next: AtomicU64,
}

/// One of them; it is over when this is dropped.
pub struct Operation {
    all: Arc<Operations>,
    number: u64,
    running: Arc<Running>,
}

/// What an operation is and how far it is.
pub struct Running {
    /// In a few words, such as `export of box web`.
    pub what: String,
    /// When it began.
    pub since: SystemTime,
    done: AtomicU64,
    /// 0: not known.
    total: AtomicU64,
}

impl Running {
    /// Bytes dealt with so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes there are to deal with, where that is known.
    pub fn total(&self) -> Option<u64> {
        Some(self.total.load(Ordering::Relaxed)).filter(|total| *total > 0)
    }

    /// How much of it is done, 0 to 100, where that is known.
    pub fn percent(&self) -> Option<f64> {
        let total = self.total()?;
        let permille = u128::from(self.done().min(total)) * 1000 / u128::from(total);
        Some(f64::from(u16::try_from(permille).unwrap_or(1000)) / 10.0)
    }
}

impl Operations {
    /// Something begins, of so many bytes if that is known. It is told of once a byte is done: many a
    /// file is opened only to be looked at.
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

    /// What is going on now, in the order in which it began.
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
    /// So many bytes more are done.
    pub fn advance(&self, bytes: u64) {
        self.running.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// All up to this byte is done, as far as one can say: readers and writers may jump.
    pub fn reaches(&self, end: u64) {
        self.running.done.fetch_max(end, Ordering::Relaxed);
    }

    /// There are so many bytes in all.
    pub fn set_total(&self, bytes: u64) {
        self.running.total.store(bytes, Ordering::Relaxed);
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.all.running.lock().remove(&self.number);
    }
}

/// What others do in this mount, for which upkeep waits.
#[derive(Default)]
pub struct Foreground {
    under_way: AtomicUsize,
    last: Mutex<Option<Instant>>,
}

/// Something that is going on as long as this lives.
pub struct UnderWay(Arc<Foreground>);

impl Foreground {
    /// Something is done now.
    pub fn touch(&self) {
        if !is_upkeep() {
            *self.last.lock() = Some(Instant::now());
        }
    }

    /// Something begins.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(self.clone())
    }

    /// Whether nothing is going on, nor was for so long.
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
        // A total that showed to be too small.
        export.reaches(2000);
        assert_eq!(first.percent(), Some(100.0));
        drop(export);
        assert_eq!(operations.running().len(), 1);
    }
}
