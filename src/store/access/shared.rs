//! Changes beside a BoxLite runtime (the mount option `shared`): what is refused, and how the live disk
//! is replaced while somebody else may be replacing it.
//!
//! That runtime takes no lock we could take while it makes or restores a snapshot or a clone. It moves the
//! live disk away, or removes it, and makes another in its place; then it records what it made, or, for
//! a restore, nothing. So: from [`Change::hold`] on it records nothing, the live disk is exchanged
//! for another in one step, and what comes out of that shows whether it was the one that was meant.

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
use crate::store::layers::graph::Role;
use crate::{Context, Error, Result};

/// EBUSY where recovery would have to come first: beside a runtime, what a crash left can't be told
/// from what BoxLite is doing.
pub fn refuse_unsettled(locked: &LockedBox<'_>) -> Result<()> {
    let name = display_name(&locked.record);
    let home = &locked.store.home();
    refuse_pending(locked)?;
    if home.box_dir(&locked.record.id).join(UNRECORDED).exists() {
        return Err(unsettled(locked));
    }
    let live = home.live_disk(&locked.record.id);
    let Ok(meta) = std::fs::symlink_metadata(&live) else {
        if home.box_dir(&locked.record.id).join("disks").is_dir() {
            return Err(Error::busy(format!(
                "box {name} has no disk at this moment: BoxLite is replacing it, or never started the box; try again"
            )));
        }
        return Ok(());
    };
    if meta.nlink() > 1 {
        let layers = locked.layers()?;
        let mut names = layers.names_of(FileId::of(&meta));
        if names.any(|name| matches!(name.role, Role::Base { .. })) {
            return Err(unsettled(locked));
        }
    }
    Ok(())
}

fn unsettled(locked: &LockedBox<'_>) -> Error {
    Error::busy(format!(
        "a change of box {} was cut off, and is undone once no BoxLite runtime has the home; end the program that has it open, and try again",
        display_name(&locked.record)
    ))
}

/// EBUSY while BoxLite takes a snapshot of the box, or after it ended in the middle of one.
pub fn refuse_pending(locked: &LockedBox<'_>) -> Result<()> {
    let marker = locked.store.home().pending_marker(&locked.record.id);
    match std::fs::symlink_metadata(&marker) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(Error::busy(format!(
            "BoxLite is taking a snapshot of box {}, or ended in the middle of one ({}); try again, or start BoxLite anew",
            display_name(&locked.record),
            marker.display()
        ))),
    }
}

/// For a base without a row: BoxLite records one when its clone is done, and could not if we did.
pub fn cloned_just_now(locked: &LockedBox<'_>, base: &Path) -> Error {
    Error::busy(format!(
        "box {} reads from {}, which has no row: BoxLite is cloning the box, or ended in the middle of that; try again, or end the program that has the home open",
        display_name(&locked.record),
        base.display()
    ))
}

/// Moves `new` over the live disk, which is `old`. Beside a runtime only if it is still that one, and
/// nobody began to use it: the two are exchanged, and exchanged back if what came out is another.
///
/// A crash leaves the one or the other in place, and what came out in the workspace.
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
    exchange(new, live).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => replaced_just_now(locked),
        _ => Error::io(
            format!("cannot exchange {} and {}", new.display(), live.display()),
            e,
        ),
    })?;
    crash_point("beside.exchanged");
    let mut taken = FileId::at(new)?;
    if taken == old {
        // Where it can't be made certain, the live disk is what it was (see [`Store::replace`]).
        durable::sync_parent(live).inspect_err(|_| {
            let _ = exchange(new, live);
        })?;
        return durable::unlink(new);
    }
    // BoxLite put another there. Back with it; and should it have replaced ours meanwhile, that is the
    // one to stay.
    while taken != ours {
        let before = taken;
        exchange(new, live).context(|| format!("cannot put {} back", live.display()))?;
        taken = FileId::at(new)?;
        if taken == before {
            break;
        }
    }
    durable::sync_parent(live)?;
    Err(replaced_just_now(locked))
}

/// EBUSY beside a runtime for a disk of another size than the live one: BoxLite reads the size before it
/// moves the disk away, and makes the next one as large.
pub fn refuse_other_size(locked: &LockedBox<'_>, live: &Path, size: u64) -> Result<()> {
    let is_same = || Ok(Header::open(live)?.is_some_and(|header| header.virtual_size == size));
    if !locked.change.is_shared() || is_same()? {
        return Ok(());
    }
    Err(Error::busy(format!(
        "the disk of box {} would get another size, which is not done while a BoxLite runtime has the home; end the program that has it open, or import under a new name",
        display_name(&locked.record)
    )))
}

/// renameat2(RENAME_EXCHANGE): each gets the other's name, in one step; ENOENT when one is not there.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(io::Error::from)
}

pub fn replaced_just_now(locked: &LockedBox<'_>) -> Error {
    Error::busy(format!(
        "the disk of box {} was changed just now; try again",
        display_name(&locked.record)
    ))
}
