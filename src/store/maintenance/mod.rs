//! Maintenance of a home: recovery when a mount begins, compaction, checks and disk usage.

pub(super) mod at_mount;
pub(super) mod background;
pub mod check;
pub mod compact;
pub(super) mod left_snapshots;
pub mod retention;
pub mod space;
pub mod summary;
pub(super) mod unfreed;
pub(super) mod usage;
