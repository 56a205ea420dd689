//! What is read: names, attributes, listings and open files.

pub(super) mod caller_view;
pub(super) mod copy_range;
pub(super) mod export_files;
pub(super) mod file_reader;
pub(super) mod guest_file;
pub(super) mod guest_files;
pub(super) mod home_view;
pub(super) mod listing;
pub(super) mod lookup;
pub(super) mod open_files;
