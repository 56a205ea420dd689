//! What the kernel was told: the inodes that it knows, and their generations.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::OnceLock;

use parking_lot::Mutex;

use crate::exports::Contents;
use crate::tree::nodes::known_nodes::KnownNodes;
use crate::tree::nodes::node::{Node, ROOT_INO};
use crate::{Error, Result};

/// What the kernel keeps of the mount, and drops when it is told to.
pub trait KernelCache: Send + Sync {
    /// Has the kernel drop the pages that it has of an inode.
    fn drop_pages(&self, ino: u64);

    /// Has the kernel drop a name in a directory, and everything below it: it looks the name up
    /// again. Waits for the lookups in that directory that are under way, so a request that holds
    /// the directory must not call it.
    fn drop_name(&self, directory: u64, name: &OsStr);
}

/// What the kernel was told, and has not forgotten.
#[derive(Default)]
pub struct KernelView {
    told: Mutex<Told>,
    cache: OnceLock<Box<dyn KernelCache>>,
}

#[derive(Default)]
struct Told {
    nodes: KnownNodes,
    /// The contents and the generation of each export, by its own inode number.
    exports: HashMap<u64, (Contents, u64)>,
    /// Generations of inodes whose directory was removed, and is there again.
    raised: HashMap<u64, u64>,
}

impl KernelView {
    /// Returns the node with an inode number.
    ///
    /// # Errors
    /// ESTALE when the kernel does not know it.
    pub fn node(&self, ino: u64) -> Result<Node> {
        if ino == ROOT_INO {
            return Ok(Node::Root);
        }
        let node = self.told.lock().nodes.node(ino);
        node.ok_or_else(|| Error::new(libc::ESTALE, "that file is gone"))
    }

    /// Records that the kernel is told of a node: it may ask for it by number until it forgets.
    /// Returns the number.
    pub fn tell(&self, node: &Node) -> u64 {
        self.told.lock().nodes.tell(node)
    }

    /// Does the same for a name that was looked up. Returns the number and the generation, which is
    /// raised when the contents of an export are not what the kernel was told last. Without
    /// contents (the export is being written) it stays.
    pub fn tell_found(&self, node: &Node, contents: Option<Contents>) -> (u64, u64) {
        let mut told = self.told.lock();
        let generation = match node {
            Node::Export(_) | Node::Compressed(_) => told.generation_of_export(node, contents),
            _ => told.raised.get(&node.ino()).copied().unwrap_or(0),
        };
        (told.nodes.tell(node), generation)
    }

    /// Records that the kernel forgets `times` of what it was told of a node.
    pub fn forget(&self, ino: u64, times: u64) {
        let mut told = self.told.lock();
        if let Some(node) = told.nodes.forget(ino, times) {
            let ino = node.ino();
            told.exports.remove(&ino);
            told.raised.remove(&ino);
        }
    }

    /// Raises the generation of a directory that the kernel was told is gone. The kernel marks such
    /// an inode as dead; a directory that comes back has to be another inode.
    pub fn raise_generation(&self, node: &Node) {
        *self.told.lock().raised.entry(node.ino()).or_default() += 1;
    }

    /// Returns the contents that the kernel was last told an export's inode has.
    pub fn contents(&self, node: &Node) -> Option<Contents> {
        let told = self.told.lock();
        told.exports.get(&node.ino()).map(|(contents, _)| *contents)
    }

    /// Sets what the kernel keeps. Only the first call counts.
    pub fn set_cache(&self, cache: impl KernelCache + 'static) {
        let _ = self.cache.set(Box::new(cache));
    }

    /// Has the kernel drop the pages that it has of a node.
    pub fn drop_pages(&self, node: &Node) {
        if let Some(cache) = self.cache.get() {
            let ino = self.told.lock().nodes.number(node);
            cache.drop_pages(ino);
        }
    }

    /// Has the kernel drop a name in a directory, as [`KernelCache::drop_name`] does.
    pub fn drop_name(&self, directory: &Node, name: &str) {
        if let Some(cache) = self.cache.get() {
            let ino = self.told.lock().nodes.number(directory);
            cache.drop_name(ino, OsStr::new(name));
        }
    }
}

impl Told {
    fn generation_of_export(&mut self, node: &Node, contents: Option<Contents>) -> u64 {
        let ino = node.ino();
        let Some(contents) = contents else {
            return self
                .exports
                .get(&ino)
                .map_or(0, |(_, generation)| *generation);
        };
        let (known, generation) = self.exports.entry(ino).or_insert((contents, 0));
        if *known != contents {
            *known = contents;
            *generation += 1;
        }
        *generation
    }
}
