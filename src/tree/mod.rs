//! The names and files a user sees, without FUSE: path → node, attributes, staging, handles.
//!
//! Plain Rust that returns [`Result`]; `fuse.rs` only translates. What a node is follows from what
//! it stands for (`node`), boxes and snapshots that exist are shown by `view`, those being made by
//! `staging`, open files are `handle`s, what was written becomes a box in `commit`, and `change`,
//! `rename` and `remove` have what alters names; `dealing` remembers who removed which of them.

mod changes;
mod nodes;
mod reading;
mod staging;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

pub use crate::home::Space;
pub use crate::store::{Compacting, Compression, Imports};
pub use changes::create::SetAttr;
pub use nodes::attr::{Attr, DirEntry, Kept, Kind, Wanted as WantedOfList};
pub use reading::compressed::OpenAnswer;
pub use staging::caller::Caller;

pub use changes::rename::RenameMode;
use nodes::node::Derived;
pub use nodes::node::{Node, ROOT_INO};
pub use nodes::status::MountFacts;
pub use reading::open_file::Opened;

use crate::store::{Source, Store, Upkeep};
use crate::{Error, Result};
use nodes::names::Names;
use staging::caller::Makers;

/// How a home is shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Refuse changes, and write nothing into the home at all.
    pub read_only: bool,
    /// Make changes that are safe beside a BoxLite runtime also while one has the home.
    pub is_shared: bool,
    /// How compressed archives are made and kept.
    pub compression: Compression,
    /// When layers are merged.
    pub compacting: Compacting,
    /// What archives may bring.
    pub imports: Imports,
    /// What links of guests say.
    pub links: Links,
}

/// What the symbolic links in a guest are shown to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Links {
    /// What leads to the guest's own files, and never out of `rootfs`.
    #[default]
    Inside,
    /// What the guest said, whatever that is where the mount is.
    Guest,
}

/// A home as a tree of files.
pub struct Tree {
    store: Arc<Store>,
    names: Mutex<Option<Arc<Names>>>,
    /// Nodes the kernel knows.
    known: Mutex<nodes::known_nodes::Known>,
    /// What guests' files are numbered by.
    numbers: nodes::guest_numbers::GuestNumbers,
    /// Whether links of guests say what the guest said.
    links: Links,
    staging: Mutex<staging::staging_area::Staging>,
    handles: Mutex<HashMap<u64, Arc<reading::open_file::Handle>>>,
    next_handle: AtomicU64,
    next_made: AtomicU64,
    /// What the kernel was last told an export's inode has, and its generation.
    told: Mutex<HashMap<u64, (crate::store::Contents, u64)>>,
    /// Generations of inodes whose directory the kernel was told is gone, and is there again.
    raised: Mutex<HashMap<u64, u64>>,
    /// What processes did to boxes that exist, name by name. Locked after `staging` where both are.
    dealings: Mutex<staging::caller_history::Dealings>,
    /// Who opened a box's export for writing, by its inode number: copy tools set its size, times and
    /// mode.
    writers: Mutex<HashMap<u64, (Makers, Instant)>>,
    /// Has the kernel drop the pages it has of an inode.
    drop_pages: OnceLock<DropPages>,
    upkeep: Mutex<Option<Upkeep>>,
    /// Versions of `.boxlite/status`. Locked after `known` where both are.
    status: Mutex<nodes::status::Versions>,
    /// What whoever mounted told, and when.
    facts: OnceLock<(MountFacts, SystemTime)>,
}

impl Tree {
    /// Whether nothing can be changed: it was asked for, or the home can't be written.
    pub fn is_read_only(&self) -> bool {
        self.store.is_read_only()
    }

    /// Opens a home for showing.
    ///
    /// # Errors
    /// Those of [`Store::open`]: no such home, a foreign directory, a damaged database.
    pub fn open(home: &Path, options: Options) -> Result<Tree> {
        let store = Store::open_shared(
            home,
            options.read_only,
            options.is_shared,
            options.compression,
        )?;
        let store = Arc::new(store.taking(options.imports));
        let upkeep = match store.is_read_only() {
            true => None,
            false => Upkeep::begin(&store, options.compacting),
        };
        Ok(Tree {
            store,
            names: Mutex::new(None),
            known: Mutex::default(),
            numbers: nodes::guest_numbers::GuestNumbers::default(),
            links: options.links,
            staging: Mutex::default(),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            next_made: AtomicU64::new(1),
            told: Mutex::default(),
            raised: Mutex::default(),
            dealings: Mutex::default(),
            writers: Mutex::default(),
            drop_pages: OnceLock::new(),
            upkeep: Mutex::new(upkeep),
            status: Mutex::default(),
            facts: OnceLock::new(),
        })
    }

    /// The boxes as they are now, by the names they are shown by.
    fn names(&self) -> Result<Arc<Names>> {
        let catalog = self.store.home().catalog()?;
        let mut names = self.names.lock();
        match &*names {
            Some(known) if Arc::ptr_eq(known.catalog(), &catalog) => Ok(known.clone()),
            known => {
                self.store.forget_gone_exports(&catalog);
                let fresh = Arc::new(Names::of(catalog));
                for link in known
                    .iter()
                    .flat_map(|known| links_elsewhere(known, &fresh))
                {
                    self.raise_generation(&link);
                }
                *names = Some(fresh.clone());
                Ok(fresh)
            }
        }
    }

    /// Takes what has the kernel drop the pages it has of an inode.
    pub fn on_drop_pages(&self, drop_pages: impl Fn(u64) + Send + Sync + 'static) {
        // Whoever serves the tree does so once.
        let _ = self.drop_pages.set(Box::new(drop_pages));
    }

    /// Renames a box or a snapshot; then no link leads to where it was, which another may be by now.
    /// The kernel keeps where links point.
    fn with_links(&self, rename: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.names()?;
        rename()?;
        let after = self.names()?;
        if let Some(drop_pages) = self.drop_pages.get() {
            for link in links_elsewhere(&before, &after) {
                let ino = self.known.lock().number(&link);
                drop_pages(ino);
            }
        }
        Ok(())
    }

    /// The node with an inode number that the kernel was told of.
    ///
    /// # Errors
    /// ESTALE when it was not.
    fn node(&self, ino: u64) -> Result<Node> {
        if ino == ROOT_INO {
            return Ok(Node::Root);
        }
        let node = self.known.lock().node(ino);
        node.ok_or_else(|| Error::new(libc::ESTALE, "that file is gone"))
    }

    /// The kernel is told of a node: it may ask for it by number until it forgets. Returns the number.
    fn tell(&self, node: &Node) -> u64 {
        self.known.lock().tell(node)
    }

    /// The kernel forgets `times` of what it was told of a node.
    pub fn forget(&self, ino: u64, times: u64) {
        let mut known = self.known.lock();
        if let Some(node) = known.forget(ino, times) {
            let ino = node.ino();
            self.told.lock().remove(&ino);
            self.raised.lock().remove(&ino);
            self.status.lock().forget(ino);
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
                | Node::ViewOf(_)
                | Node::Guest(_)
                | Node::DiskImage(_))
        )
    }

    /// Notes a refusal in the log and makes an error of it.
    fn refuse(&self, errno: i32, message: impl Into<String>) -> Error {
        let message = message.into();
        self.store.events().warn(&format!("refused: {message}"));
        Error::new(errno, message)
    }

    /// Does what a listing of the root does, with all locks that takes, and forgets what it found.
    ///
    /// # Errors
    /// Those of reading the home.
    pub fn look_at_root(&self) -> Result<()> {
        let caller = Caller {
            tid: std::process::id(),
        };
        self.list(caller, &Node::Root)?;
        self.getattr(caller, ROOT_INO, None).map(|_| ())
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

    /// The node of a file that is to be changed, or in which something is.
    ///
    /// # Errors
    /// EROFS when mounted read-only, and for what is in a disk; ESTALE.
    fn node_to_change(&self, ino: u64) -> Result<Node> {
        self.store.refuse_read_only()?;
        match self.node(ino)? {
            Node::Guest(_) | Node::DiskImage(_) => Err(reading::guest_files::only_for_reading()),
            node => Ok(node),
        }
    }

    fn fresh_made(&self) -> Node {
        Node::Made(self.next_made.fetch_add(1, Ordering::Relaxed))
    }
}

/// Has the kernel drop the pages it has of an inode.
type DropPages = Box<dyn Fn(u64) + Send + Sync>;

/// The links that point elsewhere than before, because names changed.
fn links_elsewhere(before: &Names, after: &Names) -> Vec<Node> {
    let mut sources = Vec::new();
    for (name, id) in before.all() {
        let is_moved = after.of_id(id).is_some_and(|now| now != name);
        if is_moved {
            let box_id = id.clone();
            sources.push(Source::Live { box_id });
        }
        for row in before.catalog().snapshots_of(id) {
            let now = after.catalog().snapshot_by_id(id, &row.id);
            if now.is_some_and(|now| is_moved || now.name != row.name) {
                sources.push(Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: row.id.clone(),
                });
            }
        }
    }
    let links = |source: Source| Derived::ALL.map(|derived| Node::Link(derived, source.clone()));
    sources.into_iter().flat_map(links).collect()
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
