//! Names in directories.

use super::block_reader::BlockReader;
use super::directory_blocks::{DirectoryBlocks, Each, Entry, parse_entry};
use super::fields::Fields;
use super::hash_index::{ByIndex, HashIndex};
use super::inode::{BLOCK_LEN, FileKind, Inode, ROOT};
use super::name_cache::NameIndex;
use super::xattrs::inline_data;
use crate::{Error, Result};
use std::ops::ControlFlow;

/// The most bytes of a directory that one call searches: for a name, or for the next one of a
/// listing. A damaged directory may have the same block again and again.
const MAX_SEARCH: u64 = 1 << 30;
/// Where the index of a directory does not have a name, a directory up to this size is searched all
/// the same, since the index may be damaged. For larger ones the index decides, as for the kernel.
const MAX_DISTRUSTED: u64 = 1 << 20;

/// A directory whose names can be read.
pub(super) struct Directory<'a> {
    blocks: &'a BlockReader,
    inode: Inode,
}

impl<'a> Directory<'a> {
    /// Opens a directory. ENOTDIR for another kind of file, ENOKEY if it is encrypted.
    pub fn open(blocks: &'a BlockReader, number: u32) -> Result<Directory<'a>> {
        let inode = inode_of(blocks, number)?;
        inode.check_readable()?;
        Ok(Directory { blocks, inode })
    }

    /// Passes the names from `from` on to `each`, until it breaks.
    pub fn list(&self, from: u64, each: Each) -> Result<()> {
        if self.inode.is_inline() {
            return self.list_inline(from, each);
        }
        let names = self.names();
        if !names.has_possible_size() {
            return Err(names.damaged("has an impossible size"));
        }
        let block_size = self.blocks.superblock().block_size;
        let mut since_last = 0;
        for number in from / block_size..names.size() / block_size {
            let Some(bytes) = names.block(number)? else {
                return Err(names.damaged("has a hole"));
            };
            if !names.checksum_is_right(number, &bytes) {
                return Err(names.damaged("has a wrong checksum"));
            }
            since_last += block_size;
            let mut named = |entry: Entry<'_>| {
                since_last = 0;
                each(entry)
            };
            let listed = names.list_region(&bytes, number * block_size, from, &mut named)?;
            if listed.is_break() {
                break;
            }
            if since_last > MAX_SEARCH {
                return Err(names.damaged("has over 1 GiB without a name"));
            }
        }
        Ok(())
    }

    /// Passes the entries that are in the inode itself to `each`. The first word says what is
    /// above.
    fn list_inline(&self, from: u64, each: Each) -> Result<()> {
        const PARENT: usize = 4;
        let data = inline_data(self.blocks, &self.inode)?;
        let size = (self.names().size() as usize).min(data.len());
        let first = data.get(PARENT..BLOCK_LEN.min(size)).unwrap_or_default();
        let second = data.get(BLOCK_LEN..size).unwrap_or_default();
        for (region, base) in [(first, PARENT), (second, BLOCK_LEN)] {
            let listed = self.names().list_region(region, base as u64, from, each)?;
            if listed.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Returns the inode that a name stands for; None if there is no such name.
    pub fn lookup(&self, name: &[u8]) -> Result<Option<u32>> {
        let cache = &self.blocks.volume().caches().names;
        let key = (self.blocks.number(), self.inode.number);
        if let Some(index) = cache.get(key) {
            return self.lookup_in(&index, name);
        }
        let size = self.names().size();
        match HashIndex::of(self.names()).find(name) {
            ByIndex::Found(found) => return Ok(Some(found)),
            ByIndex::Missing if size > MAX_DISTRUSTED => return Ok(None),
            ByIndex::Missing | ByIndex::Unusable => {}
        }
        if size > MAX_SEARCH {
            let what = "is too large to be searched, and its index can't be used";
            return Err(self.names().damaged(what));
        }
        let mut index = NameIndex::default();
        let (mut found, mut place) = (None, 0);
        self.list(0, &mut |entry| {
            if found.is_none() && entry.name == name {
                found = Some(entry.inode);
            }
            index.add(cache.hash(entry.name), place);
            place = entry.next;
            if found.is_some() && index.is_too_large {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        if !index.is_too_large {
            cache.insert(key, index.sorted());
        }
        Ok(found)
    }

    /// Finds a name by an index that was made of all names.
    fn lookup_in(&self, index: &NameIndex, name: &[u8]) -> Result<Option<u32>> {
        let hash = self.blocks.volume().caches().names.hash(name);
        for place in index.places(hash) {
            let mut found = None;
            self.list(place, &mut |entry| {
                found = (entry.name == name).then_some(entry.inode);
                ControlFlow::Break(())
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn names(&self) -> DirectoryBlocks<'_> {
        DirectoryBlocks {
            blocks: self.blocks,
            inode: &self.inode,
        }
    }
}

/// Reads the inode of a directory. ENOTDIR for another kind of file.
fn inode_of(blocks: &BlockReader, number: u32) -> Result<Inode> {
    let inode = blocks.inode(number)?;
    if inode.kind == FileKind::Directory {
        Ok(inode)
    } else {
        let message = format!("inode {number} is not a directory");
        Err(Error::new(libc::ENOTDIR, message))
    }
}

/// Returns the directory that a directory is in, as its own `..` says. EIO if it says nothing.
pub(super) fn parent(blocks: &BlockReader, number: u32) -> Result<u32> {
    let inode = inode_of(blocks, number)?;
    let inode = &inode;
    let names = DirectoryBlocks { blocks, inode };
    let parent = if inode.is_inline() {
        Some(Fields(inode.block()).le32(0))
    } else {
        second_entry(names)?
    };
    parent
        .filter(|parent| (1..=blocks.superblock().inodes).contains(parent))
        .ok_or_else(|| names.damaged("has no entry for its parent"))
}

/// Returns the inode of the entry `..`, which is the second one after `.`.
fn second_entry(names: DirectoryBlocks<'_>) -> Result<Option<u32>> {
    let Some(bytes) = names.block(0)? else {
        return Ok(None);
    };
    let superblock = names.blocks.superblock();
    let Some((Some(itself), len)) = parse_entry(superblock, &bytes) else {
        return Ok(None);
    };
    let rest = bytes.get(len..).unwrap_or_default();
    let Some((Some(parent), _)) = parse_entry(superblock, rest) else {
        return Ok(None);
    };
    let are_dots = itself.name == b"." && parent.name == b"..";
    Ok(are_dots.then_some(parent.inode))
}

/// Returns whether `child` is a directory that may be entered from `directory`: its `..` leads back
/// there.
pub(super) fn is_entered_from(blocks: &BlockReader, child: u32, directory: u32) -> Result<bool> {
    let is_another = child != ROOT && child != directory;
    Ok(is_another && parent(blocks, child)? == directory)
}
