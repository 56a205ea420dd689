//! Refusals: errors that the event log has as well.

use crate::Error;
use crate::store::Store;

/// Logs a refusal, and returns it as an error.
pub fn refuse(store: &Store, errno: i32, message: impl Into<String>) -> Error {
    let message = message.into();
    store.events().warn(&format!("refused: {message}"));
    Error::new(errno, message)
}

/// EPERM for a file of a whole box that is copied over one that exists.
pub fn refuse_copied_box(store: &Store, name: &str) -> Error {
    refuse(
        store,
        libc::EPERM,
        format!(
            "{name}: the same process tried to write other files of the box, so it copies a whole box over one that exists; copy it to a new name, or export.boxlite alone to restore"
        ),
    )
}
