//! One qcow2 layer, and chains of them: the only room that knows qcow2.
//!
//! * `file`: image files, opened, identified, read and stamped.
//! * `bits`: sets of clusters.
//! * `bytes`, `features`, `header`: the header of an image, and what it needs. `rebase`: the one way a header is changed.
//! * `overlay`: a new, empty layer on top of another.
//! * `holes`: where a raw image has data.
//! * `layer`: one open image, without the layers below it.
//! * `descent`, `walk`, `chain`: a chain of layers as the guest sees it, opened from header to
//!   header, and walked along its bytes.
//! * `image_layout`, `window`, `flatten`: a chain, or its upper layers, as one image, computed and
//!   not stored.
//! * `comparison`, `left_out`: an image that arrives, compared with another disk.
//! * `write`: such an image as a file. `direct`: writes past the page cache. `reflink`: shared
//!   blocks.
//! * `disk_writer`, `writer_tables`, `refcounts`: writes to a disk, into its topmost layer.
//! * `inspect`: whether an image that came from outside may be used.
//! * `state`: states of files, and the clocks that tell whether one can change unseen.
//!
//! The room knows nothing of boxes, rows or archives. Format rules are those of qemu's
//! `docs/interop/qcow2.rst`. The limits are qemu's and imago's where these are tighter than the
//! format's.

mod allocation;
mod bits;
mod bytes;
mod chain;
mod comparison;
mod descent;
mod direct;
mod disk_writer;
mod features;
mod file;
mod flatten;
mod header;
mod holes;
mod image_layout;
mod inspect;
#[cfg(test)]
pub(crate) mod judges;
mod layer;
mod left_out;
mod overlay;
mod rebase;
mod refcounts;
mod reflink;
mod state;
mod walk;
mod window;
mod write;
mod writer_tables;

pub use chain::Chain;
pub use comparison::{Comparison, sample};
pub use descent::{Scope, chain_paths};
pub use direct::{Aligned, BLOCK, Direct, begin_write_back};
pub use disk_writer::{DiskWriter, FlushStep};
pub use features::clear_dirty;
pub use file::FileId;
pub(crate) use file::read_zero_padded;
pub use flatten::{Flattened, WINDOW};
pub use header::{Backing, Header};
pub use inspect::inspect_standalone;
pub use layer::Layer;
pub use left_out::LeftOut;
pub use overlay::create_overlay;
pub use rebase::{flush_headers, rebase, rebase_this};
pub use reflink::share_contents;
pub use state::{FileClock, FileState, LONGEST_TICK, Moment, Stamped};
pub use walk::{DataSource, Extent};

/// The format of an image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// qemu's qcow2, version 2 or 3.
    Qcow2,
    /// The disk's bytes as they are.
    Raw,
}

impl Format {
    /// Returns the name in a backing format extension: `qcow2` or `raw`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }
}
