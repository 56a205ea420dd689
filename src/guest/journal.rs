//! The journal of a file system that was not unmounted: blocks that were written there and not yet
//! to their places.
//!
//! The kernel would write the blocks back. Here nothing is written: they are read in the journal.

use super::block_map::BlockMap;
use super::block_reader::BlockReader;
use super::checksum::crc32c;
use super::disk::Use;
use super::fields::Fields;
use super::inode::Inode;
use super::journal_map::{JournalMap, MAGIC, Replacement};
use crate::Result;
use std::collections::{BTreeMap, HashMap};

/// Bytes of magic, kind and sequence number.
const HEADER: usize = 12;
/// The most blocks of a journal that are read.
const MAX_BLOCKS: u64 = 1 << 20;
/// The most bytes of a journal that are read; mke2fs makes at most 1 GiB with the usual block size.
const MAX_BYTES: u64 = 4 << 30;
/// The most revoked blocks that are remembered.
const MAX_REVOKED: usize = 1 << 20;
/// Blocks for fast commits at the end, if the superblock does not say how many.
const FAST_BLOCKS: u32 = 256;

mod kind {
    pub const DESCRIPTOR: u32 = 1;
    pub const COMMIT: u32 = 2;
    pub const SUPERBLOCK_V1: u32 = 3;
    pub const SUPERBLOCK_V2: u32 = 4;
    pub const REVOKE: u32 = 5;
}

mod incompat {
    pub const BITS64: u32 = 0x2;
    pub const CSUM_V2: u32 = 0x8;
    pub const CSUM_V3: u32 = 0x10;
    pub const FAST_COMMIT: u32 = 0x20;
    /// These, and revoked blocks (0x1) and asynchronous commits (0x4).
    pub const READ: u32 = 0x1 | BITS64 | 0x4 | CSUM_V2 | CSUM_V3 | FAST_COMMIT;
}

/// Reads the journal of `inode`. EIO if it can't be read. A journal may end in the middle of a
/// transaction; then it counts up to the last complete one.
pub(super) fn load(blocks: &BlockReader, inode: &Inode) -> Result<JournalMap> {
    let log = JournalLog::open(blocks, inode)?;
    match log.start {
        0 => Ok(JournalMap::default()),
        start => LogReader::new(&log).read(start),
    }
}

/// The journal's own superblock.
struct JournalLog<'a> {
    blocks: &'a BlockReader,
    inode: &'a Inode,
    incompat: u32,
    /// The blocks that transactions use in turn.
    first: u32,
    end: u32,
    /// Where the first transaction begins; 0 if there is none.
    start: u32,
    sequence: u32,
    seed: u32,
}

impl<'a> JournalLog<'a> {
    fn open(blocks: &'a BlockReader, inode: &'a Inode) -> Result<JournalLog<'a>> {
        let mut log = JournalLog {
            blocks,
            inode,
            incompat: 0,
            first: 0,
            end: 0,
            start: 0,
            sequence: 0,
            seed: 0,
        };
        let bytes = log.block(0)?;
        let sb = Fields(&bytes);
        let version = sb.be32(4);
        if sb.be32(0) != MAGIC || ![kind::SUPERBLOCK_V1, kind::SUPERBLOCK_V2].contains(&version) {
            return Err(blocks.damaged("the journal has no superblock"));
        }
        if u64::from(sb.be32(0xc)) != blocks.superblock().block_size {
            return Err(blocks.damaged("the journal has blocks of another size"));
        }
        if version == kind::SUPERBLOCK_V2 {
            log.incompat = sb.be32(0x28);
        }
        if log.incompat & !incompat::READ != 0 {
            let what = log.incompat & !incompat::READ;
            let what = format_args!("the journal has features that are not known here ({what:#x})");
            return Err(blocks.damaged(what));
        }
        if log.has_checksums() && !superblock_is_right(sb) {
            return Err(blocks.damaged("the journal's superblock has a wrong checksum"));
        }
        log.seed = crc32c(!0, &[sb.bytes(0x30, 16)]);
        log.first = sb.be32(0x14);
        log.end = sb.be32(0x10);
        if log.incompat & incompat::FAST_COMMIT != 0 {
            let fast = match sb.be32(0x54) {
                0 => FAST_BLOCKS,
                blocks => blocks,
            };
            log.end = log.end.saturating_sub(fast);
        }
        log.sequence = sb.be32(0x18);
        log.start = sb.be32(0x1c);
        if u64::from(log.end) > blocks.block_count() {
            return Err(blocks.damaged("the journal is larger than the file system"));
        }
        if log.start != 0 && !(log.first..log.end).contains(&log.start) {
            return Err(blocks.damaged("the journal's first transaction lies outside of it"));
        }
        Ok(log)
    }

    fn has_checksums(&self) -> bool {
        self.incompat & (incompat::CSUM_V2 | incompat::CSUM_V3) != 0
    }

    /// Returns the most blocks that are read.
    fn most(&self) -> u64 {
        MAX_BLOCKS.min(MAX_BYTES / self.blocks.superblock().block_size)
    }

    /// Returns where a block of the journal is on disk.
    fn place(&self, block: u32) -> Result<u64> {
        let run = BlockMap::of(self.blocks, self.inode).run_at(u64::from(block))?;
        run.block
            .ok_or_else(|| self.blocks.damaged("the journal has a hole"))
    }

    fn block(&self, block: u32) -> Result<Vec<u8>> {
        let place = self.place(block)?;
        let mut bytes = vec![0; self.blocks.superblock().block_size as usize];
        // A journal is read once, and in order.
        self.blocks.read(Use::Contents, place, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn after(&self, block: u32) -> u32 {
        match block.checked_add(1) {
            Some(next) if next < self.end => next,
            _ => self.first,
        }
    }

    /// Verifies a block that ends with a checksum.
    fn tail_is_right(&self, bytes: &[u8]) -> bool {
        let at = bytes.len().saturating_sub(4);
        let sum = Fields(bytes).be32(at);
        !self.has_checksums() || crc32c(self.seed, &[Fields(bytes).bytes(0, at), &[0; 4]]) == sum
    }

    /// Verifies a commit block.
    fn commit_is_right(&self, bytes: &[u8]) -> bool {
        let fields = Fields(bytes);
        let parts = [fields.bytes(0, 16), &[0; 4], fields.bytes(20, bytes.len())];
        !self.has_checksums() || crc32c(self.seed, &parts) == fields.be32(16)
    }
}

fn superblock_is_right(sb: Fields) -> bool {
    let parts = [sb.bytes(0, 0xfc), &[0; 4], sb.bytes(0x100, 1024 - 0x100)];
    crc32c(!0, &parts) == sb.be32(0xfc)
}

/// A block that a transaction writes.
struct LoggedBlock {
    sequence: u32,
    block: u64,
    by: Replacement,
}

/// Reads the log, one transaction after the other.
struct LogReader<'a> {
    log: &'a JournalLog<'a>,
    sequence: u32,
    /// The blocks of complete transactions, in order.
    writes: Vec<LoggedBlock>,
    /// Revoked blocks, and the last transaction that revoked each. What earlier transactions wrote
    /// there does not count: the block may hold a file's contents since.
    revoked: HashMap<u64, u32>,
    /// The blocks of the current transaction.
    new_writes: Vec<LoggedBlock>,
    new_revoked: Vec<u64>,
    /// Blocks that may still be read.
    left: u64,
}

/// Whether transaction `a` came after `b`; the numbers go round.
fn is_later(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

impl<'a> LogReader<'a> {
    fn new(log: &'a JournalLog<'a>) -> LogReader<'a> {
        LogReader {
            log,
            sequence: log.sequence,
            writes: Vec::new(),
            revoked: HashMap::new(),
            new_writes: Vec::new(),
            new_revoked: Vec::new(),
            left: u64::from(log.end - log.first).min(log.most()),
        }
    }

    fn read(mut self, start: u32) -> Result<JournalMap> {
        let mut at = start;
        while self.left > 0 {
            self.left -= 1;
            let bytes = self.log.block(at)?;
            at = self.log.after(at);
            match self.step(&bytes, at)? {
                Some(next) => at = next,
                None => return Ok(self.finish()),
            }
        }
        if u64::from(self.log.end - self.log.first) > self.log.most() {
            return Err(self
                .log
                .blocks
                .damaged("the journal is too large to be read"));
        }
        Ok(self.finish())
    }

    /// Takes a block of the log; the next one is at `at`. Returns where to go on. None at the end
    /// of the log, which is the first block that does not belong to it.
    fn step(&mut self, bytes: &[u8], at: u32) -> Result<Option<u32>> {
        let header = Fields(bytes);
        if header.be32(0) != MAGIC || header.be32(8) != self.sequence {
            return Ok(None);
        }
        match header.be32(4) {
            kind::DESCRIPTOR if self.log.tail_is_right(bytes) => self.descriptor(bytes, at),
            kind::REVOKE if self.log.tail_is_right(bytes) => self.revoke(bytes).map(|()| Some(at)),
            kind::COMMIT if self.log.commit_is_right(bytes) => {
                self.commit();
                Ok(Some(at))
            }
            _ => Ok(None),
        }
    }

    /// A block of tags, one for each of the blocks that follow it.
    fn descriptor(&mut self, bytes: &[u8], mut at: u32) -> Result<Option<u32>> {
        let has = |feature: u32| self.log.incompat & feature != 0;
        let (v3, wide) = (has(incompat::CSUM_V3), has(incompat::BITS64));
        let len = match (v3, has(incompat::CSUM_V2)) {
            (true, _) => 16,
            (false, v2) => 8 + usize::from(wide) * 4 + usize::from(v2) * 2,
        };
        let end = bytes.len() - if self.log.has_checksums() { 4 } else { 0 };
        let mut tag_at = HEADER;
        while tag_at + len <= end && self.left > 0 {
            let tag = DescriptorTag::parse(Fields(bytes), tag_at, v3, wide);
            tag_at += len + if tag.same_uuid { 0 } else { 16 };
            self.left -= 1;
            if self.log.has_checksums() && !self.is_right(&tag, at, v3)? {
                return Ok(None);
            }
            self.new_writes.push(LoggedBlock {
                sequence: self.sequence,
                block: tag.block,
                by: Replacement {
                    block: self.log.place(at)?,
                    escaped: tag.escaped,
                },
            });
            at = self.log.after(at);
            if tag.last {
                break;
            }
        }
        Ok(Some(at))
    }

    /// Verifies the block at `at` by the checksum in its tag.
    fn is_right(&self, tag: &DescriptorTag, at: u32, v3: bool) -> Result<bool> {
        let bytes = self.log.block(at)?;
        let sum = crc32c(self.log.seed, &[&self.sequence.to_be_bytes(), &bytes]);
        Ok(if v3 {
            sum == tag.checksum
        } else {
            sum as u16 == tag.checksum as u16
        })
    }

    /// A list of revoked blocks.
    fn revoke(&mut self, bytes: &[u8]) -> Result<()> {
        let len = match self.log.incompat & incompat::BITS64 {
            0 => 4,
            _ => 8,
        };
        const LIST: usize = HEADER + 4;
        let count = (Fields(bytes).be32(HEADER) as usize).saturating_sub(LIST) / len;
        let list = Fields(bytes).bytes(LIST, count.saturating_mul(len));
        if self.revoked.len() + self.new_revoked.len() + list.len() / len > MAX_REVOKED {
            return Err(self
                .log
                .blocks
                .damaged("the journal revokes too many blocks"));
        }
        self.new_revoked
            .extend(list.chunks_exact(len).map(|entry| match len {
                4 => u64::from(Fields(entry).be32(0)),
                _ => Fields(entry).be64(0),
            }));
        Ok(())
    }

    /// The transaction is complete.
    fn commit(&mut self) {
        self.writes.append(&mut self.new_writes);
        for block in self.new_revoked.drain(..) {
            self.revoked.insert(block, self.sequence);
        }
        self.sequence = self.sequence.wrapping_add(1);
    }

    /// Returns the blocks that count.
    fn finish(self) -> JournalMap {
        let mut replaced = BTreeMap::new();
        for write in self.writes {
            let revoked = self.revoked.get(&write.block);
            if revoked.is_none_or(|by| is_later(write.sequence, *by)) {
                replaced.insert(write.block, write.by);
            }
        }
        JournalMap { blocks: replaced }
    }
}

/// What a descriptor says of one block.
struct DescriptorTag {
    block: u64,
    checksum: u32,
    escaped: bool,
    same_uuid: bool,
    last: bool,
}

impl DescriptorTag {
    fn parse(bytes: Fields, at: usize, v3: bool, wide: bool) -> DescriptorTag {
        let (flags, checksum) = if v3 {
            (bytes.be32(at + 4), bytes.be32(at + 12))
        } else {
            (u32::from(bytes.be16(at + 6)), u32::from(bytes.be16(at + 4)))
        };
        let high = if wide { bytes.be32(at + 8) } else { 0 };
        DescriptorTag {
            block: u64::from(high) << 32 | u64::from(bytes.be32(at)),
            checksum,
            escaped: flags & 1 != 0,
            same_uuid: flags & 2 != 0,
            last: flags & 8 != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_go_round() {
        assert!(is_later(2, 1));
        assert!(!is_later(1, 1));
        assert!(is_later(1, u32::MAX));
        assert!(!is_later(u32::MAX, 1));
    }
}
