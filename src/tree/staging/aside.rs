//! Directories in which rsync puts files aside. With `--delay-updates` it makes `.~tmp~` beside the
//! files that it brings, moves each there as soon as it is complete, and all of them to their
//! places at its end. Where it can't make that directory, it drops the file, says so and exits with
//! 0.
//!
//! What is in it is kept with the files beside it, under the name `.~tmp~/NAME`, which no caller
//! can give: a temporary name like others.

use parking_lot::Mutex;

use crate::process::{Caller, ProcessGroup};
use crate::tree::nodes::names::exists;
use crate::tree::nodes::node::Node;
use crate::tree::staging::program::Program;
use crate::{Error, Result};

/// The name of such a directory (rsync's options.c: `tmp_partialdir`).
const ASIDE: &str = ".~tmp~";

/// A directory for files put aside.
struct AsideDirectory {
    /// Its name: `.~tmp~`, or that of rsync's `--partial-dir`.
    name: String,
    node: Node,
    /// The root, a box or a snapshot: where its files will be.
    dir: Node,
    makers: ProcessGroup,
}

/// All directories for files put aside.
#[derive(Default)]
pub struct AsideDirectories {
    directories: Mutex<Vec<AsideDirectory>>,
}

/// Returns whether a directory of this name is one for files put aside. One that has another name
/// than rsync's own may be its `--partial-dir`; the command line of its server need not have that.
pub fn is_aside(caller: Caller, dir: &Node, name: &str) -> bool {
    matches!(dir, Node::Root | Node::Box(_) | Node::Snapshot(..))
        && (name == ASIDE || (name.starts_with('.') && Program::of(caller).is_rsync()))
}

impl AsideDirectories {
    /// Lets go of directories whose makers are gone and left nothing in them.
    pub fn sweep(&self, is_empty: impl Fn(&Node) -> bool) {
        self.directories
            .lock()
            .retain(|aside| aside.makers.any_alive() || !is_empty(&aside.dir));
    }

    /// Adds a directory that the caller makes.
    ///
    /// # Errors
    /// EEXIST where there is one in `dir`, of whatever name.
    pub fn add(&self, caller: Caller, dir: &Node, name: &str, node: Node) -> Result<()> {
        let mut directories = self.directories.lock();
        if directories.iter().any(|aside| aside.dir == *dir) {
            return Err(exists(name));
        }
        directories.push(AsideDirectory {
            name: name.to_owned(),
            node,
            dir: dir.clone(),
            makers: ProcessGroup::begin(caller),
        });
        Ok(())
    }

    /// Removes the directory of this name, if there is one.
    ///
    /// # Errors
    /// ENOTEMPTY.
    pub fn remove(&self, dir: &Node, name: &str, is_empty: impl Fn(&Node) -> bool) -> Result<bool> {
        let mut directories = self.directories.lock();
        let mut places = directories.iter();
        let Some(index) = places.position(|aside| aside.dir == *dir && aside.name == name) else {
            return Ok(false);
        };
        if !is_empty(dir) {
            return Err(Error::new(libc::ENOTEMPTY, format!("{name} is not empty")));
        }
        directories.remove(index);
        Ok(true)
    }

    /// Keeps the directory as long as the caller runs, which changes something in it.
    pub fn join(&self, caller: Caller, node: &Node) {
        let mut directories = self.directories.lock();
        if let Some(aside) = directories.iter_mut().find(|aside| aside.node == *node) {
            aside.makers.join(caller);
        }
    }

    /// Returns the name and the node of the directory that is in another.
    pub fn in_directory(&self, dir: &Node) -> Option<(String, Node)> {
        let directories = self.directories.lock();
        let aside = directories.iter().find(|aside| aside.dir == *dir)?;
        Some((aside.name.clone(), aside.node.clone()))
    }

    /// Returns the directory that the files put aside in this one belong to.
    pub fn target_of(&self, node: &Node) -> Option<Node> {
        let directories = self.directories.lock();
        let aside = directories.iter().find(|aside| aside.node == *node)?;
        Some(aside.dir.clone())
    }
}
