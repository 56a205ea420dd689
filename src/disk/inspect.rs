//! Checks images that come from outside, before a guest or a reader uses them.
//!
//! Nothing in such an image is trusted. Every table is walked once, and every host cluster it names
//! is claimed in a bitmap, so no cluster is used twice and none lies outside the file. Then the
//! refcounts are read once: a cluster in use with refcount 0 would be allocated again, and the
//! guest's next write would damage other data.
//!
//! Offsets, masks and limits are those of qemu's `docs/interop/qcow2.rst` and `block/qcow2.h`.

mod claims;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::fs::File;
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::FileExt;
use std::path::Path;

use self::claims::{Claim, ClaimWindows, Claims};
use super::Header;
use super::bytes::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use super::file::open_image;
use crate::{Context, Error, Result};

/// Largest virtual size accepted, in bytes (64 TiB; far beyond what BoxLite offers for a disk).
const MAX_VIRTUAL_SIZE: u64 = 64 << 40;
/// qemu's QCOW_MAX_REFTABLE_SIZE, in bytes.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most memory for one bit per host cluster, in bytes.
const MAX_BITMAP_BYTES: u64 = 64 << 20;
/// Bytes of a table read at once.
const TABLE_CHUNK: u64 = 64 << 10;

/// Bits 9–63 of a refcount table entry.
const REFCOUNT_OFFSET_MASK: u64 = !0x1ff;

/// Checks that the image at `path` can stand alone and be written by a guest. It needs a sane qcow2
/// header of 1 byte to 64 TiB; no backing file, external data file, encryption, internal snapshot,
/// dirty or corrupt mark, or extended L2 entries; tables and clusters that are aligned, inside the
/// file, and used once (compressed clusters may share one, as the format allows); and for every
/// host cluster in use a refcount that covers its uses. Unset COPIED flags and leaked clusters are
/// accepted.
///
/// It takes one bit of memory per host cluster, at most 64 MiB, and besides at most one L2 table (2
/// MiB) and 32 MiB of counters. It reads at most twice the length of the file, whatever its tables
/// say.
///
/// # Errors
///
/// EBADMSG naming the check that failed; those of reading the file.
pub fn inspect_standalone(path: &Path) -> Result<Header> {
    let file = open_image(path, false)?;
    let length = file
        .metadata()
        .context(|| format!("cannot look at {}", path.display()))?
        .len();
    let header = Header::read(&file, path)
        .map_err(as_refusal)?
        .ok_or_else(|| refused(path, "it is not a qcow2 image"))?;
    let image = InspectedImage {
        path,
        file,
        length,
        header: &header,
        read: Cell::new(0),
    };
    image.check_header()?;
    image.check_clusters()?;
    log::debug!("{}: {} bytes of tables", path.display(), image.read.get());
    Ok(header)
}

/// Makes a damaged header a refused archive; other errors keep their errno.
fn as_refusal(error: Error) -> Error {
    match error.errno() {
        libc::EIO | libc::EOPNOTSUPP | libc::EINVAL => error.with_errno(libc::EBADMSG),
        _ => error,
    }
}

fn refused(path: &Path, why: impl AsRef<str>) -> Error {
    Error::bad_archive(format!("{} is refused: {}", path.display(), why.as_ref()))
}

/// A parsed L2 entry. Offsets and lengths are in bytes of the file.
enum Mapping {
    Unallocated,
    /// Data, or an explicit zero cluster that keeps its place in the file.
    Cluster(u64),
    Compressed {
        start: u64,
        end: u64,
    },
}

struct InspectedImage<'a> {
    path: &'a Path,
    file: File,
    length: u64,
    header: &'a Header,
    /// Bytes of tables that were read.
    read: Cell<u64>,
}

impl InspectedImage<'_> {
    fn refused(&self, why: impl AsRef<str>) -> Error {
        refused(self.path, why)
    }

    fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Returns the number of host clusters in the file. A last partial one counts.
    fn host_clusters(&self) -> u64 {
        self.length.div_ceil(self.cluster_size())
    }

    /// Checks what [`Header::read`] accepts in other images.
    fn check_header(&self) -> Result<()> {
        let header = self.header;
        let refcount_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let why = if header.backing.is_some() {
            "it has a backing file; put a flattened image into the archive".into()
        } else if header.names_data_file {
            "it names an external data file".into()
        } else if header.nb_snapshots != 0 {
            format!(
                "it holds {} internal snapshots; delete them with `qemu-img snapshot -d`",
                header.nb_snapshots
            )
        } else if header.virtual_size == 0 {
            "its virtual size is 0".into()
        } else if header.virtual_size > MAX_VIRTUAL_SIZE {
            let size = header.virtual_size;
            format!("its virtual size of {size} bytes is over 64 TiB")
        } else if self.host_clusters().div_ceil(8) > MAX_BITMAP_BYTES {
            let clusters = self.host_clusters();
            format!("checking {clusters} clusters takes too much memory; use larger clusters")
        } else if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES {
            format!("a refcount table of {refcount_bytes} bytes is outside 1 cluster to 8 MiB")
        } else {
            let offset = header.refcount_table_offset;
            return self.check_place("refcount table", offset, refcount_bytes);
        };
        Err(self.refused(why))
    }

    /// Verifies that a table starts at a cluster and lies inside the file.
    fn check_place(&self, what: &str, offset: u64, bytes: u64) -> Result<()> {
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(self.refused(format!("the {what} at {offset:#x} is not cluster-aligned")));
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= self.length => Ok(()),
            _ => Err(self.refused(format!("the {what} at {offset:#x} lies outside the file"))),
        }
    }

    fn check_clusters(&self) -> Result<()> {
        let mut claims = Claims::new(self.host_clusters());
        self.claim_metadata(&mut claims)?;
        let mut windows = ClaimWindows::of(self.host_clusters());
        self.each_mapping(|this, l2, mapping| {
            match mapping {
                MappingOrTable::Table => this.claim(&mut claims, "L2 table", l2, 1)?,
                MappingOrTable::Mapping(Mapping::Cluster(offset)) => {
                    this.claim(&mut claims, "data cluster", offset, 1)?;
                }
                MappingOrTable::Mapping(Mapping::Compressed { start, end }) => {
                    windows.mark(this.clusters_of(start, end));
                }
                MappingOrTable::Mapping(Mapping::Unallocated) => {}
            }
            Ok(())
        })?;
        self.check_refcounts(0, self.host_clusters(), |cluster| {
            u64::from(claims.claimed(cluster))
        })?;
        windows
            .marked()
            .try_for_each(|window| self.check_compressed(&claims, window))
    }

    /// Returns the host clusters of the bytes `start..end`, which are not empty.
    fn clusters_of(&self, start: u64, end: u64) -> RangeInclusive<u64> {
        let bits = self.header.cluster_bits;
        start >> bits..=end.saturating_sub(1) >> bits
    }

    /// Claims the header, the L1 table, the refcount table and the blocks it names.
    fn claim_metadata(&self, claims: &mut Claims) -> Result<()> {
        let header = self.header;
        let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(self.cluster_size());
        self.claim(claims, "header", 0, 1)?;
        self.claim(claims, "L1 table", header.l1_table_offset, l1_clusters)?;
        self.claim(
            claims,
            "refcount table",
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters),
        )?;
        let entries = (u64::from(header.refcount_table_clusters) << header.cluster_bits) / 8;
        self.each_entry(header.refcount_table_offset, entries, |_, entry| match self
            .refcount_block(entry)?
        {
            Some(offset) => self.claim(claims, "refcount block", offset, 1),
            None => Ok(()),
        })
    }

    /// Returns the file offset of the refcount block that a refcount table entry names.
    fn refcount_block(&self, entry: u64) -> Result<Option<u64>> {
        if entry & !REFCOUNT_OFFSET_MASK != 0 {
            return Err(self.refused(format!(
                "refcount table entry {entry:#x} has reserved bits set"
            )));
        }
        if entry == 0 {
            return Ok(None);
        }
        self.check_place("refcount block", entry, self.cluster_size())?;
        Ok(Some(entry))
    }

    /// Marks clusters as in use by one owner; a second owner is refused.
    fn claim(&self, claims: &mut Claims, what: &str, offset: u64, clusters: u64) -> Result<()> {
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(self.refused(format!("the {what} at {offset:#x} is not cluster-aligned")));
        }
        let first = offset >> self.header.cluster_bits;
        for cluster in first..first.saturating_add(clusters) {
            match claims.claim(cluster) {
                Claim::Fresh => {}
                Claim::Taken => {
                    return Err(self.refused(format!(
                        "the {what} at {offset:#x} shares a cluster with something else"
                    )));
                }
                Claim::Outside => {
                    return Err(
                        self.refused(format!("the {what} at {offset:#x} lies outside the file"))
                    );
                }
            }
        }
        Ok(())
    }

    /// Calls `visit(index, entry)` for the `entries` big-endian words of a table at `offset`, which
    /// [`check_place`](Self::check_place) has passed.
    fn each_entry(
        &self,
        offset: u64,
        entries: u64,
        mut visit: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut index = 0;
        let mut chunk = vec![0; (entries * 8).min(TABLE_CHUNK) as usize];
        while index < entries {
            let bytes = ((entries - index) * 8).min(TABLE_CHUNK) as usize;
            let part = chunk.get_mut(..bytes).unwrap_or_default();
            self.read(part, offset + index * 8)?;
            for word in part.as_chunks::<8>().0 {
                visit(index, u64::from_be_bytes(*word))?;
                index += 1;
            }
        }
        Ok(())
    }

    fn read(&self, into: &mut [u8], offset: u64) -> Result<()> {
        self.read
            .set(self.read.get().saturating_add(into.len() as u64));
        self.file
            .read_exact_at(into, offset)
            .context(|| format!("cannot read {} at {offset:#x}", self.path.display()))
    }

    /// Calls `visit` with every L2 table's offset, then with each of its mappings.
    ///
    /// The claim on the first walk refuses a table that two L1 entries name, before it is read
    /// twice. So a walk reads no more than the file has.
    fn each_mapping(
        &self,
        mut visit: impl FnMut(&Self, u64, MappingOrTable) -> Result<()>,
    ) -> Result<()> {
        let header = self.header;
        self.each_entry(
            header.l1_table_offset,
            u64::from(header.l1_size),
            |index, entry| {
                if entry & !(OFFSET_MASK | COPIED) != 0 {
                    return Err(self.refused(format!(
                        "L1 entry {index} ({entry:#x}) has reserved bits set"
                    )));
                }
                let l2 = entry & OFFSET_MASK;
                if l2 == 0 {
                    return Ok(());
                }
                self.check_place("L2 table", l2, self.cluster_size())?;
                visit(self, l2, MappingOrTable::Table)?;
                self.each_entry(l2, self.cluster_size() / 8, |_, entry| {
                    let mapping = self.mapping(entry)?;
                    visit(self, l2, MappingOrTable::Mapping(mapping))
                })
            },
        )
    }

    fn mapping(&self, entry: u64) -> Result<Mapping> {
        if entry & COMPRESSED != 0 {
            return self.compressed(entry);
        }
        if entry & !(OFFSET_MASK | COPIED | ZERO) != 0 {
            return Err(self.refused(format!("L2 entry {entry:#x} has reserved bits set")));
        }
        if entry & ZERO != 0 && self.header.version < 3 {
            return Err(self.refused(format!(
                "L2 entry {entry:#x} is a zero cluster, which version 2 does not have"
            )));
        }
        Ok(match entry & OFFSET_MASK {
            0 => Mapping::Unallocated,
            offset => Mapping::Cluster(offset),
        })
    }

    /// Parses a compressed cluster.
    fn compressed(&self, entry: u64) -> Result<Mapping> {
        if entry & COPIED != 0 {
            return Err(self.refused(format!(
                "L2 entry {entry:#x} is compressed and marked COPIED"
            )));
        }
        let Range { start, end } = self.header.compressed_place(entry);
        // The last sector of the file may be cut short: qemu does not pad it.
        if start == 0 || start >= self.length || end > self.length.next_multiple_of(512) {
            return Err(self.refused(format!(
                "the compressed cluster at {start:#x} lies outside the file"
            )));
        }
        Ok(Mapping::Compressed { start, end })
    }

    /// Verifies that host clusters with compressed data are used for nothing else, and counts them
    /// once for every guest cluster in them. It looks at one window, to bound memory for files of
    /// any size.
    fn check_compressed(&self, claims: &Claims, window: Range<u64>) -> Result<()> {
        let Range { start: first, end } = window;
        let mut uses = vec![0u16; end.saturating_sub(first) as usize];
        self.each_mapping(|this, _, mapping| {
            let MappingOrTable::Mapping(Mapping::Compressed { start, end: stop }) = mapping else {
                return Ok(());
            };
            let clusters = this.clusters_of(start, stop);
            for cluster in (*clusters.start()).max(first)..=(*clusters.end()).min(end - 1) {
                if claims.claimed(cluster) {
                    return Err(this.refused(format!(
                        "the compressed cluster at {start:#x} shares a cluster with something else"
                    )));
                }
                if let Some(uses) = uses.get_mut((cluster - first) as usize) {
                    // Far more than can be packed into one cluster.
                    *uses = uses.checked_add(1).ok_or_else(|| {
                        this.refused(format!(
                            "the compressed cluster at {start:#x} shares its place with over 65535 others"
                        ))
                    })?;
                }
            }
            Ok(())
        })?;
        self.check_refcounts(first, end, |cluster| {
            cluster
                .checked_sub(first)
                .and_then(|at| uses.get(at as usize))
                .copied()
                .map_or(0, u64::from)
        })
    }

    /// Verifies that every cluster in `first..end` has a refcount of at least `uses(cluster)`.
    /// Reads the refcount blocks in order, each once.
    fn check_refcounts(&self, first: u64, end: u64, uses: impl Fn(u64) -> u64) -> Result<()> {
        let header = self.header;
        let per_block = (self.cluster_size() * 8) >> header.refcount_order;
        let blocks = (u64::from(header.refcount_table_clusters) << header.cluster_bits) / 8;
        // Clusters without a refcount block come after the last block.
        let mut next = first;
        let mut block = vec![0; self.cluster_size() as usize];
        self.each_entry(header.refcount_table_offset, blocks, |index, entry| {
            let from = (index * per_block).max(first);
            let to = ((index + 1) * per_block).min(end);
            if from >= to {
                return Ok(());
            }
            next = to;
            let present = match self.refcount_block(entry)? {
                Some(offset) => self.read(&mut block, offset).map(|()| true)?,
                None => false,
            };
            (from..to).try_for_each(|cluster| {
                let count = if present {
                    refcount(&block, cluster % per_block, header.refcount_order)
                } else {
                    0
                };
                self.check_refcount(cluster, count, uses(cluster))
            })
        })?;
        (next..end).try_for_each(|cluster| self.check_refcount(cluster, 0, uses(cluster)))
    }

    fn check_refcount(&self, cluster: u64, count: u64, uses: u64) -> Result<()> {
        if count >= uses {
            return Ok(());
        }
        Err(self.refused(format!(
            "the cluster at {:#x} is in use {uses} times but has refcount {count}; a write would damage it",
            cluster << self.header.cluster_bits
        )))
    }
}

/// What a walk over the L2 tables visits.
enum MappingOrTable {
    Table,
    Mapping(Mapping),
}

/// Returns the refcount at `index` of a block of `2^order`-bit counters. Below a byte, the first
/// counter is in the lowest bits; from 16 bits on they are big-endian.
fn refcount(block: &[u8], index: u64, order: u32) -> u64 {
    let index = index as usize;
    if order < 3 {
        let per_byte = 8usize >> order;
        let byte = block.get(index / per_byte).copied().unwrap_or_default();
        let mask = (1u8 << (1 << order)) - 1;
        return u64::from((byte >> ((index % per_byte) << order)) & mask);
    }
    let bytes = 1usize << (order - 3);
    block
        .get(index * bytes..(index + 1) * bytes)
        .unwrap_or_default()
        .iter()
        .fold(0, |value, byte| (value << 8) | u64::from(*byte))
}
