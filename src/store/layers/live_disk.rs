//! The live disk of a box, opened and looked at.

use std::fs::File;
use std::path::Path;

use crate::disk::{FileId, Header};
use crate::{Error, Result};

/// A disk, open, and which file it is: as long as it is open, no other gets its inode number.
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

/// The header of a live disk, which is always qcow2.
pub fn live_header(live: &Path) -> Result<Header> {
    if !live.exists() {
        return Err(no_disk());
    }
    Header::open(live)?.ok_or_else(|| {
        Error::damaged(format!(
            "{} is not a qcow2 image, BoxLite's disks are; nothing was changed",
            live.display()
        ))
    })
}
