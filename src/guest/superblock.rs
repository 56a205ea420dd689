//! The superblock of an ext2, ext3 or ext4 file system: its features, and where everything is.

use super::checksum::crc32c;
use super::disk::Volume;
use super::fields::Fields;
use crate::{Error, Result};

/// Where the superblock is, in bytes from the beginning of the file system.
pub(super) const SUPERBLOCK_AT: u64 = 1024;
/// Its length.
pub(super) const SUPERBLOCK_LEN: usize = 1024;
const MAGIC: u16 = 0xef53;

/// Features that a reader has to know (`s_feature_incompat`).
pub(super) mod incompat {
    /// Directory entries tell the kind of file.
    pub const FILETYPE: u32 = 0x2;
    /// The journal has blocks that are not in their places yet.
    pub const RECOVER: u32 = 0x4;
    /// It is a journal, without a file system.
    pub const JOURNAL_DEV: u32 = 0x8;
    /// Group descriptors are spread over the disk.
    pub const META_BG: u32 = 0x10;
    /// Numbers of blocks have 64 bits.
    pub const BITS64: u32 = 0x80;
    /// Values of large attributes have inodes of their own.
    pub const EA_INODE: u32 = 0x400;
    /// The seed of the checksums is in the superblock.
    pub const CSUM_SEED: u32 = 0x2000;
    /// Directories may be larger than 4 GiB.
    pub const LARGEDIR: u32 = 0x4000;
    /// The features that are supported: these, and extents (0x40), multiple mount protection
    /// (0x100, which concerns writers), flexible groups (0x200), inline data (0x8000), encryption
    /// (0x10000, other files can be read) and case folding (0x20000, names are compared as they
    /// are).
    pub const READ: u32 = FILETYPE
        | RECOVER
        | META_BG
        | 0x40
        | BITS64
        | 0x100
        | 0x200
        | EA_INODE
        | CSUM_SEED
        | LARGEDIR
        | 0x8000
        | 0x10000
        | 0x20000;
}

/// Features that only a writer has to know (`s_feature_ro_compat`). Some tell a reader more.
mod ro_compat {
    pub const SPARSE_SUPER: u32 = 0x1;
    pub const HUGE_FILE: u32 = 0x8;
    pub const BIGALLOC: u32 = 0x200;
    pub const METADATA_CSUM: u32 = 0x400;
}

/// Features that may be ignored (`s_feature_compat`).
mod compat {
    /// Directories may have an index.
    pub const DIR_INDEX: u32 = 0x20;
    /// Only two superblocks' copies are kept.
    pub const SPARSE_SUPER2: u32 = 0x200;
}

/// `s_flags`: whether bytes of names are signed when they are hashed.
mod flags {
    pub const SIGNED_HASH: u32 = 0x1;
    pub const UNSIGNED_HASH: u32 = 0x2;
}

/// A parsed superblock.
#[derive(Clone)]
pub(super) struct Superblock {
    /// Bytes of a block: 1 KiB to 64 KiB.
    pub block_size: u64,
    /// Bytes of what is allocated at once: a block, or more of them with the feature bigalloc.
    pub cluster_size: u64,
    /// Whether directories may have an index.
    pub has_indexes: bool,
    /// Whether bytes of names are signed when they are hashed; None if the superblock does not say.
    pub signed_hash: Option<bool>,
    /// The seed of the hashes of names.
    pub hash_seed: [u32; 4],
    /// Number of blocks.
    pub blocks: u64,
    /// Number of inodes.
    pub inodes: u32,
    /// The first inode that files may have.
    pub first_inode: u32,
    /// Bytes of an inode: 128 to a block.
    pub inode_size: u64,
    /// [`incompat`] features.
    pub incompat: u32,
    /// Whether numbers of blocks of files are kept in 48 bits.
    pub huge_files: bool,
    /// The seed of the checksums, where structures have checksums.
    pub seed: Option<u32>,
    /// The journal's inode; 0 if it is not in this file system.
    pub journal_inode: u32,
    first_block: u64,
    blocks_per_group: u64,
    inodes_per_group: u32,
    descriptor_size: u64,
    first_meta_group: u64,
    copies: Copies,
}

/// Which groups begin with a copy of the superblock.
#[derive(Clone, Copy)]
enum Copies {
    All,
    Sparse,
    Two([u32; 2]),
}

impl Superblock {
    /// Returns whether this may be a superblock.
    pub fn is_one(bytes: &[u8]) -> bool {
        Fields(bytes).le16(0x38) == MAGIC
    }

    /// Parses a superblock. EIO if it is impossible, or needs an unsupported feature.
    pub fn parse(bytes: &[u8], volume: &Volume) -> Result<Superblock> {
        let sb = Fields(bytes);
        let superblock = Superblock::fields(sb);
        if let Err(why) = superblock.check(sb) {
            return Err(Error::damaged(format!(
                "the file system in {} can't be read: {why}",
                volume.name()
            )));
        }
        Ok(superblock)
    }

    /// Reads the fields, unchecked.
    fn fields(sb: Fields) -> Superblock {
        let incompat = sb.le32(0x60);
        let ro_compat = sb.le32(0x64);
        let old = sb.le32(0x4c) == 0;
        let large = incompat & incompat::BITS64 != 0;
        let shifted = |at: usize| 1024 << sb.le32(at).min(63 - 10);
        Superblock {
            block_size: shifted(0x18),
            cluster_size: match ro_compat & ro_compat::BIGALLOC {
                0 => shifted(0x18),
                _ => shifted(0x1c),
            },
            has_indexes: sb.le32(0x5c) & compat::DIR_INDEX != 0,
            signed_hash: match sb.le32(0x160) {
                flags if flags & flags::UNSIGNED_HASH != 0 => Some(false),
                flags if flags & flags::SIGNED_HASH != 0 => Some(true),
                _ => None,
            },
            hash_seed: [0, 4, 8, 12].map(|at| sb.le32(0xec + at)),
            blocks: sb.le32_and(0x4, if large { sb.le32(0x150) } else { 0 }),
            inodes: sb.le32(0x0),
            first_inode: if old { 11 } else { sb.le32(0x54) },
            inode_size: if old { 128 } else { u64::from(sb.le16(0x58)) },
            incompat,
            huge_files: ro_compat & ro_compat::HUGE_FILE != 0,
            seed: (ro_compat & ro_compat::METADATA_CSUM != 0).then(|| {
                match incompat & incompat::CSUM_SEED {
                    0 => crc32c(!0, &[sb.bytes(0x68, 16)]),
                    _ => sb.le32(0x270),
                }
            }),
            journal_inode: sb.le32(0xe0),
            first_block: u64::from(sb.le32(0x14)),
            blocks_per_group: u64::from(sb.le32(0x20)),
            inodes_per_group: sb.le32(0x28),
            descriptor_size: if large { u64::from(sb.le16(0xfe)) } else { 32 },
            first_meta_group: u64::from(sb.le32(0x104)),
            copies: if sb.le32(0x5c) & compat::SPARSE_SUPER2 != 0 {
                Copies::Two([sb.le32(0x24c), sb.le32(0x250)])
            } else if ro_compat & ro_compat::SPARSE_SUPER != 0 {
                Copies::Sparse
            } else {
                Copies::All
            },
        }
    }

    /// Refuses impossible values and unsupported features.
    fn check(&self, sb: Fields) -> Result<(), String> {
        if sb.le16(0x38) != MAGIC {
            return Err("it has no superblock".into());
        }
        if self.incompat & incompat::JOURNAL_DEV != 0 {
            return Err("it is the journal of another one".into());
        }
        let unknown = self.incompat & !incompat::READ;
        if unknown != 0 {
            return Err(format!(
                "it has features that are not known here ({unknown:#x})"
            ));
        }
        if sb.le32(0x18) > 6 {
            return Err("its blocks would be larger than 64 KiB".into());
        }
        let plausible =
            |size: u64, min: u64| size.is_power_of_two() && (min..=self.block_size).contains(&size);
        if !plausible(self.inode_size, 128) {
            return Err(format!("its inodes have {} bytes", self.inode_size));
        }
        let least = if self.incompat & incompat::BITS64 != 0 {
            64
        } else {
            32
        };
        if !plausible(self.descriptor_size, least) {
            return Err(format!(
                "its group descriptors have {} bytes",
                self.descriptor_size
            ));
        }
        if self.blocks <= self.first_block || self.blocks_per_group == 0 {
            return Err("it has no blocks".into());
        }
        if self.blocks.checked_mul(self.block_size).is_none() {
            return Err(format!("it has {} blocks", self.blocks));
        }
        if self.inodes_per_group == 0 {
            return Err("it has no inodes".into());
        }
        if self.seed.is_some() {
            if sb.u8(0x175) != 1 {
                return Err("its checksums are of a kind that is not known here".into());
            }
            if crc32c(!0, &[sb.bytes(0, 0x3fc)]) != sb.le32(0x3fc) {
                return Err("its superblock has a wrong checksum".into());
            }
        }
        Ok(())
    }

    /// Returns whether it has a feature of [`incompat`].
    pub fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    /// Returns the number of entries in a block of block numbers.
    pub fn pointers(&self) -> u64 {
        self.block_size / 4
    }

    /// Returns the group of an inode, and its index there.
    pub fn place_of(&self, inode: u32) -> (u64, u64) {
        let index = inode.saturating_sub(1);
        (
            u64::from(index / self.inodes_per_group),
            u64::from(index % self.inodes_per_group),
        )
    }

    /// Returns where the descriptor of a group is: the block, the byte in it, and its length.
    pub fn descriptor(&self, group: u64) -> (u64, u64, usize) {
        let per_block = self.block_size / self.descriptor_size;
        let (table, index) = (group / per_block, group % per_block);
        let superblock = SUPERBLOCK_AT / self.block_size;
        let block = if !self.has(incompat::META_BG) || table < self.first_meta_group {
            superblock.saturating_add(1).saturating_add(table)
        } else {
            let first = per_block.saturating_mul(table);
            let at = self
                .blocks_per_group
                .saturating_mul(first)
                .saturating_add(self.first_block);
            // With clusters, blocks of 1 KiB are counted from 0, and the superblock is in block 1.
            let behind = first == 0 && self.first_block == 0 && superblock == 1;
            at.saturating_add(u64::from(self.has_copy(first)) + u64::from(behind))
        };
        (
            block,
            index * self.descriptor_size,
            self.descriptor_size as usize,
        )
    }

    /// Returns whether a group begins with a copy of the superblock.
    fn has_copy(&self, group: u64) -> bool {
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        match self.copies {
            Copies::All => true,
            Copies::Two(groups) => group == 0 || groups.iter().any(|g| u64::from(*g) == group),
            Copies::Sparse => group <= 1 || power_of(3) || power_of(5) || power_of(7),
        }
    }

    /// Returns the first block of a group's inodes, as its descriptor says; None for a wrong
    /// checksum.
    pub fn inode_table(&self, group: u64, descriptor: &[u8]) -> Option<u64> {
        let fields = Fields(descriptor);
        if let Some(seed) = self.seed {
            let number = (group as u32).to_le_bytes();
            let after = fields.bytes(0x20, descriptor.len());
            let sum = crc32c(seed, &[&number, fields.bytes(0, 0x1e), &[0, 0], after]);
            if sum as u16 != fields.le16(0x1e) {
                return None;
            }
        }
        // Short descriptors end before the high part.
        Some(fields.le32_and(0x8, fields.le32(0x28)))
    }
}

/// Returns whether a volume has a file system or something else that is known. It may be damaged.
pub(super) fn is_known(volume: &Volume) -> Result<bool> {
    let mut bytes = vec![0; SUPERBLOCK_LEN];
    volume.peek(SUPERBLOCK_AT, &mut bytes)?;
    Ok(Superblock::is_one(&bytes) || known_as(volume)?.is_some())
}

/// Returns what else the volume holds, for a message that helps.
pub(super) fn known_as(volume: &Volume) -> Result<Option<&'static str>> {
    for (at, magic, name) in [
        (0, &b"XFSB"[..], "an XFS file system"),
        (0x10040, b"_BHRfS_M", "a btrfs file system"),
        (0, b"hsqs", "a squashfs"),
        (1024, b"\xe2\xe1\xf5\xe0", "an EROFS"),
        (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
        (4086, b"SWAPSPACE2", "swap space"),
        (512, b"LABELONE", "a volume group of LVM"),
        (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
        (3, b"NTFS    ", "an NTFS file system"),
        (0x36, b"FAT", "a FAT file system"),
        (0x52, b"FAT32", "a FAT file system"),
        (0x8001, b"CD001", "an ISO 9660 file system"),
    ] {
        let mut there = vec![0; magic.len()];
        volume.peek(at, &mut there)?;
        if there == magic {
            return Ok(Some(name));
        }
    }
    Ok(None)
}
