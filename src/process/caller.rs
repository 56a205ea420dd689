//! Processes that make requests, as /proc and pidfds show them.
//!
//! The kernel sends the id of a thread. What counts is the process, and the processes that it
//! descends from. A number may be given to another process later, so a process that is to be
//! recognized again is kept as a pidfd.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};

/// The thread that made a request, as the kernel names it: 0 when it is outside our pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Thread id.
    pub tid: u32,
}

/// Longest line of ancestors that is followed.
const MOST_ANCESTORS: usize = 64;

impl Caller {
    /// Returns whether the caller is in a pid namespace that the mount can't see into. All such
    /// callers look alike.
    pub fn is_outside(self) -> bool {
        self.tid == 0
    }

    /// Returns the caller's process (thread group). None for a caller outside, for one that has
    /// ended, and while the mount may open no more files.
    pub fn process(self) -> Option<u32> {
        match self.tid {
            0 => None,
            tid => process_of(tid).ok(),
        }
    }

    /// Checks that the caller's process can be told from others, now and later.
    ///
    /// # Errors
    /// Those of opening files, and ESRCH where the process has ended.
    pub fn identify(self) -> io::Result<()> {
        open_pidfd(process_of(self.tid)?).map(drop)
    }

    /// Returns whether the caller has the capability SYS_ADMIN over the whole machine, which the
    /// kernel asks for where attributes of the namespace `trusted` are read. False where that can't
    /// be told.
    pub fn is_admin(self) -> bool {
        const SYS_ADMIN: u64 = 1 << 21;
        // The first user namespace has this number on all machines.
        const FIRST: &str = "user:[4026531837]";
        if self.tid == 0 {
            return false;
        }
        let status = fs::read_to_string(format!("/proc/{}/status", self.tid)).unwrap_or_default();
        let has = mask_in(&status, "CapEff:");
        let space = fs::read_link(format!("/proc/{}/ns/user", self.tid));
        has.is_some_and(|has| has & SYS_ADMIN != 0)
            && space.is_ok_and(|space| space.as_os_str() == FIRST)
    }

    /// Returns whether the caller is gone, or about to be ended or interrupted by a signal: KILL,
    /// or one of HUP, INT, QUIT and TERM that it neither blocks nor ignores. The kernel interrupts
    /// no thread that waits for our answer, so such a caller has to get one.
    pub fn is_dying(self) -> bool {
        if self.tid == 0 {
            return false;
        }
        let status = match fs::read_to_string(format!("/proc/{}/status", self.tid)) {
            Ok(status) => status,
            // Where the mount may open no more files, the error says nothing of the caller.
            Err(error) => {
                return error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ESRCH);
            }
        };
        let mask = |field: &str| mask_in(&status, field).unwrap_or(0);
        let bit = |signal: i32| 1u64 << (signal - 1);
        let pending = mask("SigPnd:") | mask("ShdPnd:");
        let kept_away = mask("SigBlk:") | mask("SigIgn:");
        let ends = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM]
            .map(bit)
            .iter()
            .sum::<u64>();
        pending & (bit(libc::SIGKILL) | (ends & !kept_away)) != 0
    }

    /// Returns the words of the caller's command line; none for a caller that can't be seen.
    pub fn command_line(self) -> Vec<String> {
        let words = self
            .process()
            .and_then(|process| fs::read(format!("/proc/{process}/cmdline")).ok());
        let words = words.unwrap_or_default();
        let words = words
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty());
        words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect()
    }

    /// Returns the file name of the program that the caller runs.
    pub fn executable(self) -> Option<String> {
        let process = self.process()?;
        let path = fs::read_link(format!("/proc/{process}/exe")).ok()?;
        Some(path.file_name()?.to_string_lossy().into_owned())
    }

    /// Returns whether a word of the caller's command line is the path of a pipe.
    pub fn names_a_pipe(self, word: &str) -> bool {
        // A descriptor of the caller: `tar xf <(tar c …)`.
        let is_descriptor = word.starts_with("/dev/fd/") || word.starts_with("/proc/self/fd/");
        let is_pipe = |process: u32| {
            let directory = PathBuf::from(format!("/proc/{process}/cwd"));
            let meta = fs::metadata(directory.join(word));
            meta.is_ok_and(|meta| meta.file_type().is_fifo())
        };
        is_descriptor || self.process().is_some_and(is_pipe)
    }

    /// Returns whether the caller's standard input is a pipe or a socket.
    pub fn reads_a_pipe(self) -> bool {
        let input = self
            .process()
            .and_then(|process| fs::read_link(format!("/proc/{process}/fd/0")).ok());
        input.is_some_and(|input| {
            let input = input.to_string_lossy();
            input.starts_with("pipe:") || input.starts_with("socket:")
        })
    }

    /// Returns the name of the caller's thread. A thread of the kernel has no command line, only
    /// this.
    pub fn thread_name(self) -> Option<String> {
        let name = fs::read_to_string(format!("/proc/{}/comm", self.tid)).ok()?;
        Some(name.trim_end().to_owned())
    }

    /// Returns whether the call that the caller waits in makes this name and fails where it exists;
    /// None where that can't be seen. The kernel looks a name up before it is made, and does not
    /// say what for.
    pub fn makes_exclusively(self, name: &str) -> Option<bool> {
        let line = fs::read_to_string(format!("/proc/{}/syscall", self.tid)).ok()?;
        let mut fields = line.split_whitespace();
        let call: libc::c_long = fields.next()?.parse().ok()?;
        let arguments: Vec<u64> = fields
            .map_while(|field| u64::from_str_radix(field.strip_prefix("0x")?, 16).ok())
            .collect();
        let exclusive = (libc::O_CREAT | libc::O_EXCL) as u64;
        let argument = |index: usize| arguments.get(index).copied().unwrap_or_default();
        let (path, flags) = match call {
            libc::SYS_openat => (argument(1), argument(2)),
            libc::SYS_mkdirat => (argument(1), exclusive),
            libc::SYS_symlinkat => (argument(2), exclusive),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => (argument(0), argument(1)),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_mkdir => (argument(0), exclusive),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_symlink => (argument(1), exclusive),
            _ => return Some(false),
        };
        if flags & exclusive != exclusive {
            return Some(false);
        }
        // The directories on the way are looked up for the same call. Where a path ends with the
        // same name twice, the lookup is for the directory: the last one is not looked up.
        let path = self.path_at(path)?;
        let mut names = path
            .rsplit(|byte| *byte == b'/')
            .filter(|name| !name.is_empty());
        let is_last = names.next() == Some(name.as_bytes());
        Some(is_last && names.next() != Some(name.as_bytes()))
    }

    /// Returns the path at an address of the caller's memory.
    fn path_at(self, address: u64) -> Option<Vec<u8>> {
        const PIECE: u64 = 256;
        let memory = fs::File::open(format!("/proc/{}/mem", self.tid)).ok()?;
        let mut path = Vec::new();
        // Each read ends where a page may end: the next page may be missing.
        while path.len() < libc::PATH_MAX as usize {
            let at = address.checked_add(path.len() as u64)?;
            let mut piece = vec![0; (PIECE - at % PIECE) as usize];
            memory.read_exact_at(&mut piece, at).ok()?;
            let end = piece.iter().position(|byte| *byte == 0);
            path.extend_from_slice(&piece[..end.unwrap_or(piece.len())]);
            if end.is_some() {
                return Some(path);
            }
        }
        None
    }
}

/// The processes that make one thing together: the one that began, its descendants, and a process
/// that took over when all of those were gone.
#[derive(Debug, Default)]
pub struct ProcessGroup {
    members: HashMap<u32, OwnedFd>,
    /// A caller that can't be seen began or took part. It can't be told from others like it.
    unseen: bool,
}

impl ProcessGroup {
    /// Returns a group of the caller's process.
    pub fn begin(caller: Caller) -> ProcessGroup {
        let mut group = ProcessGroup::default();
        group.add(caller);
        group
    }

    /// Adds the caller's process.
    pub fn join(&mut self, caller: Caller) {
        if !self.includes(caller) {
            self.add(caller);
        }
    }

    fn add(&mut self, caller: Caller) {
        self.members.retain(|_, process| is_alive(process));
        match caller.process() {
            Some(process) => {
                if let Ok(fd) = open_pidfd(process) {
                    self.members.insert(process, fd);
                }
            }
            None => self.unseen |= caller.is_outside(),
        }
    }

    /// Returns whether the caller is a member. A descendant of a member becomes one.
    pub fn includes(&mut self, caller: Caller) -> bool {
        let Some(process) = caller.process() else {
            return self.unseen && caller.is_outside();
        };
        if self.members.get(&process).is_some_and(is_alive) {
            return true;
        }
        let mut ancestor = process;
        for _ in 0..MOST_ANCESTORS {
            match parent_of(ancestor) {
                Err(_) | Ok(0 | 1) => return false,
                Ok(parent) if self.members.get(&parent).is_some_and(is_alive) => {
                    self.add(caller);
                    return true;
                }
                Ok(parent) => ancestor = parent,
            }
        }
        false
    }

    /// Returns whether the caller is a member itself, and not a descendant of one.
    pub fn has(&self, caller: Caller) -> bool {
        match caller.process() {
            Some(process) => self.members.get(&process).is_some_and(is_alive),
            None => self.unseen && caller.is_outside(),
        }
    }

    /// Returns whether a living process is in both groups.
    pub fn shares_member(&self, other: &ProcessGroup) -> bool {
        let in_both = |(process, fd)| is_alive(fd) && other.members.contains_key(process);
        self.members.iter().any(in_both)
    }

    /// Returns whether a member still runs.
    pub fn any_alive(&self) -> bool {
        self.unseen || self.members.values().any(is_alive)
    }

    /// Makes the caller the only member where all others are gone. Returns whether it is a member
    /// now.
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

/// Memory of this process in bytes; None where /proc does not say.
#[derive(Default)]
pub struct Memory {
    /// In use now.
    pub resident: Option<u64>,
    /// The most that was ever in use.
    pub peak: Option<u64>,
}

impl Memory {
    /// Reads what this process uses.
    pub fn of_this_process() -> Memory {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let bytes = |name: &str| {
            let kib: u64 = field_in(&status, name)?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()?;
            Some(kib * 1024)
        };
        Memory {
            resident: bytes("VmRSS:"),
            peak: bytes("VmHWM:"),
        }
    }
}

/// Returns a field of a /proc/PID/status.
fn field_in<'s>(status: &'s str, field: &str) -> Option<&'s str> {
    status.lines().find_map(|line| line.strip_prefix(field))
}

/// Returns a field with a mask of bits.
fn mask_in(status: &str, field: &str) -> Option<u64> {
    u64::from_str_radix(field_in(status, field)?.trim(), 16).ok()
}

/// Returns the process that a thread is of. Only the first thread of a process can be opened as one,
/// which costs a tenth of reading its status.
fn process_of(tid: u32) -> io::Result<u32> {
    if open_pidfd(tid).is_ok() {
        return Ok(tid);
    }
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    field_in(&status, "Tgid:")
        .and_then(|value| value.trim().parse().ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// Returns the parent of a process: the second field after the name, which is in parentheses and may
/// have any characters (proc_pid_stat(5)).
fn parent_of(pid: u32) -> io::Result<u32> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    fields
        .and_then(|fields| fields.split_whitespace().nth(1)?.parse().ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)
}

/// Returns whether a process still runs: its pidfd becomes readable when it ends.
fn is_alive(process: &OwnedFd) -> bool {
    let mut process = [PollFd::new(process, PollFlags::IN)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut process, Some(&at_once)), Ok(0))
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
        let mut group = ProcessGroup::begin(me);
        assert!(group.includes(me));
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
        assert!(group.includes(Caller { tid: child.id() }));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!group.includes(Caller { tid: 1 }));
    }

    #[test]
    fn a_parent_is_told_whatever_the_name_of_its_child() {
        let mut child = Command::new("bash")
            .args(["-c", "printf ') 1 2 (' > /proc/self/comm; read -r"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(parent_of(child.id()).unwrap(), std::process::id());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(parent_of(child.id()).is_err());
    }

    #[test]
    fn what_a_dead_process_left_is_taken_over_by_the_next() {
        let mut child = Command::new("sleep").arg("5").spawn().unwrap();
        let mut group = ProcessGroup::begin(Caller { tid: child.id() });
        let me = Caller {
            tid: std::process::id(),
        };
        assert!(group.any_alive());
        assert!(!group.take_over(me));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!group.any_alive());
        assert!(group.take_over(me));
        assert!(group.includes(me));
    }
}
