//! Writing a compressed archive to a spool, while there is room for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::archive::FrameKey;
use crate::exports::compressed_cache::CompressedArchives;
use crate::exports::disks::Source;
use crate::exports::spool::{FramePlace, FramePlaces, Spool};

/// Bytes of the cache set aside at a time.
const STEP: u64 = 32 << 20;
/// Most separate parts of an archive that are written. A reader from beginning to end makes few.
const MOST_PARTS: usize = 64;

/// A spool being written. It is given up when there is no room for it, or a write fails.
pub(crate) struct Spooling {
    archives: Arc<CompressedArchives>,
    source: Source,
    /// None once the spool is given up.
    file: Option<File>,
    /// What is written: start → end of each part; disjoint, and not touching.
    parts: BTreeMap<u64, u64>,
    /// Bytes written.
    size: u64,
    /// Bytes of the cache set aside for the spool.
    room: u64,
    frames: FramePlaces,
}

impl Spooling {
    /// Begins an empty spool for the archive of `source`.
    pub fn begin(archives: &Arc<CompressedArchives>, source: &Source) -> Spooling {
        Spooling {
            file: archives.spool_file(),
            archives: archives.clone(),
            source: source.clone(),
            parts: BTreeMap::new(),
            size: 0,
            room: 0,
            frames: FramePlaces::default(),
        }
    }

    /// Returns whether the spool was given up.
    pub fn is_given_up(&self) -> bool {
        self.file.is_none()
    }

    /// Returns how many bytes are written.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes a frame at its place; does nothing for one that is there. A spool that can't be kept
    /// is no error: its frames are made again as they are read.
    pub fn put(&mut self, start: u64, key: Option<FrameKey>, bytes: &[u8]) {
        let end = start.saturating_add(bytes.len() as u64);
        if bytes.is_empty() || self.file.is_none() || self.has(start) {
            return;
        }
        if !self.take_room(bytes.len() as u64) || !self.add_part(start, end) {
            self.file = None;
            return;
        }
        if let Some(file) = &self.file
            && let Err(error) = file.write_all_at(bytes, start)
        {
            log::info!("this compressed archive is not kept, since writing it failed: {error}");
            self.file = None;
            return;
        }
        if let Some(key) = key
            && let Some(place) = FramePlace::of(start, bytes)
        {
            self.frames.insert(key, place);
        }
    }

    /// Returns the spool, if all of an archive of `total` bytes is written and it was not given up.
    pub fn finish(mut self, total: u64) -> Option<Arc<Spool>> {
        let is_whole = self.parts.len() == 1 && self.parts.get(&0) == Some(&total);
        let file = self.file.take().filter(|_| is_whole)?;
        let frames = std::mem::take(&mut self.frames);
        Some(Arc::new(Spool::new(file, total, frames)))
    }

    /// Returns whether the frame that begins at `start` is written.
    fn has(&self, start: u64) -> bool {
        let before = self.parts.range(..=start).next_back();
        before.is_some_and(|(_, end)| *end > start)
    }

    /// Sets room for `more` bytes aside. Returns false if there is none.
    fn take_room(&mut self, more: u64) -> bool {
        let size = self.size.saturating_add(more);
        if size > self.room {
            // At most half of the cache, which may be smaller than a step, but enough for these
            // bytes.
            let step = STEP.min(self.archives.limit() / 2).max(size - self.room);
            if !self.archives.make_room(&self.source, step) {
                return false;
            }
            self.room += step;
        }
        self.size = size;
        true
    }

    /// Counts a frame as written. Returns false if there are too many parts.
    fn add_part(&mut self, mut start: u64, mut end: u64) -> bool {
        if let Some(after) = self.parts.remove(&end) {
            end = after;
        }
        if let Some((before, _)) = self
            .parts
            .range(..start)
            .next_back()
            .filter(|it| *it.1 == start)
        {
            start = *before;
        }
        self.parts.insert(start, end);
        self.parts.len() <= MOST_PARTS
    }
}

impl Drop for Spooling {
    fn drop(&mut self) {
        self.archives.give_back(self.room);
    }
}
