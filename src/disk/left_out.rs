//! The clusters that a received image lacks because another disk has the same.

use super::overlay::CLUSTER;
use super::{Chain, DataSource, bits};
use crate::{Context, Error, Result};
use std::fmt::{self, Debug, Formatter};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// The clusters of a received image, by their numbers on the guest's disk, that were not written
/// because another disk has the same bytes there.
pub struct LeftOut {
    other: Arc<Chain>,
    /// A bit for each cluster of the guest, lowest bit first.
    bits: Vec<u64>,
    count: u64,
}

impl Debug for LeftOut {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} clusters", self.count)
    }
}

impl LeftOut {
    /// Returns none of the clusters of an image that is compared with `other`.
    pub(super) fn none(other: Arc<Chain>) -> LeftOut {
        LeftOut {
            other,
            bits: Vec::new(),
            count: 0,
        }
    }

    /// Makes room for the clusters of a disk of this many bytes.
    pub(super) fn make_room(&mut self, virtual_size: u64) {
        let words = virtual_size.div_ceil(CLUSTER).div_ceil(64);
        self.bits = vec![0; words as usize];
    }

    /// Returns the disk that has them.
    pub fn other(&self) -> &Arc<Chain> {
        &self.other
    }

    /// Returns how many clusters of 64 KiB were left out.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns whether a cluster of the guest was left out.
    pub fn has(&self, cluster: u64) -> bool {
        bits::is_set(&self.bits, cluster)
    }

    pub(super) fn set(&mut self, cluster: u64) {
        bits::set(&mut self.bits, cluster);
        self.count += u64::from(self.has(cluster));
    }

    /// Writes the clusters that were left out into the image, which then stands alone. Does not flush
    /// it.
    ///
    /// # Errors
    /// EIO when the other disk or the image is damaged; those of writing.
    pub fn fill(&self, file: &File, path: &Path) -> Result<()> {
        let image = Chain::open(path, Path::new("/"), 0)?;
        let mut buffer = vec![0; CLUSTER as usize];
        for cluster in (0..self.bits.len() as u64 * 64).filter(|cluster| self.has(*cluster)) {
            let guest = cluster * CLUSTER;
            self.other.read_at(guest, &mut buffer)?;
            let end = (guest + CLUSTER).min(image.virtual_size());
            for extent in image.extents(guest..end)? {
                let DataSource::Data { host, .. } = extent.source else {
                    return Err(without_place(path));
                };
                let from = (extent.guest - guest) as usize;
                let part = buffer.get(from..from + extent.len as usize);
                file.write_all_at(part.unwrap_or_default(), host)
                    .context(|| format!("cannot write {}", path.display()))?;
            }
        }
        self.other.unchanged()
    }
}

/// Returns the error for an image that has no place for a cluster that was left out. A forged table
/// that is data of its own was left out, and what it said is missing.
pub(super) fn without_place(path: &Path) -> Error {
    Error::bad_archive(format!(
        "{} is refused: one of its tables is data as well",
        path.display()
    ))
}
