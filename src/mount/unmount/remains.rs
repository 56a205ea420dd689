//! Waiting for the process that served a mount, once that is unmounted.

use std::fmt;
use std::time::Duration;

use super::super::holders::{self, NamespaceMount};
use super::super::process::{OpenProcess, Process};
use super::diagnose;
use crate::mountinfo::{Device, MountId};

/// How long a process that ends is waited for without a word about it.
const MOMENT: Duration = Duration::from_secs(1);

/// How long it is waited for in all: it finishes what is under way, ten seconds at most.
const FAREWELL: Duration = Duration::from_secs(12);

/// What may be left of a file system after one of its mounts was unmounted.
pub(super) struct Remains {
    device: Device,
    /// All its other mounts before that. Only one of these can be one of its mounts now: the number of its
    /// device may be another file system's as soon as it is gone.
    before: Vec<NamespaceMount>,
    server: Option<Server>,
}

impl Remains {
    /// What there is of it while the mount that is to be unmounted is still there.
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

    /// Waits until the process that served it has ended. Returns what keeps it from that.
    pub fn wait_for_the_end(&self, tell: impl Fn(&str)) -> Option<String> {
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
        let pid = server.0.pid();
        Some(self.open_file().unwrap_or_else(|| {
            format!(
                "{server} goes on: something that this user can't see has files of it open, or work takes long; `kill {pid}` ends it"
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

/// The process that serves a FUSE connection.
pub(super) struct Server(OpenProcess);

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boxlitefs (pid {})", self.0.pid())
    }
}

impl Server {
    /// Linux 6.16 and later name the connection in the fdinfo of an open /dev/fuse; elsewhere, and for
    /// processes of others: None.
    pub fn of(device: Device) -> Option<Server> {
        let serves = |process: &Process| process.fuse_connections().contains(&device.minor);
        let process = Process::all().into_iter().find(serves)?;
        process.open().map(Server)
    }

    /// Waits for its end.
    pub fn ends_within(&self, limit: Duration) -> bool {
        self.0.ends_within(limit)
    }
}
