//! The contents of files, and the targets of symbolic links.

use super::block_map::BlockMap;
use super::block_reader::BlockReader;
use super::inode::{FileKind, Inode};
use super::xattrs::inline_data;
use crate::{Error, Result};

/// The kernel allows no longer targets of symbolic links.
const MAX_SYMLINK: u64 = 4096;
/// The most runs of a file that one search for a hole or data looks at. Then the answer is the one
/// that is never wrong: a hole may be called data. Fewer where blocks are larger than 4 KiB, since
/// each run may take a few blocks of the file's map.
const MAX_RUNS: u64 = 1 << 16;

/// Reads the inode of a regular file. EISDIR for a directory, ENXIO for what has no contents here.
fn regular(blocks: &BlockReader, number: u32) -> Result<Inode> {
    let inode = blocks.inode(number)?;
    let (errno, what) = match inode.kind {
        FileKind::Regular => return Ok(inode),
        FileKind::Directory => (libc::EISDIR, "is a directory"),
        FileKind::Symlink => (libc::EINVAL, "is a symbolic link"),
        _ => (libc::ENXIO, "cannot be used outside of the guest"),
    };
    Err(Error::new(errno, format!("inode {number} {what}")))
}

/// Reads a regular file from `offset` on.
pub(super) fn read_at(
    blocks: &BlockReader,
    number: u32,
    offset: u64,
    buf: &mut [u8],
) -> Result<usize> {
    let inode = regular(blocks, number)?;
    inode.check_readable()?;
    let left = inode.size(blocks.superblock()).saturating_sub(offset);
    let len = left.min(buf.len() as u64) as usize;
    let buf = buf.get_mut(..len).unwrap_or_default();
    if inode.is_inline() {
        let data = inline_data(blocks, &inode)?;
        let at = offset.min(data.len() as u64) as usize;
        let data = data.get(at..).unwrap_or_default();
        let (there, past) = buf.split_at_mut(data.len().min(len));
        there.copy_from_slice(data.get(..there.len()).unwrap_or_default());
        past.fill(0);
    } else if !buf.is_empty() {
        BlockMap::of(blocks, &inode).read(offset, buf)?;
    }
    Ok(len)
}

/// Finds the first data, or the first hole, of a regular file from `offset` on.
pub(super) fn seek(
    blocks: &BlockReader,
    number: u32,
    offset: u64,
    data: bool,
) -> Result<Option<u64>> {
    let inode = regular(blocks, number)?;
    let size = inode.size(blocks.superblock());
    if offset >= size {
        return Ok(None);
    }
    let end = if data { None } else { Some(size) };
    if inode.is_inline() {
        return Ok(if data { Some(offset) } else { end });
    }
    let (map, block_size) = (BlockMap::of(blocks, &inode), blocks.superblock().block_size);
    let mut at = offset;
    for _ in 0..MAX_RUNS / (block_size / 4096).max(1) {
        let block = at / block_size;
        let run = map.run_at(block)?;
        if run.block.is_some() == data {
            return Ok(Some(at));
        }
        at = block.saturating_add(run.len).saturating_mul(block_size);
        if at >= size {
            return Ok(end);
        }
    }
    Ok(if data { Some(at) } else { end })
}

/// Returns the target of a symbolic link as it is stored.
pub(super) fn read_link(blocks: &BlockReader, number: u32) -> Result<Vec<u8>> {
    let inode = blocks.inode(number)?;
    if inode.kind != FileKind::Symlink {
        let message = format!("inode {number} is not a symbolic link");
        return Err(Error::new(libc::EINVAL, message));
    }
    inode.check_readable()?;
    let size = inode.size(blocks.superblock());
    let mut target = if inode.is_inline() {
        inline_data(blocks, &inode)?
    } else if inode.is_fast_symlink(blocks.superblock()) {
        inode.block().to_vec()
    } else {
        BlockMap::of(blocks, &inode).read_all(MAX_SYMLINK)?
    };
    target.truncate(size.min(MAX_SYMLINK) as usize);
    if target.is_empty() || target.contains(&0) {
        return Err(blocks.damaged(format_args!("symbolic link {number} has no target")));
    }
    Ok(target)
}
