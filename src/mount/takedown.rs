//! Unmounting: by umount2 where that is permitted, else through fusermount3.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{mountinfo, resolve};
use crate::{Context, Error, Result};

/// How long an unmount waits for the process that served the mount to end.
const FAREWELL: Duration = Duration::from_secs(10);

/// Unmounts a mount of boxlitefs, and waits until the process that served it is gone (ten seconds
/// at most, and only where the kernel tells which process that is).
///
/// # Errors
/// EINVAL when it is no mount of boxlitefs, EBUSY when it is in use, EPERM when it is another
/// user's.
pub fn unmount(mountpoint: &Path) -> Result<()> {
    let shown = mountpoint.display();
    let path = resolve(mountpoint).context(|| format!("cannot reach {shown}"))?;
    let connection = match mountinfo::at(&path)? {
        Some(entry) if entry.is_ours() => entry.minor,
        Some(entry) => {
            return Err(Error::new(
                libc::EINVAL,
                format!(
                    "{shown} is a mount of {}, not of boxlitefs: unmount it with umount",
                    entry.fstype
                ),
            ));
        }
        None => {
            return Err(Error::new(
                libc::EINVAL,
                format!(
                    "nothing is mounted on {shown}: `findmnt -t fuse.boxlite` lists the mounts of boxlitefs"
                ),
            ));
        }
    };
    let server = server_of(connection);
    take_down(&path, false).map_err(|error| match error.errno() {
        libc::EBUSY => Error::busy(format!(
            "{shown} is in use: close what has files open or its working directory there (`fuser -vm {shown}` lists it), then try again"
        )),
        _ => error,
    })?;
    if let Some(server) = server {
        wait_until_gone(&server, FAREWELL);
    }
    Ok(())
}

/// Unmounts even what is in use: the names go at once, and files that are open stay usable until
/// they are closed. `path` is canonical.
///
/// # Errors
/// Those of umount2 and fusermount3.
pub(super) fn detach(path: &Path) -> Result<()> {
    take_down(path, false).or_else(|_| take_down(path, true))
}

fn take_down(path: &Path, lazily: bool) -> Result<()> {
    let sentence = || format!("cannot unmount {}", path.display());
    match umount2(path, lazily) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => fusermount(path, lazily),
        result => result.context(sentence),
    }
}

fn umount2(path: &Path, lazily: bool) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazily { libc::MNT_DETACH } else { 0 };
    // SAFETY: the path ends with a NUL byte and outlives the call.
    match unsafe { libc::umount2(path.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Unmounts what this user mounted; fusermount3 is setuid root and checks that.
fn fusermount(path: &Path, lazily: bool) -> Result<()> {
    let output = Command::new("fusermount3")
        .args(if lazily { "-uz" } else { "-u" }.split_whitespace())
        .arg("--")
        .arg(path)
        // What it says decides below.
        .env("LC_ALL", "C")
        .output()
        .context(|| "cannot run fusermount3, which unmounts for those who are not root: install the package fuse3")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let errno = if said.contains("busy") {
        libc::EBUSY
    } else {
        libc::EPERM
    };
    Err(Error::new(
        errno,
        format!("cannot unmount {}: {}", path.display(), said.trim()),
    ))
}

/// A pidfd of the process that serves a FUSE connection. Linux 6.16 and later name the
/// connection in the fdinfo of an open /dev/fuse; elsewhere, and for processes of others: None.
fn server_of(connection: u32) -> Option<OwnedFd> {
    let serves = |pid: libc::pid_t| {
        let Ok(infos) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else {
            return false;
        };
        infos.flatten().any(|info| {
            fs::read_to_string(info.path()).is_ok_and(|text| names_connection(&text, connection))
        })
    };
    fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .find(|&pid| serves(pid))
        .and_then(pidfd)
}

fn names_connection(fdinfo: &str, connection: u32) -> bool {
    fdinfo
        .lines()
        .filter_map(|line| line.strip_prefix("fuse_connection:"))
        .any(|number| number.trim().parse() == Ok(connection))
}

fn pidfd(pid: libc::pid_t) -> Option<OwnedFd> {
    // SAFETY: takes two numbers; the descriptor it returns is new and nobody else's.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: as above.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn wait_until_gone(process: &OwnedFd, limit: Duration) {
    let mut poll = libc::pollfd {
        fd: process.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one pollfd, ours, that outlives the call. Waiting is a courtesy: a failure is none.
    unsafe { libc::poll(&mut poll, 1, limit) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_of_a_connection_is_told_by_its_number_alone() {
        let fdinfo = "pos:\t0\nflags:\t0100002\nfuse_connection:\t51\n";
        assert!(names_connection(fdinfo, 51));
        assert!(!names_connection(fdinfo, 5));
        assert!(!names_connection("pos:\t51\n", 51));
    }

    #[test]
    fn what_is_no_mount_of_boxlitefs_is_not_unmounted() {
        let place = tempfile::tempdir().unwrap();
        let error = unmount(place.path()).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.sentence().contains("nothing is mounted"));
        let error = unmount(Path::new("/proc")).unwrap_err();
        assert!(error.sentence().contains("a mount of proc"));
        let error = unmount(&place.path().join("none")).unwrap_err();
        assert_eq!(error.errno(), libc::ENOENT);
    }
}
