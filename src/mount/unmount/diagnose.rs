//! Finds the mount that an unmount means, and explains why it can't be unmounted: messages that say
//! what to do.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::super::holders::{self, NamespaceMount};
use crate::mountinfo::{Device, MountEntry, MountTable};
use crate::process::observed::Process;
use crate::{Error, Result};

/// Finds the mount of boxlitefs on a path.
///
/// # Errors
/// EINVAL when there is none, with the mount that may have been meant.
pub(super) fn target(mountpoint: &Path, path: &Path, table: &MountTable) -> Result<MountEntry> {
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

/// Explains why there is nothing to unmount on a path, and which mount may have been meant.
fn none_there(mountpoint: &Path, path: &Path, table: &MountTable) -> String {
    let shown = mountpoint.display();
    if let Some(around) = table.around(path).filter(|around| around.is_ours()) {
        let place = around.mountpoint.display();
        return format!(
            "{shown} is inside the mount on {place}, and not a mount itself: unmount that with `boxlitefs unmount {place}`"
        );
    }
    let is_home = |entry: &&MountEntry| entry.is_ours() && entry.source == path;
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

/// Looks for a mount that was made on a path and is gone from there, but is still served elsewhere.
fn still_served(path: &Path, table: &MountTable) -> Option<String> {
    let is_mounted = |device| table.of_device(device).next().is_some();
    Process::all().into_iter().find_map(|process| {
        let pid = process.pid();
        let device = process
            .fuse_connections()
            .into_iter()
            .map(|minor| Device { major: 0, minor })
            .find(|device| !is_mounted(*device))?;
        let line = process.command_line();
        let mut words = line.split(|&byte| byte == 0);
        words.find(|word| *word == path.as_os_str().as_bytes())?;
        let shown = path.display();
        let held = match holders::mounts_of(device).first() {
            Some(place) => held_by_mount(place),
            None => format!(
                "{} has files of it open; close those",
                holders::users_of(device, None)?
            ),
        };
        Some(format!(
            "nothing is mounted on {shown} any more, but boxlitefs (pid {pid}) still serves what was: {held}"
        ))
    })
}

/// Says what to do about another mount of the same file system.
pub(super) fn held_by_mount(place: &NamespaceMount) -> String {
    let shown = place.mountpoint.display();
    match place.elsewhere {
        None => {
            format!("it is also mounted on {shown}; unmount that with `boxlitefs unmount {shown}`")
        }
        Some(holder) => {
            let pid = holder.pid();
            format!(
                "{holder} has it on {shown} in another mount namespace; end that process, or as root `nsenter --mount --target {pid} umount {shown}`"
            )
        }
    }
}

/// The error for a mount that is in use, with its users.
pub(super) fn in_use(mountpoint: &Path, entry: &MountEntry) -> Error {
    let shown = mountpoint.display();
    Error::busy(
        match holders::users_of(entry.id.device, Some(&entry.mountpoint)) {
            Some(users) => format!(
                "{shown} is in use by {users}: close what has files open or its working directory there, then try again"
            ),
            None => format!(
                "{shown} is in use by a process that this user can't see: close what has files open or its working directory there (as root, `fuser -vm {shown}` lists it), then try again"
            ),
        },
    )
}
