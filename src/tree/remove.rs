//! rmdir and unlink: a snapshot is deleted by its directory, what is being made is taken back, and
//! nothing else goes.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::caller::{Caller, Makers};
use super::change::not_there;
use super::node::Node;
use super::staged_file::{Content, StagedFile};
use super::staging::{StagedBox, Staging, What};
use super::{Tree, text};
use crate::{Error, Result};

/// How long after a refused unlink the same process is taken to be deleting the box still.
const DELETING: Duration = Duration::from_secs(10);

impl Tree {
    /// `rmdir`: under `snapshots` it deletes a snapshot; a box is never deleted by it.
    ///
    /// # Errors
    /// ENOTEMPTY for a box, EBUSY, ENOENT, EPERM, EROFS.
    pub fn rmdir(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<()> {
        self.refuse_read_only()?;
        let parent = self.node(parent)?;
        let name = text(name).map_err(|_| not_there())?;
        if self.remove_staged_dir(caller, &parent, name)? {
            return Ok(());
        }
        match self.child(caller, &parent, name)? {
            Node::Snapshot(id, _) if self.was_refused_deletion(caller, &id) => Err(self.refuse(
                libc::EPERM,
                format!("{name}: the same process tried to remove the box's files, so its snapshots stay; use rmdir on the snapshot alone"),
            )),
            Node::Snapshot(id, snapshot) => {
                self.fresh.lock().remove(&snapshot);
                self.store.remove_snapshot(&id, &snapshot)
            }
            Node::Box(_) => Err(Error::new(
                libc::ENOTEMPTY,
                format!("{name} is a box; rmdir deletes none"),
            )),
            Node::Snapshots(id) => {
                let full = !self.names()?.catalog().snapshots_of(&id).is_empty();
                let errno = if full { libc::ENOTEMPTY } else { libc::EPERM };
                Err(Error::new(errno, "every box has a snapshots directory"))
            }
            Node::Hidden => Err(Error::new(libc::EPERM, ".boxlite stays")),
            _ => Err(Error::new(libc::ENOTDIR, "that is not a directory")),
        }
    }

    /// Removes an empty directory that was being made; false when it is not one.
    fn remove_staged_dir(&self, caller: Caller, parent: &Node, name: &str) -> Result<bool> {
        let mut staging = self.staging.lock();
        if *parent == Node::Root {
            let Some(id) = staging.names.get(name).cloned() else {
                return Ok(false);
            };
            let ino = Node::Box(id.clone()).ino();
            refuse_full(staging.boxes.get(&id), ino, name)?;
            staging.names.remove(name);
            staging.boxes.remove(&id);
            staging.made_in.retain(|_, box_id| *box_id != id);
            return Ok(true);
        }
        let Some(staged) = staging.face(caller, parent) else {
            return Ok(false);
        };
        let child = staged.child(parent, name).ok_or_else(not_there)?;
        if !matches!(child.what, What::Directory) {
            return Err(Error::new(libc::ENOTDIR, "that is not a directory"));
        }
        let ino = child.node.ino();
        refuse_full(Some(staged), ino, name)?;
        staged.children.remove(&ino);
        if let Some(names) = staged.children.get_mut(&parent.ino()) {
            names.remove(name);
        }
        staging.made_in.remove(&ino);
        Ok(true)
    }

    /// unlink(2): takes back what is being made. What exists is not deleted file by file.
    ///
    /// # Errors
    /// EPERM for files of boxes that exist, ENOENT, EROFS.
    pub fn unlink(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<()> {
        self.refuse_read_only()?;
        let parent = self.node(parent)?;
        let name = text(name).map_err(|_| not_there())?;
        let taken = {
            let mut staging = self.staging.lock();
            take_staged(&mut staging, caller, &parent, name)?
        };
        match taken {
            Some(What::File(file)) => {
                let mut state = file.state.lock();
                if !state.committed {
                    state.content = Content::Nothing;
                    let error = Error::new(libc::ENOENT, format!("{name} was removed"));
                    state.refuse(&error);
                }
                Ok(())
            }
            Some(_) => Ok(()),
            None => {
                let node = self.child(caller, &parent, name)?;
                self.remember_deleter(caller, &node);
                Err(self.refuse(
                    libc::EPERM,
                    format!("{name}: the files of a box that exists can't be removed"),
                ))
            }
        }
    }

    /// Whether the process tried to unlink files of the box before: it is deleting all of it, was
    /// refused, and went on.
    fn was_refused_deletion(&self, caller: Caller, box_id: &str) -> bool {
        let mut deleters = self.deleters.lock();
        deleters
            .get_mut(box_id)
            .is_some_and(|(makers, tried)| tried.elapsed() < DELETING && makers.includes(caller))
    }

    fn remember_deleter(&self, caller: Caller, node: &Node) {
        let Some(id) = node.box_id() else { return };
        let mut deleters = self.deleters.lock();
        deleters.retain(|_, (makers, tried)| tried.elapsed() < DELETING && makers.any_alive());
        match deleters.get_mut(id) {
            Some((makers, tried)) => {
                makers.join(caller);
                *tried = Instant::now();
            }
            None => {
                deleters.insert(id.to_owned(), (Makers::begin(caller), Instant::now()));
            }
        }
    }

    /// A written file that became nothing loses its name.
    pub(super) fn drop_staged_file(&self, file: &Arc<StagedFile>, refused: bool) {
        let mut staging = self.staging.lock();
        staging
            .files
            .retain(|_, root_file| !Arc::ptr_eq(&root_file.file, file));
        if let Some(staged) = staging.boxes.get_mut(&file.box_id) {
            staged.failed |= refused;
            for names in staged.children.values_mut() {
                names.retain(|_, child| child.node != file.node);
            }
        }
    }
}

fn refuse_full(staged: Option<&StagedBox>, ino: u64, name: &str) -> Result<()> {
    let full = staged
        .and_then(|staged| staged.children.get(&ino))
        .is_some_and(|names| !names.is_empty());
    if full {
        return Err(Error::new(libc::ENOTEMPTY, format!("{name} is not empty")));
    }
    Ok(())
}

/// Takes a name that is being made out of its directory.
fn take_staged(
    staging: &mut Staging,
    caller: Caller,
    parent: &Node,
    name: &str,
) -> Result<Option<What>> {
    if *parent == Node::Root {
        if staging.root_file(caller, name).is_none() {
            return Ok(None);
        }
        let file = staging.files.remove(name);
        return Ok(file.map(|root_file| What::File(root_file.file)));
    }
    let Some(staged) = staging.face(caller, parent) else {
        return Ok(None);
    };
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
