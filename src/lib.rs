//! boxlitefs mounts a BoxLite home as files.
//!
//! The map of the crate. Arrows go one way, from the kernel's side down to the disk:
//!
//! ```text
//! cli ─→ mount ─→ fuse ─→ tree ─→ store ─┬─→ home      rows, paths, the runtime lock; alone knows SQL
//!                                        ├─→ archive   the .boxlite format ─→ disk
//!                                        ├─→ disk      layers and chains; alone knows qcow2
//!                                        └─→ guest     the guest's file systems; alone knows ext4 ─→ disk
//! ```
//!
//! * [`cli`]: the command line, and what it prints.
//! * [`mount`]: options, daemonizing, signals, readiness.
//! * [`fuse`]: fuser's callbacks on the tree.
//! * [`tree`]: the names and files a user sees, without FUSE.
//! * [`store`]: what can be done to boxes, one file per change, each in its crash-safe order.
//! * [`archive`]: the `.boxlite` format, written and read.
//! * [`guest`]: the guest's file systems inside a disk.
//! * [`disk`]: one qcow2 layer, and chains of them.
//! * [`home`]: what BoxLite keeps on disk.
//! * `mountinfo`: the mount table.
//! * [`error`]: the one error type, errno and message.

// A bug must fail one request, and never end a mount.
#![cfg_attr(
    not(test),
    warn(clippy::expect_used, clippy::panic, clippy::unwrap_used)
)]

pub mod archive;
pub mod cli;
pub mod disk;
pub mod error;
pub mod event_log;
pub mod exports;
mod files;
pub mod fuse;
pub mod guest;
pub mod home;
pub mod mount;
mod mountinfo;
mod process;
pub mod progress;
pub mod store;
pub mod tree;

pub use error::{Context, Error, Result};
