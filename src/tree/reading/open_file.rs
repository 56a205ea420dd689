//! What is open: the handles that the kernel knows files by.

use std::sync::Arc;

use crate::archive::Export;
use crate::progress::Operation;
use crate::store::{Contents, Inside, Packed, Source, Spool};
use crate::tree::nodes::attr::DirEntry;
use crate::tree::nodes::node::{GuestFile, Node};
use crate::tree::staging::staged_file::StagedFile;

/// An open file.
pub(in crate::tree) enum Handle {
    /// An export; its layers are open, so nothing that happens to names can change it.
    Export {
        source: Source,
        export: Arc<Export>,
        contents: Contents,
        operation: Operation,
    },
    /// A compressed archive, likewise.
    Compressed {
        source: Source,
        packed: Packed,
        contents: Contents,
        /// What it is of.
        _of: Arc<Export>,
        operation: Operation,
    },
    /// A file of a guest, or the raw disk; the layers are open.
    Inside { node: Node, inside: Arc<Inside> },
    /// A description as it was when opened.
    Bytes { node: Node, bytes: Vec<u8> },
    /// The log.
    Log,
    /// A listing as it was when opened.
    List(Arc<Vec<DirEntry>>),
    /// A directory of a guest, which is listed in portions; the layers are open.
    GuestDirectory {
        file: GuestFile,
        inside: Arc<Inside>,
    },
    /// A file being written.
    Writing(Arc<StagedFile>),
}

/// An opened file and what the kernel may do with it.
pub struct Opened {
    /// The handle for later calls.
    pub handle: u64,
    /// Every read comes here, none from the kernel's pages.
    pub direct: bool,
    /// The pages the kernel has of this inode are still right.
    pub keep_pages: bool,
    /// The file that has the same bytes, which the kernel may read by itself.
    pub spool: Option<Arc<Spool>>,
}

impl Handle {
    /// Its length in bytes, where that is known.
    pub(in crate::tree) fn size(&self) -> Option<u64> {
        match self {
            Handle::Export { contents, .. } | Handle::Compressed { contents, .. } => {
                Some(contents.size)
            }
            Handle::Bytes { bytes, .. } => Some(bytes.len() as u64),
            Handle::Writing(file) => Some(file.size()),
            Handle::Inside { .. }
            | Handle::Log
            | Handle::List(_)
            | Handle::GuestDirectory { .. } => None,
        }
    }
}
