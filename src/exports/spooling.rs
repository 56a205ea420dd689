//! Writing a compressed archive to a spool, while there is room for it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::exports::compressed_cache::CompressedArchives;
use crate::exports::disks::Source;
use crate::exports::spool::Spool;

/// Bytes of the cache set aside at a time.
const STEP: u64 = 32 << 20;

/// A spool being written. It is given up when there is no room for it, or a write fails.
pub(crate) struct Spooling<'a> {
    archives: &'a CompressedArchives,
    source: &'a Source,
    /// None once the spool is given up.
    file: Option<File>,
    size: u64,
    /// Bytes of the cache set aside for the spool.
    room: u64,
}

impl<'a> Spooling<'a> {
    /// Begins an empty spool for the archive of `source`.
    pub fn begin(archives: &'a CompressedArchives, source: &'a Source) -> Spooling<'a> {
        Spooling {
            file: archives.spool_file(),
            archives,
            source,
            size: 0,
            room: 0,
        }
    }

    /// Appends bytes. A spool that can't be kept is no error: its frames are made again as they are
    /// read.
    pub fn put(&mut self, bytes: &[u8]) {
        let Some(file) = &self.file else {
            return;
        };
        let end = self.size + bytes.len() as u64;
        if end > self.room {
            // At most half of the cache, which may be smaller than a step, but enough for these
            // bytes.
            let step = STEP.min(self.archives.limit() / 2).max(end - self.room);
            if !self.archives.make_room(self.source, step) {
                self.file = None;
                return;
            }
            self.room += step;
        }
        if let Err(error) = file.write_all_at(bytes, self.size) {
            log::info!("this compressed archive is not kept, since writing it failed: {error}");
            self.file = None;
        }
        self.size = end;
    }

    /// Returns the finished spool, unless it was given up.
    pub fn finish(mut self) -> Option<Arc<Spool>> {
        Some(Arc::new(Spool::new(self.file.take()?, self.size)))
    }
}

impl Drop for Spooling<'_> {
    fn drop(&mut self) {
        self.archives.lock().growing -= self.room;
    }
}
