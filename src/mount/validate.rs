//! Checks what must be true before a mount is tried. Each error message says what to do.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{Options, fusermount};
use crate::home::Home;
use crate::mountinfo::{self, resolve};
use crate::{Context, Error, Result};

/// The home and the mountpoint, both absolute and canonical.
pub(super) struct MountPaths {
    /// The BoxLite home.
    pub home: PathBuf,
    /// The directory to mount on.
    pub mountpoint: PathBuf,
}

impl MountPaths {
    /// Resolves and checks both. Call it while the working directory is still the caller's.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, EBUSY, EINVAL or ENOTCONN; see [`super::run`].
    pub fn check(home: &Path, mountpoint: &Path) -> Result<MountPaths> {
        let home = check_home(home)?;
        let mountpoint = check_mountpoint(mountpoint)?;
        check_apart(&home, &mountpoint)?;
        Ok(MountPaths { home, mountpoint })
    }
}

impl MountPaths {
    /// Returns whether files on the mountpoint would be hidden by the mount.
    pub fn hides_files(&self) -> bool {
        fs::read_dir(&self.mountpoint).is_ok_and(|mut names| names.next().is_some())
    }

    /// Returns why the home can't be written. None if it can be, or if it is not a home.
    pub fn unwritable(&self) -> Option<Error> {
        Home::open(&self.home).ok()?.unwritable()
    }
}

/// Returns the canonical path of a home. Whether it really is one is checked when it is opened.
fn check_home(home: &Path) -> Result<PathBuf> {
    let shown = home.display();
    let canonical = home.canonicalize().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(
            libc::ENOENT,
            format!(
                "there is no BoxLite home at {shown}: name another or set BOXLITE_HOME; BoxLite makes one when it first runs"
            ),
        ),
        _ => Error::io(format!("cannot reach the BoxLite home {shown}"), error),
    })?;
    let meta = fs::metadata(&canonical).context(|| format!("cannot look at {shown}"))?;
    if !meta.is_dir() {
        return Err(Error::new(
            libc::ENOTDIR,
            format!("{shown} is not a directory: name the directory BoxLite keeps its boxes in"),
        ));
    }
    Ok(canonical)
}

/// Returns the canonical path of a directory that can be mounted on.
fn check_mountpoint(mountpoint: &Path) -> Result<PathBuf> {
    let shown = mountpoint.display();
    let missing = || {
        Error::new(
            libc::ENOENT,
            format!("the mountpoint {shown} does not exist: make it with mkdir"),
        )
    };
    let path = resolve(mountpoint).map_err(|error| match error.kind() {
        ErrorKind::NotFound => missing(),
        _ => Error::io(format!("cannot reach the mountpoint {shown}"), error),
    })?;
    let looked = fs::metadata(&path);
    if let Err(error) = &looked
        && error.raw_os_error() == Some(libc::ENOTCONN)
    {
        let how = match mountinfo::at(&path)? {
            Some(entry) if entry.is_ours() => format!("`boxlitefs unmount --dead {shown}`"),
            _ => format!("`fusermount3 -u {shown}`, or as root `umount -l {shown}`"),
        };
        let message =
            format!("a FUSE mount whose process is gone is still on {shown}: remove it with {how}");
        return Err(Error::new(libc::ENOTCONN, message));
    }
    check_uncovered(&path)?;
    match looked {
        Ok(meta) if meta.is_dir() => Ok(path),
        Ok(_) => Err(Error::new(
            libc::ENOTDIR,
            format!("the mountpoint {shown} is not a directory: name an empty directory"),
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(missing()),
        Err(error) => Err(Error::io(
            format!("cannot look at the mountpoint {shown}"),
            error,
        )),
    }
}

/// Checks that no FUSE file system is on the mountpoint: a second one would only hide the first.
///
/// # Errors
/// EBUSY when there is one.
pub(super) fn check_uncovered(mountpoint: &Path) -> Result<()> {
    let shown = mountpoint.display();
    let message = match mountinfo::at(mountpoint)? {
        Some(entry) if entry.is_ours() => format!(
            "boxlitefs is already mounted on {shown}, with the home {}: use it, or unmount it with `boxlitefs unmount {shown}`",
            entry.source.display()
        ),
        Some(entry) if entry.is_fuse() => format!(
            "another FUSE file system ({}) is already mounted on {shown}: unmount it with `fusermount3 -u {shown}`, or name another directory",
            entry.fstype
        ),
        _ => return Ok(()),
    };
    Err(Error::busy(message))
}

/// Checks that neither lies inside the other: the mount would hide the home it needs, or BoxLite
/// would find the mount among its files.
fn check_apart(home: &Path, mountpoint: &Path) -> Result<()> {
    let message = if mountpoint.starts_with(home) {
        format!(
            "the mountpoint {} lies inside the BoxLite home {}: name a directory outside it",
            mountpoint.display(),
            home.display()
        )
    } else if home.starts_with(mountpoint) {
        format!(
            "the BoxLite home {} lies inside the mountpoint {} and would be hidden by it: name another directory",
            home.display(),
            mountpoint.display()
        )
    } else {
        return Ok(());
    };
    Err(Error::new(libc::EINVAL, message))
}

/// Whether this process acts as root.
pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Checks that FUSE is available and that this user may mount with these options.
///
/// # Errors
/// ENODEV without FUSE, EPERM or EACCES when the user may not, ENOENT without fusermount3.
pub(super) fn check_permission(options: &Options) -> Result<()> {
    check_device()?;
    if is_root() {
        return Ok(());
    }
    if fusermount::find().is_none() {
        return Err(Error::new(
            libc::ENOENT,
            "mounting as another user than root needs fusermount3: install the package fuse3",
        ));
    }
    let asked = match (options.allow_other, options.allow_root) {
        (true, _) => "allow_other",
        (_, true) => "allow_root",
        _ => return Ok(()),
    };
    match fs::read_to_string("/etc/fuse.conf") {
        Ok(conf) if allows_other(&conf) => Ok(()),
        _ => Err(Error::new(
            libc::EPERM,
            format!(
                "only root may use the option {asked} here: add the line user_allow_other to /etc/fuse.conf, or mount without the option"
            ),
        )),
    }
}

/// Checks that this user can open /dev/fuse.
fn check_device() -> Result<()> {
    let opened = File::options().read(true).write(true).open("/dev/fuse");
    let Err(error) = opened else { return Ok(()) };
    Err(match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::new(
            libc::ENODEV,
            "this system has no /dev/fuse: load it with `modprobe fuse`, or install the package fuse3; a container needs the device passed in",
        ),
        Some(libc::EPERM | libc::EACCES) => Error::io(
            "this user may not use /dev/fuse: ask for access to it; a container needs the device passed in",
            error,
        ),
        _ => Error::io("cannot use /dev/fuse", error),
    })
}

/// Whether the text of fuse.conf(5) has user_allow_other: alone on a line, where `#` begins a
/// comment.
fn allows_other(conf: &str) -> bool {
    conf.lines()
        .filter_map(|line| line.split('#').next())
        .any(|line| line.trim() == "user_allow_other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_allow_other_counts_only_when_it_is_no_comment() {
        assert!(allows_other("mount_max = 3\nuser_allow_other\n"));
        assert!(allows_other("user_allow_other # for boxes"));
        assert!(!allows_other("# user_allow_other\n#user_allow_other"));
        assert!(!allows_other("user_allow_others"));
    }

    #[test]
    fn a_home_and_a_mountpoint_inside_each_other_are_refused() {
        let inside = |home, at| check_apart(Path::new(home), Path::new(at)).is_err();
        assert!(inside("/h", "/h/mnt"));
        assert!(inside("/h", "/h"));
        assert!(inside("/mnt/h", "/mnt"));
        assert!(inside("/mnt", "/"));
        assert!(!inside("/home", "/home2"));
    }

    #[test]
    fn a_missing_home_or_mountpoint_is_named_with_what_to_do() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        let error = check_home(&place.path().join("none")).unwrap_err();
        assert_eq!(error.errno(), libc::ENOENT);
        assert!(error.message().contains("BOXLITE_HOME"));
        assert_eq!(check_home(&file).unwrap_err().errno(), libc::ENOTDIR);
        let error = check_mountpoint(&place.path().join("none")).unwrap_err();
        assert!(error.message().contains("mkdir"));
        assert_eq!(error.errno(), libc::ENOENT);
        assert_eq!(check_mountpoint(&file).unwrap_err().errno(), libc::ENOTDIR);
        let below_a_file = check_mountpoint(&file.join("x")).unwrap_err();
        assert_eq!(below_a_file.errno(), libc::ENOTDIR);
    }

    #[test]
    fn a_symlink_to_a_mountpoint_is_followed() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        fs::create_dir(root.join("real")).unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        assert_eq!(
            check_mountpoint(&root.join("link")).unwrap(),
            root.join("real")
        );
    }
}
