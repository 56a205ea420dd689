//! Copies files: shares blocks where the file system can, otherwise keeps the holes.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
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
