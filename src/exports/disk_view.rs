//! Disk states opened as raw disks and guests' files. A disk is opened once per state; all its
//! readers share it.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::disk::Chain;
use crate::exports::disks::{Disks, Source};
use crate::exports::recent::Recent;
use crate::exports::states::{LayerStates, States};
use crate::guest::{Caches, Guest};
use crate::home::Catalog;
use crate::{Error, Result};

#[cfg(test)]
use std::time::UNIX_EPOCH;

/// Disks kept open for the sources used last. A disk with an open file outlives its eviction.
const KEPT_DISKS: usize = 8;

/// A disk without open files is closed after this time without use: while it is open, its layers
/// can't be merged, and their space is not reclaimed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// One state of a disk, which numbers the inodes of the files in it.
///
/// It is small, and is kept as long as the kernel knows one of these inodes. An [`OpenDisk`] holds
/// what it takes to read the files.
#[derive(Debug)]
pub struct DiskState {
    source: Source,
    number: u64,
    changed: SystemTime,
    size: u64,
}

impl DiskState {
    /// Returns the state of a chain; `state` is its [`States::state_number`].
    fn of(source: &Source, chain: &Chain, state: u64) -> DiskState {
        let changed = chain.changed_at();
        let size = chain.virtual_size();
        let key = format!("{source:?} {state}");
        let mut number = [0; 8];
        number.copy_from_slice(&Sha256::digest(key.as_bytes())[..8]);
        let number = u64::from_le_bytes(number);
        DiskState {
            source: source.clone(),
            number,
            changed,
            size,
        }
    }

    /// Returns a state with this number, of no disk.
    #[cfg(test)]
    pub fn numbered(number: u64) -> DiskState {
        DiskState {
            source: Source::Live {
                box_id: String::new(),
            },
            number,
            changed: UNIX_EPOCH,
            size: 0,
        }
    }

    /// Returns the box or snapshot it is a state of.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Returns the number of the state. No other state has it; it is the same after a remount.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Returns when the disk last changed.
    pub fn changed(&self) -> SystemTime {
        self.changed
    }

    /// Returns the size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl PartialEq for DiskState {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for DiskState {}

impl Hash for DiskState {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.number.hash(state);
    }
}

impl PartialOrd for DiskState {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for DiskState {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.number.cmp(&other.number)
    }
}

/// Returns the error for a file of a state that is not current any more.
fn stale() -> Error {
    Error::new(
        libc::ESTALE,
        "the disk changed after the file was looked up; open it again",
    )
}

/// A disk in one state, open for reading. It holds its layers open, so renaming or removing them
/// does not affect it.
pub struct OpenDisk {
    state: Arc<DiskState>,
    chain: Arc<Chain>,
    guest: OnceLock<Result<Guest>>,
    allocated: OnceLock<Result<u64>>,
    caches: Arc<Caches>,
}

impl OpenDisk {
    /// Returns the state the disk was opened in.
    pub fn state(&self) -> &Arc<DiskState> {
        &self.state
    }

    /// Returns how many bytes of the disk are allocated in its layers; the rest is zeros. Counted
    /// at the first call.
    ///
    /// # Errors
    /// EIO when a layer is damaged.
    pub fn allocated(&self) -> Result<u64> {
        let allocated = self.allocated.get_or_init(|| self.chain.allocated());
        allocated.as_ref().copied().map_err(Error::again)
    }

    /// Returns the layers that the disk's bytes are read from.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Returns the guest's file systems, which the first call opens.
    ///
    /// # Errors
    /// EIO when they are damaged or of an unknown kind; every later call fails with the same error.
    pub fn guest(&self) -> Result<&Guest> {
        let guest = self
            .guest
            .get_or_init(|| Guest::open(self.chain.clone(), &self.caches));
        guest.as_ref().map_err(Error::again)
    }

    /// Fails if the disk changed since it was opened: bytes read now would not belong to the same
    /// state.
    ///
    /// # Errors
    /// ESTALE; looking the name up again finds the current state.
    pub fn refuse_changed(&self) -> Result<()> {
        self.chain.unchanged().map_err(|_| stale())
    }
}

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
}

impl DiskViews {
    /// Returns the views of these disks, with none open.
    pub(crate) fn new(disks: Arc<Disks>, states: Arc<States>) -> DiskViews {
        DiskViews {
            disks,
            states,
            cache: Mutex::default(),
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
        let disk = Arc::new(OpenDisk {
            state: Arc::new(DiskState::of(source, &chain, number)),
            chain,
            guest: OnceLock::new(),
            allocated: OnceLock::new(),
            caches: cache.guest_caches.clone(),
        });
        let view = KeptView {
            layers,
            disk: disk.clone(),
            last_use: Instant::now(),
        };
        cache.views.insert(source.clone(), view);
        cache.touch(source);
        Ok(disk)
    }

    /// Returns the disk in a state that was open before, and opens it again if needed. Does not
    /// wait.
    ///
    /// # Errors
    /// ESTALE when the disk is in another state, or gone; otherwise as [`DiskViews::open`].
    pub fn reopen(&self, state: &DiskState) -> Result<Arc<OpenDisk>> {
        {
            let mut cache = self.cache.lock();
            if let Some(view) = cache.views.get_mut(&state.source)
                && *view.disk.state == *state
            {
                view.last_use = Instant::now();
                return Ok(view.disk.clone());
            }
        }
        match self.open_now(&state.source) {
            Ok(Some(disk)) if *disk.state == *state => Ok(disk),
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
        recent.oldest_first().len()
    }

    /// Returns whether a disk is in use.
    pub(crate) fn is_in_use(&self) -> bool {
        self.cache.lock().views.values().any(KeptView::is_in_use)
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
