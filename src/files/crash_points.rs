//! Named crash points for tests. In a debug build, `BOXLITEFS_CRASH_AT=NAME` kills the process at
//! that point as a power cut would, with no cleanup. `BOXLITEFS_STOP_AT=NAME` stops it there, once,
//! until SIGCONT. In other builds they do nothing.

/// Kills the process with SIGKILL, or stops it with SIGSTOP, if the test asked for that at this
/// point.
#[cfg(debug_assertions)]
pub fn crash_point(name: &str) {
    use std::sync::atomic::{AtomicBool, Ordering};
    static STOPPED: AtomicBool = AtomicBool::new(false);
    let is_set = |variable: &str| std::env::var_os(variable).is_some_and(|it| it == name);
    if is_set("BOXLITEFS_CRASH_AT") {
        // SAFETY: kill accesses no memory of ours; SIGKILL to ourselves does not return.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            std::thread::park();
        }
    }
    if is_set("BOXLITEFS_STOP_AT") && !STOPPED.swap(true, Ordering::Relaxed) {
        // SAFETY: raise accesses no memory of ours. It signals this thread, so this thread goes no
        // further; another thread could take a signal to the process.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
}

/// Does nothing outside debug builds.
#[cfg(not(debug_assertions))]
pub fn crash_point(_name: &str) {}
