//! The one error type: an errno for the kernel, a message for people, and the cause.

use std::fmt;
use std::io;

/// The results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error: the errno a user would look up, and a message that names the object, the problem, and
/// what to do. The message reaches the log in the mount and the terminal.
#[derive(Debug)]
pub struct Error {
    errno: i32,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// Makes an error that boxlitefs found itself. `errno` is a positive `libc::E…` value.
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        Error {
            errno,
            message: message.into(),
            source: None,
        }
    }

    /// Makes an error that a system call or a library reported. The errno is that of `source`, or
    /// EIO if it has none.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        Error {
            errno: source.raw_os_error().unwrap_or(libc::EIO),
            message: message.into(),
            source: Some(Box::new(source)),
        }
    }

    /// Replaces the errno, where the cause's own would mislead.
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.errno = errno;
        self
    }

    /// Adds the cause.
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Copies the error for another waiter. The copy has the cause only as text.
    pub fn again(&self) -> Self {
        Error::new(self.errno, self.to_string())
    }

    /// Returns the errno, a positive value.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// Returns the message without the cause.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Makes an EIO: data on disk is damaged.
    pub fn damaged(message: impl Into<String>) -> Self {
        Error::new(libc::EIO, message)
    }

    /// Makes an EBADMSG: an archive, or an image in one, is refused.
    pub fn bad_archive(message: impl Into<String>) -> Self {
        Error::new(libc::EBADMSG, message)
    }

    /// Makes an EBUSY: another process uses it now.
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

/// Runs `work` and turns a panic into an error, for work that another thread waits for.
///
/// # Errors
/// Those of `work`; EIO if it panics.
pub(crate) fn not_panicking<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::damaged("this is a fault of boxlitefs")))
}

/// Adds to an `io::Error` what was being done.
pub trait Context<T> {
    /// Wraps the error with a message and keeps its errno.
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
