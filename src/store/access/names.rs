//! Checks of new names: valid for BoxLite, and free.

use crate::home::{Change, is_snapshot_name};
use crate::{Error, Result};

/// Refuses a snapshot name that BoxLite would refuse.
///
/// # Errors
/// EINVAL.
pub fn refuse_bad_snapshot_name(name: &str) -> Result<()> {
    if is_snapshot_name(name) {
        return Ok(());
    }
    Err(Error::new(
        libc::EINVAL,
        format!(
            "{name:?} can't be a snapshot's name: BoxLite accepts 1 to 255 bytes with no leading dot and no / or \\"
        ),
    ))
}

/// Refuses a name that is the name or the id of a box.
///
/// # Errors
/// EEXIST.
pub fn refuse_taken_box_name(change: &Change<'_>, name: &str) -> Result<()> {
    if change.is_name_taken(name)? {
        return Err(Error::new(
            libc::EEXIST,
            format!("there is a box {name} already"),
        ));
    }
    Ok(())
}
