//! A disk state opened to be looked into: the raw disk, and the guest's files in it. Opened once per
//! state, then shared by all who look.

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

/// States kept open although nobody has a file of them open.
const KEPT: usize = 8;

/// A state that nobody has a file of open is let go of when nobody looked into it for so long: its
/// layers can't be merged meanwhile, and their space does not come back.
const UNUSED: Duration = Duration::from_secs(5);

/// One state of a disk: what the inodes of files in it are numbered by. Small, and kept as long as the
/// kernel knows one of them; what it takes to read them is an [`OpenDisk`].
#[derive(Debug)]
pub struct DiskState {
    source: Source,
    number: u64,
    changed: SystemTime,
    size: u64,
}

impl DiskState {
    /// `state` is the chain's [`States::state_number`].
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

    /// A state of no disk.
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

    /// What it is a state of.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// A number that other states have not, the same after a remount.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// When the disk changed last.
    pub fn changed(&self) -> SystemTime {
        self.changed
    }

    /// Size of the disk in bytes.
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

fn changed() -> Error {
    Error::new(libc::ESTALE, "the disk changed since it was looked into")
}

/// A disk state opened to be looked into. Its layers stay open, so that what happens to their names
/// does not matter.
pub struct OpenDisk {
    state: Arc<DiskState>,
    chain: Arc<Chain>,
    guest: OnceLock<Result<Guest>>,
    allocated: OnceLock<Result<u64>>,
    caches: Arc<Caches>,
}

impl OpenDisk {
    /// Which state it is.
    pub fn state(&self) -> &Arc<DiskState> {
        &self.state
    }

    /// Bytes of the disk that are somewhere in its layers; the rest is zeros.
    ///
    /// # Errors
    /// EIO when a layer is damaged.
    pub fn allocated(&self) -> Result<u64> {
        let allocated = self.allocated.get_or_init(|| self.chain.allocated());
        allocated.as_ref().copied().map_err(Error::again)
    }

    /// The disk's bytes.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// What the guest has on the disk; looked at when it is first asked for.
    ///
    /// # Errors
    /// EIO for what is damaged or not known, the same each time.
    pub fn guest(&self) -> Result<&Guest> {
        let guest = self
            .guest
            .get_or_init(|| Guest::open(self.chain.clone(), &self.caches));
        guest.as_ref().map_err(Error::again)
    }

    /// ESTALE when the disk is not as it was: what is read now would not belong to what was read before.
    /// Whoever looks the name up again gets the state of now.
    pub fn refuse_changed(&self) -> Result<()> {
        self.chain.unchanged().map_err(|_| changed())
    }
}

/// A state that is kept open.
struct KeptView {
    layers: LayerStates,
    disk: Arc<OpenDisk>,
    used: Instant,
}

impl KeptView {
    /// Whether a file of it is open, or somebody looked into it just now.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.disk) > 1 || self.used.elapsed() < UNUSED
    }
}

/// States looked into before.
#[derive(Default)]
struct ViewCache {
    known: HashMap<Source, KeptView>,
    /// What was read of guests.
    caches: Arc<Caches>,
    /// Sources that were looked into.
    recent: Recent<Source, KEPT>,
}

/// Disk states that are looked into.
pub struct DiskViews {
    disks: Arc<Disks>,
    states: Arc<States>,
    cache: Mutex<ViewCache>,
}

impl DiskViews {
    pub(crate) fn new(disks: Arc<Disks>, states: Arc<States>) -> DiskViews {
        DiskViews {
            disks,
            states,
            cache: Mutex::default(),
        }
    }

    /// A disk state to look into. Waits until it can't change unseen.
    ///
    /// # Errors
    /// EBUSY for the live disk of a box that runs, ENODATA for a box without a disk, ENOENT, EIO.
    pub fn open(&self, source: &Source) -> Result<Arc<OpenDisk>> {
        let top = self.top_to_look_into(source)?;
        if let Some(disk) = self.looked_into(source, &top) {
            return Ok(disk);
        }
        let (chain, layers) = self.states.open_settled(&top)?;
        self.keep(source, chain, layers)
    }

    /// The file on top of the chain of a disk state that can be looked into.
    fn top_to_look_into(&self, source: &Source) -> Result<PathBuf> {
        let record = self.disks.record_of(source)?;
        if let Source::Live { .. } = source {
            self.disks.refuse_active(&record)?;
        }
        self.disks.existing_top(source, &record)
    }

    /// A state that is open, if it is that of now.
    fn looked_into(&self, source: &Source, top: &Path) -> Option<Arc<OpenDisk>> {
        let mut cache = self.cache.lock();
        let kept = cache.known.get(source)?;
        let disk = kept.layers.hold(top).then(|| kept.disk.clone())?;
        cache.was_used(source);
        Some(disk)
    }

    /// Whether [`DiskViews::open`] may have to wait.
    pub fn may_wait(&self, source: &Source) -> bool {
        let top = self.disks.top_of(source);
        top.is_ok_and(|top| self.looked_into(source, &top).is_none())
            && self.states.may_wait(source)
    }

    fn keep(&self, source: &Source, chain: Chain, layers: LayerStates) -> Result<Arc<OpenDisk>> {
        let number = self.states.state_number(&chain)?;
        let chain = Arc::new(chain);
        let mut cache = self.cache.lock();
        let disk = Arc::new(OpenDisk {
            state: Arc::new(DiskState::of(source, &chain, number)),
            chain,
            guest: OnceLock::new(),
            allocated: OnceLock::new(),
            caches: cache.caches.clone(),
        });
        let kept = KeptView {
            layers,
            disk: disk.clone(),
            used: Instant::now(),
        };
        cache.known.insert(source.clone(), kept);
        cache.was_used(source);
        Ok(disk)
    }

    /// A disk state that was looked into before. Where it is not open any more, it is opened again;
    /// that does not wait.
    ///
    /// # Errors
    /// ESTALE when the disk has another state by now; as [`DiskViews::open`].
    pub fn reopen(&self, state: &DiskState) -> Result<Arc<OpenDisk>> {
        {
            let mut cache = self.cache.lock();
            if let Some(kept) = cache.known.get_mut(&state.source)
                && *kept.disk.state == *state
            {
                kept.used = Instant::now();
                return Ok(kept.disk.clone());
            }
        }
        match self.open_now(&state.source) {
            Ok(Some(disk)) if *disk.state == *state => Ok(disk),
            Err(error) if !matches!(error.errno(), libc::ENOENT | libc::ENODATA) => Err(error),
            _ => Err(changed()),
        }
    }

    /// As [`DiskViews::open`], without waiting: None while the state can change unseen. It is
    /// another than any that was looked into then.
    fn open_now(&self, source: &Source) -> Result<Option<Arc<OpenDisk>>> {
        let top = self.top_to_look_into(source)?;
        if let Some(disk) = self.looked_into(source, &top) {
            return Ok(Some(disk));
        }
        let (chain, layers) = self.states.open_now(&top)?;
        match layers.is_settled() {
            true => self.keep(source, chain, layers).map(Some),
            false => Ok(None),
        }
    }

    /// Lets go of states that nobody looks into. Returns how many there are left.
    pub(crate) fn let_go_of_unused(&self) -> usize {
        let mut cache = self.cache.lock();
        cache.known.retain(|_, kept| kept.is_used());
        let ViewCache { known, recent, .. } = &mut *cache;
        recent.retain(|source| known.contains_key(source));
        recent.oldest_first().len()
    }

    /// Whether anybody looks into a state.
    pub(crate) fn is_looked_into(&self) -> bool {
        self.cache.lock().known.values().any(KeptView::is_used)
    }

    /// Lets go of states that are gone.
    pub(crate) fn forget_gone(&self, catalog: &Catalog) {
        let mut cache = self.cache.lock();
        cache.known.retain(|source, _| source.is_in(catalog));
        cache.recent.retain(|source| source.is_in(catalog));
    }
}

impl ViewCache {
    fn was_used(&mut self, source: &Source) {
        if let Some(kept) = self.known.get_mut(source) {
            kept.used = Instant::now();
        }
        self.recent.touch(source);
        while let Some(oldest) = self.recent.evict() {
            self.known.remove(&oldest);
        }
    }
}
