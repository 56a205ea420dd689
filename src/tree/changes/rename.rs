//! rename: gives boxes and snapshots another name, and what is being made its final one.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::home::is_snapshot_name;
use crate::store::Source;
use crate::tree::nodes::names::{EXPORT, decode, exists, not_there};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::staging::aside::ASIDE_PREFIX;
use crate::tree::staging::caller::Caller;
use crate::tree::staging::staged_file::{Place, Role, StagedFile, role_of};
use crate::tree::staging::staging_area::{Child, StagedBox, What};
use crate::tree::{Tree, text};
use crate::{Error, Result};

/// renameat2's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Over whatever has the name.
    Replace,
    /// RENAME_NOREPLACE.
    Keep,
    /// RENAME_EXCHANGE, RENAME_WHITEOUT and others.
    Unsupported,
}

impl Tree {
    /// rename(2): gives a box or a snapshot another name, or a file being made its final one, which
    /// commits it when its data is complete.
    ///
    /// # Errors
    /// EXDEV where a copy means something (mv then makes one), EEXIST and ENOTEMPTY for a name that is
    /// taken, EBUSY, EPERM, EINVAL.
    pub fn rename(
        &self,
        caller: Caller,
        from: (u64, &OsStr),
        to: (u64, &OsStr),
        mode: RenameMode,
    ) -> Result<()> {
        if mode == RenameMode::Unsupported {
            return Err(Error::new(
                libc::EINVAL,
                "names can't be exchanged here; rename one after the other",
            ));
        }
        let (from_parent, to_parent) = (self.node_to_change(from.0)?, self.node_to_change(to.0)?);
        let from_name = text(from.1).map_err(|_| not_there())?;
        // Not EINVAL: that is a directory moved into itself, and mv says so.
        let to_name = text(to.1).map_err(|error| self.refuse(libc::EPERM, error.to_string()))?;
        if from_parent == to_parent && from_name == to_name {
            return Ok(());
        }
        let (from_parent, from_name) = self.change_aside(caller, from_parent, from_name);
        let (to_parent, to_name) = self.change_aside(caller, to_parent, to_name);
        let (from_name, to_name) = (from_name.as_ref(), to_name.as_ref());
        let from = (&from_parent, from_name);
        let to = (&to_parent, to_name);
        let is_loose = {
            let mut staging = self.staging.lock();
            staging.loose_file(caller, from.0, from.1).is_some()
        };
        let moved = if is_loose {
            self.rename_loose(caller, from, to, mode)?
        } else if from_parent == Node::Root && to_parent == Node::Root {
            self.rename_in_root(from_name, to_name)?
        } else {
            self.rename_staged(caller, from, to, mode)?
        };
        match moved {
            Moved::File(file) => self.settle(&file).inspect_err(|_| {
                if file.waits.load(Ordering::Relaxed) {
                    self.move_back(&file, from, to);
                }
            }),
            Moved::Other => {
                let id = {
                    let staging = self.staging.lock();
                    let of_root = staging.names.get(to.1).filter(|_| *to.0 == Node::Root);
                    of_root.cloned().or_else(|| staging.box_of(to.0))
                };
                id.into_iter().for_each(|id| self.note_names(&id));
                Ok(())
            }
            Moved::Nothing => self.rename_real(caller, from, to, mode),
        }
    }

    /// A file that is written outside of a box being made.
    fn rename_loose(
        &self,
        caller: Caller,
        (from_dir, from): (&Node, &str),
        (to_dir, to): (&Node, &str),
        mode: RenameMode,
    ) -> Result<Moved> {
        if from_dir != to_dir {
            return Err(Error::new(libc::EXDEV, "that is another place; copy it"));
        }
        let role = role_of(to_dir, to);
        match (to_dir, &role) {
            (Node::Root, Some(Role::NewBox)) => self
                .refuse_taken_box(to)
                .inspect_err(|_| self.staging.lock().fail_loose(from_dir, from))?,
            (_, None | Some(Role::Json | Role::Placeholder)) => {
                return Err(Error::new(
                    libc::EPERM,
                    format!("{to} can't be an archive's name"),
                ));
            }
            (Node::Box(_), Some(Role::BoxDisk)) if mode == RenameMode::Keep => {
                self.child(caller, to_dir, to)
                    .map_or(Ok(()), |_| Err(exists(to)))?;
            }
            _ => {}
        }
        let mut staging = self.staging.lock();
        if staging.is_written(to_dir, to)
            || (*to_dir == Node::Root
                && !to.starts_with(ASIDE_PREFIX)
                && staging.has_loose_file(to_dir, to))
        {
            return Err(exists(to));
        }
        let mut loose = staging
            .take_loose_file(caller, from_dir, from)
            .ok_or_else(not_there)?;
        let file = loose.file.clone();
        // gio opens what it is about to replace.
        let replaced = staging.take_loose_file(caller, to_dir, to);
        loose.name = to.to_owned();
        staging.files.push(loose);
        drop(staging);
        if let Some(replaced) = replaced {
            replaced.file.was_removed(to);
        }
        file.state.lock().place.name = to.to_owned();
        Ok(Moved::File(file))
    }

    /// Gives a waiting archive its old name back, after it could not become what the new name says.
    fn move_back(
        &self,
        file: &Arc<StagedFile>,
        (from_parent, from): (&Node, &str),
        (to_parent, to): (&Node, &str),
    ) {
        let mut staging = self.staging.lock();
        for loose in &mut staging.files {
            if Arc::ptr_eq(&loose.file, file) {
                loose.name = from.to_owned();
            }
        }
        if let Some(staged) = staging.boxes.get_mut(&file.box_id) {
            staged.move_child((to_parent, to), (from_parent, from));
        }
        drop(staging);
        file.state.lock().place = Place {
            parent: from_parent.clone(),
            name: from.to_owned(),
        };
    }

    /// A directory being made.
    fn rename_in_root(&self, from: &str, to: &str) -> Result<Moved> {
        let names = self.names()?;
        let mut staging = self.staging.lock();
        let Some(id) = staging.names.get(from).cloned() else {
            return Ok(Moved::Nothing);
        };
        decode(to)?;
        self.refuse_dotted(to)?;
        if names.id_of(to).is_some() || staging.names.contains_key(to) {
            return Err(exists(to));
        }
        staging.names.remove(from);
        staging.names.insert(to.to_owned(), id);
        Ok(Moved::Other)
    }

    fn rename_staged(
        &self,
        caller: Caller,
        (from_parent, from): (&Node, &str),
        (to_parent, to): (&Node, &str),
        mode: RenameMode,
    ) -> Result<Moved> {
        let mut staging = self.staging.lock();
        let to_box = staging.box_of(to_parent);
        let same_box = staging.box_of(from_parent) == to_box;
        let Some(staged) = staging.made_by(caller, from_parent) else {
            return Ok(Moved::Nothing);
        };
        if staged.child(from_parent, from).is_none() && staged.committed {
            return Ok(Moved::Nothing);
        }
        let child = staged.child(from_parent, from);
        let is_directory = child.is_some_and(|child| matches!(child.what, What::Directory));
        let is_kept = match child.map(|child| (&child.what, &child.node)) {
            Some((What::File(_), _)) => role_of(to_parent, to).is_some(),
            Some((What::Directory, Node::Snapshot(..))) => {
                matches!(to_parent, Node::Snapshots(_)) && is_snapshot_name(to)
            }
            Some((What::Directory, _)) => from == to && from_parent == to_parent,
            _ => Derived::named(to).is_some(),
        };
        if !is_kept {
            return Err(self.refuse(
                libc::EPERM,
                format!("{to} would not be kept: it is no part of a backup"),
            ));
        }
        if !same_box {
            return Err(Error::new(libc::EXDEV, "that is another box; copy it"));
        }
        // What is in the box by now is renamed in the box, for everybody.
        let is_there = |child: &Child| match (&child.what, &child.node) {
            (What::File(file), _) => file.is_there.load(Ordering::Relaxed),
            (What::Directory, Node::Snapshot(_, id)) => staged.arrived.contains(id),
            _ => false,
        };
        if staged.committed && child.is_some_and(is_there) {
            drop(staging);
            let (from, to) = ((from_parent, from), (to_parent, to));
            self.rename_real(caller, from, to, mode)?;
            let mut staging = self.staging.lock();
            let id = staging.box_of(from_parent);
            if let Some(staged) = id.and_then(|id| staging.boxes.get_mut(&id)) {
                staged.move_child(from, to);
            }
            return Ok(Moved::Other);
        }
        if let Some(taken) = staged.child(to_parent, to) {
            if mode == RenameMode::Keep {
                return Err(exists(to));
            }
            refuse_overwriting(taken, is_directory, staged, to)?;
        }
        let file = match child.map(|child| &child.what) {
            Some(What::File(file)) => Some(file.clone()),
            _ => None,
        };
        if !staged.move_child((from_parent, from), (to_parent, to)) {
            return Err(not_there());
        }
        drop(staging);
        let Some(file) = file else {
            return Ok(Moved::Other);
        };
        file.state.lock().place = Place {
            parent: to_parent.clone(),
            name: to.to_owned(),
        };
        Ok(Moved::File(file))
    }

    /// What exists. mv copies and removes after EXDEV, so that is only said where the copy makes what
    /// is meant.
    fn rename_real(
        &self,
        caller: Caller,
        (from_parent, from): (&Node, &str),
        (to_parent, to): (&Node, &str),
        mode: RenameMode,
    ) -> Result<()> {
        let node = self.child(caller, from_parent, from)?;
        let copied = || Err(Error::new(libc::EXDEV, "that is another place; copy it"));
        let into_staging = self.staging.lock().face(caller, to_parent).is_some();
        match (&node, to_parent) {
            (Node::Box(id), Node::Root) => {
                self.refuse_taken(caller, to_parent, to, mode)?;
                self.refuse_dotted(to)?;
                // Not EINVAL: that is a directory moved into itself, and mv says so.
                let name = decode(to).map_err(|error| self.refuse(libc::EPERM, error.to_string()))?;
                self.with_links(|| self.store.rename_box(id, &name))
            }
            (Node::Snapshot(id, snapshot), Node::Snapshots(other)) if id == other => {
                self.refuse_taken(caller, to_parent, to, mode)?;
                if !is_snapshot_name(to) {
                    let message = format!("{to:?} can't be a snapshot's name");
                    return Err(self.refuse(libc::EPERM, message));
                }
                self.with_links(|| self.store.rename_snapshot(id, snapshot, to))
            }
            (Node::Snapshot(..), Node::Root) => copied(),
            (Node::Export(_), Node::Root) if role_of(to_parent, to) == Some(Role::NewBox) => {
                copied()
            }
            (Node::Export(_), Node::Box(_)) if to == EXPORT => copied(),
            (
                Node::Export(_)
                | Node::BoxJson(_)
                | Node::SnapshotJson(..)
                | Node::Link(..)
                | Node::Snapshot(..),
                _,
            ) if into_staging => copied(),
            (Node::Snapshots(_), _) if into_staging => copied(),
            (Node::Export(Source::Live { .. } | Source::Snapshot { .. }), _) => {
                Err(self.refuse(
                    libc::EPERM,
                    format!("{from} stays; copy it to NEW.boxlite for a new box, or over another box's {EXPORT}"),
                ))
            }
            (Node::Snapshot(..) | Node::Box(_), _) => Err(self.refuse(
                libc::EPERM,
                format!("{from} can't go there: a snapshot stays with its box, and a box in the root; to make a new box of it, copy it into the root"),
            )),
            _ => Err(self.refuse(libc::EPERM, format!("{from} stays where it is"))),
        }
    }

    /// The errno of rename(2) for a name that is taken.
    fn refuse_taken(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
        mode: RenameMode,
    ) -> Result<()> {
        let Ok(node) = self.child(caller, parent, name) else {
            return Ok(());
        };
        let is_directory = matches!(node, Node::Box(_) | Node::Snapshot(..) | Node::Hidden);
        match (mode, is_directory) {
            (RenameMode::Keep, _) => Err(exists(name)),
            (_, true) => Err(Error::new(
                libc::ENOTEMPTY,
                format!("{name} is there already, and stays"),
            )),
            (_, false) => Err(Error::new(libc::ENOTDIR, format!("{name} is a file"))),
        }
    }
}

/// The errno of rename(2) for what can't take the place of something that is being made.
fn refuse_overwriting(
    taken: &Child,
    is_directory: bool,
    staged: &StagedBox,
    name: &str,
) -> Result<()> {
    match (&taken.what, is_directory) {
        (What::Directory, false) => Err(Error::new(libc::EISDIR, format!("{name} is a directory"))),
        (What::Directory, true) => staged.refuse_full(taken.node.ino(), name),
        (What::File(_) | What::Link(_), true) => {
            Err(Error::new(libc::ENOTDIR, format!("{name} is a file")))
        }
        _ => Ok(()),
    }
}

/// What a rename moved.
enum Moved {
    File(Arc<StagedFile>),
    Other,
    Nothing,
}
