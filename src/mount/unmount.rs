//! `boxlitefs unmount`: finds the mount that is meant, unmounts it, and says whether that was all of it.

use std::fmt;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::holders::{self, Place, Process};
use super::mountinfo::{Device, Entry, Table};
use super::{attach, detach, resolve};
use crate::{Context, Error, Result};

/// How long a process that ends is waited for without a word about it.
const MOMENT: Duration = Duration::from_secs(1);

/// How long a process that was killed may take to be gone.
const KILLED: Duration = Duration::from_millis(200);

/// How long it is waited for in all: it finishes what is under way, ten seconds at most.
const FAREWELL: Duration = Duration::from_secs(12);

/// How far an unmount came.
#[derive(Debug)]
pub enum Unmounted {
    /// The mount is gone, and so is the process that served it, as far as that can be seen.
    Entirely,
    /// The mount is gone, but what was mounted is still served: the message says what has it.
    OnlyHere(Error),
}

/// Unmounts a mount of boxlitefs, and waits until the process that served it is gone, where the kernel
/// tells which process that is. `tell` is told what is waited for.
///
/// # Errors
/// EINVAL when it is no mount of boxlitefs, EBUSY when it is in use or another mount is on it, EPERM when
/// it is another user's. Nothing was unmounted then.
pub fn unmount(mountpoint: &Path, tell: impl Fn(&str)) -> Result<Unmounted> {
    let shown = mountpoint.display();
    let path = resolve(mountpoint).context(|| format!("cannot reach {shown}"))?;
    let entry = target(mountpoint, &path, &Table::own()?)?;
    let device = entry.id.device;
    let server = Server::of(device);
    let mut before = holders::mounts_of(device);
    before.retain(|place| place.elsewhere.is_some() || place.id != entry.id);
    detach::remove_idle(entry.id, || true).map_err(|error| match error.errno() {
        libc::EBUSY if detach::is_free(entry.id) => in_use(mountpoint, &entry),
        _ => error,
    })?;
    let remains = Remains {
        device,
        before,
        server,
    };
    let held = remains.wait_for_the_end(&tell);
    Ok(held.map_or(Unmounted::Entirely, |message| {
        Unmounted::OnlyHere(Error::busy(format!(
            "{shown} is unmounted here, but {message}"
        )))
    }))
}

/// Unmounts a mount of boxlitefs whose process was killed, also where it is in use: nobody serves it. Does
/// nothing where there is no such mount.
///
/// # Errors
/// EACCES when it is another user's, and it can't be seen whether it is served; EBUSY when another mount is
/// in the way.
pub fn remove_dead(mountpoint: &Path) -> Result<()> {
    let shown = mountpoint.display();
    let path = resolve(mountpoint).context(|| format!("cannot reach {shown}"))?;
    let table = Table::own()?;
    let Some(entry) = table.at(&path).filter(|entry| entry.is_ours()) else {
        return Ok(());
    };
    // What is asked may not answer; a process that can be seen needs no asking. One that was just killed
    // has a moment to be gone.
    let server = Server::of(entry.id.device);
    let is_served = server.is_some_and(|server| !server.ends_within(KILLED));
    if is_served || !detach::is_dead(&path)? {
        return Ok(());
    }
    detach::remove_lazily(entry.id, || detach::is_dead(&path).unwrap_or(false))
}

/// The mount of boxlitefs on a path.
fn target(mountpoint: &Path, path: &Path, table: &Table) -> Result<Entry> {
    let shown = mountpoint.display();
    let message = match table.at(path) {
        Some(entry) if entry.is_ours() => return Ok(entry.clone()),
        Some(entry) => format!(
            "{shown} is a mount of {}, not of boxlitefs: unmount it with umount",
            entry.fstype
        ),
        None => none_there(mountpoint, path, table),
    };
    Err(Error::new(libc::EINVAL, message))
}

/// Why there is nothing to unmount on a path, and which mount may have been meant.
fn none_there(mountpoint: &Path, path: &Path, table: &Table) -> String {
    let shown = mountpoint.display();
    if let Some(around) = table.around(path).filter(|around| around.is_ours()) {
        let place = around.mountpoint.display();
        return format!(
            "{shown} is in the mount on {place}, and not a mount itself: unmount it with `boxlitefs unmount {place}`"
        );
    }
    let is_home = |entry: &&Entry| entry.is_ours() && entry.source == path;
    if let Some(mount) = table.entries().find(is_home) {
        let place = mount.mountpoint.display();
        return format!(
            "{shown} is a BoxLite home; it is mounted on {place}: unmount it with `boxlitefs unmount {place}`"
        );
    }
    still_served(path, table).unwrap_or_else(|| {
        format!(
            "nothing is mounted on {shown}: `findmnt -t fuse.boxlite` lists the mounts of boxlitefs"
        )
    })
}

/// A mount that was made on a path and is not there any more, but is still served to somebody.
fn still_served(path: &Path, table: &Table) -> Option<String> {
    let is_mounted = |device| table.of_device(device).next().is_some();
    holders::processes().into_iter().find_map(|pid| {
        let device = connections_of(pid)
            .into_iter()
            .map(|minor| Device { major: 0, minor })
            .find(|device| !is_mounted(*device))?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = line.split(|&byte| byte == 0);
        words.find(|word| *word == path.as_os_str().as_bytes())?;
        let shown = path.display();
        let held = match holders::mounts_of(device).first() {
            Some(place) => held_by_mount(place),
            None => format!(
                "{} has something of it open; close that",
                holders::users_of(device, None)?
            ),
        };
        Some(format!(
            "nothing is mounted on {shown} any more, but boxlitefs (pid {pid}) goes on serving what was: {held}"
        ))
    })
}

/// What to do about another mount of what was unmounted.
fn held_by_mount(place: &Place) -> String {
    let shown = place.mountpoint.display();
    match place.elsewhere {
        None => {
            format!("it is also mounted on {shown}; unmount that with `boxlitefs unmount {shown}`")
        }
        Some(holder) => {
            let Process(pid) = holder;
            format!(
                "{holder} has it on {shown} in another mount namespace; end that process, or as root `nsenter --mount --target {pid} umount {shown}`"
            )
        }
    }
}

fn in_use(mountpoint: &Path, entry: &Entry) -> Error {
    let shown = mountpoint.display();
    Error::busy(
        match holders::users_of(entry.id.device, Some(&entry.mountpoint)) {
            Some(users) => format!(
                "{shown} is in use by {users}: close what has files open or its working directory there, then try again"
            ),
            None => format!(
                "{shown} is in use by what this user can't see: close what has files open or its working directory there (as root, `fuser -vm {shown}` lists it), then try again"
            ),
        },
    )
}

/// What may be left of a file system after one of its mounts was unmounted.
struct Remains {
    device: Device,
    /// All its other mounts before that. Only one of these can be one of its mounts now: the number of its
    /// device may be another file system's as soon as it is gone.
    before: Vec<Place>,
    server: Option<Server>,
}

impl Remains {
    /// Waits until the process that served it has ended. Returns what keeps it from that.
    fn wait_for_the_end(&self, tell: impl Fn(&str)) -> Option<String> {
        let Some(server) = &self.server else {
            return self.other_mount();
        };
        if server.ends_within(Duration::ZERO) {
            return None;
        }
        // Another mount shows at once. What is open is looked for when the process had its moment to end.
        if let Some(held) = self.other_mount() {
            return Some(held);
        }
        if server.ends_within(MOMENT) {
            return None;
        }
        if let Some(held) = self.open_file() {
            return Some(held);
        }
        tell(&format!(
            "waiting for {server}, which finishes what is under way"
        ));
        if server.ends_within(FAREWELL) {
            return None;
        }
        let Process(pid) = server.process;
        Some(self.open_file().unwrap_or_else(|| {
            format!(
                "{server} goes on: something that this user can't see has files of it open, or work takes long; `kill {pid}` ends it"
            )
        }))
    }

    fn mounts_now(&self) -> (Vec<Place>, Vec<Place>) {
        holders::mounts_of(self.device)
            .into_iter()
            .partition(|now| self.before.iter().any(|before| before.is(now)))
    }

    fn other_mount(&self) -> Option<String> {
        let (left, _) = self.mounts_now();
        let held = held_by_mount(left.first()?);
        Some(match &self.server {
            Some(server) => format!("{server} goes on serving it: {held}"),
            None => format!("it is still served: {held}"),
        })
    }

    fn open_file(&self) -> Option<String> {
        let server = self.server.as_ref()?;
        let (left, others) = self.mounts_now();
        if !left.is_empty() || !others.is_empty() {
            return self.other_mount();
        }
        let users = holders::users_of(self.device, None)?;
        // What was found is of another file system, if one has the number of the device by now.
        let (_, others) = self.mounts_now();
        if !others.is_empty() || server.ends_within(Duration::ZERO) {
            return None;
        }
        Some(format!(
            "{server} goes on serving what is still open of it, by {users}: close that"
        ))
    }
}

/// The FUSE connections that a process serves, where the kernel tells. A connection whose mount is gone is
/// none: the next mount of anybody may have its number.
fn connections_of(pid: u32) -> Vec<u32> {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    let infos = infos.into_iter().flatten().flatten();
    let connections = infos.filter_map(|info| {
        let text = fs::read_to_string(info.path()).ok()?;
        let descriptor = info.file_name().to_str()?.parse().ok()?;
        Some((descriptor, text))
    });
    connections
        .flat_map(|(descriptor, text)| {
            let found: Vec<u32> = attach::connections(&text).collect();
            let is_live = !found.is_empty() && !is_disconnected(pid, descriptor);
            found.into_iter().filter(move |_| is_live)
        })
        .collect()
}

/// Whether the kernel has given up the FUSE connection that this is a descriptor of, in another process.
/// False where it can't be told.
fn is_disconnected(pid: u32, descriptor: i32) -> bool {
    let taken = i32::try_from(pid).ok().and_then(Pid::from_raw).map(|pid| {
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        pidfd_getfd(&process, descriptor, PidfdGetfdFlags::empty())
    });
    match taken {
        Some(Ok(requests)) => !detach::is_connected(&requests),
        _ => false,
    }
}

/// The process that serves a FUSE connection.
struct Server {
    process: Process,
    handle: OwnedFd,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Process(pid) = self.process;
        write!(f, "boxlitefs (pid {pid})")
    }
}

impl Server {
    /// Linux 6.16 and later name the connection in the fdinfo of an open /dev/fuse; elsewhere, and for
    /// processes of others: None.
    fn of(device: Device) -> Option<Server> {
        let serves = |pid: &u32| connections_of(*pid).contains(&device.minor);
        let pid = holders::processes().into_iter().find(serves)?;
        let number = Pid::from_raw(i32::try_from(pid).ok()?)?;
        Some(Server {
            process: Process(pid),
            handle: pidfd_open(number, PidfdFlags::empty()).ok()?,
        })
    }

    /// Waits for its end.
    fn ends_within(&self, limit: Duration) -> bool {
        let mut process = [PollFd::new(&self.handle, PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        poll(&mut process, limit.as_ref()).is_ok_and(|ended| ended > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_mount_of_boxlitefs_is_not_unmounted() {
        let unmount = |place: &Path| super::unmount(place, |_| ()).unwrap_err();
        let place = tempfile::tempdir().unwrap();
        let error = unmount(place.path());
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.message().contains("nothing is mounted"));
        let error = unmount(Path::new("/proc"));
        assert!(error.message().contains("a mount of proc"));
        let error = unmount(&place.path().join("none"));
        assert_eq!(error.errno(), libc::ENOENT);
    }

    #[test]
    fn a_mount_that_is_none_of_boxlitefs_is_never_taken_for_a_dead_one() {
        let place = tempfile::tempdir().unwrap();
        remove_dead(place.path()).unwrap();
        remove_dead(Path::new("/proc")).unwrap();
        assert!(Path::new("/proc/self").exists());
    }
}
