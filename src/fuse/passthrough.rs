//! Files the kernel reads by itself (FUSE passthrough).

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use fuser::{BackingId, FileHandle, FopenFlags, ReplyOpen};
use parking_lot::Mutex;

use crate::exports::Spool;
use crate::tree::Opened;

/// Files the kernel reads by itself for us, where it can.
#[derive(Default)]
pub(super) struct PassthroughFiles(Mutex<Backings>);

#[derive(Default)]
struct Backings {
    /// By spool: an inode must be opened with the same backing each time.
    by_spool: HashMap<u64, Weak<BackingId>>,
    /// By handle: kept as long as it is open.
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
        // Whoever only reads need not wait when he closes.
        how.set(FopenFlags::FOPEN_NOFLUSH, opened.keep_pages);
        reply.opened(FileHandle(opened.handle), how);
    }

    /// The backing of a spool, kept for a handle. None where the kernel has no passthrough, or not for us
    /// (it is root's).
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

    /// The handle is closed.
    pub fn release(&self, handle: u64) {
        self.0.lock().by_handle.remove(&handle);
    }
}
