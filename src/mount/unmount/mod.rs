//! `boxlitefs unmount`: finds the mount that is meant, unmounts it, and tells whether the file
//! system has ended with it.

mod diagnose;
mod remains;

use std::path::Path;
use std::time::Duration;

use super::detach;
use crate::mountinfo::{MountTable, resolve};
use crate::{Error, Result};

use remains::{Remains, Server};

/// How long a killed process may take to disappear.
const KILLED: Duration = Duration::from_millis(200);

/// The result of an unmount.
#[derive(Debug)]
pub enum Unmounted {
    /// The mount is gone, and so is the process that served it, as far as can be seen.
    Entirely,
    /// The mount is gone, but the file system is still served. The message says what uses it.
    OnlyHere(Error),
}

/// Unmounts a mount of boxlitefs, and waits until the process that served it is gone, where the
/// kernel tells which process that is. Calls `tell` with what it waits for.
///
/// # Errors
/// EINVAL when it is not a mount of boxlitefs, EBUSY when it is in use or another mount is on it,
/// EPERM when it is another user's. Nothing was unmounted then.
pub fn unmount(mountpoint: &Path, tell: impl Fn(&str)) -> Result<Unmounted> {
    let shown = mountpoint.display();
    let path = resolve(mountpoint).map_err(|error| unreachable_place(mountpoint, error))?;
    let entry = diagnose::target(mountpoint, &path, &MountTable::own()?)?;
    let remains = Remains::of(entry.id);
    detach::remove_idle(entry.id, || true).map_err(|error| match error.errno() {
        libc::EBUSY if detach::is_free(entry.id) => diagnose::in_use(mountpoint, &entry),
        _ => error,
    })?;
    let held = remains.wait_for_the_end(&tell);
    Ok(held.map_or(Unmounted::Entirely, |message| {
        Unmounted::OnlyHere(Error::busy(format!(
            "{shown} is unmounted here, but {message}"
        )))
    }))
}

/// Unmounts a dead mount of boxlitefs, whose process was killed, even if it is in use. Does nothing
/// if there is no such mount.
///
/// # Errors
/// EACCES when it is another user's, so that it can't be seen whether it is served; EBUSY when
/// another mount is in the way.
pub fn remove_dead(mountpoint: &Path) -> Result<()> {
    let path = resolve(mountpoint).map_err(|error| unreachable_place(mountpoint, error))?;
    let table = MountTable::own()?;
    let Some(entry) = table.at(&path).filter(|entry| entry.is_ours()) else {
        return Ok(());
    };
    // Asking the mount may hang, so a process that can be seen is preferred as evidence. One that
    // was just killed gets a moment to disappear.
    let server = Server::of(entry.id.device);
    let is_served = server.is_some_and(|server| !server.ends_within(KILLED));
    if is_served || !detach::is_dead(&path)? {
        return Ok(());
    }
    detach::remove_lazily(entry.id, || detach::is_dead(&path).unwrap_or(false))
}

/// Returns the error for a place that can't be resolved.
fn unreachable_place(place: &Path, error: std::io::Error) -> Error {
    let shown = place.display();
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::new(
            libc::ENOENT,
            format!(
                "{shown} does not exist: `findmnt -t fuse.boxlite` lists the mounts of boxlitefs"
            ),
        );
    }
    Error::io(format!("cannot reach {shown}"), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_mount_of_boxlitefs_is_not_unmounted() {
        let unmount = |place: &Path| super::unmount(place, |_| ()).unwrap_err();
        let place = tempfile::tempdir().unwrap();
        let error = unmount(place.path());
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.message().contains("nothing is mounted"));
        let error = unmount(Path::new("/proc"));
        assert!(error.message().contains("a mount of proc"));
        let error = unmount(&place.path().join("none"));
        assert_eq!(error.errno(), libc::ENOENT);
    }

    #[test]
    fn a_mount_that_is_none_of_boxlitefs_is_never_taken_for_a_dead_one() {
        let place = tempfile::tempdir().unwrap();
        remove_dead(place.path()).unwrap();
        remove_dead(Path::new("/proc")).unwrap();
        assert!(Path::new("/proc/self").exists());
    }
}
