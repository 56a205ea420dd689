//! Refusals: errors that the event log has as well.

use crate::Error;
use crate::store::Store;

/// Logs a refusal, and returns it as an error.
pub fn refuse(store: &Store, errno: i32, message: impl Into<String>) -> Error {
    let message = message.into();
    store.events().warn(&format!("refused: {message}"));
    Error::new(errno, message)
}
