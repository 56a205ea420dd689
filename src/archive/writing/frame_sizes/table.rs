//! Tables of frames: how large each frame of an archive is, and where it begins.

use super::super::compressed::{Compressed, FRAMES};

/// The compressed size of each frame of one archive. With it, any place of the compressed archive
/// can be made by itself. It takes 4 bytes for 2 MiB of guest data.
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
pub struct Placed {
    pub frame: u64,
    /// Offset in the compressed archive.
    pub start: u64,
    pub len: u64,
}

impl FrameSizes {
    /// An empty table: all sizes are 0 but the manifest's.
    pub fn empty(of: &Compressed) -> FrameSizes {
        let head = usize::try_from(of.head()).unwrap_or(usize::MAX);
        let disk = of.export().disk();
        let windows: Vec<u64> = (0..disk.windows())
            .filter(|window| disk.clusters_in(*window) > 0)
            .map(|window| of.head() + window * FRAMES)
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

    /// Reads what [`bytes`](FrameSizes::bytes) returned; None if it is of another archive.
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

    /// Returns the sizes as bytes, for storage.
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

    /// Sets a frame's size; call [`place`](FrameSizes::place) after the last one. The manifest's
    /// size is known.
    pub fn set(&mut self, frame: u64, size: usize) {
        if let Some(index) = self.index(frame)
            && let Some(slot) = self.sizes.get_mut(index)
        {
            *slot = u32::try_from(size).unwrap_or(u32::MAX);
        }
    }

    /// Computes where each run begins.
    pub fn place(&mut self) {
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

    /// Returns the frame that has the byte `at` of the compressed archive `of`; None past its end.
    pub fn at(&self, of: &Compressed, at: u64) -> Option<Placed> {
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
