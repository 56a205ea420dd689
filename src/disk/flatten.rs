//! A chain, or the upper part of one, as one image, computed while it is read and stored nowhere.
//!
//! Layout, in clusters of 64 KiB: header, refcount table, refcount blocks, L1 table, L2 tables, then
//! the data in guest order. All of it follows from which guest clusters are allocated, so any byte
//! can be had without those before it. A disk of terabytes must not cost memory by the cluster: per
//! window (the 512 MiB behind one L2 table) only a count is kept, and which clusters of a window are
//! allocated is asked of the chain again when needed.

use super::overlay::{CLUSTER, L2_COVERS, L2_ENTRIES, NewHeader, backing_name, dimensions};
use super::{Chain, Source};
use crate::{Error, Result};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Refcounts (16 bits each) in a refcount block of one cluster.
const BLOCK_ENTRIES: u64 = CLUSTER / 2;
/// Table entries (64 bits each) in a cluster.
const TABLE_ENTRIES: u64 = CLUSTER / 8;
/// Flag of an L1 or L2 entry: the refcount is exactly 1, so a writer need not copy (qcow2.rst).
const COPIED: u64 = 1 << 63;
/// Flag of an L2 entry: the cluster reads as zeros, whatever lies below (qcow2.rst, version 3).
const READS_AS_ZEROS: u64 = 1;
/// Guest bytes of a window: what one L2 table maps.
pub const WINDOW: u64 = L2_COVERS;
/// Windows whose allocation is remembered, 1 KiB each: enough for some readers at a time.
const REMEMBERED_WINDOWS: usize = 32;

/// A chain as one qcow2 image: version 3, clusters of 64 KiB, 16-bit refcounts.
///
/// Standalone: a cluster is allocated if any byte of it is data in the chain; so the image is a
/// function of the chain's contents and allocation, never of paths.
///
/// Or its upper layers on top of what they lie on: a cluster is left to the layers below if none of
/// the upper ones speaks of any byte of it; else it is data if any byte of it is data in the chain, or
/// reads as zeros. So the new chain has the contents and, flattened, the allocation of the old one.
pub struct Flattened {
    chain: Arc<Chain>,
    /// How many layers it stands for, where that is not all.
    upper: Option<usize>,
    /// Header, and what it names.
    first_cluster: Vec<u8>,
    layout: Layout,
    /// For each window, and one past the last: the allocated clusters before it.
    clusters_before: Vec<u64>,
    /// For each window, and one past the last: the L2 tables (windows with any cluster) before it.
    tables_before: Vec<u32>,
    remembered: Mutex<VecDeque<Arc<Window>>>,
}

/// Where the parts begin and end, as host cluster numbers. The header is cluster 0.
struct Layout {
    refcount_table: Range<u64>,
    refcount_blocks: Range<u64>,
    l1_table: Range<u64>,
    l2_tables: Range<u64>,
    data: Range<u64>,
}

/// Which clusters of one window are allocated.
struct Window {
    index: u64,
    allocated: Bits,
    /// Those that read as zeros whatever lies below.
    zeros: Bits,
}

/// A bit for each cluster of a window, lowest bit first.
type Bits = Box<[u64; (L2_ENTRIES / 64) as usize]>;

impl Flattened {
    /// Works out the layout from the chain's metadata; no data is read. EFBIG beyond 2 PiB; EIO when
    /// a layer's tables are damaged.
    pub fn plan(chain: Arc<Chain>) -> Result<Flattened> {
        Flattened::plan_as(chain, None)
    }

    /// The `upper` layers on top as one, on top of the layer after them, which is at `backing`;
    /// standalone if there is none. Errors besides: those of naming it, as
    /// [`create_overlay`](super::create_overlay).
    pub fn plan_upper(chain: Arc<Chain>, upper: usize, backing: &Path) -> Result<Flattened> {
        match chain.layers().get(upper).is_some() {
            true => Flattened::plan_as(chain, Some((upper, backing))),
            false => Flattened::plan(chain),
        }
    }

    fn plan_as(chain: Arc<Chain>, on: Option<(usize, &Path)>) -> Result<Flattened> {
        let upper = on.map(|(upper, _)| upper);
        let name = on.map(|(_, backing)| backing_name(backing)).transpose()?;
        let (virtual_size, l1_size) = dimensions(chain.virtual_size())?;
        let windows = virtual_size.div_ceil(L2_COVERS);
        let mut clusters_before = vec![0u64];
        let mut tables_before = vec![0u32];
        let (mut clusters, mut tables) = (0u64, 0u32);
        for index in 0..windows {
            let window = Window::of(&chain, upper, index)?;
            clusters += window.count();
            tables += u32::from(window.has_entries());
            clusters_before.push(clusters);
            tables_before.push(tables);
        }
        let layout = Layout::of(u64::from(l1_size), u64::from(tables), clusters);
        let header = NewHeader {
            virtual_size,
            l1_size,
            l1_table_offset: layout.l1_table.start * CLUSTER,
            refcount_table_offset: layout.refcount_table.start * CLUSTER,
            refcount_table_clusters: (layout.refcount_table.end - layout.refcount_table.start)
                as u32,
            backing_name_len: name.map(|name| name.len() as u32),
        };
        let below = upper.and_then(|upper| chain.layers().get(upper));
        let mut first_cluster = match (name, below) {
            (Some(name), Some(below)) => header.bytes_with_backing(name, below.format()),
            _ => header.bytes().to_vec(),
        };
        first_cluster.resize(CLUSTER as usize, 0);
        Ok(Flattened {
            chain,
            upper,
            first_cluster,
            layout,
            clusters_before,
            tables_before,
            remembered: Mutex::new(VecDeque::new()),
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

    /// Where in the image the allocated clusters of the guest bytes `guest` lie: one run of bytes,
    /// empty if none is allocated. Both ends of `guest` are multiples of 64 KiB (or the end of the
    /// disk), within one [`WINDOW`]. Errors: those of reading tables.
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

    /// How many [`WINDOW`]s the disk has.
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

    /// The runs of guest bytes that are data, in order, of window number `index`.
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
                entry.copy_from_slice(&READS_AS_ZEROS.to_be_bytes());
            }
        }
        Ok(bytes)
    }

    /// Fills the beginning of `buf` from data cluster number `first`, `within` bytes into it, as far
    /// as the guest's clusters follow one another; returns how many bytes that are, at least 1.
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

    /// Which clusters of a window are allocated, remembered or asked anew. EIO if they are not as
    /// many as when the layout was planned.
    fn window(&self, index: u64) -> Result<Arc<Window>> {
        if let Some(window) = self.recall(index) {
            return Ok(window);
        }
        // Not under the lock: this reads tables from the disk.
        let window = Arc::new(Window::of(&self.chain, self.upper, index)?);
        let planned = self
            .before(index as usize + 1)
            .checked_sub(self.before(index as usize));
        if planned != Some(window.count()) {
            return Err(self.changed());
        }
        let mut remembered = self.remembered.lock();
        remembered.truncate(REMEMBERED_WINDOWS - 1);
        remembered.push_front(Arc::clone(&window));
        Ok(window)
    }

    /// A remembered window, which becomes the last to be forgotten.
    fn recall(&self, index: u64) -> Option<Arc<Window>> {
        let mut remembered = self.remembered.lock();
        let position = remembered.iter().position(|window| window.index == index)?;
        let window = remembered.remove(position)?;
        remembered.push_front(Arc::clone(&window));
        Some(window)
    }

    fn changed(&self) -> Error {
        let top = self.chain.layers().first().map(|layer| layer.path());
        Error::damaged(format!(
            "{} changed while it was read (was the box started?); read it again",
            top.unwrap_or(std::path::Path::new("the disk")).display()
        ))
    }
}

impl Layout {
    /// Where everything lies in an image of `l1_size` L1 entries, `tables` L2 tables and `clusters`
    /// data clusters.
    fn of(l1_size: u64, tables: u64, clusters: u64) -> Layout {
        let others = 1 + l1_size.div_ceil(TABLE_ENTRIES) + tables + clusters;
        // The refcounts count their own clusters too: grow until they cover everything.
        let (mut blocks, mut table) = (1u64, 1u64);
        loop {
            let needed = (others + table + blocks).div_ceil(BLOCK_ENTRIES);
            let needed_table = needed.div_ceil(TABLE_ENTRIES);
            if (needed, needed_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed.max(blocks), needed_table.max(table));
        }
        let after = |start: u64, len: u64| start..start + len;
        let refcount_table = after(1, table);
        let refcount_blocks = after(refcount_table.end, blocks);
        let l1_table = after(refcount_blocks.end, l1_size.div_ceil(TABLE_ENTRIES));
        let l2_tables = after(l1_table.end, tables);
        let data = after(l2_tables.end, clusters);
        Layout {
            refcount_table,
            refcount_blocks,
            l1_table,
            l2_tables,
            data,
        }
    }

    /// The refcount table's entry: where a refcount block is, 0 for none.
    fn refcount_table_entry(&self, index: u64) -> u64 {
        let block = self.refcount_blocks.start + index;
        if self.refcount_blocks.contains(&block) {
            block * CLUSTER
        } else {
            0
        }
    }
}

impl Window {
    /// Asks the chain. Once a byte of a cluster is known to be data, the rest of it is skipped.
    fn of(chain: &Chain, upper: Option<usize>, index: u64) -> Result<Window> {
        let none = || Box::new([0u64; (L2_ENTRIES / 64) as usize]);
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
                Some(Source::Zero) if upper.is_none() => {}
                Some(Source::Zero) => {
                    let is_whole = |cluster: u64| {
                        let from = start + cluster * CLUSTER;
                        run.start <= from && (from + CLUSTER).min(disk) <= run.end
                    };
                    for cluster in first..=last {
                        match is_whole(cluster) {
                            true => set(&mut window.zeros, cluster),
                            false => in_part.push(cluster),
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
            match has_data(chain, from..(from + CLUSTER).min(disk))? {
                true => set(&mut window.allocated, cluster),
                false => set(&mut window.zeros, cluster),
            }
        }
        Ok(window)
    }

    /// How many clusters are allocated.
    fn count(&self) -> u64 {
        self.allocated
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether an L2 table is needed.
    fn has_entries(&self) -> bool {
        let mut words = self.allocated.iter().chain(self.zeros.iter());
        words.any(|&word| word != 0)
    }

    /// Whether a cluster of the window is allocated.
    fn has(&self, cluster: u64) -> bool {
        is_set(&self.allocated, cluster)
    }

    /// How many clusters are allocated before `cluster`, which may be one past the last.
    fn rank(&self, cluster: u64) -> u64 {
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

    /// The runs of allocated clusters, each by its first and its length.
    fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for cluster in (0..L2_ENTRIES).filter(|&cluster| self.has(cluster)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => runs.push((cluster, 1)),
            }
        }
        runs
    }

    /// The allocated cluster that has `rank` others before it, and how many follow one another from
    /// it on, itself included, up to `most`.
    fn run(&self, rank: u64, most: u64) -> Option<(u64, u64)> {
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

fn set(bits: &mut Bits, cluster: u64) {
    if let Some(word) = bits.get_mut((cluster / 64) as usize) {
        *word |= 1 << (cluster % 64);
    }
}

fn is_set(bits: &Bits, cluster: u64) -> bool {
    let word = bits.get((cluster / 64) as usize);
    word.is_some_and(|word| word >> (cluster % 64) & 1 == 1)
}

/// Whether any of these bytes of the guest is data.
fn has_data(chain: &Chain, guest: Range<u64>) -> Result<bool> {
    let mut walk = chain.walk(guest);
    while let Some(extent) = walk.next_extent()? {
        if extent.source != Source::Zero {
            return Ok(true);
        }
    }
    Ok(false)
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
mod tests {
    use super::*;
    use crate::disk::chain::tests::{chains, open};
    use crate::disk::judges::{Numbers, check_clean, create, info, qemu_io, succeed, text};
    use crate::disk::{Format, create_overlay};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    fn plan(top: &Path) -> Flattened {
        Flattened::plan(Arc::new(open(top).unwrap())).unwrap()
    }

    fn whole(flattened: &Flattened) -> Vec<u8> {
        let mut bytes = vec![1u8; flattened.len() as usize];
        flattened.read_at(0, &mut bytes).unwrap();
        bytes
    }

    /// Stores the image; clusters of zeros become holes.
    fn store(flattened: &Flattened, path: &Path) {
        let file = File::create(path).unwrap();
        file.set_len(flattened.len()).unwrap();
        let mut piece = vec![0u8; 1 << 20];
        let mut at = 0;
        while at < flattened.len() {
            let len = (flattened.len() - at).min(1 << 20) as usize;
            flattened.read_at(at, &mut piece[..len]).unwrap();
            if piece[..len].iter().any(|&byte| byte != 0) {
                file.write_all_at(&piece[..len], at).unwrap();
            }
            at += len as u64;
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn a_flattened_chain_is_clean_and_equals_the_chain() {
        let dir = tempfile::tempdir().unwrap();
        for (what, top) in chains(dir.path()) {
            let image = dir.path().join("flat.qcow2");
            store(&plan(&top), &image);
            check_clean(&image);
            let said = succeed("qemu-img", &["compare", text(&top), text(&image)]);
            assert!(said.contains("identical"), "{what}: {said}");
            let info = info(&image);
            assert_eq!(info["cluster-size"], 65536);
            assert_eq!(info["format-specific"]["data"]["refcount-bits"], 16);
            assert!(info.get("backing-filename").is_none());
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn a_flattened_image_passes_our_own_inspection() {
        let dir = tempfile::tempdir().unwrap();
        for (what, top) in chains(dir.path()) {
            let image = dir.path().join("flat.qcow2");
            store(&plan(&top), &image);
            let inspected = crate::disk::inspect_standalone(&image);
            assert!(inspected.is_ok(), "{what}: {}", inspected.unwrap_err());
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn reads_at_any_offset_are_the_sequential_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut numbers = Numbers(4711);
        for (what, top) in chains(dir.path()) {
            let flattened = plan(&top);
            let bytes = whole(&flattened);
            for _ in 0..100 {
                let at = numbers.below(bytes.len() as u64) as usize;
                let len = 1 + numbers.below((bytes.len() - at).min(300_000) as u64) as usize;
                let mut part = vec![1u8; len];
                flattened.read_at(at as u64, &mut part).unwrap();
                assert!(part == bytes[at..at + len], "{what} at {at}+{len}");
            }
            let mut past = [1u8; 100];
            flattened.read_at(flattened.len(), &mut past).unwrap();
            assert_eq!(past, [0; 100]);
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn the_image_does_not_depend_on_paths_or_layers() {
        let dir = tempfile::tempdir().unwrap();
        for (what, top) in chains(dir.path()) {
            let over = dir.path().join("another-name-on-top.qcow2");
            let size = open(&top).unwrap().virtual_size();
            let _ = std::fs::remove_file(&over);
            create_overlay(&over, &top, Format::Qcow2, size).unwrap();
            assert!(whole(&plan(&top)) == whole(&plan(&over)), "{what}");
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn windows_without_data_have_no_table_and_holes_cost_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("base.raw");
        let file = File::create(&raw).unwrap();
        file.set_len(3 << 40).unwrap();
        for at in [0, 5 << 30, (1 << 40) + 4096, (3 << 40) - 4096] {
            file.write_all_at(&[3u8; 4096], at).unwrap();
        }
        let top = dir.path().join("top.qcow2");
        create_overlay(&top, &raw, Format::Raw, 3 << 40).unwrap();
        qemu_io(&top, &["write -P 7 2T 192k", "write -z 5G 64k"]);
        let flattened = plan(&top);
        // Header, refcount table and block, L1 table, 4 L2 tables, 1 + 0 + 1 + 3 + 1 clusters.
        assert_eq!(flattened.len(), (4 + 4 + 6) * CLUSTER);
        let image = dir.path().join("flat.qcow2");
        store(&flattened, &image);
        check_clean(&image);
        assert_eq!(info(&image)["virtual-size"], 3u64 << 40);
        let mut byte = [0u8];
        let again = open(&image).unwrap();
        for (at, expected) in [
            (4095, 3),
            (5 << 30, 0),
            ((2 << 40) + 100_000, 7),
            ((3 << 40) - 1, 3),
        ] {
            again.read_at(at, &mut byte).unwrap();
            assert_eq!(byte, [expected], "at {at}");
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn an_image_with_several_refcount_blocks_is_clean() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("base.raw");
        let file = File::create(&raw).unwrap();
        file.set_len(5 << 30).unwrap();
        // A sector in every other cluster makes more clusters than one block counts.
        for cluster in (0..80_000u64).filter(|cluster| cluster % 16 != 3) {
            file.write_all_at(&[1u8; 512], cluster * CLUSTER).unwrap();
        }
        let flattened = plan(&raw);
        assert!(flattened.len() > 2 * BLOCK_ENTRIES * CLUSTER);
        let image = dir.path().join("flat.qcow2");
        let out = File::create(&image).unwrap();
        out.set_len(flattened.len()).unwrap();
        let mut metadata = vec![0u8; (flattened.layout.data.start * CLUSTER) as usize];
        flattened.read_at(0, &mut metadata).unwrap();
        out.write_all_at(&metadata, 0).unwrap();
        check_clean(&image);
    }

    #[test]
    #[ignore = "needs programs"]
    fn an_empty_disk_and_an_odd_size_make_images_that_qemu_opens() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, image) = (dir.path().join("raw"), dir.path().join("flat.qcow2"));
        for (bytes, size) in [
            (vec![], 0),
            (vec![9u8; 1000], 1024),
            (vec![9u8; 70_001], 70_144),
        ] {
            std::fs::write(&raw, &bytes).unwrap();
            store(&plan(&raw), &image);
            check_clean(&image);
            assert_eq!(info(&image)["virtual-size"], size);
            let mut read = vec![1u8; bytes.len()];
            open(&image).unwrap().read_at(0, &mut read).unwrap();
            assert_eq!(read, bytes);
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn only_counts_per_window_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("large.qcow2");
        create(&image, "cluster_size=64k", None, "8T");
        qemu_io(&image, &["write -P 1 0 32M", "write -P 1 4T 32M"]);
        let flattened = plan(&image);
        let windows = (8u64 << 40) / L2_COVERS;
        assert_eq!(flattened.clusters_before.len() as u64, windows + 1);
        assert_eq!(flattened.tables_before.len() as u64, windows + 1);
        assert_eq!(flattened.clusters_before.last(), Some(&1024));
        whole(&flattened);
        assert!(flattened.remembered.lock().len() <= REMEMBERED_WINDOWS);
    }

    #[test]
    fn a_chain_that_changed_since_the_plan_is_an_error_and_no_mixture() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        std::fs::write(&raw, vec![1u8; 1 << 20]).unwrap();
        let flattened = plan(&raw);
        File::options()
            .write(true)
            .open(&raw)
            .unwrap()
            .set_len(4096)
            .unwrap();
        let mut bytes = vec![0u8; flattened.len() as usize];
        assert_eq!(
            flattened.read_at(0, &mut bytes).unwrap_err().errno(),
            libc::EIO
        );
    }
}
