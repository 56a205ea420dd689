//! What BoxLite keeps on disk: paths, SQLite rows, the runtime lock, is-it-running.
//!
//! The only room that knows SQL. It knows nothing of qcow2 and nothing of FUSE. Facts about the
//! files are in BoxLite's own sources (runtime/layout, db/schema); where they matter, the comment
//! at the code says which.

mod activity;
mod catalog;
mod change;
mod connection;
mod guard;
mod host_access;
mod identity;
mod lock;
mod option_types;
mod options;
mod paths;
mod placement;
mod process;
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
pub use catalog::{Catalog, Schema};
pub use change::Change;
pub use guard::{GUARD, run_guard};
pub use host_access::reject_host_access;
pub use identity::{
    base_id, box_id, container_id, is_safe_component, is_snapshot_name, rfc3339, rfc3339_at,
    snapshot_id,
};
pub use lock::flock_exclusive;
pub use option_types::check_options;
pub use options::{normalize_imported, redact_secrets};
pub use paths::{Home, Owner};
pub use process::start_time;
pub use queries::Queries;
pub use recorded_paths::{RecordedIn, RecordedPath};
pub use records::{
    BaseFile, BaseRecord, BoxRecord, NewBase, NewBox, NewSnapshot, OUR_SOURCE_BOX, SnapshotRecord,
};
pub use size_cache::SizeCache;
pub use space::Space;
pub use transactions::Transaction;
pub use vm_process::{Paused, VmProcess};
