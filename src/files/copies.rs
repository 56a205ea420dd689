//! Copies files: shares blocks where the file system can, otherwise keeps the holes.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom as SeekTo, seek};
use rustix::io::Errno;

use crate::{Context, Result, disk};

/// Copies a file to a new one: shares its blocks where the file system can, otherwise keeps its
/// holes.
///
/// # Errors
/// EEXIST when `to` exists; those of system calls.
pub fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let message = || format!("cannot copy {}", from.display());
    let source = File::open(from).context(message)?;
    let target = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(to)
        .context(message)?;
    copy_contents(&source, &target, from, &mut || Ok(()))
}

/// Bytes copied between two calls of `check`.
const PIECE: u64 = 16 << 20;

/// Copies `source` into the empty file `target`: shares its blocks where the file system can,
/// otherwise keeps its holes. `name` is the path of the source in messages. `check` is called
/// before each piece, and its error ends the copy.
///
/// # Errors
/// Those of system calls and of `check`.
pub fn copy_contents(
    source: &File,
    target: &File,
    name: &Path,
    check: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let message = || format!("cannot copy {}", name.display());
    if disk::share_contents(source, target) {
        return check();
    }
    let length = source.metadata().context(message)?.len();
    target.set_len(length).context(message)?;
    let (mut from, mut to) = (source, target);
    let mut offset = 0;
    while let Some((start, end)) = next_data(source, offset).context(message)? {
        let end = end.min(start + PIECE);
        check()?;
        from.seek(SeekFrom::Start(start)).context(message)?;
        to.seek(SeekFrom::Start(start)).context(message)?;
        // The standard library uses copy_file_range here, which shares blocks on btrfs and xfs.
        std::io::copy(&mut from.take(end - start), &mut to).context(message)?;
        offset = end;
    }
    Ok(())
}

/// Bytes compared at once by [`refresh_copy`], and written again if any of them differs.
const BLOCK: usize = 64 << 10;
/// Bytes read at once from each file.
const READ: usize = 1 << 20;

/// Makes `target`, an earlier copy of `source`, equal to it. Reads both files where one of them has
/// data, and writes only the blocks that differ. `name` is the path of the source in messages.
/// `check` is called now and then, and its error ends the work.
///
/// # Errors
/// Those of system calls and of `check`.
pub fn refresh_copy(
    source: &File,
    target: &File,
    name: &Path,
    check: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let message = || format!("cannot copy {}", name.display());
    let length = source.metadata().context(message)?.len();
    target.set_len(length).context(message)?;
    let (mut new, mut old) = (vec![0; READ], vec![0; READ]);
    let (mut offset, mut checked) = (0, 0);
    while let Some(start) = next_of_either(source, target, offset).context(message)? {
        if start >= checked {
            check()?;
            checked = start + PIECE;
        }
        // Aligned, so that a block that differs is written as a whole.
        let start = start - start % BLOCK as u64;
        let size =
            usize::try_from(length.saturating_sub(start)).map_or(READ, |left| left.min(READ));
        if size == 0 {
            break;
        }
        source
            .read_exact_at(&mut new[..size], start)
            .context(message)?;
        target
            .read_exact_at(&mut old[..size], start)
            .context(message)?;
        let blocks = new[..size].chunks(BLOCK).zip(old[..size].chunks(BLOCK));
        for (index, (new, old)) in blocks.enumerate() {
            if new != old {
                let at = start + (index * BLOCK) as u64;
                target.write_all_at(new, at).context(message)?;
            }
        }
        offset = start + size as u64;
    }
    Ok(())
}

/// Returns the next offset at which one of two files has data.
fn next_of_either(one: &File, other: &File, offset: u64) -> std::io::Result<Option<u64>> {
    let next = [next_data(one, offset)?, next_data(other, offset)?];
    let starts = next.into_iter().flatten().map(|(start, _)| start);
    Ok(starts.min())
}

/// Returns whether `target`, which is empty, can share the blocks of `source`. Shares them to find
/// out, then empties `target` again.
pub fn can_share(source: &File, target: &File) -> bool {
    disk::share_contents(source, target) && target.set_len(0).is_ok()
}

/// Returns the start and end of the next run of data at or after `offset`; None if only a hole
/// follows.
fn next_data(file: &File, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
    match seek(file, SeekTo::Data(offset)) {
        Ok(start) => Ok(Some((start, seek(file, SeekTo::Hole(start))?))),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
