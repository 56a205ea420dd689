//! A cache of indexes made here, for directories without an index of their own.

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

/// The most bytes of indexes kept for all file systems together.
const INDEXES: u64 = 12 << 20;
/// The largest index: a directory of more than a million names gets none, and every lookup searches
/// all names.
const MAX_INDEX: usize = 8 << 20;

/// The names of recently searched directories, by file system and directory.
pub(super) struct NameCache {
    kept: Cache<Key, Arc<NameIndex>, BySize>,
    /// A random seed: names can't be chosen to have the same hash.
    hashes: RandomState,
}

type Key = (u64, u32);

impl NameCache {
    pub fn new() -> NameCache {
        // So few that the cache is not split into parts that are too small for a large index.
        const EXPECTED: usize = 32;
        NameCache {
            kept: Cache::with_weighter(EXPECTED, INDEXES, BySize),
            hashes: RandomState::new(),
        }
    }

    pub fn get(&self, directory: Key) -> Option<Arc<NameIndex>> {
        self.kept.get(&directory)
    }

    pub fn insert(&self, directory: Key, index: NameIndex) {
        self.kept.insert(directory, Arc::new(index));
    }

    pub fn hash(&self, name: &[u8]) -> u32 {
        self.hashes.hash_one(name) as u32
    }
}

#[derive(Clone)]
struct BySize;

impl Weighter<Key, Arc<NameIndex>> for BySize {
    fn weight(&self, _: &Key, index: &Arc<NameIndex>) -> u64 {
        const ITSELF: usize = 128;
        (ITSELF + index.entries.capacity() * size_of::<HashedName>()) as u64
    }
}

/// The names of a directory, by hash.
#[derive(Default)]
pub(super) struct NameIndex {
    /// By hash, once sorted.
    entries: Vec<HashedName>,
    pub is_too_large: bool,
}

/// The hash of a name, and where a listing of its entry begins, in units of four bytes.
type HashedName = (u32, u32);

impl NameIndex {
    /// Adds a name, if there is room.
    pub fn add(&mut self, hash: u32, place: u64) {
        match u32::try_from(place / 4) {
            Ok(place) if self.entries.len() < MAX_INDEX / size_of::<HashedName>() => {
                self.entries.push((hash, place));
            }
            _ => self.is_too_large = true,
        }
    }

    pub fn sorted(mut self) -> NameIndex {
        self.entries.sort_unstable();
        self.entries.shrink_to_fit();
        self
    }

    /// Returns where names of this hash may be.
    pub fn places(&self, hash: u32) -> impl Iterator<Item = u64> {
        let first = self.entries.partition_point(|entry| entry.0 < hash);
        let rest = self.entries.get(first..).unwrap_or_default();
        rest.iter()
            .take_while(move |entry| entry.0 == hash)
            .map(|entry| u64::from(entry.1) * 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_finds_the_places_of_a_hash() {
        let mut index = NameIndex::default();
        for (hash, place) in [(7, 24), (u32::MAX, 0), (7, 12), (0, 48), (8, 1 << 33)] {
            index.add(hash, place);
        }
        let index = index.sorted();
        let places = |hash| index.places(hash).collect::<Vec<u64>>();
        assert_eq!(places(7), [12, 24]);
        assert_eq!(places(8), [1 << 33]);
        assert_eq!((places(0), places(u32::MAX)), (vec![48], vec![0]));
        assert!(places(1).is_empty() && !index.is_too_large);
    }

    #[test]
    fn the_largest_index_is_kept() {
        let names = NameCache::new();
        let mut index = NameIndex::default();
        for hash in 0..(MAX_INDEX / 8) as u32 {
            index.add(hash, 0);
        }
        names.insert((1, 2), index.sorted());
        assert!(names.get((1, 2)).is_some());
    }

    #[test]
    fn an_index_ends_at_its_limit() {
        let mut index = NameIndex::default();
        index.add(1, 4 << 32);
        assert!(index.is_too_large && index.entries.is_empty());
        for hash in 0..=(MAX_INDEX / 8) as u32 {
            index.add(hash, 0);
        }
        assert_eq!(index.entries.len(), MAX_INDEX / 8);
    }
}
