//! Changes without the runtime lock, which may be beside a BoxLite runtime: what is refused, and how
//! the live disk is replaced while BoxLite may be replacing it as well.
//!
//! BoxLite holds no lock that we could take while it makes or restores a snapshot or a clone. It
//! moves the live disk away, or removes it, and makes another in its place. Then it records what it
//! made; for a restore it records nothing.
//!
//! So our change first keeps BoxLite from recording anything until our own transaction ends. It
//! then exchanges the live disk with the new one in one step. The file that comes out shows whether
//! the live disk was still the expected one.
//!
//! Shared access runs no recovery: what a crash left looks the same as what BoxLite is doing.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::disk::{FileId, Header};
use crate::exports::display_name;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::UNRECORDED;
use crate::store::access::locked_box::LockedBox;
use crate::{Context, Error, Result};

/// Refuses a box that needs recovery first. Beside a runtime, what a crash left looks the same as
/// what BoxLite is doing.
///
/// # Errors
/// EBUSY.
pub fn refuse_unsettled(locked: &LockedBox<'_>) -> Result<()> {
    let name = display_name(&locked.record);
    let home = locked.store.home();
    refuse_pending(locked)?;
    // Left by a removal that was cut off: no other change of ours is under way, and BoxLite does
    // not know the file.
    durable::unlink(&home.box_dir(&locked.record.id).join(UNRECORDED))?;
    let live = home.live_disk(&locked.record.id);
    let Ok(meta) = std::fs::symlink_metadata(&live) else {
        if home.box_dir(&locked.record.id).join("disks").is_dir() {
            return Err(Error::busy(format!(
                "box {name} has no disk at this moment: BoxLite is replacing it, or has never started the box; try again"
            )));
        }
        return Ok(());
    };
    if meta.nlink() > 1 {
        let layers = locked.layers()?;
        if layers.base_of(FileId::of(&meta)).is_some() {
            return Err(unsettled(locked));
        }
    }
    Ok(())
}

fn unsettled(locked: &LockedBox<'_>) -> Error {
    Error::busy(format!(
        "a change of box {} was cut off and has to be undone first, which needs the home without a BoxLite runtime; end the program that has the home open, and try again",
        display_name(&locked.record)
    ))
}

/// Refuses a box while BoxLite takes a snapshot of it, or after BoxLite ended in the middle of one.
///
/// # Errors
/// EBUSY.
pub fn refuse_pending(locked: &LockedBox<'_>) -> Result<()> {
    let marker = locked.store.home().pending_marker(&locked.record.id);
    match std::fs::symlink_metadata(&marker) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(Error::busy(format!(
            "BoxLite is taking a snapshot of box {}, or ended in the middle of one ({}); try again, or restart BoxLite",
            display_name(&locked.record),
            marker.display()
        ))),
    }
}

/// Returns the error for a base without a row: BoxLite is cloning the box. It records the row at
/// the end of the clone, which would fail if we had recorded one before.
pub fn cloned_just_now(locked: &LockedBox<'_>, base: &Path) -> Error {
    Error::busy(format!(
        "box {} reads from {}, which has no row: BoxLite is cloning the box, or ended while it did; try again, or end the program that has the home open",
        display_name(&locked.record),
        base.display()
    ))
}

/// Moves `new` over the live disk, whose file was `old` when it was checked. Beside a runtime, the
/// two files are exchanged, and exchanged back if the file that came out is not `old`.
///
/// A crash leaves one of them in place and the other in the workspace.
///
/// # Errors
/// EBUSY when BoxLite replaced the disk meanwhile or uses it; EIO.
pub fn replace_live(
    locked: &mut LockedBox<'_>,
    new: &Path,
    live: &Path,
    old: FileId,
) -> Result<()> {
    if !locked.change.is_shared() {
        return locked.store.workspace().replace(new, live);
    }
    locked.change.begin_exclusive()?;
    refuse_pending(locked)?;
    locked.store.exports.disks.refuse_active(&locked.record)?;
    let ours = FileId::at(new)?;
    match exchange(new, live) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(replaced_just_now(locked)),
        Err(e) if is_unsupported(&e) && locked.change.is_alone() => {
            return replace_with_lock(locked, new, live, old);
        }
        Err(e) => {
            let message = format!("cannot exchange {} and {}", new.display(), live.display());
            return Err(Error::io(message, e));
        }
    }
    crash_point("beside.exchanged");
    let removed = FileId::at(new)?;
    if removed == old {
        // If this cannot be made durable, the old disk goes back, as in `Workspace::replace`.
        durable::sync_parent(live).inspect_err(|_| {
            let _ = exchange(new, live);
        })?;
        // If a power loss brings this name back, the next mount removes it with the workspace.
        return durable::unlink_unflushed(new).map(drop);
    }
    put_back_newest(ours, removed, &mut || {
        exchange(new, live).context(|| format!("cannot put {} back", live.display()))?;
        FileId::at(new)
    })?;
    durable::sync_parent(live)?;
    Err(replaced_just_now(locked))
}

/// Returns whether the file system can't exchange names.
fn is_unsupported(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    errno.is_some_and(|errno| [libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP].contains(&errno))
}

/// Moves `new` over the live disk with the runtime lock, for a file system that can't exchange
/// names.
fn replace_with_lock(
    locked: &mut LockedBox<'_>,
    new: &Path,
    live: &Path,
    old: FileId,
) -> Result<()> {
    if !locked.change.take_lock()? || FileId::at(live)? != old {
        return Err(replaced_just_now(locked));
    }
    locked.store.exports.disks.refuse_active(&locked.record)?;
    locked.store.workspace().replace(new, live)
}

/// Puts the disk back that BoxLite made: `removed` came out where `placed` was put. BoxLite may
/// replace the live disk before each exchange; then its newest disk comes out, and that one goes
/// back. `exchange` puts the file that came out last into place, and returns the one that comes out.
fn put_back_newest(
    mut placed: FileId,
    mut removed: FileId,
    exchange: &mut dyn FnMut() -> Result<FileId>,
) -> Result<()> {
    loop {
        let next = exchange()?;
        // The file of the exchange before came out: nobody replaced it, so the newest is in place.
        if next == placed {
            return Ok(());
        }
        placed = removed;
        removed = next;
    }
}

/// Refuses, beside a runtime, a disk whose virtual size in bytes differs from that of the live
/// disk. BoxLite reads the size before it moves the disk away, and gives its next disk the same
/// size.
///
/// # Errors
/// EBUSY.
pub fn refuse_other_size(locked: &LockedBox<'_>, live: &Path, size: u64) -> Result<()> {
    let is_same = || Ok(Header::open(live)?.is_some_and(|header| header.virtual_size == size));
    if !locked.change.is_shared() || locked.change.is_alone() || is_same()? {
        return Ok(());
    }
    Err(Error::busy(format!(
        "the disk of box {} would get another size, which is not possible while a BoxLite runtime has the home; end the program that has the home open, or import under a new name",
        display_name(&locked.record)
    )))
}

/// Exchanges the names of two files in one step (renameat2 with RENAME_EXCHANGE). ENOENT when one
/// is missing.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    durable::count_change();
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(io::Error::from)
}

/// Returns the error for a live disk that is no longer the one that was checked.
pub fn replaced_just_now(locked: &LockedBox<'_>) -> Error {
    Error::busy(format!(
        "the disk of box {} was changed just now; try again",
        display_name(&locked.record)
    ))
    .for_a_moment()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(ino: u64) -> FileId {
        FileId { dev: 1, ino }
    }

    /// The disk that is in place in the end, if BoxLite puts these into place, each before one exchange.
    fn left_in_place(replacements: &[(usize, u64)]) -> FileId {
        let (ours, boxlites) = (file(1), file(2));
        let (mut live, mut aside) = (ours, boxlites);
        let mut exchanges = 0;
        put_back_newest(ours, boxlites, &mut || {
            assert!(exchanges < 10, "it exchanges for ever");
            if let Some((_, ino)) = replacements.iter().find(|(at, _)| *at == exchanges) {
                live = file(*ino);
            }
            exchanges += 1;
            std::mem::swap(&mut live, &mut aside);
            Ok(aside)
        })
        .unwrap();
        live
    }

    #[test]
    fn the_disk_that_boxlite_made_last_is_put_back() {
        assert_eq!(left_in_place(&[]), file(2));
        assert_eq!(left_in_place(&[(0, 3)]), file(3));
        assert_eq!(left_in_place(&[(0, 3), (1, 4)]), file(4));
    }
}
