//! Serves a mount in the background: a child serves, and its parent waits until it does.
//!
//! The child reports once through a pipe: `ok`, or the errno and message of its failure. If it dies
//! without a report, the pipe ends, and the parent says so.

use std::fs::File;
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, setsid, waitpid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::{signals, unmount};
use crate::{Context, Error, Result};

/// The child's report that it serves.
const SERVING: &str = "ok";

/// The pipe for the child's one report to its parent. Further reports are dropped.
pub(super) struct ReadyPipe(Mutex<Option<PipeWriter>>);

impl ReadyPipe {
    /// Leaves the terminal and the working directory of the caller, and reports that the mount
    /// serves.
    pub fn report_ready(&self) {
        if let Err(error) = leave_the_terminal() {
            log::warn!("the process stays at its terminal: {error}");
        }
        if self.say(SERVING).is_err() {
            // The caller ended before the mount was there: no process expects it.
            signals::end_this_process();
        }
    }

    /// Reports that serving failed.
    fn report_failure(&self, error: &Error) {
        // If the parent is gone, there is no other process to tell.
        let _ = self.say(&format!("{} {error}", error.errno()));
    }

    fn say(&self, what: &str) -> io::Result<()> {
        match self.0.lock().take() {
            Some(mut pipe) => pipe.write_all(what.as_bytes()),
            None => Ok(()),
        }
    }
}

/// Runs `serve` in a child and returns once the child reports that it serves. Call it before any
/// thread or database connection exists: neither survives a fork.
///
/// # Errors
/// The error of `serve` before it served; EIO when the child died without a report.
pub(super) fn start(mountpoint: &Path, serve: impl FnOnce(&ReadyPipe) -> Result<()>) -> Result<()> {
    let (mut reader, writer) = io::pipe().context(|| "cannot make a pipe")?;
    let child = fork().context(|| "cannot start the process that serves the mount")?;
    let Some(child) = child else {
        drop(reader);
        std::process::exit(run_child(writer, serve));
    };
    drop(writer);
    let mut word = Vec::new();
    reader
        .read_to_end(&mut word)
        .context(|| "cannot read the report of the process that serves the mount")?;
    let word = String::from_utf8_lossy(&word);
    if word == SERVING {
        return Ok(());
    }
    let status = wait_for(child);
    // If it was killed, it may have left a dead mount.
    if let Err(error) = unmount::remove_dead(mountpoint) {
        log::debug!("{error}");
    }
    Err(refusal(&word).unwrap_or_else(|| {
        Error::new(
            libc::EIO,
            format!(
                "the process that should serve {} ended without a report ({status}): try again with --foreground to see why",
                mountpoint.display()
            ),
        )
    }))
}

/// Runs the child; returns its exit status.
fn run_child(writer: PipeWriter, serve: impl FnOnce(&ReadyPipe) -> Result<()>) -> i32 {
    close_inherited(writer.as_raw_fd());
    // It can't fail in a child that leads no process group.
    let _ = setsid();
    let pipe = ReadyPipe(Mutex::new(Some(writer)));
    match serve(&pipe) {
        Ok(()) => 0,
        Err(error) => {
            pipe.report_failure(&error);
            1
        }
    }
}

/// Parses the child's `ERRNO MESSAGE`; None for anything else.
fn refusal(word: &str) -> Option<Error> {
    let (errno, message) = word.split_once(' ')?;
    Some(Error::new(errno.parse().ok()?, message))
}

/// Forks; returns the child's number to the parent, and None to the child.
fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the process has a single thread yet, so the child may do anything its parent may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Waits for the end of a child.
fn wait_for(child: Pid) -> ExitStatus {
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            Ok(Some((_, status))) => return ExitStatus::from_raw(status.as_raw()),
            _ => return ExitStatus::default(),
        }
    }
}

/// Closes inherited descriptors: one that the caller had open (a lock, a pipe) must not stay open
/// as long as the mount.
fn close_inherited(keep: RawFd) {
    const FIRST: u32 = 3;
    let Ok(keep) = u32::try_from(keep) else {
        return;
    };
    for (first, last) in [
        (FIRST, keep.wrapping_sub(1)),
        (keep.wrapping_add(1), u32::MAX),
    ] {
        if keep < FIRST || first > last {
            continue;
        }
        // SAFETY: nothing in this process owns these descriptors: it has opened only `keep`.
        // Kernels before 5.9 lack the call; then the descriptors stay open, which does no harm.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Takes `/` as working directory and /dev/null as standard input, output and error.
fn leave_the_terminal() -> io::Result<()> {
    std::env::set_current_dir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_reported_through_the_pipe_keeps_errno_and_message() {
        let error = refusal("16 the home is busy: close it").unwrap();
        assert_eq!(error.errno(), libc::EBUSY);
        assert_eq!(error.message(), "the home is busy: close it");
        assert!(refusal("").is_none());
        assert!(refusal("killed").is_none());
    }
}
