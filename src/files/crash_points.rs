//! Named crash points: in the test build, `BOXLITEFS_CRASH_AT=NAME` kills the process there the
//! way a power cut would, with nothing cleaned up, and `BOXLITEFS_STOP_AT=NAME` has it stand still there,
//! once, until it is told to go on (SIGCONT). Elsewhere they are nothing.

/// Ends the process with SIGKILL if the test asked for a crash at this point, or stops it with SIGSTOP.
#[cfg(debug_assertions)]
pub fn crash_point(name: &str) {
    use std::sync::atomic::{AtomicBool, Ordering};
    static STOPPED: AtomicBool = AtomicBool::new(false);
    let is_set = |variable: &str| std::env::var_os(variable).is_some_and(|it| it == name);
    if is_set("BOXLITEFS_CRASH_AT") {
        // SAFETY: kill takes no memory; SIGKILL to ourselves does not return.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            std::thread::park();
        }
    }
    if is_set("BOXLITEFS_STOP_AT") && !STOPPED.swap(true, Ordering::Relaxed) {
        // SAFETY: raise takes no memory. It is this thread's signal, so this thread goes no further: one to
        // the process may be taken by another thread.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
}

/// Nothing, outside the test build.
#[cfg(not(debug_assertions))]
pub fn crash_point(_name: &str) {}
