//! The changes that a user can ask for, in their crash-safe order.

pub(super) mod clone;
pub(super) mod edit;
pub(super) mod have_back;
pub(super) mod import;
pub(super) mod import_stream;
pub(super) mod install;
pub(super) mod remove_box;
pub(super) mod remove_snapshot;
pub(super) mod rename;
pub(super) mod replace_snapshot;
pub(super) mod restore;
pub(super) mod snapshot;
pub(super) mod waiting_files;
pub(super) mod write_disk;
