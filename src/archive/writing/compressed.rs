//! An archive as zstd frames that do not depend on one another, so that they can be made on all cores,
//! and one at a time from any place.
//!
//! A frame holds what of the disk's data lies in one [`SPAN`] of guest bytes, so a cluster that becomes
//! allocated changes its own frame and the tables' and no other. Before the data come the frames of
//! the tar header and the image's header and tables, after it one frame of the manifest and the
//! tar's end: stored, not compressed, because its length must not depend on the checksum in it.

use std::ops::Range;
use std::sync::Arc;

use zstd::bulk::Compressor;
use zstd::zstd_safe::{self, CParameter};

use super::export::Export;
use crate::disk::{DataSource, WINDOW};
use crate::{Error, Result};

/// Guest bytes whose data share a frame; also the most bytes of header and tables in one.
pub(super) const SPAN: u64 = 2 << 20;
/// Frames of data in a [`WINDOW`].
const FRAMES: u64 = WINDOW / SPAN;
/// Largest block of a zstd frame (RFC 8878, 3.1.1.2.4).
const LARGEST_BLOCK: usize = 128 << 10;
/// Bytes of a frame that are neither blocks nor the checksum (RFC 8878, 3.1.1): magic number,
/// descriptor, content size.
const FRAME_HEADER: usize = 4 + 1 + 4;
/// Bytes before each block.
const BLOCK_HEADER: usize = 3;
/// Says what a frame's key is of; to be raised when the same bytes are made into another frame.
const KEY_CONTEXT: &str = "boxlitefs 2026-11-25 zstd frame of 2 MiB of guest data, layout 1";

/// What the size of a frame follows from, as a hash: its bytes, or where they come from.
pub type FrameKey = [u8; 16];

/// An export as zstd frames.
///
/// Frames are numbered by place: those of the header and tables, one for each [`SPAN`] of the disk
/// (without any bytes where nothing is allocated), and one for the manifest.
pub struct Compressed {
    export: Arc<Export>,
    level: i32,
    /// Frames before the data.
    head: u64,
    /// Frames of data.
    data: u64,
    /// The top layer may still be written: where its data lie says nothing about what they are.
    live: bool,
    /// Hash of whatever else a frame follows from.
    keys: blake3::Hasher,
}

/// How a frame's bytes can be recognised without compressing them.
pub(super) enum Origin {
    /// They are of layers that are never written again: the key says where they lie.
    Frozen(FrameKey),
    /// Only the bytes themselves tell.
    Live,
}

impl Compressed {
    /// `export`, compressed at `level` (1 to 19). `live` says that its top layer is a box's live disk.
    pub fn new(export: Arc<Export>, level: i32, live: bool) -> Compressed {
        let head_len = export.disk_range().start + export.disk().metadata_len();
        Compressed {
            level,
            head: head_len.div_ceil(SPAN),
            data: export.disk().windows() * FRAMES,
            live,
            keys: keys_at(level),
            export,
        }
    }

    /// zstd's level.
    pub(super) fn level(&self) -> i32 {
        self.level
    }

    /// The archive it is of.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Hash of all that the compressed bytes follow from. The same in another process.
    pub fn state_key(&self) -> [u8; 32] {
        compressed_key(self.level, &self.export.state_key())
    }

    /// The number of the last frame: the manifest's.
    pub(super) fn last(&self) -> u64 {
        self.head + self.data
    }

    /// The first frame from number `from` on that is not known to be empty; windows without data are
    /// passed over. None after the last.
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

    /// Where in the plain archive each frame ends, of those that are made, in order.
    pub fn frame_ends(&self) -> impl Iterator<Item = u64> + '_ {
        let mut next = self.next(0);
        std::iter::from_fn(move || {
            let frame = next?;
            next = match frame < self.last() {
                true => self.next(frame + 1),
                false => None,
            };
            self.range(frame).ok().map(|range| range.end)
        })
    }

    /// Which bytes of the archive a frame holds.
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

    /// The guest bytes whose data a frame holds.
    fn guest(&self, frame: u64) -> Range<u64> {
        let start = frame.saturating_sub(self.head) * SPAN;
        let size = self.export.disk().chain().virtual_size();
        start.min(size)..(start + SPAN).min(size)
    }

    /// How a frame can be recognised.
    ///
    /// # Errors
    /// Those of reading the layers' tables.
    pub(super) fn origin(&self, frame: u64) -> Result<Origin> {
        if frame < self.head || frame >= self.last() {
            return Ok(Origin::Live);
        }
        let guest = self.guest(frame);
        let chain = self.export.disk().chain();
        let states: Vec<_> = chain.states().collect();
        let mut hasher = self.keys.clone();
        hasher.update(b"where");
        for extent in chain.extents(guest.clone())? {
            let (kind, layer, place) = match extent.source {
                DataSource::Zero => (0u8, None, 0),
                DataSource::Data { layer, host } => (1, Some(layer), host),
                DataSource::Compressed { layer } => (2, Some(layer), extent.guest),
            };
            if self.live && layer == Some(0) {
                return Ok(Origin::Live);
            }
            hasher.update(&[kind]);
            for number in [extent.guest - guest.start, extent.len, place] {
                hasher.update(&number.to_le_bytes());
            }
            if let Some(state) = layer.and_then(|layer| states.get(layer)) {
                hasher.update(&state.bytes());
            }
        }
        Ok(Origin::Frozen(short(&hasher)))
    }

    /// The key of a frame by the bytes in it.
    pub(super) fn content_key(&self, bytes: &[u8]) -> FrameKey {
        let mut hasher = self.keys.clone();
        hasher.update(b"what");
        hasher.update(bytes);
        short(&hasher)
    }

    /// Fills `raw` with the bytes that a frame holds, as they are in the archive.
    ///
    /// # Errors
    /// Those of [`Export::read_at`].
    pub(super) fn read(&self, frame: u64, raw: &mut Vec<u8>) -> Result<()> {
        let range = self.range(frame)?;
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        // Kept as long as it is: clearing it first would write zeros over all of it.
        raw.resize(len, 0);
        self.export.read_at(range.start, raw).map(|_| ())
    }

    /// The manifest's frame: its bytes as they are, in blocks. Needs the digest, and waits for it.
    ///
    /// # Errors
    /// Those of reading the disk.
    pub(super) fn manifest_frame(&self) -> Result<Vec<u8>> {
        self.export.complete_digest()?;
        let mut raw = Vec::new();
        self.read(self.last(), &mut raw)?;
        stored_frame(&raw)
    }

    /// Length of the manifest's frame in bytes, whatever the digest.
    pub(super) fn manifest_frame_len(&self) -> u64 {
        let len = self.export.len() - self.export.disk_range().end;
        let blocks = len.div_ceil(LARGEST_BLOCK as u64);
        FRAME_HEADER as u64 + blocks * BLOCK_HEADER as u64 + len
    }

    /// Makes frames of bytes. One for each thread.
    ///
    /// # Errors
    /// EINVAL for a level zstd does not have.
    pub(super) fn encoder(&self) -> Result<Encoder> {
        let failed = |e| Error::new(libc::EINVAL, "cannot set zstd up").caused_by(e);
        let mut compressor = Compressor::new(self.level).map_err(failed)?;
        compressor
            .set_parameter(CParameter::ChecksumFlag(true))
            .map_err(failed)?;
        Ok(Encoder { compressor })
    }
}

/// What every key of a frame begins with.
fn keys_at(level: i32) -> blake3::Hasher {
    let mut keys = blake3::Hasher::new_derive_key(KEY_CONTEXT);
    keys.update(&level.to_le_bytes());
    keys.update(&zstd_safe::version_number().to_le_bytes());
    keys
}

/// [`Compressed::state_key`] of the archive whose [`Export::state_key`] is `plain`, compressed at `level`.
pub fn compressed_key(level: i32, plain: &[u8; 32]) -> [u8; 32] {
    keys_at(level).update(plain).finalize().into()
}

fn short(hasher: &blake3::Hasher) -> FrameKey {
    let mut key = FrameKey::default();
    hasher.finalize_xof().fill(&mut key);
    key
}

/// One thread's means to compress frames.
pub(super) struct Encoder {
    compressor: Compressor<'static>,
}

impl Encoder {
    /// Replaces what is in `frame` by `raw` as one frame, with its size and a checksum; nothing for
    /// nothing.
    ///
    /// # Errors
    /// ENOMEM and the like.
    pub(super) fn encode(&mut self, raw: &[u8], frame: &mut Vec<u8>) -> Result<()> {
        frame.clear();
        if raw.is_empty() {
            return Ok(());
        }
        frame.reserve(zstd_safe::compress_bound(raw.len()));
        self.compressor
            .compress_to_buffer(raw, frame)
            .map(|_| ())
            .map_err(|e| Error::new(libc::ENOMEM, "cannot compress").caused_by(e))
    }
}

/// `raw` as a zstd frame of blocks that are not compressed (RFC 8878, 3.1.1).
fn stored_frame(raw: &[u8]) -> Result<Vec<u8>> {
    /// Single segment, content size in four bytes, no checksum, no dictionary.
    const DESCRIPTOR: u8 = 0b1010_0000;
    let size = u32::try_from(raw.len())
        .map_err(|_| Error::new(libc::EFBIG, "the box's configuration is over 4 GiB"))?;
    let mut frame = Vec::with_capacity(raw.len() + FRAME_HEADER);
    frame.extend_from_slice(&zstd_safe::MAGICNUMBER.to_le_bytes());
    frame.push(DESCRIPTOR);
    frame.extend_from_slice(&size.to_le_bytes());
    let mut blocks = raw.chunks(LARGEST_BLOCK).peekable();
    while let Some(block) = blocks.next() {
        // Last-block flag, two bits of type (0: raw), 21 bits of size.
        let last = u32::from(blocks.peek().is_none());
        let header = last | (block.len() as u32) << 3;
        frame.extend(header.to_le_bytes().iter().take(BLOCK_HEADER));
        frame.extend_from_slice(block);
    }
    Ok(frame)
}

/// The compressed size of each frame of one archive: with it, any place of the compressed archive can
/// be made by itself. 4 bytes for 2 MiB of guest data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrameSizes {
    /// Frames before the data, then those of each window that has data, then the manifest's.
    sizes: Vec<u32>,
    /// Where each run of [`FRAMES`] entries of `sizes` begins in the compressed archive.
    starts: Vec<u64>,
    /// For each such run of data, the number of its first frame.
    windows: Vec<u64>,
    head: usize,
    total: u64,
}

/// A frame's place in the compressed archive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Placed {
    pub(super) frame: u64,
    /// Offset in the compressed archive.
    pub(super) start: u64,
    pub(super) len: u64,
}

impl FrameSizes {
    /// Of nothing yet: all sizes are 0 but the manifest's.
    pub(super) fn empty(of: &Compressed) -> FrameSizes {
        let head = usize::try_from(of.head).unwrap_or(usize::MAX);
        let disk = of.export.disk();
        let windows: Vec<u64> = (0..disk.windows())
            .filter(|window| disk.clusters_in(*window) > 0)
            .map(|window| of.head + window * FRAMES)
            .collect();
        let mut sizes = vec![0; head + windows.len() * FRAMES as usize + 1];
        if let Some(last) = sizes.last_mut() {
            *last = u32::try_from(of.manifest_frame_len()).unwrap_or(u32::MAX);
        }
        let mut sizes = FrameSizes {
            sizes,
            starts: Vec::new(),
            windows,
            head,
            total: 0,
        };
        sizes.place();
        sizes
    }

    /// As [`bytes`](FrameSizes::bytes) gave them; None if they are not of this archive.
    pub fn from_bytes(of: &Compressed, bytes: &[u8]) -> Option<FrameSizes> {
        let mut sizes = FrameSizes::empty(of);
        let manifest = sizes.sizes.last().copied();
        if bytes.len() != sizes.sizes.len() * 4 {
            return None;
        }
        for (size, bytes) in sizes.sizes.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *size = u32::from_le_bytes(*bytes);
        }
        sizes.place();
        (sizes.sizes.last().copied() == manifest).then_some(sizes)
    }

    /// To be kept.
    pub fn bytes(&self) -> Vec<u8> {
        self.sizes
            .iter()
            .flat_map(|size| size.to_le_bytes())
            .collect()
    }

    /// Length of the compressed archive in bytes.
    pub fn total(&self) -> u64 {
        self.total
    }

    fn index(&self, frame: u64) -> Option<usize> {
        let number = usize::try_from(frame).ok()?;
        if number < self.head {
            return Some(number);
        }
        let run = self
            .windows
            .partition_point(|first| *first <= frame)
            .checked_sub(1)?;
        let within = frame - self.windows.get(run)?;
        (within < FRAMES).then(|| self.head + run * FRAMES as usize + within as usize)
    }

    /// Notes a frame's size; [`place`](FrameSizes::place) is to follow. The manifest's is known.
    pub(super) fn set(&mut self, frame: u64, size: usize) {
        if let Some(index) = self.index(frame)
            && let Some(slot) = self.sizes.get_mut(index)
        {
            *slot = u32::try_from(size).unwrap_or(u32::MAX);
        }
    }

    /// Adds the sizes up.
    pub(super) fn place(&mut self) {
        let (head, rest) = self.sizes.split_at(self.head.min(self.sizes.len()));
        let sum = |sizes: &[u32]| sizes.iter().map(|size| u64::from(*size)).sum::<u64>();
        let mut at = sum(head);
        self.starts.clear();
        for run in rest.chunks(FRAMES as usize) {
            self.starts.push(at);
            at += sum(run);
        }
        self.total = at;
    }

    /// The frame that has the byte `at` of the compressed archive, of `of`; None past its end.
    pub(super) fn at(&self, of: &Compressed, at: u64) -> Option<Placed> {
        if at >= self.total {
            return None;
        }
        let run = self.starts.partition_point(|start| *start <= at);
        let (first, mut start) = match run.checked_sub(1) {
            Some(run) => (self.head + run * FRAMES as usize, *self.starts.get(run)?),
            None => (0, 0),
        };
        for (index, size) in self.sizes.iter().enumerate().skip(first) {
            let len = u64::from(*size);
            if at < start + len {
                let frame = self.number(of, index)?;
                return Some(Placed { frame, start, len });
            }
            start += len;
        }
        None
    }

    fn number(&self, of: &Compressed, index: usize) -> Option<u64> {
        let Some(data) = index.checked_sub(self.head) else {
            return u64::try_from(index).ok();
        };
        match self.windows.get(data / FRAMES as usize) {
            Some(first) => Some(first + data as u64 % FRAMES),
            None => Some(of.last()),
        }
    }
}

#[cfg(test)]
mod tests;
