//! Encodes zstd frames: compressed, or stored.

use zstd::bulk::Compressor;
use zstd::zstd_safe::{self, CParameter};

use crate::{Error, Result};

/// Largest block of a zstd frame (RFC 8878, 3.1.1.2.4).
const LARGEST_BLOCK: usize = 128 << 10;
/// Bytes of a frame that are neither blocks nor the checksum (RFC 8878, 3.1.1): magic number,
/// descriptor, content size.
const FRAME_HEADER: usize = 4 + 1 + 4;
/// Bytes before each block.
const BLOCK_HEADER: usize = 3;

/// The compressor of one thread.
pub(super) struct FrameEncoder {
    compressor: Compressor<'static>,
}

impl FrameEncoder {
    /// An encoder for this level of zstd.
    ///
    /// # Errors
    /// EINVAL for a level zstd does not have.
    pub fn at(level: i32) -> Result<FrameEncoder> {
        let failed = |e| Error::new(libc::EINVAL, "cannot set zstd up").caused_by(e);
        let mut compressor = Compressor::new(level).map_err(failed)?;
        compressor
            .set_parameter(CParameter::ChecksumFlag(true))
            .map_err(failed)?;
        Ok(FrameEncoder { compressor })
    }

    /// Replaces the contents of `frame` by `raw` as one frame, with its size and a checksum.
    /// Without bytes, the frame is empty.
    ///
    /// # Errors
    /// ENOMEM and the like.
    pub fn encode(&mut self, raw: &[u8], frame: &mut Vec<u8>) -> Result<()> {
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

/// Returns `raw` as a zstd frame of blocks that are not compressed (RFC 8878, 3.1.1).
pub(super) fn stored_frame(raw: &[u8]) -> Result<Vec<u8>> {
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

/// Returns the length of [`stored_frame`] for so many bytes.
pub(super) fn stored_len(len: u64) -> u64 {
    let blocks = len.div_ceil(LARGEST_BLOCK as u64);
    FRAME_HEADER as u64 + blocks * BLOCK_HEADER as u64 + len
}
