//! Files the kernel reads by itself (FUSE passthrough).

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use fuser::{BackingId, FileHandle, FopenFlags, ReplyOpen};
use parking_lot::Mutex;

use crate::exports::Spool;
use crate::tree::Opened;

/// The files that the kernel reads by itself for us, where it can.
#[derive(Default)]
pub(super) struct PassthroughFiles(Mutex<Backings>);

#[derive(Default)]
struct Backings {
    /// By the number of the spool: each open of an inode must use the same backing.
    by_spool: HashMap<u64, Weak<BackingId>>,
    /// By handle: keeps the backing as long as the handle is open.
    by_handle: HashMap<u64, Arc<BackingId>>,
}

impl PassthroughFiles {
    /// Answers an open, with passthrough where the file has a spool and the kernel agrees.
    pub fn reply(&self, opened: Opened, reply: ReplyOpen) {
        if let Some(spool) = &opened.spool
            && let Some(backing) = self.open(spool, opened.handle, &reply)
        {
            let handle = FileHandle(opened.handle);
            return reply.opened_passthrough(handle, FopenFlags::empty(), &backing);
        }
        let mut how = FopenFlags::empty();
        how.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct);
        how.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_pages);
        // A close after reading need not wait for a flush.
        how.set(FopenFlags::FOPEN_NOFLUSH, opened.keep_pages);
        reply.opened(FileHandle(opened.handle), how);
    }

    /// Returns the backing of a spool and keeps it for a handle. None where the kernel has no
    /// passthrough, or not for us (only root may use it).
    fn open(&self, spool: &Spool, handle: u64, reply: &ReplyOpen) -> Option<Arc<BackingId>> {
        let backings = &mut *self.0.lock();
        let by_spool = &mut backings.by_spool;
        by_spool.retain(|_, backing| backing.strong_count() > 0);
        let backing = match by_spool.get(&spool.number()).and_then(Weak::upgrade) {
            Some(backing) => backing,
            None => {
                let backing = reply
                    .open_backing(spool.file())
                    .inspect_err(|error| log::debug!("no passthrough: {error}"))
                    .ok()?;
                let backing = Arc::new(backing);
                by_spool.insert(spool.number(), Arc::downgrade(&backing));
                backing
            }
        };
        backings.by_handle.insert(handle, backing.clone());
        Some(backing)
    }

    /// Drops what a handle kept, once it is closed.
    pub fn release(&self, handle: u64) {
        self.0.lock().by_handle.remove(&handle);
    }
}
