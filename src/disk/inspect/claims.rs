//! Claims on host clusters: which are in use.

use crate::disk::bits::is_set;
use std::ops::{Range, RangeInclusive};

/// Host clusters whose compressed references are counted in one walk: 32 MiB of counters, and at
/// most 32 walks, since each cluster has a bit in the bitmap.
pub(super) const COUNT_WINDOW: u64 = 16 << 20;

/// The windows of host clusters that have compressed data.
pub(super) struct ClaimWindows {
    marked: Vec<bool>,
    clusters: u64,
}

impl ClaimWindows {
    pub fn of(clusters: u64) -> ClaimWindows {
        ClaimWindows {
            marked: vec![false; clusters.div_ceil(COUNT_WINDOW) as usize],
            clusters,
        }
    }

    pub fn mark(&mut self, clusters: RangeInclusive<u64>) {
        for window in clusters.start() / COUNT_WINDOW..=clusters.end() / COUNT_WINDOW {
            if let Some(marked) = self.marked.get_mut(window as usize) {
                *marked = true;
            }
        }
    }

    /// Returns the clusters of each marked window.
    pub fn marked(&self) -> impl Iterator<Item = Range<u64>> {
        let starts = (0..self.clusters).step_by(COUNT_WINDOW as usize);
        let marked = starts.zip(&self.marked).filter(|(_, marked)| **marked);
        marked.map(|(first, _)| first..first.saturating_add(COUNT_WINDOW).min(self.clusters))
    }
}

pub(super) enum Claim {
    Fresh,
    Taken,
    Outside,
}

/// One bit per host cluster: in use, and only once.
pub(super) struct Claims {
    bits: Vec<u64>,
    clusters: u64,
}

impl Claims {
    pub fn new(clusters: u64) -> Claims {
        Claims {
            bits: vec![0; clusters.div_ceil(64) as usize],
            clusters,
        }
    }

    pub fn claim(&mut self, cluster: u64) -> Claim {
        let Some(word) = self.bits.get_mut((cluster / 64) as usize) else {
            return Claim::Outside;
        };
        let bit = 1 << (cluster % 64);
        if cluster >= self.clusters {
            Claim::Outside
        } else if *word & bit != 0 {
            Claim::Taken
        } else {
            *word |= bit;
            Claim::Fresh
        }
    }

    pub fn claimed(&self, cluster: u64) -> bool {
        is_set(&self.bits, cluster)
    }
}
