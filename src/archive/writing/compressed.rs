//! Compressed archives, as independent zstd frames: they can be made on all cores, and one at a
//! time from any place.
//!
//! A frame holds the data in one [`SPAN`] of guest bytes. So a cluster that becomes allocated
//! changes its own frame and that of the tables, and no other. Frames of the tar header and of the
//! image's header and tables come before the data. One frame of the manifest and the tar's end
//! comes after it: stored, not compressed, because its length must not depend on the checksum in
//! it.

use std::ops::Range;
use std::sync::Arc;

use super::encoder::{FrameEncoder, stored_frame, stored_len};
use super::export::Export;
use super::frame_sizes::{FrameKey, FrameKeys, Origin, compressed_key};
use crate::Result;
use crate::disk::WINDOW;

/// Guest bytes whose data share a frame; also the most bytes of header and tables in one frame.
pub(super) const SPAN: u64 = 2 << 20;
/// Frames of data in a [`WINDOW`].
pub(super) const FRAMES: u64 = WINDOW / SPAN;

/// An export as zstd frames.
///
/// Frames are numbered by place: those of header and tables, one for each [`SPAN`] of the disk
/// (empty where nothing is allocated), and one for the manifest.
pub struct Compressed {
    export: Arc<Export>,
    level: i32,
    /// Frames before the data.
    head: u64,
    /// Frames of data.
    data: u64,
    keys: FrameKeys,
}

impl Compressed {
    /// Compresses `export` at `level` (1 to 19). `live` says that its top layer is a box's live
    /// disk.
    pub fn new(export: Arc<Export>, level: i32, live: bool) -> Compressed {
        let head_len = export.disk_range().start + export.disk().metadata_len();
        Compressed {
            level,
            head: head_len.div_ceil(SPAN),
            data: export.disk().windows() * FRAMES,
            keys: FrameKeys::new(level, live),
            export,
        }
    }

    /// zstd's level.
    pub(super) fn level(&self) -> i32 {
        self.level
    }

    /// The plain archive.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Returns a hash of everything that determines the compressed bytes. It is the same in another
    /// process.
    pub fn state_key(&self) -> [u8; 32] {
        compressed_key(self.level, &self.export.state_key())
    }

    /// The number of the last frame: the manifest's.
    pub(super) fn last(&self) -> u64 {
        self.head + self.data
    }

    /// Returns the first frame from number `from` on that may have bytes; windows without data are
    /// skipped. None after the last.
    pub(super) fn next(&self, mut from: u64) -> Option<u64> {
        let last = self.last();
        while from >= self.head && from < last {
            let window = (from - self.head) / FRAMES;
            if self.export.disk().clusters_in(window) > 0 {
                return Some(from);
            }
            from = self.head + (window + 1) * FRAMES;
        }
        (from <= last).then_some(from)
    }

    /// Returns where each frame that is made ends in the plain archive, in order.
    pub fn frame_ends(&self) -> impl Iterator<Item = u64> + '_ {
        let mut next = self.next(0);
        std::iter::from_fn(move || {
            let frame = next?;
            next = if frame < self.last() {
                self.next(frame + 1)
            } else {
                None
            };
            self.range(frame).ok().map(|range| range.end)
        })
    }

    /// Returns which bytes of the plain archive a frame holds.
    ///
    /// # Errors
    /// Those of reading the layers' tables.
    pub(super) fn range(&self, frame: u64) -> Result<Range<u64>> {
        let disk = self.export.disk_range();
        let head_end = disk.start + self.export.disk().metadata_len();
        if frame < self.head {
            let start = frame * SPAN;
            return Ok(start..(start + SPAN).min(head_end));
        }
        if frame >= self.last() {
            return Ok(disk.end..self.export.len());
        }
        let guest = self.guest(frame);
        let data = self.export.disk().data_of(guest)?;
        Ok(disk.start + data.start..disk.start + data.end)
    }

    /// Returns the guest bytes whose data a frame holds.
    fn guest(&self, frame: u64) -> Range<u64> {
        let start = frame.saturating_sub(self.head) * SPAN;
        let size = self.export.disk().chain().virtual_size();
        start.min(size)..(start + SPAN).min(size)
    }

    /// Returns how a frame can be recognised.
    ///
    /// # Errors
    /// Those of reading the layers' tables.
    pub(super) fn origin(&self, frame: u64) -> Result<Origin> {
        if frame < self.head || frame >= self.last() {
            return Ok(Origin::Live);
        }
        let chain = self.export.disk().chain();
        self.keys.origin(chain, self.guest(frame))
    }

    /// Returns the key of a frame by the bytes in it.
    pub(super) fn content_key(&self, bytes: &[u8]) -> FrameKey {
        self.keys.of_content(bytes)
    }

    /// Returns the key of a frame by its origin, if that gives one, else by the bytes in it.
    pub(super) fn key(&self, origin: &Origin, bytes: &[u8]) -> FrameKey {
        match origin {
            Origin::Frozen(key) => *key,
            Origin::Live => self.content_key(bytes),
        }
    }

    /// The number of frames before the data.
    pub(super) fn head(&self) -> u64 {
        self.head
    }

    /// Fills `raw` with the bytes of a frame, as they are in the plain archive.
    ///
    /// # Errors
    /// Those of [`Export::read_at`].
    pub(super) fn read(&self, frame: u64, raw: &mut Vec<u8>) -> Result<()> {
        let range = self.range(frame)?;
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        // Not cleared first: that would write zeros over all of it.
        raw.resize(len, 0);
        self.export.read_at(range.start, raw).map(|_| ())
    }

    /// Returns the manifest's frame: its bytes as they are, in blocks. It needs the digest, and
    /// waits for it.
    ///
    /// # Errors
    /// Those of reading the disk.
    pub(super) fn manifest_frame(&self) -> Result<Vec<u8>> {
        self.export.complete_digest()?;
        let mut raw = Vec::new();
        self.read(self.last(), &mut raw)?;
        stored_frame(&raw)
    }

    /// Returns the length of the manifest's frame in bytes, whatever the digest.
    pub(super) fn manifest_frame_len(&self) -> u64 {
        stored_len(self.export.len() - self.export.disk_range().end)
    }

    /// Returns an encoder; each thread needs its own.
    ///
    /// # Errors
    /// EINVAL for a level zstd does not have.
    pub(super) fn encoder(&self) -> Result<FrameEncoder> {
        FrameEncoder::at(self.level)
    }
}
