//! Opening a file system: its superblock, and its journal if it was not unmounted.

use super::disk::{Use, Volume};
use super::file_system::FileSystem;
use super::journal;
use super::layout::{self, Layout, SUPERBLOCK_AT, SUPERBLOCK_LEN, incompat};
use super::replaced::Replaced;
use crate::{Error, Result};

impl FileSystem {
    /// Opens what is in the volume; None if it has no ext file system.
    pub(super) fn open(volume: Volume) -> Result<Option<FileSystem>> {
        let mut bytes = vec![0; SUPERBLOCK_LEN];
        volume.peek(SUPERBLOCK_AT, &mut bytes)?;
        if !Layout::is_one(&bytes) {
            return Ok(None);
        }
        let layout = Layout::parse(&bytes, &volume)?;
        let number = volume.caches().number();
        let mut fs = FileSystem {
            volume,
            layout,
            replaced: Replaced::default(),
            number,
        };
        fs.take_journal()?;
        // The root is what everything else is found by.
        fs.directory(FileSystem::ROOT)?;
        Ok(Some(fs))
    }

    /// The same, or EIO that says what is there instead.
    pub(super) fn open_or_tell(volume: Volume) -> Result<FileSystem> {
        let known = layout::known_as(&volume)?;
        let name = volume.name().to_owned();
        FileSystem::open(volume)?.ok_or_else(|| {
            let what = known.unwrap_or("no file system that is known here");
            Error::damaged(format!(
                "{name} has {what}; only ext2, ext3 and ext4 can be read"
            ))
        })
    }

    /// From now on, what is in the journal counts.
    fn take_journal(&mut self) -> Result<()> {
        if !self.layout.has(incompat::RECOVER) {
            return Ok(());
        }
        if self.layout.journal_inode == 0 {
            return Err(self.damaged("it was not unmounted, and its journal is elsewhere"));
        }
        let inode = self.any_inode(self.layout.journal_inode)?;
        self.replaced = journal::load(self, &inode)?;
        if self.replaced.is_empty() {
            return Ok(());
        }
        // The superblock itself may be in the journal.
        let mut bytes = vec![0; SUPERBLOCK_LEN];
        self.read_blocks(Use::Metadata, 0, SUPERBLOCK_AT, &mut bytes)?;
        let layout = Layout::parse(&bytes, &self.volume)?;
        if layout.block_size != self.layout.block_size {
            return Err(self.damaged("the journal would change the size of its blocks"));
        }
        self.layout = layout;
        Ok(())
    }
}
