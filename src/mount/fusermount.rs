//! fusermount3, which mounts and unmounts for users other than root.

use std::ffi::OsStr;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::{MountPaths, Options};
use crate::{Context, Error, Result};

/// Where fusermount3 is looked for in addition to PATH, which mount(8) unsets.
const USUAL_PLACES: [&str; 3] = ["/usr/bin", "/bin", "/sbin"];

/// Mounts. fusermount3 sends the descriptor of /dev/fuse back on the socket that is its standard
/// input.
///
/// # Errors
/// EPERM and EACCES when the user may not mount there, else what fusermount3 says as an EIO.
pub(super) fn mount(paths: &MountPaths, options: &Options) -> Result<OwnedFd> {
    let message = || "cannot run fusermount3, which mounts for users other than root: install the package fuse3";
    let (ours, its) = UnixStream::pair().context(|| "cannot make a socket")?;
    let mut fusermount = Command::new(program())
        .arg("-o")
        .arg(mount_options(paths.home.as_os_str(), options))
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
        // The message has as much of it as can be read.
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

/// The options as the one string that fusermount3 takes. A comma would end the name of the source;
/// fusermount3 removes these backslashes.
fn mount_options(home: &OsStr, options: &Options) -> String {
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
    for option in options.access_options() {
        text = text + "," + option;
    }
    text
}

/// Receives the descriptor that fusermount3 sends.
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

/// Unmounts what this user mounted; fusermount3 is setuid root and checks that. A failure counts as
/// success if `is_gone` says that the mount is gone anyway.
///
/// # Errors
/// EBUSY when it is in use, else EPERM, with what fusermount3 says.
pub(super) fn unmount(path: &Path, lazily: bool, is_gone: impl Fn() -> bool) -> Result<()> {
    let output = Command::new(program())
        .arg(if lazily { "-uz" } else { "-u" })
        .arg("--")
        .arg(path)
        // The errno depends on its message.
        .env("LC_ALL", "C")
        .output()
        .context(|| "cannot run fusermount3, which unmounts for users other than root: install the package fuse3")?;
    if output.status.success() || is_gone() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // It looks for the mount among those that this user made.
    if said.contains("not found in") {
        let shown = path.display();
        return Err(Error::new(
            libc::EPERM,
            format!(
                "another user has mounted {shown}, and only that user and root may unmount it: `sudo boxlitefs unmount {shown}`"
            ),
        ));
    }
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

/// The path of fusermount3, or its bare name when it was not found.
fn program() -> PathBuf {
    find().unwrap_or_else(|| PathBuf::from("fusermount3"))
}

/// Finds fusermount3 in PATH or in the usual places.
pub(super) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(USUAL_PLACES.map(PathBuf::from))
        .map(|directory| directory.join("fusermount3"))
        .find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_the_home_does_not_end_the_source_name_for_fusermount() {
        let options = mount_options(OsStr::new(r"/a,allow_other\b"), &Options::default());
        assert_eq!(
            options,
            r"fsname=/a\,allow_other\\b,subtype=boxlite,nosuid,nodev"
        );
    }
}
