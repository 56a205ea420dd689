//! `mount -o remount,ro` and `rw`.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mount_helper::Request;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_remount};

use super::fixed_options::first_refused;
use super::{MOUNT_FAILURE, failed};

/// Returns whether a remount is asked for, and if so, whether read-only.
pub fn requested(request: &Request) -> Option<bool> {
    let mut is_asked = false;
    let mut read_only = false;
    for option in request.each_option() {
        match option {
            "remount" => is_asked = true,
            "ro" => read_only = true,
            "rw" => read_only = false,
            _ => {}
        }
    }
    is_asked.then_some(read_only)
}

/// Makes the kernel refuse changes from now on, or allow them again. The process that serves
/// follows the kernel's flags.
pub fn run(request: &Request, read_only: bool) -> ExitCode {
    let shown = Path::new(&request.directory).display();
    let mount = match mount_on(&request.directory) {
        Ok(Some(mount)) => mount,
        Ok(None) => {
            let message = format!("{shown} is not a mount of boxlitefs: nothing was remounted");
            return failed(&message, MOUNT_FAILURE);
        }
        Err(error) => return failed(&format!("cannot reach {shown}: {error}"), MOUNT_FAILURE),
    };
    // Leads to this mount, even if another mount covers it now.
    let place = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    let status = fs::read_to_string(place.join(".boxlite/status")).unwrap_or_default();
    let refused = first_refused(request.each_option(), &status).filter(|_| !request.sloppy);
    if let Some(option) = refused {
        let message = format!(
            "a remount of {shown} can't set {option}: it changes ro, rw, noexec, exec and access times; for other options, unmount it and mount it again"
        );
        return failed(&message, MOUNT_FAILURE);
    }
    if !read_only && status.contains("\"ro\": true") {
        let message = format!(
            "{shown} was mounted with ro, so its process opened the home only for reading: unmount it, and mount it without ro"
        );
        return failed(&message, MOUNT_FAILURE);
    }
    let flags = remount_flags(request, read_only);
    if request.verbose {
        println!("mount.boxlite: remount {shown} with {flags:?}");
    }
    if request.fake {
        return ExitCode::SUCCESS;
    }
    match mount_remount(&place, flags, "") {
        Ok(()) => ExitCode::SUCCESS,
        Err(Errno::PERM) => failed(
            &format!("only root can remount {shown}: unmount it, and mount it with other options"),
            MOUNT_FAILURE,
        ),
        Err(Errno::BUSY) => failed(
            &format!("{shown} is being written to: try again later"),
            MOUNT_FAILURE,
        ),
        Err(error) => failed(&format!("cannot remount {shown}: {error}"), MOUNT_FAILURE),
    }
}

/// Opens the mount of boxlitefs on a directory. None if something else is mounted there, or
/// nothing: that would get the flags that are meant for our mount.
fn mount_on(directory: &OsStr) -> io::Result<Option<OwnedFd>> {
    let mount = open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", mount.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let table = fs::read("/proc/self/mountinfo")?;
    let path = fs::canonicalize(directory)?;
    let is_ours = number.is_some_and(|number| is_ours(&table, number.trim(), &path));
    Ok(is_ours.then_some(mount))
}

/// Whether the mount with this number in a table, in the format of /proc/PID/mountinfo, is one of
/// boxlitefs and mounted on exactly this path.
fn is_ours(table: &[u8], number: &str, path: &Path) -> bool {
    let table = String::from_utf8_lossy(table);
    let line = table
        .lines()
        .find(|line| line.split(' ').next() == Some(number));
    line.is_some_and(|line| {
        let mountpoint = line.split(' ').nth(4).unwrap_or_default();
        let escaped = path.to_string_lossy().replace('\\', "\\134");
        let escaped = escaped.replace(' ', "\\040").replace('\t', "\\011");
        let escaped = escaped.replace('\n', "\\012").replace('#', "\\043");
        line.contains(" - fuse.boxlite ") && mountpoint == escaped
    })
}

/// Returns the flags of a remount, which sets all of them anew: those that are always on, and those
/// that are asked for. mount(8) passes the options that the mount had.
fn remount_flags(request: &Request, read_only: bool) -> MountFlags {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, read_only);
    for option in request.each_option() {
        match option {
            "noexec" => flags.insert(MountFlags::NOEXEC),
            "exec" => flags.remove(MountFlags::NOEXEC),
            "noatime" => flags.insert(MountFlags::NOATIME),
            "atime" => flags.remove(MountFlags::NOATIME),
            "relatime" => flags.insert(MountFlags::RELATIME),
            _ => {}
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn parsed(line: &str) -> Request {
        let words = std::iter::once("mount.boxlite").chain(line.split_whitespace());
        Request::try_parse_from(words).unwrap()
    }

    #[test]
    fn a_remount_is_told_from_a_mount_and_keeps_what_is_always_on() {
        assert_eq!(requested(&parsed("a b -o ro")), None);
        assert_eq!(requested(&parsed("a b -o remount,ro")), Some(true));
        assert_eq!(requested(&parsed("a b -o rw,ro,remount,rw")), Some(false));
        let flags = remount_flags(&parsed("a b -o remount,noexec,noatime,exec"), true);
        let wanted = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY;
        assert_eq!(flags, wanted | MountFlags::NOATIME);
    }

    #[test]
    fn what_is_remounted_is_a_mount_of_boxlitefs_on_that_very_directory() {
        let table = b"40 28 0:51 / /mnt/my\\040boxes rw - fuse.boxlite /h rw\n\
            41 40 0:52 / /mnt/my\\040boxes rw - tmpfs tmpfs rw\n";
        let is_ours = |number, path| is_ours(table, number, Path::new(path));
        assert!(is_ours("40", "/mnt/my boxes"));
        assert!(!is_ours("41", "/mnt/my boxes"));
        assert!(!is_ours("40", "/mnt/my boxes/web"));
        assert!(!is_ours("4", "/mnt/my boxes"));
    }
}
