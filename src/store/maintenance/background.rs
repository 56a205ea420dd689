//! What a mount does by itself once it is left alone: bases that nobody needs any more are freed, and
//! layers are merged. Slowly, behind everybody else, and not while anything else is going on.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::disk::FileId;
use crate::files::priority::{set_upkeep, step_back};
use crate::home::Catalog;
use crate::store::Store;
use crate::store::access::home_recovery::free_unneeded;
use crate::store::access::room::keep_reserve;
use crate::store::layers::collect::has_unneeded;
use crate::store::layers::merge::merge_layers;
use crate::store::layers::mergeable::{MergePlan, mergeable};
use crate::store::layers::put_back::keep_spares;
use crate::store::maintenance::compact::{log_merge, merge_operation};
use crate::{Error, Result};

/// When a mount merges layers by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacting {
    /// Once nothing went on for so long; None: never.
    pub after: Option<Duration>,
}

impl Default for Compacting {
    /// Half a minute.
    fn default() -> Self {
        Compacting {
            after: Some(Duration::from_secs(30)),
        }
    }
}

/// How often it is looked whether there is something to do.
const TICK: Duration = Duration::from_secs(2);

/// How often plans that nobody reads are let go of, as long as there are any: whoever compacts the home
/// waits for that.
const UNREAD: Duration = Duration::from_secs(1);

/// What could not be done (a box ran, somebody read) is tried again after so long.
const AGAIN: Duration = Duration::from_secs(60);

/// How often it is looked whether others are done.
const PAUSE: Duration = Duration::from_millis(100);

/// The thread that does it. Ends, and is waited for, when this is dropped: a crash is no harm, but
/// leaves something to tidy up.
pub struct BackgroundCompaction {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
pub struct Stop {
    is_asked: AtomicBool,
    lock: Mutex<()>,
    bell: Condvar,
}

impl Stop {
    fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::Acquire)
    }

    /// Waits; true when it is to end.
    fn wait(&self, long: Duration) -> bool {
        let mut lock = self.lock.lock();
        if !self.is_asked() {
            self.bell.wait_for(&mut lock, long);
        }
        self.is_asked()
    }
}

impl BackgroundCompaction {
    /// Begins, if it is wanted and there is a thread for it.
    pub fn begin(store: &Arc<Store>, compacting: Compacting) -> Option<BackgroundCompaction> {
        let after = compacting.after?;
        let stop = Arc::<Stop>::default();
        let mut rounds = Compactor {
            store: store.clone(),
            stop: stop.clone(),
            after,
            seen: None,
            again: None,
            hopeless: HashSet::new(),
        };
        let thread = std::thread::Builder::new()
            .name("upkeep".into())
            .spawn(move || rounds.run());
        match thread {
            Ok(thread) => Some(BackgroundCompaction {
                stop,
                thread: Some(thread),
            }),
            Err(error) => {
                store
                    .events()
                    .info(&format!("layers are not merged by this mount: {error}"));
                None
            }
        }
    }
}

impl Drop for BackgroundCompaction {
    fn drop(&mut self) {
        self.stop.is_asked.store(true, Ordering::Release);
        {
            let _lock = self.stop.lock.lock();
            self.stop.bell.notify_all();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Compactor {
    store: Arc<Store>,
    stop: Arc<Stop>,
    after: Duration,
    /// The rows when there was nothing left to do.
    seen: Option<Arc<Catalog>>,
    /// When to look again although they are the same.
    again: Option<Instant>,
    /// LayerGraph on top of what would take more room as one.
    hopeless: HashSet<FileId>,
}

impl Compactor {
    fn run(&mut self) {
        set_upkeep();
        step_back();
        let mut begun = Instant::now();
        loop {
            let tick = if self.store.exports.let_go_of_unread() == 0 {
                TICK
            } else {
                UNREAD
            };
            if self.stop.wait(tick.min(self.after)) {
                return;
            }
            if begun.elapsed() < self.after || !self.is_quiet(self.after) || !self.has_news() {
                continue;
            }
            // A panic is a fault of ours, and no reason to take the mount down.
            let round = std::panic::AssertUnwindSafe(|| self.round());
            match std::panic::catch_unwind(round) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    log::debug!("upkeep: {error}");
                    self.again = Some(Instant::now() + AGAIN);
                }
                Err(_) => return,
            }
            begun = Instant::now();
        }
    }

    /// Whether nobody reads, and nothing else went on for so long.
    fn is_quiet(&self, long: Duration) -> bool {
        !self.store.exports.are_read() && self.store.shared.foreground.is_quiet(long)
    }

    /// Whether rows changed since there was nothing left to do, or it is time to try again.
    fn has_news(&self) -> bool {
        let Ok(catalog) = self.store.home().catalog() else {
            return false;
        };
        let same = self
            .seen
            .as_ref()
            .is_some_and(|seen| Arc::ptr_eq(seen, &catalog));
        !same || self.again.is_some_and(|again| again <= Instant::now())
    }

    /// Does what can be done.
    fn round(&mut self) -> Result<()> {
        let catalog = self.store.home().catalog()?;
        self.again = None;
        if has_unneeded(&self.store, &catalog)? {
            free_unneeded(&self.store)?;
        }
        keep_spares(&self.store)?;
        keep_reserve(&self.store);
        let mut settled = self.hopeless.clone();
        loop {
            let mut work = mergeable(&self.store)?.into_iter();
            let next = work.find_map(|merge| {
                let id = merge.top_id()?;
                settled.insert(id).then_some(merge.worthwhile()).flatten()
            });
            let Some(merge) = next else {
                break;
            };
            self.merge(&merge)?;
        }
        self.seen = Some(catalog);
        Ok(())
    }

    fn merge(&mut self, merge: &MergePlan) -> Result<()> {
        let operation = merge_operation(&self.store, merge);
        let mut last = Instant::now();
        let mut pace = |bytes| {
            operation.advance(bytes);
            // As much rest as work: what is written is flushed by others.
            let rest = last.elapsed().min(PAUSE);
            let mut is_over = self.stop.wait(rest);
            while !is_over && !self.is_quiet_for_now() {
                is_over = self.stop.wait(PAUSE);
            }
            last = Instant::now();
            match is_over {
                true => Err(Error::new(libc::ECANCELED, "the mount ends")),
                false => Ok(()),
            }
        };
        match merge_layers(&self.store, merge, &mut pace) {
            Ok(merged) => {
                log_merge(&self.store, merge, merged);
                Ok(())
            }
            Err(error) if error.errno() == libc::ENODATA => {
                self.hopeless.extend(merge.top_id());
                Ok(())
            }
            Err(error) if self.stop.is_asked() => Err(error),
            Err(error) => {
                log::debug!("upkeep: {error}");
                self.again = Some(Instant::now() + AGAIN);
                Ok(())
            }
        }
    }

    /// While it is at it: a second is enough.
    fn is_quiet_for_now(&self) -> bool {
        self.is_quiet(self.after.min(Duration::from_secs(1)))
    }
}
