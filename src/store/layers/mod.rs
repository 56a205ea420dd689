//! The image files of a home: who reads whom, freezing, adopting, merging and freeing them.

pub(super) mod adopt;
pub(super) mod bases;
pub(super) mod catalog_index;
pub(super) mod collect;
pub(super) mod draft;
pub(super) mod flatten;
pub(super) mod freeze;
pub(super) mod freeze_source;
pub(super) mod frozen;
pub(super) mod graph;
pub(super) mod live_disk;
pub(super) mod merge;
pub(super) mod mergeable;
pub(super) mod put_back;
pub(super) mod references;
pub(super) mod running;
pub(super) mod snapshot_place;
pub(super) mod spare_names;
