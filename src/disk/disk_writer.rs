//! Writes to a box's disk: into its topmost layer, which is a qcow2 image.
//!
//! Data goes to the file at once, tables stay in memory. A flush writes them so that at any moment
//! the image on disk is whole: data and raised refcounts, then L2 tables, then the L1 table, then
//! lowered refcounts, each durable before the next. What a crash leaves are clusters that nothing
//! refers to.

use super::bytes::{COMPRESSED, COPIED, OFFSET_MASK, ZERO, pieces};
use super::file::open_image;
use super::refcounts::unfit;
use super::writer_tables::{L2Table, Tables, clusters_of, read_table, refuse_unfit};
use super::{Chain, FileId, Header, Layer, read_zero_padded};
use crate::{Context, Error, Result};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// L2 tables in memory: 4 MiB with clusters of 64 KiB.
const MOST_TABLES: usize = 64;
/// Clusters that wait for a flush to be freed.
const MOST_RELEASED: usize = 4096;

/// A step of a flush that has been made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlushStep {
    /// Data and raised refcounts are durable.
    Refcounts,
    /// L2 tables are durable.
    Tables,
    /// The L1 table is durable.
    Roots,
    /// Refcounts of what nothing refers to are lowered.
    Lowered,
}

/// A disk that is open for writing.
pub struct DiskWriter {
    /// The chain as it was opened. What was not written since is read from it.
    original: Chain,
    file: File,
    header: Header,
    tables: Mutex<Tables>,
    reached: fn(FlushStep),
}

impl DiskWriter {
    /// Opens the topmost layer of a chain for writing. Nothing else may write to it. `reached` is
    /// called after each step of a flush.
    ///
    /// # Errors
    /// EROFS for an image that can't be written in place, EPERM for one that has another name too;
    /// those of opening it.
    pub fn open(chain: Chain, reached: fn(FlushStep)) -> Result<DiskWriter> {
        let top = chain
            .layers()
            .first()
            .ok_or_else(|| Error::damaged("no layer"))?;
        let path = top.path();
        let header = top
            .header()
            .ok_or_else(|| unfit(path, "it is not a qcow2 image"))?;
        refuse_unfit(header, path)?;
        let file = open_image(path, true)?;
        let meta = file.metadata();
        let meta = meta.context(|| format!("cannot look at {}", path.display()))?;
        if FileId::of(&meta) != top.id() {
            return Err(Error::busy(format!(
                "{} was just replaced; try again",
                path.display()
            )));
        }
        if meta.nlink() > 1 {
            return Err(Error::new(
                libc::EPERM,
                format!(
                    "{} has another name as well, perhaps in a backup, which would change with it; \
                     take a snapshot of the box, so that the box gets a layer of its own",
                    path.display()
                ),
            ));
        }
        let header = header.clone();
        let tables = Tables::read(&file, &header, path)?;
        Ok(DiskWriter {
            file,
            header,
            tables: Mutex::new(tables),
            reached,
            original: chain,
        })
    }

    /// Returns the size of the disk, which does not change.
    pub fn size(&self) -> u64 {
        self.header.virtual_size
    }

    fn path(&self) -> &Path {
        self.original
            .layers()
            .first()
            .map_or(Path::new(""), Layer::path)
    }

    /// Fills `buf` with the disk's bytes from `offset` on; zeros past its end.
    ///
    /// # Errors
    /// EIO for what is damaged; those of reading.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut tables = self.tables.lock();
        let mut rest = buf;
        for (at, len) in pieces(offset, rest.len() as u64, self.header.cluster_size()) {
            let (now, later) = rest.split_at_mut(len as usize);
            self.read_piece(&mut tables, at, now)?;
            rest = later;
        }
        self.bound(&mut tables)
    }

    fn read_piece(&self, tables: &mut Tables, at: u64, buf: &mut [u8]) -> Result<()> {
        if at >= self.size() {
            buf.fill(0);
            return Ok(());
        }
        let entry = self.entry(tables, at)?;
        if entry & COMPRESSED != 0 || (entry & ZERO == 0 && entry & OFFSET_MASK == 0) {
            // As it was when the chain was opened.
            return self.original.read_at(at, buf);
        }
        if entry & ZERO != 0 {
            buf.fill(0);
            return Ok(());
        }
        let host = (entry & OFFSET_MASK) + at % self.header.cluster_size();
        read_zero_padded(&self.file, buf, host)
            .context(|| format!("cannot read {}", self.path().display()))
    }

    /// Writes to the disk from `offset` on. It is durable after a flush.
    ///
    /// # Errors
    /// EFBIG past the end of the disk, before a byte is written; ENOSPC; EIO.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.refuse_past_end(offset, bytes.len() as u64)?;
        let mut tables = self.tables.lock();
        self.refuse_failed(&tables)?;
        let mut rest = bytes;
        for (at, len) in pieces(offset, rest.len() as u64, self.header.cluster_size()) {
            let (now, later) = rest.split_at(len as usize);
            self.write_piece(&mut tables, at, now)?;
            self.bound(&mut tables)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes bytes that lie in one cluster.
    fn write_piece(&self, tables: &mut Tables, at: u64, bytes: &[u8]) -> Result<()> {
        let cluster = self.header.cluster_size();
        let failed = || format!("cannot write to {}", self.path().display());
        let entry = self.entry(tables, at)?;
        let host = entry & OFFSET_MASK;
        let within = at % cluster;
        let is_data = entry & (COMPRESSED | ZERO) == 0 && host != 0;
        if is_data && tables.refcounts.of(host) == 1 {
            return self.file.write_all_at(bytes, host + within).context(failed);
        }
        let mut whole = vec![0; cluster as usize];
        if bytes.len() as u64 != cluster {
            self.read_piece(tables, at - within, &mut whole)?;
        }
        if let Some(place) = whole.get_mut(within as usize..within as usize + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        self.make_table(tables, at)?;
        let new = tables.refcounts.allocate()?;
        if let Err(error) = self.file.write_all_at(&whole, new) {
            tables.refcounts.release(new);
            return Err(Error::io(failed(), error));
        }
        self.set_entry(tables, at, new | COPIED)
    }

    /// Makes a range of the disk zeros, and frees the clusters in it.
    ///
    /// # Errors
    /// Those of [`DiskWriter::write_at`].
    pub fn zero(&self, offset: u64, length: u64) -> Result<()> {
        self.refuse_past_end(offset, length)?;
        let mut tables = self.tables.lock();
        self.refuse_failed(&tables)?;
        let cluster = self.header.cluster_size();
        for (at, len) in pieces(offset, length, cluster) {
            let is_whole = len == cluster || (at % cluster == 0 && at + len == self.size());
            if is_whole {
                self.zero_cluster(&mut tables, at)?;
            } else {
                let mut present = vec![0; len as usize];
                self.read_piece(&mut tables, at, &mut present)?;
                if present.iter().any(|byte| *byte != 0) {
                    present.fill(0);
                    self.write_piece(&mut tables, at, &present)?;
                }
            }
            self.bound(&mut tables)?;
        }
        Ok(())
    }

    fn zero_cluster(&self, tables: &mut Tables, at: u64) -> Result<()> {
        if self.entry(tables, at)? & (COMPRESSED | ZERO) == ZERO {
            return Ok(());
        }
        self.make_table(tables, at)?;
        self.set_entry(tables, at, ZERO)
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// Those of writing. After one, every write and flush fails.
    pub fn flush(&self) -> Result<()> {
        self.flush_tables(&mut self.tables.lock())
    }

    fn flush_tables(&self, tables: &mut Tables) -> Result<()> {
        self.refuse_failed(tables)?;
        let written = self.write_tables(tables);
        tables.has_failed = written.is_err();
        written.context(|| format!("cannot write to {}", self.path().display()))
    }

    fn write_tables(&self, tables: &mut Tables) -> io::Result<()> {
        let file = &self.file;
        tables.refcounts.write_blocks(file)?;
        file.sync_data()?;
        if tables.refcounts.write_table(file)? {
            file.sync_data()?;
        }
        (self.reached)(FlushStep::Refcounts);
        let mut dirty = tables
            .l2
            .values_mut()
            .filter(|table| table.is_dirty)
            .peekable();
        if dirty.peek().is_some() {
            for table in dirty {
                file.write_all_at(&big_endian(&table.entries), table.at)?;
                table.is_dirty = false;
            }
            file.sync_data()?;
            (self.reached)(FlushStep::Tables);
        }
        if !tables.new_tables.is_empty() {
            for index in std::mem::take(&mut tables.new_tables) {
                let entry = tables.l1.get(index).copied().unwrap_or(0);
                let at = self.header.l1_table_offset + index as u64 * 8;
                file.write_all_at(&entry.to_be_bytes(), at)?;
            }
            file.sync_data()?;
            (self.reached)(FlushStep::Roots);
        }
        if tables.refcounts.releases() > 0 {
            tables.refcounts.lower(file)?;
            (self.reached)(FlushStep::Lowered);
        }
        Ok(())
    }

    /// Flushes, and forgets L2 tables, when there is too much in memory.
    fn bound(&self, tables: &mut Tables) -> Result<()> {
        if tables.l2.len() <= MOST_TABLES && tables.refcounts.releases() <= MOST_RELEASED {
            return Ok(());
        }
        self.flush_tables(tables)?;
        tables.l2.clear();
        Ok(())
    }

    fn refuse_past_end(&self, offset: u64, length: u64) -> Result<()> {
        if offset
            .checked_add(length)
            .is_some_and(|end| end <= self.size())
        {
            return Ok(());
        }
        let message = format!(
            "the disk ends at byte {}, and its size is fixed",
            self.size()
        );
        Err(Error::new(libc::EFBIG, message))
    }

    fn refuse_failed(&self, tables: &Tables) -> Result<()> {
        if !tables.has_failed {
            return Ok(());
        }
        let message = format!(
            "an earlier write to {} failed; open it again",
            self.path().display()
        );
        Err(Error::damaged(message))
    }

    /// Returns the L2 entry of the cluster at this guest offset; 0 if there is no table.
    fn entry(&self, tables: &mut Tables, at: u64) -> Result<u64> {
        let (index, within) = self.place(at);
        let table = tables.l1.get(index).copied().unwrap_or(0) & OFFSET_MASK;
        if table == 0 {
            return Ok(0);
        }
        let is_missing = !tables.l2.contains_key(&index);
        if is_missing {
            let entries = read_table(&self.file, table, &self.header, self.path())?;
            let table = L2Table {
                at: table,
                entries,
                is_dirty: false,
            };
            tables.l2.insert(index, table);
        }
        let entry = tables
            .l2
            .get(&index)
            .and_then(|table| table.entries.get(within));
        Ok(entry.copied().unwrap_or(0))
    }

    /// Makes the L2 table of a cluster, unless there is one.
    fn make_table(&self, tables: &mut Tables, at: u64) -> Result<()> {
        let (index, _) = self.place(at);
        if tables
            .l1
            .get(index)
            .is_some_and(|entry| entry & OFFSET_MASK != 0)
        {
            return self.entry(tables, at).map(drop);
        }
        let host = tables.refcounts.allocate()?;
        let entries = vec![0; (self.header.cluster_size() / 8) as usize];
        let table = L2Table {
            at: host,
            entries,
            is_dirty: true,
        };
        tables.l2.insert(index, table);
        tables.new_tables.insert(index);
        if let Some(entry) = tables.l1.get_mut(index) {
            *entry = host | COPIED;
        }
        Ok(())
    }

    /// Sets the L2 entry of a cluster, which has a table in memory, and releases what it was.
    fn set_entry(&self, tables: &mut Tables, at: u64, new: u64) -> Result<()> {
        let (index, within) = self.place(at);
        let table = tables.l2.get_mut(&index);
        let missing = || Error::damaged("this is a fault of boxlitefs: an L2 table is missing");
        let table = table.ok_or_else(missing)?;
        let entry = table.entries.get_mut(within).ok_or_else(missing)?;
        let old = std::mem::replace(entry, new);
        table.is_dirty = true;
        for host in clusters_of(old, &self.header) {
            tables.refcounts.release(host);
        }
        Ok(())
    }

    fn place(&self, at: u64) -> (usize, usize) {
        let cluster = self.header.cluster_size();
        let (number, entries) = (at / cluster, cluster / 8);
        ((number / entries) as usize, (number % entries) as usize)
    }
}

fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.to_be_bytes())
        .collect()
}

#[cfg(test)]
mod tests;
