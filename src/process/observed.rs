//! Reads /proc and pidfds of processes. Only root sees what processes of other users have open.

use std::fmt;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::connection;
use crate::mountinfo::Device;

/// How much of a command line a message shows, in characters.
const COMMAND: usize = 60;

/// A process, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(u32);

impl Process {
    /// This process.
    pub fn this() -> Process {
        Process(std::process::id())
    }

    /// Returns all processes, the lowest numbers first.
    pub fn all() -> Vec<Process> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut pids: Vec<u32> = entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        pids.sort_unstable();
        pids.into_iter().map(Process).collect()
    }

    /// Its process number.
    pub fn pid(self) -> u32 {
        self.0
    }

    /// The path of one of its files in /proc.
    fn file(self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.0))
    }

    /// Reads its command line, each word ended by NUL. Empty for a kernel thread, or a process that
    /// is gone.
    pub fn command_line(self) -> Vec<u8> {
        fs::read(self.file("cmdline")).unwrap_or_default()
    }

    /// Returns the number of its mount namespace. None if that can't be read.
    pub fn mount_namespace(self) -> Option<u64> {
        let namespace = fs::metadata(self.file("ns/mnt")).ok()?;
        Some(namespace.ino())
    }

    /// Whether it has a file of a file system open or mapped, runs from it, or has its working
    /// directory or root there.
    pub fn uses(self, device: Device) -> bool {
        let descriptors = fs::read_dir(self.file("fd"));
        let descriptors = descriptors.into_iter().flatten().flatten();
        ["cwd", "root", "exe"]
            .iter()
            .map(|link| self.file(link))
            .chain(descriptors.map(|descriptor| descriptor.path()))
            .any(|link| is_on(&link, device))
            || fs::read(self.file("maps")).is_ok_and(|maps| maps_device(&maps, device))
    }

    /// Returns the live FUSE connections that it serves, where the kernel tells. A connection whose
    /// mount is gone does not count: the next FUSE mount may have its number.
    pub fn fuse_connections(self) -> Vec<u32> {
        let infos = fs::read_dir(self.file("fdinfo"));
        let infos = infos.into_iter().flatten().flatten();
        let connections = infos.filter_map(|info| {
            let text = fs::read_to_string(info.path()).ok()?;
            let descriptor = info.file_name().to_str()?.parse().ok()?;
            Some((descriptor, text))
        });
        connections
            .flat_map(|(descriptor, text)| {
                let found: Vec<u32> = connection::numbers(&text).collect();
                let is_live = !found.is_empty() && !self.is_disconnected(descriptor);
                found.into_iter().filter(move |_| is_live)
            })
            .collect()
    }

    /// Whether the kernel has given up the FUSE connection of this descriptor. False where that is
    /// unknown.
    fn is_disconnected(self, descriptor: i32) -> bool {
        let taken = self.number().map(|pid| {
            let process = pidfd_open(pid, PidfdFlags::empty())?;
            pidfd_getfd(&process, descriptor, PidfdGetfdFlags::empty())
        });
        match taken {
            Some(Ok(requests)) => !connection::is_connected(&requests),
            _ => false,
        }
    }

    /// Opens a pidfd of it, which stays valid when its number is reused. None if it is gone.
    pub fn open(self) -> Option<OpenProcess> {
        Some(OpenProcess {
            process: self,
            pidfd: pidfd_open(self.number()?, PidfdFlags::empty()).ok()?,
        })
    }

    fn number(self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.0).ok()?)
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.command_line();
        let name = || fs::read(self.file("comm")).unwrap_or_default();
        let words = if line.is_empty() { name() } else { line };
        write!(f, "pid {} ({})", self.0, shown_command(&words))
    }
}

/// A process that can be waited for.
pub struct OpenProcess {
    process: Process,
    pidfd: OwnedFd,
}

impl OpenProcess {
    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for its end; returns whether it has ended.
    pub fn ends_within(&self, limit: Duration) -> bool {
        let mut process = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        poll(&mut process, limit.as_ref()).is_ok_and(|ended| ended > 0)
    }
}

/// Shows a command line, whose words end with NUL. A process chooses its own name, so control
/// characters are replaced.
fn shown_command(words: &[u8]) -> String {
    let words = String::from_utf8_lossy(words).replace('\0', " ");
    let mut shown: String = words.trim().chars().take(COMMAND).collect();
    if words.trim().chars().count() > COMMAND {
        shown.push('…');
    }
    shown
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// Whether a link of /proc leads to a file on a device. It asks no file system, since one may never
/// answer.
fn is_on(link: &Path, device: Device) -> bool {
    let looked = statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::empty());
    looked
        .is_ok_and(|file| (file.stx_dev_major, file.stx_dev_minor) == (device.major, device.minor))
}

/// Whether a file of a device is mapped: `7f00-7f10 r--p 00000000 00:33 2 /mnt/web/disk.img`, in
/// hexadecimal.
fn maps_device(maps: &[u8], device: Device) -> bool {
    let wanted = format!("{:02x}:{:02x}", device.major, device.minor);
    maps.split(|&byte| byte == b'\n')
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(3))
        .any(|field| field == wanted.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_short_and_without_orders_to_a_terminal() {
        assert_eq!(shown_command(b"sleep\x00600\x00"), "sleep 600");
        assert_eq!(shown_command(b"\x1b[2Jx\n"), "?[2Jx");
        let long = shown_command(&[b'a'; 100]);
        assert_eq!(long.chars().count(), COMMAND + 1);
    }

    #[test]
    fn a_mapped_file_is_told_by_its_device() {
        let maps =
            b"7f00-7f10 r--p 00000000 00:33 2    /mnt/web/disk.img\n7f20-7f30 rw-p 0 00:00 0\n";
        let device = |minor| Device { major: 0, minor };
        assert!(maps_device(maps, device(0x33)));
        assert!(!maps_device(maps, device(0x3)));
    }

    #[test]
    fn this_process_has_its_working_directory_open() {
        let here = fs::metadata(".").unwrap().dev();
        let device = Device {
            major: rustix::fs::major(here),
            minor: rustix::fs::minor(here),
        };
        assert!(Process::this().uses(device));
        let none = Device {
            major: 4095,
            minor: 1,
        };
        assert!(!Process::this().uses(none));
    }
}
