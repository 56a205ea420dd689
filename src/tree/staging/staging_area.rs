//! Everything that is being copied in: boxes, loose files, and directories for files put aside.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::Result;
use crate::home::Owner;
use crate::process::Caller;
use crate::store::Store;
use crate::tree::nodes::attr::{Attr, DirEntry, Kept, Kind};
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS, not_there};
use crate::tree::nodes::node::{Derived, MadeNodes, Node};
use crate::tree::staging::aside::{AsideDirectories, is_aside};
use crate::tree::staging::loose_files::LooseFiles;
use crate::tree::staging::role::ASIDE_PREFIX;
use crate::tree::staging::staged_box::{Staged, StagedBox};
use crate::tree::staging::staged_boxes::StagedBoxes;
use crate::tree::staging::staged_file::StagedFile;

/// What is being copied in. Its parts lock themselves, and nothing waits in them for a file's
/// state.
pub struct StagingArea {
    /// The boxes being made.
    pub boxes: StagedBoxes,
    /// The files written outside of those.
    pub loose: LooseFiles,
    asides: AsideDirectories,
    made: Arc<MadeNodes>,
}

impl StagingArea {
    /// Returns an empty one.
    pub fn new(store: Arc<Store>) -> StagingArea {
        let made = Arc::new(MadeNodes::default());
        StagingArea {
            boxes: StagedBoxes::new(store, made.clone()),
            loose: LooseFiles::default(),
            asides: AsideDirectories::default(),
            made,
        }
    }

    /// Returns a node for something that stands for nothing by itself.
    pub fn new_node(&self) -> Node {
        self.made.next()
    }

    /// Returns a name as staging has it; None when staging has no say.
    pub fn child(&self, caller: Caller, parent: &Node, name: &str) -> Option<Result<Node>> {
        if let Some(node) = self.loose.node_for(caller, parent, name) {
            return Some(Ok(node));
        }
        if *parent == Node::Root {
            return self.boxes.id_of(name).map(|id| Ok(Node::Box(id)));
        }
        self.boxes.with_view_for(caller, parent, |staged| {
            let child = staged.child(parent, name).map(|child| child.node.clone());
            child.ok_or_else(not_there)
        })
    }

    /// Returns what is being put into a box that exists, where the box has nothing of that name.
    /// All see a snapshot, and its maker a temporary file.
    pub fn arriving_child(&self, caller: Caller, parent: &Node, name: &str) -> Option<Node> {
        let node = match parent {
            Node::Snapshots(id) => self.boxes.with_swept(id, |staged| {
                let mut arriving = staged.arriving();
                arriving.find_map(|(of, child)| (of == name).then(|| child.node.clone()))
            }),
            _ => self.boxes.with_swept(parent.box_id()?, |staged| {
                let is_maker = staged.makers.includes(caller);
                let child = staged.child(parent, name).filter(|_| is_maker);
                child.map(|child| child.node.clone())
            }),
        };
        node.flatten()
    }

    /// Returns the snapshots that are being copied into a box that exists.
    pub fn arriving_in(&self, id: &str) -> Vec<(String, Node, Kind)> {
        let arriving = self.boxes.with_swept(id, |staged| {
            let arriving = staged.arriving();
            arriving
                .map(|(name, child)| (name.clone(), child.node.clone(), Kind::Directory))
                .collect()
        });
        arriving.unwrap_or_default()
    }

    /// Returns whether the kernel has to be told that a name is not there, because the caller is
    /// about to make it, as a part of the backup it copies: the box that it has made has all of
    /// them already.
    pub fn hide_for_exclusive_create(&self, caller: Caller, parent: &Node, name: &str) -> bool {
        let is_part = Derived::named(name).is_some()
            || matches!(
                (parent, name),
                (Node::Box(_), BOX_JSON | SNAPSHOT_JSON | SNAPSHOTS)
                    | (Node::Snapshot(..), SNAPSHOT_JSON | EXPORT)
            );
        if !is_part {
            return false;
        }
        let is_free = self.boxes.with_made_by(caller, parent, |staged| {
            staged.committed && staged.child(parent, name).is_none()
        });
        is_free == Some(true) && caller.makes_exclusively(name) == Some(true)
    }

    /// Returns whether a name is free to the caller, a file server that has taken this snapshot and
    /// not listed it.
    pub fn is_unlisted(&self, caller: Caller, directory: &Node, name: &str) -> bool {
        let Node::Snapshot(id, snapshot) = directory else {
            return false;
        };
        let is_free = self.boxes.with(id, |staged| {
            let unlisted = staged.unlisted_by(caller, snapshot);
            unlisted.is_some_and(|unlisted| unlisted.is_free(name))
        });
        is_free.unwrap_or(false)
    }

    /// Records that the caller has made a name, which is free to it no more.
    pub fn was_made(&self, caller: Caller, directory: &Node, name: &str) {
        if let Node::Snapshot(id, snapshot) = directory {
            self.boxes.with(id, |staged| {
                if let Some(unlisted) = staged.unlisted_by(caller, snapshot) {
                    unlisted.make(name);
                }
            });
        }
    }

    /// Records that the caller lists a directory. From now on it finds all that is in it.
    pub fn was_listed(&self, caller: Caller, directory: &Node) {
        if let Node::Snapshot(id, snapshot) = directory {
            self.boxes.with(id, |staged| {
                if staged.unlisted_by(caller, snapshot).is_some() {
                    staged.unlisted.remove(snapshot);
                }
            });
        }
    }

    /// Returns attributes as staging has them.
    pub fn attr(&self, caller: Caller, owner: Owner, node: &Node) -> Option<Attr> {
        if let Some(attr) = self.loose.attr(owner, node) {
            return Some(attr);
        }
        let of_staged = |staged: &mut StagedBox| staged.attr(owner, node);
        self.boxes.with_view_for(caller, node, of_staged).flatten()
    }

    /// Returns a listing as staging has it; None when staging has no say.
    pub fn list(&self, caller: Caller, node: &Node) -> Option<Vec<DirEntry>> {
        if *node == Node::Root {
            return None;
        }
        self.boxes
            .with_view_for(caller, node, |staged| staged.list(node))
            .flatten()
    }

    /// Returns what is being made in the root: it is listed until it is a box.
    pub fn list_root(&self) -> Vec<DirEntry> {
        let boxes = self.boxes.names().into_iter();
        let directories = boxes.map(|(name, id)| DirEntry {
            name: name.into(),
            kind: Kind::Directory,
            ino: Node::Box(id).ino(),
        });
        let files = self.loose.in_root().into_iter().map(file_entry);
        directories.chain(files).collect()
    }

    /// Returns where a link being made points.
    pub fn link_target(&self, caller: Caller, node: &Node) -> Option<PathBuf> {
        let target =
            self.boxes
                .with_view_for(caller, node, |staged| match &staged.find(node)?.1.what {
                    Staged::Link(target) => Some(target.clone()),
                    _ => None,
                });
        target.flatten()
    }

    /// Returns the file being written that is this node.
    pub fn file_at(&self, node: &Node) -> Option<Arc<StagedFile>> {
        self.loose
            .file_at(node)
            .or_else(|| self.boxes.file_at(node))
    }

    /// Returns the file being written that this caller sees at a node.
    pub fn file_for(&self, caller: Caller, node: &Node) -> Option<Arc<StagedFile>> {
        if !self.loose.contains(node) && !self.boxes.is_view_for(caller, node) {
            return None;
        }
        self.file_at(node)
    }

    /// Returns all files being written, or waiting.
    pub fn files(&self) -> Vec<Arc<StagedFile>> {
        let mut files = self.boxes.files();
        files.extend(self.loose.files());
        files
    }

    /// Returns the archives that wait for their box or their final name.
    pub fn waiting_files(&self) -> Vec<Arc<StagedFile>> {
        self.sweep();
        let mut files = self.files();
        files.retain(|file| file.is_waiting());
        files
    }

    /// Takes a file or a link that this caller sees by a name out of its directory. None when the
    /// caller sees a real box there.
    ///
    /// # Errors
    /// ENOENT, EISDIR.
    pub fn take(&self, caller: Caller, parent: &Node, name: &str) -> Result<Option<Staged>> {
        if let Some(file) = self.loose.take(caller, parent, name) {
            return Ok(Some(Staged::File(file)));
        }
        self.boxes.take(caller, parent, name)
    }

    /// Records that a descriptor of a file was closed, which postpones its sweep.
    pub fn note_close(&self, file: &Arc<StagedFile>) {
        self.boxes.with(&file.box_id, StagedBox::touch);
        self.loose.note_close(file);
    }

    /// Takes the name of a written file that became nothing. Where it was refused, its box fails.
    pub fn drop_file(&self, file: &StagedFile, refused: bool) {
        self.loose.drop_file(file);
        self.boxes.drop_file(file, refused);
    }

    /// Returns where a name in a directory is kept: for one in a directory of files put aside,
    /// beside that directory.
    pub fn beside_aside<'n>(&self, parent: Node, name: &'n str) -> (Node, Cow<'n, str>) {
        let dir = match parent {
            Node::Made(_) => self.asides.target_of(&parent),
            _ => None,
        };
        match dir {
            Some(dir) => (dir, format!("{ASIDE_PREFIX}{name}").into()),
            None => (parent, name.into()),
        }
    }

    /// Returns the same for a caller that changes something there: the directory stays as long as
    /// it runs.
    pub fn change_aside<'n>(
        &self,
        caller: Caller,
        parent: Node,
        name: &'n str,
    ) -> (Node, Cow<'n, str>) {
        if let Node::Made(_) = parent {
            self.asides.join(caller, &parent);
        }
        self.beside_aside(parent, name)
    }

    /// Makes a directory for files put aside; None for any other.
    ///
    /// # Errors
    /// EEXIST.
    pub fn make_aside(&self, caller: Caller, dir: &Node, name: &str) -> Result<Option<Node>> {
        if !is_aside(caller, dir, name) {
            return Ok(None);
        }
        self.sweep();
        let node = self.new_node();
        self.asides.add(caller, dir, name, node.clone())?;
        Ok(Some(node))
    }

    /// Removes a directory for files put aside; false where there is none of that name.
    ///
    /// # Errors
    /// ENOTEMPTY.
    pub fn remove_aside(&self, dir: &Node, name: &str) -> Result<bool> {
        let is_empty = |dir: &Node| self.put_aside(dir).is_empty();
        self.asides.remove(dir, name, is_empty)
    }

    /// Returns the directory for files put aside that a name in a directory is.
    pub fn aside_child(&self, dir: &Node, name: &str) -> Option<Node> {
        if !name.starts_with('.') {
            return None;
        }
        self.sweep();
        let (of, node) = self.asides.in_directory(dir)?;
        (of == name).then_some(node)
    }

    /// Returns the attributes of a directory for files put aside; None for any other node.
    pub fn aside_attr(&self, owner: Owner, node: &Node) -> Option<Attr> {
        if !matches!(node, Node::Made(_)) {
            return None;
        }
        self.asides.target_of(node)?;
        let mut attr = Attr::of_directory(owner, node, 0, SystemTime::now());
        attr.kept = Kept::Not;
        Some(attr)
    }

    /// Returns what is in a directory for files put aside.
    ///
    /// # Errors
    /// ENOENT where the node is none.
    pub fn list_aside(&self, node: &Node) -> Result<Vec<DirEntry>> {
        let dir = self.asides.target_of(node).ok_or_else(not_there)?;
        Ok(self.put_aside(&dir).into_iter().map(file_entry).collect())
    }

    /// Makes a listing what its callers see: with the archives that wait in a box that exists, and
    /// with those that are put aside in a directory of their own.
    pub fn complete_listing(&self, dir: &Node, entries: &mut Vec<DirEntry>) {
        self.sweep();
        if let Node::Box(_) | Node::Snapshot(..) = dir {
            entries.extend(self.loose.waiting_in(dir).into_iter().map(file_entry));
        }
        entries.retain(|entry| !entry.name.to_string_lossy().starts_with(ASIDE_PREFIX));
        let Some((name, node)) = self.asides.in_directory(dir) else {
            return;
        };
        entries.push(DirEntry {
            name: name.into(),
            kind: Kind::Directory,
            ino: node.ino(),
        });
    }

    /// Lets go of what is done with.
    fn sweep(&self) {
        self.boxes.sweep();
        self.loose.sweep();
        self.asides.sweep(|dir| self.put_aside(dir).is_empty());
    }

    /// Returns the files put aside in a directory, with the names that they will have.
    fn put_aside(&self, dir: &Node) -> Vec<(String, Node)> {
        let mut files = self.loose.in_directory(dir);
        if let Some(id) = self.boxes.box_of(dir) {
            self.boxes.with(&id, |staged| {
                let names = staged.children.get(&dir.ino()).into_iter().flatten();
                files.extend(names.map(|(name, child)| (name.clone(), child.node.clone())));
            });
        }
        let aside = files.into_iter().filter_map(|(name, node)| {
            let name = name.strip_prefix(ASIDE_PREFIX)?;
            Some((name.to_owned(), node))
        });
        aside.collect()
    }
}

fn file_entry((name, node): (String, Node)) -> DirEntry {
    DirEntry {
        name: name.into(),
        kind: Kind::File,
        ino: node.ino(),
    }
}
