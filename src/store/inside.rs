//! A disk state opened to be looked into: the raw disk, and the guest's files in it. Opened once per
//! state, then shared by all who look.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::export::LayerStates;
use super::{Source, Store};
use crate::disk::Chain;
use crate::guest::{Caches, Guest};
use crate::home::Catalog;
use crate::{Error, Result};

/// States kept open although nobody has a file of them open.
const KEPT: usize = 8;

/// A state that nobody has a file of open is let go of when nobody looked into it for so long: its
/// layers can't be merged meanwhile, and their space does not come back.
const UNUSED: Duration = Duration::from_secs(5);

/// One state of a disk: what the inodes of files in it are numbered by. Small, and kept as long as the
/// kernel knows one of them; what it takes to read them is an [`Inside`].
#[derive(Debug)]
pub struct DiskState {
    source: Source,
    number: u64,
    changed: SystemTime,
    size: u64,
}

impl DiskState {
    fn of(source: &Source, chain: &Chain) -> DiskState {
        let changed = chain.changed_at();
        let size = chain.virtual_size();
        let since = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
        let key = format!("{source:?} {} {size}", since.as_nanos());
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
pub struct Inside {
    state: Arc<DiskState>,
    chain: Arc<Chain>,
    guest: OnceLock<Result<Guest>>,
    allocated: OnceLock<Result<u64>>,
    caches: Arc<Caches>,
}

impl Inside {
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
struct Kept {
    layers: LayerStates,
    inside: Arc<Inside>,
    used: Instant,
}

impl Kept {
    /// Whether a file of it is open, or somebody looked into it just now.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.inside) > 1 || self.used.elapsed() < UNUSED
    }
}

/// States looked into before.
#[derive(Default)]
pub(super) struct InsideCache {
    known: HashMap<Source, Kept>,
    /// What was read of guests.
    caches: Arc<Caches>,
    /// Sources that were looked into, the last one at the end.
    used: Vec<Source>,
}

impl Store {
    /// A disk state to look into.
    ///
    /// # Errors
    /// EBUSY for the live disk of a box that runs, ENODATA for a box without a disk, ENOENT, EIO.
    pub fn look_inside(&self, source: &Source) -> Result<Arc<Inside>> {
        let record = self.record_of(source)?;
        if let Source::Live { .. } = source {
            self.refuse_active(&record)?;
        }
        let top = self.existing_top(source, &record)?;
        {
            let mut cache = self.insides.lock();
            if let Some(kept) = cache.known.get(source)
                && kept.layers.hold(&top)
            {
                let inside = kept.inside.clone();
                cache.was_used(source);
                return Ok(inside);
            }
        }
        let chain = Arc::new(self.open_chain(&top)?);
        let layers = LayerStates::of(&chain)?;
        let mut cache = self.insides.lock();
        let inside = Arc::new(Inside {
            state: Arc::new(DiskState::of(source, &chain)),
            chain,
            guest: OnceLock::new(),
            allocated: OnceLock::new(),
            caches: cache.caches.clone(),
        });
        let kept = Kept {
            layers,
            inside: inside.clone(),
            used: Instant::now(),
        };
        cache.known.insert(source.clone(), kept);
        cache.was_used(source);
        Ok(inside)
    }

    /// A disk state that was looked into before. Where it is not open any more, it is opened again.
    ///
    /// # Errors
    /// ESTALE when the disk has another state by now; as [`Store::look_inside`].
    pub fn look_again(&self, state: &DiskState) -> Result<Arc<Inside>> {
        {
            let mut cache = self.insides.lock();
            if let Some(kept) = cache.known.get_mut(&state.source)
                && *kept.inside.state == *state
            {
                kept.used = Instant::now();
                return Ok(kept.inside.clone());
            }
        }
        match self.look_inside(&state.source) {
            Ok(inside) if *inside.state == *state => Ok(inside),
            Err(error) if !matches!(error.errno(), libc::ENOENT | libc::ENODATA) => Err(error),
            _ => Err(changed()),
        }
    }

    /// Lets go of states that nobody looks into. Returns how many there are left.
    pub(super) fn let_go_of_unused_insides(&self) -> usize {
        let mut cache = self.insides.lock();
        cache.known.retain(|_, kept| kept.is_used());
        let InsideCache { known, used, .. } = &mut *cache;
        used.retain(|source| known.contains_key(source));
        used.len()
    }

    /// Whether anybody looks into a state.
    pub(super) fn is_looked_into(&self) -> bool {
        self.insides.lock().known.values().any(Kept::is_used)
    }

    /// Lets go of states that are gone.
    pub(super) fn forget_gone_insides(&self, catalog: &Catalog) {
        let mut cache = self.insides.lock();
        cache.known.retain(|source, _| source.is_in(catalog));
        cache.used.retain(|source| source.is_in(catalog));
    }
}

impl InsideCache {
    fn was_used(&mut self, source: &Source) {
        if let Some(kept) = self.known.get_mut(source) {
            kept.used = Instant::now();
        }
        self.used.retain(|used| used != source);
        self.used.push(source.clone());
        while self.used.len() > KEPT {
            let oldest = self.used.remove(0);
            self.known.remove(&oldest);
        }
    }
}
