//! Boxes and snapshots that are being copied in, and who copies them.

pub(super) mod aside;
pub(super) mod caller;
pub(super) mod caller_history;
pub(super) mod commit;
pub(super) mod putting_aside;
pub(super) mod staged_file;
pub(super) mod staging_area;
pub(super) mod waiting;
