//! The index that a directory has on disk: a tree of blocks, sorted by the hashes of names.
//!
//! It is only used to find a name: listings read the blocks of names in order. An index that is
//! impossible in any way is ignored.

use super::checksum::crc32c;
use super::directory_blocks::{DirectoryBlocks, Entry, entry_len};
use super::fields::Fields;
use super::name_hash::{HashKind, NameHash};
use super::superblock::{Superblock, incompat};
use std::ops::ControlFlow;

/// Bytes of an entry: a hash and the number of a block.
const ENTRY: usize = 8;
/// Where the root of an index says what kind it is: after the entries for `.` and `..`.
const INFO: usize = 24;
const INFO_LEN: usize = 8;
/// Where the entries of other nodes begin: after an unused entry as long as the block.
const NODE_ENTRIES: usize = 8;
/// Bytes of the structure with the checksum, after the room for entries.
const TAIL: usize = 8;
/// The most blocks of names searched for one hash. Only a directory made for that purpose has as
/// many.
const MAX_SAME: usize = 256;

/// The answer of an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ByIndex {
    /// The name is there, for this inode.
    Found(u32),
    /// By the index, there is no such name.
    Missing,
    /// There is no index that can be used.
    Unusable,
}

/// A node of the tree.
struct IndexNode {
    entries: Vec<u8>,
    /// The entry that is followed.
    at: usize,
}

impl IndexNode {
    fn count(&self) -> usize {
        self.entries.len() / ENTRY
    }

    /// Returns the hash from which on an entry counts. The first entry has none; counts take its
    /// room.
    fn hash(&self, entry: usize) -> u32 {
        match entry {
            0 => 0,
            _ => Fields(&self.entries).le32(entry * ENTRY),
        }
    }

    fn block(&self) -> u64 {
        u64::from(Fields(&self.entries).le32(self.at * ENTRY + 4) & 0x0fff_ffff)
    }

    /// Goes to the last entry that may lead to a hash.
    fn seek(&mut self, hash: u32) {
        let (mut least, mut end) = (0, self.count());
        while end - least > 1 {
            let middle = least + (end - least) / 2;
            if self.hash(middle) <= hash {
                least = middle;
            } else {
                end = middle;
            }
        }
        self.at = least;
    }
}

/// The index of one directory.
#[derive(Clone, Copy)]
pub(super) struct HashIndex<'a> {
    names: DirectoryBlocks<'a>,
}

impl<'a> HashIndex<'a> {
    /// The index of a directory, which may have none.
    pub fn of(names: DirectoryBlocks<'a>) -> HashIndex<'a> {
        HashIndex { names }
    }

    /// Finds a name.
    pub fn find(self, name: &[u8]) -> ByIndex {
        let inode = self.names.inode;
        let is_used =
            inode.is_indexed() && self.superblock().has_indexes && self.names.has_possible_size();
        if !is_used || inode.is_inline() || inode.is_encrypted() || inode.ignores_case() {
            return ByIndex::Unusable;
        }
        self.search(name).unwrap_or(ByIndex::Unusable)
    }

    fn superblock(self) -> &'a Superblock {
        self.names.blocks.superblock()
    }

    /// Returns None if anything is impossible.
    fn search(self, name: &[u8]) -> Option<ByIndex> {
        let root = self.block(0)?;
        let (hash, levels) = self.root(&root)?;
        let hash = hash.of(name);
        let mut path = vec![self.node(&root, INFO + INFO_LEN)?];
        path.last_mut()?.seek(hash);
        for _ in 0..levels {
            let mut node = self.node_below(path.last()?)?;
            node.seek(hash);
            path.push(node);
        }
        for _ in 0..MAX_SAME {
            if let Some(found) = self.find_in_block(path.last()?.block(), name)? {
                return Some(ByIndex::Found(found));
            }
            if !self.go_on(&mut path, hash)? {
                return Some(ByIndex::Missing);
            }
        }
        None
    }

    /// Parses the root: how names are hashed, and how many levels are below it.
    fn root(self, root: &[u8]) -> Option<(NameHash, u8)> {
        let layout = self.superblock();
        let fields = Fields(root);
        let rest = root.len().checked_sub(12)?;
        let dots = entry_len(self.superblock(), fields.le16(4)) == 12
            && entry_len(self.superblock(), fields.le16(16)) == rest
            && fields.le32(0) != 0
            && fields.le32(12) != 0;
        let (zero, kind) = (fields.le32(INFO), fields.u8(INFO + 4));
        let (len, levels, flags) = (
            fields.u8(INFO + 5),
            fields.u8(INFO + 6),
            fields.u8(INFO + 7),
        );
        let most = if layout.has(incompat::LARGEDIR) { 3 } else { 2 };
        if !dots || zero != 0 || usize::from(len) != INFO_LEN || levels >= most || flags & 1 != 0 {
            return None;
        }
        let (kind, signed) = match kind {
            0 => (HashKind::Legacy, layout.signed_hash),
            1 => (HashKind::HalfMd4, layout.signed_hash),
            2 => (HashKind::Tea, layout.signed_hash),
            3 => (HashKind::Legacy, Some(false)),
            4 => (HashKind::HalfMd4, Some(false)),
            5 => (HashKind::Tea, Some(false)),
            _ => return None,
        };
        let hash = NameHash {
            kind,
            signed: signed?,
            seed: layout.hash_seed,
        };
        Some((hash, levels))
    }

    /// Parses the node whose entries begin at `at` of a block.
    fn node(self, block: &[u8], at: usize) -> Option<IndexNode> {
        let fields = Fields(block);
        let tail = if self.names.inode.seed.is_some() {
            TAIL
        } else {
            0
        };
        let room = block.len().checked_sub(at + tail)? / ENTRY;
        let (limit, count) = (
            usize::from(fields.le16(at)),
            usize::from(fields.le16(at + 2)),
        );
        if limit != room || count == 0 || count > limit {
            return None;
        }
        let end = at + count * ENTRY;
        if let Some(seed) = self.names.inode.seed {
            let tail = at + limit * ENTRY;
            let parts = [fields.bytes(0, end), fields.bytes(tail, 4), &[0; 4]];
            if crc32c(seed, &parts) != fields.le32(tail + 4) {
                return None;
            }
        }
        Some(IndexNode {
            entries: block.get(at..end)?.to_vec(),
            at: 0,
        })
    }

    /// Reads the node that another leads to.
    fn node_below(self, above: &IndexNode) -> Option<IndexNode> {
        let block = self.block(above.block())?;
        let fields = Fields(&block);
        let is_node =
            fields.le32(0) == 0 && entry_len(self.superblock(), fields.le16(4)) == block.len();
        is_node.then(|| self.node(&block, NODE_ENTRIES))?
    }

    /// Goes to the next block that may have names of this hash; false if there is none. Names of
    /// one hash may take several blocks; the hash that such a block begins with is marked.
    fn go_on(self, path: &mut Vec<IndexNode>, hash: u32) -> Option<bool> {
        let levels = path.len();
        while let Some(node) = path.last_mut() {
            if node.at + 1 < node.count() {
                node.at += 1;
                break;
            }
            path.pop();
        }
        let Some(node) = path.last() else {
            return Some(false);
        };
        if node.hash(node.at) != hash | 1 {
            return Some(false);
        }
        while path.len() < levels {
            let below = self.node_below(path.last()?)?;
            path.push(below);
        }
        Some(true)
    }

    /// Searches a block of names; Some(None) if the name is not there.
    fn find_in_block(self, number: u64, name: &[u8]) -> Option<Option<u32>> {
        if number == 0 {
            return None;
        }
        let bytes = self.block(number)?;
        if !self.names.checksum_is_right(number, &bytes) {
            return None;
        }
        let mut found = None;
        let mut each = |entry: Entry<'_>| {
            if entry.name != name {
                return ControlFlow::Continue(());
            }
            found = Some(entry.inode);
            ControlFlow::Break(())
        };
        let looked_at = self.names.list_region(&bytes, 0, 0, &mut each);
        looked_at.is_ok().then_some(found)
    }

    /// Reads a block by its number in the directory.
    fn block(self, number: u64) -> Option<Vec<u8>> {
        let blocks = self.names.size() / self.superblock().block_size;
        if number >= blocks {
            return None;
        }
        self.names.block(number).ok()?
    }
}
