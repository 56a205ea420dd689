//! Open files and directories: the handles that the kernel knows them by.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::archive::Export;
use crate::exports::{Contents, OpenDisk, Packed, Source, Spool};
use crate::process::Caller;
use crate::progress::Operation;
use crate::store::DiskWriting;
use crate::tree::nodes::attr::DirEntry;
use crate::tree::nodes::node::{GuestFile, Node};
use crate::tree::staging::staged_file::StagedFile;
use crate::{Error, Result};

/// An open file or directory.
pub enum Handle {
    /// An export. Its layers are open, so nothing that happens to names can change it.
    Export {
        /// What it is of.
        source: Source,
        /// The export.
        export: Arc<Export>,
        /// What its bytes are of.
        contents: Contents,
        /// What the status shows of it.
        operation: Operation,
    },
    /// A compressed archive. Its layers are open as well.
    Compressed {
        /// What it is of.
        source: Source,
        /// The compressed archive.
        packed: Packed,
        /// What its bytes are of.
        contents: Contents,
        /// The export that it is made of.
        export: Arc<Export>,
        /// What the status shows of it.
        operation: Operation,
    },
    /// A file of a guest, or the raw disk; the layers are open.
    Inside {
        /// The file or the disk.
        node: Node,
        /// The state of the disk.
        inside: Arc<OpenDisk>,
    },
    /// A text as it was when opened.
    Bytes {
        /// What it describes.
        node: Node,
        /// The text.
        bytes: Vec<u8>,
    },
    /// The log.
    Log,
    /// A listing as it was when opened.
    List(Vec<DirEntry>),
    /// A directory of a guest, which is listed in portions; the layers are open.
    GuestDirectory {
        /// The directory.
        file: GuestFile,
        /// The state of the disk.
        inside: Arc<OpenDisk>,
    },
    /// The raw disk of a box, open for writing, also by others.
    Disk(Arc<DiskWriting>),
    /// A file being written.
    Writing(Arc<StagedFile>),
}

impl Handle {
    /// Returns its length in bytes, where that is known.
    pub fn size(&self) -> Option<u64> {
        match self {
            Handle::Export { contents, .. } | Handle::Compressed { contents, .. } => {
                Some(contents.size)
            }
            Handle::Bytes { bytes, .. } => Some(bytes.len() as u64),
            Handle::Writing(file) => Some(file.size()),
            Handle::Disk(writing) => Some(writing.state().size()),
            Handle::Inside { .. }
            | Handle::Log
            | Handle::List(_)
            | Handle::GuestDirectory { .. } => None,
        }
    }

    /// Returns the contents that it reads, if it is of the export that this node is.
    fn contents_of(&self, node: &Node) -> Option<Contents> {
        match (self, node) {
            (
                Handle::Export {
                    source, contents, ..
                },
                Node::Export(of),
            )
            | (
                Handle::Compressed {
                    source, contents, ..
                },
                Node::Compressed(of),
            ) if source == of => Some(*contents),
            _ => None,
        }
    }

    /// Returns whether it is the compressed archive that this node is, and the archive is there as
    /// a whole, in a file.
    fn is_whole(&self, node: &Node) -> bool {
        let is_spooled = matches!(
            self,
            Handle::Compressed {
                packed: Packed::Spooled(_),
                ..
            }
        );
        is_spooled && self.contents_of(node).is_some()
    }
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

/// All that is open, by the numbers that the kernel knows it by.
#[derive(Default)]
pub struct OpenFiles {
    handles: Mutex<HashMap<u64, Arc<Handle>>>,
    last: AtomicU64,
}

impl OpenFiles {
    /// Adds a handle, and returns its number.
    pub fn add(&self, handle: Handle) -> u64 {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.handles.lock().insert(number, Arc::new(handle));
        number
    }

    /// Adds a file being written.
    pub fn add_writing(&self, file: Arc<StagedFile>) -> Opened {
        Opened {
            handle: self.add(Handle::Writing(file)),
            // Writes reach us as they are made, and each gets its own answer.
            direct: true,
            keep_pages: false,
            spool: None,
        }
    }

    /// Adds a disk that is open for writing.
    pub fn add_disk(&self, writing: Arc<DiskWriting>) -> Opened {
        Opened {
            handle: self.add(Handle::Disk(writing)),
            direct: true,
            keep_pages: false,
            spool: None,
        }
    }

    /// Returns the handle of this number.
    ///
    /// # Errors
    /// EBADF.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>> {
        self.handles
            .lock()
            .get(&number)
            .cloned()
            .ok_or_else(|| Error::new(libc::EBADF, "that file is not open"))
    }

    /// Takes out the handle of this number.
    pub fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        self.handles.lock().remove(&number)
    }

    /// Returns how many there are.
    pub fn len(&self) -> usize {
        self.handles.lock().len()
    }

    /// Returns the size that a text had when it was opened.
    pub fn size_at_open(&self, number: u64) -> Option<u64> {
        match &*self.get(number).ok()? {
            Handle::Bytes { bytes, .. } => Some(bytes.len() as u64),
            _ => None,
        }
    }

    /// Returns the file that is being written by this handle, if it is this node.
    pub fn written_by(&self, number: u64, node: &Node) -> Option<Arc<StagedFile>> {
        match &*self.get(number).ok()? {
            Handle::Writing(file) if file.node == *node => Some(file.clone()),
            _ => None,
        }
    }

    /// Returns the edit of this box.json that the caller has opened last: O_TRUNC comes without a
    /// handle.
    pub fn cut_by(&self, caller: Caller, node: &Node) -> Option<Arc<StagedFile>> {
        let handles = self.handles.lock();
        let edits = handles
            .iter()
            .filter_map(|(number, handle)| match &**handle {
                Handle::Writing(file) if file.is_edit() && file.node == *node => {
                    Some((number, file))
                }
                _ => None,
            });
        let of_caller = edits.filter(|(_, file)| file.writer.has(caller));
        let last = of_caller.max_by_key(|(number, _)| **number);
        last.map(|(_, file)| file.clone())
    }

    /// Returns the contents of an open export: of the given handle, or of one that has the node
    /// open, preferably one that reads `told`, what the kernel was told last.
    pub fn contents_of(
        &self,
        node: &Node,
        number: Option<u64>,
        told: Option<Contents>,
    ) -> Option<Contents> {
        let handles = self.handles.lock();
        if let Some(handle) = number.and_then(|number| handles.get(&number)) {
            return handle.contents_of(node);
        }
        let open = handles.values();
        open.filter_map(|handle| handle.contents_of(node))
            .min_by_key(|contents| Some(*contents) != told)
    }

    /// Returns whether the compressed archive that this node is is open anywhere as frames that are
    /// made as they are read.
    pub fn is_open_as_frames(&self, node: &Node) -> bool {
        let handles = self.handles.lock();
        let mut of_node = handles.values().filter(|it| it.contents_of(node).is_some());
        of_node.any(|handle| !handle.is_whole(node))
    }

    /// Returns whether a compressed archive is open that is there as a whole: by the given handle,
    /// or by any.
    pub fn is_open_as_whole(&self, node: &Node, number: Option<u64>) -> bool {
        let handles = self.handles.lock();
        match number.and_then(|number| handles.get(&number)) {
            Some(handle) => handle.is_whole(node),
            None => handles.values().any(|handle| handle.is_whole(node)),
        }
    }
}
