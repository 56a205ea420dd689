//! Inodes: what the file system knows of a file.

use super::checksum::crc32c;
use super::fields::Fields;
use super::superblock::{Superblock, incompat};
use crate::Error;

/// The inode of the root directory.
pub(super) const ROOT: u32 = 2;
/// Bytes of an inode that all versions have.
const OLD_SIZE: usize = 128;
/// `i_block` is here: block numbers, the root of an extent tree, or short contents.
const BLOCK_AT: usize = 0x28;
/// Its length.
pub(super) const BLOCK_LEN: usize = 60;

mod flags {
    pub const INDEX: u32 = 0x1000;
    pub const ENCRYPT: u32 = 0x800;
    pub const HUGE_FILE: u32 = 0x4_0000;
    pub const EXTENTS: u32 = 0x8_0000;
    pub const EA_INODE: u32 = 0x20_0000;
    pub const INLINE_DATA: u32 = 0x1000_0000;
    pub const CASEFOLD: u32 = 0x4000_0000;
}

/// The kind of a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

impl FileKind {
    /// By the upper bits of `st_mode`.
    fn of_mode(mode: u16) -> Option<FileKind> {
        Some(match u32::from(mode) & libc::S_IFMT {
            libc::S_IFREG => FileKind::Regular,
            libc::S_IFDIR => FileKind::Directory,
            libc::S_IFLNK => FileKind::Symlink,
            libc::S_IFCHR => FileKind::CharDevice,
            libc::S_IFBLK => FileKind::BlockDevice,
            libc::S_IFIFO => FileKind::Fifo,
            libc::S_IFSOCK => FileKind::Socket,
            _ => return None,
        })
    }

    /// By the number in a directory entry; None if it says nothing.
    pub(super) fn of_entry(number: u8) -> Option<FileKind> {
        Some(match number {
            1 => FileKind::Regular,
            2 => FileKind::Directory,
            3 => FileKind::CharDevice,
            4 => FileKind::BlockDevice,
            5 => FileKind::Fifo,
            6 => FileKind::Socket,
            7 => FileKind::Symlink,
            _ => return None,
        })
    }
}

/// A point in time, as `struct timespec` has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Time {
    /// Seconds since 1970; negative before.
    pub seconds: i64,
    /// Nanoseconds since then, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// The result of `stat` for a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attributes {
    /// The guest's inode number; the same for all names of a file.
    pub inode: u32,
    /// What it is.
    pub kind: FileKind,
    /// Permissions with set-user-ID, set-group-ID and sticky bit: `st_mode & 0o7777`.
    pub permissions: u16,
    /// Number of names; 1 for a directory that has more directories in it than can be counted.
    pub links: u32,
    /// The guest's user ID.
    pub uid: u32,
    /// The guest's group ID.
    pub gid: u32,
    /// Length in bytes; of a symbolic link, that of its target.
    pub size: u64,
    /// Space taken, in units of 512 bytes.
    pub blocks: u64,
    /// When it was last read.
    pub accessed: Time,
    /// When its contents were last changed.
    pub modified: Time,
    /// When it was last changed in any way.
    pub changed: Time,
    /// When it was made, if the file system keeps that.
    pub created: Option<Time>,
    /// `st_rdev`: which device a device node is for, 0 for other files.
    pub device: u64,
    /// Tells files apart that had the same inode number at different times.
    pub generation: u32,
}

/// An inode as it is on disk, checked.
pub(super) struct Inode {
    /// Its number.
    pub number: u32,
    /// What it is.
    pub kind: FileKind,
    raw: Vec<u8>,
    /// The seed of the checksums of everything that belongs to it.
    pub seed: Option<u32>,
}

impl Inode {
    /// Parses an inode. The error says what is wrong with it.
    pub fn parse(
        number: u32,
        raw: Vec<u8>,
        superblock: &Superblock,
    ) -> Result<Inode, &'static str> {
        let fields = Fields(&raw);
        let seed = superblock
            .seed
            .map(|seed| crc32c(seed, &[&number.to_le_bytes(), fields.bytes(0x64, 4)]));
        // Checked first: an inode that was never used may have no checksum.
        let (mode, links) = (fields.le16(0), fields.le16(0x1a));
        if links == 0 {
            return Err("is not in use");
        }
        if seed.is_some_and(|seed| !checksum_is_right(seed, fields)) {
            return Err("has a wrong checksum");
        }
        let kind = FileKind::of_mode(mode).ok_or("is of no known kind")?;
        if raw.len() > OLD_SIZE {
            let extra = extra_size(fields);
            if OLD_SIZE + extra > raw.len() || !extra.is_multiple_of(4) {
                return Err("has a wrong length");
            }
        }
        let inode = Inode {
            number,
            kind,
            raw,
            seed,
        };
        if i64::try_from(inode.size(superblock)).is_err() {
            return Err("has an impossible size");
        }
        Ok(inode)
    }

    fn fields(&self) -> Fields<'_> {
        Fields(&self.raw)
    }

    fn flag(&self, flag: u32) -> bool {
        self.fields().le32(0x20) & flag != 0
    }

    /// Length in bytes.
    pub fn size(&self, superblock: &Superblock) -> u64 {
        let fields = self.fields();
        // Elsewhere the upper half is, or was, something else.
        let large = match self.kind {
            FileKind::Regular => true,
            FileKind::Directory => superblock.has(incompat::LARGEDIR),
            _ => false,
        };
        fields.le32_and(0x4, if large { fields.le32(0x6c) } else { 0 })
    }

    /// `i_block`: 60 bytes.
    pub fn block(&self) -> &[u8] {
        self.fields().bytes(BLOCK_AT, BLOCK_LEN)
    }

    /// Returns whether an extent tree maps its blocks.
    pub fn has_extents(&self) -> bool {
        self.flag(flags::EXTENTS)
    }

    /// Returns whether its contents are in the inode itself.
    pub fn is_inline(&self) -> bool {
        self.flag(flags::INLINE_DATA)
    }

    /// Returns whether its contents, or the names in it, are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.flag(flags::ENCRYPT)
    }

    /// ENOKEY if it is encrypted.
    pub fn check_readable(&self) -> crate::Result<()> {
        if !self.is_encrypted() {
            return Ok(());
        }
        let number = self.number;
        let message = format!("inode {number} is encrypted; only the guest has the key");
        Err(Error::new(libc::ENOKEY, message))
    }

    /// Returns whether it is a directory with an index. Some of its blocks have no names.
    pub fn is_indexed(&self) -> bool {
        self.flag(flags::INDEX)
    }

    /// Returns whether it is a directory that ignores the case of names.
    pub fn ignores_case(&self) -> bool {
        self.flag(flags::CASEFOLD)
    }

    /// Returns whether it is not a file, but holds the value of an attribute.
    pub fn is_attribute(&self) -> bool {
        self.flag(flags::EA_INODE)
    }

    /// Returns whether it is a symbolic link whose target is in `i_block`.
    pub fn is_fast_symlink(&self, superblock: &Superblock) -> bool {
        let of_attributes = match self.attribute_block() {
            0 => 0,
            // Their block counts as a whole cluster.
            _ => superblock.cluster_size / 512,
        };
        self.kind == FileKind::Symlink
            && !self.is_inline()
            && !self.has_extents()
            && self.size(superblock) < BLOCK_LEN as u64
            && (superblock.has(incompat::EA_INODE) || self.blocks(superblock) <= of_attributes)
    }

    /// Space taken, in units of 512 bytes.
    fn blocks(&self, superblock: &Superblock) -> u64 {
        let fields = self.fields();
        if !superblock.huge_files {
            return u64::from(fields.le32(0x1c));
        }
        let blocks = fields.le32_and(0x1c, u32::from(fields.le16(0x74)));
        if self.flag(flags::HUGE_FILE) {
            blocks.saturating_mul(superblock.block_size / 512)
        } else {
            blocks
        }
    }

    /// Returns the space as the kernel reports it. Contents in the inode count, or programs would
    /// take the file for a hole.
    fn shown_blocks(&self, superblock: &Superblock) -> u64 {
        let inline = if self.kind == FileKind::Regular && self.is_inline() {
            self.size(superblock).div_ceil(512)
        } else {
            0
        };
        self.blocks(superblock).saturating_add(inline)
    }

    /// Returns the block with the attributes that did not fit into the inode; 0 without one.
    pub fn attribute_block(&self) -> u64 {
        let fields = self.fields();
        fields.le32_and(0x68, u32::from(fields.le16(0x76)))
    }

    /// Returns the part of the inode that holds attributes.
    pub fn attribute_area(&self) -> &[u8] {
        if self.raw.len() <= OLD_SIZE {
            return &[];
        }
        let at = OLD_SIZE + extra_size(self.fields());
        self.fields().bytes(at, self.raw.len())
    }

    /// Returns the result of `stat`.
    pub fn attributes(&self, superblock: &Superblock) -> Attributes {
        let fields = self.fields();
        Attributes {
            inode: self.number,
            kind: self.kind,
            permissions: fields.le16(0) & 0o7777,
            links: u32::from(fields.le16(0x1a)),
            uid: u32::from(fields.le16(0x78)) << 16 | u32::from(fields.le16(0x2)),
            gid: u32::from(fields.le16(0x7a)) << 16 | u32::from(fields.le16(0x18)),
            size: self.size(superblock),
            blocks: self.shown_blocks(superblock),
            accessed: self.time(0x8, 0x8c),
            modified: self.time(0x10, 0x88),
            changed: self.time(0xc, 0x84),
            created: self.reaches(0x90 + 4).then(|| self.time(0x90, 0x94)),
            device: self.device(),
            generation: fields.le32(0x64),
        }
    }

    /// Returns whether the inode's extra fields reach up to `end`.
    fn reaches(&self, end: usize) -> bool {
        self.raw.len() > OLD_SIZE && OLD_SIZE + extra_size(self.fields()) >= end
    }

    /// Returns the time at `at`. Its fraction and more bits of its seconds are at `extra`, if
    /// present.
    fn time(&self, at: usize, extra: usize) -> Time {
        // The first 32 bits are signed; the two more count up from there.
        let seconds = i64::from(self.fields().le32(at) as i32);
        let extra = if self.reaches(extra + 4) {
            self.fields().le32(extra)
        } else {
            0
        };
        Time {
            seconds: seconds + (i64::from(extra & 3) << 32),
            nanoseconds: (extra >> 2).min(999_999_999),
        }
    }

    /// `st_rdev`. The old form, in the first word, has 8 bits for each number.
    fn device(&self) -> u64 {
        if !matches!(self.kind, FileKind::CharDevice | FileKind::BlockDevice) {
            return 0;
        }
        let block = Fields(self.block());
        let (major, minor) = match (block.le32(0), block.le32(4)) {
            (0, new) => ((new >> 8) & 0xfff, (new & 0xff) | ((new >> 12) & 0xf_ff00)),
            (old, _) => ((old >> 8) & 0xff, old & 0xff),
        };
        libc::makedev(major, minor)
    }
}

/// `i_extra_isize`: how many bytes of fields follow the old ones.
fn extra_size(fields: Fields) -> usize {
    usize::from(fields.le16(0x80))
}

/// Verifies the checksum, which covers the whole inode with zeros in its own two places.
fn checksum_is_right(seed: u32, fields: Fields) -> bool {
    let len = fields.0.len();
    let low = fields.le16(0x7c);
    let old = [fields.bytes(0, 0x7c), &[0, 0], fields.bytes(0x7e, 2)];
    if len <= OLD_SIZE {
        return crc32c(seed, &old) as u16 == low;
    }
    let sum = crc32c(crc32c(seed, &old), &[fields.bytes(0x80, 2)]);
    if extra_size(fields) >= 4 {
        let high = u32::from(fields.le16(0x82));
        crc32c(sum, &[&[0, 0], fields.bytes(0x84, len)]) == high << 16 | u32::from(low)
    } else {
        crc32c(sum, &[fields.bytes(0x82, len)]) as u16 == low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_reach_from_1901_to_2446() {
        let time = |seconds: u32, extra: u32| {
            let mut raw = vec![0; 256];
            raw[0x80] = 32;
            raw[0x10..0x14].copy_from_slice(&seconds.to_le_bytes());
            raw[0x88..0x8c].copy_from_slice(&extra.to_le_bytes());
            let inode = Inode {
                number: 12,
                kind: FileKind::Regular,
                raw,
                seed: None,
            };
            let time = inode.time(0x10, 0x88);
            (time.seconds, time.nanoseconds)
        };
        assert_eq!(time(0x8000_0000, 0), (-(1 << 31), 0));
        assert_eq!(time(0xffff_ffff, 0), (-1, 0));
        assert_eq!(time(0x7fff_ffff, 4), ((1 << 31) - 1, 1));
        assert_eq!(time(0x8000_0000, 1), (1 << 31, 0));
        assert_eq!(time(0x7fff_ffff, 3), ((1 << 31) - 1 + (3 << 32), 0));
        assert_eq!(time(0, u32::MAX).1, 999_999_999);
    }
}
