//! Block maps: which blocks of the disk a file's blocks are, by extent trees (ext4) or block
//! numbers (ext2, ext3).

use super::block_reader::BlockReader;
use super::checksum::crc32c;
use super::disk::Use;
use super::fields::Fields;

use super::inode::Inode;
use crate::Result;
use std::ops::Range;

/// The most blocks that a file may have.
const MAX_BLOCKS: u64 = 1 << 32;
const EXTENT_MAGIC: u16 = 0xf30a;
/// The deepest tree that the kernel makes.
const MAX_DEPTH: u16 = 5;
/// Bytes of a node's header, and of each of its entries.
const ENTRY: usize = 12;
/// An extent whose length is greater by this was allocated and never written.
const UNWRITTEN: u64 = 32768;

/// Adjacent blocks of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// The first of them on disk; None for zeros that take no space.
    pub block: Option<u64>,
    /// How many; at least 1.
    pub len: u64,
}

impl Run {
    fn hole(len: u64) -> Run {
        Run { block: None, len }
    }
}

/// The map of one file's blocks.
#[derive(Clone, Copy)]
pub(super) struct BlockMap<'a> {
    blocks: &'a BlockReader,
    inode: &'a Inode,
}

impl<'a> BlockMap<'a> {
    /// The map of a file.
    pub fn of(blocks: &'a BlockReader, inode: &'a Inode) -> BlockMap<'a> {
        BlockMap { blocks, inode }
    }

    /// Reads all of the contents of a small file. EIO if it has more than `max` bytes.
    pub fn read_all(self, max: u64) -> Result<Vec<u8>> {
        let size = self.inode.size(self.blocks.superblock());
        if size > max {
            let number = self.inode.number;
            return Err(self
                .blocks
                .damaged(format_args!("inode {number} has {size} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `buf` from `offset` of the file's blocks on.
    pub fn read(self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        let size = self.blocks.superblock().block_size;
        while !buf.is_empty() {
            let (block, within) = (offset / size, offset % size);
            let run = self.run_at(block)?;
            let len = run.len.saturating_mul(size) - within;
            let (now, later) = buf.split_at_mut(len.min(buf.len() as u64) as usize);
            match run.block {
                Some(block) => self.blocks.read(Use::Contents, block, within, now)?,
                None => now.fill(0),
            }
            offset = offset.saturating_add(now.len() as u64);
            buf = later;
        }
        Ok(())
    }

    /// Returns where a block of the file is, and for how many blocks (at least one) that goes on.
    /// EIO if the map is damaged.
    pub fn run_at(self, block: u64) -> Result<Run> {
        if block >= MAX_BLOCKS {
            return Ok(Run::hole(u64::MAX - block));
        }
        if self.inode.has_extents() {
            self.run_by_extents(block)
        } else {
            self.run_by_numbers(block)
        }
    }

    /// Walks down the extent tree. A node may only speak of the range that its parent's entry
    /// leaves to it. So every node is used in one place, and no tree is larger than what it takes
    /// on disk.
    fn run_by_extents(self, block: u64) -> Result<Run> {
        let mut range = 0..MAX_BLOCKS;
        let mut node = self.extent_node(self.inode.block().to_vec(), None)?;
        loop {
            let (found, end) = entry_for(&node.entries, block, &range)
                .ok_or_else(|| self.damaged("its extents are out of order"))?;
            let Some(entry) = found else {
                return Ok(Run::hole(end - block));
            };
            let fields = Fields(entry);
            let first = u64::from(fields.le32(0));
            if node.depth == 0 {
                return self.run_of_extent(fields, block, end);
            }
            let child = fields.le32_and(4, u32::from(fields.le16(8)));
            let bytes = self.blocks.metadata_block(child)?;
            range = first..end;
            node = self.extent_node(bytes, Some(node.depth))?;
        }
    }

    /// Parses and checks a node of the tree. `above` is the depth of its parent, None for the root.
    fn extent_node(self, bytes: Vec<u8>, above: Option<u16>) -> Result<ExtentNode> {
        let damaged = |what: &str| Err(self.damaged(what));
        let fields = Fields(&bytes);
        let (count, room, depth) = (fields.le16(2), fields.le16(4), fields.le16(6));
        if fields.le16(0) != EXTENT_MAGIC {
            return damaged("a node of its extents has no magic number");
        }
        let deeper_by_one = match above {
            Some(above) => depth.checked_add(1) == Some(above),
            None => depth <= MAX_DEPTH,
        };
        let end = ENTRY + usize::from(room) * ENTRY;
        if !deeper_by_one || count > room || end > bytes.len() {
            return damaged("a node of its extents is impossible");
        }
        // The checksum of the inode covers the root.
        if let (Some(seed), Some(_)) = (self.inode.seed, above)
            && crc32c(seed, &[fields.bytes(0, end)]) != fields.le32(end)
        {
            return damaged("a node of its extents has a wrong checksum");
        }
        let entries = fields.bytes(ENTRY, usize::from(count) * ENTRY).to_vec();
        Ok(ExtentNode { entries, depth })
    }

    /// Returns what an extent says of `block`, which is not before it; the next extent begins at
    /// `end`.
    fn run_of_extent(self, extent: Fields, block: u64, end: u64) -> Result<Run> {
        let (first, len) = (u64::from(extent.le32(0)), u64::from(extent.le16(4)));
        let start = extent.le32_and(8, u32::from(extent.le16(6)));
        let (len, unwritten) = match len.checked_sub(UNWRITTEN) {
            Some(len @ 1..) => (len, true),
            _ => (len, false),
        };
        let within = block - first;
        if len == 0 || first + len > end {
            return Err(self.damaged("its extents overlap"));
        }
        self.blocks.check_blocks(start, len)?;
        Ok(match len.checked_sub(within) {
            None | Some(0) => Run::hole(end - block),
            Some(rest) => Run {
                block: (!unwritten).then_some(start + within),
                len: rest,
            },
        })
    }

    /// Looks a block up by the twelve block numbers in the inode, and the three trees of block
    /// numbers of one to three levels.
    fn run_by_numbers(self, block: u64) -> Result<Run> {
        const DIRECT: u64 = 12;
        let Some(mut rest) = block.checked_sub(DIRECT) else {
            let direct = Fields(self.inode.block()).bytes(0, DIRECT as usize * 4);
            return self.run_of_numbers(direct, block);
        };
        let per = self.blocks.superblock().pointers();
        for level in 1..=3 {
            // At most 2^14 to the third.
            let covers = per.pow(level);
            if rest < covers {
                let at = (DIRECT as usize + level as usize - 1) * 4;
                let table = u64::from(Fields(self.inode.block()).le32(at));
                return self.run_below(table, covers, rest);
            }
            rest -= covers;
        }
        Ok(Run::hole(u64::MAX - block))
    }

    /// Looks up block `rest` of the `covers` blocks in the tree whose root is the block `table`.
    fn run_below(self, mut table: u64, mut covers: u64, mut rest: u64) -> Result<Run> {
        let per = self.blocks.superblock().pointers();
        loop {
            if table == 0 {
                return Ok(Run::hole(covers - rest));
            }
            let numbers = self.blocks.metadata_block(table)?;
            covers /= per;
            let index = rest / covers;
            if covers == 1 {
                return self.run_of_numbers(&numbers, index);
            }
            table = u64::from(Fields(&numbers).le32(index as usize * 4));
            rest %= covers;
        }
    }

    /// Returns the run that begins at `index` in a table of block numbers.
    fn run_of_numbers(self, numbers: &[u8], index: u64) -> Result<Run> {
        let mut rest = numbers
            .get(index as usize * 4..)
            .unwrap_or_default()
            .chunks_exact(4)
            .map(|number| u64::from(Fields(number).le32(0)));
        let first = rest.next().unwrap_or(0);
        if first == 0 {
            let len = 1 + rest.take_while(|number| *number == 0).count() as u64;
            return Ok(Run::hole(len));
        }
        let more = (first + 1..).zip(rest).take_while(|(a, b)| a == b).count();
        let len = 1 + more as u64;
        self.blocks.check_blocks(first, len)?;
        Ok(Run {
            block: Some(first),
            len,
        })
    }

    fn damaged(self, what: &str) -> crate::Error {
        self.blocks
            .damaged(format_args!("inode {}: {what}", self.inode.number))
    }
}

/// A node of a tree of extents.
struct ExtentNode {
    entries: Vec<u8>,
    depth: u16,
}

/// Returns the entry of a node that `block` belongs to, if any, and the end of what that says. None
/// if the entries are out of order, or one is outside of the node's range.
fn entry_for<'a>(
    entries: &'a [u8],
    block: u64,
    range: &Range<u64>,
) -> Option<(Option<&'a [u8]>, u64)> {
    let mut found = None;
    let mut least = range.start;
    for entry in entries.chunks_exact(ENTRY) {
        let first = u64::from(Fields(entry).le32(0));
        if first < least || first >= range.end {
            return None;
        }
        if first > block {
            return Some((found, first));
        }
        found = Some(entry);
        least = first + 1;
    }
    Some((found, range.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(firsts: &[u32]) -> Vec<u8> {
        let entry = |first: &u32| [first.to_le_bytes(), [0; 4], [0; 4]].concat();
        firsts.iter().flat_map(entry).collect()
    }

    #[test]
    fn entries_out_of_order_or_out_of_place_are_refused() {
        let (good, range) = (node(&[10, 20, 30]), 10..40);
        let found = |block| {
            let (found, end) = entry_for(&good, block, &range).unwrap();
            (found.map(|entry| Fields(entry).le32(0)), end)
        };
        assert_eq!(found(15), (Some(10), 20));
        assert_eq!(found(20), (Some(20), 30));
        assert_eq!(found(39), (Some(30), 40));
        assert_eq!(entry_for(&good, 5, &(0..40)).unwrap(), (None, 10));
        assert!(entry_for(&good, 15, &(11..40)).is_none());
        assert!(entry_for(&good, 35, &(10..30)).is_none());
        assert!(entry_for(&node(&[10, 10]), 35, &range).is_none());
        assert!(entry_for(&node(&[20, 10]), 35, &range).is_none());
        assert_eq!(entry_for(&[], 15, &range).unwrap(), (None, 40));
    }
}
