//! What keeps a file system of ours from ending: processes that have something of it open, loop devices, and
//! mounts of it in other places and other mount namespaces. What another user's processes have can only be
//! seen by root.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::mountinfo::{Device, MountId, Table};

/// How many holders a message names.
const NAMED: usize = 3;

/// How much of a command line a message has, in characters.
const COMMAND: usize = 60;

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process(pub u32);

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Process(pid) = self;
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let name = || fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        let words = if line.is_empty() { name() } else { line };
        write!(f, "pid {pid} ({})", shown_command(&words))
    }
}

/// A command line, whose words end with NUL, for people: a process names itself as it likes.
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

/// A mount of a file system, in some mount namespace.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Which mount it is.
    pub id: MountId,
    /// Where it is, as the processes of its namespace see it.
    pub mountpoint: PathBuf,
    /// A process of another mount namespace that has it; None where it is in this one.
    pub elsewhere: Option<Process>,
    /// The number of its mount namespace.
    namespace: u64,
}

impl Place {
    /// Whether this is the same mount, seen at another time.
    pub fn is(&self, other: &Place) -> bool {
        (self.id, self.namespace) == (other.id, other.namespace)
    }
}

/// All mounts of a file system of boxlitefs, in this mount namespace and in those of all processes that
/// can be seen.
pub(super) fn mounts_of(device: Device) -> Vec<Place> {
    let mut places = Vec::new();
    let own = std::process::id();
    let own_namespace = namespace_of(own);
    let mut seen = HashSet::new();
    for pid in std::iter::once(own).chain(processes()) {
        let Some(namespace) = namespace_of(pid).filter(|namespace| seen.insert(*namespace)) else {
            continue;
        };
        // A process that ended meanwhile, or another user's, says nothing.
        let Ok(table) = Table::of_process(pid) else {
            continue;
        };
        let is_elsewhere = Some(namespace) != own_namespace;
        let of_it = table.of_device(device).filter(|entry| entry.is_ours());
        places.extend(of_it.map(|entry| Place {
            id: entry.id,
            mountpoint: entry.mountpoint.clone(),
            elsewhere: is_elsewhere.then_some(Process(pid)),
            namespace,
        }));
    }
    places
}

/// What has something of a file system open, or its working directory there, as a message names it. None
/// where nothing can be seen.
pub(super) fn users_of(device: Device, mountpoint: Option<&Path>) -> Option<String> {
    let own = std::process::id();
    let mut names: Vec<String> = processes()
        .into_iter()
        .filter(|pid| *pid != own && uses(*pid, device))
        .map(|pid| Process(pid).to_string())
        .take(NAMED + 1)
        .collect();
    if let Some(mountpoint) = mountpoint {
        names.extend(loop_devices_on(mountpoint));
    }
    if names.is_empty() && uses(own, device) {
        names.push(
            "what this command was started with (its working directory or an open file)".to_owned(),
        );
    }
    let more = if names.len() > NAMED {
        " and others"
    } else {
        ""
    };
    names.truncate(NAMED);
    (!names.is_empty()).then(|| names.join(", ") + more)
}

fn uses(pid: u32, device: Device) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let descriptors = fs::read_dir(process.join("fd"));
    let descriptors = descriptors.into_iter().flatten().flatten();
    ["cwd", "root", "exe"]
        .iter()
        .map(|link| process.join(link))
        .chain(descriptors.map(|descriptor| descriptor.path()))
        .any(|link| is_on(&link, device))
        || fs::read(process.join("maps")).is_ok_and(|maps| maps_device(&maps, device))
}

/// Whether what a link of /proc leads to is on a device. Asks no file system: one may have no answer.
fn is_on(link: &Path, device: Device) -> bool {
    let looked = statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::empty());
    looked
        .is_ok_and(|file| (file.stx_dev_major, file.stx_dev_minor) == (device.major, device.minor))
}

/// Whether a file of a device is mapped: `7f00-7f10 r--p 00000000 00:33 2 /mnt/web/disk.img`, in hexadecimal.
fn maps_device(maps: &[u8], device: Device) -> bool {
    let wanted = format!("{:02x}:{:02x}", device.major, device.minor);
    maps.split(|&byte| byte == b'\n')
        .filter_map(|line| line.split(|&byte| byte == b' ').nth(3))
        .any(|field| field == wanted.as_bytes())
}

/// Loop devices on files of a mount: the kernel has those open, and no process.
fn loop_devices_on(mountpoint: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let is_on_it = |device: &fs::DirEntry| {
        let file = fs::read_to_string(device.path().join("loop/backing_file"));
        file.is_ok_and(|file| Path::new(file.trim_end()).starts_with(mountpoint))
    };
    devices
        .filter(is_on_it)
        .map(|device| format!("/dev/{}", device.file_name().to_string_lossy()))
        .collect()
}

/// All processes, the oldest numbers first.
pub(super) fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

fn namespace_of(pid: u32) -> Option<u64> {
    let namespace = fs::metadata(format!("/proc/{pid}/ns/mnt")).ok()?;
    Some(namespace.ino())
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
        assert!(uses(std::process::id(), device));
        let none = Device {
            major: 4095,
            minor: 1,
        };
        assert!(!uses(std::process::id(), none));
    }
}
