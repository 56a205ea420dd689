//! The layout of a computed image.

use super::overlay::CLUSTER;
use std::ops::Range;

/// Refcounts (16 bits each) in a refcount block of one cluster.
pub(super) const BLOCK_ENTRIES: u64 = CLUSTER / 2;
/// Table entries (64 bits each) in a cluster.
pub(super) const TABLE_ENTRIES: u64 = CLUSTER / 8;

/// Where the parts begin and end, as host cluster numbers. The header is cluster 0.
pub(super) struct ImageLayout {
    pub refcount_table: Range<u64>,
    pub refcount_blocks: Range<u64>,
    pub l1_table: Range<u64>,
    pub l2_tables: Range<u64>,
    pub data: Range<u64>,
}

impl ImageLayout {
    /// Computes the layout of an image of `l1_size` L1 entries, `tables` L2 tables and `clusters`
    /// data clusters.
    pub fn of(l1_size: u64, tables: u64, clusters: u64) -> ImageLayout {
        let others = 1 + l1_size.div_ceil(TABLE_ENTRIES) + tables + clusters;
        // The refcounts count their own clusters, too: grow until they cover everything.
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
        ImageLayout {
            refcount_table,
            refcount_blocks,
            l1_table,
            l2_tables,
            data,
        }
    }

    /// Returns an entry of the refcount table: where a refcount block is, 0 for none.
    pub fn refcount_table_entry(&self, index: u64) -> u64 {
        let block = self.refcount_blocks.start + index;
        if self.refcount_blocks.contains(&block) {
            block * CLUSTER
        } else {
            0
        }
    }
}
