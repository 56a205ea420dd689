//! The `.boxlite` archive format: a tar of `disk.qcow2` and `manifest.json`, compressed with zstd
//! or plain.
//!
//! * `manifest`: the JSON member, written and read.
//! * `writing`: an archive that is computed while it is read, and never stored.
//! * `reading`: an archive as it arrives: decoded, checked and unpacked.
//!
//! Knows disks, not homes: the caller says what a box is called and how it is configured.

mod manifest;
mod reading;
mod writing;

pub use manifest::{About, Manifest, manifest_bytes, parse_unambiguous};
pub(crate) use reading::Allowance;
pub use reading::{Arrived, Incoming, MOST_HOLES, MakeRoom, Progress};
pub use writing::{
    Compressed, Export, FrameCache, FrameKey, FrameSizes, KnownSizes, NoFrames, Stream,
    compressed_key, measure, produce,
};
