//! Flattened chains: all or the upper layers as one image, computed while it is read and stored
//! nowhere.
//!
//! Layout, in clusters of 64 KiB: header, refcount table, refcount blocks, L1 table, L2 tables,
//! then the data in guest order. All of it follows from which guest clusters are allocated, so any
//! byte can be computed without those before it. A disk of terabytes must not take memory for each
//! cluster: of each window (the 512 MiB behind one L2 table) only a count is kept, and the chain is
//! asked again which clusters are allocated.

use super::bits::is_set;
use super::bytes::{COPIED, ZERO};
use super::image_layout::{BLOCK_ENTRIES, ImageLayout, TABLE_ENTRIES};
use super::overlay::{CLUSTER, L2_COVERS, NewHeader, backing_name, dimensions};
use super::window::{RecentWindows, Window};
use super::{Chain, Format, LeftOut};
use crate::{Error, Result};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Guest bytes of a window: what one L2 table maps.
pub const WINDOW: u64 = L2_COVERS;

/// A chain as one qcow2 image: version 3, clusters of 64 KiB, 16-bit refcounts.
///
/// A standalone image: a cluster is allocated if any byte of it is data in the chain. So the image
/// depends on the chain's contents and allocation, and never on paths.
///
/// Or the upper layers, on top of those below: a cluster is left to the layers below if no upper
/// layer has any byte of it. Otherwise it is data if any byte of it is data in the chain, else it
/// reads as zeros. So the new chain has the contents of the old one and, flattened, its allocation.
///
/// Or the clusters in which it differs from another disk, on top of that disk; zeros are data there,
/// and holes in a file. To find them, the
/// data above the layers that both share is compared, or was when the image was received.
pub struct Flattened {
    chain: Arc<Chain>,
    kind: Kind,
    /// Header, and what it names.
    first_cluster: Vec<u8>,
    layout: ImageLayout,
    /// For each window, and one past the last: the allocated clusters before it.
    clusters_before: Vec<u64>,
    /// For each window, and one past the last: the L2 tables (windows with any cluster) before it.
    tables_before: Vec<u32>,
    recent: RecentWindows,
}

/// What an image has of its chain.
enum Kind {
    /// All of it.
    Standalone,
    /// The layers on top, as many as this says.
    Upper(usize),
    /// What differs from another disk: how many layers are above those that both share, the other
    /// disk, and the same number for it.
    Differs(usize, Arc<Chain>, usize),
    /// The clusters that were written when the image was received.
    Received(Arc<LeftOut>),
}

impl Flattened {
    /// Works out the layout from the chain's metadata; no data is read. EFBIG beyond 2 PiB; EIO
    /// when a layer's tables are damaged.
    pub fn plan(chain: Arc<Chain>) -> Result<Flattened> {
        Flattened::plan_as(chain, Kind::Standalone, None)
    }

    /// Plans the `upper` layers on top as one, on top of the layer after them, which is at
    /// `backing`; standalone if there is no such layer. Errors besides: those of naming it, as
    /// [`create_overlay`](super::create_overlay).
    pub fn plan_upper(chain: Arc<Chain>, upper: usize, backing: &Path) -> Result<Flattened> {
        match chain.layers().get(upper).map(|below| below.format()) {
            Some(format) => Flattened::plan_as(chain, Kind::Upper(upper), Some((backing, format))),
            None => Flattened::plan(chain),
        }
    }

    /// Plans an image of the clusters in which the chain differs from another disk of the same size.
    /// Its backing file is the top layer of that disk, a qcow2 image at `backing`. `upper` and
    /// `other_upper` are the numbers of layers on top of the layers that both share; their data is
    /// read. Errors besides: as [`Flattened::plan_upper`].
    pub fn plan_differing(
        (chain, upper): (Arc<Chain>, usize),
        (other, other_upper): (Arc<Chain>, usize),
        backing: &Path,
    ) -> Result<Flattened> {
        let kind = Kind::Differs(upper, other, other_upper);
        Flattened::plan_as(chain, kind, Some((backing, Format::Qcow2)))
    }

    /// Plans an overlay with the clusters that were written when `image` was received, on top of the
    /// disk that has the others: its top layer is a qcow2 image at `backing`. Errors besides: as
    /// [`Flattened::plan_upper`].
    pub fn plan_received(
        image: Arc<Chain>,
        left_out: Arc<LeftOut>,
        backing: &Path,
    ) -> Result<Flattened> {
        let kind = Kind::Received(left_out);
        Flattened::plan_as(image, kind, Some((backing, Format::Qcow2)))
    }

    fn plan_as(chain: Arc<Chain>, kind: Kind, below: Option<(&Path, Format)>) -> Result<Flattened> {
        let name = below
            .map(|(backing, _)| backing_name(backing))
            .transpose()?;
        let recent = RecentWindows::default();
        let (virtual_size, l1_size) = dimensions(chain.virtual_size())?;
        let windows = virtual_size.div_ceil(L2_COVERS);
        let mut clusters_before = vec![0u64];
        let mut tables_before = vec![0u32];
        let (mut clusters, mut tables) = (0u64, 0u32);
        for index in 0..windows {
            let window = kind.window(&chain, index)?;
            clusters += window.count();
            tables += u32::from(window.has_entries());
            clusters_before.push(clusters);
            tables_before.push(tables);
            if let Kind::Differs(..) = kind {
                // Finding it took reading data, so keep it for when it is asked for again.
                recent.insert(Arc::new(window));
            }
        }
        let layout = ImageLayout::of(u64::from(l1_size), u64::from(tables), clusters);
        let header = NewHeader {
            virtual_size,
            l1_size,
            l1_table_offset: layout.l1_table.start * CLUSTER,
            refcount_table_offset: layout.refcount_table.start * CLUSTER,
            refcount_table_clusters: (layout.refcount_table.end - layout.refcount_table.start)
                as u32,
            backing_name_len: name.map(|name| name.len() as u32),
        };
        let mut first_cluster = match (name, below) {
            (Some(name), Some((_, format))) => header.bytes_with_backing(name, format),
            _ => header.bytes().to_vec(),
        };
        first_cluster.resize(CLUSTER as usize, 0);
        Ok(Flattened {
            chain,
            kind,
            first_cluster,
            layout,
            clusters_before,
            tables_before,
            recent,
        })
    }

    /// Length of the image file in bytes, exactly.
    #[allow(clippy::len_without_is_empty)] // There always is a header.
    pub fn len(&self) -> u64 {
        self.layout.data.end * CLUSTER
    }

    /// Length in bytes of what lies before the data: header, refcounts, L1 and L2 tables.
    pub fn metadata_len(&self) -> u64 {
        self.layout.data.start * CLUSTER
    }

    /// Returns where in the image the allocated clusters of the guest bytes `guest` are: one run of
    /// bytes, empty if none is allocated. Both ends of `guest` are multiples of 64 KiB (or the end
    /// of the disk), within one [`WINDOW`]. Errors: those of reading tables.
    pub fn data_of(&self, guest: Range<u64>) -> Result<Range<u64>> {
        let index = guest.start / L2_COVERS;
        let window = self.window(index)?;
        let first = self.layout.data.start + self.before(index as usize);
        let place = |at: u64| {
            let cluster = (at - index * L2_COVERS).div_ceil(CLUSTER);
            (first + window.rank(cluster)) * CLUSTER
        };
        Ok(place(guest.start)..place(guest.end))
    }

    /// Allocated clusters in window number `index`.
    pub fn clusters_in(&self, index: u64) -> u64 {
        let (from, to) = (index as usize, index as usize + 1);
        self.before(to).saturating_sub(self.before(from))
    }

    /// Returns how many [`WINDOW`]s the disk has.
    pub fn windows(&self) -> u64 {
        self.clusters_before.len() as u64 - 1
    }

    /// The chain it is computed from.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Fills `buf` with the image's bytes from `offset` on; zeros past its end. EIO when a layer is
    /// damaged or changed since the plan; other errors are those of reading.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let (cluster, within) = (at / CLUSTER, at % CLUSTER);
            if self.layout.data.contains(&cluster) {
                let done = self.read_data(cluster - self.layout.data.start, within, rest)?;
                at += done as u64;
                rest = rest.get_mut(done..).unwrap_or_default();
                continue;
            }
            let len = rest.len().min((CLUSTER - within) as usize);
            let (now, later) = rest.split_at_mut(len);
            self.read_metadata(cluster, within, now)?;
            at = at.saturating_add(len as u64);
            rest = later;
        }
        Ok(())
    }

    /// Returns the runs of guest bytes that are data, in order, of window number `index`.
    pub(super) fn data_in(&self, index: u64) -> Result<Vec<Range<u64>>> {
        let start = index * L2_COVERS;
        let disk = self.chain.virtual_size();
        let runs = self.window(index)?.runs().into_iter();
        let guest = |(first, count): (u64, u64)| {
            let from = start + first * CLUSTER;
            from..(from + count * CLUSTER).min(disk)
        };
        Ok(runs.map(guest).collect())
    }

    /// Fills `buf` with a part of one cluster that is not data, `within` bytes into it.
    fn read_metadata(&self, cluster: u64, within: u64, buf: &mut [u8]) -> Result<()> {
        let layout = &self.layout;
        if cluster == 0 {
            copy_part(&self.first_cluster, within, buf);
        } else if layout.refcount_table.contains(&cluster) {
            let first = (cluster - layout.refcount_table.start) * TABLE_ENTRIES;
            fill_table(buf, within, |index| {
                layout.refcount_table_entry(first + index)
            });
        } else if layout.refcount_blocks.contains(&cluster) {
            let first = (cluster - layout.refcount_blocks.start) * BLOCK_ENTRIES;
            fill_refcounts(buf, within, layout.data.end.saturating_sub(first));
        } else if layout.l1_table.contains(&cluster) {
            let first = (cluster - layout.l1_table.start) * TABLE_ENTRIES;
            fill_table(buf, within, |index| self.l1_entry(first + index));
        } else if layout.l2_tables.contains(&cluster) {
            let table = self.l2_table(cluster - layout.l2_tables.start)?;
            copy_part(&table, within, buf);
        } else {
            buf.fill(0);
        }
        Ok(())
    }

    /// The L1 entry of a window: where its L2 table is, 0 if it has none.
    fn l1_entry(&self, window: u64) -> u64 {
        let window = window as usize;
        let before = |index: usize| self.tables_before.get(index).copied();
        match (before(window), before(window + 1)) {
            (Some(table), Some(next)) if next > table => {
                ((self.layout.l2_tables.start + u64::from(table)) * CLUSTER) | COPIED
            }
            _ => 0,
        }
    }

    /// The bytes of the L2 table number `table`.
    fn l2_table(&self, table: u64) -> Result<Vec<u8>> {
        let window = self
            .tables_before
            .partition_point(|&before| u64::from(before) <= table)
            .saturating_sub(1);
        let allocated = self.window(window as u64)?;
        let mut data = self.layout.data.start + self.before(window);
        let mut bytes = vec![0u8; CLUSTER as usize];
        for (index, entry) in bytes.chunks_exact_mut(8).enumerate() {
            if allocated.has(index as u64) {
                entry.copy_from_slice(&((data * CLUSTER) | COPIED).to_be_bytes());
                data += 1;
            } else if is_set(&allocated.zeros, index as u64) {
                entry.copy_from_slice(&ZERO.to_be_bytes());
            }
        }
        Ok(bytes)
    }

    /// Fills the beginning of `buf` from data cluster number `first`, `within` bytes into it, as
    /// far as the guest's clusters are adjacent. Returns how many bytes that are, at least 1.
    fn read_data(&self, first: u64, within: u64, buf: &mut [u8]) -> Result<usize> {
        let window = self
            .clusters_before
            .partition_point(|&before| before <= first)
            .saturating_sub(1);
        let allocated = self.window(window as u64)?;
        let rank = first - self.before(window);
        let wanted = (within + buf.len() as u64).div_ceil(CLUSTER);
        let (guest_cluster, run) = allocated.run(rank, wanted).ok_or_else(|| self.changed())?;
        let len = (run * CLUSTER - within).min(buf.len() as u64) as usize;
        let guest = window as u64 * L2_COVERS + guest_cluster * CLUSTER + within;
        let part = buf.get_mut(..len).unwrap_or_default();
        self.chain.read_at(guest, part)?;
        Ok(len)
    }

    /// Allocated clusters before a window.
    fn before(&self, window: usize) -> u64 {
        self.clusters_before.get(window).copied().unwrap_or(0)
    }

    /// Returns which clusters of a window are allocated. EIO if they are not as many as when the
    /// layout was planned.
    fn window(&self, index: u64) -> Result<Arc<Window>> {
        if let Some(window) = self.recent.get(index) {
            return Ok(window);
        }
        let window = Arc::new(self.kind.window(&self.chain, index)?);
        let planned = self
            .before(index as usize + 1)
            .checked_sub(self.before(index as usize));
        if planned != Some(window.count()) {
            return Err(self.changed());
        }
        self.recent.insert(Arc::clone(&window));
        Ok(window)
    }

    fn changed(&self) -> Error {
        let top = self.chain.layers().first().map(|layer| layer.path());
        Error::damaged(format!(
            "{} changed while it was read (was the box started?); read it again",
            top.unwrap_or(std::path::Path::new("the disk")).display()
        ))
    }
}

impl Kind {
    /// Returns which clusters of window number `index` such an image has.
    fn window(&self, chain: &Chain, index: u64) -> Result<Window> {
        match self {
            Kind::Standalone => Window::of(chain, None, index),
            Kind::Upper(upper) => Window::of(chain, Some(*upper), index),
            Kind::Differs(upper, other, other_upper) => {
                Window::differing((chain, *upper), (other, *other_upper), index)
            }
            Kind::Received(left_out) => Window::received(chain, left_out, index),
        }
    }
}

/// Copies the bytes of one cluster from `within` on; `buf` does not reach beyond the cluster.
fn copy_part(cluster: &[u8], within: u64, buf: &mut [u8]) {
    let from = cluster.get(within as usize..).unwrap_or_default();
    for (to, byte) in buf.iter_mut().zip(from) {
        *to = *byte;
    }
}

/// Fills `buf` with a part of a table of big-endian u64, `within` bytes into its cluster.
fn fill_table(buf: &mut [u8], within: u64, entry: impl Fn(u64) -> u64) {
    for (at, byte) in (within..).zip(buf.iter_mut()) {
        *byte = entry(at / 8).to_be_bytes()[(at % 8) as usize];
    }
}

/// Fills `buf` with a part of a refcount block: 1 for the first `used` clusters, 0 for the others.
fn fill_refcounts(buf: &mut [u8], within: u64, used: u64) {
    for (at, byte) in (within..).zip(buf.iter_mut()) {
        *byte = u8::from(at % 2 == 1 && at / 2 < used);
    }
}

#[cfg(test)]
mod tests;
