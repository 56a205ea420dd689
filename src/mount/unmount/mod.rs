//! `boxlitefs unmount`: finds the mount that is meant, unmounts it, and says whether that was all of it.

mod diagnose;
mod remains;

use std::path::Path;
use std::time::Duration;

use super::detach;
use crate::mountinfo::{MountTable, resolve};
use crate::{Context, Error, Result};

use remains::{Remains, Server};

/// How long a process that was killed may take to be gone.
const KILLED: Duration = Duration::from_millis(200);

/// How far an unmount came.
#[derive(Debug)]
pub enum Unmounted {
    /// The mount is gone, and so is the process that served it, as far as that can be seen.
    Entirely,
    /// The mount is gone, but what was mounted is still served: the message says what has it.
    OnlyHere(Error),
}

/// Unmounts a mount of boxlitefs, and waits until the process that served it is gone, where the kernel
/// tells which process that is. `tell` is told what is waited for.
///
/// # Errors
/// EINVAL when it is no mount of boxlitefs, EBUSY when it is in use or another mount is on it, EPERM when
/// it is another user's. Nothing was unmounted then.
pub fn unmount(mountpoint: &Path, tell: impl Fn(&str)) -> Result<Unmounted> {
    let shown = mountpoint.display();
    let path = resolve(mountpoint).context(|| format!("cannot reach {shown}"))?;
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

/// Unmounts a mount of boxlitefs whose process was killed, also where it is in use: nobody serves it. Does
/// nothing where there is no such mount.
///
/// # Errors
/// EACCES when it is another user's, and it can't be seen whether it is served; EBUSY when another mount is
/// in the way.
pub fn remove_dead(mountpoint: &Path) -> Result<()> {
    let shown = mountpoint.display();
    let path = resolve(mountpoint).context(|| format!("cannot reach {shown}"))?;
    let table = MountTable::own()?;
    let Some(entry) = table.at(&path).filter(|entry| entry.is_ours()) else {
        return Ok(());
    };
    // What is asked may not answer; a process that can be seen needs no asking. One that was just killed
    // has a moment to be gone.
    let server = Server::of(entry.id.device);
    let is_served = server.is_some_and(|server| !server.ends_within(KILLED));
    if is_served || !detach::is_dead(&path)? {
        return Ok(());
    }
    detach::remove_lazily(entry.id, || detach::is_dead(&path).unwrap_or(false))
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
