//! Names in directories.

use super::checksum::crc32c;
use super::fields::Fields;
use super::file_system::FileSystem;
use super::inode::{BLOCK_LEN, FileKind, Inode};
use super::layout::incompat;
use crate::Result;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// The shortest entry.
const MIN_ENTRY: usize = 12;
/// A checksum is in the last bytes of a block, disguised as an entry without a name.
const TAIL: usize = 12;
const TAIL_KIND: u8 = 0xde;
/// Larger directories are refused: tens of millions of names, and a damaged one could go on for ever.
const MAX_SIZE: u64 = 1 << 30;

/// Most bytes of name indexes kept for all file systems together.
const INDEXES: u64 = 16 << 20;
/// A larger directory gets no index; names in it are found by looking at all of them.
const MAX_INDEX: usize = 4 << 20;

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
        if let Some(index) = self.volume.caches().names.get((self.number, directory)) {
            return Ok(index.find(name));
        }
        let inode = self.directory(directory)?;
        let mut index = NameIndex::default();
        let mut found = None;
        self.entries(&inode, 0, &mut |entry| {
            if entry.name == name {
                found = Some(entry.inode);
            }
            index.add(&entry);
            match found.is_some() && index.is_too_large() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        if !index.is_too_large() {
            let names = &self.volume.caches().names;
            names.keep((self.number, directory), index.sorted());
        }
        Ok(found)
    }

    /// The entries of a directory from `from` on.
    fn entries(&self, inode: &Inode, from: u64, each: Each) -> Result<()> {
        if inode.is_inline() {
            return self.inline_entries(inode, from, each);
        }
        let block_size = self.layout().block_size;
        let size = inode.size(self.layout());
        let most = self.blocks_there().saturating_mul(block_size).min(MAX_SIZE);
        if size > most || !size.is_multiple_of(block_size) {
            return Err(self.damaged_directory(inode, "has an impossible size"));
        }
        for number in from / block_size..size / block_size {
            let Some(block) = self.run_at(inode, number)?.block else {
                return Err(self.damaged_directory(inode, "has a hole"));
            };
            let bytes = self.metadata_block(block)?;
            if !self.checksum_is_right_at(inode, number, &bytes) {
                return Err(self.damaged_directory(inode, "has a wrong checksum"));
            }
            let base = number * block_size;
            if self.region(inode, &bytes, base, from, each)?.is_break() {
                break;
            }
        }
        Ok(())
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
    fn region(
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
    fn entry_len(&self, len: u16) -> usize {
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
    fn checksum_is_right_at(&self, inode: &Inode, number: u64, bytes: &[u8]) -> bool {
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
pub(super) struct NameIndexes(Cache<Key, Arc<NameIndex>, BySize>);

type Key = (u64, u32);

impl NameIndexes {
    pub fn new() -> NameIndexes {
        NameIndexes(Cache::with_weighter(1024, INDEXES, BySize))
    }

    fn get(&self, directory: Key) -> Option<Arc<NameIndex>> {
        self.0.get(&directory)
    }

    fn keep(&self, directory: Key, index: NameIndex) {
        self.0.insert(directory, Arc::new(index));
    }
}

#[derive(Clone)]
struct BySize;

impl Weighter<Key, Arc<NameIndex>> for BySize {
    fn weight(&self, _: &Key, index: &Arc<NameIndex>) -> u64 {
        index.bytes() as u64
    }
}

/// All names of a directory, to be found quickly.
#[derive(Default)]
struct NameIndex {
    /// One after the other.
    names: Vec<u8>,
    /// By name, once sorted.
    entries: Vec<Indexed>,
}

#[derive(Clone, Copy)]
struct Indexed {
    at: u32,
    len: u32,
    inode: u32,
}

impl NameIndex {
    /// Adds a name, if there is room.
    fn add(&mut self, entry: &Entry) {
        if self.is_too_large() {
            return;
        }
        self.entries.push(Indexed {
            at: self.names.len() as u32,
            len: entry.name.len() as u32,
            inode: entry.inode,
        });
        self.names.extend(entry.name);
    }

    fn bytes(&self) -> usize {
        const ITSELF: usize = 128;
        ITSELF + self.names.capacity() + self.entries.capacity() * size_of::<Indexed>()
    }

    fn is_too_large(&self) -> bool {
        self.names.len() + self.entries.len() * size_of::<Indexed>() > MAX_INDEX
    }

    fn sorted(mut self) -> NameIndex {
        let names = std::mem::take(&mut self.names);
        let name = |entry: &Indexed| name_in(&names, entry);
        self.entries.sort_by(|a, b| name(a).cmp(name(b)));
        self.entries.shrink_to_fit();
        self.names = names;
        self.names.shrink_to_fit();
        self
    }

    fn find(&self, name: &[u8]) -> Option<u32> {
        let found = self
            .entries
            .binary_search_by(|entry| name_in(&self.names, entry).cmp(name));
        Some(self.entries.get(found.ok()?)?.inode)
    }
}

fn name_in<'a>(names: &'a [u8], entry: &Indexed) -> &'a [u8] {
    let at = entry.at as usize;
    names
        .get(at..at.saturating_add(entry.len as usize))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_finds_what_was_added() {
        let mut index = NameIndex::default();
        for (inode, name) in [(11, &b"b"[..]), (12, b"a"), (13, b"ab"), (14, b"\xff")] {
            index.add(&Entry {
                name,
                inode,
                kind: None,
                next: 0,
            });
        }
        let index = index.sorted();
        assert_eq!(index.find(b"a"), Some(12));
        assert_eq!(index.find(b"ab"), Some(13));
        assert_eq!(index.find(b"b"), Some(11));
        assert_eq!(index.find(b"\xff"), Some(14));
        assert_eq!(index.find(b""), None);
        assert_eq!(index.find(b"c"), None);
    }
}
