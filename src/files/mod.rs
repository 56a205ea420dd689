//! The building blocks of changes to a home: durable links and renames, the workspace, markers and
//! copies.
//!
//! The room knows where a home keeps its working files. It knows nothing of boxes, layers or
//! archives.

pub(crate) mod copies;
pub(crate) mod crash_points;
pub(crate) mod durable;
pub(crate) mod listing;
pub(crate) mod markers;
pub(crate) mod priority;
pub(crate) mod waiting_archive;
pub(crate) mod workspace;
