//! Entries of directories: the names in a block, one after the other.

use super::checksum::crc32c;
use super::fields::Fields;
use super::file_system::FileSystem;
use super::inode::{FileKind, Inode};
use super::layout::incompat;
use crate::Result;
use std::ops::ControlFlow;

/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// The shortest entry.
const MIN_ENTRY: usize = 12;
/// A checksum is in the last bytes of a block, disguised as an entry without a name.
const TAIL: usize = 12;
const TAIL_KIND: u8 = 0xde;

/// A name in a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<'a> {
    /// The name: any bytes but `/` and NUL, at least one.
    pub name: &'a [u8],
    /// The inode it is a name of.
    pub inode: u32,
    /// What that is, if the directory tells.
    pub kind: Option<FileKind>,
    /// Where a listing goes on after this entry: what to give to [`FileSystem::list`]. At least 12,
    /// so smaller numbers are free for the caller's own entries.
    pub next: u64,
}

pub(super) type Each<'a> = &'a mut dyn FnMut(Entry<'_>) -> ControlFlow<()>;

impl FileSystem {
    /// The entries of a block, or of what stands for one, which begins at `base` of the directory.
    pub(super) fn region(
        &self,
        inode: &Inode,
        bytes: &[u8],
        base: u64,
        from: u64,
        each: Each,
    ) -> Result<ControlFlow<()>> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.get(at..).unwrap_or_default();
            let (entry, len) = self
                .entry(rest)
                .ok_or_else(|| self.damaged_directory(inode, "has an impossible entry"))?;
            let place = base + at as u64;
            at += len;
            if let Some(entry) = entry.filter(|entry| place >= from && !is_dot(entry.name)) {
                let next = base + at as u64;
                if each(Entry { next, ..entry }).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The entry that `bytes` begin with, if it is in use, and how long it is. None if it can't be
    /// so.
    pub(super) fn entry<'a>(&self, bytes: &'a [u8]) -> Option<(Option<Entry<'a>>, usize)> {
        let fields = Fields(bytes);
        let inode = fields.le32(0);
        let len = self.entry_len(fields.le16(4));
        let (name_len, kind) = match self.layout().has(incompat::FILETYPE) {
            true => (usize::from(fields.u8(6)), FileKind::of_entry(fields.u8(7))),
            false => (usize::from(fields.le16(6)), None),
        };
        if len < MIN_ENTRY || !len.is_multiple_of(4) || len > bytes.len() {
            return None;
        }
        if inode == 0 {
            return Some((None, len));
        }
        let name = bytes.get(HEADER..HEADER + name_len)?;
        let impossible = name.is_empty() || name.contains(&b'/') || name.contains(&0);
        if HEADER + name_len > len || impossible || inode > self.layout().inodes {
            return None;
        }
        let entry = Entry {
            name,
            inode,
            kind,
            next: 0,
        };
        Some((Some(entry), len))
    }

    /// The length in an entry; in blocks of 64 KiB it does not fit as it is.
    pub(super) fn entry_len(&self, len: u16) -> usize {
        let size = self.layout().block_size as usize;
        match len {
            len if size < 65536 => usize::from(len),
            0 | 65535 => size,
            len => usize::from(len & 65532) | usize::from(len & 3) << 16,
        }
    }

    /// Whether a block of names has the right checksum. Blocks of an index have theirs elsewhere,
    /// and may still end like the block of names they once were; of them nothing is used, and as a
    /// block of names they are empty.
    pub(super) fn checksum_is_right_at(&self, inode: &Inode, number: u64, bytes: &[u8]) -> bool {
        let Some(seed) = inode.seed else {
            return true;
        };
        let fields = Fields(bytes);
        let is_empty = fields.le32(0) == 0 && self.entry_len(fields.le16(4)) == bytes.len();
        if inode.is_indexed() && (number == 0 || is_empty) {
            return true;
        }
        let at = bytes.len().saturating_sub(TAIL);
        fields.le32(at) == 0
            && usize::from(fields.le16(at + 4)) == TAIL
            && fields.u8(at + 7) == TAIL_KIND
            && crc32c(seed, &[fields.bytes(0, at)]) == fields.le32(at + 8)
    }

    pub(super) fn damaged_directory(&self, inode: &Inode, what: &str) -> crate::Error {
        self.damaged(format_args!("directory {} {what}", inode.number))
    }
}

fn is_dot(name: &[u8]) -> bool {
    name == b"." || name == b".."
}
