//! Archives as they are written: computed while they are read, plain or compressed.
//!
//! * `export`: a plain archive, a tar whose every byte can be computed by itself.
//! * `digest`: the sha256 of the disk, taken along as its bytes come by.
//! * `compressed`: the same archive as independent zstd frames.
//! * `encoder`, `workers`: frames of zstd, and threads that work on frames.
//! * `frame_maker`: one frame, made or taken from an archive that is kept.
//! * `frame_sizes`: how large each frame is, known before it is made.
//! * `producer`: all frames, made by several threads and handed over in order.
//! * `stream`: the frames that are read, made where they are read.

mod compressed;
mod digest;
mod encoder;
mod export;
mod frame_maker;
mod frame_sizes;
mod producer;
mod stream;
#[cfg(test)]
mod tests;
mod workers;

pub use compressed::Compressed;
pub use export::Export;
pub use frame_maker::{FrameCache, NoFrames};
pub use frame_sizes::{FrameKey, FrameSizes, KnownSizes, compressed_key, measure};
pub use producer::produce;
pub use stream::Stream;
