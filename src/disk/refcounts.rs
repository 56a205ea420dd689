//! The refcounts of an image that is written in place.

use super::bytes::{OFFSET_MASK, entries_of};
use super::{Header, read_zero_padded};
use crate::{Context, Error, Result};
use rustix::fs::{FallocateFlags, fallocate};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How often each cluster of an image is referred to, as it will be once everything is flushed.
///
/// On disk no refcount is ever lower than the references on disk: raised ones are written before
/// the tables that refer to the clusters, and lowered ones after them.
pub(super) struct Refcounts {
    cluster: u64,
    table_at: u64,
    table: Vec<u64>,
    counts: Vec<u16>,
    /// Clusters that nothing refers to, in memory and on disk.
    free: BTreeSet<u64>,
    /// Clusters that lose a reference with the next flush.
    released: Vec<u64>,
    dirty_blocks: BTreeSet<usize>,
    new_blocks: Vec<usize>,
}

impl Refcounts {
    /// Reads the refcounts of all clusters of a file. The caller checked that they have 16 bits.
    pub fn read(file: &File, header: &Header, path: &Path) -> Result<Refcounts> {
        let cluster = header.cluster_size();
        let unreadable = || format!("cannot read the refcounts of {}", path.display());
        let length = file.metadata().context(unreadable)?.len();
        let clusters = length.div_ceil(cluster);
        let mut bytes = vec![0; header.refcount_table_clusters as usize * cluster as usize];
        read_zero_padded(file, &mut bytes, header.refcount_table_offset).context(unreadable)?;
        let table = entries_of(&bytes);
        let mut counts = Vec::new();
        let mut block = vec![0; cluster as usize];
        for entry in &table {
            if counts.len() as u64 >= clusters {
                break;
            }
            if *entry & !OFFSET_MASK != 0 || entry % cluster != 0 || *entry >= length {
                return Err(unfit(path, "its refcount table is damaged"));
            }
            if *entry == 0 {
                block.fill(0);
            } else {
                read_zero_padded(file, &mut block, *entry).context(unreadable)?;
            }
            let pairs = block.chunks_exact(2);
            counts.extend(pairs.map(|pair| pair.iter().fold(0, |sum, b| sum << 8 | u16::from(*b))));
        }
        counts.resize(clusters as usize, 0);
        Ok(Refcounts {
            cluster,
            table_at: header.refcount_table_offset,
            table,
            counts,
            free: BTreeSet::new(),
            released: Vec::new(),
            dirty_blocks: BTreeSet::new(),
            new_blocks: Vec::new(),
        })
    }

    /// Compares the refcounts with the references that the tables have, and finds what is free.
    /// `references` has those of header, L1 table, L2 tables and data.
    ///
    /// # Errors
    /// EROFS where a cluster has more references than its refcount says.
    pub fn compare(&mut self, mut references: Vec<u16>, path: &Path) -> Result<()> {
        references.resize(self.counts.len(), 0);
        let span = self.table.len() as u64 * 8 / self.cluster;
        let of_table = (0..span).map(|index| self.table_at / self.cluster + index);
        let of_blocks = self.table.iter().filter(|at| **at != 0);
        let own: Vec<u64> = of_table
            .chain(of_blocks.map(|at| at / self.cluster))
            .collect();
        for cluster in own {
            if let Some(count) = references.get_mut(cluster as usize) {
                *count = count.saturating_add(1);
            }
        }
        for (cluster, (has, needs)) in self.counts.iter().zip(&references).enumerate() {
            if has < needs {
                return Err(unfit(path, "a refcount in it is too low"));
            }
            if *has == 0 {
                self.free.insert(cluster as u64);
            }
        }
        Ok(())
    }

    /// Returns the refcount of the cluster at this host offset.
    pub fn of(&self, host: u64) -> u16 {
        let count = self.counts.get((host / self.cluster) as usize);
        count.copied().unwrap_or(0)
    }

    /// Takes a cluster that nothing refers to, and returns its host offset.
    ///
    /// # Errors
    /// EFBIG when the refcount table has no entry for a longer file.
    pub fn allocate(&mut self) -> Result<u64> {
        // The block of a cluster in the middle of the file may be missing as well.
        let mut number = self.free.pop_first().unwrap_or(self.counts.len() as u64);
        let block = self.block_of(number);
        let entry = self.table.get_mut(block).ok_or_else(|| {
            Error::new(
                libc::EFBIG,
                "the disk image has no room for more refcounts; export the box and import it",
            )
        })?;
        if *entry == 0 {
            *entry = number * self.cluster;
            self.new_blocks.push(block);
            self.set_used(number);
            number = self.counts.len() as u64;
            if self.block_of(number) != block {
                return self.allocate();
            }
        }
        self.set_used(number);
        Ok(number * self.cluster)
    }

    fn block_of(&self, number: u64) -> usize {
        (number / (self.cluster / 2)) as usize
    }

    fn set_used(&mut self, number: u64) {
        if number >= self.counts.len() as u64 {
            self.counts.resize(number as usize + 1, 0);
        }
        if let Some(count) = self.counts.get_mut(number as usize) {
            *count = 1;
        }
        self.dirty_blocks.insert(self.block_of(number));
    }

    /// Releases a reference to the cluster at this host offset, with the next flush.
    pub fn release(&mut self, host: u64) {
        self.released.push(host / self.cluster);
    }

    /// Returns how many references the next flush releases.
    pub fn releases(&self) -> usize {
        self.released.len()
    }

    /// Writes the blocks with raised refcounts.
    pub fn write_blocks(&mut self, file: &File) -> std::io::Result<()> {
        let per_block = (self.cluster / 2) as usize;
        for block in &self.dirty_blocks {
            let Some(at) = self.table.get(*block).filter(|at| **at != 0) else {
                continue;
            };
            let counts = self.counts.iter().skip(block * per_block).take(per_block);
            let mut bytes: Vec<u8> = counts.flat_map(|count| count.to_be_bytes()).collect();
            bytes.resize(self.cluster as usize, 0);
            file.write_all_at(&bytes, *at)?;
        }
        self.dirty_blocks.clear();
        Ok(())
    }

    /// Writes the table's entries of new blocks, which are durable. Returns whether there were any.
    pub fn write_table(&mut self, file: &File) -> std::io::Result<bool> {
        for block in &self.new_blocks {
            let entry = self.table.get(*block).copied().unwrap_or(0);
            file.write_all_at(&entry.to_be_bytes(), self.table_at + *block as u64 * 8)?;
        }
        let any = !self.new_blocks.is_empty();
        self.new_blocks.clear();
        Ok(any)
    }

    /// Lowers the refcounts of what was released. No table on disk refers to it any more. Gives the
    /// room back to the file system, where that can be done.
    pub fn lower(&mut self, file: &File) -> std::io::Result<()> {
        for number in std::mem::take(&mut self.released) {
            let Some(count) = self.counts.get_mut(number as usize) else {
                continue;
            };
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.free.insert(number);
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                // A file system without holes keeps the room, and the cluster is used again.
                let _ = fallocate(file, flags, number * self.cluster, self.cluster);
            }
            let block = self.block_of(number);
            self.dirty_blocks.insert(block);
        }
        self.write_blocks(file)
    }
}

/// Returns the error for an image that can't be written in place.
pub(super) fn unfit(path: &Path, why: &str) -> Error {
    Error::new(
        libc::EROFS,
        format!(
            "{} can't be written to: {why}; export the box and import it under another name, and \
             write to that",
            path.display()
        ),
    )
}
