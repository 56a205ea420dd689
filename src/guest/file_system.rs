//! An ext2, ext3 or ext4 file system, read only.

use super::disk::{Use, Volume};
use super::inode::{Attributes, FileKind, Inode};
use super::layout::Layout;
use super::replaced::{Replaced, Replacement};
use crate::{Error, Result};
use std::fmt::Display;

/// The kernel allows no longer targets of symbolic links.
const MAX_SYMLINK: u64 = 4096;
/// How many runs of a file are looked at in search of a hole or of data, before the answer is the one
/// that is never wrong: a hole may be told as data. Fewer where blocks are larger than 4 KiB, since
/// each run may take a few blocks of the file's map to be read.
const MAX_RUNS: u64 = 1 << 16;

/// A file system of the guest's, read only. Files go by their inode numbers, as in the guest; no
/// call keeps anything open.
///
/// Calls may come from any number of threads at once. Memory is bounded, whatever the disk says; so
/// is the time each call takes.
///
/// Every call may fail with EIO, if the file system is damaged or the disk can't be read; the
/// message says what is wrong. No call asks whether the disk changed meanwhile: that is for the
/// caller to do, after reading, with [`Chain::unchanged`](crate::disk::Chain::unchanged).
pub struct FileSystem {
    pub(super) volume: Volume,
    pub(super) layout: Layout,
    pub(super) replaced: Replaced,
    /// What the names of this one are kept by.
    pub(super) number: u64,
}

impl FileSystem {
    /// The inode of the root directory.
    pub const ROOT: u32 = 2;

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How many blocks there are, whatever the superblock says: no directory and no journal has more,
    /// but one that has the same block again and again.
    pub(super) fn blocks_there(&self) -> u64 {
        (self.volume.len() / self.layout.block_size).min(self.layout.blocks)
    }

    /// EIO that says what is wrong with this file system.
    pub(super) fn damaged(&self, what: impl Display) -> Error {
        let name = self.volume.name();
        Error::damaged(format!("the file system in {name} is damaged: {what}"))
    }

    /// EIO if not all of these blocks exist.
    pub(super) fn check_blocks(&self, first: u64, len: u64) -> Result<()> {
        match first.checked_add(len) {
            Some(end) if first > 0 && end <= self.layout.blocks => Ok(()),
            _ => Err(self.damaged(format_args!("there are no blocks {first} to {first}+{len}"))),
        }
    }

    /// Fills `buf` from byte `at` of `block` on, as it is with the journal.
    pub(super) fn read_blocks(
        &self,
        what: Use,
        block: u64,
        at: u64,
        mut buf: &mut [u8],
    ) -> Result<()> {
        let size = self.layout.block_size;
        let start = block
            .checked_mul(size)
            .and_then(|start| start.checked_add(at));
        let end = start.and_then(|start| start.checked_add(buf.len() as u64));
        let (Some(mut start), Some(end)) = (start, end) else {
            return Err(self.damaged(format_args!("there is no block {block}")));
        };
        if end > self.layout.blocks.saturating_mul(size) {
            return Err(self.damaged(format_args!("there is no block {block}")));
        }
        if self.replaced.is_empty() {
            return self.volume.read(what, start, buf);
        }
        while !buf.is_empty() {
            let (block, within) = (start / size, start % size);
            let (len, replacement) = match self.replaced.replacement(block) {
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

    /// Bytes from the beginning of `block` to the next one that is replaced, at least one block.
    fn until_replaced(&self, block: u64) -> u64 {
        let next = self.replaced.next_replaced(block).unwrap_or(u64::MAX);
        (next - block).saturating_mul(self.layout.block_size)
    }

    fn read_replaced(&self, what: Use, by: Replacement, within: u64, buf: &mut [u8]) -> Result<()> {
        let at = by.block.saturating_mul(self.layout.block_size) + within;
        self.volume.read(what, at, buf)?;
        if by.escaped {
            let magic = Replacement::ESCAPED.iter().skip(within as usize);
            for (byte, magic) in buf.iter_mut().zip(magic) {
                *byte = *magic;
            }
        }
        Ok(())
    }

    /// An inode, whatever it is for.
    pub(super) fn any_inode(&self, number: u32) -> Result<Inode> {
        if number == 0 || number > self.layout.inodes {
            return Err(self.damaged(format_args!("there is no inode {number}")));
        }
        let (group, index) = self.layout.place_of(number);
        let (block, at, len) = self.layout.descriptor(group);
        let mut descriptor = vec![0; len];
        self.read_blocks(Use::Metadata, block, at, &mut descriptor)?;
        let table = self.layout.inode_table(group, &descriptor).ok_or_else(|| {
            self.damaged(format_args!(
                "the descriptor of group {group} has a wrong checksum"
            ))
        })?;
        let size = self.layout.inode_size;
        let mut raw = vec![0; size as usize];
        self.read_blocks(Use::Metadata, table, index.saturating_mul(size), &mut raw)?;
        Inode::parse(number, raw, &self.layout)
            .map_err(|why| self.damaged(format_args!("inode {number} {why}")))
    }

    /// The inode of a file. What the file system keeps for itself is none.
    pub(super) fn inode(&self, number: u32) -> Result<Inode> {
        if number != FileSystem::ROOT && number < self.layout.first_inode {
            return Err(self.damaged(format_args!("inode {number} is not a file's")));
        }
        let inode = self.any_inode(number)?;
        if inode.is_attribute() {
            return Err(self.damaged(format_args!("inode {number} is not a file's")));
        }
        Ok(inode)
    }

    /// The value of an attribute that has an inode of its own.
    pub(super) fn attribute_inode(&self, number: u32, max: u64) -> Result<Vec<u8>> {
        let inode = self.any_inode(number)?;
        if !inode.is_attribute() {
            return Err(self.damaged(format_args!("inode {number} has no attribute")));
        }
        self.whole(&inode, max)
    }

    /// All of the contents of a small file.
    fn whole(&self, inode: &Inode, max: u64) -> Result<Vec<u8>> {
        let size = inode.size(&self.layout);
        if size > max {
            let number = inode.number;
            return Err(self.damaged(format_args!("inode {number} has {size} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        self.read_mapped(inode, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `buf` from `offset` of the file's blocks on.
    fn read_mapped(&self, inode: &Inode, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        let size = self.layout.block_size;
        while !buf.is_empty() {
            let (block, within) = (offset / size, offset % size);
            let run = self.run_at(inode, block)?;
            let len = run.len.saturating_mul(size) - within;
            let (now, later) = buf.split_at_mut(len.min(buf.len() as u64) as usize);
            match run.block {
                Some(block) => self.read_blocks(Use::Contents, block, within, now)?,
                None => now.fill(0),
            }
            offset = offset.saturating_add(now.len() as u64);
            buf = later;
        }
        Ok(())
    }

    /// What is in the inode itself: `i_block`, and what follows it in an attribute.
    pub(super) fn inline_data(&self, inode: &Inode) -> Result<Vec<u8>> {
        let mut bytes = inode.block().to_vec();
        bytes.extend(self.inline_rest(inode)?);
        Ok(bytes)
    }

    /// The inode of a directory. ENOTDIR, ENOKEY.
    pub(super) fn directory(&self, number: u32) -> Result<Inode> {
        let inode = self.inode(number)?;
        if inode.kind != FileKind::Directory {
            let message = format!("inode {number} is not a directory");
            return Err(Error::new(libc::ENOTDIR, message));
        }
        self.check_readable(&inode)?;
        Ok(inode)
    }

    /// ENOKEY for what is encrypted.
    fn check_readable(&self, inode: &Inode) -> Result<()> {
        match inode.is_encrypted() {
            true => Err(Error::new(
                libc::ENOKEY,
                format!(
                    "inode {} is encrypted; only the guest has the key",
                    inode.number
                ),
            )),
            false => Ok(()),
        }
    }

    /// What `stat` tells of a file.
    pub fn attributes(&self, inode: u32) -> Result<Attributes> {
        Ok(self.inode(inode)?.attributes(&self.layout))
    }

    /// The target of a symbolic link, as it is. EINVAL if it is none; ENOKEY if it is encrypted.
    pub fn read_link(&self, inode: u32) -> Result<Vec<u8>> {
        let inode = self.inode(inode)?;
        if inode.kind != FileKind::Symlink {
            let message = format!("inode {} is not a symbolic link", inode.number);
            return Err(Error::new(libc::EINVAL, message));
        }
        self.check_readable(&inode)?;
        let size = inode.size(&self.layout);
        let mut target = if inode.is_inline() {
            self.inline_data(&inode)?
        } else if inode.is_fast_symlink(&self.layout) {
            inode.block().to_vec()
        } else {
            self.whole(&inode, MAX_SYMLINK)?
        };
        target.truncate(size.min(MAX_SYMLINK) as usize);
        if target.is_empty() || target.contains(&0) {
            let number = inode.number;
            return Err(self.damaged(format_args!("symbolic link {number} has no target")));
        }
        Ok(target)
    }

    /// The inode of a regular file. EISDIR for a directory, ENXIO for what has no contents here.
    fn regular(&self, number: u32) -> Result<Inode> {
        let inode = self.inode(number)?;
        let (errno, what) = match inode.kind {
            FileKind::Regular => return Ok(inode),
            FileKind::Directory => (libc::EISDIR, "is a directory"),
            FileKind::Symlink => (libc::EINVAL, "is a symbolic link"),
            _ => (libc::ENXIO, "is of no use outside of the guest"),
        };
        Err(Error::new(errno, format!("inode {number} {what}")))
    }

    /// Reads a regular file from `offset` on into `buf`; how many bytes there were, fewer than asked
    /// for only at the end of the file. EISDIR, EINVAL, ENXIO for another kind of file; ENOKEY if it
    /// is encrypted.
    pub fn read_at(&self, inode: u32, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let inode = self.regular(inode)?;
        self.check_readable(&inode)?;
        let left = inode.size(&self.layout).saturating_sub(offset);
        let len = left.min(buf.len() as u64) as usize;
        let buf = buf.get_mut(..len).unwrap_or_default();
        if inode.is_inline() {
            let data = self.inline_data(&inode)?;
            let at = offset.min(data.len() as u64) as usize;
            let data = data.get(at..).unwrap_or_default();
            let (there, past) = buf.split_at_mut(data.len().min(len));
            there.copy_from_slice(data.get(..there.len()).unwrap_or_default());
            past.fill(0);
        } else if !buf.is_empty() {
            self.read_mapped(&inode, offset, buf)?;
        }
        Ok(len)
    }

    /// `SEEK_DATA`: where from `offset` on there is data; None if there is none up to the end of the
    /// file. Errors as [`FileSystem::read_at`].
    pub fn next_data(&self, inode: u32, offset: u64) -> Result<Option<u64>> {
        self.seek(inode, offset, true)
    }

    /// `SEEK_HOLE`: where from `offset` on there is a hole, the end of the file at the latest; None
    /// if `offset` is not before that. Errors as [`FileSystem::read_at`].
    pub fn next_hole(&self, inode: u32, offset: u64) -> Result<Option<u64>> {
        self.seek(inode, offset, false)
    }

    fn seek(&self, inode: u32, offset: u64, data: bool) -> Result<Option<u64>> {
        let inode = self.regular(inode)?;
        let size = inode.size(&self.layout);
        if offset >= size {
            return Ok(None);
        }
        let end = if data { None } else { Some(size) };
        if inode.is_inline() {
            return Ok(if data { Some(offset) } else { end });
        }
        let mut at = offset;
        for _ in 0..MAX_RUNS / (self.layout.block_size / 4096).max(1) {
            let block = at / self.layout.block_size;
            let run = self.run_at(&inode, block)?;
            if run.block.is_some() == data {
                return Ok(Some(at));
            }
            at = block
                .saturating_add(run.len)
                .saturating_mul(self.layout.block_size);
            if at >= size {
                return Ok(end);
            }
        }
        Ok(if data { Some(at) } else { end })
    }
}
