//! An ext2, ext3 or ext4 file system, read only.

use super::block_reader::BlockReader;
use super::directory::{self, Directory};
use super::directory_blocks::Entry;
use super::disk::{Use, Volume};
use super::inode::{Attributes, ROOT};
use super::links::{self, LinkPlace};
use super::superblock::{self, SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock, incompat};
use super::{contents, journal, xattrs};
use crate::{Error, Result};
use std::ops::ControlFlow;

/// A file system of the guest, read only. Files go by their inode numbers, as in the guest; no call
/// keeps anything open.
///
/// Calls may come from any number of threads at once. Memory is bounded, whatever the disk says; so
/// is the time each call takes.
///
/// Every call may fail with EIO, if the file system is damaged or the disk can't be read; the
/// message says what is wrong. No call checks whether the disk changed meanwhile: the caller does
/// that after reading, with [`Chain::unchanged`](crate::disk::Chain::unchanged).
pub struct FileSystem {
    pub(super) blocks: BlockReader,
}

impl FileSystem {
    /// The inode of the root directory.
    pub const ROOT: u32 = ROOT;

    /// Opens the file system in the volume; None if it has no ext file system.
    pub(super) fn open(volume: Volume) -> Result<Option<FileSystem>> {
        let mut bytes = vec![0; SUPERBLOCK_LEN];
        volume.peek(SUPERBLOCK_AT, &mut bytes)?;
        if !Superblock::is_one(&bytes) {
            return Ok(None);
        }
        let superblock = Superblock::parse(&bytes, &volume)?;
        let mut blocks = BlockReader::new(volume, superblock);
        apply_journal(&mut blocks)?;
        // Everything else is found from the root.
        Directory::open(&blocks, ROOT)?;
        Ok(Some(FileSystem { blocks }))
    }

    /// Opens the file system in the volume. EIO says what is there instead.
    pub(super) fn open_or_tell(volume: Volume) -> Result<FileSystem> {
        let known = superblock::known_as(&volume)?;
        let name = volume.name().to_owned();
        FileSystem::open(volume)?.ok_or_else(|| {
            let what = known.unwrap_or("no file system that is known here");
            Error::damaged(format!(
                "{name} has {what}; only ext2, ext3 and ext4 can be read"
            ))
        })
    }

    /// Returns what `stat` tells of a file.
    pub fn attributes(&self, inode: u32) -> Result<Attributes> {
        Ok(self
            .blocks
            .inode(inode)?
            .attributes(self.blocks.superblock()))
    }

    /// Reads a regular file from `offset` on into `buf`. Returns the number of bytes, fewer than
    /// asked for only at the end of the file. EISDIR, EINVAL, ENXIO for another kind of file;
    /// ENOKEY if it is encrypted.
    pub fn read_at(&self, inode: u32, offset: u64, buf: &mut [u8]) -> Result<usize> {
        contents::read_at(&self.blocks, inode, offset, buf)
    }

    /// `SEEK_DATA`: returns the first data from `offset` on; None if there is none up to the end of
    /// the file. Errors as [`FileSystem::read_at`].
    pub fn next_data(&self, inode: u32, offset: u64) -> Result<Option<u64>> {
        contents::seek(&self.blocks, inode, offset, true)
    }

    /// `SEEK_HOLE`: returns the first hole from `offset` on, at the latest the end of the file;
    /// None if `offset` is not before that. Errors as [`FileSystem::read_at`].
    pub fn next_hole(&self, inode: u32, offset: u64) -> Result<Option<u64>> {
        contents::seek(&self.blocks, inode, offset, false)
    }

    /// Returns the target of a symbolic link as it is stored. EINVAL for another kind of file;
    /// ENOKEY if it is encrypted.
    pub fn read_link(&self, inode: u32) -> Result<Vec<u8>> {
        contents::read_link(&self.blocks, inode)
    }

    /// Passes the names in a directory to `each`, one after the other, without `.` and `..`, until
    /// it breaks: those from `from` on, which is 0 or an [`Entry::next`]. ENOTDIR for another kind
    /// of file; ENOKEY if it is encrypted.
    pub fn list(
        &self,
        directory: u32,
        from: u64,
        each: &mut dyn FnMut(Entry<'_>) -> ControlFlow<()>,
    ) -> Result<()> {
        Directory::open(&self.blocks, directory)?.list(from, each)
    }

    /// Returns the inode of a name in a directory; None if there is no such name. `.` and `..` are
    /// no names here. Errors as [`FileSystem::list`].
    pub fn lookup(&self, directory: u32, name: &[u8]) -> Result<Option<u32>> {
        Directory::open(&self.blocks, directory)?.lookup(name)
    }

    /// Returns the names of a file's extended attributes, in all of the guest's name spaces.
    pub fn xattr_names(&self, inode: u32) -> Result<Vec<Vec<u8>>> {
        xattrs::names(&self.blocks, inode)
    }

    /// Returns the value of an extended attribute, as the guest's kernel gives it; None if the file
    /// has none of that name.
    pub fn xattr(&self, inode: u32, name: &[u8]) -> Result<Option<Vec<u8>>> {
        xattrs::value(&self.blocks, inode, name)
    }

    /// Returns where the link `inode` in `directory` is. EIO if either is damaged.
    pub fn link_place(&self, inode: u32, directory: u32) -> Result<LinkPlace> {
        links::place(&self.blocks, inode, directory)
    }

    /// Returns the target of a symbolic link so that following it from `place` leads to where the
    /// guest would get, without leaving the file system. ENAMETOOLONG if that is too long; else as
    /// [`FileSystem::read_link`].
    pub fn link_within(&self, inode: u32, place: LinkPlace) -> Result<Vec<u8>> {
        links::target_within(&self.blocks, inode, place)
    }

    /// Returns how many steps a directory is below the root, at most [`DEEPEST`](super::DEEPEST).
    pub fn depth(&self, directory: u32) -> Result<u16> {
        links::depth(&self.blocks, directory)
    }

    /// Returns whether `child` is a directory that may be entered from `directory`: its `..` leads
    /// back there. In an intact file system this is so for all names of directories.
    pub fn is_entered_from(&self, child: u32, directory: u32) -> Result<bool> {
        directory::is_entered_from(&self.blocks, child, directory)
    }
}

/// Has the journal of a file system that was not unmounted count from now on.
fn apply_journal(blocks: &mut BlockReader) -> Result<()> {
    let superblock = blocks.superblock();
    if !superblock.has(incompat::RECOVER) {
        return Ok(());
    }
    if superblock.journal_inode == 0 {
        return Err(blocks.damaged("it was not unmounted, and its journal is elsewhere"));
    }
    let block_size = superblock.block_size;
    let inode = blocks.any_inode(superblock.journal_inode)?;
    let journal = journal::load(blocks, &inode)?;
    if journal.is_empty() {
        return Ok(());
    }
    blocks.set_journal(journal);
    // The superblock itself may be in the journal.
    let mut bytes = vec![0; SUPERBLOCK_LEN];
    blocks.read(Use::Metadata, 0, SUPERBLOCK_AT, &mut bytes)?;
    let superblock = Superblock::parse(&bytes, blocks.volume())?;
    if superblock.block_size != block_size {
        return Err(blocks.damaged("the journal would change the size of its blocks"));
    }
    blocks.set_superblock(superblock);
    Ok(())
}
