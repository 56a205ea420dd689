//! A disk that is open, in one state.

use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::disk::{Chain, Layer};
use crate::exports::disks::Source;
use crate::guest::{Caches, Guest};
use crate::{Error, Result};

#[cfg(test)]
use std::time::UNIX_EPOCH;

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
    /// Returns a state of the disk that is this chain. `state` tells it from all others of the source.
    pub(crate) fn of(source: &Source, chain: &Chain, state: u64) -> DiskState {
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
pub(crate) fn stale() -> Error {
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
    /// Returns the disk that these layers are.
    pub(crate) fn new(state: DiskState, chain: Arc<Chain>, caches: Arc<Caches>) -> OpenDisk {
        OpenDisk {
            state: Arc::new(state),
            chain,
            guest: OnceLock::new(),
            allocated: OnceLock::new(),
            caches,
        }
    }

    /// Returns the path of its topmost layer, or of the one that it is a copy of.
    pub(crate) fn top(&self) -> &Path {
        self.chain
            .layers()
            .first()
            .map_or(Path::new(""), Layer::path)
    }

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
