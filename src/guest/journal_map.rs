//! Blocks that are to be read in the journal instead of at their places.

use std::collections::BTreeMap;

/// What every block of the journal that is not of the file system begins with.
pub(super) const MAGIC: u32 = 0xc03b_3998;

/// A block in the journal that is to be read for another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Replacement {
    /// Where it is.
    pub block: u64,
    /// Whether its first four bytes are the journal's magic, which it could not have there.
    pub escaped: bool,
}

impl Replacement {
    /// The first four bytes of an escaped block.
    pub const ESCAPED: [u8; 4] = MAGIC.to_be_bytes();
}

/// Which blocks are to be read in the journal.
#[derive(Default)]
pub(super) struct JournalMap {
    pub blocks: BTreeMap<u64, Replacement>,
}

impl JournalMap {
    /// Whether nothing is replaced.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// What to read for `block`, if not itself.
    pub fn replacement(&self, block: u64) -> Option<Replacement> {
        self.blocks.get(&block).copied()
    }

    /// The first block from `block` on that is replaced.
    pub fn next_replaced(&self, block: u64) -> Option<u64> {
        self.blocks.range(block..).next().map(|(block, _)| *block)
    }
}
