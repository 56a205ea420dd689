//! Names that are asked for: whether BoxLite would take them, and whether they are free.

use crate::home::{Change, is_snapshot_name};
use crate::{Error, Result};

/// EINVAL for a name BoxLite would refuse.
pub fn refuse_bad_name(name: &str) -> Result<()> {
    if is_snapshot_name(name) {
        return Ok(());
    }
    Err(Error::new(
        libc::EINVAL,
        format!(
            "{name:?} can't be a snapshot's name: BoxLite wants 1 to 255 bytes, no leading dot, no / or \\"
        ),
    ))
}

/// EEXIST when a box has this name, or it is a box's id.
pub fn refuse_taken_name(change: &Change<'_>, name: &str) -> Result<()> {
    if change.is_name_taken(name)? {
        return Err(Error::new(
            libc::EEXIST,
            format!("there is a box {name} already"),
        ));
    }
    Ok(())
}
