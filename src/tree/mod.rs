//! The names and files a user sees, without FUSE: path → node, attributes, staging, handles.
//!
//! Plain Rust that returns [`Result`]; `fuse.rs` only translates. What a node is follows from what
//! it stands for (`node`), boxes and snapshots that exist are shown by `view`, those being made by
//! `staging`, open files are `handle`s, what was written becomes a box in `commit`, and `change`,
//! `rename` and `remove` have what alters names; `dealing` remembers who removed which of them.

mod attr;
mod caller;
mod change;
mod commit;
mod compressed;
mod dealing;
mod describe;
mod handle;
mod names;
mod node;
mod remove;
mod rename;
mod staged_file;
mod staging;
mod view;
mod xattr;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

pub use crate::home::Space;
pub use crate::store::{Compacting, Compression};
pub use attr::{Attr, DirEntry, Kind};
pub use caller::Caller;
pub use change::SetAttr;
pub use compressed::OpenAnswer;
pub use handle::Opened;
pub use node::{Node, ROOT_INO};
pub use rename::RenameMode;

use crate::store::{Store, Upkeep};
use crate::{Error, Result};
use caller::Makers;
use names::Names;

/// How a home is shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Refuse changes, and write nothing into the home at all.
    pub read_only: bool,
    /// How compressed archives are made and kept.
    pub compression: Compression,
    /// When layers are merged.
    pub compacting: Compacting,
}

/// A home as a tree of files.
pub struct Tree {
    store: Arc<Store>,
    names: Mutex<Option<Arc<Names>>>,
    /// Nodes the kernel knows, by inode number, each with how often it was told of it.
    known: Mutex<HashMap<u64, (Node, u64)>>,
    staging: Mutex<staging::Staging>,
    handles: Mutex<HashMap<u64, Arc<handle::Handle>>>,
    next_handle: AtomicU64,
    next_made: AtomicU64,
    /// What the kernel was last told an export's inode has, and its generation.
    told: Mutex<HashMap<u64, (crate::store::Contents, u64)>>,
    /// Generations of inodes whose directory the kernel was told is gone, and is there again.
    raised: Mutex<HashMap<u64, u64>>,
    /// What processes did to boxes that exist, name by name. Locked after `staging` where both are.
    dealings: Mutex<dealing::Dealings>,
    /// Who opened a box's export for writing, by its inode number: copy tools set its size, times and
    /// mode.
    writers: Mutex<HashMap<u64, (Makers, Instant)>>,
    /// Snapshots just taken, by id, with who took them: a copy into one takes it back.
    fresh: Mutex<HashMap<String, (Makers, Instant)>>,
    upkeep: Mutex<Option<Upkeep>>,
}

impl Tree {
    /// Opens a home for showing.
    ///
    /// # Errors
    /// Those of [`Store::open`]: no such home, a foreign directory, a damaged database.
    pub fn open(home: &Path, options: Options) -> Result<Tree> {
        let store = Arc::new(Store::open(home, options.read_only, options.compression)?);
        let upkeep = match options.read_only {
            true => None,
            false => Upkeep::begin(&store, options.compacting),
        };
        Ok(Tree {
            store,
            names: Mutex::new(None),
            known: Mutex::default(),
            staging: Mutex::default(),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            next_made: AtomicU64::new(1),
            told: Mutex::default(),
            raised: Mutex::default(),
            dealings: Mutex::default(),
            writers: Mutex::default(),
            fresh: Mutex::default(),
            upkeep: Mutex::new(upkeep),
        })
    }

    /// The boxes as they are now, by the names they are shown by.
    fn names(&self) -> Result<Arc<Names>> {
        let catalog = self.store.home().catalog()?;
        let mut names = self.names.lock();
        match &*names {
            Some(known) if Arc::ptr_eq(known.catalog(), &catalog) => Ok(known.clone()),
            _ => {
                self.store.forget_gone_exports(&catalog);
                let fresh = Arc::new(Names::of(catalog));
                *names = Some(fresh.clone());
                Ok(fresh)
            }
        }
    }

    /// The node with an inode number that the kernel was told of.
    ///
    /// # Errors
    /// ESTALE when it was not.
    fn node(&self, ino: u64) -> Result<Node> {
        if ino == ROOT_INO {
            return Ok(Node::Root);
        }
        let known = self.known.lock();
        known
            .get(&ino)
            .map(|(node, _)| node.clone())
            .ok_or_else(|| Error::new(libc::ESTALE, "that file is gone"))
    }

    /// The kernel is told of a node: it may ask for it by number until it forgets.
    fn tell(&self, node: &Node) {
        let mut known = self.known.lock();
        known.entry(node.ino()).or_insert((node.clone(), 0)).1 += 1;
    }

    /// The kernel forgets `times` of what it was told of a node.
    pub fn forget(&self, ino: u64, times: u64) {
        let mut known = self.known.lock();
        if let Some((_, told)) = known.get_mut(&ino) {
            *told = told.saturating_sub(times);
            if *told == 0 {
                known.remove(&ino);
                self.told.lock().remove(&ino);
                self.raised.lock().remove(&ino);
            }
        }
    }

    /// The kernel was told that a directory is gone, which it marks as dead; when it comes back it has
    /// to be another inode to it.
    fn raise_generation(&self, node: &Node) {
        *self.raised.lock().entry(node.ino()).or_default() += 1;
    }

    /// Whether attributes of this inode may take longer than a look into memory: they need an
    /// export's size.
    pub fn is_slow(&self, ino: u64) -> bool {
        matches!(
            self.node(ino),
            Ok(Node::Export(_)
                | Node::Compressed(_)
                | Node::Box(_)
                | Node::Snapshot(..)
                | Node::ViewOf(_))
        )
    }

    /// Notes a refusal in the log and makes an error of it.
    fn refuse(&self, errno: i32, sentence: impl Into<String>) -> Error {
        let sentence = sentence.into();
        self.store.journal().note(&format!("refused: {sentence}"));
        Error::new(errno, sentence)
    }

    /// Space on the home's file system.
    ///
    /// # Errors
    /// What statvfs says.
    pub fn space(&self) -> Result<Space> {
        self.store.home().space()
    }

    /// Nobody reads any more: whoever still waits for an archive is told so.
    pub fn close(&self) {
        drop(self.upkeep.lock().take());
        self.store.stop_compressing();
    }

    /// EROFS when mounted read-only.
    fn refuse_read_only(&self) -> Result<()> {
        self.store.refuse_read_only()
    }

    fn fresh_made(&self) -> Node {
        Node::Made(self.next_made.fetch_add(1, Ordering::Relaxed))
    }
}

/// A file name as text; names that are none can't be a box's or a snapshot's.
fn text(name: &OsStr) -> Result<&str> {
    name.to_str().ok_or_else(|| {
        Error::new(
            libc::EINVAL,
            format!("{name:?} is not UTF-8, BoxLite's names are"),
        )
    })
}
