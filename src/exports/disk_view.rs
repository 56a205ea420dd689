//! Disk states opened as raw disks and guests' files. A disk is opened once per state; all its
//! readers share it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::Result;
use crate::disk::Chain;
use crate::exports::disks::{Disks, Source};
use crate::exports::open_disk::{DiskState, OpenDisk, stale};
use crate::exports::paused_copy::PausedCopies;
use crate::exports::recent::Recent;
use crate::exports::running_views::RunningViews;
use crate::exports::states::{LayerStates, States};
use crate::guest::Caches;
use crate::home::Catalog;

/// Disks kept open for the sources used last. A disk with an open file outlives its eviction.
const KEPT_DISKS: usize = 8;

/// A disk without open files is closed after this time without use: while it is open, its layers
/// can't be merged, and their space is not reclaimed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// An open disk in the cache.
struct KeptView {
    layers: LayerStates,
    disk: Arc<OpenDisk>,
    last_use: Instant,
}

impl KeptView {
    /// Returns whether a file of the disk is open, or was looked at within [`IDLE_TIMEOUT`].
    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.disk) > 1 || self.last_use.elapsed() < IDLE_TIMEOUT
    }
}

/// The last open disk of each source.
#[derive(Default)]
struct ViewCache {
    views: HashMap<Source, KeptView>,
    /// Blocks and names read from guests' file systems, for all disks together.
    guest_caches: Arc<Caches>,
    /// Sources whose disk is kept open.
    recent: Recent<Source, KEPT_DISKS>,
}

/// Opens disk states as raw disks and guests' files, and keeps them open.
pub struct DiskViews {
    disks: Arc<Disks>,
    states: Arc<States>,
    cache: Mutex<ViewCache>,
    /// The disks of running boxes.
    pub running: RunningViews,
}

impl DiskViews {
    /// Returns the views of these disks, with none open.
    pub(crate) fn new(
        disks: Arc<Disks>,
        states: Arc<States>,
        copies: Arc<PausedCopies>,
    ) -> DiskViews {
        DiskViews {
            disks,
            states,
            cache: Mutex::default(),
            running: RunningViews::new(copies),
        }
    }

    /// Opens the disk of a running box as it is now, or as `process` goes on seeing
    /// it. Opens it as [`DiskViews::open`] does if the box has stopped.
    ///
    /// # Errors
    /// EBUSY when that is not cheap; otherwise those of [`DiskViews::open`].
    pub fn look(&self, source: &Source, process: Option<u32>) -> Result<Arc<OpenDisk>> {
        let caches = self.cache.lock().guest_caches.clone();
        match self.running.look(source, process, &caches)? {
            Some(disk) => Ok(disk),
            None => self.open(source),
        }
    }

    /// Opens a disk in its current state. Waits until the state is settled.
    ///
    /// # Errors
    /// EBUSY for the live disk of a running box, or when the disk does not settle; ENODATA for a
    /// box without a disk; ENOENT when the box or snapshot is gone; EIO when a layer is missing or
    /// damaged.
    pub fn open(&self, source: &Source) -> Result<Arc<OpenDisk>> {
        let top = self.readable_top(source)?;
        if let Some(disk) = self.current_view(source, &top) {
            return Ok(disk);
        }
        self.disks.refuse_written(source, &top)?;
        let (chain, layers) = self.states.open_settled(&top)?;
        self.put(source, chain, layers)
    }

    /// Returns the topmost file of a disk that may be read now.
    fn readable_top(&self, source: &Source) -> Result<PathBuf> {
        let record = self.disks.record_of(source)?;
        if let Source::Live { .. } = source {
            self.disks.refuse_active(&record)?;
        }
        self.disks.existing_top(source, &record)
    }

    /// Returns the open disk of a source, if it is in the current state.
    fn current_view(&self, source: &Source, top: &Path) -> Option<Arc<OpenDisk>> {
        let mut cache = self.cache.lock();
        let view = cache.views.get(source)?;
        let disk = view.layers.are_current(top).then(|| view.disk.clone())?;
        cache.touch(source);
        Some(disk)
    }

    /// Returns whether [`DiskViews::open`] may have to wait.
    pub fn may_wait(&self, source: &Source) -> bool {
        let top = self.disks.top_of(source);
        top.is_ok_and(|top| self.current_view(source, &top).is_none())
            && self.states.may_wait(source)
    }

    /// Puts a chain into the cache, as the open disk of `source`.
    fn put(&self, source: &Source, chain: Chain, layers: LayerStates) -> Result<Arc<OpenDisk>> {
        let number = self.states.state_number(&chain)?;
        let chain = Arc::new(chain);
        let mut cache = self.cache.lock();
        let state = DiskState::of(source, &chain, number);
        let disk = Arc::new(OpenDisk::new(state, chain, cache.guest_caches.clone()));
        let view = KeptView {
            layers,
            disk: disk.clone(),
            last_use: Instant::now(),
        };
        cache.views.insert(source.clone(), view);
        cache.touch(source);
        Ok(disk)
    }

    /// Returns the disk in a state if it is open.
    pub fn held(&self, state: &DiskState) -> Option<Arc<OpenDisk>> {
        if let Some(disk) = self.running.reopen(state) {
            return Some(disk);
        }
        let mut cache = self.cache.lock();
        let view = cache.views.get_mut(state.source())?;
        (**view.disk.state() == *state).then(|| {
            view.last_use = Instant::now();
            view.disk.clone()
        })
    }

    /// Returns the disk in a state that was open before, and opens it again if needed. Does not
    /// wait.
    ///
    /// # Errors
    /// ESTALE when the disk is in another state, or gone; otherwise as [`DiskViews::open`].
    pub fn reopen(&self, state: &DiskState) -> Result<Arc<OpenDisk>> {
        if let Some(disk) = self.held(state) {
            return Ok(disk);
        }
        match self.open_now(state.source()) {
            Ok(Some(disk)) if **disk.state() == *state => Ok(disk),
            // It has been started, or was seen as it ran and has changed.
            Err(_) if self.running.is_running(state.source()) => Err(stale()),
            Err(error) if !matches!(error.errno(), libc::ENOENT | libc::ENODATA) => Err(error),
            _ => Err(stale()),
        }
    }

    /// Opens a disk as [`DiskViews::open`] does, but without waiting. None for a state that is not
    /// settled, which differs from every state that was open before.
    fn open_now(&self, source: &Source) -> Result<Option<Arc<OpenDisk>>> {
        let top = self.readable_top(source)?;
        if let Some(disk) = self.current_view(source, &top) {
            return Ok(Some(disk));
        }
        self.disks.refuse_written(source, &top)?;
        let (chain, layers) = self.states.open_now(&top)?;
        if layers.is_settled() {
            self.put(source, chain, layers).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Closes the disks that are not in use. Returns how many remain open.
    pub(crate) fn let_go_of_unused(&self) -> usize {
        let mut cache = self.cache.lock();
        let ViewCache { views, recent, .. } = &mut *cache;
        views.retain(|_, view| view.is_in_use());
        recent.retain(|source| views.contains_key(source));
        recent.oldest_first().len() + self.running.let_go_of_unused()
    }

    /// Returns whether a disk is in use.
    pub(crate) fn is_in_use(&self) -> bool {
        self.cache.lock().views.values().any(KeptView::is_in_use) || self.running.is_in_use()
    }

    /// Closes the disks of sources that are not in `catalog`.
    pub(crate) fn forget_gone(&self, catalog: &Catalog) {
        let mut cache = self.cache.lock();
        cache.views.retain(|source, _| source.is_in(catalog));
        cache.recent.retain(|source| source.is_in(catalog));
    }
}

impl ViewCache {
    /// Makes the disk of `source` the most recently used one, and drops the disks beyond the limit.
    fn touch(&mut self, source: &Source) {
        if let Some(view) = self.views.get_mut(source) {
            view.last_use = Instant::now();
        }
        self.recent.touch(source);
        while let Some(oldest) = self.recent.evict() {
            self.views.remove(&oldest);
        }
    }
}
