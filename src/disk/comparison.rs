//! Compares an image with another disk while it arrives, and leaves out the clusters that the other
//! disk has as well.
//!
//! An image arrives from front to back, and its tables say which cluster of the guest each of its
//! clusters is. This works for images whose tables come before the data they map, and whose data is
//! in the guest's order, as boxlitefs and BoxLite write them. In any other image nothing more is left
//! out from the first cluster on that does not fit.

use super::bytes::{COMPRESSED, OFFSET_MASK, ZERO, be32, be64};
use super::header::MAGIC;
use super::overlay::{CLUSTER, CLUSTER_BITS, L2_COVERS, L2_ENTRIES};
use super::window::Window;
use super::{Chain, LeftOut, read_zero_padded};
use crate::Result;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// The largest disk that is compared, 4 TiB: a bit for each of its clusters takes 8 MiB.
const LARGEST: u64 = 4 << 40;

/// Compares the data of a disk's top layer with another disk of the same size, in at most `most`
/// clusters of 64 KiB spread over it. Returns how many were compared, and how many of them the other
/// disk has as well.
///
/// # Errors
/// EIO when a layer of either disk is damaged.
pub fn sample(disk: &Chain, other: &Chain, most: usize) -> Result<(usize, usize)> {
    let windows = 0..disk.virtual_size().div_ceil(L2_COVERS);
    let window = |index: u64| Window::of(disk, Some(1), index);
    let mut count = 0;
    for index in windows.clone() {
        count += window(index)?.count();
    }
    let step = count.div_ceil(most as u64).max(1);
    let [mut ours, mut theirs] = [vec![0; CLUSTER as usize], vec![0; CLUSTER as usize]];
    let (mut compared, mut same) = (0, 0);
    // Clusters of earlier windows.
    let mut before: u64 = 0;
    for index in windows {
        let window = window(index)?;
        let first = before.next_multiple_of(step) - before;
        for rank in (first..window.count()).step_by(step as usize) {
            let Some((cluster, _)) = window.run(rank, 1) else {
                break;
            };
            let guest = (index * L2_ENTRIES + cluster) * CLUSTER;
            disk.read_at(guest, &mut ours)?;
            other.read_at(guest, &mut theirs)?;
            compared += 1;
            same += usize::from(ours == theirs);
        }
        before += window.count();
    }
    Ok((compared, same))
}

/// The comparison of an image that arrives.
pub struct Comparison {
    left_out: LeftOut,
    /// A cluster of the other disk.
    theirs: Vec<u8>,
    /// None before the header came, and once the image turned out not to fit.
    tables: Option<TableCursor>,
}

impl Comparison {
    /// Begins to compare an image with `other`.
    pub fn with(other: Arc<Chain>) -> Comparison {
        Comparison {
            left_out: LeftOut::none(other),
            theirs: vec![0; CLUSTER as usize],
            tables: None,
        }
    }

    /// Takes the next bytes of the image, which begin at its offset `at`; everything before is in
    /// `file`. Returns the ranges of `bytes` that have to be written.
    pub fn wanted(&mut self, file: &File, at: u64, bytes: &[u8]) -> Vec<Range<usize>> {
        if at == 0 {
            self.begin(bytes);
        }
        let Some(mut tables) = self.tables.take() else {
            return Vec::from([Range {
                start: 0,
                end: bytes.len(),
            }]);
        };
        let arrived = Arrived { file, at, bytes };
        let mut wanted: Vec<Range<usize>> = Vec::new();
        let mut fits = true;
        for start in (0..bytes.len()).step_by(CLUSTER as usize) {
            let end = bytes.len().min(start + CLUSTER as usize);
            if fits && self.leaves_out(&mut tables, &arrived, start..end, &mut fits) {
                continue;
            }
            match wanted.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => wanted.push(start..end),
            }
        }
        if fits {
            self.tables = Some(tables);
        }
        wanted
    }

    /// Takes zeros of the image in the place of bytes. They are not written in any case.
    pub fn pass_zeros(&mut self, file: &File, range: Range<u64>) {
        let Some(mut tables) = self.tables.take() else {
            return;
        };
        let arrived = Arrived {
            file,
            at: range.start,
            bytes: &[],
        };
        while let Next::Data { host, .. } = tables.peek(&arrived) {
            if host >= range.end {
                break;
            }
            if host < range.start {
                return;
            }
            tables.advance();
        }
        self.tables = Some(tables);
    }

    /// Returns the clusters that were left out; None if there are none.
    pub fn end(self) -> Option<LeftOut> {
        (self.left_out.count() > 0).then_some(self.left_out)
    }

    /// Reads the header. Images that are not like those of BoxLite and boxlitefs are not compared.
    fn begin(&mut self, bytes: &[u8]) {
        let (virtual_size, l1_size) = (be64(bytes, 24), u64::from(be32(bytes, 36)));
        let is_plain = bytes.starts_with(&MAGIC)
            && be32(bytes, 4) == 3
            // Neither a backing file, encryption, internal snapshots nor incompatible features.
            && be64(bytes, 8) == 0
            && be32(bytes, 20) == CLUSTER_BITS
            && be32(bytes, 32) == 0
            && be32(bytes, 60) == 0
            && be64(bytes, 72) == 0;
        let is_comparable = virtual_size == self.left_out.other().virtual_size()
            && virtual_size <= LARGEST
            && l1_size == virtual_size.div_ceil(L2_COVERS);
        if is_plain && is_comparable {
            self.left_out.make_room(virtual_size);
            self.tables = Some(TableCursor::new(be64(bytes, 40), l1_size));
        }
    }

    /// Returns whether the cluster that is this part of the bytes is left out. Clears `fits` if the
    /// image is not in the guest's order.
    fn leaves_out(
        &mut self,
        tables: &mut TableCursor,
        arrived: &Arrived<'_>,
        part: Range<usize>,
        fits: &mut bool,
    ) -> bool {
        let host = arrived.at + part.start as u64;
        let guest = match tables.peek(arrived) {
            Next::Data { host: next, guest } if next == host => guest,
            Next::Data { host: next, .. } if next < host => {
                *fits = false;
                return false;
            }
            Next::Data { .. } | Next::Unknown => return false,
            Next::Unfit => {
                *fits = false;
                return false;
            }
        };
        tables.advance();
        let read = self
            .left_out
            .other()
            .read_at(guest * CLUSTER, &mut self.theirs);
        let is_same = read.is_ok() && arrived.bytes.get(part) == Some(&self.theirs[..]);
        if is_same {
            self.left_out.set(guest);
        }
        is_same
    }
}

/// What has arrived of an image: the bytes from `at` on, and in the file those before.
struct Arrived<'a> {
    file: &'a File,
    at: u64,
    bytes: &'a [u8],
}

impl Arrived<'_> {
    /// Fills `buf` with the bytes from `offset` on. Returns false if they have not all arrived.
    fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        let before = self.at.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (old, new) = buf.split_at_mut(before);
        let start = offset.saturating_sub(self.at) as usize;
        let end = start.saturating_add(new.len());
        let Some(bytes) = self.bytes.get(start..end) else {
            return false;
        };
        new.copy_from_slice(bytes);
        // Zeros at the end of the file are only there once its length is set.
        read_zero_padded(self.file, old, offset).is_ok()
    }
}

/// The next cluster of data that an image's tables name, in the guest's order.
#[derive(Clone, Copy)]
enum Next {
    Data {
        /// Its offset in the image.
        host: u64,
        /// Its number on the guest's disk.
        guest: u64,
    },
    /// The table that says so has not arrived, or there is none.
    Unknown,
    /// A table has an entry that is not compared.
    Unfit,
}

/// Walks the tables of an image in the guest's order.
struct TableCursor {
    l1_offset: u64,
    l1_size: u64,
    /// The number of the guest's cluster that is asked for next.
    guest: u64,
    /// The L2 table of that cluster's window, if it was read.
    l2: Option<Vec<u8>>,
}

impl TableCursor {
    fn new(l1_offset: u64, l1_size: u64) -> TableCursor {
        TableCursor {
            l1_offset,
            l1_size,
            guest: 0,
            l2: None,
        }
    }

    fn advance(&mut self) {
        self.guest += 1;
        if self.guest.is_multiple_of(L2_ENTRIES) {
            self.l2 = None;
        }
    }

    /// Returns the next cluster of data, and goes to it.
    fn peek(&mut self, arrived: &Arrived<'_>) -> Next {
        while self.guest / L2_ENTRIES < self.l1_size {
            let Some(l2) = &self.l2 else {
                match self.read_table(arrived) {
                    Some(Some(table)) => self.l2 = Some(table),
                    Some(None) => self.guest = (self.guest / L2_ENTRIES + 1) * L2_ENTRIES,
                    None => return Next::Unknown,
                }
                continue;
            };
            let entry = be64(l2, (self.guest % L2_ENTRIES) as usize * 8);
            if entry & COMPRESSED != 0 {
                return Next::Unfit;
            }
            let (host, guest) = (entry & OFFSET_MASK, self.guest);
            if host != 0 && entry & ZERO == 0 {
                return Next::Data { host, guest };
            }
            self.advance();
        }
        Next::Unknown
    }

    /// Reads the L2 table of the present window: None if it has not arrived, Some(None) if the window
    /// has none.
    fn read_table(&self, arrived: &Arrived<'_>) -> Option<Option<Vec<u8>>> {
        let mut entry = [0; 8];
        let at = self.l1_offset.checked_add(self.guest / L2_ENTRIES * 8)?;
        arrived.read(at, &mut entry).then_some(())?;
        let offset = u64::from_be_bytes(entry) & OFFSET_MASK;
        if offset == 0 {
            return Some(None);
        }
        let mut table = vec![0; CLUSTER as usize];
        arrived.read(offset, &mut table).then_some(Some(table))
    }
}

#[cfg(test)]
mod tests;
