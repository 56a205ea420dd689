//! All boxes being made, and which callers see them.
//!
//! `mkdir NEW` reserves an id, so the directory has the inode of the box it will be. Until the box
//! is committed everyone sees what was made so far. After that everyone sees the box, except the
//! copy programs among its makers: they see only what they made, because cp and rsync create with
//! O_EXCL what the finished box has already.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::home::{box_id, is_snapshot_name, snapshot_id};
use crate::process::Caller;
use crate::store::Store;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS, exists, not_there};
use crate::tree::nodes::node::{MadeNodes, Node};
use crate::tree::nodes::refusal::refuse;
use crate::tree::staging::staged_box::{Staged, StagedBox, StagedChild, UnlistedSnapshot};
use crate::tree::staging::staged_file::StagedFile;
use crate::tree::staging::staged_rename::{self, StagedRename};
use crate::{Error, Result};

/// The boxes being made, and what is being put into boxes that exist.
pub struct StagedBoxes {
    store: Arc<Store>,
    made: Arc<MadeNodes>,
    inner: Mutex<BoxTable>,
}

#[derive(Default)]
struct BoxTable {
    /// By the id of the box to be.
    boxes: HashMap<String, StagedBox>,
    /// The ids of boxes being made, by the name they are shown by. A committed one is among the
    /// real boxes and not here.
    names: HashMap<String, String>,
    /// The box that each made node is in.
    made_in: HashMap<u64, String>,
}

impl BoxTable {
    fn sweep(&mut self, store: &Store) {
        for (name, id) in &self.names {
            let staged = self.boxes.get_mut(id);
            if staged.is_some_and(StagedBox::begins_to_lack_export) {
                warn_of_lack(store, name);
            }
        }
        let over: Vec<String> = self
            .boxes
            .values()
            .filter(|staged| staged.is_over())
            .map(|staged| staged.id.clone())
            .collect();
        for id in over {
            if let Some(staged) = self.boxes.get(&id) {
                warn_of_missing(store, staged);
            }
            self.let_go(&id);
        }
    }

    fn let_go(&mut self, id: &str) {
        self.boxes.remove(id);
        self.names.retain(|_, box_id| box_id != id);
        self.made_in.retain(|_, box_id| box_id != id);
    }

    fn box_of(&self, node: &Node) -> Option<String> {
        match node {
            Node::Made(_) => self.made_in.get(&node.ino()).cloned(),
            node => node.box_id().map(str::to_owned),
        }
    }

    fn view_for(&mut self, caller: Caller, node: &Node) -> Option<&mut StagedBox> {
        let id = self.box_of(node)?;
        let staged = self.boxes.get_mut(&id)?;
        staged.is_view_of(caller, node).then_some(staged)
    }

    fn made_by(&mut self, caller: Caller, node: &Node) -> Option<&mut StagedBox> {
        let id = self.box_of(node)?;
        let staged = self.boxes.get_mut(&id)?;
        staged.may_be_filled_by(caller, node).then_some(staged)
    }
}

impl StagedBoxes {
    /// Returns an empty table. `made` numbers the nodes of names that stand for nothing by
    /// themselves.
    pub fn new(store: Arc<Store>, made: Arc<MadeNodes>) -> StagedBoxes {
        StagedBoxes {
            store,
            made,
            inner: Mutex::default(),
        }
    }

    /// Locks the boxes, without those that are done with.
    fn swept(&self) -> MutexGuard<'_, BoxTable> {
        let mut inner = self.inner.lock();
        inner.sweep(&self.store);
        inner
    }

    /// Lets go of boxes that are done with.
    pub fn sweep(&self) {
        drop(self.swept());
    }

    /// Runs `work` with the box that this caller sees in place of the node's real box.
    pub fn with_view_for<T>(
        &self,
        caller: Caller,
        node: &Node,
        work: impl FnOnce(&mut StagedBox) -> T,
    ) -> Option<T> {
        self.swept().view_for(caller, node).map(work)
    }

    /// Returns whether this caller sees what is staged in place of the node's real box.
    pub fn is_view_for(&self, caller: Caller, node: &Node) -> bool {
        self.with_view_for(caller, node, |_| ()).is_some()
    }

    /// Runs `work` with the box, being made or made by this caller, that it may put parts of a
    /// backup into.
    pub fn with_made_by<T>(
        &self,
        caller: Caller,
        node: &Node,
        work: impl FnOnce(&mut StagedBox) -> T,
    ) -> Option<T> {
        self.swept().made_by(caller, node).map(work)
    }

    /// Runs `work` with what is staged of the box of this id.
    pub fn with<T>(&self, id: &str, work: impl FnOnce(&mut StagedBox) -> T) -> Option<T> {
        self.inner.lock().boxes.get_mut(id).map(work)
    }

    /// Does the same, after letting go of boxes that are done with.
    pub fn with_swept<T>(&self, id: &str, work: impl FnOnce(&mut StagedBox) -> T) -> Option<T> {
        self.swept().boxes.get_mut(id).map(work)
    }

    /// Returns the id of the box that a node is in.
    pub fn box_of(&self, node: &Node) -> Option<String> {
        self.inner.lock().box_of(node)
    }

    /// Returns whether something of this box is staged.
    pub fn contains(&self, id: &str) -> bool {
        self.inner.lock().boxes.contains_key(id)
    }

    /// Returns whether the box of this id is being made and does not exist yet.
    pub fn is_unfinished(&self, id: &str) -> bool {
        self.with(id, |staged| !staged.committed).unwrap_or(false)
    }

    /// Returns the id of the box being made that is shown by this name.
    pub fn id_of(&self, name: &str) -> Option<String> {
        self.swept().names.get(name).cloned()
    }

    /// Returns the name that a box being made is shown by.
    pub fn name_of(&self, id: &str) -> Option<String> {
        let inner = self.inner.lock();
        let mut names = inner.names.iter();
        names.find_map(|(name, of)| (of == id).then(|| name.clone()))
    }

    /// Returns the name and the id of each box being made.
    pub fn names(&self) -> Vec<(String, String)> {
        let inner = self.swept();
        let names = inner.names.iter();
        names.map(|(name, id)| (name.clone(), id.clone())).collect()
    }

    /// Returns how many boxes are being made.
    pub fn len(&self) -> usize {
        self.inner.lock().names.len()
    }

    /// Returns all files being written in boxes, or waiting there.
    pub fn files(&self) -> Vec<Arc<StagedFile>> {
        let inner = self.inner.lock();
        inner
            .boxes
            .values()
            .flat_map(StagedBox::files)
            .cloned()
            .collect()
    }

    /// Returns the file being written that is this node.
    pub fn file_at(&self, node: &Node) -> Option<Arc<StagedFile>> {
        let inner = self.inner.lock();
        let staged = inner.boxes.get(&inner.box_of(node)?)?;
        staged.find(node)?.1.file().cloned()
    }

    /// Has the log say of which directories no box was made, because their export did not come.
    pub fn warn_of_unmade(&self) {
        let inner = self.inner.lock();
        for (name, id) in &inner.names {
            if inner.boxes.get(id).is_some_and(StagedBox::lacks_export) {
                warn_of_lack(&self.store, name);
            }
        }
    }

    /// Begins a box in the root.
    ///
    /// # Errors
    /// EEXIST where another is being made by that name.
    pub fn begin(&self, caller: Caller, name: &str) -> Result<Node> {
        let mut inner = self.swept();
        if inner.names.contains_key(name) {
            return Err(exists(name));
        }
        let id = box_id()?;
        let mut staged = StagedBox::new(id.clone(), caller);
        staged.make_by(caller);
        inner.names.insert(name.to_owned(), id.clone());
        inner.boxes.insert(id.clone(), staged);
        Ok(Node::Box(id))
    }

    /// Begins to record what the caller puts into a box that exists. Where the caller is a file
    /// server, `unlisted` is a snapshot that it has taken.
    pub fn begin_in_existing(&self, caller: Caller, id: &str, unlisted: Option<String>) {
        let mut inner = self.swept();
        let staged = inner
            .boxes
            .entry(id.to_owned())
            .or_insert_with(|| StagedBox::existing(id.to_owned(), caller));
        staged.makers.join(caller);
        staged.touch();
        if let Some(snapshot) = unlisted {
            let taken = UnlistedSnapshot::taken_by(caller);
            staged.unlisted.insert(snapshot, taken);
        }
    }

    /// Makes a name in a box being made. Returns None when the caller sees a real box there.
    pub fn make(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
        what: Staged,
    ) -> Result<Option<Node>> {
        let mut inner = self.swept();
        let Some(staged) = inner.made_by(caller, parent) else {
            return Ok(None);
        };
        if !staged.make_by(caller) {
            return Err(refuse(
                &self.store,
                libc::EBUSY,
                format!("{name}: another process is making that box"),
            ));
        }
        staged.touch();
        let id = staged.id.clone();
        let node = self.node_for(parent, &id, name, &what)?;
        // A directory of a box that exists was not made here.
        let is_there = staged.committed && !matches!(parent, Node::Made(_));
        let directory = match staged.children.get_mut(&parent.ino()) {
            Some(directory) => directory,
            None if is_there => staged.children.entry(parent.ino()).or_default(),
            None => return Err(not_there()),
        };
        if directory.contains_key(name) {
            return Err(exists(name));
        }
        let is_directory = matches!(what, Staged::Directory);
        let child = StagedChild {
            node: node.clone(),
            what,
        };
        directory.insert(name.to_owned(), child);
        if is_directory {
            staged.children.insert(node.ino(), BTreeMap::new());
        }
        inner.made_in.insert(node.ino(), id);
        Ok(Some(node))
    }

    /// Returns the node of a name being made: that of the real thing it will be, so that its inode
    /// stays.
    fn node_for(&self, parent: &Node, id: &str, name: &str, what: &Staged) -> Result<Node> {
        Ok(match (parent, what) {
            (Node::Box(_), Staged::Directory) if name == SNAPSHOTS => {
                Node::Snapshots(id.to_owned())
            }
            (Node::Snapshots(_), Staged::Directory) => {
                if !is_snapshot_name(name) {
                    let message = format!(
                        "{name:?} can't be a snapshot's name: BoxLite accepts 1 to 255 bytes with no leading dot and no / or \\"
                    );
                    return Err(refuse(&self.store, libc::EINVAL, message));
                }
                Node::Snapshot(id.to_owned(), snapshot_id()?)
            }
            (_, Staged::File(file)) => file.node.clone(),
            _ => self.made.next(),
        })
    }

    /// Removes an empty box that is being made; false when there is none of that name.
    ///
    /// # Errors
    /// ENOTEMPTY.
    pub fn remove(&self, name: &str) -> Result<bool> {
        let mut inner = self.inner.lock();
        let Some(id) = inner.names.get(name).cloned() else {
            return Ok(false);
        };
        let ino = Node::Box(id.clone()).ino();
        if let Some(staged) = inner.boxes.get(&id) {
            staged.refuse_full(ino, name)?;
        }
        inner.names.remove(name);
        inner.boxes.remove(&id);
        inner.made_in.retain(|_, box_id| *box_id != id);
        Ok(true)
    }

    /// Removes an empty directory in a box being made; false when the caller sees a real one.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ENOTEMPTY.
    pub fn remove_directory(&self, caller: Caller, parent: &Node, name: &str) -> Result<bool> {
        let mut inner = self.swept();
        let Some(staged) = inner.view_for(caller, parent) else {
            return Ok(false);
        };
        let child = staged.child(parent, name).ok_or_else(not_there)?;
        if !matches!(child.what, Staged::Directory) {
            return Err(Error::new(libc::ENOTDIR, "that is not a directory"));
        }
        let ino = child.node.ino();
        staged.refuse_full(ino, name)?;
        staged.children.remove(&ino);
        if let Some(names) = staged.children.get_mut(&parent.ino()) {
            names.remove(name);
        }
        inner.made_in.remove(&ino);
        Ok(true)
    }

    /// Takes a file or a link out of a box being made. None when the caller sees a real box there.
    ///
    /// # Errors
    /// ENOENT, EISDIR.
    pub fn take(&self, caller: Caller, parent: &Node, name: &str) -> Result<Option<Staged>> {
        let mut inner = self.swept();
        let Some(staged) = inner.view_for(caller, parent) else {
            return Ok(None);
        };
        // The rest of the box stays as long as this process removes it.
        staged.makers.take_over(caller);
        let names = staged
            .children
            .get_mut(&parent.ino())
            .ok_or_else(not_there)?;
        match names.get(name).map(|child| &child.what) {
            None => Err(not_there()),
            Some(Staged::Directory) => Err(Error::new(libc::EISDIR, "that is a directory")),
            Some(_) => {
                let child = names.remove(name);
                if let Some(child) = &child {
                    inner.made_in.remove(&child.node.ino());
                }
                Ok(child.map(|child| child.what))
            }
        }
    }

    /// Takes a file that became nothing out of its box. Where it was refused, the box fails.
    pub fn drop_file(&self, file: &StagedFile, refused: bool) {
        self.with(&file.box_id, |staged| {
            if refused {
                staged.fail(file.source_keeper);
            }
            for names in staged.children.values_mut() {
                // By identity: the next file of the same name has the same node.
                names.retain(|_, child| child.file().is_none_or(|of| !std::ptr::eq(&**of, file)));
            }
        });
    }

    /// Shows the caller the real box, as all others see it, before it removes what it has made.
    /// Does nothing while the box is being made or written, or while archives wait in it.
    pub fn end_view_for(&self, caller: Caller, node: &Node) {
        let mut inner = self.swept();
        if let Some(staged) = inner.view_for(caller, node)
            && staged.committed
            && !staged.is_written()
            && !staged.has_waiting()
        {
            let id = staged.id.clone();
            inner.let_go(&id);
        }
    }

    /// Gives a box being made another name; false when there is none of the old name. `check` is
    /// for the new name.
    ///
    /// # Errors
    /// Those of `check`, and EEXIST where another box is being made by the new name.
    pub fn rename(&self, from: &str, to: &str, check: impl FnOnce() -> Result<()>) -> Result<bool> {
        let mut inner = self.inner.lock();
        let Some(id) = inner.names.get(from).cloned() else {
            return Ok(false);
        };
        check()?;
        if inner.names.contains_key(to) {
            return Err(exists(to));
        }
        inner.names.remove(from);
        inner.names.insert(to.to_owned(), id);
        Ok(true)
    }

    /// Renames a child of a box being made. `replaces` says whether it may take the place of
    /// another.
    ///
    /// # Errors
    /// EPERM for a name that would not be kept, EXDEV for another box, EEXIST, EISDIR, ENOTDIR,
    /// ENOTEMPTY, ENOENT.
    pub fn rename_child(
        &self,
        caller: Caller,
        from: (&Node, &str),
        to: (&Node, &str),
        replaces: bool,
    ) -> Result<StagedRename> {
        let mut inner = self.swept();
        let is_same_box = inner.box_of(from.0) == inner.box_of(to.0);
        let Some(staged) = inner.made_by(caller, from.0) else {
            return Ok(StagedRename::NotStaged);
        };
        staged_rename::rename(&self.store, staged, (from, to), is_same_box, replaces)
    }

    /// Records that a box was made: it is shown as all boxes are. Returns its other files, which
    /// waited for it.
    pub fn commit(&self, file: &Arc<StagedFile>) -> Vec<Arc<StagedFile>> {
        let mut inner = self.inner.lock();
        inner.names.retain(|_, id| *id != file.box_id);
        let Some(staged) = inner.boxes.get_mut(&file.box_id) else {
            return Vec::new();
        };
        staged.committed = true;
        let others = staged.files().filter(|other| !Arc::ptr_eq(other, file));
        others.cloned().collect()
    }

    /// Returns the name of a snapshot's directory being made, and the snapshot.json in it.
    ///
    /// # Errors
    /// ENOENT when the directory is gone.
    pub fn snapshot_being_made(
        &self,
        box_id: &str,
        directory: &Node,
    ) -> Result<(String, Option<Arc<StagedFile>>)> {
        let found = self.with(box_id, |staged| {
            let (name, _) = staged.find(directory)?;
            let json = staged.child(directory, SNAPSHOT_JSON);
            let json = json.and_then(StagedChild::file).cloned();
            Some((name.to_owned(), json))
        });
        found.flatten().ok_or_else(directory_is_gone)
    }
}

fn warn_of_lack(store: &Store, name: &str) {
    store.events().warn(&format!(
        "no box was made of the directory {name}: it has {BOX_JSON} and no {EXPORT}, which is what a \
         box is made of; copy {EXPORT} into it as well"
    ));
}

/// Has the log say which snapshots did not come before their copy ended.
fn warn_of_missing(store: &Store, staged: &StagedBox) {
    if !staged.committed {
        return;
    }
    let missing: Vec<&str> = staged.arriving().map(|(name, _)| name.as_str()).collect();
    if !missing.is_empty() {
        let name = store.exports().disks.name_of(&staged.id);
        store.events().warn(&format!(
            "the copy of box {name} ended before its snapshots had come: {} {} missing, and perhaps \
             more; copy what is missing into {name}/{SNAPSHOTS}",
            missing.join(", "),
            if missing.len() == 1 { "is" } else { "are" }
        ));
    }
}

/// ENOENT for what is written into a directory that was removed.
pub fn directory_is_gone() -> Error {
    Error::new(libc::ENOENT, "its directory is gone")
}
