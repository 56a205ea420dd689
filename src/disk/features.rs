//! The incompatible features of qcow2 images: those that change how an image reads.

use crate::{Context, Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// Refuses every incompatible feature, by name.
pub(super) fn reject_features(bits: u64, path: &Path) -> Result<()> {
    let known = [
        (
            INCOMPATIBLE_DIRTY,
            "is marked dirty: it was not closed properly; `qemu-img check -r all` repairs it",
        ),
        (
            INCOMPATIBLE_CORRUPT,
            "is marked corrupt; `qemu-img check -r all` may repair it",
        ),
        (
            INCOMPATIBLE_DATA_FILE,
            "keeps its data in an external data file, which is not supported",
        ),
        (
            INCOMPATIBLE_COMPRESSION,
            "has clusters compressed with zstd; only deflate is supported",
        ),
        (
            INCOMPATIBLE_EXTENDED_L2,
            "has extended L2 entries, which are not supported",
        ),
    ];
    for (bit, message) in known {
        if bits & bit != 0 {
            return Err(Error::damaged(format!("{} {message}", path.display())));
        }
    }
    if bits != 0 {
        return Err(Error::damaged(format!(
            "{} needs unknown qcow2 features ({bits:#x}); a newer qemu made it",
            path.display()
        )));
    }
    Ok(())
}

/// Clears the dirty bit in a copy of an image. The copy's refcounts may be wrong, but its tables
/// are right, and nothing writes to a copy. `of` is the path of the original, for messages.
///
/// # Errors
/// Those of reading and writing it.
pub fn clear_dirty(copy: &File, of: &Path) -> Result<()> {
    const VERSION: u64 = 4;
    const INCOMPATIBLE: u64 = 72;
    let message = || format!("cannot copy {}", of.display());
    let mut version = [0; 4];
    let mut bits = [0; 8];
    copy.read_exact_at(&mut version, VERSION).context(message)?;
    copy.read_exact_at(&mut bits, INCOMPATIBLE)
        .context(message)?;
    let known = u64::from_be_bytes(bits);
    if u32::from_be_bytes(version) < 3 || known & 1 == 0 {
        return Ok(());
    }
    copy.write_all_at(&(known & !1).to_be_bytes(), INCOMPATIBLE)
        .context(message)
}
