//! Background compaction: an idle mount frees bases that are no longer needed and merges layers. It
//! works slowly and at the lowest priority, and pauses while anything else goes on. Layers of
//! snapshots that were deleted beside a runtime are freed by the same thread, idle or not. What changes
//! of a large home have left is freed by another, and a third drops what was kept for undo.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::disk::FileId;
use crate::files::priority::{set_upkeep, step_back};
use crate::home::Catalog;
use crate::store::Store;
use crate::store::access::home_recovery::free_unneeded;
use crate::store::access::reserve::keep_reserve;
use crate::store::kept::expire::expire;
use crate::store::layers::collect::has_unneeded;
use crate::store::layers::merge::merge_layers;
use crate::store::layers::mergeable::{MergePlan, mergeable};
use crate::store::layers::put_back::keep_spares;
use crate::store::maintenance::at_mount::recover;
use crate::store::maintenance::compact::{log_merge, merge_operation};
use crate::store::maintenance::left_snapshots::free_left_snapshots;
use crate::store::maintenance::unfreed::free_unfreed;
use crate::{Error, Result};

/// When a mount compacts its home in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacting {
    /// Idle time before compaction begins; None for never.
    pub after: Option<Duration>,
}

impl Default for Compacting {
    /// Returns 30 idle seconds.
    fn default() -> Self {
        Compacting {
            after: Some(Duration::from_secs(30)),
        }
    }
}

/// How often the thread checks for work.
const TICK: Duration = Duration::from_secs(2);

/// How often it does so while export plans exist that are not being read. Each check drops those,
/// and `boxlitefs compact` waits for them.
const UNREAD: Duration = Duration::from_secs(1);

/// How long to wait before work is tried again that was not possible (a box ran, a layer was read):
/// so long the first time, then twice as long each time, up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Bases are freed after this time without a change, and after the second time at the latest.
const QUIET: Duration = Duration::from_millis(100);
const LONGEST_UNFREED: Duration = Duration::from_secs(2);

/// How long the thread sleeps that is woken when something is to be freed.
const IDLE: Duration = Duration::from_secs(60);

/// How often a paused merge checks whether the mount is idle again.
const PAUSE: Duration = Duration::from_millis(100);

/// The background threads. Dropping this stops them and waits for their end. A crash instead does no
/// harm but leaves files for the next mount to remove.
pub struct BackgroundCompaction {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

/// Asks the thread to stop.
#[derive(Default)]
struct Stop {
    is_asked: AtomicBool,
}

impl Stop {
    fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::Acquire)
    }

    /// Waits for `duration`, or until somebody wakes the thread. Returns whether it is to stop.
    fn wait(&self, duration: Duration) -> bool {
        if !self.is_asked() {
            std::thread::park_timeout(duration);
        }
        self.is_asked()
    }
}

impl BackgroundCompaction {
    /// Starts the threads. Returns None if none can be started, which is logged.
    pub fn begin(store: &Arc<Store>, compacting: Compacting) -> Option<BackgroundCompaction> {
        let stop = Arc::<Stop>::default();
        let freeing = Freeing {
            store: store.clone(),
            stop: stop.clone(),
        };
        let start = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let started = std::thread::Builder::new().name(name.into()).spawn(run);
            started.inspect_err(|error| {
                store.events().info(&format!(
                    "this mount does not merge layers, or free them in a large home: {error}"
                ));
            })
        };
        let Ok(freeing) = start("freeing", Box::new(move || freeing.run())) else {
            recover(store);
            return None;
        };
        store.unfreed.wake(freeing.thread().clone());
        let mut threads = vec![freeing];
        if let Some(after) = compacting.after {
            let mut compactor = Compactor {
                store: store.clone(),
                stop: stop.clone(),
                after,
                compacted: None,
                retry_at: None,
                retry_after: FIRST_RETRY,
                not_worthwhile: HashSet::new(),
            };
            threads.extend(start("upkeep", Box::new(move || compactor.run())));
        }
        let expiry = Expiry {
            store: store.clone(),
            stop: stop.clone(),
        };
        threads.extend(start("undo", Box::new(move || expiry.run())));
        Some(BackgroundCompaction { stop, threads })
    }
}

impl Drop for BackgroundCompaction {
    fn drop(&mut self) {
        self.stop.is_asked.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// Does what a large home leaves to be done behind: recovery at the mount, and freeing. It has the
/// priority of the mount, because changes wait for the lock that it holds at times.
struct Freeing {
    store: Arc<Store>,
    stop: Arc<Stop>,
}

impl Freeing {
    fn run(&self) {
        set_upkeep();
        guarded(|| recover(&self.store));
        guarded(|| self.store.layers.keep_headers());
        loop {
            let is_left = self.store.unfreed.since().is_some();
            if self.stop.wait(if is_left { QUIET } else { IDLE }) {
                guarded(|| drop(free_unfreed(&self.store)));
                guarded(|| self.store.layers.keep_headers());
                return;
            }
            self.free();
        }
    }

    /// Frees unneeded bases once there has been no change for [`QUIET`], or after
    /// [`LONGEST_UNFREED`] at the latest. Then rests for as long as it worked.
    fn free(&self) {
        let Some(since) = self.store.unfreed.since() else {
            return;
        };
        if !self.store.opened.foreground.is_quiet(QUIET) && since.elapsed() < LONGEST_UNFREED {
            return;
        }
        let began = Instant::now();
        let mut is_done = false;
        guarded(|| match free_unfreed(&self.store) {
            Ok(done) => is_done = done,
            Err(error) => log::debug!("freeing bases: {error}"),
        });
        self.stop
            .wait(if is_done { began.elapsed() } else { UNREAD });
    }
}

/// Drops undo entries when they expire or their room is needed: by anybody, also
/// by a machine that writes to its disk.
struct Expiry {
    store: Arc<Store>,
    stop: Arc<Stop>,
}

impl Expiry {
    fn run(&self) {
        set_upkeep();
        while !self.stop.wait(TICK) {
            guarded(|| expire(&self.store));
        }
    }
}

/// Runs a step of upkeep. A panic is a bug in it, and must not end the mount.
fn guarded(step: impl FnOnce()) {
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(step));
}

/// What the background thread does, and what it remembers between rounds.
struct Compactor {
    store: Arc<Store>,
    stop: Arc<Stop>,
    /// Idle time before a round begins.
    after: Duration,
    /// The catalog when the last complete round ended.
    compacted: Option<Arc<Catalog>>,
    /// When to begin a round although the catalog is unchanged.
    retry_at: Option<Instant>,
    /// How long the next wait is.
    retry_after: Duration,
    /// Top layers of chains that would take more space when merged.
    not_worthwhile: HashSet<FileId>,
}

impl Compactor {
    fn run(&mut self) {
        set_upkeep();
        step_back();
        let mut last_round = Instant::now();
        loop {
            let has_unread = self.store.exports.let_go_of_unread() > 0;
            let tick = if has_unread { UNREAD } else { TICK };
            if self.stop.wait(tick.min(self.after)) {
                return;
            }
            free_left_snapshots(&self.store, self.after);
            if last_round.elapsed() < self.after
                || !self.is_idle(self.after)
                || !self.may_have_work()
            {
                continue;
            }
            // A panic is a bug in compaction and must not end the mount.
            let round = std::panic::AssertUnwindSafe(|| self.round());
            match std::panic::catch_unwind(round) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    log::debug!("background compaction: {error}");
                    self.retry_later();
                }
                Err(_) => return,
            }
            last_round = Instant::now();
        }
    }

    /// Returns whether no export is being read and the mount was idle for `duration`.
    fn is_idle(&self, duration: Duration) -> bool {
        !self.store.exports.are_read() && self.store.opened.foreground.is_quiet(duration)
    }

    /// Returns whether the catalog changed since the last complete round, or it is time to retry.
    fn may_have_work(&self) -> bool {
        let Ok(catalog) = self.store.home().catalog() else {
            return false;
        };
        let is_unchanged = self
            .compacted
            .as_ref()
            .is_some_and(|compacted| Arc::ptr_eq(compacted, &catalog));
        !is_unchanged || self.retry_at.is_some_and(|at| at <= Instant::now())
    }

    fn retry_later(&mut self) {
        self.retry_at = Some(Instant::now() + self.retry_after);
        self.retry_after = (2 * self.retry_after).min(LONGEST_RETRY);
    }

    /// Frees and merges what is possible now.
    fn round(&mut self) -> Result<()> {
        let catalog = self.store.home().catalog()?;
        self.retry_at = None;
        if has_unneeded(&self.store, &catalog)? {
            free_unneeded(&self.store)?;
        }
        keep_spares(&self.store)?;
        keep_reserve(&self.store);
        let mut tried = self.not_worthwhile.clone();
        loop {
            let mut plans = mergeable(&self.store)?.into_iter();
            let next = plans.find_map(|merge| {
                let id = merge.top_id()?;
                tried.insert(id).then_some(merge.worthwhile()).flatten()
            });
            let Some(merge) = next else {
                break;
            };
            self.merge(&merge)?;
        }
        if self.retry_at.is_none() {
            self.retry_after = FIRST_RETRY;
        }
        self.compacted = Some(catalog);
        Ok(())
    }

    fn merge(&mut self, merge: &MergePlan) -> Result<()> {
        let operation = merge_operation(&self.store, merge);
        let mut last = Instant::now();
        let mut pace = |bytes| {
            operation.advance(bytes);
            // Rests as long as it worked: what it writes slows down the flushes of others.
            let rest = last.elapsed().min(PAUSE);
            let mut must_stop = self.stop.wait(rest);
            while !must_stop && !self.is_idle_for_now() {
                must_stop = self.stop.wait(PAUSE);
            }
            last = Instant::now();
            if must_stop {
                Err(Error::new(libc::ECANCELED, "the mount ends"))
            } else {
                Ok(())
            }
        };
        match merge_layers(&self.store, merge, &mut pace) {
            Ok(merged) => {
                log_merge(&self.store, merge, merged);
                Ok(())
            }
            Err(error) if error.errno() == libc::ENODATA => {
                self.not_worthwhile.extend(merge.top_id());
                Ok(())
            }
            Err(error) if self.stop.is_asked() => Err(error),
            Err(error) => {
                log::debug!("background compaction: {error}");
                self.retry_later();
                Ok(())
            }
        }
    }

    /// Returns whether a merge may go on: one idle second is enough.
    fn is_idle_for_now(&self) -> bool {
        self.is_idle(self.after.min(Duration::from_secs(1)))
    }
}
