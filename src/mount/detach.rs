//! Unmounts exactly the mount that is meant.
//!
//! The kernel unmounts by path, and a moment later another mount may be on that path: the same home
//! mounted anew, or a stranger's tmpfs. So a mount is identified by its number and its device
//! ([`MountId`]), and its path is looked up in the mount table each time. It stays while an unmount
//! would hit another mount in its place, or take another one along.
//!
//! When root unmounts an idle mount, there is no gap between check and call. MNT_EXPIRE unmounts
//! only a mount that carries a mark, and marks any other. So the mount is marked, checked, and
//! unmounted if it still has the mark. A mount that came in between has no mark. fusermount3 and
//! the kernel's lazy unmount have no such mark; there the check is right before the call.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, statx};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::fusermount;
use crate::mountinfo::{MountEntry, MountId, MountTable};
use crate::process::connection;
use crate::{Context, Error, Result};

/// How often an idle mount is marked. Each access to a file in it, by any process, removes the
/// mark.
const MARKS: u32 = 20;

/// How often a mount is looked for: while others mount and unmount, a reader of the mount table may
/// miss a line.
const LOOKS: u32 = 5;

/// The mount that this process serves.
#[derive(Clone)]
pub(super) struct OwnMount {
    id: MountId,
    /// What it is mounted from.
    source: PathBuf,
    /// The descriptor of /dev/fuse that its requests come from.
    requests: Arc<OwnedFd>,
}

impl OwnMount {
    /// Describes the mount of this entry, whose requests come from this descriptor of /dev/fuse.
    pub fn new(entry: &MountEntry, requests: Arc<OwnedFd>) -> OwnMount {
        OwnMount {
            id: entry.id,
            source: entry.source.clone(),
            requests,
        }
    }

    /// The identity of the mount.
    pub fn id(&self) -> MountId {
        self.id
    }

    /// Whether the kernel still has the file system, mounted or in use. Until it drops it, no other
    /// file system has its device number.
    pub fn is_connected(&self) -> bool {
        connection::is_connected(&self.requests)
    }

    /// Returns the places where it is mounted now, bind mounts included, the last one first.
    fn places(&self) -> Result<Vec<MountEntry>> {
        let table = MountTable::own()?;
        let ours = table.of_device(self.id.device).rev();
        Ok(ours.filter(|entry| entry.is_ours()).cloned().collect())
    }
}

/// The result of unmounting the mounts of this process.
pub(super) enum Detached {
    /// There was none: another process detached it while it was in use.
    NotMounted,
    /// They are gone; files open in them are served until they are closed.
    Done,
    /// Some are still there, for this reason.
    Blocked(Error),
}

/// Unmounts the mount that this process serves, even in use: its names disappear at once, open
/// files stay usable until they are closed.
pub(super) fn detach_own(own: &OwnMount) -> Detached {
    let mut places = Ok(Vec::new());
    for _ in 0..LOOKS {
        places = own.places();
        if !own.is_connected() || !places.as_ref().is_ok_and(Vec::is_empty) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let places = match places {
        // Another process unmounted it at this moment.
        Ok(_) if !own.is_connected() => return Detached::Done,
        Ok(places) if places.is_empty() => return Detached::NotMounted,
        Ok(places) => places,
        Err(error) => return Detached::Blocked(error),
    };
    let is_ours = || own.is_connected();
    let remove = |place: &MountEntry| {
        let removed = remove_idle(place.id, is_ours).or_else(|error| match error.errno() {
            // If another mount is in the way, the lazy unmount refuses as well, and says so.
            libc::EBUSY | libc::EPERM => remove_lazily(place.id, is_ours),
            _ => Err(error),
        });
        // An unmount also removes the mounts that propagation made with this one.
        removed.or_else(|error| {
            if is_gone(place.id) {
                Ok(())
            } else {
                Err(error)
            }
        })
    };
    let removed: Vec<Result<()>> = places.iter().map(remove).collect();
    match removed.into_iter().find_map(Result::err) {
        // If another process unmounted it meanwhile, it is gone as well.
        Some(error) if own.is_connected() => Detached::Blocked(error),
        _ => Detached::Done,
    }
}

/// Removes the dead mount that is left when this process no longer serves it. Returns where that
/// was; None if it was unmounted before, as a mount normally ends. A live mount that has got the
/// same number and device since is left alone.
///
/// # Errors
/// Those of unmounting it: a dead mount is left there.
pub(super) fn remove_remains(own: &OwnMount) -> Result<Option<PathBuf>> {
    let mut found = None;
    for place in own.places()? {
        // The kernel gives the device number of a mount that is gone to the next one, and a dead mount of
        // another home may have it by now.
        if !own.is_connected() && place.source != own.source {
            continue;
        }
        let is_dead = || is_dead(&place.mountpoint).unwrap_or(false);
        let is_remains = || own.is_connected() || is_dead();
        if is_remains() {
            match remove_lazily(place.id, is_remains) {
                Ok(()) => found = Some(place.mountpoint.clone()),
                // Another process unmounts it at this moment, and its place may have another mount
                // by now.
                Err(error) if error.errno() == libc::EINVAL || is_gone(place.id) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(found)
}

/// Whether the file system on this path says that no process serves it any more. Waits for the
/// answer of a process that does.
///
/// # Errors
/// EACCES when it is another user's mount, which answers only that user.
pub(super) fn is_dead(mountpoint: &Path) -> Result<bool> {
    let how = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_FORCE_SYNC;
    match statx(CWD, mountpoint, how, StatxFlags::BASIC_STATS) {
        Err(Errno::NOTCONN | Errno::CONNABORTED) => Ok(true),
        Err(Errno::ACCESS) => Err(Error::new(
            libc::EACCES,
            format!(
                "the mount on {} belongs to another user, and only that user can see whether it is served",
                mountpoint.display()
            ),
        )),
        _ => Ok(false),
    }
}

/// Unmounts a mount that is not in use, if `is_still_meant` agrees at the last moment.
///
/// # Errors
/// EBUSY when it is in use or another mount is in the way, EPERM when it is another user's, EINVAL
/// when it is not mounted.
pub(super) fn remove_idle(id: MountId, is_still_meant: impl Fn() -> bool) -> Result<()> {
    let marked = UnmountFlags::EXPIRE | UnmountFlags::NOFOLLOW;
    for _ in 0..MARKS {
        let path = path_of(id)?;
        let message = || format!("cannot unmount {}", path.display());
        match unmount(&path, marked) {
            Err(Errno::AGAIN) => {}
            Err(Errno::PERM) => return fusermount::unmount(&path, false, || is_gone(id)),
            result => return result.map_err(Into::into).context(message),
        }
        if path_of(id)? != path || !is_still_meant() {
            return Err(replaced(&path));
        }
        match unmount(&path, marked) {
            Err(Errno::AGAIN) => {}
            result => return result.map_err(Into::into).context(message),
        }
    }
    Err(Error::busy(
        "the mount is in use: its files are accessed all the time; try again",
    ))
}

/// Unmounts a mount, even in use, if `is_still_meant` agrees at the last moment. Its names
/// disappear at once.
///
/// # Errors
/// Those of [`remove_idle`], except that a mount in use is no error.
pub(super) fn remove_lazily(id: MountId, is_still_meant: impl Fn() -> bool) -> Result<()> {
    let path = path_of(id)?;
    let message = || format!("cannot unmount {}", path.display());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mount = open(&path, flags, Mode::empty())
        .map_err(Into::into)
        .context(message)?;
    if mount_number(&mount) != Some(id.id) || path_of(id)? != path || !is_still_meant() {
        return Err(replaced(&path));
    }
    // The descriptor refers to this mount, even if another mount is on the path by now.
    let descriptor = format!("/proc/self/fd/{}", mount.as_raw_fd());
    match unmount(descriptor, UnmountFlags::DETACH) {
        Err(Errno::PERM) => {
            drop(mount);
            fusermount::unmount(&path, true, || is_gone(id))
        }
        result => result.map_err(Into::into).context(message),
    }
}

/// Whether a mount is no longer in the table.
fn is_gone(id: MountId) -> bool {
    MountTable::own().is_ok_and(|table| table.find(id).is_none())
}

/// Whether no other mount is in the way of an unmount.
pub(super) fn is_free(id: MountId) -> bool {
    path_of(id).is_ok()
}

/// Returns where a mount is now, if an unmount of that path would hit only this mount.
fn path_of(id: MountId) -> Result<PathBuf> {
    let table = MountTable::own()?;
    let Some(entry) = table.find(id) else {
        let message = format!("the mount with the device {} is not mounted", id.device);
        return Err(Error::new(libc::EINVAL, message));
    };
    match table.in_the_way(entry) {
        None => Ok(entry.mountpoint.clone()),
        Some(other) => Err(Error::busy(format!(
            "cannot unmount {}: {} is mounted on {}, and would be unmounted in its place or with it; unmount that first",
            entry.mountpoint.display(),
            other.fstype,
            other.mountpoint.display()
        ))),
    }
}

fn replaced(path: &Path) -> Error {
    let message = format!("{} has another mount now", path.display());
    Error::new(libc::EINVAL, message)
}

/// Returns the number of the mount that a descriptor is in.
fn mount_number(descriptor: &impl AsFd) -> Option<u64> {
    let number = descriptor.as_fd().as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Options;
    use super::super::attach::{MountGuard, attach};
    use super::super::validate::MountPaths;
    use super::*;
    use crate::mountinfo;

    /// A mount that nobody serves yet, on a directory of its own.
    fn mounted() -> (tempfile::TempDir, MountGuard, OwnedFd) {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        for name in ["home", "mnt"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let paths = MountPaths {
            home: root.join("home"),
            mountpoint: root.join("mnt"),
        };
        let (attached, requests) = attach(&paths, &Options::default()).unwrap();
        (place, attached, requests)
    }

    fn fstype_at(path: &Path) -> Option<String> {
        let entry = mountinfo::at(&path.canonicalize().unwrap()).unwrap();
        entry.map(|entry| entry.fstype)
    }

    fn mount_tmpfs(path: &Path) {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", path, "tmpfs", flags, None).unwrap();
    }

    #[test]
    fn a_mount_that_never_came_to_serve_is_taken_away() {
        let (place, attached, requests) = mounted();
        let mnt = place.path().join("mnt");
        assert_eq!(fstype_at(&mnt).as_deref(), Some("fuse.boxlite"));
        drop(attached);
        assert_eq!(fstype_at(&mnt), None);
        drop(requests);
    }

    #[test]
    fn a_mount_that_a_stranger_covers_is_left_with_what_covers_it() {
        let (place, attached, requests) = mounted();
        let mnt = place.path().join("mnt");
        mount_tmpfs(&mnt);
        let Detached::Blocked(error) = detach_own(attached.own()) else {
            panic!("it is covered");
        };
        assert_eq!(error.errno(), libc::EBUSY);
        assert!(error.message().contains("tmpfs is mounted on"), "{error}");
        assert_eq!(fstype_at(&mnt).as_deref(), Some("tmpfs"));
        unmount(&mnt, UnmountFlags::empty()).unwrap();
        assert!(matches!(detach_own(attached.own()), Detached::Done));
        assert_eq!(fstype_at(&mnt), None);
        drop(requests);
    }

    #[test]
    fn a_mount_that_was_replaced_is_not_looked_for_on_its_path() {
        let (place, attached, requests) = mounted();
        let mnt = place.path().join("mnt");
        let id = attached.own().id();
        // In use: the file system is there, and no name leads to it.
        let used = open(&mnt, OFlags::PATH, Mode::empty()).unwrap();
        unmount(&mnt, UnmountFlags::DETACH).unwrap();
        mount_tmpfs(&mnt);
        assert!(matches!(detach_own(attached.own()), Detached::NotMounted));
        for refused in [remove_idle(id, || true), remove_lazily(id, || true)] {
            assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
        }
        drop(used);
        assert!(matches!(detach_own(attached.own()), Detached::Done));
        drop((attached, requests));
        assert_eq!(fstype_at(&mnt).as_deref(), Some("tmpfs"));
        unmount(&mnt, UnmountFlags::empty()).unwrap();
    }

    /// Mounts another home on a directory of its own, and ends what serves it. Returns the dead mount.
    fn dead_mount() -> (tempfile::TempDir, MountEntry) {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        let requests = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,subtype=boxlite",
            requests.as_raw_fd()
        );
        let data = std::ffi::CString::new(data).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("another", &root, "fuse", flags, data.as_c_str()).unwrap();
        let entry = mountinfo::at(&root).unwrap().unwrap();
        (place, entry)
    }

    #[test]
    fn a_dead_mount_of_another_home_is_left_although_it_has_got_the_number() {
        for _ in 0..100 {
            let (place, attached, requests) = mounted();
            let own = attached.own().clone();
            unmount(place.path().join("mnt"), UnmountFlags::empty()).unwrap();
            let (_other, dead) = dead_mount();
            let remains = remove_remains(&own).unwrap();
            let is_left = !is_gone(dead.id);
            if is_left {
                remove_lazily(dead.id, || true).unwrap();
            }
            assert_eq!(remains, None);
            assert!(is_left);
            drop((attached, requests));
            if dead.id.device == own.id().device {
                return;
            }
        }
        panic!("other mounts were faster each time");
    }

    #[test]
    fn a_mount_is_found_where_it_was_moved_to() {
        let (place, attached, requests) = mounted();
        let moved = place.path().join("moved");
        // What is moved is the directory above; the mount goes with it.
        fs::create_dir(place.path().join("above")).unwrap();
        let above = place.path().join("above");
        fs::create_dir(above.join("mnt")).unwrap();
        let bound = above.join("mnt");
        rustix::mount::mount_bind(place.path().join("mnt"), &bound).unwrap();
        fs::rename(&above, &moved).unwrap();
        assert_eq!(
            fstype_at(&moved.join("mnt")).as_deref(),
            Some("fuse.boxlite")
        );
        assert!(matches!(detach_own(attached.own()), Detached::Done));
        assert_eq!(fstype_at(&moved.join("mnt")), None);
        assert_eq!(fstype_at(&place.path().join("mnt")), None);
        drop(requests);
    }
}
