//! What a mount's process is asked for and asks for, as strace sees it.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::{Mounted, TestHome, eventually, text};

/// Kinds of requests, by their numbers (fuse.h, `enum fuse_opcode`).
pub const LOOKUP: u32 = 1;
pub const GETATTR: u32 = 3;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const RELEASE: u32 = 18;
pub const FLUSH: u32 = 25;
pub const READDIR: u32 = 28;
pub const READDIRPLUS: u32 = 44;

/// A trace of a mount's process that is under way.
pub struct Trace {
    strace: Child,
    file: PathBuf,
}

impl Trace {
    /// Begins to trace system calls, with arguments of strace that say which.
    pub fn begin(home: &TestHome, mount: &Mounted, arguments: &[&str]) -> Trace {
        let file = home.beside("trace");
        let strace = Command::new("strace")
            .args(["-f", "-o", text(&file)])
            .args(arguments)
            .args(["-p", &mount.process().to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("strace");
        // Each thread is traced once it says so.
        eventually("strace watches", || {
            let threads = fs::read_dir(format!("/proc/{}/task", mount.process())).unwrap();
            threads.flatten().all(|thread| {
                let status = fs::read_to_string(thread.path().join("status"));
                status.is_ok_and(|status| !status.contains("TracerPid:\t0\n"))
            })
        });
        Trace { strace, file }
    }

    /// Begins to trace the requests that the kernel sends.
    pub fn of_requests(home: &TestHome, mount: &Mounted) -> Trace {
        Trace::begin(
            home,
            mount,
            &["-x", "-s", "8", "-e", "trace=read,readv", "-P", "/dev/fuse"],
        )
    }

    /// Ends the trace. Returns its lines.
    pub fn end(mut self) -> Vec<String> {
        // SAFETY: the process is our own child and has not been waited for yet.
        unsafe { libc::kill(i32::try_from(self.strace.id()).unwrap(), libc::SIGINT) };
        self.strace.wait().unwrap();
        let traced = fs::read_to_string(&self.file).unwrap();
        traced.lines().map(str::to_owned).collect()
    }

    /// Ends a trace of requests. Returns the kind of each.
    pub fn end_of_requests(self) -> Vec<u32> {
        self.end().iter().filter_map(|line| kind(line)).collect()
    }
}

/// Returns the kind of the request that a read returned: the second word of the header.
fn kind(line: &str) -> Option<u32> {
    let (_, quoted) = line.split_once('"')?;
    let bytes: Vec<u8> = quoted
        .split("\\x")
        .skip(1)
        .take(8)
        .map_while(|hex| u8::from_str_radix(hex.get(..2)?, 16).ok())
        .collect();
    let second = bytes.get(4..8)?;
    Some(u32::from_le_bytes(second.try_into().ok()?))
}
