//! What is read: names, attributes, listings and open files.

pub(super) mod compressed;
pub(super) mod guest_files;
pub(super) mod handle;
pub(super) mod listing;
pub(super) mod open_file;
pub(super) mod view;
