//! The guard of paused virtual machines: a process of its own that resumes them if we die.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::process::control::{StoppableProcess, ignore_signals};
use crate::{Context, Error, Result};

/// The longest time that we pause a virtual machine. Then the guard resumes it in any case.
const LONGEST: Duration = Duration::from_secs(60);
/// Tells the guard to end without doing anything.
const OVER: &str = "over";

/// A separate process that resumes what we stopped if we die, or after [`LONGEST`]. It runs before
/// anything is stopped, and knows of each process before that is stopped.
pub(super) struct Guard {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Guard {
    pub fn begin() -> Result<Guard> {
        let message = || "cannot start the guard that resumes a paused virtual machine";
        let mut child = Command::new("/proc/self/exe")
            .arg(GUARD)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .context(message)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (orders, answers) = pipes.ok_or_else(|| Error::damaged(message()))?;
        let mut guard = Guard {
            child,
            orders,
            answers: BufReader::new(answers),
        };
        guard.answer()?;
        Ok(guard)
    }

    /// Tells the guard about a process.
    pub fn watch(&mut self, process: &StoppableProcess) -> Result<()> {
        let order = format!("{} {}\n", process.pid, process.started);
        self.orders
            .write_all(order.as_bytes())
            .context(|| "the guard of paused virtual machines is gone")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<()> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line);
        if read.is_ok_and(|length| length > 0) && line.trim() == "ready" {
            Ok(())
        } else {
            Err(Error::busy(
                "the virtual machine can't be paused, or it ended just now; try again",
            ))
        }
    }

    pub fn is_over(&mut self) {
        let _ = self.orders.write_all(format!("{OVER}\n").as_bytes());
        // It ends by itself; wait, so that it leaves no zombie.
        let _ = self.child.wait();
    }
}

/// The hidden command that runs a guard.
pub const GUARD: &str = "guard-of-paused-machines";

/// Runs the guard: reads which processes are about to be stopped, a number and a start time in each
/// line, and answers each line once it is ready. Resumes all of them when its input ends without a
/// last word, or after a minute.
pub fn run_guard() {
    // A session of its own, deaf to signals: what ends the mount, or everything in its terminal,
    // must not end the guard. setsid fails only for the leader of a process group.
    let _ = rustix::process::setsid();
    ignore_signals(&[
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGPIPE,
    ]);
    let mut processes = Vec::new();
    let is_over = guard_loop(&mut processes);
    if !is_over {
        processes.iter().rev().for_each(StoppableProcess::go_on);
    }
}

/// Returns true when it was told to end.
fn guard_loop(processes: &mut Vec<StoppableProcess>) -> bool {
    let deadline = Instant::now() + LONGEST;
    let mut input = std::io::stdin().lock();
    let ready = || {
        let mut out = std::io::stdout().lock();
        out.write_all(b"ready\n").and_then(|()| out.flush()).is_ok()
    };
    let mut text = Vec::new();
    if !ready() {
        return false;
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !has_input(left) {
            return false;
        }
        let mut bytes = [0; 256];
        match input.read(&mut bytes) {
            Ok(0) | Err(_) => return false,
            Ok(length) => text.extend_from_slice(&bytes[..length]),
        }
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim().to_owned();
            if line == OVER {
                return true;
            }
            let numbers = line.split_once(' ');
            let numbers = numbers.and_then(|(pid, at)| Some((pid.parse().ok()?, at.parse().ok()?)));
            let Some(process) =
                numbers.and_then(|(pid, at)| StoppableProcess::open(pid, Some(at)).ok())
            else {
                return false;
            };
            processes.push(process);
            if !ready() {
                return false;
            }
        }
    }
}

/// Waits for standard input to have something, or to end.
fn has_input(patience: Duration) -> bool {
    let milliseconds = i32::try_from(patience.as_millis())
        .unwrap_or(i32::MAX)
        .max(1);
    let input = std::io::stdin();
    let mut input = [PollFd::new(&input, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: i64::from(milliseconds / 1000),
        tv_nsec: i64::from(milliseconds % 1000) * 1_000_000,
    };
    poll(&mut input, Some(&patience)).is_ok_and(|ready| ready > 0)
}
