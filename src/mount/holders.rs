//! Finds what keeps a file system of ours in use: processes that have files of it open, loop
//! devices, and mounts of it in other places and other mount namespaces. Only root sees what
//! processes of other users have.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::mountinfo::{Device, MountId, MountTable};
use crate::process::observed::Process;

/// How many holders a message names.
const NAMED: usize = 3;

/// A mount of a file system, in some mount namespace.
#[derive(Clone, Debug)]
pub(super) struct NamespaceMount {
    /// The identity of the mount.
    pub id: MountId,
    /// Where it is, as the processes of its namespace see it.
    pub mountpoint: PathBuf,
    /// A process of the other mount namespace that has it; None if it is in this one.
    pub elsewhere: Option<Process>,
    /// The number of its mount namespace.
    namespace: u64,
}

impl NamespaceMount {
    /// Whether both are the same mount, seen at different times.
    pub fn is(&self, other: &NamespaceMount) -> bool {
        (self.id, self.namespace) == (other.id, other.namespace)
    }
}

/// Returns all mounts of a file system of boxlitefs, in this mount namespace and in those of all
/// processes that can be seen.
pub(super) fn mounts_of(device: Device) -> Vec<NamespaceMount> {
    let mut places = Vec::new();
    let own = Process::this();
    let own_namespace = own.mount_namespace();
    let mut seen = HashSet::new();
    for process in std::iter::once(own).chain(Process::all()) {
        let namespace = process.mount_namespace();
        let Some(namespace) = namespace.filter(|namespace| seen.insert(*namespace)) else {
            continue;
        };
        // A process that ended meanwhile, or another user's, can't be read.
        let Ok(table) = MountTable::of_process(process.pid()) else {
            continue;
        };
        let is_elsewhere = Some(namespace) != own_namespace;
        let of_it = table.of_device(device).filter(|entry| entry.is_ours());
        places.extend(of_it.map(|entry| NamespaceMount {
            id: entry.id,
            mountpoint: entry.mountpoint.clone(),
            elsewhere: is_elsewhere.then_some(process),
            namespace,
        }));
    }
    places
}

/// Names, for a message, what has files of a file system open or its working directory there. None
/// if nothing can be seen.
pub(super) fn users_of(device: Device, mountpoint: Option<&Path>) -> Option<String> {
    let own = Process::this();
    let mut names: Vec<String> = Process::all()
        .into_iter()
        .filter(|process| *process != own && process.uses(device))
        .map(|process| process.to_string())
        .take(NAMED + 1)
        .collect();
    if let Some(mountpoint) = mountpoint {
        names.extend(loop_devices_on(mountpoint));
    }
    if names.is_empty() && own.uses(device) {
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

/// Returns loop devices on files of a mount. The kernel has those files open, and no process.
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
