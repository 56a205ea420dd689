//! Which home a command is about: one that is named, that of a mount, or BoxLite's own.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::mountinfo::{MountTable, resolve};
use crate::{Error, Result};

/// Returns the home that was asked for, by its path or by where it is mounted, or the one that
/// BoxLite itself would use: $BOXLITE_HOME, else ~/.boxlite.
///
/// # Errors
/// ENOENT when neither is known, EINVAL for a place in a mount; those of reading the mount table.
pub(super) fn home_of(asked: Option<PathBuf>) -> Result<PathBuf> {
    match asked {
        Some(place) => match mounted_home(&place)? {
            Some(home) => Ok(home),
            None => refuse_inside(&place).map(|()| place),
        },
        None => default_home(),
    }
}

/// Returns the home that boxlitefs has mounted on a directory. The mount itself is not asked: its
/// process may be stopped.
pub(super) fn mounted_home(place: &Path) -> Result<Option<PathBuf>> {
    let table = MountTable::own()?;
    let beside = |place: &Path| {
        let parent = place.parent().filter(|it| !it.as_os_str().is_empty());
        let parent = fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()?;
        Some(parent.join(place.file_name()?))
    };
    let home_at = |path: PathBuf| {
        let mount = table.at(&path).filter(|mount| mount.is_ours());
        mount.map(|mount| mount.source.clone())
    };
    let named = beside(place).and_then(home_at);
    Ok(named.or_else(|| home_at(fs::canonicalize(place).ok()?)))
}

/// Refuses a place in a mount of ours that is not its root: what is named is neither a home nor where
/// one is mounted.
fn refuse_inside(place: &Path) -> Result<()> {
    let Ok(path) = resolve(place) else {
        return Ok(());
    };
    // A guest may have a home of its own.
    if path.join("db/boxlite.db").is_file() {
        return Ok(());
    }
    let table = MountTable::own()?;
    let Some(mount) = table.around(&path).filter(|mount| mount.is_ours()) else {
        return Ok(());
    };
    let mountpoint = mount.mountpoint.display();
    Err(Error::new(
        libc::EINVAL,
        format!(
            "{} is not a BoxLite home, but a place in the mount on {mountpoint}: name that",
            place.display()
        ),
    ))
}

/// Returns where the mount is that a place is in, or that shows a home. Such a mount is asked later,
/// by its mountpoint.
///
/// # Errors
/// ENOENT when there is no such place, EINVAL when it is in no mount of boxlitefs; those of reading
/// the mount table.
pub(super) fn mount_of(place: &Path) -> Result<PathBuf> {
    let table = MountTable::own()?;
    let shown = place.display();
    let how = "`findmnt -t fuse.boxlite` lists its mounts";
    let path = resolve(place).map_err(|error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            let message =
                format!("boxlitefs is not mounted on {shown}, which does not exist: {how}");
            return Error::new(libc::ENOENT, message);
        }
        Error::io(format!("cannot reach {shown}"), error)
    })?;
    let around = table.around(&path).filter(|mount| mount.is_ours());
    let mut ours = table.entries().filter(|mount| mount.is_ours());
    let found = around.or_else(|| ours.find(|mount| mount.source == path));
    found.map(|mount| mount.mountpoint.clone()).ok_or_else(|| {
        let message = format!("boxlitefs is not mounted on {shown}: {how}");
        Error::new(libc::EINVAL, message)
    })
}

fn default_home() -> Result<PathBuf> {
    let from_environment = || std::env::var_os("BOXLITE_HOME").filter(|path| !path.is_empty());
    let below_user_home = || Some(std::env::home_dir()?.join(".boxlite").into_os_string());
    let found: Option<OsString> = from_environment().or_else(below_user_home);
    found.map(PathBuf::from).ok_or_else(|| {
        Error::new(
            libc::ENOENT,
            "the BoxLite home is unknown: name it, or set BOXLITE_HOME",
        )
    })
}
