//! What keeps a home in order: recovery when a mount begins, compaction, checks, and what takes space.

pub(super) mod at_mount;
pub(super) mod background;
pub mod check;
pub mod compact;
pub(super) mod usage;
