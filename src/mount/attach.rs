//! Mounts, and finds out which mount of the kernel's table that is.
//!
//! The FUSE library could mount by itself. But it also unmounts by itself, by path, when its
//! session ends, and another mount may be on that path by then. So it gets the descriptor of a
//! mount that is made here, and never learns a path.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{getgid, getuid};

use super::detach::{self, OwnMount};
use super::{MountPaths, Options, fusermount, validate};
use crate::mountinfo::{MountEntry, MountTable};
use crate::process::connection;
use crate::{Context, Error, Result};

/// How long to wait for another process that mounts on the same directory.
const PATIENCE: Duration = Duration::from_secs(5);

/// A mount that this process made. Dropping it unmounts it if it is still there, and never another
/// mount that is on the same path by then.
pub(super) struct MountGuard {
    own: OwnMount,
}

impl MountGuard {
    /// The mount that was made.
    pub fn own(&self) -> &OwnMount {
        &self.own
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        if let Err(error) = detach::remove_remains(&self.own) {
            log::error!("a dead mount is left: {error}");
        }
    }
}

/// Mounts on the mountpoint. Returns the mount, and the descriptor of /dev/fuse on which the kernel
/// sends requests.
///
/// # Errors
/// EBUSY when a FUSE file system is mounted there, EPERM when mounting is not permitted, else what
/// the kernel or fusermount3 says.
pub(super) fn attach(paths: &MountPaths, options: &Options) -> Result<(MountGuard, OwnedFd)> {
    let shown = paths.mountpoint.display();
    let _turn = take_turn(&paths.mountpoint);
    // Another process may have mounted since the first check.
    validate::check_uncovered(&paths.mountpoint)?;
    let message = || format!("cannot mount at {shown}");
    let mode = fs::metadata(&paths.mountpoint).context(message)?.mode();
    let requests = match mount_directly(paths, options, mode) {
        // Other users than root mount through fusermount3, which is setuid.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            fusermount::mount(paths, options)?
        }
        mounted => mounted.context(message)?,
    };
    let requests = Arc::new(requests);
    let table = MountTable::own()?;
    // No mount of ours was there before. The ids of earlier mounts don't help: the kernel reuses
    // them.
    let is_it = |entry: &&MountEntry| entry.is_ours() && entry.mountpoint == paths.mountpoint;
    let connection = connection::number_of(&requests);
    let entry = table
        .entries()
        .filter(is_it)
        .rfind(|entry| connection.is_none_or(|minor| entry.id.device.minor == minor));
    let Some(entry) = entry else {
        let message = format!("{shown} was unmounted by another process as soon as it was mounted");
        return Err(Error::new(libc::ENOTCONN, message));
    };
    let attached = MountGuard {
        own: OwnMount::new(entry, requests.clone()),
    };
    let for_session = requests.try_clone().context(message)?;
    Ok((attached, for_session))
}

/// Waits until no other boxlitefs is about to mount on the same directory. Otherwise two processes
/// that see a free mountpoint both mount, and one hides the other. The turn ends when the file is
/// dropped. Where the lock is unavailable (another program has it, or the file system has none),
/// mounting continues without it.
fn take_turn(mountpoint: &Path) -> Option<File> {
    let directory = File::open(mountpoint).ok()?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) => thread::sleep(Duration::from_millis(5)),
            Err(_) => return None,
        }
    }
    None
}

/// Mounts with mount(2), which says EPERM to other users than root.
fn mount_directly(paths: &MountPaths, options: &Options, mode: u32) -> io::Result<OwnedFd> {
    let requests = File::options().read(true).write(true).open("/dev/fuse")?;
    let mut data = format!(
        "fd={},rootmode={mode:o},user_id={},group_id={},subtype=boxlite",
        requests.as_raw_fd(),
        getuid().as_raw(),
        getgid().as_raw()
    );
    for option in options.access_options() {
        data = data + "," + option;
    }
    let data = CString::new(data)?;
    mount(
        &paths.home,
        &paths.mountpoint,
        "fuse",
        flags(options),
        data.as_c_str(),
    )?;
    Ok(requests.into())
}

fn flags(options: &Options) -> MountFlags {
    // Always, whatever the options are: guests and archives come from anywhere.
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, options.read_only);
    flags.set(MountFlags::NOEXEC, options.noexec);
    flags.set(MountFlags::NOATIME, options.noatime);
    flags
}
