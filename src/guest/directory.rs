//! Names in directories.

use super::checksum::crc32c;
use super::fields::Fields;
use super::file_system::FileSystem;
use super::index::ByIndex;
use super::inode::{BLOCK_LEN, FileKind, Inode};
use super::layout::incompat;
use crate::{Error, Result};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::hash::{BuildHasher, RandomState};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// The shortest entry.
const MIN_ENTRY: usize = 12;
/// A checksum is in the last bytes of a block, disguised as an entry without a name.
const TAIL: usize = 12;
const TAIL_KIND: u8 = 0xde;
/// Most bytes of a directory that are looked through in one call: for a name, or for the next one of a
/// listing. A damaged directory may have the same block again and again.
const MAX_SEARCH: u64 = 1 << 30;
/// Where the index of a directory does not have a name, a directory that is no larger is looked through
/// all the same, for the index may be damaged. Larger ones end there, as for the kernel.
const LOOKED_THROUGH: u64 = 1 << 20;

/// Most bytes of indexes of names made here, kept for all file systems together.
const INDEXES: u64 = 16 << 20;
/// A directory of a million names and more gets none; names in it are found by looking at all of them.
const MAX_INDEX: usize = 8 << 20;

/// A name in a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<'a> {
    /// The name: any bytes but `/` and NUL, at least one.
    pub name: &'a [u8],
    /// The inode it is a name of.
    pub inode: u32,
    /// What that is, if the directory tells.
    pub kind: Option<FileKind>,
    /// Where a listing goes on after this entry: what to give to [`FileSystem::list`]. At least 12,
    /// so smaller numbers are free for the caller's own entries.
    pub next: u64,
}

type Each<'a> = &'a mut dyn FnMut(Entry<'_>) -> ControlFlow<()>;

impl FileSystem {
    /// Gives the names in a directory to `each`, one after the other, without `.` and `..`, until it
    /// says to stop: those from `from` on, which is 0 or an [`Entry::next`]. ENOTDIR if it is no
    /// directory; ENOKEY if it is encrypted.
    pub fn list(
        &self,
        directory: u32,
        from: u64,
        each: &mut dyn FnMut(Entry<'_>) -> ControlFlow<()>,
    ) -> Result<()> {
        let inode = self.directory(directory)?;
        self.entries(&inode, from, each)
    }

    /// The inode that a name in a directory stands for; None if there is no such name. `.` and `..`
    /// are no names here. Errors as [`FileSystem::list`].
    pub fn lookup(&self, directory: u32, name: &[u8]) -> Result<Option<u32>> {
        let inode = self.directory(directory)?;
        let (names, key) = (&self.volume.caches().names, (self.number, directory));
        if let Some(index) = names.get(key) {
            return self.find_in(&index, &inode, name);
        }
        let size = inode.size(self.layout());
        match self.find_by_index(&inode, name) {
            ByIndex::Found(found) => return Ok(Some(found)),
            ByIndex::Missing if size > LOOKED_THROUGH => return Ok(None),
            ByIndex::Missing | ByIndex::Unusable => {}
        }
        if size > MAX_SEARCH {
            let what = "is too large to be looked through, and its index can't be used";
            return Err(self.damaged_directory(&inode, what));
        }
        let mut index = NameIndex::default();
        let (mut found, mut place) = (None, 0);
        self.entries(&inode, 0, &mut |entry| {
            if found.is_none() && entry.name == name {
                found = Some(entry.inode);
            }
            index.add(names.hash(entry.name), place);
            place = entry.next;
            match found.is_some() && index.is_too_large {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        if !index.is_too_large {
            names.keep(key, index.sorted());
        }
        Ok(found)
    }

    /// Finds a name by an index that was made of all names.
    fn find_in(&self, index: &NameIndex, inode: &Inode, name: &[u8]) -> Result<Option<u32>> {
        let hash = self.volume.caches().names.hash(name);
        for place in index.places(hash) {
            let mut found = None;
            self.entries(inode, place, &mut |entry| {
                found = (entry.name == name).then_some(entry.inode);
                ControlFlow::Break(())
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// The directory that a directory is in, as its own `..` says. EIO if it says nothing.
    pub(super) fn parent(&self, directory: u32) -> Result<u32> {
        let inode = self.inode(directory)?;
        if inode.kind != FileKind::Directory {
            let sentence = format!("inode {directory} is not a directory");
            return Err(Error::new(libc::ENOTDIR, sentence));
        }
        let parent = match inode.is_inline() {
            true => Some(Fields(inode.block()).le32(0)),
            false => self.second_entry(&inode)?,
        };
        parent
            .filter(|parent| (1..=self.layout().inodes).contains(parent))
            .ok_or_else(|| self.damaged_directory(&inode, "does not say what it is in"))
    }

    /// The inode of the entry `..`, which is the second one after `.`.
    fn second_entry(&self, inode: &Inode) -> Result<Option<u32>> {
        let Some(block) = self.run_at(inode, 0)?.block else {
            return Ok(None);
        };
        let bytes = self.metadata_block(block)?;
        let Some((Some(itself), len)) = self.entry(&bytes) else {
            return Ok(None);
        };
        let Some((Some(parent), _)) = self.entry(bytes.get(len..).unwrap_or_default()) else {
            return Ok(None);
        };
        let are_dots = itself.name == b"." && parent.name == b"..";
        Ok(are_dots.then_some(parent.inode))
    }

    /// The entries of a directory from `from` on.
    fn entries(&self, inode: &Inode, from: u64, each: Each) -> Result<()> {
        if inode.is_inline() {
            return self.inline_entries(inode, from, each);
        }
        let block_size = self.layout().block_size;
        let size = inode.size(self.layout());
        if !self.has_room_for(inode) {
            return Err(self.damaged_directory(inode, "has an impossible size"));
        }
        let mut since_last = 0;
        for number in from / block_size..size / block_size {
            let Some(block) = self.run_at(inode, number)?.block else {
                return Err(self.damaged_directory(inode, "has a hole"));
            };
            let bytes = self.metadata_block(block)?;
            if !self.checksum_is_right_at(inode, number, &bytes) {
                return Err(self.damaged_directory(inode, "has a wrong checksum"));
            }
            let base = number * block_size;
            since_last += block_size;
            let mut named = |entry: Entry<'_>| {
                since_last = 0;
                each(entry)
            };
            let found = self.region(inode, &bytes, base, from, &mut named)?;
            if found.is_break() {
                break;
            }
            if since_last > MAX_SEARCH {
                return Err(self.damaged_directory(inode, "goes on and on without a name"));
            }
        }
        Ok(())
    }

    /// Whether a directory that has blocks can be as large as it says.
    pub(super) fn has_room_for(&self, inode: &Inode) -> bool {
        let block_size = self.layout().block_size;
        let size = inode.size(self.layout());
        let most = self.blocks_there().saturating_mul(block_size);
        size <= most && size.is_multiple_of(block_size)
    }

    /// The entries that are in the inode itself. The first word says what is above.
    fn inline_entries(&self, inode: &Inode, from: u64, each: Each) -> Result<()> {
        const PARENT: usize = 4;
        let data = self.inline_data(inode)?;
        let size = (inode.size(self.layout()) as usize).min(data.len());
        let first = data.get(PARENT..BLOCK_LEN.min(size)).unwrap_or_default();
        let second = data.get(BLOCK_LEN..size).unwrap_or_default();
        for (region, base) in [(first, PARENT), (second, BLOCK_LEN)] {
            if self
                .region(inode, region, base as u64, from, each)?
                .is_break()
            {
                break;
            }
        }
        Ok(())
    }

    /// The entries of a block, or of what stands for one, which begins at `base` of the directory.
    pub(super) fn region(
        &self,
        inode: &Inode,
        bytes: &[u8],
        base: u64,
        from: u64,
        each: Each,
    ) -> Result<ControlFlow<()>> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.get(at..).unwrap_or_default();
            let (entry, len) = self
                .entry(rest)
                .ok_or_else(|| self.damaged_directory(inode, "has an impossible entry"))?;
            let place = base + at as u64;
            at += len;
            if let Some(entry) = entry.filter(|entry| place >= from && !is_dot(entry.name)) {
                let next = base + at as u64;
                if each(Entry { next, ..entry }).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The entry that `bytes` begin with, if it is in use, and how long it is. None if it can't be
    /// so.
    fn entry<'a>(&self, bytes: &'a [u8]) -> Option<(Option<Entry<'a>>, usize)> {
        let fields = Fields(bytes);
        let inode = fields.le32(0);
        let len = self.entry_len(fields.le16(4));
        let (name_len, kind) = match self.layout().has(incompat::FILETYPE) {
            true => (usize::from(fields.u8(6)), FileKind::of_entry(fields.u8(7))),
            false => (usize::from(fields.le16(6)), None),
        };
        if len < MIN_ENTRY || !len.is_multiple_of(4) || len > bytes.len() {
            return None;
        }
        if inode == 0 {
            return Some((None, len));
        }
        let name = bytes.get(HEADER..HEADER + name_len)?;
        let impossible = name.is_empty() || name.contains(&b'/') || name.contains(&0);
        if HEADER + name_len > len || impossible || inode > self.layout().inodes {
            return None;
        }
        let entry = Entry {
            name,
            inode,
            kind,
            next: 0,
        };
        Some((Some(entry), len))
    }

    /// The length in an entry; in blocks of 64 KiB it does not fit as it is.
    pub(super) fn entry_len(&self, len: u16) -> usize {
        let size = self.layout().block_size as usize;
        match len {
            len if size < 65536 => usize::from(len),
            0 | 65535 => size,
            len => usize::from(len & 65532) | usize::from(len & 3) << 16,
        }
    }

    /// Whether a block of names has the right checksum. Blocks of an index have theirs elsewhere,
    /// and may still end like the block of names they once were; of them nothing is used, and as a
    /// block of names they are empty.
    pub(super) fn checksum_is_right_at(&self, inode: &Inode, number: u64, bytes: &[u8]) -> bool {
        let Some(seed) = inode.seed else {
            return true;
        };
        let fields = Fields(bytes);
        let is_empty = fields.le32(0) == 0 && self.entry_len(fields.le16(4)) == bytes.len();
        if inode.is_indexed() && (number == 0 || is_empty) {
            return true;
        }
        let at = bytes.len().saturating_sub(TAIL);
        fields.le32(at) == 0
            && usize::from(fields.le16(at + 4)) == TAIL
            && fields.u8(at + 7) == TAIL_KIND
            && crc32c(seed, &[fields.bytes(0, at)]) == fields.le32(at + 8)
    }

    fn damaged_directory(&self, inode: &Inode, what: &str) -> crate::Error {
        self.damaged(format_args!("directory {} {what}", inode.number))
    }
}

fn is_dot(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

/// The names of directories that were looked up in lately, by file system and directory.
pub(super) struct NameIndexes {
    kept: Cache<Key, Arc<NameIndex>, BySize>,
    /// Nobody can make names that have one hash.
    hashes: RandomState,
}

type Key = (u64, u32);

impl NameIndexes {
    pub fn new() -> NameIndexes {
        // So few that the cache is not cut in parts, into which a large index would not fit.
        const EXPECTED: usize = 32;
        NameIndexes {
            kept: Cache::with_weighter(EXPECTED, INDEXES, BySize),
            hashes: RandomState::new(),
        }
    }

    fn get(&self, directory: Key) -> Option<Arc<NameIndex>> {
        self.kept.get(&directory)
    }

    fn keep(&self, directory: Key, index: NameIndex) {
        self.kept.insert(directory, Arc::new(index));
    }

    fn hash(&self, name: &[u8]) -> u32 {
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

/// All names of a directory, to be found quickly.
#[derive(Default)]
struct NameIndex {
    /// By hash, once sorted.
    entries: Vec<HashedName>,
    is_too_large: bool,
}

/// The hash of a name, and the place that a listing of its entry begins at, in units of four bytes.
type HashedName = (u32, u32);

impl NameIndex {
    /// Adds a name, if there is room.
    fn add(&mut self, hash: u32, place: u64) {
        match u32::try_from(place / 4) {
            Ok(place) if self.entries.len() < MAX_INDEX / size_of::<HashedName>() => {
                self.entries.push((hash, place));
            }
            _ => self.is_too_large = true,
        }
    }

    fn sorted(mut self) -> NameIndex {
        self.entries.sort_unstable();
        self.entries.shrink_to_fit();
        self
    }

    /// Where names may be that have this hash.
    fn places(&self, hash: u32) -> impl Iterator<Item = u64> {
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
        let names = NameIndexes::new();
        let mut index = NameIndex::default();
        for hash in 0..(MAX_INDEX / 8) as u32 {
            index.add(hash, 0);
        }
        names.keep((1, 2), index.sorted());
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
