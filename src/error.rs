//! The one error type: an errno for the kernel, a message for the person, and what caused it.

use std::fmt;
use std::io;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: the errno a user would look up, and a message that says what was wrong with
/// what, and what to do. The message reaches the log in the mount and the terminal.
#[derive(Debug)]
pub struct Error {
    errno: i32,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// An error of our own finding. `errno` is a positive `libc::E…` value.
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Error {
            errno,
            message: message.into(),
            source: None,
        }
    }

    /// An error that a system call or library reported; the errno is its own where it has one,
    /// EIO otherwise.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        Error {
            errno: source.raw_os_error().unwrap_or(libc::EIO),
            message: message.into(),
            source: Some(Box::new(source)),
        }
    }

    /// The same error with another errno, where the cause's own would mislead.
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.errno = errno;
        self
    }

    /// The same error with what caused it.
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The same error, for one more who waits for what failed; without the cause's own type.
    pub fn again(&self) -> Self {
        Error::new(self.errno, self.to_string())
    }

    /// The positive errno value.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// The bare message, without the cause.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// EIO: something on disk is not as it must be.
    pub fn damaged(message: impl Into<String>) -> Self {
        Error::new(libc::EIO, message)
    }

    /// EBADMSG: an archive, or an image in one, is refused.
    pub fn bad_archive(message: impl Into<String>) -> Self {
        Error::new(libc::EBADMSG, message)
    }

    /// EBUSY: somebody else uses it now.
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

/// What `work` returns; a fault of ours is an error, where somebody waits for what this thread makes.
pub(crate) fn not_panicking<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::damaged("this is a fault of boxlitefs")))
}

/// Says what was being done when an `io::Error` came.
pub trait Context<T> {
    /// Wraps the error with a message, keeping its errno.
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
