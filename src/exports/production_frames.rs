//! What a production of a compressed archive finds, learns and shows.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::archive::{FrameCache, FrameKey, KnownSizes};
use crate::exports::passing_frames::PassingFrames;
use crate::home::SizeCache;
use crate::progress::Operation;

/// Frame sizes written to disk in one batch.
const BATCH: usize = 4096;

/// The frame sizes of one production: those remembered on disk, and new ones.
pub(crate) struct ProductionSizes<'a> {
    remembered: &'a SizeCache,
    /// Whether the disk's state may be remembered, and new sizes with it.
    is_lasting: bool,
    new: Mutex<HashMap<FrameKey, u32>>,
}

impl<'a> ProductionSizes<'a> {
    /// Returns the sizes that are remembered. New ones are remembered, too, if the disk's state
    /// `is_lasting`.
    pub fn of(remembered: &'a SizeCache, is_lasting: bool) -> ProductionSizes<'a> {
        ProductionSizes {
            remembered,
            is_lasting,
            new: Mutex::default(),
        }
    }

    /// Writes new sizes to disk, unless the state must not be remembered.
    fn flush(&self, new: &mut HashMap<FrameKey, u32>) {
        if !self.is_lasting {
            return;
        }
        let frames: Vec<_> = new.drain().collect();
        self.remembered.put_frames(&frames);
    }
}

impl KnownSizes for ProductionSizes<'_> {
    fn size(&self, key: &FrameKey) -> Option<u32> {
        let new = self.new.lock().get(key).copied();
        new.or_else(|| self.remembered.frame(key))
    }

    fn learn(&self, key: FrameKey, size: u32) {
        let mut new = self.new.lock();
        new.insert(key, size);
        if self.is_lasting && new.len() >= BATCH {
            self.flush(&mut new);
        }
    }
}

impl Drop for ProductionSizes<'_> {
    fn drop(&mut self) {
        let mut new = std::mem::take(&mut *self.new.lock());
        if !new.is_empty() {
            self.flush(&mut new);
        }
    }
}

/// The frames of a production, which is shown while it runs.
pub(crate) struct ShownFrames<E> {
    /// The frames themselves.
    pub passing: PassingFrames,
    /// Where each frame ends in the plain archive.
    pub ends: Mutex<E>,
    /// What the status shows.
    pub operation: Operation,
}

impl<E: Iterator<Item = u64> + Send> FrameCache for ShownFrames<E> {
    fn has_frames(&self) -> bool {
        self.passing.has_frames()
    }

    fn find(&self, key: &FrameKey, bytes: &mut Vec<u8>) -> bool {
        self.passing.find(key, bytes)
    }

    fn offer(&self, start: u64, key: Option<FrameKey>, bytes: &[u8]) {
        if let Some(end) = self.ends.lock().next() {
            self.operation.reaches(end);
        }
        self.passing.offer(start, key, bytes);
    }
}
