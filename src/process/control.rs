//! Processes, as /proc and pidfds show them.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Returns the start time of a live process in clock ticks since boot; None if there is no such
/// process, or it is a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2 is the command in parentheses and may hold spaces and parentheses itself.
    let after = &stat[stat.rfind(')')? + 1..];
    let mut fields = after.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// A process by its pidfd. Its number may be reused; the pidfd is not.
pub struct StoppableProcess {
    pub pid: u32,
    pub started: u64,
    handle: OwnedFd,
}

impl StoppableProcess {
    /// Opens the process with this number. If `started` is known, it must have started then.
    pub fn open(pid: u32, started: Option<u64>) -> std::io::Result<StoppableProcess> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ESRCH))?;
        let handle = pidfd_open(number, PidfdFlags::empty())?;
        // Read with the pidfd open: the number belongs to that process as long as it lives.
        let now = start_time(pid).filter(|now| started.is_none_or(|started| started == *now));
        match now {
            Some(started) => Ok(StoppableProcess {
                pid,
                started,
                handle,
            }),
            None => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    pub fn signal(&self, signal: Signal) -> std::io::Result<()> {
        pidfd_send_signal(&self.handle, signal).map_err(std::io::Error::from)
    }

    /// Resumes it, unless another process wants it stopped, too: a stopped process keeps that
    /// signal pending.
    pub fn go_on(&self) {
        if !self.is_to_stop() {
            // It ended, so there is nothing to resume.
            let _ = self.signal(Signal::CONT);
        }
    }

    pub fn is_to_stop(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let pending = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
                .unwrap_or(0)
        };
        (pending("SigPnd:") | pending("ShdPnd:")) & (1 << (libc::SIGSTOP - 1)) != 0
    }

    /// Returns how often its threads gave up the processor. The number grows when they run.
    pub fn runs(&self) -> u64 {
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

    /// Returns whether all of its threads are stopped, or it is gone.
    pub fn is_stopped(&self) -> bool {
        let is_stopped = |state: &Option<char>| matches!(state, None | Some('T' | 't' | 'Z' | 'X'));
        thread_states(self.pid).iter().all(is_stopped)
    }
}

/// Returns a process as messages name it: `python3 agent.py (pid 1234)`.
pub fn named(pid: u32) -> String {
    const LONGEST: usize = 60;
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty());
    let Some(program) = words.next() else {
        return format!("process {pid}");
    };
    let program = program
        .rsplit(|byte| *byte == b'/')
        .next()
        .unwrap_or(program);
    let words: Vec<_> = std::iter::once(program)
        .chain(words)
        .map(String::from_utf8_lossy)
        .collect();
    let line = words.join(" ");
    let mut shown: String = line
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if shown.chars().count() > LONGEST {
        shown = shown.chars().take(LONGEST).chain(['…']).collect();
    }
    format!("{shown} (pid {pid})")
}

/// Returns whether a thread of a process is stopped, by a signal or a debugger.
pub fn is_stopped(pid: u32) -> bool {
    let is_stopped = |state: &Option<char>| matches!(state, Some('T' | 't'));
    thread_states(pid).iter().any(is_stopped)
}

/// Returns the state of each thread of a process, as in proc_pid_stat(5); None for one that has just
/// ended. Empty if the process is gone.
fn thread_states(pid: u32) -> Vec<Option<char>> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let state_of = |thread: fs::DirEntry| {
        let stat = fs::read_to_string(thread.path().join("stat")).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        fields.trim_start().chars().next()
    };
    threads.flatten().map(state_of).collect()
}

/// Returns the children of a process.
pub fn children(pid: u32) -> Vec<u32> {
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

/// Returns whether a process is seen to have a file open for writing. It does not follow the links
/// of open files: they may lead into our own mount, which would have to answer itself.
pub fn has_open_for_writing(pid: u32, file: &Path, inode: u64) -> bool {
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
        // The inode number alone may belong to another file system. The name may be another one of
        // the file.
        let is_mount = || {
            let mount = field("mnt_id:").and_then(|number| number.parse::<u64>().ok());
            mount.is_some() && mount == mount_of(file)
        };
        let is_name = || name().is_ok_and(|name| name.file_name() == file.file_name());
        is_writing && is_inode && (is_name() || is_mount())
    })
}

/// Returns the number of the mount that a file is on.
fn mount_of(file: &Path) -> Option<u64> {
    let wanted = rustix::fs::StatxFlags::MNT_ID;
    let no_flags = rustix::fs::AtFlags::empty();
    let state = rustix::fs::statx(rustix::fs::CWD, file, no_flags, wanted).ok()?;
    Some(state.stx_mnt_id)
}

/// Ignores signals from now on, also in programs that this process starts.
pub fn ignore_signals(signals: &[i32]) {
    for signal in signals {
        // SAFETY: SIG_IGN is no handler of ours, so nothing runs in signal context.
        unsafe { libc::signal(*signal, libc::SIG_IGN) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn a_number_that_is_another_process_by_now_is_never_signalled() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let started = start_time(child.id()).unwrap();
        assert!(StoppableProcess::open(child.id(), Some(started + 1)).is_err());
        let process = StoppableProcess::open(child.id(), Some(started)).unwrap();
        assert!(!process.is_stopped());
        process.signal(Signal::STOP).unwrap();
        while !process.is_stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Another process wants it stopped as well.
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
