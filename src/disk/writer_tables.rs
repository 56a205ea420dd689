//! The tables of an image that is written in place, in memory.

use super::bytes::{COMPRESSED, OFFSET_MASK, entries_of};
use super::refcounts::{Refcounts, unfit};
use super::{Header, read_zero_padded};
use crate::{Context, Result};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// The compatible feature: refcounts are only right in an image that is not dirty (qcow2.rst).
const LAZY_REFCOUNTS: u64 = 1;

/// The tables of an image that is written in place.
pub(super) struct Tables {
    pub refcounts: Refcounts,
    pub l1: Vec<u64>,
    pub l2: HashMap<usize, L2Table>,
    /// Entries of the L1 table that are not on disk.
    pub new_tables: BTreeSet<usize>,
    /// A flush failed: what is on disk is whole, but nobody knows which part of the rest is there.
    pub has_failed: bool,
}

/// An L2 table in memory.
pub(super) struct L2Table {
    pub at: u64,
    pub entries: Vec<u64>,
    pub is_dirty: bool,
}

impl Tables {
    /// Reads L1 table and refcounts, and compares all references with the refcounts.
    pub fn read(file: &File, header: &Header, path: &Path) -> Result<Tables> {
        let cluster = header.cluster_size();
        let mut refcounts = Refcounts::read(file, header, path)?;
        let unreadable = || format!("cannot read the tables of {}", path.display());
        let length = file.metadata().context(unreadable)?.len();
        let mut bytes = vec![0; header.l1_size as usize * 8];
        read_zero_padded(file, &mut bytes, header.l1_table_offset).context(unreadable)?;
        let l1 = entries_of(&bytes);
        let mut references = vec![0u16; length.div_ceil(cluster) as usize];
        let mut refer = |host: u64| match references.get_mut((host / cluster) as usize) {
            Some(count) => {
                *count = count.saturating_add(1);
                Ok(())
            }
            None => Err(unfit(path, "its tables refer to what is past its end")),
        };
        refer(0)?;
        let of_l1 = (u64::from(header.l1_size) * 8).div_ceil(cluster);
        (0..of_l1).try_for_each(|n| refer(header.l1_table_offset + n * cluster))?;
        for table in l1
            .iter()
            .map(|entry| entry & OFFSET_MASK)
            .filter(|at| *at != 0)
        {
            refer(table)?;
            for entry in read_table(file, table, header, path)? {
                clusters_of(entry, header).try_for_each(&mut refer)?;
            }
        }
        refcounts.compare(references, path)?;
        Ok(Tables {
            refcounts,
            l1,
            l2: HashMap::new(),
            new_tables: BTreeSet::new(),
            has_failed: false,
        })
    }
}

/// Refuses an image with features that a writer would have to keep up, and that no box's disk has.
pub(super) fn refuse_unfit(header: &Header, path: &Path) -> Result<()> {
    let why = if header.version < 3 {
        "it is of qcow2 version 2"
    } else if header.refcount_order != 4 {
        "its refcounts do not have 16 bits"
    } else if header.nb_snapshots > 0 {
        "it has internal snapshots"
    } else if header.compatible_features & LAZY_REFCOUNTS != 0 {
        "it has lazy refcounts"
    } else if header.autoclear_features != 0 {
        "it has bitmaps or other features that a write would make wrong"
    } else {
        return Ok(());
    };
    Err(unfit(path, why))
}

/// Reads an L2 table.
pub(super) fn read_table(file: &File, at: u64, header: &Header, path: &Path) -> Result<Vec<u64>> {
    if !at.is_multiple_of(header.cluster_size()) {
        return Err(unfit(path, "its L1 table is damaged"));
    }
    let mut bytes = vec![0; header.cluster_size() as usize];
    read_zero_padded(file, &mut bytes, at)
        .context(|| format!("cannot read an L2 table of {}", path.display()))?;
    Ok(entries_of(&bytes))
}

/// Returns the host offsets of the clusters that an L2 entry refers to.
pub(super) fn clusters_of(entry: u64, header: &Header) -> impl Iterator<Item = u64> + use<> {
    let cluster = header.cluster_size();
    let (first, count) = if entry & COMPRESSED != 0 {
        let Range { start, end } = header.compressed_place(entry);
        (start / cluster, end.div_ceil(cluster) - start / cluster)
    } else {
        let host = entry & OFFSET_MASK;
        (host / cluster, u64::from(host != 0))
    };
    (first..first + count).map(move |number| number * cluster)
}
