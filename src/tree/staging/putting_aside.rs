//! The calls that make, fill and remove directories for [files put aside](crate::tree::staging::aside).

use std::borrow::Cow;

use crate::tree::Tree;
use crate::tree::nodes::attr::{Attr, DirEntry, Kept, Kind};
use crate::tree::nodes::names::{exists, not_there};
use crate::tree::nodes::node::Node;
use crate::tree::staging::aside::{ASIDE, ASIDE_PREFIX, AsideDirectory};
use crate::tree::staging::caller::{Caller, Makers};
use crate::{Error, Result};

impl Tree {
    /// Where a name in a directory is kept: for one in a directory of files put aside, beside that.
    pub(in crate::tree) fn beside_aside<'n>(
        &self,
        parent: Node,
        name: &'n str,
    ) -> (Node, Cow<'n, str>) {
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
    pub(in crate::tree) fn change_aside<'n>(
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
    pub(in crate::tree) fn make_aside(
        &self,
        caller: Caller,
        dir: &Node,
        name: &str,
    ) -> Result<Option<Node>> {
        // Of another name it may be rsync's --partial-dir, which its server's command line need not tell.
        let is_aside = name == ASIDE || (name.starts_with('.') && caller.is_rsync());
        if !is_aside || !matches!(dir, Node::Root | Node::Box(_) | Node::Snapshot(..)) {
            return Ok(None);
        }
        let node = self.fresh_made();
        let mut staging = self.staging.lock();
        staging.sweep();
        if staging.aside_in(dir).is_some() {
            return Err(exists(name));
        }
        staging.asides.push(AsideDirectory {
            name: name.to_owned(),
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
    pub(in crate::tree) fn remove_aside(&self, dir: &Node, name: &str) -> Result<bool> {
        let mut staging = self.staging.lock();
        if staging.aside_in(dir).is_none_or(|aside| aside.name != name) {
            return Ok(false);
        }
        if !staging.put_aside(dir).is_empty() {
            return Err(Error::new(libc::ENOTEMPTY, format!("{name} is not empty")));
        }
        staging.asides.retain(|aside| aside.dir != *dir);
        Ok(true)
    }

    /// The directory for files put aside that a name in a directory is.
    pub(in crate::tree) fn aside_child(&self, dir: &Node, name: &str) -> Option<Node> {
        if !name.starts_with('.') {
            return None;
        }
        let mut staging = self.staging.lock();
        staging.sweep();
        let aside = staging.aside_in(dir).filter(|aside| aside.name == name);
        aside.map(|aside| aside.node.clone())
    }

    /// Attributes of a directory for files put aside; None for any other node.
    pub(in crate::tree) fn aside_attr(&self, node: &Node) -> Option<Attr> {
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
    pub(in crate::tree) fn list_aside(&self, node: &Node) -> Result<Vec<DirEntry>> {
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

    /// The listing of a directory as its callers see it: with the archives that wait in a box that exists, and
    /// those that are put aside in a directory of their own.
    pub(in crate::tree) fn fold_aside(&self, dir: &Node, entries: &mut Vec<DirEntry>) {
        let staging = self.staging.lock();
        if let Node::Box(_) | Node::Snapshot(..) = dir {
            let waiting = staging.waiting_at(dir).into_iter();
            entries.extend(waiting.map(|(name, node)| DirEntry {
                name: name.into(),
                kind: Kind::File,
                ino: node.ino(),
            }));
        }
        let Some(aside) = staging.aside_in(dir) else {
            return;
        };
        entries.retain(|entry| !entry.name.to_string_lossy().starts_with(ASIDE_PREFIX));
        entries.push(DirEntry {
            name: aside.name.clone().into(),
            kind: Kind::Directory,
            ino: aside.node.ino(),
        });
    }
}
