//! The guest's file systems inside of a disk, read only: the only room that knows ext2, ext3, ext4
//! and partition tables.
//!
//! A [`Guest`] is made of a chain and is valid as long as its disk does not change. It has a
//! [`FileSystem`], or partitions that have one each. In a file system, files go by the guest's
//! inode numbers. Nothing is opened or closed: any thread may ask for anything at any time.
//!
//! From the bottom up:
//!
//! * `disk`: what is read of the chain, and kept for a while.
//! * `partitions`: MBR and GPT.
//! * `fields`, `checksum`: numbers in structures, and whether they are right.
//! * `superblock`: the layout of a file system. `inode`: what an inode says of its file.
//! * `block_reader`: blocks and inodes, as they are with the journal. All below is read by it.
//! * `block_map`: which blocks of the disk a file's blocks are.
//! * `journal`, `journal_map`: what was written to the journal and not yet to its place.
//! * `xattrs`, `contents`: extended attributes, contents of files, targets of links.
//! * `directory_blocks`, `directory`: names.
//! * `hash_index`, `name_hash`: the index of a directory, and the hashes it is sorted by.
//! * `name_cache`: indexes made here, of directories that have none.
//! * `links`: where symbolic links lead inside of the file system.
//! * `file_system`: the face of all of it, [`FileSystem`].
//!
//! **Nothing on the disk is trusted.** Root in a guest can write anything there. So every number is
//! checked before it is used to count, to index or to allocate. Damage is EIO with a message, for
//! the one file or directory it concerns if possible.
//!
//! **Memory** is bounded by constants: 32 MiB of structures, 4 MiB of contents and 16 MiB of names
//! are cached for all guests together ([`Caches`]), and a call takes a few blocks.
//!
//! Two things are not read: encrypted files (ENOKEY), and fast commits in the journal. A guest that
//! uses fast commits and was killed is seen as of its last full commit. Names in directories that
//! ignore case are compared as they are.
//!
//! The room knows nothing of boxes, nodes or FUSE.

mod block_map;
mod block_reader;
mod checksum;
mod contents;
mod directory;
mod directory_blocks;
mod disk;
mod fields;
mod file_system;
mod hash_index;
mod inode;
mod journal;
mod journal_map;
mod links;
mod name_cache;
mod name_hash;
mod partitions;
mod superblock;
mod xattrs;

pub use directory_blocks::Entry;
pub use disk::Caches;
pub use file_system::FileSystem;
pub use inode::{Attributes, FileKind, Time};
pub use links::{DEEPEST, LinkPlace};

use crate::disk::Chain;
use crate::{Error, Result};
use disk::{Disk, Volume};
use partitions::PartitionSpan;
use std::sync::{Arc, OnceLock};

/// The contents of the disk of a box, or of a snapshot.
pub struct Guest {
    disk: Arc<Disk>,
    content: Content,
}

/// How a disk is laid out.
pub enum Content {
    /// One file system takes all of it.
    FileSystem(FileSystem),
    /// It is divided into partitions, by number; there may be none.
    Partitions(Vec<Partition>),
}

impl Guest {
    /// Opens the disk that `chain` makes: one file system on all of it, or a partition table.
    /// Partitions are not looked into yet. EIO if there is neither, or if the file system is
    /// damaged or unknown; the message says what is there instead.
    pub fn open(chain: Arc<Chain>, caches: &Arc<Caches>) -> Result<Guest> {
        let disk = Arc::new(Disk::new(chain, caches.clone()));
        let spans = partitions::find(&disk)?;
        let whole = Volume::new(disk.clone(), 0, disk.len(), "the guest's disk".into());
        let content = match spans {
            Some(spans) if partitions::hide_a_file_system(&disk, &spans)? => {
                Content::Partitions(Partition::all(&disk, &spans))
            }
            Some(spans) => match FileSystem::open(whole) {
                Ok(Some(found)) => Content::FileSystem(found),
                // The remains of a file system that was there before the partitions.
                Err(_) if partitions::can_be(&disk, &spans) => {
                    Content::Partitions(Partition::all(&disk, &spans))
                }
                Err(error) => return Err(error),
                Ok(None) => Content::Partitions(Partition::all(&disk, &spans)),
            },
            None => Content::FileSystem(FileSystem::open_or_tell(whole)?),
        };
        Ok(Guest { disk, content })
    }

    /// The chain it is read from, to check that it is unchanged.
    pub fn chain(&self) -> &Arc<Chain> {
        self.disk.chain()
    }

    /// What is on the disk.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The file system that takes all of the disk, if there is one.
    pub fn file_system(&self) -> Option<&FileSystem> {
        match &self.content {
            Content::FileSystem(found) => Some(found),
            Content::Partitions(_) => None,
        }
    }

    /// The partitions, by number; none if one file system takes all of the disk.
    pub fn partitions(&self) -> &[Partition] {
        match &self.content {
            Content::FileSystem(_) => &[],
            Content::Partitions(partitions) => partitions,
        }
    }

    /// The partition of that number.
    pub fn partition(&self, number: u32) -> Option<&Partition> {
        self.partitions()
            .iter()
            .find(|partition| partition.number() == number)
    }
}

/// A partition.
pub struct Partition {
    disk: Arc<Disk>,
    span: PartitionSpan,
    found: OnceLock<Result<FileSystem>>,
}

impl Partition {
    fn all(disk: &Arc<Disk>, spans: &[PartitionSpan]) -> Vec<Partition> {
        let partition = |span: &PartitionSpan| Partition {
            disk: disk.clone(),
            span: *span,
            found: OnceLock::new(),
        };
        spans.iter().map(partition).collect()
    }

    /// Its number, as Linux counts: 1 for `p1`.
    pub fn number(&self) -> u32 {
        self.span.number
    }

    /// Its length in bytes, as the table has it.
    pub fn size(&self) -> u64 {
        self.span.len
    }

    /// Returns the file system in it, opened when it is first asked for. EIO as [`Guest::open`],
    /// the same each time.
    pub fn file_system(&self) -> Result<&FileSystem> {
        let found = self.found.get_or_init(|| {
            let PartitionSpan { number, start, len } = self.span;
            let name = format!("partition p{number} of the guest's disk");
            FileSystem::open_or_tell(Volume::new(self.disk.clone(), start, len, name))
        });
        found.as_ref().map_err(Error::again)
    }
}

#[cfg(test)]
mod tests;
