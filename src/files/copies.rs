//! Copies of files: sharing blocks where the file system can, else with the same holes.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use rustix::fs::{SeekFrom as SeekTo, seek};
use rustix::io::Errno;

use crate::{Context, Result, disk};

/// Copies a file, holes and all, sharing its blocks where the file system can.
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

/// Bytes copied between two looks at whether to go on.
const PIECE: u64 = 16 << 20;

/// Makes `target`, which is empty, a copy of `source`: sharing its blocks where the file system can, else
/// with the same holes. `name` is what the source is called. `check` is asked again and again; what it says
/// ends the copy.
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
        // std uses copy_file_range here, which shares blocks on btrfs and xfs.
        std::io::copy(&mut from.take(end - start), &mut to).context(message)?;
        offset = end;
    }
    Ok(())
}

/// Whether it could: tried, and taken back.
pub fn can_share(source: &File, target: &File) -> bool {
    disk::share_contents(source, target) && target.set_len(0).is_ok()
}

/// Start and end of the next run of data at or after `offset`; None when only a hole is left.
fn next_data(file: &File, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
    match seek(file, SeekTo::Data(offset)) {
        Ok(start) => Ok(Some((start, seek(file, SeekTo::Hole(start))?))),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
