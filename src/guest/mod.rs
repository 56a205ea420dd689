//! The guest's file systems inside of a disk, read only: the only room that knows ext2, ext3, ext4
//! and partition tables.
//!
//! A [`Guest`] is made of a chain and lasts as long as its disk does not change. It has a
//! [`FileSystem`], or partitions that have one each; in a file system files go by the guest's inode
//! numbers. There is nothing to open or close: whoever has a `Guest` may ask for anything, from any
//! number of threads.
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
//! **Nothing on the disk is trusted.** Whoever has root in a guest can write what he likes there. So
//! every number is checked before it is used to count, to index or to allocate; what is damaged is
//! EIO with a message, for the one file or directory that it concerns if possible.
//!
//! **Memory** is bounded by constants: of what was read, 32 MiB of structures, 4 MiB of contents and
//! 16 MiB of names for all guests together ([`Caches`]), and per call a few blocks.
//!
//! What is not read: what is encrypted (ENOKEY); fast commits in the journal, so that a guest that
//! has switched them on and was killed is seen as it was at its last full commit. Names in
//! directories that ignore case are compared as they are.
//!
//! Knows nothing of boxes, nodes or FUSE.

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

/// What is on the disk of a box, or of a snapshot.
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
    /// Looks at what is on the disk that `chain` makes: a file system all over it, or a table of
    /// partitions, which are not looked into yet. EIO if there is neither, or the file system is
    /// damaged or not known here; the message says what is there instead.
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
                // What is left of a file system from before the partitions.
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

    /// The chain it is read from: to ask whether it is unchanged.
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

    /// The file system in it, looked at when it is first asked for. EIO as [`Guest::open`], the same
    /// each time.
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
