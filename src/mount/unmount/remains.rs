//! Waits for the process that served a mount, after the unmount.

use std::fmt;
use std::time::Duration;

use super::super::holders::{self, NamespaceMount};
use super::diagnose;
use crate::mountinfo::{Device, MountId};
use crate::process::observed::{OpenProcess, Process};

/// How long to wait for the end of a process without a message.
const MOMENT: Duration = Duration::from_secs(1);

/// How long to wait after the message: the process finishes its work, which takes ten seconds at
/// most.
const FAREWELL: Duration = Duration::from_secs(12);

/// A file system after one of its mounts was unmounted.
pub(super) struct Remains {
    device: Device,
    /// Its other mounts before that. Only these can still be its mounts: another file system may
    /// get the number of its device as soon as it is gone.
    before: Vec<NamespaceMount>,
    server: Option<Server>,
}

impl Remains {
    /// Records its other mounts and its server, while the mount that is to be unmounted still
    /// exists.
    pub fn of(mount: MountId) -> Remains {
        let device = mount.device;
        let server = Server::of(device);
        let mut before = holders::mounts_of(device);
        before.retain(|place| place.elsewhere.is_some() || place.id != mount);
        Remains {
            device,
            before,
            server,
        }
    }

    /// Waits until the process that served it has ended. Returns what prevents that, as a message.
    pub fn wait_for_the_end(&self, tell: impl Fn(&str)) -> Option<String> {
        let Some(server) = &self.server else {
            return self.other_mount();
        };
        if server.ends_within(Duration::ZERO) {
            return None;
        }
        // Another mount is seen at once. Open files are searched for once the process had a moment
        // to end.
        if let Some(held) = self.other_mount() {
            return Some(held);
        }
        if server.ends_within(MOMENT) {
            return None;
        }
        if let Some(held) = self.open_file() {
            return Some(held);
        }
        tell(&format!("waiting for {server}, which finishes its work"));
        if server.ends_within(FAREWELL) {
            return None;
        }
        let pid = server.0.pid();
        Some(self.open_file().unwrap_or_else(|| {
            format!(
                "{server} still runs: a process that this user can't see has files open, or work takes long; `kill {pid}` ends it"
            )
        }))
    }

    fn mounts_now(&self) -> (Vec<NamespaceMount>, Vec<NamespaceMount>) {
        holders::mounts_of(self.device)
            .into_iter()
            .partition(|now| self.before.iter().any(|before| before.is(now)))
    }

    fn other_mount(&self) -> Option<String> {
        let (left, _) = self.mounts_now();
        let held = diagnose::held_by_mount(left.first()?);
        Some(match &self.server {
            Some(server) => format!("{server} still serves it: {held}"),
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
        // The users are those of another file system, if one has the number of the device by now.
        let (_, others) = self.mounts_now();
        if !others.is_empty() || server.ends_within(Duration::ZERO) {
            return None;
        }
        Some(format!(
            "{server} still serves its open files, which are in use by {users}: close those"
        ))
    }
}

/// The process that serves a FUSE connection.
pub(super) struct Server(OpenProcess);

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boxlitefs (pid {})", self.0.pid())
    }
}

impl Server {
    /// Finds the process. Linux 6.16 and later name the connection in the fdinfo of an open
    /// /dev/fuse. On other kernels, and for processes of other users: None.
    pub fn of(device: Device) -> Option<Server> {
        let serves = |process: &Process| process.fuse_connections().contains(&device.minor);
        let process = Process::all().into_iter().find(serves)?;
        process.open().map(Server)
    }

    /// Waits for its end; returns whether it has ended.
    pub fn ends_within(&self, limit: Duration) -> bool {
        self.0.ends_within(limit)
    }
}
