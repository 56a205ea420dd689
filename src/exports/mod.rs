//! Reading disk states: as plain and compressed archives, as raw disks, as guests' files.
//!
//! Nothing here changes a box. The only writes are to unnamed files in the workspace and to the
//! cache of sizes and checksums, which may be deleted at any time.

mod compressed;
mod compressed_cache;
mod disk_view;
mod disks;
mod open_disk;
mod open_home;
mod passing_frames;
mod paused_copy;
mod plain;
mod production;
mod production_frames;
mod recent;
mod running_disk;
mod running_views;
mod spool;
mod spooling;
mod states;

use std::sync::Arc;

pub use compressed::CompressedExports;
pub use compressed_cache::{CacheUsage, Compression};
pub use disk_view::DiskViews;
pub(crate) use disks::display_name;
pub use disks::{Disks, Source};
pub use open_disk::{DiskState, OpenDisk};
pub(crate) use open_home::OpenHome;
pub use paused_copy::PausedCopies;
pub use plain::{Contents, Form, PlainExports, UNREADABLE};
pub use production::{OpenedCompressed, Packed, Waiter};
pub use spool::Spool;
pub(crate) use states::States;

use crate::home::Catalog;
use compressed_cache::CompressedArchives;

/// Everything that reads the disk states of a home.
pub struct Exports {
    /// Finds the files of a disk state.
    pub disks: Arc<Disks>,
    /// Tells the states of a disk apart.
    pub(crate) states: Arc<States>,
    /// Plain archives of stopped boxes and of snapshots.
    pub plain: Arc<PlainExports>,
    /// Plain archives of any box, also of a running one.
    pub copies: Arc<PausedCopies>,
    /// Compressed archives.
    pub compressed: Arc<CompressedExports>,
    /// Raw disks and guests' files.
    pub views: DiskViews,
}

impl Exports {
    /// Returns the exports of a home with empty caches.
    pub(crate) fn new(opened: &OpenHome, compression: Compression) -> Exports {
        let disks = Arc::new(Disks::new(opened.home.clone()));
        let states = Arc::new(States::new(
            disks.clone(),
            opened.workspace.clone(),
            opened.is_read_only,
        ));
        let plain = Arc::new(PlainExports::new(
            disks.clone(),
            states.clone(),
            opened.sizes.clone(),
            opened.foreground.clone(),
        ));
        let copies = Arc::new(PausedCopies::new(
            opened,
            disks.clone(),
            states.clone(),
            plain.clone(),
        ));
        let archives = Arc::new(CompressedArchives::new(
            opened.home.clone(),
            opened.workspace.clone(),
            opened.is_read_only,
            compression,
        ));
        let compressed = CompressedExports::new(
            copies.clone(),
            plain.clone(),
            states.clone(),
            archives,
            opened.sizes.clone(),
            opened.operations.clone(),
        );
        Exports {
            views: DiskViews::new(disks.clone(), states.clone(), copies.clone()),
            compressed: Arc::new(compressed),
            disks,
            states,
            plain,
            copies,
        }
    }

    /// Drops what the caches hold of disk states that are not in `catalog`, so that their space is
    /// reclaimed.
    pub fn forget_gone(&self, catalog: &Catalog) {
        self.plain.forget_gone(catalog);
        self.compressed.forget_gone(catalog);
        self.views.forget_gone(catalog);
    }

    /// Returns whether a plan or an open disk is in use.
    pub(crate) fn are_read(&self) -> bool {
        self.plain.is_in_use() || self.views.is_in_use()
    }

    /// Drops plans and open disks that are not in use. Returns the number of plans before, plus the
    /// number of open disks after.
    pub(crate) fn let_go_of_unread(&self) -> usize {
        self.plain.let_go_of_unread() + self.views.let_go_of_unused()
    }
}
