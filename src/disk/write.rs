//! Writes computed images to files.

use super::overlay::CLUSTER;
use super::reflink::clone_range;
use super::{Aligned, Chain, DataSource, Direct, Extent, Flattened, begin_write_back};
use crate::{Context, Error, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes that are written at once, and after which `pace` is asked.
const PIECE: u64 = 4 << 20;
/// Shorter runs of data are read together with their neighbours.
const ALONE: u64 = CLUSTER;
/// Without direct I/O: bytes after which the kernel is asked to begin writing. So the flush at the
/// end is short, and writes of other processes do not wait behind all of it.
const BEGUN: u64 = 32 << 20;

/// A block of that many zeros is left out and becomes a hole.
pub(super) const ZERO_BLOCK: u64 = 16 << 10;
/// Pieces between the thread that reads and the one that writes.
const QUEUE: usize = 2;

impl Flattened {
    /// Writes the image into an empty file, without flushing it. Zeros become holes, and blocks are
    /// shared with the layers where the file system can. `pace` gets the number of bytes after each
    /// piece, and may end the work with an error.
    ///
    /// # Errors
    /// Those of `pace`, of reading layers and of writing.
    pub fn write_to(&self, out: &File, pace: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        out.set_len(self.len()).context(|| FAILED)?;
        self.write_metadata(out, pace)?;
        let (full, to_write) = bounded(QUEUE);
        let (empty, to_fill) = bounded(QUEUE + 2);
        for _ in 0..QUEUE + 2 {
            let _ = empty.send(Aligned::zeros(PIECE as usize));
        }
        // One reads while the other writes.
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || write_pieces(out, &to_write, &empty));
            let reader = PieceReader {
                chain: self.chain(),
                out,
                full,
                to_fill,
                can_share: true,
            };
            let read = self.read_data_into(reader, pace);
            let written = writer.join();
            // If writing failed, that is why reading ended.
            written.unwrap_or_else(|_| Err(Error::damaged("the thread that writes has ended")))?;
            read
        })
    }

    fn write_metadata(&self, out: &File, pace: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        for piece in pieces(0..self.metadata_len()) {
            let len = piece.end - piece.start;
            let part = buffer.get_mut(..len as usize).unwrap_or_default();
            self.read_at(piece.start, part)?;
            out.write_all_at(part, piece.start).context(|| FAILED)?;
            pace(len)?;
        }
        Ok(())
    }

    fn read_data_into(
        &self,
        mut reader: PieceReader<'_>,
        pace: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut at = self.metadata_len();
        for window in 0..self.windows() {
            for run in self.data_in(window)? {
                for piece in pieces(run.clone()) {
                    let to = at + (piece.start - run.start);
                    reader.read(piece.clone(), to)?;
                    pace(piece.end - piece.start)?;
                }
                at += (run.end - run.start).next_multiple_of(CLUSTER);
            }
        }
        Ok(())
    }
}

const FAILED: &str = "cannot write the image";

/// Bytes that were read.
struct FilledPiece {
    buffer: Aligned,
    len: usize,
    /// Where they go.
    to: u64,
}

/// Writes pieces until no more come.
fn write_pieces(out: &File, pieces: &Receiver<FilledPiece>, empty: &Sender<Aligned>) -> Result<()> {
    let mut direct = Direct::of(out);
    let mut begun: Option<u64> = None;
    for piece in pieces {
        let bytes = piece.buffer.bytes().get(..piece.len).unwrap_or_default();
        for run in runs_of_data(bytes) {
            let part = bytes.get(run.clone()).unwrap_or_default();
            direct
                .write_all_at(out, part, piece.to + run.start as u64)
                .context(|| FAILED)?;
        }
        let from = *begun.get_or_insert(piece.to);
        if !direct.is_direct() && piece.to >= from + BEGUN {
            begin_write_back(out, from..piece.to);
            begun = Some(piece.to);
        }
        // Once all is read, no buffer is needed any more.
        let _ = empty.send(piece.buffer);
    }
    Ok(())
}

struct PieceReader<'r> {
    chain: &'r Chain,
    out: &'r File,
    full: Sender<FilledPiece>,
    to_fill: Receiver<Aligned>,
    /// Until the file system shows that it can't.
    can_share: bool,
}

impl PieceReader<'_> {
    /// Reads guest bytes, at most a piece of them, that go to byte `to` of the file.
    fn read(&mut self, guest: Range<u64>, to: u64) -> Result<()> {
        let start = guest.start;
        // Guest bytes that are read together.
        let mut together = start..start;
        for extent in self.chain.extents(guest)? {
            let end = extent.guest + extent.len;
            let shared = extent.len >= ALONE && self.share(&extent, to + (extent.guest - start))?;
            if !shared {
                together.end = end;
                continue;
            }
            self.copy(together, to, start)?;
            together = end..end;
        }
        self.copy(together, to, start)
    }

    /// Leaves a hole for zeros, or makes the file share the extent's blocks; false if it can't.
    fn share(&mut self, extent: &Extent, to: u64) -> Result<bool> {
        let DataSource::Data { layer, host } = extent.source else {
            return Ok(extent.source == DataSource::Zero);
        };
        let Some(layer) = self.chain.layers().get(layer).filter(|_| self.can_share) else {
            return Ok(false);
        };
        match clone_range(layer.file(), host, extent.len, self.out, to) {
            Ok(()) => Ok(true),
            Err(error) => {
                // For a range of partial blocks it says EINVAL.
                self.can_share = error.raw_os_error() == Some(libc::EINVAL);
                Ok(false)
            }
        }
    }

    /// Reads guest bytes to be written; byte `start` of the guest goes to `to`.
    fn copy(&mut self, guest: Range<u64>, to: u64, start: u64) -> Result<()> {
        let len = (guest.end - guest.start) as usize;
        if len == 0 {
            return Ok(());
        }
        let ended = || Error::new(libc::ECANCELED, FAILED);
        let mut buffer = self.to_fill.recv().map_err(|_| ended())?;
        let part = buffer.bytes_mut().get_mut(..len).unwrap_or_default();
        self.chain.read_at(guest.start, part)?;
        let to = to + (guest.start - start);
        let piece = FilledPiece { buffer, len, to };
        self.full.send(piece).map_err(|_| ended())
    }
}

/// Returns the runs of blocks with anything but zeros: the others stay holes in a new file.
fn runs_of_data(bytes: &[u8]) -> Vec<Range<usize>> {
    const BLOCK: usize = ZERO_BLOCK as usize;
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        if ZEROS.starts_with(block) {
            continue;
        }
        let block = index * BLOCK..index * BLOCK + block.len();
        match runs.last_mut() {
            Some(last) if last.end == block.start => last.end = block.end,
            _ => runs.push(block),
        }
    }
    runs
}

/// Cuts a range into pieces. Where it begins does not matter, since a run begins at a cluster.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    (range.start..end)
        .step_by(PIECE as usize)
        .map(move |at| at..(at + PIECE).min(end))
}

#[cfg(test)]
mod tests;
