//! Named crash points: in the test build, `BOXLITEFS_CRASH_AT=NAME` kills the process there the
//! way a power cut would, with nothing cleaned up. Elsewhere they are nothing.

/// Ends the process with SIGKILL if the test asked for a crash at this point.
#[cfg(feature = "crash-points")]
pub(super) fn crash_point(name: &str) {
    if std::env::var_os("BOXLITEFS_CRASH_AT").is_some_and(|wanted| wanted == name) {
        // SAFETY: kill takes no memory; SIGKILL to ourselves does not return.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            std::thread::park();
        }
    }
}

/// Nothing, outside the test build.
#[cfg(not(feature = "crash-points"))]
pub(super) fn crash_point(_name: &str) {}
