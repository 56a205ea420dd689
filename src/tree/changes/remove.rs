//! rmdir and unlink: a snapshot is deleted by its directory, a box by removing all of its files and
//! then its directory, and what is being made is taken back.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::exports::Source;
use crate::home::is_kept_id;
use crate::process::Caller;
use crate::store::{self, Store};
use crate::tree::changes::checks::refuse_waiting_copies;
use crate::tree::nodes::kernel_view::KernelView;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS, not_there, text};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::nodes::refusal::refuse;
use crate::tree::reading::caller_view::CallerView;
use crate::tree::staging::caller_history::{CallerHistory, SnapshotRemoval};
use crate::tree::staging::program::Program;
use crate::tree::staging::receiver::Receiver;
use crate::tree::staging::staged_box::{Staged, StagedChild};
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// Removes what exists and what is being made.
pub struct Remover {
    store: Arc<Store>,
    kernel: Arc<KernelView>,
    view: Arc<CallerView>,
    staging: Arc<StagingArea>,
    history: Arc<CallerHistory>,
}

impl Remover {
    /// Returns one for what callers see of a home.
    pub fn new(
        store: Arc<Store>,
        kernel: Arc<KernelView>,
        view: Arc<CallerView>,
        staging: Arc<StagingArea>,
        history: Arc<CallerHistory>,
    ) -> Remover {
        Remover {
            store,
            kernel,
            view,
            staging,
            history,
        }
    }

    /// Removes a directory (rmdir(2)). Under `snapshots` that deletes a snapshot; a box goes only
    /// for a caller that has removed all that is in it before.
    ///
    /// # Errors
    /// ENOTEMPTY for a box, EBUSY, ENOENT, EPERM.
    pub fn directory(&self, caller: Caller, parent: &Node, name: &OsStr) -> Result<()> {
        let name = text(name).map_err(|_| not_there())?;
        if self.staging.remove_aside(parent, name)? {
            return Ok(());
        }
        if self.remove_staged(caller, parent, name)? {
            return Ok(());
        }
        match self.view.child(caller, parent, name)? {
            Node::Snapshot(id, snapshot) => self.remove_snapshot(caller, &id, &snapshot, name),
            Node::Snapshots(id) => self.remove_snapshots_dir(caller, &id),
            Node::Box(id) => self.remove_box(caller, &id, name),
            Node::Hidden | Node::Undo => Err(Error::new(libc::EPERM, ".boxlite can't be removed")),
            Node::View | Node::ViewOf(_) | Node::ViewSnapshots(_) => Err(Error::new(
                libc::EPERM,
                "the view can't be removed; it goes with its box or snapshot",
            )),
            _ => Err(Error::new(libc::ENOTDIR, "that is not a directory")),
        }
    }

    /// Removes an empty directory that was being made; false when it is not one.
    fn remove_staged(&self, caller: Caller, parent: &Node, name: &str) -> Result<bool> {
        let boxes = &self.staging.boxes;
        if *parent == Node::Root {
            let exists = self.view.home.boxes.names()?.id_of(name).is_some();
            return if exists {
                Ok(false)
            } else {
                boxes.remove(name)
            };
        }
        boxes.end_view_for(caller, parent);
        boxes.remove_directory(caller, parent, name)
    }

    /// Deletes a snapshot at once, unless the whole box is being removed: then when that is.
    fn remove_snapshot(&self, caller: Caller, id: &str, snapshot: &str, name: &str) -> Result<()> {
        // It may be mv, which makes room for what it brings.
        refuse_unseen(caller).map_err(|error| {
            let message = format!("snapshot {name}: {error}");
            refuse(&self.store, error.errno(), message)
        })?;
        let history = &self.history;
        match history.removal_of_snapshot(caller, id, (snapshot, name), BOX_JSON) {
            SnapshotRemoval::Refused => {
                return Err(refuse(
                    &self.store,
                    libc::EPERM,
                    format!(
                        "{name}: the same process tried to remove the box's files, so its snapshots stay; use rmdir on the snapshot alone"
                    ),
                ));
            }
            SnapshotRemoval::Unseen => {
                let message = format!(
                    "snapshot {name} was taken or renamed since the removal of its box began, so it stays; remove the box again"
                );
                return Err(refuse(&self.store, libc::ENOTEMPTY, message));
            }
            SnapshotRemoval::WithBox => {
                let directory = Node::Snapshot(id.to_owned(), snapshot.to_owned());
                self.refuse_left_files(caller, &directory, name)?;
                history.remove_with_box(caller, id, (snapshot, name));
                self.kernel.raise_generation(&directory);
                return Ok(());
            }
            SnapshotRemoval::Now if is_kept_id(id) => {
                return Err(refuse(
                    &self.store,
                    libc::EPERM,
                    format!("{name}: what is kept stays as it is; rm -r on all of it ends that"),
                ));
            }
            SnapshotRemoval::Now => {}
        }
        self.refuse_left_export(caller, id, snapshot, name)?;
        let is_it = |source: &Source| matches!(source, Source::Snapshot { box_id, snapshot_id } if box_id == id && snapshot_id == snapshot);
        refuse_waiting_copies(&self.store, &self.staging, is_it)?;
        let boxes = &self.view.home.boxes;
        boxes.change(id, || store::remove_snapshot(&self.store, id, snapshot))
    }

    /// Refuses a process that removed other files of a snapshot and not its export (`find ! -name
    /// export.boxlite -delete`, a `tar --remove-files` that could not read it), and programs that
    /// copy: mv, tar and pax call rmdir on the directory that they are about to replace, and expect
    /// it to fail. `rmdir` alone deletes a snapshot.
    fn refuse_left_export(
        &self,
        caller: Caller,
        id: &str,
        snapshot: &str,
        name: &str,
    ) -> Result<()> {
        let directory = Node::Snapshot(id.to_owned(), snapshot.to_owned());
        let (has_begun, is_emptied) = self.history.removed_in(caller, &directory, EXPORT);
        if is_emptied || !(has_begun || Program::of(caller).copies()) {
            return Ok(());
        }
        Err(refuse(
            &self.store,
            libc::ENOTEMPTY,
            format!(
                "{name} is a snapshot, with its {EXPORT} in it; rmdir alone, or rm -r, deletes it"
            ),
        ))
    }

    /// Refuses a process that removes a whole box and left files of this snapshot: it was told not to
    /// remove them, or could not read them.
    fn refuse_left_files(&self, caller: Caller, snapshot: &Node, name: &str) -> Result<()> {
        if self.view.list(caller, snapshot)?.is_empty() {
            return Ok(());
        }
        let message = format!(
            "snapshot {name} is not empty: not all of its files were removed, so it stays, and its box as well"
        );
        Err(refuse(&self.store, libc::ENOTEMPTY, message))
    }

    /// Hides `snapshots`, where it is empty, from the caller that removes it. That is a step of
    /// removing the box, for file managers the first, and nothing if the rest never comes.
    fn remove_snapshots_dir(&self, caller: Caller, id: &str) -> Result<()> {
        let names = self.view.home.boxes.names()?;
        let seen = self.history.seen_by(caller, id).unwrap_or_default();
        let mut snapshots = names.catalog().snapshots_of(id).iter();
        if snapshots.any(|snapshot| !seen.snapshots.contains_key(&snapshot.id)) {
            return Err(Error::new(libc::ENOTEMPTY, "there are snapshots in it"));
        }
        self.hide(caller, &Node::Box(id.to_owned()), id, SNAPSHOTS)?;
        self.kernel
            .raise_generation(&Node::Snapshots(id.to_owned()));
        Ok(())
    }

    /// Removes a box for a caller that has removed all that is in it.
    fn remove_box(&self, caller: Caller, id: &str, name: &str) -> Result<()> {
        let node = Node::Box(id.to_owned());
        let full = || {
            let message = format!("{name} is a box; rm -r deletes it");
            Error::new(libc::ENOTEMPTY, message)
        };
        if !self.history.has_removed(caller, &node, BOX_JSON) {
            return Err(full());
        }
        let seen = self.history.seen_by(caller, id).ok_or_else(full)?;
        if !self.view.list(caller, &node)?.is_empty() {
            return Err(full());
        }
        let is_of_it = |source: &Source| source.box_id() == id;
        refuse_waiting_copies(&self.store, &self.staging, is_of_it)?;
        let boxes = &self.view.home.boxes;
        boxes.change(id, || {
            if is_kept_id(id) {
                store::drop_kept(&self.store, id)
            } else {
                store::remove_box(&self.store, id, &seen)
            }
        })?;
        // The box may be had back, and the kernel takes the removed directory for dead.
        self.kernel.raise_generation(&node);
        self.staging.loose.forget_box(id);
        self.history.forget(id);
        Ok(())
    }

    /// Removes a file (unlink(2)): takes back what is being made. A file of a box that exists is
    /// hidden from the caller alone: a step of removing the box, and nothing if the rest never
    /// comes. `receiver` wrote what is taken back.
    ///
    /// # Errors
    /// EBUSY when the box can't be removed now, EPERM for what stays, ENOENT.
    pub fn file(
        &self,
        receiver: &Receiver,
        caller: Caller,
        parent: Node,
        name: &OsStr,
    ) -> Result<()> {
        let name = text(name).map_err(|_| not_there())?;
        let (parent, name) = self.staging.change_aside(caller, parent, name);
        let name = name.as_ref();
        let is_of_box = matches!(name, BOX_JSON | EXPORT | SNAPSHOT_JSON);
        if (is_of_box || Derived::named(name).is_some())
            && !self.is_placeholder(caller, &parent, name)
        {
            self.staging.boxes.end_view_for(caller, &parent);
        }
        if parent == Node::Root && self.staging.loose.box_of(caller, name).is_some() {
            let message = format!("{name} has become a box; rm -r on the box deletes it");
            return Err(refuse(&self.store, libc::EPERM, message));
        }
        match self.staging.take(caller, &parent, name)? {
            Some(Staged::File(file)) => {
                receiver.log_unfinished(&file);
                file.was_removed(name);
                let is_in_place = (file.is_over_export() && name == EXPORT)
                    || (file.is_edit() && name == BOX_JSON);
                if !is_in_place {
                    return Ok(());
                }
                // The name is that of the box's own file, which the same caller may have removed
                // before.
                match self.remove_real(caller, &parent, name) {
                    Err(error) if error.errno() == libc::ENOENT => Ok(()),
                    result => result,
                }
            }
            Some(_) => Ok(()),
            None => self.remove_real(caller, &parent, name),
        }
    }

    /// Returns whether a name is an empty file: tar makes one where a link will be, and removes it
    /// at its end.
    fn is_placeholder(&self, caller: Caller, parent: &Node, name: &str) -> bool {
        let boxes = &self.staging.boxes;
        let is_empty = boxes.with_view_for(caller, parent, |staged| {
            let file = staged.child(parent, name).and_then(StagedChild::file);
            file.is_some_and(|file| file.size() == 0)
        });
        is_empty == Some(true)
    }

    /// Refuses at the first file what would be refused at the directory, when it is too late.
    fn remove_real(&self, caller: Caller, parent: &Node, name: &str) -> Result<()> {
        let node = self.view.child(caller, parent, name)?;
        if let Node::Export(source) = &node {
            self.refuse_lone_export(caller, source, name)?;
        }
        let id = match (&node, parent) {
            (Node::BoxJson(id) | Node::SnapshotJson(id, _), Node::Box(_) | Node::Snapshot(..)) => {
                id.clone()
            }
            (Node::Why(id), _) => id.clone(),
            (Node::Export(source) | Node::Link(_, source), _) => source.box_id().to_owned(),
            _ => {
                return Err(refuse(
                    &self.store,
                    libc::EPERM,
                    format!(
                        "{name} can't be removed; files in .boxlite go with the box that they belong to"
                    ),
                ));
            }
        };
        self.hide(caller, parent, &id, name)
    }

    /// Refuses `rm` of an export alone: it comes back when that rm has ended, whatever it said.
    fn refuse_lone_export(&self, caller: Caller, source: &Source, name: &str) -> Result<()> {
        if !Program::of(caller).removes_only(name) {
            return Ok(());
        }
        let which = self.store.exports().disks.describe(source);
        let how = match source {
            Source::Live { .. } => "rm -r on its directory deletes the box",
            Source::Snapshot { .. } => "rmdir on its directory deletes the snapshot",
        };
        let message = format!("{name}: {which} always has its export; {how}");
        Err(refuse(&self.store, libc::EPERM, message))
    }

    /// Hides a name in the box with this id from the caller, unless the box can't be removed now. That
    /// is asked of the home only at the caller's first file. The step that removes something asks
    /// again.
    fn hide(&self, caller: Caller, dir: &Node, id: &str, name: &str) -> Result<()> {
        let unready = refuse_unseen(caller)
            .and_then(|()| self.refuse_written(id))
            .and_then(|()| {
                refuse_waiting_copies(&self.store, &self.staging, |source| source.box_id() == id)
            })
            .and_then(|()| {
                if self.history.goes_on_removing(caller, id) {
                    return Ok(());
                }
                if is_kept_id(id) {
                    self.store.refuse_read_only()
                } else {
                    store::refuse_unready(&self.store, id)
                }
            });
        if let Err(error) = unready {
            self.history.refuse_removal(caller, id);
            let message = format!("removal of {name}: {error}");
            return Err(refuse(&self.store, error.errno(), message));
        }
        let see = || self.view.see_box(id);
        self.history.remove(caller, id, (dir, name), see);
        Ok(())
    }

    /// Refuses while an archive is written over the disk of the box.
    fn refuse_written(&self, id: &str) -> Result<()> {
        if !self.staging.loose.is_written_over(id) {
            return Ok(());
        }
        Err(Error::busy(
            "an archive is being written over its disk; wait for that, or end it",
        ))
    }
}

/// Refuses a process that can't be told from others (EPERM): a box is removed name by name, and the
/// mount could not tell which steps belong together. EMFILE if the mount has no descriptor left to
/// look at the process.
fn refuse_unseen(caller: Caller) -> Result<()> {
    if caller.is_outside() {
        return Err(Error::new(
            libc::EPERM,
            "this process is in a pid namespace that the mount can't see into; remove it where \
             the home is mounted",
        ));
    }
    caller.identify().map_err(|error| {
        Error::new(
            error.raw_os_error().unwrap_or(libc::EIO),
            format!("cannot look at process {}: {error}; try again", caller.tid),
        )
    })
}
