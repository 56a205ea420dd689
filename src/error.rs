//! The error type of the crate: an errno for the kernel, a message for people, and the cause.

use std::fmt;
use std::io;

/// The result type of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error: the errno for the kernel, and a message that says which object failed, why, and what
/// to do. The message reaches the log in the mount and the terminal.
#[derive(Debug)]
pub struct Error {
    errno: i32,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
    is_for_a_moment: bool,
}

impl Error {
    /// Returns an error that this crate detected. `errno` is a positive `libc::E…` value.
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Error {
            errno,
            message: message.into(),
            source: None,
            is_for_a_moment: false,
        }
    }

    /// Returns an error that a system call or a library reported. Its errno is that of `source`, or
    /// EIO if `source` has none.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        Error {
            errno: source.raw_os_error().unwrap_or(libc::EIO),
            message: message.into(),
            source: Some(Box::new(source)),
            is_for_a_moment: false,
        }
    }

    /// Replaces the errno, where that of the cause would mislead.
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.errno = errno;
        self
    }

    /// Sets the cause.
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Returns a copy for another caller that waits for the same operation. The cause becomes part
    /// of the message.
    pub fn again(&self) -> Self {
        Error::new(self.errno, self.to_string())
    }

    /// Marks an error that is over in a moment: the same change may succeed if it is made again.
    pub fn for_a_moment(mut self) -> Self {
        self.is_for_a_moment = true;
        self
    }

    /// Returns whether the error is over in a moment.
    pub fn is_for_a_moment(&self) -> bool {
        self.is_for_a_moment
    }

    /// Returns the positive errno value.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// Returns the message without the cause.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns an EIO error: data on disk is damaged or not as it must be.
    pub fn damaged(message: impl Into<String>) -> Self {
        Error::new(libc::EIO, message)
    }

    /// Returns an EBADMSG error: an archive, or an image in it, is refused.
    pub fn bad_archive(message: impl Into<String>) -> Self {
        Error::new(libc::EBADMSG, message)
    }

    /// Returns an EBUSY error: another process or operation uses the object now.
    pub fn busy(message: impl Into<String>) -> Self {
        Error::new(libc::EBUSY, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| &**e as _)
    }
}

/// Returns the result of `work`. A panic becomes an error, so that a caller that waits for this
/// thread gets an answer.
pub(crate) fn not_panicking<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::damaged(
            "a thread panicked; this is a fault of boxlitefs",
        ))
    })
}

/// Adds a message to an `io::Error`: what the program was doing.
pub trait Context<T> {
    /// Converts the error to one with this message and the same errno.
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context<S: Into<String>>(self, message: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::io(message(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_error_keeps_its_errno_and_gains_a_message() {
        let failed: io::Result<()> = Err(io::Error::from_raw_os_error(libc::ENOSPC));
        let error = failed.context(|| "cannot write the overlay").unwrap_err();
        assert_eq!(error.errno(), libc::ENOSPC);
        assert!(error.to_string().starts_with("cannot write the overlay: "));
    }
}
