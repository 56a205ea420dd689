//! Looks into the disks of running boxes: raw disks and guests' files, as they are at one moment.
//!
//! A look reads from a copy of the layer that the virtual machine writes, so it is made only where
//! the copy is cheap. One process goes on with what it has seen as long as it looks all the time, so
//! that a tool which walks a tree by paths finds one state of it. Any other look gets the disk as it
//! is then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::Result;
use crate::exports::disks::Source;
use crate::exports::open_disk::{DiskState, OpenDisk};
use crate::exports::paused_copy::PausedCopies;
use crate::exports::states::LayerStates;
use crate::guest::Caches;

/// The largest top layer, in allocated bytes, that is copied for a look where the file system can't
/// share blocks: about a second of work.
pub const LARGEST_COPY: u64 = 256 << 20;

/// A process that does not look for so long, and has nothing open, has ended its look.
const PAUSE: Duration = Duration::from_secs(1);

/// The longest look.
const LONGEST_LOOK: Duration = Duration::from_secs(600);

/// A copy without open files is dropped after this time without use.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Copies without open files that are kept at most.
const KEPT_COPIES: usize = 8;

/// A copied disk that is open.
struct RunningView {
    disk: Arc<OpenDisk>,
    /// The layers of the disk from before it was copied, if they could be told apart from others.
    states: Option<LayerStates>,
    /// The processes that look at this state, and when they did so last.
    lookers: Vec<(u32, Instant)>,
    made: Instant,
    last_use: Instant,
}

impl RunningView {
    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.disk) > 1 || self.last_use.elapsed() < IDLE_TIMEOUT
    }

    /// Returns whether a look by this process, which begins now, may see this state: the process
    /// sees it already, or the disk has not changed since.
    fn serves(&self, process: Option<u32>) -> bool {
        let has_open = Arc::strong_count(&self.disk) > 1;
        let looked = self.lookers.iter().find(|(of, _)| Some(*of) == process);
        let goes_on = looked.is_some_and(|(_, last)| has_open || last.elapsed() < PAUSE);
        (goes_on && self.made.elapsed() < LONGEST_LOOK)
            || self
                .states
                .as_ref()
                .is_some_and(|states| states.is_settled() && states.are_current(self.disk.top()))
    }
}

/// The open disks of running boxes.
pub struct RunningViews {
    copies: Arc<PausedCopies>,
    views: Mutex<Vec<RunningView>>,
    /// Held while a disk is copied, so that several who look at once get one copy.
    looking: Mutex<()>,
}

impl RunningViews {
    /// Returns none yet; `copies` copies the disks.
    pub(crate) fn new(copies: Arc<PausedCopies>) -> RunningViews {
        RunningViews {
            copies,
            views: Mutex::default(),
            looking: Mutex::default(),
        }
    }

    /// Returns whether the source is the live disk of a running box.
    pub fn is_running(&self, source: &Source) -> bool {
        matches!(source, Source::Live { .. }) && self.copies.is_running(source)
    }

    /// Returns the disk of a running box as it is now, or as `process` goes on seeing it. None if the box has stopped.
    ///
    /// # Errors
    /// EBUSY when its top layer is too large to be copied at once, when the machine can't be
    /// paused, and in a read-only mount; ENOSPC, EIO.
    pub(crate) fn look(
        &self,
        source: &Source,
        process: Option<u32>,
        caches: &Arc<Caches>,
    ) -> Result<Option<Arc<OpenDisk>>> {
        if let Some(disk) = self.seen(source, process) {
            return Ok(Some(disk));
        }
        let _looking = self.looking.lock();
        // Meanwhile another thread may have looked for the same process.
        if let Some(disk) = self.seen(source, process) {
            return Ok(Some(disk));
        }
        let Some((chain, states)) = self.copies.look(source, LARGEST_COPY)? else {
            return Ok(None);
        };
        let chain = Arc::new(chain);
        let state = DiskState::of(source, &chain, next_state());
        let disk = Arc::new(OpenDisk::new(state, chain, caches.clone()));
        let now = Instant::now();
        let mut views = self.views.lock();
        views.retain(RunningView::is_in_use);
        if views.len() >= KEPT_COPIES {
            let oldest = views
                .iter()
                .enumerate()
                .min_by_key(|(_, view)| view.last_use);
            if let Some((oldest, _)) = oldest {
                views.remove(oldest);
            }
        }
        views.push(RunningView {
            disk: disk.clone(),
            states,
            lookers: process.map(|process| (process, now)).into_iter().collect(),
            made: now,
            last_use: now,
        });
        Ok(Some(disk))
    }

    /// Returns a disk that a look by this process may see without another copy.
    fn seen(&self, source: &Source, process: Option<u32>) -> Option<Arc<OpenDisk>> {
        let mut views = self.views.lock();
        let mut of_source = views.iter_mut().rev();
        let view =
            of_source.find(|view| view.disk.state().source() == source && view.serves(process))?;
        let now = Instant::now();
        view.last_use = now;
        if let Some(process) = process {
            view.lookers.retain(|(of, _)| *of != process);
            view.lookers.push((process, now));
        }
        Some(view.disk.clone())
    }

    /// Returns the disk in a state that was seen before, if it is still kept.
    pub(crate) fn reopen(&self, state: &DiskState) -> Option<Arc<OpenDisk>> {
        let mut views = self.views.lock();
        let view = views
            .iter_mut()
            .find(|view| **view.disk.state() == *state)?;
        view.last_use = Instant::now();
        Some(view.disk.clone())
    }

    /// Drops the copies that are not in use. Returns how many are left.
    pub(crate) fn let_go_of_unused(&self) -> usize {
        let mut views = self.views.lock();
        views.retain(RunningView::is_in_use);
        views.len()
    }

    /// Returns whether a copy is in use.
    pub(crate) fn is_in_use(&self) -> bool {
        self.views.lock().iter().any(RunningView::is_in_use)
    }
}

/// Returns a number that no other state of a disk has, of this mount or an earlier one.
fn next_state() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let began = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64);
    began.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}
