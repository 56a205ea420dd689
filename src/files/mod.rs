//! What changes of a home are built of: durable links and renames, a workspace, markers, copies.
//!
//! The room knows where a home keeps its working files, and nothing of boxes, layers or archives.

pub(crate) mod copies;
pub(crate) mod crash_points;
pub(crate) mod durable;
pub(crate) mod listing;
pub(crate) mod markers;
pub(crate) mod priority;
pub(crate) mod waiting_archive;
pub(crate) mod workspace;
