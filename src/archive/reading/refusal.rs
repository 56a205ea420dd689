//! The messages about archives that are not taken.

use crate::Error;

/// EBADMSG for an archive that is whole, and is not one that BoxLite would take.
pub(super) fn refused(why: impl AsRef<str>) -> Error {
    Error::bad_archive(format!("the archive is refused: {}", why.as_ref()))
}

/// EBADMSG for an archive that can't be read.
pub(super) fn damaged(why: impl AsRef<str>) -> Error {
    Error::bad_archive(format!("the archive is damaged: {}", why.as_ref()))
}
