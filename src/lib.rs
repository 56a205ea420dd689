//! boxlitefs mounts a BoxLite home as files.
//!
//! The map of the crate; arrows go one way, from the kernel's side down to the disk:
//!
//! ```text
//! main ─ mount ─ fuse ─→ tree ─→ store ─→ home     rows, paths, the runtime lock (the only room that knows SQL)
//!                                   ├───→ archive  the .boxlite format ─→ disk
//!                     │             └───→ disk     layers and chains (the only room that knows qcow2)
//!                     └─→ guest ─→ disk            the guest's file systems (the only room that knows ext4)
//! ```
//!
//! * [`error`]: the one error type, errno and message.
//! * [`home`]: what BoxLite keeps on disk.
//! * [`disk`]: one qcow2 layer, and chains of them.
//! * [`guest`]: the guest's file systems inside of a disk.
//! * [`archive`]: the `.boxlite` format, out and in.
//! * [`store`]: what can be done to boxes, one file per change, each in its crash-safe order.
//! * [`tree`]: the names and files a user sees, without FUSE.
//! * [`fuse`]: fuser's callbacks on the tree.
//! * [`mount`]: options, daemonizing, signals, readiness.
//! * `mountinfo`: what is mounted where, for all who have to know.
//! * `process`: the processes that make requests, as /proc and pidfds show them.

pub mod archive;
pub mod disk;
pub mod error;
pub mod event_log;
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
