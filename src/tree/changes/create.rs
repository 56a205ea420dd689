//! Creates files, and sets attributes of those being made.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::exports::Source;
use crate::home::box_id;
use crate::process::Caller;
use crate::tree::changes::checks::Checks;
use crate::tree::changes::overwrite::Overwriter;
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::names::{ARCHIVE_SUFFIX, BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS, text};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::reading::open_files::OpenFiles;
use crate::tree::staging::commit::Committer;
use crate::tree::staging::program::Program;
use crate::tree::staging::role::{FileRole, StagedPlace, role_of};
use crate::tree::staging::staged_box::Staged;
use crate::tree::staging::staged_file::StagedFile;
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// What setattr is asked to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// The size in bytes: truncate(2), or O_TRUNC, which comes without a handle.
    pub size: Option<u64>,
}

/// Creates files.
pub struct Creator {
    boxes: Arc<Boxes>,
    staging: Arc<StagingArea>,
    checks: Arc<Checks>,
    overwriter: Arc<Overwriter>,
}

impl Creator {
    /// Returns one for a home.
    pub fn new(
        boxes: Arc<Boxes>,
        staging: Arc<StagingArea>,
        checks: Arc<Checks>,
        overwriter: Arc<Overwriter>,
    ) -> Creator {
        Creator {
            boxes,
            staging,
            checks,
            overwriter,
        }
    }

    /// Creates a file (creat(2)): an archive in the root, or a file of a box being made.
    ///
    /// # Errors
    /// EEXIST, EPERM for what can't become anything, and those of an import or a restore.
    pub fn create(
        &self,
        caller: Caller,
        parent: Node,
        name: &OsStr,
        mode: u32,
    ) -> Result<Arc<StagedFile>> {
        let (parent, name) = self.staging.change_aside(caller, parent, text(name)?);
        let name = name.as_ref();
        if Program::of(caller).has_unsupported_partial_dir() {
            self.checks.fail_made(caller, &parent);
            return Err(self.checks.refuse(
                libc::EPERM,
                format!("{name}: rsync can't put files aside in a directory of that name here; leave --partial-dir away"),
            ));
        }
        let file = match &parent {
            Node::Root => self.create_in_root(caller, name)?,
            _ => self.create_in_box(caller, &parent, name, mode)?,
        };
        self.staging.was_made(caller, &parent, name);
        file.state().open = 1;
        Ok(file)
    }

    fn create_in_root(&self, caller: Caller, name: &str) -> Result<Arc<StagedFile>> {
        let Some(role) = role_of(&Node::Root, name) else {
            return Err(self.checks.refuse(
                libc::EPERM,
                format!("{name}: only archives can be put here; call it NEW{ARCHIVE_SUFFIX} to import it as box NEW"),
            ));
        };
        if role == FileRole::NewBox {
            self.checks.refuse_taken_box(name)?;
        }
        self.checks.refuse_new_box(name)?;
        let place = StagedPlace {
            parent: Node::Root,
            name: name.to_owned(),
        };
        let file = StagedFile::new(self.staging.new_node(), box_id()?, place, caller);
        let loose = &self.staging.loose;
        loose.add(caller, &Node::Root, name, file.clone())?;
        Ok(file)
    }

    fn create_in_box(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
        mode: u32,
    ) -> Result<Arc<StagedFile>> {
        let boxes = &self.staging.boxes;
        let id = boxes.box_of(parent).unwrap_or_default();
        if boxes.with_made_by(caller, parent, |_| ()).is_some() {
            self.refuse_file(caller, parent, name, mode)?;
        }
        let node = match parent {
            Node::Box(_) if name == EXPORT => Node::Export(Source::Live { box_id: id.clone() }),
            Node::Snapshot(_, snapshot) if name == EXPORT => Node::Export(Source::Snapshot {
                box_id: id.clone(),
                snapshot_id: snapshot.clone(),
            }),
            _ => self.staging.new_node(),
        };
        let place = StagedPlace {
            parent: parent.clone(),
            name: name.to_owned(),
        };
        if self.replaces_disk(parent, name) {
            return self.overwriter.create(caller, parent, name);
        }
        if name == EXPORT {
            let checked = self.checks.refuse_new_box(name);
            checked.inspect_err(|_| self.checks.fail_made(caller, parent))?;
        }
        let file = StagedFile::new(node, id, place, caller);
        match boxes.make(caller, parent, name, Staged::File(file.clone()))? {
            Some(_) => Ok(file),
            None => self.overwriter.create(caller, parent, name),
        }
    }

    /// Returns whether a name stands for the disk of a box, or of a snapshot, that exists.
    fn replaces_disk(&self, parent: &Node, name: &str) -> bool {
        let is_disk = matches!(
            role_of(parent, name),
            Some(FileRole::BoxDisk | FileRole::SnapshotDisk | FileRole::TemporaryArchive)
        );
        is_disk
            && match parent {
                Node::Box(id) => !self.staging.boxes.is_unfinished(id),
                Node::Snapshot(id, snapshot) => self.boxes.snapshot(id, snapshot).is_ok(),
                _ => false,
            }
    }

    /// Refuses a file in a box or a snapshot being made whose bytes would not be kept.
    fn refuse_file(&self, caller: Caller, parent: &Node, name: &str, mode: u32) -> Result<()> {
        let boxes = &self.staging.boxes;
        let is_refused = boxes.with_made_by(caller, parent, |staged| {
            staged.refused.contains(&parent.ino())
        });
        if role_of(parent, name).is_some() && is_refused != Some(true) {
            return Ok(());
        }
        let derived = Derived::named(name);
        // tar makes an empty file that none may open where a link will be, and a link in its place
        // at its end.
        if derived.is_some() && mode & 0o777 == 0 {
            return Ok(());
        }
        // A whole box is copied to where a snapshot was expected.
        if matches!(parent, Node::Snapshot(..)) && name == BOX_JSON {
            boxes.with_made_by(caller, parent, |staged| staged.refused.insert(parent.ino()));
        }
        self.checks.fail_made(caller, parent);
        let message = match derived {
            Some(_) => format!(
                "{name}: it comes with {EXPORT}; copy without following links (cp -r, not cp -rL; \
                 copytree(…, symlinks=True))"
            ),
            None => format!(
                "{name} would not be kept: a box is made of {EXPORT}, box.json and {SNAPSHOTS}, or of \
                 an archive that is copied to NEW{ARCHIVE_SUFFIX}"
            ),
        };
        Err(self.checks.refuse(libc::EPERM, message))
    }

    /// Returns the description of a box, or a snapshot, that this caller has made, open to bring
    /// that of the backup it copies. It is checked to be one, and changes nothing but the time of a
    /// snapshot.
    pub fn description(&self, caller: Caller, node: &Node) -> Option<Arc<StagedFile>> {
        let (parent, name) = match node {
            Node::BoxJson(id) => (Node::Box(id.clone()), BOX_JSON),
            Node::SnapshotJson(id, snapshot) => {
                (Node::Snapshot(id.clone(), snapshot.clone()), SNAPSHOT_JSON)
            }
            _ => return None,
        };
        let boxes = &self.staging.boxes;
        let id = boxes.with_made_by(caller, &parent, |staged| staged.id.clone())?;
        let place = StagedPlace {
            parent,
            name: name.to_owned(),
        };
        let file = StagedFile::new(node.clone(), id, place, caller);
        file.state().open = 1;
        Some(file)
    }

    /// Opens a file being made for writing; `flags` are open(2)'s.
    ///
    /// # Errors
    /// EPERM for reading, and for adding to it.
    pub fn open(&self, file: &StagedFile, writes: bool, flags: i32) -> Result<()> {
        let mut state = file.state();
        let name = &state.place.name;
        if !writes {
            let message = format!(
                "{name} has not become a box yet and can't be read; wait for that, or rename it to NAME.boxlite"
            );
            drop(state);
            return Err(self.checks.refuse(libc::EPERM, message));
        }
        if flags & libc::O_APPEND != 0 || file.is_committed() {
            let message = format!("{name} can't be appended to; write a whole archive");
            drop(state);
            return Err(self.checks.refuse(libc::EPERM, message));
        }
        state.open += 1;
        Ok(())
    }

    /// Sets attributes. What copy tools set on what they make is accepted and dropped; the
    /// attributes of what exists follow from the home.
    ///
    /// # Errors
    /// EPERM on what exists, EINVAL for a size that cuts a file, and those of a commit.
    pub fn set_attr(
        &self,
        (open, committer): (&OpenFiles, &Committer),
        caller: Caller,
        (node, handle): (&Node, Option<u64>),
        set: SetAttr,
    ) -> Result<()> {
        let is_cut = set.size.is_some() && matches!(node, Node::BoxJson(_));
        let is_made = self.staging.loose.contains(node)
            || self
                .staging
                .boxes
                .with_made_by(caller, node, |_| ())
                .is_some();
        let file = if is_made {
            self.staging.file_at(node)
        } else {
            None
        };
        let file = file
            .or_else(|| open.written_by(handle?, node))
            .or_else(|| open.cut_by(caller, node).filter(|_| is_cut));
        // O_TRUNC comes without a handle and says nothing: an archive counts once it is complete.
        let says_nothing = handle.is_none() && matches!(set.size, None | Some(0));
        let is_writer = says_nothing && !is_cut && self.overwriter.is_writer(caller, node);
        if !is_made && file.is_none() && !is_writer {
            return Err(Error::new(
                libc::EPERM,
                "modes, owners, times and sizes follow from the home; they can't be set here",
            ));
        }
        match (&file, set.size) {
            (Some(file), Some(size)) => {
                file.resize(size)?;
                committer.check_edit(file)
            }
            // `touch` tries again to make what an archive is for.
            (Some(file), None) if file.is_waiting() => committer.commit_if_ready(file),
            (None, Some(1..)) => Err(self.checks.refuse(
                libc::EPERM,
                "sizes follow from the home; they can't be set here",
            )),
            _ => Ok(()),
        }
    }
}
