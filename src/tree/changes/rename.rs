//! rename: gives boxes and snapshots another name, and what is being made its final one.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::home::{is_kept_id, is_snapshot_name};
use crate::process::Caller;
use crate::store::{self, Store};
use crate::tree::changes::checks::Checks;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, archive_stem, decode, exists, not_there, text};
use crate::tree::nodes::node::Node;
use crate::tree::reading::caller_view::CallerView;
use crate::tree::staging::commit::Committer;
use crate::tree::staging::role::{FileRole, StagedPlace, is_edit_temporary, role_of};
use crate::tree::staging::staged_file::StagedFile;
use crate::tree::staging::staged_rename::StagedRename;
use crate::tree::staging::staging_area::StagingArea;
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

/// A directory, and a name in it.
type NameIn<'n> = (&'n Node, &'n str);

/// What a rename moved.
enum Moved {
    File(Arc<StagedFile>),
    Other,
    Nothing,
}

/// Renames what exists and what is being made.
pub struct Renamer {
    store: Arc<Store>,
    view: Arc<CallerView>,
    staging: Arc<StagingArea>,
    checks: Arc<Checks>,
    committer: Arc<Committer>,
}

impl Renamer {
    /// Returns one for what callers see of a home.
    pub fn new(
        store: Arc<Store>,
        view: Arc<CallerView>,
        staging: Arc<StagingArea>,
        checks: Arc<Checks>,
        committer: Arc<Committer>,
    ) -> Renamer {
        Renamer {
            store,
            view,
            staging,
            checks,
            committer,
        }
    }

    /// Gives a box or a snapshot another name, or a file being made its final one, which commits it
    /// when its data is complete.
    ///
    /// # Errors
    /// EXDEV where a copy means something (mv then makes one), EEXIST and ENOTEMPTY for a name that
    /// is taken, EBUSY, EPERM, EINVAL.
    pub fn rename(
        &self,
        caller: Caller,
        (from_parent, from_name): (Node, &OsStr),
        (to_parent, to_name): (Node, &OsStr),
        mode: RenameMode,
    ) -> Result<()> {
        let from_name = text(from_name).map_err(|_| not_there())?;
        // Not EINVAL: that is a directory moved into itself, and mv says so.
        let to_name =
            text(to_name).map_err(|error| self.checks.refuse(libc::EPERM, error.to_string()))?;
        if from_parent == to_parent && from_name == to_name {
            return Ok(());
        }
        let (from_parent, from_name) = self.staging.change_aside(caller, from_parent, from_name);
        let (to_parent, to_name) = self.staging.change_aside(caller, to_parent, to_name);
        let from = (&from_parent, from_name.as_ref());
        let to = (&to_parent, to_name.as_ref());
        let loose = &self.staging.loose;
        let made = if from.0 == &Node::Root {
            loose.box_of(caller, from.1)
        } else {
            None
        };
        if let Some(box_id) = made {
            return self.rename_made_box(caller, &box_id, to, mode);
        }
        let moved = if loose.node_for(caller, from.0, from.1).is_some() {
            Moved::File(self.rename_loose(caller, from, to, mode)?)
        } else if from_parent == Node::Root && to_parent == Node::Root {
            self.rename_in_root(from.1, to.1)?
        } else {
            self.rename_staged(caller, from, to, mode)?
        };
        match moved {
            Moved::File(file) => self.committer.commit_if_ready(&file).inspect_err(|_| {
                if file.is_waiting() {
                    self.move_back(&file, from, to);
                }
            }),
            Moved::Other => {
                if let Some(id) = self.staged_box_at(to) {
                    self.committer.waiting().note_names(&id);
                }
                Ok(())
            }
            Moved::Nothing => self.rename_real(caller, from, to, mode),
        }
    }

    /// Renames the box that an archive in the root has become, by the archive's new name: programs
    /// write a file and then give it its final name.
    fn rename_made_box(
        &self,
        caller: Caller,
        box_id: &str,
        (to_dir, to): NameIn<'_>,
        mode: RenameMode,
    ) -> Result<()> {
        let stem = archive_stem(to).filter(|_| *to_dir == Node::Root);
        let Some(stem) = stem else {
            let message = "the archive has become a box; rename the box".to_owned();
            return Err(self.checks.refuse(libc::EPERM, message));
        };
        self.rename_box(caller, box_id, stem, mode)
    }

    fn rename_box(&self, caller: Caller, id: &str, to: &str, mode: RenameMode) -> Result<()> {
        self.refuse_taken_snapshot_name(caller, &Node::Root, to, mode)?;
        self.checks.refuse_dotted(to)?;
        // Not EINVAL: that is a directory moved into itself, and mv says so.
        let name =
            decode(to).map_err(|error| self.checks.refuse(libc::EPERM, error.to_string()))?;
        let boxes = &self.view.home.boxes;
        boxes.change(id, || store::rename_box(&self.store, id, &name))?;
        self.staging.loose.forget_box(id);
        Ok(())
    }

    /// Brings back a removed box as `to`.
    fn have_back_box(&self, caller: Caller, id: &str, to: &str, mode: RenameMode) -> Result<()> {
        self.refuse_taken_snapshot_name(caller, &Node::Root, to, mode)?;
        self.checks.refuse_dotted(to)?;
        let name =
            decode(to).map_err(|error| self.checks.refuse(libc::EPERM, error.to_string()))?;
        let boxes = &self.view.home.boxes;
        boxes.change(id, || store::have_back_box(&self.store, id, &name))
    }

    /// Makes what an entry keeps a snapshot of its box.
    fn have_back_snapshot(
        &self,
        caller: Caller,
        (id, box_id): (&str, &str),
        to: &str,
        mode: RenameMode,
    ) -> Result<()> {
        let parent = Node::Snapshots(box_id.to_owned());
        self.refuse_taken_snapshot_name(caller, &parent, to, mode)?;
        if !is_snapshot_name(to) {
            let message = format!("{to:?} can't be a snapshot's name");
            return Err(self.checks.refuse(libc::EPERM, message));
        }
        let boxes = &self.view.home.boxes;
        boxes.change(id, || {
            store::have_back_snapshot(&self.store, id, box_id, to)
        })
    }

    /// Returns the box being made that an entry is, or is in.
    fn staged_box_at(&self, (parent, name): NameIn<'_>) -> Option<String> {
        let boxes = &self.staging.boxes;
        let of_root = if *parent == Node::Root {
            boxes.id_of(name)
        } else {
            None
        };
        of_root.or_else(|| boxes.box_of(parent))
    }

    /// Renames a file that is written outside of a box being made.
    fn rename_loose(
        &self,
        caller: Caller,
        (from_dir, from): NameIn<'_>,
        (to_dir, to): NameIn<'_>,
        mode: RenameMode,
    ) -> Result<Arc<StagedFile>> {
        if from_dir != to_dir {
            return Err(Error::new(libc::EXDEV, "that is another place; copy it"));
        }
        let loose = &self.staging.loose;
        let is_edit = loose.is_edit(caller, from_dir, from);
        match (to_dir, role_of(to_dir, to)) {
            _ if is_edit => self.refuse_edit_name(caller, (to_dir, to), mode)?,
            (Node::Root, Some(FileRole::NewBox)) => {
                let taken = self.checks.refuse_taken_box(to);
                taken.inspect_err(|_| loose.fail(caller, from_dir, from))?;
            }
            (_, None | Some(FileRole::Json | FileRole::Placeholder)) => {
                return Err(Error::new(
                    libc::EPERM,
                    format!("{to} can't be an archive's name"),
                ));
            }
            (Node::Box(_), Some(FileRole::BoxDisk))
                if mode == RenameMode::Keep && self.view.child(caller, to_dir, to).is_ok() =>
            {
                return Err(exists(to));
            }
            _ => {}
        }
        let (file, replaced) = loose.rename(caller, from_dir, (from, to))?;
        if let Some(replaced) = replaced {
            replaced.was_removed(to);
        }
        file.state().place.name = to.to_owned();
        Ok(file)
    }

    /// Refuses a name that an edit of box.json can't have.
    fn refuse_edit_name(
        &self,
        caller: Caller,
        (dir, name): NameIn<'_>,
        mode: RenameMode,
    ) -> Result<()> {
        if name == BOX_JSON
            && mode == RenameMode::Keep
            && self.view.child(caller, dir, name).is_ok()
        {
            return Err(exists(name));
        }
        if name == BOX_JSON || is_edit_temporary(name) {
            return Ok(());
        }
        let message = format!("{name} would not be kept: what is written here is a {BOX_JSON}");
        Err(self.checks.refuse(libc::EPERM, message))
    }

    /// Gives a waiting archive its old name back, after it could not become what the new name says.
    fn move_back(&self, file: &Arc<StagedFile>, from: NameIn<'_>, to: NameIn<'_>) {
        self.staging.loose.rename_back(file, from.1);
        let boxes = &self.staging.boxes;
        boxes.with(&file.box_id, |staged| staged.move_child(to, from));
        file.state().place = place(from);
    }

    /// Renames a box being made.
    fn rename_in_root(&self, from: &str, to: &str) -> Result<Moved> {
        let names = self.view.home.boxes.names()?;
        let check = || {
            decode(to)?;
            self.checks.refuse_dotted(to)?;
            match names.id_of(to) {
                Some(_) => Err(exists(to)),
                None => Ok(()),
            }
        };
        // A box that exists is seen in place of one of its name that is being made.
        if names.id_of(from).is_none() && self.staging.boxes.rename(from, to, check)? {
            Ok(Moved::Other)
        } else {
            Ok(Moved::Nothing)
        }
    }

    /// Renames what is in a box being made.
    fn rename_staged(
        &self,
        caller: Caller,
        from: NameIn<'_>,
        to: NameIn<'_>,
        mode: RenameMode,
    ) -> Result<Moved> {
        let boxes = &self.staging.boxes;
        let replaces = mode != RenameMode::Keep;
        match boxes.rename_child(caller, from, to, replaces)? {
            StagedRename::NotStaged => Ok(Moved::Nothing),
            StagedRename::Other => Ok(Moved::Other),
            StagedRename::File(file) => {
                file.state().place = place(to);
                Ok(Moved::File(file))
            }
            StagedRename::IsInBox => {
                self.rename_real(caller, from, to, mode)?;
                if let Some(id) = boxes.box_of(from.0) {
                    boxes.with(&id, |staged| staged.move_child(from, to));
                }
                Ok(Moved::Other)
            }
        }
    }

    /// Renames what exists. mv copies and removes after EXDEV, so that is only said where the copy
    /// makes what is meant.
    fn rename_real(
        &self,
        caller: Caller,
        (from_parent, from): NameIn<'_>,
        (to_parent, to): NameIn<'_>,
        mode: RenameMode,
    ) -> Result<()> {
        let node = self.view.child(caller, from_parent, from)?;
        let copied = || Err(Error::new(libc::EXDEV, "that is another place; copy it"));
        let is_into_staging = self.staging.boxes.is_view_for(caller, to_parent);
        let refuse = |message: String| self.checks.refuse(libc::EPERM, message);
        match (&node, to_parent) {
            (Node::Box(id), Node::Root) if is_kept_id(id) => {
                self.have_back_box(caller, id, to, mode)
            }
            (Node::Box(id), Node::Snapshots(of)) if is_kept_id(id) => {
                self.have_back_snapshot(caller, (id, of), to, mode)
            }
            (Node::Snapshot(id, _) | Node::Snapshots(id), _) if is_kept_id(id) => {
                Err(refuse(format!("{from} stays with what is kept; copy it")))
            }
            (Node::Box(id), Node::Root) => self.rename_box(caller, id, to, mode),
            (Node::Snapshot(id, snapshot), Node::Snapshots(other)) if id == other => {
                self.refuse_taken_snapshot_name(caller, to_parent, to, mode)?;
                if !is_snapshot_name(to) {
                    return Err(refuse(format!(
                        "{to:?} can't be a snapshot's name: BoxLite accepts 1 to 255 bytes with no leading dot and no / or \\"
                    )));
                }
                let boxes = &self.view.home.boxes;
                boxes.change(id, || store::rename_snapshot(&self.store, id, snapshot, to))
            }
            (Node::Snapshot(..), Node::Root) => copied(),
            (Node::Export(_), Node::Root) if role_of(to_parent, to) == Some(FileRole::NewBox) => {
                copied()
            }
            (Node::Export(_), Node::Box(_)) if to == EXPORT => copied(),
            (
                Node::Export(_)
                | Node::BoxJson(_)
                | Node::SnapshotJson(..)
                | Node::Link(..)
                | Node::Snapshot(..)
                | Node::Snapshots(_),
                _,
            ) if is_into_staging => copied(),
            (Node::Export(_), _) => Err(refuse(format!(
                "{from} can't be moved; copy it to NEW.boxlite for a new box, or over another box's {EXPORT}"
            ))),
            (Node::Snapshot(..) | Node::Box(_), _) => Err(refuse(format!(
                "{from} can't go there: a snapshot stays with its box, and a box in the root; to make a new box of it, copy it into the root"
            ))),
            _ => Err(refuse(format!(
                "{from} can't be moved: it belongs to its box; move the box itself, or a directory in its snapshots"
            ))),
        }
    }

    /// Refuses a name that is taken, with the errno of rename(2).
    fn refuse_taken_snapshot_name(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
        mode: RenameMode,
    ) -> Result<()> {
        let Ok(node) = self.view.child(caller, parent, name) else {
            return Ok(());
        };
        if mode == RenameMode::Keep {
            return Err(exists(name));
        }
        if matches!(node, Node::Box(_) | Node::Snapshot(..) | Node::Hidden) {
            let message = format!("{name} exists, and a rename does not replace it");
            return Err(Error::new(libc::ENOTEMPTY, message));
        }
        Err(Error::new(libc::ENOTDIR, format!("{name} is a file")))
    }
}

fn place((parent, name): NameIn<'_>) -> StagedPlace {
    StagedPlace {
        parent: parent.clone(),
        name: name.to_owned(),
    }
}
