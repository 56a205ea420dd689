//! Putting a mount into the kernel's table, and finding out which one it is.
//!
//! The FUSE library could mount by itself. But it also unmounts by itself, by path, when its session
//! ends, and on that path may be another mount by then. So it gets the device of a mount that is made
//! here, and never learns a path.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{getgid, getuid};

use super::detach::{self, OwnMount, fusermount_program};
use super::mountinfo::{Entry, Table};
use super::{MountPaths, Options, validate};
use crate::{Context, Error, Result};

/// How long another process that mounts on the same directory is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is in front of the number of the connection, in what the kernel says of an open /dev/fuse.
const CONNECTION: &str = "fuse_connection:";

/// A mount that this process made. Dropped, it is taken away, if it is still there: it, and no other that
/// is on the same path by then.
pub(super) struct Attached {
    own: OwnMount,
}

impl Attached {
    /// Which mount it is.
    pub fn own(&self) -> &OwnMount {
        &self.own
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Err(error) = detach::remove_remains(&self.own) {
            log::error!("a mount that nobody serves is left: {error}");
        }
    }
}

/// Mounts on the mountpoint. Returns the mount, and the descriptor of /dev/fuse on which the kernel sends
/// requests.
///
/// # Errors
/// EBUSY when a FUSE file system is mounted there, EPERM when mounting is not permitted, else what the
/// kernel or fusermount3 says.
pub(super) fn attach(paths: &MountPaths, options: &Options) -> Result<(Attached, OwnedFd)> {
    let shown = paths.mountpoint.display();
    let _turn = take_turn(&paths.mountpoint);
    // Somebody else may have mounted since it was asked first.
    validate::check_uncovered(&paths.mountpoint)?;
    let message = || format!("cannot mount at {shown}");
    let mode = fs::metadata(&paths.mountpoint).context(message)?.mode();
    let requests = match mount_directly(paths, options, mode) {
        // Who is not root mounts through fusermount3, which is setuid.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            mount_by_fusermount(paths, options)?
        }
        mounted => mounted.context(message)?,
    };
    let requests = Arc::new(requests);
    let table = Table::own()?;
    // No mount of ours was there before. The ids of earlier mounts are no help: the kernel reuses them.
    let is_it = |entry: &&Entry| entry.is_ours() && entry.mountpoint == paths.mountpoint;
    let connection = connection_of(&requests);
    let entry = table
        .entries()
        .filter(is_it)
        .rfind(|entry| connection.is_none_or(|minor| entry.id.device.minor == minor));
    let Some(entry) = entry else {
        let message = format!("{shown} was unmounted by somebody else as soon as it was mounted");
        return Err(Error::new(libc::ENOTCONN, message));
    };
    let attached = Attached {
        own: OwnMount::new(entry.id, requests.clone()),
    };
    let for_session = requests.try_clone().context(message)?;
    Ok((attached, for_session))
}

/// Waits until no other boxlitefs is about to mount on the same directory: without that, two that see a
/// free mountpoint both mount, and one hides the other. The turn is over when the file is dropped. Without
/// a lock (another program has it, or the file system has none) it goes on all the same.
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

/// By mount(2). It says EPERM to who is not root.
fn mount_directly(paths: &MountPaths, options: &Options, mode: u32) -> io::Result<OwnedFd> {
    let requests = File::options().read(true).write(true).open("/dev/fuse")?;
    let mut data = format!(
        "fd={},rootmode={mode:o},user_id={},group_id={},subtype=boxlite",
        requests.as_raw_fd(),
        getuid().as_raw(),
        getgid().as_raw()
    );
    for option in access(options) {
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
    // Whatever is asked for: guests and archives come from anywhere.
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, options.read_only);
    flags.set(MountFlags::NOEXEC, options.noexec);
    flags.set(MountFlags::NOATIME, options.noatime);
    flags
}

/// Who gets in. Where others do, the kernel has to go by the modes: else they may read all that guests have.
fn access(options: &Options) -> &'static [&'static str] {
    // The kernel knows no allow_root: fuser lets in root and the owner alone.
    match options.allow_other || options.allow_root {
        true => &["default_permissions", "allow_other"],
        false => &[],
    }
}

/// Through fusermount3, which sends the descriptor back on the socket that is its standard input.
fn mount_by_fusermount(paths: &MountPaths, options: &Options) -> Result<OwnedFd> {
    let message = || "cannot run fusermount3, which mounts for those who are not root: install the package fuse3";
    let (ours, its) = UnixStream::pair().context(|| "cannot make a socket")?;
    let mut fusermount = Command::new(fusermount_program())
        .arg("-o")
        .arg(fusermount_options(paths.home.as_os_str(), options))
        .arg("--")
        .arg(&paths.mountpoint)
        .env("_FUSE_COMMFD", "0")
        .env("LC_ALL", "C")
        .stdin(Stdio::from(OwnedFd::from(its)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context(message)?;
    let received = receive(&ours);
    let mut said = String::new();
    if let Some(stderr) = &mut fusermount.stderr {
        // It is told as far as it can be read.
        let _ = stderr.read_to_string(&mut said);
    }
    fusermount.wait().context(message)?;
    received.map_err(|error| {
        let errno = match said.to_lowercase() {
            said if said.contains("not permitted") || said.contains("denied") => libc::EPERM,
            said if said.contains("no write access") => libc::EACCES,
            _ => libc::EIO,
        };
        let why = match said.trim() {
            "" => error.to_string(),
            said => said.to_owned(),
        };
        let shown = paths.mountpoint.display();
        Error::new(errno, format!("cannot mount at {shown}: {why}"))
    })
}

/// fusermount3 takes the options as one string: commas would end the name of the source, and it undoes
/// these backslashes.
fn fusermount_options(home: &OsStr, options: &Options) -> String {
    let source = home.to_string_lossy();
    let source = source.replace('\\', "\\\\").replace(',', "\\,");
    let mut text = format!("fsname={source},subtype=boxlite,nosuid,nodev");
    for (is_wanted, option) in [
        (options.read_only, "ro"),
        (options.noexec, "noexec"),
        (options.noatime, "noatime"),
    ] {
        if is_wanted {
            text = text + "," + option;
        }
    }
    for option in access(options) {
        text = text + "," + option;
    }
    text
}

/// The descriptor that fusermount3 sends.
fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    loop {
        match recvmsg(socket, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            result => {
                result?;
                break;
            }
        }
    }
    let rights = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    rights.ok_or_else(|| io::Error::other("fusermount3 ended without a word"))
}

/// The number of the connection, which is that of its device, where the kernel tells (Linux 6.16).
fn connection_of(requests: &OwnedFd) -> Option<u32> {
    let number = requests.as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    connections(&info).next()
}

/// The connections that the kernel's text on a descriptor speaks of.
pub(super) fn connections(fdinfo: &str) -> impl Iterator<Item = u32> {
    fdinfo
        .lines()
        .filter_map(|line| line.strip_prefix(CONNECTION)?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_the_home_does_not_end_the_source_name_for_fusermount() {
        let options = fusermount_options(OsStr::new(r"/a,allow_other\b"), &Options::default());
        assert_eq!(
            options,
            r"fsname=/a\,allow_other\\b,subtype=boxlite,nosuid,nodev"
        );
    }

    #[test]
    fn the_connection_of_a_descriptor_is_told_by_its_number_alone() {
        let connection = |text| connections(text).next();
        assert_eq!(
            connection("pos:\t0\nflags:\t0100002\nfuse_connection:\t51\n"),
            Some(51)
        );
        assert_eq!(connection("pos:\t51\n"), None);
    }
}
