//! Errors for archives that are refused.

use crate::Error;

/// EBADMSG for an intact archive that BoxLite would not accept.
pub(super) fn refused(why: impl AsRef<str>) -> Error {
    Error::bad_archive(format!("the archive is refused: {}", why.as_ref()))
}

/// EBADMSG for an archive that can't be read.
pub(super) fn damaged(why: impl AsRef<str>) -> Error {
    Error::bad_archive(format!("the archive is damaged: {}", why.as_ref()))
}
