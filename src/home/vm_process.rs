//! The process that a box's virtual machine runs in, and how it is paused: stopped for as long as its disk is
//! copied, and always set going again, also if this process dies meanwhile.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::activity::{live_process, start_time};
use super::paths::Home;
use super::records::BoxRecord;
use crate::{Context, Error, Result};

/// Longest time that a virtual machine stands still for us. The guard sets it going then, come what may.
const LONGEST: Duration = Duration::from_secs(60);
/// By then a copy gives up, so that the guard need not.
const LONGEST_COPY: Duration = Duration::from_secs(45);
/// How long threads may take to stop: those in the middle of a write end that first.
const STOPPING: Duration = Duration::from_secs(5);
/// How long after that they are looked at: then they do stand still.
const MOMENT: Duration = Duration::from_millis(20);
/// Tells the guard that all is over, and nothing to be done.
const OVER: &str = "over";

/// A process that is certain to be the one that was meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmProcess {
    pid: u32,
    /// Clock ticks since boot.
    started: u64,
}

impl Home {
    /// The process of a box's virtual machine, if `shim.pid` says when it began and it lives.
    pub fn vm_process(&self, record: &BoxRecord) -> Option<VmProcess> {
        let (pid, started) = live_process(&self.box_dir(&record.id).join("shim.pid"))?;
        Some(VmProcess {
            pid,
            started: started?,
        })
    }
}

/// A virtual machine that stands still until this is dropped.
pub struct Paused {
    processes: Vec<Stopped>,
    /// Tell whether it still does: nobody may set it going but us. How often its threads ran tells
    /// also where the times of files have long ticks.
    disk: File,
    disk_was: (u64, i64, i64),
    ran: u64,
    since: Instant,
    guard: Guard,
}

struct Stopped {
    process: Process,
    /// It was running before.
    by_us: bool,
}

impl VmProcess {
    /// Stops the process, what it started, and all their threads, and waits until they do stand still. Whoever
    /// had them stopped before has to set them going. `disk` is the file they write to.
    ///
    /// # Errors
    /// EBUSY when somebody else writes to the disk, when the process ended, may not be stopped from here or
    /// does not stop.
    pub fn pause(self, disk: &Path) -> Result<Paused> {
        let message = || format!("cannot look at {}", disk.display());
        let file = File::open(disk).context(message)?;
        let mut paused = Paused {
            processes: Vec::new(),
            disk_was: (0, 0, 0),
            ran: 0,
            disk: file,
            since: Instant::now(),
            guard: Guard::begin()?,
        };
        paused.stop_all(self)?;
        paused.wait_until_stopped()?;
        paused.refuse_other_writers(disk)?;
        // A thread that is about to stop is shown as if it stood still, and runs once more.
        std::thread::sleep(MOMENT);
        paused.ran = paused.runs();
        paused.disk_was = stamp(&paused.disk).context(message)?;
        Ok(paused)
    }
}

impl Paused {
    fn stop_all(&mut self, vm: VmProcess) -> Result<()> {
        let root = Process::open(vm.pid, Some(vm.started))
            .map_err(|error| Error::busy(format!("process {} can't be paused: {error}", vm.pid)))?;
        self.stop(root)?;
        // What it started meanwhile is found by the next look; what is stopped starts nothing.
        loop {
            let known: Vec<u32> = self.processes.iter().map(|it| it.process.pid).collect();
            let found = known.iter().flat_map(|pid| children(*pid));
            let found: Vec<u32> = found.filter(|pid| !known.contains(pid)).collect();
            if found.is_empty() {
                return Ok(());
            }
            for pid in found {
                // Gone is as good as stopped.
                if let Ok(process) = Process::open(pid, None) {
                    self.stop(process)?;
                }
            }
        }
    }

    fn stop(&mut self, process: Process) -> Result<()> {
        let by_us = !process.is_stopped();
        if by_us {
            self.guard.watch(&process)?;
            let stopped = process.signal(Signal::STOP);
            stopped.map_err(|e| {
                Error::busy(format!("process {} can't be paused: {e}", process.pid))
            })?;
        }
        self.processes.push(Stopped { process, by_us });
        Ok(())
    }

    fn wait_until_stopped(&self) -> Result<()> {
        let deadline = Instant::now() + STOPPING;
        while !self.processes.iter().all(|it| it.process.is_stopped()) {
            if Instant::now() > deadline {
                return Err(Error::busy(
                    "the virtual machine does not stand still; try again",
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// EBUSY when a process that was not stopped has the disk open for writing, as far as that can be seen.
    fn refuse_other_writers(&self, disk: &Path) -> Result<()> {
        let meta = self.disk.metadata().context(|| "cannot look at the disk")?;
        let entries = fs::read_dir("/proc").context(|| "cannot read /proc")?;
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        for pid in pids {
            let is_stopped = self.processes.iter().any(|it| it.process.pid == pid);
            if !is_stopped && writes_to(pid, disk, meta.ino()) {
                return Err(Error::busy(format!(
                    "process {pid}, too, has the disk open for writing; end it first"
                )));
            }
        }
        Ok(())
    }

    /// EBUSY when it did not stand still all the time, or does so for too long.
    ///
    /// # Errors
    /// That.
    pub fn still(&self) -> Result<()> {
        if self.since.elapsed() > LONGEST_COPY {
            return Err(Error::busy(format!(
                "copying its disk takes longer than the {} seconds that a virtual machine is paused for; stop the box, or use a file system with reflinks",
                LONGEST_COPY.as_secs()
            )));
        }
        let went_on = || {
            Error::busy(
                "the virtual machine went on while its disk was copied: somebody else set it going, or ended it; try again",
            )
        };
        let now = stamp(&self.disk).map_err(|_| went_on())?;
        let is_still = self.processes.iter().all(|it| it.process.is_stopped());
        if is_still && now == self.disk_was && self.runs() == self.ran {
            return Ok(());
        }
        Err(went_on())
    }
}

impl Paused {
    /// How often its threads were set going by the kernel until now.
    fn runs(&self) -> u64 {
        let processes = self.processes.iter();
        processes.map(|it| it.process.runs()).sum()
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        for it in self.processes.iter().rev().filter(|it| it.by_us) {
            it.process.go_on();
        }
        self.guard.is_over();
    }
}

fn stamp(file: &File) -> std::io::Result<(u64, i64, i64)> {
    let meta = file.metadata()?;
    Ok((meta.len(), meta.mtime(), meta.mtime_nsec()))
}

/// A process by a descriptor of its own: its number may be another's by now, this is not.
struct Process {
    pid: u32,
    started: u64,
    handle: OwnedFd,
}

impl Process {
    /// The process with this number, which must have begun at `started`, where that is known.
    fn open(pid: u32, started: Option<u64>) -> std::io::Result<Process> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ESRCH))?;
        let handle = pidfd_open(number, PidfdFlags::empty())?;
        // Looked at with the descriptor open: the number is that process's as long as it lives.
        let now = start_time(pid).filter(|now| started.is_none_or(|started| started == *now));
        match now {
            Some(started) => Ok(Process {
                pid,
                started,
                handle,
            }),
            None => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    fn signal(&self, signal: Signal) -> std::io::Result<()> {
        pidfd_send_signal(&self.handle, signal).map_err(std::io::Error::from)
    }

    /// Sets it going, unless somebody else wants it to stand still, too: to a stopped process that signal waits.
    fn go_on(&self) {
        if !self.is_to_stop() {
            // It ended: nothing to set going.
            let _ = self.signal(Signal::CONT);
        }
    }

    fn is_to_stop(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let pending = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
                .unwrap_or(0)
        };
        (pending("SigPnd:") | pending("ShdPnd:")) & (1 << (libc::SIGSTOP - 1)) != 0
    }

    /// How often its threads gave up the processor: more often once they ran again.
    fn runs(&self) -> u64 {
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return 0;
        };
        let of_thread = |thread: fs::DirEntry| -> u64 {
            let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            let switches = status
                .lines()
                .filter(|line| line.contains("_ctxt_switches:"));
            let counts = switches.filter_map(|line| line.rsplit_once(':')?.1.trim().parse().ok());
            counts.fold(0, u64::wrapping_add)
        };
        threads.flatten().map(of_thread).fold(0, u64::wrapping_add)
    }

    /// Whether all of its threads stand still, or it is gone.
    fn is_stopped(&self) -> bool {
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return true;
        };
        threads.flatten().all(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            let state = stat
                .rfind(')')
                .and_then(|at| stat[at + 1..].trim_start().chars().next());
            matches!(state, None | Some('T' | 't' | 'Z' | 'X'))
        })
    }
}

/// The processes that one started and that are still its own.
fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let of_thread = |thread: fs::DirEntry| {
        fs::read_to_string(thread.path().join("children")).unwrap_or_default()
    };
    let lists: Vec<String> = threads.flatten().map(of_thread).collect();
    let pids = lists.iter().flat_map(|list| list.split_ascii_whitespace());
    pids.filter_map(|pid| pid.parse().ok()).collect()
}

/// Whether a process has a file open for writing. What can't be seen is none. No file is looked at by what a
/// process has open: that may be of this very mount, which would have to answer itself.
fn writes_to(pid: u32, file: &Path, inode: u64) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| {
            info.lines()
                .find_map(|line| Some(line.strip_prefix(name)?.trim()))
        };
        let flags = field("flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
        let is_writing = flags.is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY);
        let is_inode = field("ino:").is_some_and(|number| number.parse() == Ok(inode));
        let name = || {
            fs::read_link(format!(
                "/proc/{pid}/fd/{}",
                entry.file_name().to_string_lossy()
            ))
        };
        // An inode number alone may be one of another file system.
        is_writing && is_inode && name().is_ok_and(|name| name.file_name() == file.file_name())
    })
}

/// A process of its own that sets going what we stopped if we die, or after [`LONGEST`]. It is there before
/// anything is stopped, and knows of each process before that is.
struct Guard {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Guard {
    fn begin() -> Result<Guard> {
        let message = || "cannot start the process that sets a paused virtual machine going";
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

    /// Has it know of a process.
    fn watch(&mut self, process: &Process) -> Result<()> {
        let order = format!("{} {}\n", process.pid, process.started);
        self.orders
            .write_all(order.as_bytes())
            .context(|| "the guard of paused virtual machines is gone")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<()> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line);
        match read.is_ok_and(|length| length > 0) && line.trim() == "ready" {
            true => Ok(()),
            false => Err(Error::busy(
                "the virtual machine can't be paused, or it ended just now; try again",
            )),
        }
    }

    fn is_over(&mut self) {
        let _ = self.orders.write_all(format!("{OVER}\n").as_bytes());
        // It ends by itself; waited for, so that it leaves no zombie.
        let _ = self.child.wait();
    }
}

/// The hidden command that runs a guard.
pub const GUARD: &str = "guard-of-paused-machines";

/// What that command does: reads which processes are about to be stopped, a number and a start time a line,
/// and answers each once it is ready. Sets all of them going when its input ends without a last word, or after a minute.
pub fn run_guard() {
    // SAFETY: both take no memory. A session of its own, and deaf: what ends the mount, or all in its
    // terminal, must not end this.
    unsafe {
        libc::setsid();
        for signal in [
            libc::SIGHUP,
            libc::SIGINT,
            libc::SIGQUIT,
            libc::SIGTERM,
            libc::SIGPIPE,
        ] {
            libc::signal(signal, libc::SIG_IGN);
        }
    }
    let mut processes = Vec::new();
    let is_over = guard_loop(&mut processes);
    if !is_over {
        processes.iter().rev().for_each(Process::go_on);
    }
}

/// True once it was told that all is over.
fn guard_loop(processes: &mut Vec<Process>) -> bool {
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
            let Some(process) = numbers.and_then(|(pid, at)| Process::open(pid, Some(at)).ok())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_another_process_by_now_is_never_signalled() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let started = start_time(child.id()).unwrap();
        assert!(Process::open(child.id(), Some(started + 1)).is_err());
        let process = Process::open(child.id(), Some(started)).unwrap();
        assert!(!process.is_stopped());
        process.signal(Signal::STOP).unwrap();
        while !process.is_stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Somebody else wants it to stand still as well.
        assert!(!process.is_to_stop());
        process.signal(Signal::STOP).unwrap();
        assert!(process.is_to_stop());
        process.go_on();
        assert!(process.is_stopped());
        process.signal(Signal::CONT).unwrap();
        while process.is_stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process.signal(Signal::CONT).is_err());
        assert!(process.is_stopped(), "what is gone writes nothing");
    }
}
