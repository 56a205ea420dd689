//! boxlitefs mounts a BoxLite home as files.
//!
//! The rooms of the crate, from the top down. A room uses the rooms below it and knows nothing of
//! those above; `tests/layout.rs` checks that.
//!
//! * [`cli`]: the command line, and what it prints.
//! * [`mount`]: options, daemonizing, signals, readiness, unmounting.
//! * [`fuse`]: fuser's callbacks on the tree.
//! * [`tree`]: the names and files a user sees, without FUSE.
//! * [`store`]: everything that changes a home, one file per change, each in its crash-safe order.
//! * [`exports`]: everything that reads disk states and changes nothing.
//! * [`progress`]: what is going on now.
//! * `files`: durable links and renames, the workspace, markers.
//! * [`guest`]: the guest's file systems inside a disk (the only room that knows ext4).
//! * [`archive`]: the `.boxlite` format, written and read.
//! * [`disk`]: one qcow2 layer, and chains of them (the only room that knows qcow2).
//! * [`event_log`]: the log that a user sees in the mount.
//! * [`home`]: what BoxLite keeps on disk (the only room that knows SQL).
//! * `process`: processes, as /proc and pidfds show them.
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
