//! Who asks: the kernel sends a thread id, what counts is the process and those it descends from.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The thread that made a request, as the kernel names it: 0 when it is outside our pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Thread id.
    pub tid: u32,
}

/// Longest line of ancestors looked at.
const MOST_ANCESTORS: usize = 64;

impl Caller {
    /// The caller's process (thread group). None for a caller we can't see.
    fn process(self) -> Option<u32> {
        match self.tid {
            0 => None,
            tid => status_field(tid, "Tgid:"),
        }
    }

    /// Whether it has the capability SYS_ADMIN over the whole machine, as the kernel asks for where
    /// attributes of the name space `trusted` are read. False where that can't be told.
    pub fn is_admin(self) -> bool {
        const SYS_ADMIN: u64 = 1 << 21;
        // The first user name space has this number on all machines.
        const FIRST: &str = "user:[4026531837]";
        if self.tid == 0 {
            return false;
        }
        let status = fs::read_to_string(format!("/proc/{}/status", self.tid)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let has = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        let space = fs::read_link(format!("/proc/{}/ns/user", self.tid));
        has.is_some_and(|has| has & SYS_ADMIN != 0)
            && space.is_ok_and(|space| space.as_os_str() == FIRST)
    }

    /// Whether it is gone, or about to be ended or interrupted by a signal: KILL, or one of HUP, INT,
    /// QUIT and TERM that it neither blocks nor ignores. The kernel lets nobody be interrupted while
    /// he waits for our answer, so he has to get one.
    pub fn is_dying(self) -> bool {
        if self.tid == 0 {
            return false;
        }
        let Ok(status) = fs::read_to_string(format!("/proc/{}/status", self.tid)) else {
            return true;
        };
        let mask = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
                .unwrap_or(0)
        };
        let bit = |signal: i32| 1u64 << (signal - 1);
        let pending = mask("SigPnd:") | mask("ShdPnd:");
        let kept_away = mask("SigBlk:") | mask("SigIgn:");
        let ends = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM]
            .map(bit)
            .iter()
            .sum::<u64>();
        pending & (bit(libc::SIGKILL) | (ends & !kept_away)) != 0
    }
}

/// The processes that make one thing together: the one that began, its descendants, and whoever
/// took over when all of those were gone.
#[derive(Debug, Default)]
pub struct Makers {
    members: HashMap<u32, OwnedFd>,
    /// A caller we can't see began or took part: it can't be told from others like it.
    unseen: bool,
}

impl Makers {
    /// The caller begins.
    pub fn begin(caller: Caller) -> Makers {
        let mut makers = Makers::default();
        makers.add(caller);
        makers
    }

    /// The caller takes part.
    pub fn join(&mut self, caller: Caller) {
        if !self.includes(caller) {
            self.add(caller);
        }
    }

    fn add(&mut self, caller: Caller) {
        self.members.retain(|_, process| is_alive(process));
        match caller.process() {
            Some(process) => {
                if let Some(fd) = pidfd_open(process) {
                    self.members.insert(process, fd);
                }
            }
            None => self.unseen = true,
        }
    }

    /// Whether the caller is one of them; a descendant of a member becomes one.
    pub fn includes(&mut self, caller: Caller) -> bool {
        let Some(process) = caller.process() else {
            return true;
        };
        if self.members.get(&process).is_some_and(is_alive) {
            return true;
        }
        let mut ancestor = process;
        for _ in 0..MOST_ANCESTORS {
            match status_field(ancestor, "PPid:") {
                None | Some(0 | 1) => return false,
                Some(parent) if self.members.get(&parent).is_some_and(is_alive) => {
                    self.add(caller);
                    return true;
                }
                Some(parent) => ancestor = parent,
            }
        }
        false
    }

    /// Whether a process is among both.
    pub fn share(&self, others: &Makers) -> bool {
        let theirs = |(process, fd)| is_alive(fd) && others.members.contains_key(process);
        self.members.iter().any(theirs)
    }

    /// Whether any of them still runs.
    pub fn any_alive(&self) -> bool {
        self.unseen || self.members.values().any(is_alive)
    }

    /// The caller goes on with what the others left, if they are all gone.
    pub fn take_over(&mut self, caller: Caller) -> bool {
        if self.includes(caller) {
            return true;
        }
        if self.any_alive() {
            return false;
        }
        self.members.clear();
        self.add(caller);
        true
    }
}

/// A number in /proc/PID/status.
fn status_field(pid: u32, field: &str) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))?
        .trim()
        .parse()
        .ok()
}

fn pidfd_open(pid: u32) -> Option<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).ok()?;
    // SAFETY: pidfd_open takes two integers; a result that is not -1 is a new descriptor that
    // nobody else owns. Neither std nor libc has a wrapper.
    unsafe {
        match libc::syscall(libc::SYS_pidfd_open, pid, 0) {
            fd if fd >= 0 => Some(OwnedFd::from_raw_fd(i32::try_from(fd).ok()?)),
            _ => None,
        }
    }
}

/// A pidfd becomes readable when its process ends; a later process of the same number has another.
fn is_alive(process: &OwnedFd) -> bool {
    let mut poll = libc::pollfd {
        fd: process.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, alive for the call; a timeout of 0 returns at once.
    unsafe { libc::poll(&mut poll, 1, 0) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_thread_and_a_child_count_as_their_process() {
        let me = Caller {
            tid: std::process::id(),
        };
        let mut makers = Makers::begin(me);
        assert!(makers.includes(me));
        // SAFETY: gettid has no preconditions.
        let thread = std::thread::spawn(|| unsafe { libc::gettid() })
            .join()
            .unwrap();
        assert_ne!(thread as u32, me.tid);
        let mut child = Command::new("sleep")
            .arg("5")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        assert!(makers.includes(Caller { tid: child.id() }));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!makers.includes(Caller { tid: 1 }));
    }

    #[test]
    fn what_a_dead_process_left_is_taken_over_by_the_next() {
        let mut child = Command::new("sleep").arg("5").spawn().unwrap();
        let mut makers = Makers::begin(Caller { tid: child.id() });
        let me = Caller {
            tid: std::process::id(),
        };
        assert!(makers.any_alive());
        assert!(!makers.take_over(me));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!makers.any_alive());
        assert!(makers.take_over(me));
        assert!(makers.includes(me));
    }
}
