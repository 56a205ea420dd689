//! Background compaction: an idle mount frees bases that are no longer needed and merges layers. It
//! works slowly and at the lowest priority, and pauses while anything else goes on. Layers of
//! snapshots that were deleted beside a runtime, and what changes of a large home have left, are freed
//! by the same thread, idle or not.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::disk::FileId;
use crate::files::priority::{set_upkeep, step_back};
use crate::home::Catalog;
use crate::store::Store;
use crate::store::access::deletion_space::keep_reserve;
use crate::store::access::home_recovery::free_unneeded;
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

/// How long no change may have begun before what changes left is freed, and after which time it is
/// freed all the same.
const QUIET: Duration = Duration::from_millis(100);
const LONGEST_UNFREED: Duration = Duration::from_secs(2);

/// How often a paused merge checks whether the mount is idle again.
const PAUSE: Duration = Duration::from_millis(100);

/// The background thread. Dropping this stops the thread and waits for its end. A crash instead
/// does no harm but leaves files for the next mount to remove.
pub struct BackgroundCompaction {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
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
    /// Starts the thread. Returns None if the thread cannot be started, which is logged.
    pub fn begin(store: &Arc<Store>, compacting: Compacting) -> Option<BackgroundCompaction> {
        let stop = Arc::<Stop>::default();
        let mut compactor = Compactor {
            store: store.clone(),
            stop: stop.clone(),
            after: compacting.after,
            compacted: None,
            retry_at: None,
            retry_after: FIRST_RETRY,
            not_worthwhile: HashSet::new(),
        };
        let thread = std::thread::Builder::new()
            .name("upkeep".into())
            .spawn(move || compactor.run());
        match thread {
            Ok(thread) => {
                store.unfreed.wake(thread.thread().clone());
                Some(BackgroundCompaction {
                    stop,
                    thread: Some(thread),
                })
            }
            Err(error) => {
                store.events().info(&format!(
                    "this mount does not merge layers or free bases: {error}"
                ));
                recover(store);
                None
            }
        }
    }
}

impl Drop for BackgroundCompaction {
    fn drop(&mut self) {
        self.stop.is_asked.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// What the background thread does, and what it remembers between rounds.
struct Compactor {
    store: Arc<Store>,
    stop: Arc<Stop>,
    /// Idle time before a round begins; None for no rounds.
    after: Option<Duration>,
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
        self.finish_recovery();
        loop {
            if self.stop.wait(self.pause()) {
                let _ = free_unfreed(&self.store);
                return;
            }
            self.free_unfreed();
            let Some(after) = self.after else { continue };
            free_left_snapshots(&self.store, after);
            if last_round.elapsed() < after || !self.is_idle(after) || !self.may_have_work() {
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

    /// Recovers a large home, if the mount has left that.
    fn finish_recovery(&mut self) {
        if !self.store.is_unrecovered() {
            return;
        }
        let recovery = std::panic::AssertUnwindSafe(|| recover(&self.store));
        let _ = std::panic::catch_unwind(recovery);
    }

    /// Returns how long to wait if nobody wakes the thread.
    fn pause(&self) -> Duration {
        if self.store.unfreed.since().is_some() {
            return QUIET;
        }
        let has_unread = self.store.exports.let_go_of_unread() > 0;
        let tick = if has_unread { UNREAD } else { TICK };
        tick.min(self.after.unwrap_or(tick))
    }

    /// Frees what is left to be freed, once no change has begun for a moment, or it has waited long
    /// enough. Then rests for as long as it worked.
    fn free_unfreed(&mut self) {
        let Some(since) = self.store.unfreed.since() else {
            return;
        };
        if !self.store.opened.foreground.is_quiet(QUIET) && since.elapsed() < LONGEST_UNFREED {
            return;
        }
        let began = Instant::now();
        let freed = std::panic::AssertUnwindSafe(|| free_unfreed(&self.store));
        match std::panic::catch_unwind(freed) {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) | Err(_) => {
                self.stop.wait(UNREAD);
            }
            Ok(Err(error)) => {
                log::debug!("freeing bases: {error}");
                self.stop.wait(UNREAD);
            }
        }
        self.stop.wait(began.elapsed());
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
        let second = Duration::from_secs(1);
        self.is_idle(self.after.map_or(second, |after| after.min(second)))
    }
}
