//! What can be done to boxes. One file per change, each in the crash-safe order that
//! `docs/design/layers.md` tabulates, with a comment on what a crash leaves.
//!
//! The room knows homes, layers and archives; it knows nothing of names in a mount, handles or
//! FUSE. Every change starts with [`Store::prepare`]: lock, fresh rows, recovery by looking.

mod adopt;
mod arrival;
mod beside;
pub mod check;
mod clone;
mod combine;
pub mod compact;
mod compressed;
mod crash;
mod durable;
mod export;
mod freeze;
mod import;
mod inside;
mod layers;
mod listing;
mod marks;
mod merge;
mod names;
mod prepare;
mod priority;
mod recover;
mod remove_box;
mod remove_snapshot;
mod rename;
mod restore;
mod room;
mod running;
mod snapshot;
mod spare_names;
mod spares;
mod spelling;
mod spool;
mod states;
mod upkeep;
mod usage;
mod waiting;
mod waiting_archive;
mod workspace;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;

pub use arrival::{Arrival, Imports, Wanted};
pub use clone::{NewClone, NewSnapshotName};
pub use compressed::{CacheUsage, Compression, OpenedCompressed, Packed, Waiter};
pub use export::{Contents, Form};
pub use import::SnapshotContents;
pub use inside::{DiskState, Inside};
pub use remove_box::{Gone, SeenDisk};
pub use spool::Spool;
pub use upkeep::{Compacting, Upkeep};
pub use usage::Usage;

use crate::disk::{FileClock, Scope};
use crate::event_log::EventLog;
use crate::home::{BoxRecord, Catalog, Home, Remembered, SnapshotRecord};
use crate::progress::Operations;
use crate::{Error, Result};

/// A disk state that can be read, cloned and exported.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The live disk of a box.
    Live {
        /// The box's id.
        box_id: String,
    },
    /// A snapshot of a box.
    Snapshot {
        /// The box's id.
        box_id: String,
        /// The snapshot's id.
        snapshot_id: String,
    },
}

impl Source {
    /// The id of the box it belongs to.
    pub fn box_id(&self) -> &str {
        match self {
            Source::Live { box_id } | Source::Snapshot { box_id, .. } => box_id,
        }
    }

    /// Whether it is there.
    pub(crate) fn is_in(&self, catalog: &Catalog) -> bool {
        match self {
            Source::Live { box_id } => catalog.box_by_id(box_id).is_some(),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => catalog.snapshot_by_id(box_id, snapshot_id).is_some(),
        }
    }
}

/// A home and all that is needed to change it.
pub struct Store {
    home: Home,
    events: EventLog,
    headers: Mutex<layers::HeaderCache>,
    exports: Mutex<export::ExportCache>,
    workspace: Mutex<Option<workspace::Workspace>>,
    remembered: Remembered,
    compression: Compression,
    imports: Imports,
    compressed: Mutex<compressed::CompressedCache>,
    turns: compressed::Turns,
    insides: Mutex<inside::InsideCache>,
    running: running::RunningCache,
    clock: FileClock,
    stand_ins: Mutex<states::StandIns>,
    foreground: Arc<upkeep::Foreground>,
    usage: Mutex<usage::UsageCache>,
    operations: Arc<Operations>,
    read_only: bool,
    /// Some changes are made also while a BoxLite runtime has the home.
    is_shared: bool,
    /// Rows and headers were seen to name this home's files by their canonical paths.
    paths_are_right: AtomicBool,
    /// Rows were seen not to be those of another place that the home is mounted at.
    is_mounted_once: AtomicBool,
}

impl Store {
    /// Opens the home at `path` and, unless `read_only`, recovers what a crash left. A recovery
    /// that has to wait (a runtime holds the lock) is done before the next change of each box.
    ///
    /// # Errors
    /// Those of [`Home::open`].
    pub fn open(path: &Path, read_only: bool, compression: Compression) -> Result<Store> {
        Store::open_shared(path, read_only, false, compression)
    }

    /// Likewise; with `is_shared`, changes that can be made safely beside a BoxLite runtime are made
    /// while one has the home.
    ///
    /// # Errors
    /// Those of [`Home::open`].
    pub fn open_shared(
        path: &Path,
        read_only: bool,
        is_shared: bool,
        compression: Compression,
    ) -> Result<Store> {
        let home = Home::open(path)?;
        let unwritable = home.unwritable().filter(|_| !read_only);
        let read_only = read_only || unwritable.is_some();
        let events = EventLog::open(&home, read_only);
        if let Some(error) = &unwritable {
            events.warn(&format!(
                "{error}: the home is only looked at, as with -o ro"
            ));
        }
        let mut store = Store::of(home, events, read_only, compression);
        store.is_shared = is_shared;
        if let Some(message) = store.remembered.newer() {
            store.events.info_once(message);
        }
        if let Some(why) = store.home.catalog()?.schema().read_only.clone() {
            store.events.info(&format!("read only: {why}"));
        } else if read_only {
            store.warn_of_paths("the home is only looked at; mount it without ro once");
        } else {
            store.recover_at_mount();
            store.keep_reserve();
        }
        Ok(store)
    }

    /// The same, with what archives may bring.
    pub fn taking(self, imports: Imports) -> Store {
        Store { imports, ..self }
    }

    /// A home that is only looked at.
    fn to_look(home: Home, events: EventLog) -> Store {
        Store::of(home, events, true, Compression::default())
    }

    fn of(home: Home, events: EventLog, read_only: bool, compression: Compression) -> Store {
        Store {
            remembered: Remembered::open(&home, read_only),
            home,
            events,
            headers: Mutex::default(),
            exports: Mutex::default(),
            workspace: Mutex::new(None),
            compression,
            imports: Imports::default(),
            compressed: Mutex::default(),
            turns: compressed::Turns::default(),
            insides: Mutex::default(),
            running: running::RunningCache::default(),
            clock: FileClock::default(),
            stand_ins: Mutex::default(),
            foreground: Arc::default(),
            usage: Mutex::default(),
            operations: Arc::default(),
            read_only,
            is_shared: false,
            paths_are_right: AtomicBool::new(false),
            is_mounted_once: AtomicBool::new(false),
        }
    }

    /// The home.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The log a user sees in the mount.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// What is going on.
    pub fn operations(&self) -> &Arc<Operations> {
        &self.operations
    }

    /// Whether changes are refused because of how it was mounted.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// EROFS when mounted read-only.
    pub(crate) fn refuse_read_only(&self) -> Result<()> {
        if !self.read_only {
            return Ok(());
        }
        let message = match self.home.unwritable() {
            Some(error) => format!("{error}: the home is only looked at"),
            None => "mounted read-only; mount again without ro to make changes".to_owned(),
        };
        Err(Error::new(libc::EROFS, message))
    }

    /// Where the layer of a snapshot is: what BoxLite's row says, if that is among the snapshots of
    /// its box or in `bases/`; else (a copied home) where it must be in this home.
    pub(crate) fn snapshot_layer(&self, snapshot: &SnapshotRecord) -> PathBuf {
        let own = self.home.snapshot_disk(&snapshot.box_id, &snapshot.name);
        // As BoxLite and we write it, and nothing to be resolved: there may be thousands.
        if snapshot
            .base_path()
            .is_some_and(|path| Path::new(&path) == own)
        {
            return own;
        }
        let snapshots = self.home.snapshots_dir(&snapshot.box_id);
        let recorded = snapshot
            .base_path()
            .and_then(|path| layers::resolve(Path::new(&path)).ok());
        match recorded {
            Some(path)
                if path.starts_with(&snapshots)
                    || path.parent() == Some(self.home.bases_dir().as_path()) =>
            {
                path
            }
            _ => own,
        }
    }

    /// Where the layers below a file of the home may be. Those of a box that was written elsewhere, as in a
    /// backup of a home, are looked for in this home first: what headers name is not there any more, or
    /// another home's, which went on.
    pub(crate) fn scope_of(&self, top: &Path) -> Scope {
        let boxes = self.home.boxes_dir();
        let id = top
            .strip_prefix(&boxes)
            .ok()
            .and_then(|path| path.iter().next());
        let catalog = id.and_then(|_| self.home.catalog().ok());
        let record = id
            .and_then(|id| id.to_str())
            .zip(catalog.as_ref())
            .and_then(|(id, catalog)| catalog.box_by_id(id));
        let is_elsewhere = record.is_some_and(|record| !self.is_at_home(record));
        let moved = [
            ("bases", self.home.bases_dir()),
            ("boxes", boxes),
            ("images", self.home.root().join("images")),
        ];
        Scope {
            homes: self.home.directories().map(Path::to_owned).collect(),
            owner: self.home.owner().uid,
            moved: moved.into_iter().filter(|_| is_elsewhere).collect(),
        }
    }

    /// The file on top of the chain of a disk state.
    ///
    /// # Errors
    /// ENOENT when the box or snapshot is gone.
    pub(crate) fn top_of(&self, source: &Source) -> Result<PathBuf> {
        match source {
            Source::Live { box_id } => Ok(self.home.live_disk(box_id)),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => {
                let catalog = self.home.catalog()?;
                catalog
                    .snapshot_by_id(box_id, snapshot_id)
                    .map(|snapshot| self.snapshot_layer(snapshot))
                    .ok_or_else(|| Error::new(libc::ENOENT, "the snapshot is gone"))
            }
        }
    }
}

/// How a box is called in messages: its name, or its id where it has none.
pub(crate) fn display_name(record: &BoxRecord) -> &str {
    record.name.as_deref().unwrap_or(&record.id)
}
