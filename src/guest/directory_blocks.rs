//! Blocks of directories: the entries in them, one after the other, and their checksums.

use super::block_map::BlockMap;
use super::block_reader::BlockReader;
use super::checksum::crc32c;
use super::fields::Fields;
use super::inode::{FileKind, Inode};
use super::superblock::{Superblock, incompat};
use crate::{Error, Result};
use std::ops::ControlFlow;

/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// The shortest entry.
const MIN_ENTRY: usize = 12;
/// A checksum is in the last bytes of a block, disguised as an entry without a name.
const TAIL: usize = 12;
const TAIL_KIND: u8 = 0xde;

/// A name in a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<'a> {
    /// The name: any bytes but `/` and NUL, at least one.
    pub name: &'a [u8],
    /// The inode it is a name of.
    pub inode: u32,
    /// The kind of file, if the directory tells.
    pub kind: Option<FileKind>,
    /// Where a listing goes on after this entry: the `from` of
    /// [`FileSystem::list`](super::FileSystem::list). At least 12, so smaller numbers are free for
    /// the caller's own entries.
    pub next: u64,
}

pub(super) type Each<'a> = &'a mut dyn FnMut(Entry<'_>) -> ControlFlow<()>;

/// The blocks of one directory.
#[derive(Clone, Copy)]
pub(super) struct DirectoryBlocks<'a> {
    pub blocks: &'a BlockReader,
    pub inode: &'a Inode,
}

impl<'a> DirectoryBlocks<'a> {
    /// Returns the length of the directory in bytes.
    pub fn size(self) -> u64 {
        self.inode.size(self.blocks.superblock())
    }

    /// Returns whether a directory that has blocks can be as large as it says.
    pub fn has_possible_size(self) -> bool {
        let block_size = self.blocks.superblock().block_size;
        let most = self.blocks.block_count().saturating_mul(block_size);
        self.size() <= most && self.size().is_multiple_of(block_size)
    }

    /// Reads a block by its number in the directory; None for a hole.
    pub fn block(self, number: u64) -> Result<Option<Vec<u8>>> {
        let run = BlockMap::of(self.blocks, self.inode).run_at(number)?;
        run.block
            .map(|block| self.blocks.metadata_block(block))
            .transpose()
    }

    /// Passes the entries of a block, or of a region that stands for one, to `each`. `base` is
    /// where it begins in the directory; entries before `from` are left out.
    pub fn list_region(
        self,
        bytes: &[u8],
        base: u64,
        from: u64,
        each: Each,
    ) -> Result<ControlFlow<()>> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.get(at..).unwrap_or_default();
            let (entry, len) = parse_entry(self.blocks.superblock(), rest)
                .ok_or_else(|| self.damaged("has an impossible entry"))?;
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

    /// Returns whether a block of names has the right checksum. Blocks of an index have theirs
    /// elsewhere, and may still end like the block of names they once were. Nothing of them is
    /// used: read as a block of names they are empty.
    pub fn checksum_is_right(self, number: u64, bytes: &[u8]) -> bool {
        let Some(seed) = self.inode.seed else {
            return true;
        };
        let fields = Fields(bytes);
        let len = entry_len(self.blocks.superblock(), fields.le16(4));
        let is_empty = fields.le32(0) == 0 && len == bytes.len();
        if self.inode.is_indexed() && (number == 0 || is_empty) {
            return true;
        }
        let at = bytes.len().saturating_sub(TAIL);
        fields.le32(at) == 0
            && usize::from(fields.le16(at + 4)) == TAIL
            && fields.u8(at + 7) == TAIL_KIND
            && crc32c(seed, &[fields.bytes(0, at)]) == fields.le32(at + 8)
    }

    /// EIO that says what is wrong with this directory.
    pub fn damaged(self, what: &str) -> Error {
        self.blocks
            .damaged(format_args!("directory {} {what}", self.inode.number))
    }
}

/// Parses the entry that `bytes` begin with: the entry if it is in use, and its length. None if it
/// is impossible.
pub(super) fn parse_entry<'b>(
    superblock: &Superblock,
    bytes: &'b [u8],
) -> Option<(Option<Entry<'b>>, usize)> {
    let fields = Fields(bytes);
    let inode = fields.le32(0);
    let len = entry_len(superblock, fields.le16(4));
    let (name_len, kind) = if superblock.has(incompat::FILETYPE) {
        (usize::from(fields.u8(6)), FileKind::of_entry(fields.u8(7)))
    } else {
        (usize::from(fields.le16(6)), None)
    };
    if len < MIN_ENTRY || !len.is_multiple_of(4) || len > bytes.len() {
        return None;
    }
    if inode == 0 {
        return Some((None, len));
    }
    let name = bytes.get(HEADER..HEADER + name_len)?;
    let impossible = name.is_empty() || name.contains(&b'/') || name.contains(&0);
    if HEADER + name_len > len || impossible || inode > superblock.inodes {
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

/// Returns the length that an entry says it has. In blocks of 64 KiB it does not fit as it is.
pub(super) fn entry_len(superblock: &Superblock, len: u16) -> usize {
    let size = superblock.block_size as usize;
    match len {
        len if size < 65536 => usize::from(len),
        0 | 65535 => size,
        len => usize::from(len & 65532) | usize::from(len & 3) << 16,
    }
}

fn is_dot(name: &[u8]) -> bool {
    name == b"." || name == b".."
}
