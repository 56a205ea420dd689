//! Writing a compressed archive into a spool, as long as there is room for it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::exports::compressed_cache::CompressedArchives;
use crate::exports::disks::Source;
use crate::exports::spool::Spool;

/// Bytes that room is made for at a time.
const STEP: u64 = 32 << 20;

/// A spool being written; none any more once there is no room for it.
pub(crate) struct Spooling<'a> {
    archives: &'a CompressedArchives,
    source: &'a Source,
    file: Option<File>,
    size: u64,
    /// Bytes of the cache set aside for it.
    room: u64,
}

impl<'a> Spooling<'a> {
    /// Of the archive of `source`.
    pub fn begin(archives: &'a CompressedArchives, source: &'a Source) -> Spooling<'a> {
        Spooling {
            file: archives.spool_file(),
            archives,
            source,
            size: 0,
            room: 0,
        }
    }

    /// Adds bytes. What does not fit is no error: the archive is made again where it is read.
    pub fn put(&mut self, bytes: &[u8]) {
        let Some(file) = &self.file else {
            return;
        };
        let end = self.size + bytes.len() as u64;
        if end > self.room {
            // The whole cache may be smaller than a step.
            let step = STEP.min(self.archives.limit() / 2).max(end - self.room);
            if !self.archives.make_room(self.source, step) {
                self.file = None;
                return;
            }
            self.room += step;
        }
        if let Err(error) = file.write_all_at(bytes, self.size) {
            log::info!("a compressed archive is not kept: {error}");
            self.file = None;
        }
        self.size = end;
    }

    /// The spool, if all of it could be kept.
    pub fn finish(mut self) -> Option<Arc<Spool>> {
        Some(Arc::new(Spool::new(self.file.take()?, self.size)))
    }
}

impl Drop for Spooling<'_> {
    fn drop(&mut self) {
        self.archives.lock().growing -= self.room;
    }
}
