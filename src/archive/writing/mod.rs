//! Archives as they are written: computed while they are read, plain or compressed.
//!
//! * `export`: a plain archive, a tar whose every byte can be computed by itself.
//! * `digest`: the sha256 of the disk, taken along as its bytes come by.
//! * `compressed`: the same archive as independent zstd frames, and how large each is.
//! * `producer`: all of those frames, made by several threads and handed over in order.
//! * `stream`: those of the frames that are read, made where they are read.

mod compressed;
mod digest;
mod export;
mod producer;
mod stream;

pub use compressed::{Compressed, FrameKey, FrameSizes, compressed_key};
pub use export::Export;
pub use producer::KnownSizes;
pub use stream::Stream;
