//! Looks names and attributes up for the kernel, and records what it is told.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::Result;
use crate::exports::Source;
use crate::process::Caller;
use crate::tree::nodes::attr::{Attr, Kept};
use crate::tree::nodes::kernel_view::KernelView;
use crate::tree::nodes::names::{gone, not_there, text};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::reading::caller_view::CallerView;
use crate::tree::staging::staging_area::StagingArea;

/// Answers the kernel's lookups.
pub struct Lookup {
    kernel: Arc<KernelView>,
    view: Arc<CallerView>,
    staging: Arc<StagingArea>,
}

impl Lookup {
    /// Returns one that shows a view to the kernel.
    pub fn new(
        kernel: Arc<KernelView>,
        view: Arc<CallerView>,
        staging: Arc<StagingArea>,
    ) -> Lookup {
        Lookup {
            kernel,
            view,
            staging,
        }
    }

    /// Finds a name in a directory; the kernel is told of what is found.
    ///
    /// # Errors
    /// ENOENT, or EIO when an export can't be planned.
    pub fn find(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<Attr> {
        let parent = self.kernel.node(parent)?;
        self.find_in(caller, parent.clone(), name).map_err(|error| {
            // Another snapshot has taken the place of this one: after ESTALE the kernel finds it.
            let is_missing = error.errno() == libc::ENOENT && matches!(parent, Node::Snapshot(..));
            if is_missing && self.is_gone(caller, &parent) {
                gone()
            } else {
                error
            }
        })
    }

    fn find_in(&self, caller: Caller, parent: Node, name: &OsStr) -> Result<Attr> {
        if let Node::Guest(directory) = &parent {
            return self.view.home.guests.lookup(directory, name);
        }
        if let Node::Running(Derived::Rootfs, source) = &parent {
            let guests = &self.view.home.guests;
            return guests.lookup_in_running(caller, source, name);
        }
        let name = text(name).map_err(|_| not_there())?;
        let (parent, name) = self.staging.beside_aside(parent, name);
        let child = self.view.child(caller, &parent, &name);
        let node = child.map_err(|error| {
            // The kernel may have kept the directory's name a moment too long, and another has it
            // by now. After ESTALE it looks again, from the root on.
            match &parent {
                Node::ViewOf(source) if !self.view.home.boxes.has(source) => gone(),
                // Or a link led here that the kernel kept too long.
                Node::View | Node::ViewSnapshots(_) if error.errno() == libc::ENOENT => gone(),
                _ => error,
            }
        })?;
        let staged = self.view.staged_attr(caller, &node);
        let is_staged = staged.is_some();
        let mut attr = match staged {
            Some(attr) => attr,
            None => self.view.attr(caller, &node)?,
        };
        if let Node::ViewOf(source) = &parent {
            // The node is of one state of the disk for good; the state that the name stands for
            // changes. After a change of ours the kernel is told.
            attr.kept = match (&node, source) {
                (Node::DiskImage(_), Source::Live { .. }) => Kept::Not,
                (Node::DiskImage(_) | Node::Guest(_), _) => Kept::Moment,
                _ => attr.kept,
            };
        }
        let contents = if is_staged {
            None
        } else {
            self.view.home.exports.contents(&node)?
        };
        if let Some(contents) = contents {
            // Size and generation have to be of one moment: a size may become known between two
            // looks.
            attr.resize(contents.size);
        }
        (attr.ino, attr.generation) = self.kernel.tell_found(&node, contents);
        Ok(attr)
    }

    fn is_gone(&self, caller: Caller, node: &Node) -> bool {
        let attr = self.view.attr(caller, node);
        attr.is_err_and(|error| error.errno() == libc::ENOENT)
    }

    /// Tells the kernel of a node that was just made. Returns its attributes.
    ///
    /// # Errors
    /// Those of [`CallerView::attr`].
    pub fn tell_made(&self, caller: Caller, node: &Node) -> Result<Attr> {
        let mut attr = self.view.attr(caller, node)?;
        attr.ino = self.kernel.tell(node);
        Ok(attr)
    }

    /// Returns the attributes of an inode; those of the open file where there is one.
    ///
    /// # Errors
    /// ESTALE or ENOENT when it is gone.
    pub fn attr(&self, caller: Caller, ino: u64, handle: Option<u64>) -> Result<Attr> {
        let mut attr = self.attr_of_known(caller, ino, handle)?;
        attr.ino = ino;
        Ok(attr)
    }

    fn attr_of_known(&self, caller: Caller, ino: u64, handle: Option<u64>) -> Result<Attr> {
        let node = self.kernel.node(ino)?;
        let home = &self.view.home;
        if let Some(size) = handle.and_then(|handle| home.open.size_at_open(handle)) {
            let mut attr = self.view.attr(caller, &node)?;
            attr.resize(size);
            return Ok(attr);
        }
        if let Node::Export(source) | Node::Compressed(source) = &node {
            let owner = home.store.home().owner();
            let attr = home.exports.attr_of_open(owner, &node, source, handle)?;
            if let Some(attr) = attr {
                return Ok(attr);
            }
        }
        self.view.attr(caller, &node)
    }
}
