//! The sizes of frames: how long a compressed archive will be, before it is compressed.
//!
//! `stat` on a compressed archive has to tell its exact length, and a reader may begin anywhere.
//! Both need the compressed size of every frame. Finding it by compressing takes seconds per GiB,
//! so it is done once for each frame, not once for each archive:
//!
//! * `keys`: a frame's size follows from its bytes and zstd's version and level. A hash of these,
//!   or of where the bytes lie in layers that are never written again, is its [`FrameKey`].
//! * `measure`: looks the sizes of all frames up by their keys ([`KnownSizes`]), and compresses
//!   only the frames that were never seen. Where these are too many, producing the whole archive is
//!   better.
//! * `table`: the sizes of one archive's frames ([`FrameSizes`]), 4 bytes for 2 MiB of disk. With
//!   it, the frame of any place is known, and can be made by itself.
//!
//! A size is never a guess: a frame that comes out with another size than the table says is an
//! error. `docs/design/compressed-sizes.md` tells how the store keeps what was found.

mod keys;
mod measure;
mod table;

pub use keys::{FrameKey, compressed_key};
pub(super) use keys::{FrameKeys, Origin};
pub(super) use measure::learn;
pub use measure::{KnownSizes, measure};
pub use table::FrameSizes;
pub(super) use table::Placed;
