//! Writes a disk from front to back, in pieces fit for direct I/O, with holes for zeros and for what
//! another disk has as well.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Allowance;
use crate::disk::{Aligned, BLOCK, Chain, Comparison, Direct, LeftOut, begin_write_back};
use crate::{Error, Result};

/// Bytes of a piece: large enough to keep a disk busy, and small enough to have a few of them.
pub(super) const PIECE: usize = 1 << 20;
/// Zeros to hash and to compare with.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// The shortest run of zeros inside a piece that is left out. With direct I/O each hole costs one
/// more write, and writing 8 KiB takes as long (measured). A cluster of qcow2 is 64 KiB.
const HOLE: usize = 16 << 10;
/// Without direct I/O: written bytes after which the kernel is asked to begin writing back. It
/// works while more bytes arrive, and the flush in the write that completes the archive finds
/// little left.
const WRITE_BACK: u64 = 8 << 20;

/// The beginning of the message when more is written than the header said.
const TAKES_MORE: &str = "the archive's disk.qcow2 takes more";

/// The file, and how far it was written.
pub(super) struct DiskWriter {
    path: PathBuf,
    file: Arc<File>,
    direct: Direct,
    /// Bytes so far; a multiple of [`BLOCK`] until the last piece.
    at: u64,
    /// Where writing back was last begun.
    written_back: u64,
    allowance: Allowance,
    /// What another disk has as well is left out.
    comparison: Option<Comparison>,
    /// Frees space when the disk is full.
    make_room: Option<MakeRoom>,
}

/// Frees some space. Returns false if there is none to free.
pub type MakeRoom = Arc<dyn Fn() -> bool + Send + Sync>;

impl DiskWriter {
    /// Writes to `file`, which was just created at `path`, at most `most` bytes. Pieces of a sparse
    /// member may be so small that their blocks are more than was in the archive. Leaves out the
    /// clusters that `other` has as well.
    pub(super) fn new(
        path: &Path,
        file: Arc<File>,
        most: Option<u64>,
        other: Option<Arc<Chain>>,
    ) -> DiskWriter {
        DiskWriter {
            path: path.to_owned(),
            direct: Direct::of(&file),
            file,
            at: 0,
            written_back: 0,
            allowance: Allowance::of(most),
            comparison: other.map(Comparison::with),
            make_room: None,
        }
    }

    /// Returns the writer with a way to free space when the disk is full.
    pub(super) fn with_room(self, make_room: MakeRoom) -> DiskWriter {
        DiskWriter {
            make_room: Some(make_room),
            ..self
        }
    }

    /// Appends bytes: whole blocks in all calls but the last.
    pub(super) fn data(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.comparison {
            None => self.write(bytes, self.at)?,
            Some(comparison) => {
                for range in comparison.wanted(&self.file, self.at, bytes) {
                    let at = self.at.saturating_add(range.start as u64);
                    self.write(bytes.get(range).unwrap_or_default(), at)?;
                }
            }
        }
        self.at = self.at.saturating_add(bytes.len() as u64);
        if !self.direct.is_direct() && self.at.saturating_sub(self.written_back) >= WRITE_BACK {
            begin_write_back(&self.file, self.written_back..self.at);
            self.written_back = self.at;
        }
        Ok(())
    }

    /// Leaves out `count` zeros, whole blocks of them.
    pub(super) fn hole(&mut self, count: u64) {
        let end = self.at.saturating_add(count);
        if let Some(comparison) = &mut self.comparison {
            comparison.pass_zeros(&self.file, self.at..end);
        }
        self.at = end;
    }

    /// Returns what was left out, once.
    pub(super) fn take_left_out(&mut self) -> Option<LeftOut> {
        self.comparison.take()?.end()
    }

    /// Sets the file's length, since zeros at the end were left out, too.
    pub(super) fn end(&self) -> Result<()> {
        self.file.set_len(self.at).map_err(|e| self.unwritable(e))
    }

    /// Makes bytes and length durable: direct writes may still be in the drive's cache, and their
    /// places in the file system's. The caller flushes the directory.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.unwritable(e))
    }

    /// Writes bytes at an offset, but for zeros worth a hole.
    fn write(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        let (blocks, tail) = bytes.split_at(bytes.len() - bytes.len() % BLOCK);
        for run in data_runs(blocks) {
            let at = at.saturating_add(run.start as u64);
            self.put(blocks.get(run).unwrap_or_default(), at)?;
        }
        if !all_zero(tail) {
            let at = at.saturating_add(blocks.len() as u64);
            self.allowance.take(tail.len(), TAKES_MORE)?;
            while let Err(error) = self.file.write_all_at(tail, at) {
                self.make_room_or_fail(error)?;
            }
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.allowance.take(bytes.len(), TAKES_MORE)?;
        while let Err(error) = self.direct.write_all_at(&self.file, bytes, at) {
            self.make_room_or_fail(error)?;
        }
        Ok(())
    }

    /// Frees space if a write failed for lack of it, so that it can be tried again.
    fn make_room_or_fail(&self, error: std::io::Error) -> Result<()> {
        let is_full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
        match &self.make_room {
            Some(make_room) if is_full && make_room() => Ok(()),
            _ => Err(self.unwritable(error)),
        }
    }

    fn unwritable(&self, cause: std::io::Error) -> Error {
        let path = self.path.display();
        Error::io(format!("cannot write the archive's disk to {path}"), cause)
    }
}

/// Returns what to write of `blocks`: all but zeros at their ends and runs of [`HOLE`] zeros.
fn data_runs(blocks: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (n, block) in blocks.as_chunks::<BLOCK>().0.iter().enumerate() {
        if all_zero(block) {
            continue;
        }
        let start = n.saturating_mul(BLOCK);
        let end = start.saturating_add(BLOCK);
        match runs.last_mut() {
            Some(last) if start.saturating_sub(last.end) < HOLE => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Up to [`PIECE`] bytes, fit for direct I/O.
pub(super) struct Piece {
    memory: Aligned,
    len: usize,
}

impl Piece {
    pub(super) fn new() -> Piece {
        Piece {
            memory: Aligned::zeros(PIECE),
            len: 0,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.memory.bytes().get(..self.len).unwrap_or_default()
    }

    /// Bytes that still fit.
    pub(super) fn room(&self) -> usize {
        PIECE.saturating_sub(self.len)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends as much of `bytes` as fits and returns the rest.
    pub(super) fn fill<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let (some, rest) = bytes.split_at(bytes.len().min(self.room()));
        let end = self.len + some.len();
        if let Some(part) = self.memory.bytes_mut().get_mut(self.len..end) {
            part.copy_from_slice(some);
            self.len = end;
        }
        rest
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }
}

/// At most `count` zeros.
pub(super) fn zeros(count: u64) -> &'static [u8] {
    let len = usize::try_from(count).unwrap_or(usize::MAX);
    ZEROS.get(..len).unwrap_or(&ZEROS)
}

/// Returns whether all of `bytes` are zeros, however many.
pub(super) fn all_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(ZEROS.len())
        .all(|some| ZEROS.get(..some.len()) == Some(some))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn writer(path: &Path) -> DiskWriter {
        let file = File::create_new(path).unwrap();
        DiskWriter::new(path, Arc::new(file), None, None)
    }

    /// Pieces with runs of zeros of many lengths, and a tail.
    fn disk() -> Vec<u8> {
        let mut disk = Vec::new();
        for n in 0..60usize {
            disk.resize(disk.len() + (n * 13 % 40) * BLOCK, 0);
            disk.resize(disk.len() + (n * 7 % 20) * BLOCK, n as u8 + 1);
        }
        disk.resize(disk.len() + 1234, 9);
        disk
    }

    /// Writes the disk in pieces that begin `shift` bytes after where O_DIRECT wants them.
    fn write(writer: &mut DiskWriter, disk: &[u8], shift: usize) {
        let mut piece = Piece::new();
        for bytes in disk.chunks(PIECE - BLOCK) {
            piece.clear();
            piece.fill(&vec![0; shift]);
            piece.fill(bytes);
            writer.data(&piece.bytes()[shift..]).unwrap();
        }
        writer.end().unwrap();
        writer.sync().unwrap();
    }

    #[test]
    fn the_same_bytes_are_written_with_and_without_direct_io() {
        let disk = disk();
        for place in [std::env::temp_dir(), "/dev/shm".into()] {
            let dir = tempfile::tempdir_in(place).unwrap();
            let path = |name: &str| dir.path().join(name);

            write(&mut writer(&path("direct")), &disk, 0);
            let mut buffered = writer(&path("buffered"));
            buffered.direct = Direct::none();
            write(&mut buffered, &disk, 0);
            // Direct I/O does not take this.
            write(&mut writer(&path("unaligned")), &disk, 1);

            for name in ["direct", "buffered", "unaligned"] {
                assert!(std::fs::read(path(name)).unwrap() == disk, "{name}");
            }
        }
    }

    #[test]
    fn zeros_worth_a_hole_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let disk = disk();
        write(&mut writer(&path), &disk, 0);
        let blocks: Vec<bool> = disk.chunks(BLOCK).map(all_zero).collect();
        let kept: usize = blocks
            .chunk_by(|a, b| a == b)
            .filter(|run| !run[0] || run.len() * BLOCK < HOLE)
            .map(|run| run.len() * BLOCK)
            .sum();
        let stored = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(stored <= (kept + HOLE) as u64, "{stored}, wanted {kept}");
        assert!(kept < disk.len() / 2);
    }

    #[test]
    fn few_writes_are_made_of_scattered_zeros() {
        let mut piece = vec![1; PIECE];
        for block in piece.chunks_mut(BLOCK).step_by(2) {
            block.fill(0);
        }
        let runs = |piece: &[u8]| -> Vec<(usize, usize)> {
            data_runs(piece)
                .iter()
                .map(|run| (run.start, run.end))
                .collect()
        };
        // But for the zeros at its start, all at once.
        assert_eq!(runs(&piece), [(BLOCK, PIECE)]);
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&vec![0; PIECE]), []);
        let middle = PIECE / 2;
        piece[middle..middle + HOLE].fill(0);
        assert_eq!(
            runs(&piece),
            [(BLOCK, middle), (middle + HOLE + BLOCK, PIECE)]
        );
    }
}
