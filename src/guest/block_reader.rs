//! Blocks and inodes of a file system: what everything else is read by.

use super::disk::{Use, Volume};
use super::inode::{Inode, ROOT};
use super::journal_map::{JournalMap, Replacement};
use super::superblock::Superblock;
use crate::{Error, Result};
use std::fmt::Display;

/// Reads blocks and inodes of one file system, as they are with its journal.
///
/// It trusts no number: what lies outside of the file system is EIO with a message.
pub(super) struct BlockReader {
    volume: Volume,
    superblock: Superblock,
    journal: JournalMap,
    /// The number of this file system in the cache of names.
    number: u64,
}

impl BlockReader {
    /// A reader of the file system in `volume` that knows nothing of its journal yet.
    pub fn new(volume: Volume, superblock: Superblock) -> BlockReader {
        BlockReader {
            number: volume.caches().number(),
            volume,
            superblock,
            journal: JournalMap::default(),
        }
    }

    /// Reads blocks from the journal that `journal` names there. `superblock` is read by it, too.
    pub fn set_journal(&mut self, journal: JournalMap) {
        self.journal = journal;
    }

    /// Replaces the superblock by the one in the journal.
    pub fn set_superblock(&mut self, superblock: Superblock) {
        self.superblock = superblock;
    }

    /// The part of the disk that the file system is in.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// What the superblock says.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The number of this file system in the cache of names.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Returns how many blocks exist, whatever the superblock says. No directory and no journal has
    /// more, unless it has one block many times.
    pub fn block_count(&self) -> u64 {
        (self.volume.len() / self.superblock.block_size).min(self.superblock.blocks)
    }

    /// EIO that says what is wrong with this file system.
    pub fn damaged(&self, what: impl Display) -> Error {
        let name = self.volume.name();
        Error::damaged(format!("the file system in {name} is damaged: {what}"))
    }

    /// EIO unless all of these blocks exist.
    pub fn check_blocks(&self, first: u64, len: u64) -> Result<()> {
        match first.checked_add(len) {
            Some(end) if first > 0 && end <= self.superblock.blocks => Ok(()),
            _ => Err(self.damaged(format_args!("there are no blocks {first} to {first}+{len}"))),
        }
    }

    /// Fills `buf` from byte `at` of `block` on.
    pub fn read(&self, what: Use, block: u64, at: u64, mut buf: &mut [u8]) -> Result<()> {
        let size = self.superblock.block_size;
        let start = block
            .checked_mul(size)
            .and_then(|start| start.checked_add(at));
        let end = start.and_then(|start| start.checked_add(buf.len() as u64));
        let (Some(mut start), Some(end)) = (start, end) else {
            return Err(self.damaged(format_args!("there is no block {block}")));
        };
        if end > self.superblock.blocks.saturating_mul(size) {
            return Err(self.damaged(format_args!("there is no block {block}")));
        }
        if self.journal.is_empty() {
            return self.volume.read(what, start, buf);
        }
        while !buf.is_empty() {
            let (block, within) = (start / size, start % size);
            let (len, replacement) = match self.journal.replacement(block) {
                Some(replacement) => (size - within, Some(replacement)),
                None => (self.until_replaced(block) - within, None),
            };
            let (now, later) = buf.split_at_mut(len.min(buf.len() as u64) as usize);
            match replacement {
                Some(replacement) => self.read_replaced(what, replacement, within, now)?,
                None => self.volume.read(what, start, now)?,
            }
            start += now.len() as u64;
            buf = later;
        }
        Ok(())
    }

    /// Returns the bytes from the beginning of `block` to the next block in the journal: at least
    /// one block.
    fn until_replaced(&self, block: u64) -> u64 {
        let next = self.journal.next_replaced(block).unwrap_or(u64::MAX);
        (next - block).saturating_mul(self.superblock.block_size)
    }

    fn read_replaced(&self, what: Use, by: Replacement, within: u64, buf: &mut [u8]) -> Result<()> {
        let at = by.block.saturating_mul(self.superblock.block_size) + within;
        self.volume.read(what, at, buf)?;
        if by.escaped {
            let magic = Replacement::ESCAPED.iter().skip(within as usize);
            for (byte, magic) in buf.iter_mut().zip(magic) {
                *byte = *magic;
            }
        }
        Ok(())
    }

    /// Reads a structure that is a whole block.
    pub fn metadata_block(&self, block: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.superblock.block_size as usize];
        self.read(Use::Metadata, block, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads an inode, whatever it is for.
    pub fn any_inode(&self, number: u32) -> Result<Inode> {
        if number == 0 || number > self.superblock.inodes {
            return Err(self.damaged(format_args!("there is no inode {number}")));
        }
        let (group, index) = self.superblock.place_of(number);
        let (block, at, len) = self.superblock.descriptor(group);
        let mut descriptor = vec![0; len];
        self.read(Use::Metadata, block, at, &mut descriptor)?;
        let table = self
            .superblock
            .inode_table(group, &descriptor)
            .ok_or_else(|| {
                self.damaged(format_args!(
                    "the descriptor of group {group} has a wrong checksum"
                ))
            })?;
        let size = self.superblock.inode_size;
        let mut raw = vec![0; size as usize];
        self.read(Use::Metadata, table, index.saturating_mul(size), &mut raw)?;
        Inode::parse(number, raw, &self.superblock)
            .map_err(|why| self.damaged(format_args!("inode {number} {why}")))
    }

    /// Reads the inode of a file. EIO for an inode that the file system keeps for itself.
    pub fn inode(&self, number: u32) -> Result<Inode> {
        let reserved = || self.damaged(format_args!("inode {number} is not a file's"));
        if number != ROOT && number < self.superblock.first_inode {
            return Err(reserved());
        }
        let inode = self.any_inode(number)?;
        if inode.is_attribute() {
            return Err(reserved());
        }
        Ok(inode)
    }
}
