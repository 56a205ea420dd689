//! Finished compressed archives in files without a name, and the room there is for them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Source, Store};
use crate::home::Space;
use crate::{Context, Result};

/// Bytes that room is made for at a time.
const STEP: u64 = 32 << 20;
/// A spool leaves this part of the file system free (1 / 20): others need it more.
const LEFT_FREE: u64 = 20;

/// A finished archive in a file without a name.
pub struct Spool {
    file: File,
    size: u64,
    number: u64,
}

impl Spool {
    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A number no other spool of this process has.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Fills `buf` from `offset` on, completely unless the archive ends; returns how much that is.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        let buf = buf.get_mut(..len).unwrap_or_default();
        self.file
            .read_exact_at(buf, offset)
            .context(|| "cannot read the compressed archive back")?;
        Ok(len)
    }
}

/// A spool being written; none any more once there is no room for it.
pub(super) struct Spooling<'a> {
    store: &'a Store,
    source: &'a Source,
    file: Option<File>,
    size: u64,
    /// Bytes of the cache set aside for it.
    room: u64,
}

impl<'a> Spooling<'a> {
    /// Of the archive of `source`.
    pub(super) fn begin(store: &'a Store, source: &'a Source) -> Spooling<'a> {
        let file = match store.read_only || store.compression.cache == 0 {
            true => None,
            false => store
                .unnamed_file("compressed")
                .inspect_err(|error| log::info!("compressed archives are not kept: {error}"))
                .ok(),
        };
        Spooling {
            store,
            source,
            file,
            size: 0,
            room: 0,
        }
    }

    /// Adds bytes. What does not fit is no error: the archive is made again where it is read.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let Some(file) = &self.file else {
            return;
        };
        let end = self.size + bytes.len() as u64;
        if end > self.room {
            // The whole cache may be smaller than a step.
            let step = STEP
                .min(self.store.compression.cache / 2)
                .max(end - self.room);
            if !self.store.make_room(self.source, step) {
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
    pub(super) fn finish(mut self) -> Option<Arc<Spool>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Some(Arc::new(Spool {
            file: self.file.take()?,
            size: self.size,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        }))
    }
}

impl Drop for Spooling<'_> {
    fn drop(&mut self) {
        self.store.compressed.lock().growing -= self.room;
    }
}

impl Store {
    /// Sets `more` bytes of the cache aside for a spool of `source`, by letting go of archives nobody
    /// reads, those used least lately first. False if that is not enough.
    fn make_room(&self, source: &Source, more: u64) -> bool {
        let space = Space::of(&self.home);
        if !space.is_ok_and(|space| space.available_bytes() >= more + space.bytes() / LEFT_FREE) {
            return false;
        }
        let mut cache = self.compressed.lock();
        while cache.kept_bytes() + cache.growing + more > self.compression.cache {
            if !cache.drop_oldest_spool(source) {
                return false;
            }
        }
        cache.growing += more;
        true
    }
}
