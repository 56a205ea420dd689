//! Opens the live disk of a box and reads its header.

use std::fs::File;
use std::path::Path;

use crate::disk::{FileId, Header};
use crate::{Error, Result};

/// Opens a disk and returns it with its inode, whose number is not reused while the disk is open.
///
/// # Errors
/// ENODATA when the disk does not exist; those of opening it.
pub fn open_disk(path: &Path) -> Result<(File, FileId)> {
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => no_disk(),
        _ => Error::io(format!("cannot open {}", path.display()), e),
    })?;
    let id = FileId::of_open(&file, path)?;
    Ok((file, id))
}

fn no_disk() -> Error {
    Error::new(
        libc::ENODATA,
        "the box has no disk yet; start it once with BoxLite",
    )
}

/// Reads the header of a live disk, which is always qcow2.
///
/// # Errors
/// ENODATA when the disk does not exist; EIO when it is not a qcow2 image or is damaged.
pub fn live_header(live: &Path) -> Result<Header> {
    if !live.exists() {
        return Err(no_disk());
    }
    Header::open(live)?.ok_or_else(|| {
        Error::damaged(format!(
            "{} is not a qcow2 image, as every disk of BoxLite's is; nothing was changed",
            live.display()
        ))
    })
}
