//! Boxes and snapshots that are being copied in, and the processes that copy them.

pub(super) mod aside;
pub(super) mod box_edit;
pub(super) mod caller_history;
pub(super) mod commit;
pub(super) mod loose_files;
pub(super) mod nameless;
pub(super) mod program;
pub(super) mod receiver;
pub(super) mod role;
pub(super) mod staged_box;
pub(super) mod staged_boxes;
pub(super) mod staged_file;
pub(super) mod staged_rename;
pub(super) mod staging_area;
pub(super) mod waiting_archives;
