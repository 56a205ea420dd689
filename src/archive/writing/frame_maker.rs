//! Makes frames: takes those that are kept from before, and compresses the others.

use std::time::Duration;

use super::compressed::{Compressed, SPAN};
use super::encoder::FrameEncoder;
use super::frame_sizes::{FrameKey, Origin};
use crate::Result;

/// The most bytes that may wait for the checksum when the next are read; each thread may add a
/// frame.
pub(super) const AHEAD_OF_DIGEST: usize = 2 * SPAN as usize;

/// Frames that were made before, and the place for those that are made now.
pub trait FrameCache: Send + Sync {
    /// Returns whether there are frames to be found.
    fn has_frames(&self) -> bool;

    /// Replaces the contents of `bytes` by the frame with this key. Returns false if there is none.
    fn find(&self, key: &FrameKey, bytes: &mut Vec<u8>) -> bool;

    /// Offers a frame that was made, `start` bytes into the compressed archive. The manifest's has
    /// no key.
    fn offer(&self, start: u64, key: Option<FrameKey>, bytes: &[u8]);
}

/// Keeps no frames.
pub struct NoFrames;

impl FrameCache for NoFrames {
    fn has_frames(&self) -> bool {
        false
    }

    fn find(&self, _key: &FrameKey, _bytes: &mut Vec<u8>) -> bool {
        false
    }

    fn offer(&self, _start: u64, _key: Option<FrameKey>, _bytes: &[u8]) {}
}

/// Makes frames of one archive in one thread.
pub(super) struct FrameMaker<'a> {
    of: &'a Compressed,
    cache: &'a dyn FrameCache,
    encoder: FrameEncoder,
    /// The bytes of the last frame as they are in the plain archive; none if they were not read.
    raw: Vec<u8>,
}

impl<'a> FrameMaker<'a> {
    /// Returns one that asks `cache` for each frame first.
    ///
    /// # Errors
    /// Those of [`Compressed::encoder`].
    pub fn new(of: &'a Compressed, cache: &'a dyn FrameCache) -> Result<FrameMaker<'a>> {
        Ok(FrameMaker {
            of,
            cache,
            encoder: of.encoder()?,
            raw: Vec::new(),
        })
    }

    /// Replaces the contents of `bytes` by a frame other than the manifest's. Returns its key; None
    /// if it has no bytes.
    ///
    /// # Errors
    /// EIO when the disk changed, or is damaged; those of compressing.
    pub fn make(&mut self, frame: u64, bytes: &mut Vec<u8>) -> Result<Option<FrameKey>> {
        bytes.clear();
        self.raw.clear();
        if self.of.range(frame)?.is_empty() {
            return Ok(None);
        }
        let origin = self.of.origin(frame)?;
        if let Origin::Frozen(key) = origin
            && self.cache.find(&key, bytes)
        {
            // The place is that of the planned state only if no layer changed since.
            self.of.export().chain().unchanged()?;
            return Ok(Some(key));
        }
        self.of.read(frame, &mut self.raw)?;
        let key = self.of.key(&origin, &self.raw);
        if !self.find_again(&origin, key, bytes) {
            self.encoder.encode(&self.raw, bytes)?;
        }
        Ok(Some(key))
    }

    /// Looks for a frame by the bytes in it. Those of a layer that was frozen lately were kept
    /// under that key.
    fn find_again(&self, origin: &Origin, key: FrameKey, bytes: &mut Vec<u8>) -> bool {
        match origin {
            _ if !self.cache.has_frames() => false,
            Origin::Frozen(_) => self.cache.find(&self.of.content_key(&self.raw), bytes),
            Origin::Live => self.cache.find(&key, bytes),
        }
    }

    /// Feeds the bytes of the frame that was made last to the disk's checksum. Reads them, if they
    /// were not needed to make it and the checksum can use them now.
    ///
    /// # Errors
    /// As [`FrameMaker::make`].
    pub fn take_along(&mut self, frame: u64) -> Result<()> {
        let range = self.of.range(frame)?;
        let export = self.of.export();
        if self.raw.is_empty() && export.digest_wants(range.clone()) {
            // What is not compressed comes faster than it is hashed. Bytes too far ahead would be
            // dropped, and read once more at the end.
            while export.digest_lags(AHEAD_OF_DIGEST) {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.of.read(frame, &mut self.raw)?;
        }
        export.take_along(range.start, &self.raw);
        Ok(())
    }
}
