//! Names in directories.

use super::entry::{Each, Entry};
use super::fields::Fields;
use super::file_system::FileSystem;
use super::index::ByIndex;
use super::inode::{BLOCK_LEN, FileKind, Inode};
use super::name_indexes::NameIndex;
use crate::{Error, Result};
use std::ops::ControlFlow;

/// Most bytes of a directory that are looked through in one call: for a name, or for the next one of a
/// listing. A damaged directory may have the same block again and again.
const MAX_SEARCH: u64 = 1 << 30;
/// Where the index of a directory does not have a name, a directory that is no larger is looked through
/// all the same, for the index may be damaged. Larger ones end there, as for the kernel.
const LOOKED_THROUGH: u64 = 1 << 20;

impl FileSystem {
    /// Gives the names in a directory to `each`, one after the other, without `.` and `..`, until it
    /// says to stop: those from `from` on, which is 0 or an [`Entry::next`]. ENOTDIR if it is no
    /// directory; ENOKEY if it is encrypted.
    pub fn list(
        &self,
        directory: u32,
        from: u64,
        each: &mut dyn FnMut(Entry<'_>) -> ControlFlow<()>,
    ) -> Result<()> {
        let inode = self.directory(directory)?;
        self.entries(&inode, from, each)
    }

    /// The inode that a name in a directory stands for; None if there is no such name. `.` and `..`
    /// are no names here. Errors as [`FileSystem::list`].
    pub fn lookup(&self, directory: u32, name: &[u8]) -> Result<Option<u32>> {
        let inode = self.directory(directory)?;
        let (names, key) = (&self.volume.caches().names, (self.number, directory));
        if let Some(index) = names.get(key) {
            return self.find_in(&index, &inode, name);
        }
        let size = inode.size(self.layout());
        match self.find_by_index(&inode, name) {
            ByIndex::Found(found) => return Ok(Some(found)),
            ByIndex::Missing if size > LOOKED_THROUGH => return Ok(None),
            ByIndex::Missing | ByIndex::Unusable => {}
        }
        if size > MAX_SEARCH {
            let what = "is too large to be looked through, and its index can't be used";
            return Err(self.damaged_directory(&inode, what));
        }
        let mut index = NameIndex::default();
        let (mut found, mut place) = (None, 0);
        self.entries(&inode, 0, &mut |entry| {
            if found.is_none() && entry.name == name {
                found = Some(entry.inode);
            }
            index.add(names.hash(entry.name), place);
            place = entry.next;
            match found.is_some() && index.is_too_large {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        if !index.is_too_large {
            names.keep(key, index.sorted());
        }
        Ok(found)
    }

    /// Finds a name by an index that was made of all names.
    fn find_in(&self, index: &NameIndex, inode: &Inode, name: &[u8]) -> Result<Option<u32>> {
        let hash = self.volume.caches().names.hash(name);
        for place in index.places(hash) {
            let mut found = None;
            self.entries(inode, place, &mut |entry| {
                found = (entry.name == name).then_some(entry.inode);
                ControlFlow::Break(())
            })?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// The directory that a directory is in, as its own `..` says. EIO if it says nothing.
    pub(super) fn parent(&self, directory: u32) -> Result<u32> {
        let inode = self.inode(directory)?;
        if inode.kind != FileKind::Directory {
            let message = format!("inode {directory} is not a directory");
            return Err(Error::new(libc::ENOTDIR, message));
        }
        let parent = match inode.is_inline() {
            true => Some(Fields(inode.block()).le32(0)),
            false => self.second_entry(&inode)?,
        };
        parent
            .filter(|parent| (1..=self.layout().inodes).contains(parent))
            .ok_or_else(|| self.damaged_directory(&inode, "does not say what it is in"))
    }

    /// The inode of the entry `..`, which is the second one after `.`.
    fn second_entry(&self, inode: &Inode) -> Result<Option<u32>> {
        let Some(block) = self.run_at(inode, 0)?.block else {
            return Ok(None);
        };
        let bytes = self.metadata_block(block)?;
        let Some((Some(itself), len)) = self.entry(&bytes) else {
            return Ok(None);
        };
        let Some((Some(parent), _)) = self.entry(bytes.get(len..).unwrap_or_default()) else {
            return Ok(None);
        };
        let are_dots = itself.name == b"." && parent.name == b"..";
        Ok(are_dots.then_some(parent.inode))
    }

    /// The entries of a directory from `from` on.
    fn entries(&self, inode: &Inode, from: u64, each: Each) -> Result<()> {
        if inode.is_inline() {
            return self.inline_entries(inode, from, each);
        }
        let block_size = self.layout().block_size;
        let size = inode.size(self.layout());
        if !self.has_room_for(inode) {
            return Err(self.damaged_directory(inode, "has an impossible size"));
        }
        let mut since_last = 0;
        for number in from / block_size..size / block_size {
            let Some(block) = self.run_at(inode, number)?.block else {
                return Err(self.damaged_directory(inode, "has a hole"));
            };
            let bytes = self.metadata_block(block)?;
            if !self.checksum_is_right_at(inode, number, &bytes) {
                return Err(self.damaged_directory(inode, "has a wrong checksum"));
            }
            let base = number * block_size;
            since_last += block_size;
            let mut named = |entry: Entry<'_>| {
                since_last = 0;
                each(entry)
            };
            let found = self.region(inode, &bytes, base, from, &mut named)?;
            if found.is_break() {
                break;
            }
            if since_last > MAX_SEARCH {
                return Err(self.damaged_directory(inode, "goes on and on without a name"));
            }
        }
        Ok(())
    }

    /// Whether a directory that has blocks can be as large as it says.
    pub(super) fn has_room_for(&self, inode: &Inode) -> bool {
        let block_size = self.layout().block_size;
        let size = inode.size(self.layout());
        let most = self.blocks_there().saturating_mul(block_size);
        size <= most && size.is_multiple_of(block_size)
    }

    /// The entries that are in the inode itself. The first word says what is above.
    fn inline_entries(&self, inode: &Inode, from: u64, each: Each) -> Result<()> {
        const PARENT: usize = 4;
        let data = self.inline_data(inode)?;
        let size = (inode.size(self.layout()) as usize).min(data.len());
        let first = data.get(PARENT..BLOCK_LEN.min(size)).unwrap_or_default();
        let second = data.get(BLOCK_LEN..size).unwrap_or_default();
        for (region, base) in [(first, PARENT), (second, BLOCK_LEN)] {
            if self
                .region(inode, region, base as u64, from, each)?
                .is_break()
            {
                break;
            }
        }
        Ok(())
    }
}
