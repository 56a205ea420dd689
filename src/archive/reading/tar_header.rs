//! Headers of tar members.

use tar::{EntryType, Header};

use super::names::shown;
use super::refusal::{damaged, refused};
use crate::{Error, Result};

/// A tar block, in bytes.
pub(super) const BLOCK: usize = 512;

/// Refuses a member that is not a regular file.
pub(super) fn wrong_type(name: &[u8], found: EntryType) -> Error {
    let what = match found {
        EntryType::Link => "a hard link",
        EntryType::Symlink => "a symlink",
        EntryType::Char | EntryType::Block => "a device",
        EntryType::Directory => "a directory",
        EntryType::Fifo => "a fifo",
        EntryType::XGlobalHeader => "a global pax header",
        _ => "of an unknown type",
    };
    refused(format!(
        "the member {} is {what}; only regular files are accepted",
        shown(name)
    ))
}

/// Returns the size of a member in bytes.
pub(super) fn size_of(header: &Header) -> Result<u64> {
    header
        .entry_size()
        .map_err(|e| damaged("a tar header has no size").caused_by(e))
}

/// Returns the sum of a header's bytes with its checksum field taken as blanks (POSIX ustar).
pub(super) fn checksum(block: &[u8; BLOCK]) -> u32 {
    block
        .iter()
        .enumerate()
        .map(|(at, byte)| match at {
            148..156 => u32::from(b' '),
            _ => u32::from(*byte),
        })
        .sum()
}
