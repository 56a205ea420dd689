//! Inode numbers of guests' files, which say what they are of without a table of files.
//!
//! A number has 32 bits for the guest's own number, and 20 for a slot. A slot stands for a
//! [`GuestVolume`]: a partition in one state of a disk. It follows from a hash of that, so a file
//! nearly always has the same number after a remount. Where two volumes want one slot, the later
//! one gets the next that is free.
//!
//! A slot is given to another volume only when the kernel knows no file of the first, and as late
//! as possible: a tool that goes through many boxes remembers numbers, too, and would take two
//! files for one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::exports::DiskState;
use crate::guest::LinkPlace;
use crate::{Error, Result};

/// How many slots there are: a power of two.
const SLOTS: u32 = 1 << 20;
/// How many volumes are remembered, whether the kernel knows files of them or not.
const REMEMBERED: usize = 1 << 16;
/// Most volumes of which the kernel knows files. A mount that shows a thousand boxes with ten
/// snapshots each needs some tens of thousands, if all of it is looked through.
const MOST: usize = 1 << 18;
/// The most of those that stand for one directory of links.
const MOST_DIRECTORIES: usize = 1 << 16;

/// A partition in one state of a disk, and a way to use its files.
#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestVolume {
    /// The state of the disk.
    pub state: Arc<DiskState>,
    /// The partition; 0 for a disk without.
    pub partition: u32,
    /// How the file may be used.
    pub access: GuestAccess,
    slot: u32,
}

/// How a file of a guest may be used, as far as that depends on where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GuestAccess {
    /// In every way that its kind allows.
    Plain,
    /// A directory that must not be entered: its `..` does not lead back.
    Closed,
    /// A link in a directory this many steps below the root.
    LinkAt(u16),
    /// A link in the directory with this inode.
    LinkIn(u32),
}

impl GuestAccess {
    /// Returns the access of a link.
    pub fn of_link(place: LinkPlace) -> GuestAccess {
        match place {
            LinkPlace::Depth(depth) => GuestAccess::LinkAt(depth),
            LinkPlace::Directory(directory) => GuestAccess::LinkIn(directory),
        }
    }
}

impl GuestVolume {
    /// Returns the slot that its files are numbered by.
    pub fn slot(&self) -> u32 {
        self.slot
    }
}

/// The volumes that have a slot.
#[derive(Default)]
pub struct GuestNumbers(Mutex<Slots>);

#[derive(Default)]
struct Slots {
    /// Slots, by the identity of their volume.
    slots: HashMap<u64, u32>,
    /// Volumes, by slot.
    volumes: HashMap<u32, Given>,
    /// Slots in the order in which they were given.
    order: VecDeque<u32>,
    /// How many of them are of directories of links.
    directories: usize,
}

struct Given {
    identity: u64,
    is_directory: bool,
    volume: Weak<GuestVolume>,
}

impl GuestNumbers {
    /// Returns the volume that a partition in a state of a disk is.
    ///
    /// # Errors
    /// ENFILE when the kernel knows files of too many.
    pub fn volume(
        &self,
        state: &Arc<DiskState>,
        partition: u32,
        access: GuestAccess,
    ) -> Result<Arc<GuestVolume>> {
        let identity = identity(state, partition, access);
        let mut slots = self.0.lock();
        let known = slots.slots.get(&identity).copied();
        let slot = match known {
            Some(slot) => slot,
            None => slots.give(identity, matches!(access, GuestAccess::LinkIn(_)))?,
        };
        let Some(given) = slots.volumes.get_mut(&slot) else {
            return Err(too_many());
        };
        if let Some(volume) = given.volume.upgrade() {
            return Ok(volume);
        }
        let volume = Arc::new(GuestVolume {
            state: state.clone(),
            partition,
            access,
            slot,
        });
        given.volume = Arc::downgrade(&volume);
        Ok(volume)
    }
}

impl Slots {
    /// Gives a slot to what has none.
    fn give(&mut self, identity: u64, is_directory: bool) -> Result<u32> {
        while self.volumes.len() >= REMEMBERED && self.forget_one() {}
        let is_full =
            self.volumes.len() >= MOST || (is_directory && self.directories >= MOST_DIRECTORIES);
        if is_full {
            return Err(too_many());
        }
        let mut slot = identity as u32 % SLOTS;
        while self.volumes.contains_key(&slot) {
            slot = (slot + 1) % SLOTS;
        }
        let given = Given {
            identity,
            is_directory,
            volume: Weak::new(),
        };
        self.slots.insert(identity, slot);
        self.volumes.insert(slot, given);
        self.order.push_back(slot);
        self.directories += usize::from(is_directory);
        Ok(slot)
    }

    /// Forgets the oldest of some slots of which nothing is known. Returns false if there is none.
    fn forget_one(&mut self) -> bool {
        const LOOKED_AT: usize = 64;
        for _ in 0..LOOKED_AT {
            let Some(slot) = self.order.pop_front() else {
                return false;
            };
            let is_known = |given: &Given| given.volume.strong_count() > 0;
            if self.volumes.get(&slot).is_some_and(is_known) {
                self.order.push_back(slot);
            } else if let Some(given) = self.volumes.remove(&slot) {
                self.slots.remove(&given.identity);
                self.directories -= usize::from(given.is_directory);
                return true;
            }
        }
        false
    }
}

/// ENFILE for a volume that there is no slot for.
fn too_many() -> Error {
    Error::new(
        libc::ENFILE,
        "the kernel has cached files of too many disk states; it drops them in time, or with \
         `echo 2 > /proc/sys/vm/drop_caches`",
    )
}

/// Returns what tells a volume from others, the same after a remount.
fn identity(state: &DiskState, partition: u32, access: GuestAccess) -> u64 {
    let (kind, value) = match access {
        GuestAccess::Plain => (0, 0),
        GuestAccess::Closed => (1, 0),
        GuestAccess::LinkAt(depth) => (2, u32::from(depth)),
        GuestAccess::LinkIn(directory) => (3, directory),
    };
    let mut hash = Sha256::new();
    hash.update(state.number().to_le_bytes());
    for part in [partition, kind, value] {
        hash.update(part.to_le_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hash.finalize()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(number: u64) -> Arc<DiskState> {
        Arc::new(DiskState::numbered(number))
    }

    #[test]
    fn volumes_that_are_known_never_share_a_slot_and_keep_theirs() {
        let numbers = GuestNumbers::default();
        let states: Vec<_> = (0..5000).map(state).collect();
        let mut slots = std::collections::BTreeSet::new();
        let mut known = Vec::new();
        for state in &states {
            for partition in 0..4 {
                let volume = numbers
                    .volume(state, partition, GuestAccess::Plain)
                    .unwrap();
                assert!(volume.slot() < SLOTS && slots.insert(volume.slot()));
                known.push(volume);
            }
        }
        for volume in &known {
            let again = numbers.volume(&volume.state, volume.partition, volume.access);
            assert!(Arc::ptr_eq(&again.unwrap(), volume));
        }
        // Also for a while after they are forgotten.
        let of = |numbers: &GuestNumbers, n: usize| {
            let volume = numbers.volume(&states[n], 3, GuestAccess::Plain);
            volume.unwrap().slot()
        };
        let before: Vec<u32> = (0..5000).map(|n| of(&numbers, n)).collect();
        drop(known);
        let after: Vec<u32> = (0..5000).rev().map(|n| of(&numbers, n)).collect();
        assert!(before.iter().eq(after.iter().rev()));
        // And, nearly always, in another mount.
        let other = GuestNumbers::default();
        let same = (0..5000).filter(|n| of(&other, *n) == before[*n]).count();
        assert!(same > 4800, "{same}");
    }

    #[test]
    fn slots_are_given_again_when_nothing_is_known_of_the_oldest() {
        let numbers = GuestNumbers::default();
        let kept = numbers.volume(&state(7), 0, GuestAccess::Closed).unwrap();
        for number in 0..REMEMBERED as u64 + 1000 {
            numbers
                .volume(&state(number), 1, GuestAccess::Plain)
                .unwrap();
        }
        assert!(numbers.0.lock().volumes.len() <= REMEMBERED);
        let again = numbers.volume(&state(7), 0, GuestAccess::Closed).unwrap();
        assert!(Arc::ptr_eq(&kept, &again));
    }

    #[test]
    fn directories_of_links_take_a_part_of_the_slots_at_most() {
        let numbers = GuestNumbers::default();
        let state = state(1);
        let link = |directory| numbers.volume(&state, 0, GuestAccess::LinkIn(directory));
        let known: Vec<_> = (0..MOST_DIRECTORIES as u32)
            .map(|directory| link(directory).unwrap())
            .collect();
        assert_eq!(link(u32::MAX).unwrap_err().errno(), libc::ENFILE);
        assert!(numbers.volume(&state, 1, GuestAccess::Plain).is_ok());
        drop(known);
        assert!(link(u32::MAX).is_ok());
    }
}
