//! Who asks: the kernel sends a thread id, what counts is the process and those it descends from.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};

/// The thread that made a request, as the kernel names it: 0 when it is outside our pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Thread id.
    pub tid: u32,
}

/// Longest line of ancestors looked at.
const MOST_ANCESTORS: usize = 64;

impl Caller {
    /// Whether it is in a pid namespace that the mount can't see into: all such callers look alike.
    pub fn is_outside(self) -> bool {
        self.tid == 0
    }

    /// The caller's process (thread group). None for a caller outside, for one that has ended, and while
    /// the mount may open no more files.
    pub fn process(self) -> Option<u32> {
        match self.tid {
            0 => None,
            tid => status_field(tid, "Tgid:"),
        }
    }

    /// Whether its process can be told from others, now and later. Errors: those of opening files, and
    /// ESRCH where it has ended.
    pub fn identify(self) -> io::Result<()> {
        let process = read_status_field(self.tid, "Tgid:")?;
        pidfd_open(process).map(drop)
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
        let status = match fs::read_to_string(format!("/proc/{}/status", self.tid)) {
            Ok(status) => status,
            // Not where the mount may open no more files, which says nothing of the caller.
            Err(error) => {
                return error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ESRCH);
            }
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

/// Programs that copy whole trees, by the name they are called by. None of them reads back what it
/// has put somewhere.
const COPIERS: [&str; 17] = [
    "cp", "mv", "rsync", "tar", "bsdtar", "cpio", "bsdcpio", "pax", "unzip", "7z", "7za", "7zr",
    "7zz", "7zzs", "borg", "restic", "gcp",
];

/// Those that leave what they copy in place, whatever their options.
const KEEP_SOURCES: [&str; 8] = [
    "cp", "gcp", "tar", "bsdtar", "cpio", "bsdcpio", "pax", "unzip",
];

/// Programs that do other things as well, with the commands by which they copy.
const COPY_COMMANDS: [(&str, &[&str]); 5] = [
    ("busybox", &["cp", "mv", "tar", "cpio", "unzip"]),
    ("toybox", &["cp", "mv", "tar", "cpio"]),
    ("coreutils", &["cp", "mv", "install"]),
    ("gio", &["copy", "move"]),
    (
        "rclone",
        &["copy", "copyto", "move", "moveto", "sync", "bisync"],
    ),
];

/// Programs that make a directory tree available to others, who make its calls: which of them is at
/// it, and what for, can't be told.
const FILE_SERVERS: [&str; 16] = [
    "sftp-server",
    "internal-sftp",
    "sshd",
    "sshd-session",
    "smbd",
    "nfsd",
    "ganesha.nfsd",
    "unfsd",
    "bindfs",
    "mergerfs",
    "unionfs",
    "virtiofsd",
    "diod",
    "vsftpd",
    "proftpd",
    "pure-ftpd",
];

/// The file name of the first word of a command line.
fn first_name(words: &[String]) -> Option<&str> {
    words.first()?.rsplit('/').next()
}

impl Caller {
    /// The words of its command line; none for a caller we can't see.
    fn command_line(self) -> Vec<String> {
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

    /// Whether it is a program that copies: what it makes a directory for comes into it next. A hint
    /// that anybody can give, so only what it is shown, and which refusal it meets, goes by it.
    pub fn copies(self) -> bool {
        let words = self.command_line();
        let mut words = words
            .iter()
            .map(|word| word.rsplit('/').next().unwrap_or(word));
        // Python programs, as borg is one.
        let name = words.find(|word| !word.starts_with("python") && !word.starts_with('-'));
        let Some(name) = name else {
            return false;
        };
        let commands = COPY_COMMANDS.iter().find(|(program, _)| *program == name);
        match (commands, words.find(|word| !word.starts_with('-'))) {
            (Some((_, commands)), Some(command)) => commands.contains(&command),
            (Some(_), None) => false,
            (None, _) => COPIERS.contains(&name),
        }
    }

    /// Whether it is a file server, whose clients may be programs that copy.
    pub fn serves_others(self) -> bool {
        let words = self.command_line();
        let Some(name) = first_name(&words) else {
            // A thread of the kernel has no command line: its name is all there is.
            let name = fs::read_to_string(format!("/proc/{}/comm", self.tid));
            return name.is_ok_and(|name| FILE_SERVERS.contains(&name.trim_end()));
        };
        match name {
            "rclone" => matches!(words.get(1).map(String::as_str), Some("serve" | "mount")),
            // `sshd: user@notty` and the like.
            name => FILE_SERVERS.contains(&name.split([':', ' ']).next().unwrap_or(name)),
        }
    }

    /// Whether it is a program that copies whole trees in the order of their directories, and its command line
    /// says nothing of a file of this name. rsync goes by the alphabet, and its server is not told.
    pub fn copies_tree_without(self, name: &str) -> bool {
        let words = self.command_line();
        self.copies()
            && first_name(&words) != Some("rsync")
            && !words.iter().any(|word| word.ends_with(name))
    }

    /// Whether it is mv, which calls rmdir on the directory that it is about to replace.
    pub fn moves(self) -> bool {
        first_name(&self.command_line()) == Some("mv")
    }

    /// Whether it is a program that leaves its sources in place, so that what it copied can go if it fails.
    /// mv, and rsync with an option for that, remove the source of each file as soon as that is copied.
    pub fn keeps_sources(self) -> bool {
        let words = self.command_line();
        match first_name(&words) {
            Some("busybox" | "toybox" | "coreutils") => first_name(&words[1..]) == Some("cp"),
            Some("rsync") => !words.iter().any(|word| {
                word.starts_with("--remove-s") || word == "--server" || word == "--daemon"
            }),
            Some("rclone") => words
                .iter()
                .any(|word| matches!(word.as_str(), "copy" | "copyto" | "sync" | "bisync")),
            Some(name) => KEEP_SOURCES.contains(&name),
            None => false,
        }
    }

    /// Whether it is a program that, besides other things, copies trees, and looks whether a name is free
    /// before it makes it.
    pub fn looks_first(self) -> bool {
        first_name(&self.command_line()) == Some("mc")
    }

    /// Whether it is rsync.
    pub fn is_rsync(self) -> bool {
        first_name(&self.command_line()) == Some("rsync")
    }

    /// Whether it is rsync that puts files aside in a directory whose name does not begin with a dot: where
    /// that can't be made, rsync drops what it has received and exits with 0.
    pub fn puts_files_elsewhere(self) -> bool {
        const OPTION: &str = "--partial-dir";
        let words = self.command_line();
        let is_rsync = words.first().is_some_and(|word| word.ends_with("rsync"));
        let at = words.iter().position(|word| word.starts_with(OPTION));
        let directory = at.and_then(|at| match words[at].split_once('=') {
            Some((_, directory)) => Some(directory),
            None => words.get(at + 1).map(String::as_str),
        });
        let is_kept = directory.is_none_or(|name| name.starts_with('.') && !name.contains('/'));
        is_rsync && !is_kept && words.iter().any(|word| word.starts_with("--delay-updates"))
    }

    /// Whether the call it waits in makes this name, which must not be there yet; None where that can't
    /// be seen. The kernel looks a name up before it is made, and does not say what for.
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
        // The directories on the way are looked up for the same call. Of two names that are the same,
        // one after the other, the first is such a directory, and nobody asks for the other.
        let path = self.path_at(path)?;
        let mut names = path
            .rsplit(|byte| *byte == b'/')
            .filter(|name| !name.is_empty());
        let is_last = names.next() == Some(name.as_bytes());
        Some(is_last && names.next() != Some(name.as_bytes()))
    }

    /// The path at an address of its memory.
    fn path_at(self, address: u64) -> Option<Vec<u8>> {
        const PIECE: u64 = 256;
        let memory = fs::File::open(format!("/proc/{}/mem", self.tid)).ok()?;
        let mut path = Vec::new();
        // Up to the end of a page each time: the next may not be there.
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
                if let Ok(fd) = pidfd_open(process) {
                    self.members.insert(process, fd);
                }
            }
            None => self.unseen |= caller.is_outside(),
        }
    }

    /// Whether the caller is one of them; a descendant of a member becomes one.
    pub fn includes(&mut self, caller: Caller) -> bool {
        let Some(process) = caller.process() else {
            return self.unseen && caller.is_outside();
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

/// A number in /proc/PID/status; None where it can't be read.
fn status_field(pid: u32, field: &str) -> Option<u32> {
    read_status_field(pid, field).ok()
}

fn read_status_field(pid: u32, field: &str) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status.lines().find_map(|line| line.strip_prefix(field));
    value
        .and_then(|value| value.trim().parse().ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)
}

/// A pidfd becomes readable when its process ends; a later process of the same number has another.
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
