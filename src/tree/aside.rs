//! Directories in which rsync puts files aside. With `--delay-updates` it makes `.~tmp~` beside the files
//! that it brings, moves each there as soon as it is complete, and all of them to their places at its end.
//! Where it can't make that directory, it drops the file, says so and exits with 0.
//!
//! What is in it is kept with the files beside it, under the name `.~tmp~/NAME`, which no caller can give:
//! a temporary name like others.

use std::borrow::Cow;

use super::Tree;
use super::attr::{Attr, DirEntry, Kept, Kind};
use super::caller::{Caller, Makers};
use super::change::{exists, not_there};
use super::node::Node;
use super::staging::Staging;
use crate::{Error, Result};

/// The name of such a directory (rsync's options.c: `tmp_partialdir`).
const ASIDE: &str = ".~tmp~";

/// What a file in it is called beside it.
pub(super) const ASIDE_PREFIX: &str = ".~tmp~/";

/// A directory for files put aside.
pub(super) struct AsideDirectory {
    node: Node,
    /// The root, a box or a snapshot: where its files will be.
    dir: Node,
    makers: Makers,
}

impl Staging {
    /// The directory for files put aside in another.
    fn aside_in(&self, dir: &Node) -> Option<&AsideDirectory> {
        self.asides.iter().find(|aside| aside.dir == *dir)
    }

    /// The directory whose files are put aside in this one.
    fn dir_of_aside(&self, node: &Node) -> Option<&Node> {
        let mut asides = self.asides.iter();
        asides
            .find(|aside| aside.node == *node)
            .map(|aside| &aside.dir)
    }

    /// Lets go of directories whose makers are gone and left nothing in them.
    pub(super) fn sweep_asides(&mut self) {
        if self.asides.is_empty() {
            return;
        }
        let asides = std::mem::take(&mut self.asides);
        self.asides = asides
            .into_iter()
            .filter(|aside| aside.makers.any_alive() || !self.put_aside(&aside.dir).is_empty())
            .collect();
    }

    /// The files put aside in a directory, with the names that they will have.
    fn put_aside(&self, dir: &Node) -> Vec<(String, Node)> {
        let loose = self.files.iter().filter(|loose| loose.dir == *dir);
        let loose = loose.map(|loose| (loose.name.as_str(), &loose.file.node));
        let staged = self.box_of(dir).and_then(|id| self.boxes.get(&id));
        let names = staged.and_then(|staged| staged.children.get(&dir.ino()));
        let names = names.into_iter().flatten();
        let staged = names.map(|(name, child)| (name.as_str(), &child.node));
        let aside = loose.chain(staged).filter_map(|(name, node)| {
            let name = name.strip_prefix(ASIDE_PREFIX)?;
            Some((name.to_owned(), node.clone()))
        });
        aside.collect()
    }
}

impl Tree {
    /// Where a name in a directory is kept: for one in a directory of files put aside, beside that.
    pub(super) fn beside_aside<'n>(&self, parent: Node, name: &'n str) -> (Node, Cow<'n, str>) {
        let dir = match parent {
            Node::Made(_) => self.staging.lock().dir_of_aside(&parent).cloned(),
            _ => None,
        };
        match dir {
            Some(dir) => (dir, format!("{ASIDE_PREFIX}{name}").into()),
            None => (parent, name.into()),
        }
    }

    /// The same, for a caller that changes something there: the directory stays as long as it runs.
    pub(super) fn change_aside<'n>(
        &self,
        caller: Caller,
        parent: Node,
        name: &'n str,
    ) -> (Node, Cow<'n, str>) {
        if let Node::Made(_) = parent {
            let mut staging = self.staging.lock();
            let mut asides = staging.asides.iter_mut();
            if let Some(aside) = asides.find(|aside| aside.node == parent) {
                aside.makers.join(caller);
            }
        }
        self.beside_aside(parent, name)
    }

    /// mkdir(2) of a directory for files put aside; None for any other.
    ///
    /// # Errors
    /// EEXIST.
    pub(super) fn make_aside(
        &self,
        caller: Caller,
        dir: &Node,
        name: &str,
    ) -> Result<Option<Node>> {
        if name != ASIDE || !matches!(dir, Node::Root | Node::Box(_) | Node::Snapshot(..)) {
            return Ok(None);
        }
        let node = self.fresh_made();
        let mut staging = self.staging.lock();
        staging.sweep();
        if staging.aside_in(dir).is_some() {
            return Err(exists(name));
        }
        staging.asides.push(AsideDirectory {
            node: node.clone(),
            dir: dir.clone(),
            makers: Makers::begin(caller),
        });
        Ok(Some(node))
    }

    /// rmdir(2) of such a directory; false where there is none.
    ///
    /// # Errors
    /// ENOTEMPTY.
    pub(super) fn remove_aside(&self, dir: &Node, name: &str) -> Result<bool> {
        let mut staging = self.staging.lock();
        if name != ASIDE || staging.aside_in(dir).is_none() {
            return Ok(false);
        }
        if !staging.put_aside(dir).is_empty() {
            return Err(Error::new(libc::ENOTEMPTY, format!("{name} is not empty")));
        }
        staging.asides.retain(|aside| aside.dir != *dir);
        Ok(true)
    }

    /// The directory for files put aside that a name in a directory is.
    pub(super) fn aside_child(&self, dir: &Node, name: &str) -> Option<Node> {
        if name != ASIDE {
            return None;
        }
        let mut staging = self.staging.lock();
        staging.sweep();
        staging.aside_in(dir).map(|aside| aside.node.clone())
    }

    /// Attributes of a directory for files put aside; None for any other node.
    pub(super) fn aside_attr(&self, node: &Node) -> Option<Attr> {
        if !matches!(node, Node::Made(_)) {
            return None;
        }
        self.staging.lock().dir_of_aside(node)?;
        let mut attr = self.directory(node, 0, std::time::SystemTime::now());
        attr.kept = Kept::Not;
        Some(attr)
    }

    /// What is in a directory for files put aside.
    ///
    /// # Errors
    /// ENOENT where the node is none.
    pub(super) fn list_aside(&self, node: &Node) -> Result<Vec<DirEntry>> {
        let staging = self.staging.lock();
        let dir = staging.dir_of_aside(node).ok_or_else(not_there)?;
        let files = staging.put_aside(dir).into_iter();
        let entries = files.map(|(name, node)| DirEntry {
            name: name.into(),
            kind: Kind::File,
            ino: node.ino(),
        });
        Ok(entries.collect())
    }

    /// The listing of a directory as its callers see it: files put aside are in a directory of their own.
    pub(super) fn fold_aside(&self, dir: &Node, entries: &mut Vec<DirEntry>) {
        let staging = self.staging.lock();
        let Some(aside) = staging.aside_in(dir) else {
            return;
        };
        entries.retain(|entry| !entry.name.to_string_lossy().starts_with(ASIDE_PREFIX));
        entries.push(DirEntry {
            name: ASIDE.into(),
            kind: Kind::Directory,
            ino: aside.node.ino(),
        });
    }
}
