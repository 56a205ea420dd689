//! The `.boxlite` archive format, out and in: a tar of `disk.qcow2` and `manifest.json`, compressed
//! with zstd or plain.
//!
//! * `manifest`: the JSON member, written and read.
//! * `layout`: an archive that is computed while it is read, never stored.
//! * `digest`: the checksum of a disk, taken along as its bytes come by.
//! * `compressed`: the same archive as independent zstd frames, and how large each is.
//! * `producer`: all of those frames, made by several threads and handed over in order.
//! * `stream`: those of them that are read, made where they are read.
//! * `incoming`: an archive as it arrives, decoded, checked and unpacked.
//!
//! Knows disks, not homes: what a box is called and configured like is told by the caller.

mod compressed;
mod digest;
mod incoming;
mod layout;
mod manifest;
mod producer;
mod stream;

pub use compressed::{Compressed, FrameKey, FrameSizes, compressed_key};
pub(crate) use incoming::Allowance;
pub use incoming::{Arrived, Incoming, MOST_HOLES, Progress};
pub use layout::Export;
pub use manifest::{About, Manifest, manifest_bytes};
pub use producer::KnownSizes;
pub use stream::Stream;
