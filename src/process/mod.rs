//! Processes, as /proc and pidfds show them. Nothing else in the crate asks the kernel about another
//! process.
//!
//! * `caller`: the processes that make requests of the mount.
//! * `control`: processes that are stopped and resumed, and when a process began.
//! * `observed`: what any process has open, mounted or serves.
//! * `connection`: a FUSE connection, the kernel's side of an open /dev/fuse.

pub(crate) mod caller;
pub(crate) mod connection;
pub(crate) mod control;
pub(crate) mod observed;

pub use caller::Caller;
pub(crate) use caller::{Memory, ProcessGroup};
