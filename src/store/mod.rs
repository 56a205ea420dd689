//! Everything that changes a home. Each change is crash-safe: it follows the order in the table of
//! `docs/design/layers.md`.
//!
//! * `verbs`: the changes that a user can ask for.
//! * `maintenance`: recovery when a mount begins, background compaction, check, compact and usage.
//! * `access`: the right to change a box, and the checks that refuse a change.
//! * `kept`: what was removed or restored over, until it goes for good.
//! * `layers`: the image files and which reads from which.
//!
//! The store knows homes, layers and archives. It knows nothing of names in a mount, handles or
//! FUSE. A change begins with a function of `access::lock`, which takes the lock, reads fresh rows
//! and checks whether the box may be changed; most recover the box, too.

mod access;
mod kept;
mod layers;
mod maintenance;
mod verbs;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

pub use access::preflight::{
    refuse_unready, refuse_unready_for_import, refuse_unready_for_restore,
};
pub use kept::expire::drop_kept;
pub use layers::reference_state::{ComingSnapshot, ReferenceState, freeze_reference};
pub use layers::snapshot_place::NewSnapshotIdentity;
pub use maintenance::background::{BackgroundCompaction, Compacting};
pub use maintenance::retention::Retention;
pub use maintenance::usage::{Usage, usage_of, usage_of_box, usage_of_kept};
pub use maintenance::{check, compact, space, summary};
pub use verbs::clone::{clone_box, clone_snapshot};
pub use verbs::edit::{
    check_description, check_edit, describe_box, edit_box, refuse_unready_for_edit,
};
pub use verbs::have_back::{have_back_box, have_back_snapshot};
pub use verbs::import::{date_snapshot, import_box, import_snapshot};
pub use verbs::import_stream::{ImportLimits, ImportStream, ImportTarget, receive};
pub use verbs::install::NewBoxIdentity;
pub use verbs::remove_box::{SeenBox, SeenDisk, remove_box, see_disk};
pub use verbs::remove_snapshot::remove_snapshot;
pub use verbs::rename::{rename_box, rename_snapshot};
pub use verbs::replace_snapshot::live_equals_snapshot;
pub use verbs::restore::{restore_archive, restore_box};
pub use verbs::snapshot::snapshot_box;
pub use verbs::waiting_files::{keep_archive, keep_copy, note_waiting};
pub use verbs::write_disk::{DiskWriting, close_disk, join_disk, open_disk, written_disk};

use verbs::write_disk::Writings;

use crate::event_log::EventLog;
use crate::exports::{Compression, Exports, OpenHome};
use crate::files::workspace::{Abandoned, Workspace};
use crate::home::{Catalog, Home};
use crate::progress::Operations;
use crate::{Error, Result};
use layers::graph::LayerScanner;
use layers::left_snapshots::LeftSnapshots;
use layers::spare_names::SpareNames;
use layers::unfreed::Unfreed;
use maintenance::usage::UsageCache;

/// Whether changes are shared with a BoxLite runtime, and what this mount has verified about paths.
#[derive(Default)]
struct Access {
    /// Safe changes are made even while a BoxLite runtime has the home; false with the mount option
    /// `exclusive`.
    is_shared: bool,
    /// Changes under way that take the runtime lock, because runtimes started all the time.
    insisting: AtomicU32,
    /// All rows and headers name this home's files by their canonical paths.
    paths_are_right: AtomicBool,
    /// The rows do not name the files by a second mount of the home.
    is_mounted_once: AtomicBool,
}

/// As long as it lives, shared changes take the runtime lock.
struct Insisting<'s>(&'s Access);

impl Drop for Insisting<'_> {
    fn drop(&mut self) {
        self.0.insisting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Access {
    /// Notes that all rows and headers name the files by their canonical paths.
    fn note_right_paths(&self) {
        self.paths_are_right.store(true, Ordering::Release);
    }

    fn insist(&self) -> Insisting<'_> {
        self.insisting.fetch_add(1, Ordering::Relaxed);
        Insisting(self)
    }

    fn insists(&self) -> bool {
        self.insisting.load(Ordering::Relaxed) > 0
    }
}

/// An open home and what is needed to change it.
pub struct Store {
    opened: OpenHome,
    exports: Exports,
    layers: LayerScanner,
    spares: Arc<SpareNames>,
    left: LeftSnapshots,
    unfreed: Unfreed,
    access: Access,
    imports: ImportLimits,
    /// How long what is removed or restored over is kept; None if it is not.
    undo: Option<Duration>,
    /// Whether the directory of what is kept has a name that survives a power loss.
    undo_is_durable: AtomicBool,
    usage: Mutex<UsageCache>,
    /// Workspaces of dead processes, until recovery begins.
    unrecovered: Mutex<Option<Vec<Abandoned>>>,
    /// Recovery has still to begin or to end.
    is_unrecovered: AtomicBool,
    /// The disks that are open for writing.
    writings: Mutex<Writings>,
}

/// Returns about how many image files a home has: one for each box, a snapshot and its base.
fn image_files(catalog: &Catalog) -> usize {
    let boxes = catalog.boxes();
    boxes
        .map(|record| 1 + 2 * catalog.snapshots_of(&record.id).len())
        .sum()
}

impl Store {
    /// Opens the home at `path` and, unless `read_only`, recovers what a crash left. While a
    /// runtime holds the lock, recovery is postponed until the next change of each box.
    ///
    /// # Errors
    /// Those of [`Home::open`].
    pub fn open(path: &Path, read_only: bool, compression: Compression) -> Result<Store> {
        let store = Store::open_unrecovered(path, read_only, false, compression)?;
        maintenance::at_mount::recover(&store);
        Ok(store)
    }

    /// Opens a home for a mount, as [`Store::open`] does. With `is_shared`, changes that are safe
    /// beside a BoxLite runtime are made even while one has the home. In a large home, recovery is
    /// left to [`BackgroundCompaction`]; each box is recovered before its first change.
    ///
    /// # Errors
    /// Those of [`Home::open`].
    pub fn open_for_mount(
        path: &Path,
        read_only: bool,
        is_shared: bool,
        compression: Compression,
    ) -> Result<Store> {
        let store = Store::open_unrecovered(path, read_only, is_shared, compression)?;
        if !store.layers.is_large() {
            maintenance::at_mount::recover(&store);
        }
        Ok(store)
    }

    fn open_unrecovered(
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
                "{error}: the home is opened read-only, as with -o ro"
            ));
        }
        let mut store = Store::new(OpenHome::new(home, events, read_only), compression);
        store.access.is_shared = is_shared;
        if let Some(message) = store.opened.sizes.newer() {
            store.events().info_once(message);
        }
        let catalog = store.home().catalog()?;
        store.layers.expect(image_files(&catalog));
        if let Some(why) = catalog.schema().read_only.clone() {
            store.events().info(&format!("read only: {why}"));
        } else if read_only {
            access::path_spelling::warn_of_paths(
                &store,
                "the home is opened read-only; mount it once without ro",
            );
        } else {
            maintenance::at_mount::begin_recovery(&store);
        }
        Ok(store)
    }

    /// Returns the store with these limits for imported archives.
    pub fn with_import_limits(self, imports: ImportLimits) -> Store {
        Store { imports, ..self }
    }

    /// Returns the store that keeps what is removed or restored over for so long; None for not at
    /// all.
    pub fn with_undo(self, undo: Option<Duration>) -> Store {
        Store { undo, ..self }
    }

    /// Returns a read-only store, without recovery.
    fn without_recovery(home: Home, events: EventLog) -> Store {
        Store::new(OpenHome::new(home, events, true), Compression::default())
    }

    fn new(opened: OpenHome, compression: Compression) -> Store {
        let exports = Exports::new(&opened, compression);
        let spares = Arc::new(SpareNames::new(
            opened.home.clone(),
            opened.workspace.clone(),
        ));
        Store {
            layers: LayerScanner::new(&opened, exports.states.clone(), spares.clone()),
            spares,
            left: LeftSnapshots::default(),
            unfreed: Unfreed::default(),
            unrecovered: Mutex::default(),
            is_unrecovered: AtomicBool::new(false),
            writings: Mutex::default(),
            exports,
            opened,
            access: Access::default(),
            imports: ImportLimits::default(),
            undo: None,
            undo_is_durable: AtomicBool::new(false),
            usage: Mutex::default(),
        }
    }

    /// Returns the home that is open.
    pub fn home(&self) -> &Home {
        &self.opened.home
    }

    /// Returns the readers of the home's disk states.
    pub fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Returns the log that users see in the mount.
    pub fn events(&self) -> &EventLog {
        &self.opened.events
    }

    /// Returns the operations that are under way.
    pub fn operations(&self) -> &Arc<Operations> {
        &self.opened.operations
    }

    fn workspace(&self) -> &Workspace {
        &self.opened.workspace
    }

    /// Returns whether the home was opened read-only, so that all changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.opened.is_read_only
    }

    /// Refuses a change if the home was opened read-only.
    ///
    /// # Errors
    /// EROFS.
    pub(crate) fn refuse_read_only(&self) -> Result<()> {
        if !self.is_read_only() {
            return Ok(());
        }
        let message = match self.home().unwritable() {
            Some(error) => format!("{error}: the home is opened read-only"),
            None => "mounted read-only; mount again without ro to make changes".to_owned(),
        };
        Err(Error::new(libc::EROFS, message))
    }
}
