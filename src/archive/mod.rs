//! The `.boxlite` archive format, out and in: a tar of `disk.qcow2` and `manifest.json`, compressed
//! with zstd or plain.
//!
//! * `manifest`: the JSON member, written and read.
//! * `layout`: an archive that is computed while it is read, never stored.
//! * `incoming`: an archive as it arrives, decoded, checked and unpacked.
//!
//! Knows disks, not homes: what a box is called and configured like is told by the caller.

mod incoming;
mod layout;
mod manifest;

pub use incoming::{Arrived, Incoming, Progress};
pub use layout::Export;
pub use manifest::{About, Manifest, manifest_bytes};
