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

use super::crash::crash_point;
use super::layers::Role;
use super::marks::UNRECORDED;
use super::prepare::Prepared;
use super::{Store, display_name, durable};
use crate::disk::{FileId, Header};
use crate::home::Change;
use crate::{Context, Error, Result};

impl Store {
    fn begin_change(&self) -> Result<()> {
        self.refuse_read_only()?;
        self.foreground.touch();
        // A crash leaves it, by which the next mount knows of the crash. Where it can't be made, the disk
        // may be full, and what comes now may be what makes room.
        let _ = self.make_workspace();
        Ok(())
    }

    /// The right to change the home, with nobody else in it.
    ///
    /// # Errors
    /// EROFS, EBUSY, EIO while the disk fails.
    pub(super) fn change_alone(&self) -> Result<Change<'_>> {
        self.begin_change()?;
        let change = self.put_paths_right().and_then(|()| self.home.change());
        let change = change.map_err(|error| {
            match self.is_shared && error.errno() == libc::EBUSY {
                true => Error::busy(format!(
                    "{error}. Beside it, the option shared allows snapshots, clones, imports and restores only"
                )),
                false => error,
            }
        })?;
        durable::sync_unflushed()?;
        Ok(change)
    }

    /// The right to change the home; with the option `shared`, also while a BoxLite runtime has it.
    ///
    /// # Errors
    /// EROFS, EBUSY, EIO while the disk fails.
    pub(super) fn change_beside(&self) -> Result<Change<'_>> {
        match self.is_shared {
            true => {
                self.begin_change()?;
                let mut change = self.home.change_shared()?;
                if !change.is_shared() && !self.has_right_paths() {
                    drop(change);
                    self.put_paths_right()?;
                    change = self.home.change_shared()?;
                }
                self.refuse_mounted_twice(&change)?;
                durable::sync_unflushed()?;
                Ok(change)
            }
            false => self.change_alone(),
        }
    }
}

impl Prepared<'_> {
    /// EBUSY where recovery would have to come first: beside a runtime, what a crash left can't be told
    /// from what BoxLite is doing.
    pub(super) fn refuse_unsettled(&self) -> Result<()> {
        let name = display_name(&self.record);
        let home = &self.store.home;
        self.refuse_pending()?;
        if home.box_dir(&self.record.id).join(UNRECORDED).exists() {
            return Err(self.unsettled());
        }
        let live = home.live_disk(&self.record.id);
        let Ok(meta) = std::fs::symlink_metadata(&live) else {
            if home.box_dir(&self.record.id).join("disks").is_dir() {
                return Err(Error::busy(format!(
                    "box {name} has no disk at this moment: BoxLite is replacing it, or never started the box; try again"
                )));
            }
            return Ok(());
        };
        if meta.nlink() > 1 {
            let layers = self.layers()?;
            let mut names = layers.names_of(FileId::of(&meta));
            if names.any(|name| matches!(name.role, Role::Base { .. })) {
                return Err(self.unsettled());
            }
        }
        Ok(())
    }

    fn unsettled(&self) -> Error {
        Error::busy(format!(
            "a change of box {} was cut off, and is undone once no BoxLite runtime has the home; end the program that has it open, and try again",
            display_name(&self.record)
        ))
    }

    /// EBUSY while BoxLite takes a snapshot of the box, or after it ended in the middle of one.
    pub(super) fn refuse_pending(&self) -> Result<()> {
        let marker = self.store.home.pending_marker(&self.record.id);
        match std::fs::symlink_metadata(&marker) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            _ => Err(Error::busy(format!(
                "BoxLite is taking a snapshot of box {}, or ended in the middle of one ({}); try again, or start BoxLite anew",
                display_name(&self.record),
                marker.display()
            ))),
        }
    }

    /// For a base without a row: BoxLite records one when its clone is done, and could not if we did.
    pub(super) fn cloned_just_now(&self, base: &Path) -> Error {
        Error::busy(format!(
            "box {} reads from {}, which has no row: BoxLite is cloning the box, or ended in the middle of that; try again, or end the program that has the home open",
            display_name(&self.record),
            base.display()
        ))
    }

    /// Moves `new` over the live disk, which is `old`. Beside a runtime only if it is still that one, and
    /// nobody began to use it: the two are exchanged, and exchanged back if what came out is another.
    ///
    /// A crash leaves the one or the other in place, and what came out in the workspace.
    pub(super) fn replace_live(&mut self, new: &Path, live: &Path, old: FileId) -> Result<()> {
        if !self.change.is_shared() {
            return self.store.replace(new, live);
        }
        self.change.begin_exclusive()?;
        self.refuse_pending()?;
        self.store.refuse_active(&self.record)?;
        let ours = FileId::at(new)?;
        exchange(new, live).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => self.replaced_just_now(),
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
        Err(self.replaced_just_now())
    }

    /// EBUSY beside a runtime for a disk of another size than the live one: BoxLite reads the size before it
    /// moves the disk away, and makes the next one as large.
    pub(super) fn refuse_other_size(&self, live: &Path, size: u64) -> Result<()> {
        let is_same = || Ok(Header::open(live)?.is_some_and(|header| header.virtual_size == size));
        if !self.change.is_shared() || is_same()? {
            return Ok(());
        }
        Err(Error::busy(format!(
            "the disk of box {} would get another size, which is not done while a BoxLite runtime has the home; end the program that has it open, or import under a new name",
            display_name(&self.record)
        )))
    }
}

/// renameat2(RENAME_EXCHANGE): each gets the other's name, in one step; ENOENT when one is not there.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(io::Error::from)
}
