//! Extended attributes: in the inode, in a block, or with an inode of their own.

use super::block_map::BlockMap;
use super::block_reader::BlockReader;
use super::checksum::crc32c;
use super::fields::Fields;
use super::inode::Inode;
use crate::Result;

const MAGIC: u32 = 0xea02_0000;
/// Bytes of an entry before its name.
const ENTRY: usize = 16;
/// Bytes before the entries in a block.
const BLOCK_HEADER: usize = 32;
/// The longest value that the kernel allows.
const MAX_VALUE: u64 = 65536;

/// Index and name of the attribute that holds the rest of inline contents.
const INLINE_REST: (u8, &[u8]) = (SYSTEM, b"data");
const SYSTEM: u8 = 7;
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;

/// The prefix that the index in an entry stands for. Other indexes are for the file system itself
/// (encryption) and are not shown.
fn prefix(index: u8) -> Option<&'static [u8]> {
    Some(match index {
        1 => b"user.",
        ACL_ACCESS => b"system.posix_acl_access",
        ACL_DEFAULT => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        SYSTEM => b"system.",
        8 => b"system.richacl",
        _ => return None,
    })
}

/// An attribute as it is stored.
struct StoredXattr {
    index: u8,
    name: Vec<u8>,
    value: StoredValue,
}

enum StoredValue {
    Here(Vec<u8>),
    /// In an inode of its own.
    Inode(u32),
}

impl StoredXattr {
    /// Returns the guest's name for it; None for attributes of the file system's own.
    fn full_name(&self) -> Option<Vec<u8>> {
        if (self.index, self.name.as_slice()) == INLINE_REST {
            return None;
        }
        Some([prefix(self.index)?, &self.name].concat())
    }
}

/// Returns the names of a file's extended attributes.
pub(super) fn names(blocks: &BlockReader, number: u32) -> Result<Vec<Vec<u8>>> {
    let stored = stored(blocks, &blocks.inode(number)?)?;
    Ok(stored.iter().filter_map(StoredXattr::full_name).collect())
}

/// Returns the value of an extended attribute; None if the file has none of that name.
pub(super) fn value(blocks: &BlockReader, number: u32, name: &[u8]) -> Result<Option<Vec<u8>>> {
    let stored = stored(blocks, &blocks.inode(number)?)?;
    let Some(found) = stored
        .into_iter()
        .find(|stored| stored.full_name().is_some_and(|full| full == name))
    else {
        return Ok(None);
    };
    let value = match found.value {
        StoredValue::Here(value) => value,
        StoredValue::Inode(number) => value_in_inode(blocks, number)?,
    };
    match found.index {
        ACL_ACCESS | ACL_DEFAULT => acl(&value)
            .map(Some)
            .ok_or_else(|| blocks.damaged(format_args!("inode {number} has an impossible ACL"))),
        _ => Ok(Some(value)),
    }
}

/// Reads a value that has an inode of its own.
fn value_in_inode(blocks: &BlockReader, number: u32) -> Result<Vec<u8>> {
    let inode = blocks.any_inode(number)?;
    if !inode.is_attribute() {
        return Err(blocks.damaged(format_args!("inode {number} has no attribute")));
    }
    BlockMap::of(blocks, &inode).read_all(MAX_VALUE)
}

/// Returns the contents of a file that are in the inode itself: `i_block`, and what follows it in
/// an attribute.
pub(super) fn inline_data(blocks: &BlockReader, inode: &Inode) -> Result<Vec<u8>> {
    let mut bytes = inode.block().to_vec();
    let rest = stored(blocks, inode)?.into_iter().find_map(|stored| {
        let found = (stored.index, stored.name.as_slice()) == INLINE_REST;
        match stored.value {
            StoredValue::Here(value) if found => Some(value),
            _ => None,
        }
    });
    bytes.extend(rest.unwrap_or_default());
    Ok(bytes)
}

/// Reads all attributes: no more bytes than an inode and a block have room for.
fn stored(blocks: &BlockReader, inode: &Inode) -> Result<Vec<StoredXattr>> {
    let mut all = Vec::new();
    let damaged = || {
        let number = inode.number;
        blocks.damaged(format_args!(
            "the attributes of inode {number} are impossible"
        ))
    };
    let area = inode.attribute_area();
    if Fields(area).le32(0) == MAGIC {
        // Offsets count from the first entry here.
        let entries = area.get(4..).unwrap_or_default();
        parse(entries, 0, &mut all).ok_or_else(damaged)?;
    }
    match inode.attribute_block() {
        0 => {}
        number => {
            let block = blocks.metadata_block(number)?;
            let seed = blocks.superblock().seed;
            if Fields(&block).le32(0) != MAGIC || !checksum_is_right(seed, number, &block) {
                return Err(damaged());
            }
            parse(&block, BLOCK_HEADER, &mut all).ok_or_else(damaged)?;
        }
    }
    Ok(all)
}

/// Verifies the checksum of a block. It covers the block's number, too, since several files may
/// share the block.
fn checksum_is_right(seed: Option<u32>, number: u64, block: &[u8]) -> bool {
    let fields = Fields(block);
    seed.is_none_or(|seed| {
        let (before, after) = (fields.bytes(0, 16), fields.bytes(20, block.len()));
        crc32c(seed, &[&number.to_le_bytes(), before, &[0; 4], after]) == fields.le32(16)
    })
}

/// Parses the entries from `at` on; offsets of values count from the beginning of `area`. None if
/// they are impossible.
fn parse(area: &[u8], mut at: usize, all: &mut Vec<StoredXattr>) -> Option<()> {
    let fields = Fields(area);
    // Thousands of entries could share the same bytes for their values.
    let mut room = area.len();
    while at + 4 <= area.len() && fields.le32(at) != 0 {
        let name_len = usize::from(fields.u8(at));
        let name = area.get(at + ENTRY..at + ENTRY + name_len)?.to_vec();
        let len = fields.le32(at + 8) as usize;
        let value = match fields.le32(at + 4) {
            0 => {
                let from = usize::from(fields.le16(at + 2));
                room = room.checked_sub(len)?;
                StoredValue::Here(match len {
                    0 => Vec::new(),
                    _ => area.get(from..from.checked_add(len)?)?.to_vec(),
                })
            }
            number => StoredValue::Inode(number),
        };
        all.push(StoredXattr {
            index: fields.u8(at + 1),
            name,
            value,
        });
        at += (ENTRY + name_len).next_multiple_of(4);
    }
    Some(())
}

/// Converts an access control list to the form programs know. The file system stores it shorter,
/// without the IDs that most entries do not need.
fn acl(stored: &[u8]) -> Option<Vec<u8>> {
    const VERSION: u32 = 2;
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let mut rest = stored.strip_prefix(&1u32.to_le_bytes())?;
    let mut list = VERSION.to_le_bytes().to_vec();
    while let Some((entry, after)) = rest.split_first_chunk::<4>() {
        list.extend(entry);
        rest = match Fields(entry).le16(0) {
            USER | GROUP => {
                let (id, after) = after.split_first_chunk::<4>()?;
                list.extend(id);
                after
            }
            _ => {
                list.extend(u32::MAX.to_le_bytes());
                after
            }
        };
    }
    rest.is_empty().then_some(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_take_no_more_memory_than_they_have_room_for() {
        let entry = |value_at: u16, len: u32| {
            let mut bytes = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            bytes[2..4].copy_from_slice(&value_at.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes
        };
        let area = |entries: &[[u8; 16]]| {
            let mut area = entries.concat();
            area.resize(65536, 0);
            area
        };
        let mut all = Vec::new();
        let apart = area(&[entry(1000, 30_000), entry(31_000, 30_000)]);
        assert!(parse(&apart, 0, &mut all).is_some());
        assert_eq!(all.len(), 2);
        // 4,000 times the same 60,000 bytes.
        let same = area(&[entry(4000, 60_000); 4000]);
        assert!(parse(&same, 0, &mut all).is_none());
    }

    #[test]
    fn an_acl_gets_the_ids_it_is_kept_without() {
        let stored = [
            &[1, 0, 0, 0][..],
            &[1, 0, 6, 0],
            &[2, 0, 4, 0, 232, 3, 0, 0],
            &[32, 0, 4, 0],
        ];
        let known = [
            &[2, 0, 0, 0][..],
            &[1, 0, 6, 0, 255, 255, 255, 255],
            &[2, 0, 4, 0, 232, 3, 0, 0],
            &[32, 0, 4, 0, 255, 255, 255, 255],
        ];
        assert_eq!(acl(&stored.concat()), Some(known.concat()));
        assert_eq!(acl(&stored.concat()[..12]), None);
        assert_eq!(acl(&[2, 0, 0, 0]), None);
    }
}
