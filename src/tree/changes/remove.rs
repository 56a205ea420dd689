//! rmdir and unlink: a snapshot is deleted by its directory, a box by removing all of its files and
//! then its directory, and what is being made is taken back.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::store::Source;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS, not_there};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::staging::caller::Caller;
use crate::tree::staging::staged_file::{Content, StagedFile};
use crate::tree::staging::staging_area::{Staging, What};
use crate::tree::{Tree, text};
use crate::{Error, Result};

impl Tree {
    /// `rmdir`: under `snapshots` it deletes a snapshot; a box only for who has removed all that is in
    /// it before.
    ///
    /// # Errors
    /// ENOTEMPTY for a box, EBUSY, ENOENT, EPERM, EROFS.
    pub fn rmdir(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<()> {
        let parent = self.node_to_change(parent)?;
        let name = text(name).map_err(|_| not_there())?;
        if self.remove_aside(&parent, name)? {
            return Ok(());
        }
        if self.remove_staged_dir(caller, &parent, name)? {
            return Ok(());
        }
        match self.child(caller, &parent, name)? {
            Node::Snapshot(id, snapshot) => self.remove_snapshot(caller, &id, &snapshot, name),
            Node::Snapshots(id) => self.remove_snapshots_dir(caller, &id),
            Node::Box(id) => self.remove_box(caller, &id, name),
            Node::Hidden => Err(Error::new(libc::EPERM, ".boxlite stays")),
            Node::View | Node::ViewOf(_) | Node::ViewSnapshots(_) => Err(Error::new(
                libc::EPERM,
                "the view goes with what it is a view of",
            )),
            _ => Err(Error::new(libc::ENOTDIR, "that is not a directory")),
        }
    }

    /// Deletes a snapshot at once, unless the whole box is being removed: then when that is.
    fn remove_snapshot(&self, caller: Caller, id: &str, snapshot: &str, name: &str) -> Result<()> {
        let a_box = Node::Box(id.to_owned());
        // It may be mv, which makes room for what it brings.
        self.refuse_unseen(caller)
            .map_err(|error| self.refuse(error.errno(), format!("snapshot {name}: {error}")))?;
        {
            let mut dealings = self.dealings.lock();
            let mut dealing = dealings.of(caller, id);
            if let Some(dealing) = dealing.as_mut().filter(|d| d.goes_on_removing()) {
                // It may have more to remove.
                dealing.removal_was_refused();
                return Err(self.refuse(
                    libc::EPERM,
                    format!("{name}: the same process tried to remove the box's files, so its snapshots stay; use rmdir on the snapshot alone"),
                ));
            }
            if let Some(dealing) = dealing.filter(|d| d.has_removed(&a_box, BOX_JSON)) {
                dealing.remove(&Node::Snapshots(id.to_owned()), name);
                let snapshots = &mut dealing.gone.snapshots;
                snapshots.insert(snapshot.to_owned(), name.to_owned());
                drop(dealings);
                self.raise_generation(&Node::Snapshot(id.to_owned(), snapshot.to_owned()));
                return Ok(());
            }
        }
        self.refuse_left_export(caller, id, snapshot, name)?;
        self.refuse_shared(|source| {
            matches!(source, Source::Snapshot { box_id, snapshot_id } if box_id == id && snapshot_id == snapshot)
        })?;
        self.store.remove_snapshot(id, snapshot)
    }

    /// EBUSY for a state of which a copy waits for its box: mv removes what it has copied.
    fn refuse_shared(&self, is_source: impl Fn(&Source) -> bool) -> Result<()> {
        // A file's state is never waited for with the lock of all in hand.
        let files = self.staging.lock().all_files();
        for file in files {
            let state = file.state.lock();
            if let Content::Shared { source, .. } = &state.content
                && state.open == 0
                && is_source(source)
            {
                let which = self.store.describe(source);
                return Err(self.refuse(
                    libc::EBUSY,
                    format!(
                        "a copy of {which} waits for its box; copy that box's {EXPORT} first, or remove the copy"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// ENOTEMPTY for a process that removed other files of a snapshot and not its export (`find ! -name
    /// export.boxlite -delete`, a `tar --remove-files` that could not read it), and for mv, which calls rmdir
    /// on the directory that it is about to replace. `rmdir` alone deletes a snapshot.
    fn refuse_left_export(
        &self,
        caller: Caller,
        id: &str,
        snapshot: &str,
        name: &str,
    ) -> Result<()> {
        let directory = Node::Snapshot(id.to_owned(), snapshot.to_owned());
        let mut dealings = self.dealings.lock();
        let dealing = dealings.of(caller, id);
        let (has_begun, is_emptied) = dealing.map_or((false, false), |dealing| {
            let has_begun = dealing.has_removed_in(&directory);
            (has_begun, dealing.has_removed(&directory, EXPORT))
        });
        if is_emptied || !(has_begun || caller.moves()) {
            return Ok(());
        }
        Err(self.refuse(
            libc::ENOTEMPTY,
            format!(
                "{name} is a snapshot, with its {EXPORT} in it; rmdir alone, or rm -r, deletes it"
            ),
        ))
    }

    /// `snapshots` is gone for who removes it, empty, and nobody else: a step of removing the box, for file
    /// managers the first, and nothing if the rest never comes.
    fn remove_snapshots_dir(&self, caller: Caller, id: &str) -> Result<()> {
        let names = self.names()?;
        let is_deferred = {
            let mut dealings = self.dealings.lock();
            let dealing = dealings.of(caller, id);
            let gone = dealing.map(|dealing| dealing.gone.snapshots.clone());
            move |snapshot: &str| gone.as_ref().is_some_and(|ids| ids.contains_key(snapshot))
        };
        let mut snapshots = names.catalog().snapshots_of(id).iter();
        if snapshots.any(|snapshot| !is_deferred(&snapshot.id)) {
            return Err(Error::new(libc::ENOTEMPTY, "there are snapshots in it"));
        }
        self.remove_for_caller(caller, &Node::Box(id.to_owned()), id, SNAPSHOTS)?;
        self.raise_generation(&Node::Snapshots(id.to_owned()));
        Ok(())
    }

    /// Removes a box for who has removed all that is in it.
    fn remove_box(&self, caller: Caller, id: &str, name: &str) -> Result<()> {
        let node = Node::Box(id.to_owned());
        let full = || {
            Error::new(
                libc::ENOTEMPTY,
                format!("{name} is a box; rm -r deletes it"),
            )
        };
        let is_removing = {
            let mut dealings = self.dealings.lock();
            let dealing = dealings.of(caller, id);
            dealing
                .filter(|dealing| dealing.has_removed(&node, BOX_JSON))
                .map(|dealing| dealing.gone.clone())
        };
        let gone = is_removing.ok_or_else(full)?;
        if !self.list(caller, &node)?.is_empty() {
            return Err(full());
        }
        self.refuse_shared(|source| source.box_id() == id)?;
        self.store.remove_box(id, &gone)?;
        self.dealings.lock().forget(id);
        Ok(())
    }

    /// Whether the caller removed a name, which everybody else goes on seeing.
    pub(in crate::tree) fn has_removed(&self, caller: Caller, parent: &Node, name: &str) -> bool {
        let Some(id) = parent.box_id() else {
            return false;
        };
        let mut dealings = self.dealings.lock();
        dealings
            .of(caller, id)
            .is_some_and(|dealing| dealing.has_removed(parent, name))
    }

    /// Removes an empty directory that was being made; false when it is not one.
    fn remove_staged_dir(&self, caller: Caller, parent: &Node, name: &str) -> Result<bool> {
        let mut staging = self.staging.lock();
        if *parent == Node::Root {
            let Some(id) = staging.names.get(name).cloned() else {
                return Ok(false);
            };
            let ino = Node::Box(id.clone()).ino();
            if let Some(staged) = staging.boxes.get(&id) {
                staged.refuse_full(ino, name)?;
            }
            staging.names.remove(name);
            staging.boxes.remove(&id);
            staging.made_in.retain(|_, box_id| *box_id != id);
            return Ok(true);
        }
        staging.end_face(caller, parent);
        let Some(staged) = staging.face(caller, parent) else {
            return Ok(false);
        };
        let child = staged.child(parent, name).ok_or_else(not_there)?;
        if !matches!(child.what, What::Directory) {
            return Err(Error::new(libc::ENOTDIR, "that is not a directory"));
        }
        let ino = child.node.ino();
        staged.refuse_full(ino, name)?;
        staged.children.remove(&ino);
        if let Some(names) = staged.children.get_mut(&parent.ino()) {
            names.remove(name);
        }
        staging.made_in.remove(&ino);
        Ok(true)
    }

    /// unlink(2): takes back what is being made. A file of a box that exists is gone for the caller
    /// alone: a step of removing the box, and nothing if the rest never comes.
    ///
    /// # Errors
    /// EBUSY when the box can't be removed now, EPERM for what stays, ENOENT, EROFS.
    pub fn unlink(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<()> {
        let parent = self.node_to_change(parent)?;
        let name = text(name).map_err(|_| not_there())?;
        let (parent, name) = self.change_aside(caller, parent, name);
        let name = name.as_ref();
        let taken = {
            let mut staging = self.staging.lock();
            let is_of_box = matches!(name, BOX_JSON | EXPORT | SNAPSHOT_JSON);
            if (is_of_box || Derived::named(name).is_some())
                && !staging.is_placeholder(caller, &parent, name)
            {
                staging.end_face(caller, &parent);
            }
            take_staged(&mut staging, caller, &parent, name)?
        };
        match taken {
            Some(What::File(file)) => {
                self.note_unfinished(&file);
                file.was_removed(name);
                if !file.restores || name != EXPORT {
                    return Ok(());
                }
                // The name is that of the box's export, which the same caller may have removed before.
                match self.remove_real(caller, &parent, name) {
                    Err(error) if error.errno() == libc::ENOENT => Ok(()),
                    result => result,
                }
            }
            Some(_) => Ok(()),
            None => self.remove_real(caller, &parent, name),
        }
    }

    /// Refuses at the first file what would be refused at the directory, when it is too late.
    fn remove_real(&self, caller: Caller, parent: &Node, name: &str) -> Result<()> {
        let node = self.child(caller, parent, name)?;
        let id = match (&node, parent) {
            (Node::BoxJson(id) | Node::SnapshotJson(id, _), Node::Box(_) | Node::Snapshot(..)) => {
                id.clone()
            }
            (Node::Export(source) | Node::Link(_, source), _) => source.box_id().to_owned(),
            _ => {
                return Err(self.refuse(
                    libc::EPERM,
                    format!("{name} stays; what is in .boxlite goes with what it belongs to"),
                ));
            }
        };
        self.remove_for_caller(caller, parent, &id, name)
    }

    /// A name in the box with this id is gone for the caller alone, unless the box can't be removed now.
    fn remove_for_caller(&self, caller: Caller, dir: &Node, id: &str, name: &str) -> Result<()> {
        let unready = self
            .refuse_unseen(caller)
            .and_then(|()| self.refuse_written(id))
            .and_then(|()| self.refuse_shared(|source| source.box_id() == id))
            .and_then(|()| self.store.refuse_unready(id));
        if let Err(error) = unready {
            self.dealings.lock().begin(caller, id).removal_was_refused();
            return Err(self.refuse(error.errno(), format!("removal of {name}: {error}")));
        }
        let mut dealings = self.dealings.lock();
        let dealing = dealings.begin(caller, id);
        let seen = &mut dealing.gone.disk;
        *seen = seen.or_else(|| self.store.see_disk(id));
        dealing.remove(dir, name);
        Ok(())
    }

    /// EPERM for a process that can't be told from others: a box goes name by name, and nobody could
    /// say whose steps belong together. EMFILE if the mount has no descriptor left to look
    /// at the process.
    fn refuse_unseen(&self, caller: Caller) -> Result<()> {
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

    /// EBUSY while an archive is written over the disk of the box.
    fn refuse_written(&self, id: &str) -> Result<()> {
        let staging = self.staging.lock();
        let mut over = staging.files.iter().filter(|loose| loose.file.restores);
        let is_written = over.any(|loose| loose.file.box_id == id && loose.is_written());
        if !is_written {
            return Ok(());
        }
        Err(Error::busy(
            "an archive is being written over its disk; wait for that, or end it",
        ))
    }

    /// A written file that became nothing loses its name.
    pub(in crate::tree) fn drop_staged_file(&self, file: &Arc<StagedFile>, refused: bool) {
        let mut staging = self.staging.lock();
        staging
            .files
            .retain(|loose| !Arc::ptr_eq(&loose.file, file));
        if let Some(staged) = staging.boxes.get_mut(&file.box_id) {
            if refused {
                staged.fail(file.copier);
            }
            for names in staged.children.values_mut() {
                names.retain(|_, child| child.node != file.node);
            }
        }
    }
}

/// Takes a name that is being made out of its directory.
fn take_staged(
    staging: &mut Staging,
    caller: Caller,
    parent: &Node,
    name: &str,
) -> Result<Option<What>> {
    if staging.loose_file(caller, parent, name).is_some() {
        let loose = staging.take_loose_file(caller, parent, name);
        return Ok(loose.map(|loose| What::File(loose.file)));
    }
    let Some(staged) = staging.face(caller, parent) else {
        return Ok(None);
    };
    // What remains stays as long as this process removes it.
    staged.makers.take_over(caller);
    let names = staged
        .children
        .get_mut(&parent.ino())
        .ok_or_else(not_there)?;
    match names.get(name).map(|child| &child.what) {
        None => Err(not_there()),
        Some(What::Directory) => Err(Error::new(libc::EISDIR, "that is a directory")),
        Some(_) => {
            let child = names.remove(name);
            if let Some(child) = &child {
                staging.made_in.remove(&child.node.ino());
            }
            Ok(child.map(|child| child.what))
        }
    }
}
