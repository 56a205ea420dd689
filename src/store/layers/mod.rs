//! The image files of a home: which file reads which, and how they are frozen, adopted, merged and
//! freed.
//!
//! * `graph`, `chains`, `near`, `catalog_index`: what headers and rows say about the files.
//! * `draft`: long work for a change, done before the lock is taken.
//! * `freeze`, `freeze_source`, `frozen`, `running`, `live_disk`: disk states that overlays start
//!   from.
//! * `adopt`, `bases`: layers that become bases.
//! * `snapshot_place`: the directory and the row of a snapshot.
//! * `mergeable`, `merge`, `flatten`: layers that become one.
//! * `forecast`, `merge_gain`: what a removal or a merge would give back.
//! * `reference_state`: the state that a snapshot is compared with while it is copied in.
//! * `collect`, `references`, `unfreed`: bases and references that nothing needs.
//! * `put_back`, `spare_names`: second names of layers, and bases restored from them.

pub(super) mod adopt;
pub(super) mod bases;
pub(super) mod catalog_index;
pub(super) mod chains;
pub(super) mod collect;
pub(super) mod draft;
pub(super) mod flatten;
pub(super) mod forecast;
pub(super) mod freeze;
pub(super) mod freeze_source;
pub(super) mod frozen;
pub(super) mod graph;
pub(super) mod left_snapshots;
pub(super) mod live_disk;
pub(super) mod merge;
pub(super) mod merge_gain;
pub(super) mod mergeable;
pub(super) mod near;
pub(super) mod put_back;
pub(super) mod reference_state;
pub(super) mod references;
pub(super) mod running;
pub(super) mod snapshot_place;
pub(super) mod spare_names;
pub(super) mod unfreed;
