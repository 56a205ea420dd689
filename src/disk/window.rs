//! Windows of a disk: which clusters of the 512 MiB behind one L2 table are allocated.

use super::bits::{clear, is_set, set};
use super::left_out::without_place;
use super::overlay::{CLUSTER, L2_COVERS, L2_ENTRIES};
use super::{Chain, DataSource, Layer, LeftOut};
use crate::Result;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The most windows that are kept, 1 KiB each: enough for some readers at a time.
pub(super) const MOST_RECENT: usize = 32;

/// The allocation of one window.
pub(super) struct Window {
    index: u64,
    allocated: Bits,
    /// Clusters that read as zeros, whatever lies below.
    pub zeros: Bits,
}

/// The clusters of a window.
type Bits = Box<[u64]>;

impl Window {
    /// Asks the chain. Once a byte of a cluster is known to be data, the rest of the cluster is
    /// skipped.
    pub fn of(chain: &Chain, upper: Option<usize>, index: u64) -> Result<Window> {
        let none = || vec![0; (L2_ENTRIES / 64) as usize].into_boxed_slice();
        let mut window = Window {
            index,
            allocated: none(),
            zeros: none(),
        };
        let start = index * L2_COVERS;
        let disk = chain.virtual_size();
        let end = (start + L2_COVERS).min(disk);
        let mut walk = chain.walk_upper(start..end, upper.unwrap_or(usize::MAX));
        let mut in_part = Vec::new();
        while let Some((run, source)) = walk.next_run()? {
            let first = (run.start - start) / CLUSTER;
            let last = (run.end - 1 - start) / CLUSTER;
            match source {
                None => {}
                Some(DataSource::Zero) if upper.is_none() => {}
                Some(DataSource::Zero) => {
                    let is_whole = |cluster: u64| {
                        let from = start + cluster * CLUSTER;
                        run.start <= from && (from + CLUSTER).min(disk) <= run.end
                    };
                    for cluster in first..=last {
                        if is_whole(cluster) {
                            set(&mut window.zeros, cluster);
                        } else {
                            in_part.push(cluster);
                        }
                    }
                }
                Some(_) => {
                    (first..=last).for_each(|cluster| set(&mut window.allocated, cluster));
                    walk.skip_to(start + (last + 1) * CLUSTER);
                }
            }
        }
        in_part.dedup();
        in_part.retain(|&cluster| !window.has(cluster));
        for cluster in in_part {
            let from = start + cluster * CLUSTER;
            if has_data(chain, from..(from + CLUSTER).min(disk))? {
                set(&mut window.allocated, cluster);
            } else {
                set(&mut window.zeros, cluster);
            }
        }
        Ok(window)
    }

    /// Finds the clusters in which a disk differs from another of the same size. Those clusters are
    /// allocated, even if they are all zeros; all others are left to the other disk. (BoxLite's export
    /// ignores the zero flag and reads the layer below.) `upper` and `other_upper` are the numbers of
    /// layers on top of the layers that both disks share.
    pub fn differing(
        (chain, upper): (&Chain, usize),
        (other, other_upper): (&Chain, usize),
        index: u64,
    ) -> Result<Window> {
        let mut window = Window::of(chain, Some(upper), index)?;
        let theirs = Window::of(other, Some(other_upper), index)?;
        let (start, disk) = (index * L2_COVERS, chain.virtual_size());
        let mut pieces = [vec![0; CLUSTER as usize], vec![0; CLUSTER as usize]];
        for cluster in 0..L2_ENTRIES {
            let is_ours = window.has(cluster) || is_set(&window.zeros, cluster);
            if !is_ours && !theirs.has(cluster) && !is_set(&theirs.zeros, cluster) {
                continue;
            }
            let from = start + cluster * CLUSTER;
            let len = (disk - from).min(CLUSTER) as usize;
            let [piece, other_piece] = &mut pieces;
            let (piece, other_piece) = (&mut piece[..len], &mut other_piece[..len]);
            chain.read_at(from, piece)?;
            other.read_at(from, other_piece)?;
            clear(&mut window.allocated, cluster);
            clear(&mut window.zeros, cluster);
            if piece != other_piece {
                set(&mut window.allocated, cluster);
            }
        }
        Ok(window)
    }

    /// Finds the clusters in which an image that was received differs from the disk that it was
    /// compared with. Those clusters are allocated, as in [`Window::differing`]; all others are left to
    /// that disk.
    pub fn received(image: &Chain, left_out: &LeftOut, index: u64) -> Result<Window> {
        let mut window = Window::of(image, None, index)?;
        let theirs = Window::of(left_out.other(), None, index)?;
        for cluster in 0..L2_ENTRIES {
            if left_out.has(index * L2_ENTRIES + cluster) {
                if !window.has(cluster) {
                    let top = image.layers().first().map(Layer::path);
                    return Err(without_place(top.unwrap_or(Path::new(""))));
                }
                clear(&mut window.allocated, cluster);
            } else if theirs.has(cluster) {
                set(&mut window.allocated, cluster);
            }
        }
        Ok(window)
    }

    /// Returns how many clusters are allocated.
    pub fn count(&self) -> u64 {
        self.allocated
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Returns whether an L2 table is needed.
    pub fn has_entries(&self) -> bool {
        let mut words = self.allocated.iter().chain(self.zeros.iter());
        words.any(|&word| word != 0)
    }

    /// Returns whether a cluster of the window is allocated.
    pub fn has(&self, cluster: u64) -> bool {
        is_set(&self.allocated, cluster)
    }

    /// Returns how many clusters are allocated before `cluster`, which may be one past the last.
    pub fn rank(&self, cluster: u64) -> u64 {
        let (word, bit) = ((cluster / 64) as usize, cluster % 64);
        let whole = self.allocated.iter().take(word);
        let part = self
            .allocated
            .get(word)
            .map_or(0, |word| word & ((1 << bit) - 1));
        whole
            .chain([&part])
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Returns the runs of allocated clusters, each by its first cluster and its length.
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for cluster in (0..L2_ENTRIES).filter(|&cluster| self.has(cluster)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => runs.push((cluster, 1)),
            }
        }
        runs
    }

    /// Returns the allocated cluster that has `rank` others before it, and how many adjacent ones
    /// begin with it, up to `most`.
    pub fn run(&self, rank: u64, most: u64) -> Option<(u64, u64)> {
        let mut left = rank;
        for (index, word) in self.allocated.iter().enumerate() {
            let ones = u64::from(word.count_ones());
            if left >= ones {
                left -= ones;
                continue;
            }
            let mut bits = *word;
            for _ in 0..left {
                bits &= bits - 1;
            }
            let first = index as u64 * 64 + u64::from(bits.trailing_zeros());
            let run = (first..first + most.max(1)).take_while(|&cluster| self.has(cluster));
            return Some((first, run.count() as u64));
        }
        None
    }
}

/// The most recently used windows. The caller asks the chain for a missing one, without the lock,
/// since that reads tables from the disk.
#[derive(Default)]
pub(super) struct RecentWindows(Mutex<VecDeque<Arc<Window>>>);

impl RecentWindows {
    /// Returns a window that is kept, and makes it the most recent one.
    pub fn get(&self, index: u64) -> Option<Arc<Window>> {
        let mut recent = self.0.lock();
        let position = recent.iter().position(|window| window.index == index)?;
        let window = recent.remove(position)?;
        recent.push_front(Arc::clone(&window));
        Some(window)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// Keeps a window in place of the least recent one.
    pub fn insert(&self, window: Arc<Window>) {
        let mut recent = self.0.lock();
        recent.truncate(MOST_RECENT - 1);
        recent.push_front(window);
    }
}

/// Returns whether any of these bytes of the guest is data.
fn has_data(chain: &Chain, guest: Range<u64>) -> Result<bool> {
    let mut walk = chain.walk(guest);
    while let Some(extent) = walk.next_extent()? {
        if extent.source != DataSource::Zero {
            return Ok(true);
        }
    }
    Ok(false)
}
