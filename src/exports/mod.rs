//! Disk states, read: as plain and compressed archives, as raw disks, as guests' files.
//!
//! Everything here reads and changes no box. What it writes are files without a name in the
//! workspace and the cache of sizes and checksums, which can be deleted at any time.

mod compressed;
mod compressed_cache;
mod disk_view;
mod disks;
mod paused_copy;
mod plain;
mod production;
mod recent;
mod shared;
mod spool;
mod spooling;
mod states;

use std::sync::Arc;

pub use compressed::CompressedExports;
pub use compressed_cache::{CacheUsage, Compression};
pub use disk_view::{DiskState, DiskViews, OpenDisk};
pub(crate) use disks::display_name;
pub use disks::{Disks, Source};
pub use paused_copy::PausedCopies;
pub use plain::{Contents, Form, PlainExports};
pub use production::{OpenedCompressed, Packed, Waiter};
pub(crate) use shared::Shared;
pub use spool::Spool;
pub(crate) use states::States;

use crate::home::Catalog;
use compressed_cache::CompressedArchives;

/// Everything that reads the disk states of a home.
pub struct Exports {
    /// Where the files of a disk state are.
    pub disks: Arc<Disks>,
    pub(crate) states: Arc<States>,
    /// Plain archives of boxes that do not run.
    pub plain: Arc<PlainExports>,
    /// Plain archives of any box.
    pub copies: Arc<PausedCopies>,
    /// Compressed archives.
    pub compressed: Arc<CompressedExports>,
    /// Raw disks and guests' files.
    pub views: DiskViews,
}

impl Exports {
    /// Returns the exports of a home, with nothing in their caches.
    pub(crate) fn new(shared: &Shared, compression: Compression) -> Exports {
        let disks = Arc::new(Disks::new(shared.home.clone()));
        let states = Arc::new(States::new(
            disks.clone(),
            shared.workspace.clone(),
            shared.is_read_only,
        ));
        let plain = Arc::new(PlainExports::new(
            disks.clone(),
            states.clone(),
            shared.sizes.clone(),
            shared.foreground.clone(),
        ));
        let copies = Arc::new(PausedCopies::new(shared, disks.clone(), plain.clone()));
        let archives = CompressedArchives::new(
            shared.home.clone(),
            shared.workspace.clone(),
            shared.is_read_only,
            compression,
        );
        let compressed = CompressedExports::new(
            copies.clone(),
            plain.clone(),
            states.clone(),
            archives,
            shared.sizes.clone(),
            shared.operations.clone(),
        );
        Exports {
            views: DiskViews::new(disks.clone(), states.clone()),
            compressed: Arc::new(compressed),
            disks,
            states,
            plain,
            copies,
        }
    }

    /// Lets go of what was kept of states that are gone: their space comes back.
    pub fn forget_gone(&self, catalog: &Catalog) {
        self.plain.forget_gone(catalog);
        self.compressed.forget_gone(catalog);
        self.views.forget_gone(catalog);
    }

    /// Returns whether anybody reads an export or looks into a disk.
    pub(crate) fn are_read(&self) -> bool {
        self.plain.is_read() || self.views.is_looked_into()
    }

    /// Lets go of plans and disks that nobody reads. Returns how many there were, and are.
    pub(crate) fn let_go_of_unread(&self) -> usize {
        self.plain.let_go_of_unread() + self.views.let_go_of_unused()
    }
}
