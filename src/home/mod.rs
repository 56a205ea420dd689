//! A BoxLite home: its paths, its SQLite rows, its locks, and its virtual machines.
//!
//! * `paths`, `placement`, `space`: where things are, whether changes can be made there, free
//!   space.
//! * `connection`, `read_connection`: connections to the database, to change it or only to read it.
//! * `records`, `catalog`, `catalog_reader`, `recorded_paths`: the rows.
//! * `lock`, `shared_access`, `queries`, `transactions`, `change`: the right to change a home, and
//!   what it is used for.
//! * `option_types`, `options`, `host_access`, `box_edit`: BoxLite's box options.
//! * `activity`, `process`, `guard`, `vm_process`: whether a box runs, and how its machine is
//!   paused.
//! * `kept`, `kept_reader`, `kept_entries`: what was removed and can be had back.
//! * `size_cache`, `known_headers`: sizes, digests and headers that were computed or read before.
//! * `identity`: identifiers and times as BoxLite writes them.
//! * `new_home`: an empty home.
//!
//! It is the only room that knows SQL. It knows nothing of qcow2 and FUSE. Facts about the files
//! are in BoxLite's own sources (runtime/layout, db/schema); where they matter, a comment says
//! which.

mod activity;
mod box_edit;
mod catalog;
mod catalog_reader;
mod change;
mod connection;
mod guard;
mod host_access;
mod identity;
mod kept;
mod kept_entries;
mod kept_reader;
mod known_headers;
mod lock;
mod new_home;
mod option_types;
mod options;
mod paths;
mod placement;
mod queries;
mod read_connection;
mod recorded_paths;
mod records;
mod shared_access;
mod size_cache;
mod space;
mod transactions;
mod vm_process;

pub use activity::{Activity, is_open, is_open_for_writing};
pub use box_edit::{OptionEdit, described_options};
pub use catalog::{Catalog, ChangedBox, Schema};
pub use change::Change;
pub use guard::{GUARD, run_guard};
pub use host_access::reject_host_access;
pub use identity::{
    base_id, box_id, container_id, is_safe_component, is_snapshot_name, rfc3339, rfc3339_at,
    snapshot_id,
};
pub use kept::{KeptBox, KeptFrom, KeptRows, WHY, is_kept_id};
pub use known_headers::KnownHeader;
pub use lock::{flock_exclusive, lock_file};
pub use new_home::init_home;
pub use option_types::check_options;
pub use options::{normalize_imported, redact_secrets};
pub use paths::{Home, Owner};
pub use placement::reject_linked_box;
pub use queries::Queries;
pub use recorded_paths::{RecordedIn, RecordedPath};
pub use records::{
    BaseFile, BaseRecord, BoxRecord, KeptBoxRows, NewBase, NewBox, NewSnapshot, OUR_SOURCE_BOX,
    SnapshotRecord,
};
pub use size_cache::SizeCache;
#[cfg(test)]
pub(crate) use size_cache::home_in;
pub use space::Space;
pub use transactions::Transaction;
pub use vm_process::{Paused, VmProcess};
