//! The map of blocks that are read in the journal instead of at their places.

use std::collections::BTreeMap;

/// The beginning of every block of the journal that is not of the file system.
pub(super) const MAGIC: u32 = 0xc03b_3998;

/// A block in the journal that replaces another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Replacement {
    /// Where it is.
    pub block: u64,
    /// Whether its first four bytes are the journal's magic, stored as zeros.
    pub escaped: bool,
}

impl Replacement {
    /// The first four bytes of an escaped block.
    pub const ESCAPED: [u8; 4] = MAGIC.to_be_bytes();
}

/// The blocks that are read in the journal.
#[derive(Default)]
pub(super) struct JournalMap {
    pub blocks: BTreeMap<u64, Replacement>,
}

impl JournalMap {
    /// Returns whether nothing is replaced.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Returns the block to read in place of `block`, if any.
    pub fn replacement(&self, block: u64) -> Option<Replacement> {
        self.blocks.get(&block).copied()
    }

    /// Returns the first replaced block from `block` on.
    pub fn next_replaced(&self, block: u64) -> Option<u64> {
        self.blocks.range(block..).next().map(|(block, _)| *block)
    }
}
