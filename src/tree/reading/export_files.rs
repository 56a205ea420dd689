//! Exports, plain and compressed, as open files.

use std::sync::Arc;

use crate::exports::{Contents, Form, OpenedCompressed, Packed, Source};
use crate::home::Owner;
use crate::process::Caller;
use crate::store::Store;
use crate::tree::nodes::attr::Attr;
use crate::tree::nodes::kernel_view::KernelView;
use crate::tree::nodes::node::Node;
use crate::tree::reading::open_files::{Handle, OpenFiles, Opened};
use crate::{Error, Result};

/// Opens exports, and sees to it that each reader gets the bytes of one state alone.
pub struct ExportFiles {
    store: Arc<Store>,
    kernel: Arc<KernelView>,
    open: Arc<OpenFiles>,
}

impl ExportFiles {
    /// Returns the exports of a home.
    pub fn new(store: Arc<Store>, kernel: Arc<KernelView>, open: Arc<OpenFiles>) -> ExportFiles {
        ExportFiles {
            store,
            kernel,
            open,
        }
    }

    /// Returns what an export's bytes are of, plain or compressed. None when there is no disk.
    ///
    /// # Errors
    /// Those of planning the export.
    pub fn contents(&self, node: &Node) -> Result<Option<Contents>> {
        match node {
            Node::Export(source) => self.store.exports().copies.contents(source, Form::Plain),
            Node::Compressed(source) => self.store.exports().compressed.contents(source),
            _ => Ok(None),
        }
    }

    /// Returns whether a virtual machine is paused before an export is opened, or the clock of its
    /// file system waited for.
    pub fn waits_first(&self, source: &Source, form: Form) -> bool {
        self.store.exports().copies.pauses(source, form)
            || self.store.exports().states.may_wait(source)
    }

    /// Opens a plain export.
    ///
    /// # Errors
    /// ESTALE when the kernel was told of other contents, EBUSY, ENODATA, EINTR, EIO.
    pub fn open_plain(&self, caller: Caller, source: &Source) -> Result<Opened> {
        let go_on = || !caller.is_dying();
        let opened = self
            .store
            .exports()
            .copies
            .open(source, Form::Plain, &go_on);
        let (export, contents) = opened.inspect_err(|error| {
            let what = self.store.exports().disks.describe(source);
            let message = format!("export of {what} failed: {error}");
            self.store.events().warn(&message);
        })?;
        let told = self.kernel.contents(&Node::Export(source.clone()));
        if told.is_some_and(|told| told != contents) {
            // The kernel looks the name up again, gets a new inode, and opens that.
            self.store.exports().copies.keep(source, Form::Plain);
            return Err(Error::new(libc::ESTALE, "the disk changed just now"));
        }
        self.store.exports().copies.was_served(source, Form::Plain);
        let what = format!("export of {}", self.store.exports().disks.describe(source));
        let operation = self.store.operations().begin(what, Some(contents.size));
        let handle = self.open.add(Handle::Export {
            source: source.clone(),
            export,
            contents,
            operation,
        });
        Ok(Opened {
            handle,
            direct: false,
            // The inode and its pages are of these contents and no others.
            keep_pages: true,
            spool: None,
        })
    }

    /// Returns the contents that the kernel was told a compressed archive has.
    pub fn told_of_compressed(&self, source: &Source) -> Option<Contents> {
        self.kernel.contents(&Node::Compressed(source.clone()))
    }

    /// Opens a compressed archive that the store has opened. `told` is what the kernel was told of
    /// it before.
    ///
    /// # Errors
    /// ESTALE when the kernel was told of other contents, and those of the store.
    pub fn open_compressed(
        &self,
        source: &Source,
        told: Option<Contents>,
        opened: Result<OpenedCompressed>,
    ) -> Result<Opened> {
        let opened = opened.and_then(|opened| {
            if told.is_some_and(|told| told != opened.contents) {
                self.store.exports().copies.keep(source, Form::Compressed);
                // The kernel looks the name up again, gets a new inode, and opens that.
                return Err(Error::new(libc::ESTALE, "the size is known just now"));
            }
            self.store
                .exports()
                .copies
                .was_served(source, Form::Compressed);
            Ok(self.add_compressed(source, opened))
        });
        opened.inspect_err(|error| {
            if !matches!(error.errno(), libc::ESTALE | libc::EINTR) {
                let what = self.store.exports().disks.describe(source);
                let message = format!("compressed export of {what} failed: {error}");
                self.store.events().warn(&message);
            }
        })
    }

    fn add_compressed(&self, source: &Source, opened: OpenedCompressed) -> Opened {
        let OpenedCompressed {
            packed,
            contents,
            export,
        } = opened;
        // While somebody reads frames, who may map them, the kernel can't read the file by itself.
        let is_shared = || {
            let node = Node::Compressed(source.clone());
            self.open.is_open_as_frames(&node)
        };
        let spool = match &packed {
            Packed::Spooled(spool) if !is_shared() => Some(spool.clone()),
            Packed::Spooled(_) | Packed::Streamed(_) => None,
        };
        let what = format!(
            "compressed export of {}",
            self.store.exports().disks.describe(source)
        );
        let operation = self.store.operations().begin(what, Some(contents.size));
        let handle = self.open.add(Handle::Compressed {
            source: source.clone(),
            packed,
            contents,
            export,
            operation,
        });
        Opened {
            handle,
            direct: true,
            keep_pages: false,
            spool,
        }
    }

    /// Returns the attributes of an export that is open: those of what is being read, even when its
    /// name is gone. None when it is not open, and when the kernel was told of new contents, for
    /// then it asks for their new inode.
    ///
    /// # Errors
    /// EIO when its contents changed since the kernel was told of it. A size that does not belong
    /// to the pages that the kernel has would cut a reader off, or give it zeros.
    pub fn attr_of_open(
        &self,
        owner: Owner,
        node: &Node,
        source: &Source,
        handle: Option<u64>,
    ) -> Result<Option<Attr>> {
        let told = self.kernel.contents(node);
        let Some(open) = self.open.contents_of(node, handle, told) else {
            return Ok(None);
        };
        if handle.is_none() && told.is_some_and(|told| told != open) {
            return Ok(None);
        }
        let now = self.contents(node);
        let gone = now.as_ref().is_err_and(|e| e.errno() == libc::ENOENT);
        // A compressed archive that is there as a whole goes on being what it is.
        if !gone && now? != Some(open) && !self.open.is_open_as_whole(node, handle) {
            return Err(self.changed_under_reader(source));
        }
        Ok(Some(Attr::of_file(owner, node, open.size, open.changed)))
    }

    /// Fills `buf` with bytes of an open export from `offset` on; returns how many there were.
    ///
    /// # Errors
    /// EIO when the disk changes while it is read; EBADF for another handle.
    pub fn read(&self, handle: &Handle, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let (source, read, operation) = match handle {
            Handle::Export {
                source,
                export,
                contents,
                operation,
            } => {
                self.refuse_mixture(&Node::Export(source.clone()), source, contents)?;
                (source, export.read_at(offset, buf), operation)
            }
            Handle::Compressed {
                source,
                packed,
                contents,
                operation,
                ..
            } => {
                if let Packed::Streamed(_) = packed {
                    self.refuse_mixture(&Node::Compressed(source.clone()), source, contents)?;
                }
                (source, packed.read_at(offset, buf), operation)
            }
            _ => return Err(Error::new(libc::EBADF, "that is no open export")),
        };
        let read = read.inspect_err(|error| {
            let what = self.store.exports().disks.describe(source);
            let message = format!("reading the export of {what} failed: {error}");
            self.store.events().warn(&message);
        })?;
        operation.reaches(offset.saturating_add(read as u64));
        Ok(read)
    }

    /// Refuses to read contents that the kernel was told of before others: the pages and the size
    /// it has are of those.
    fn refuse_mixture(&self, node: &Node, source: &Source, contents: &Contents) -> Result<()> {
        match self.kernel.contents(node) {
            Some(told) if told != *contents => Err(self.changed_under_reader(source)),
            _ => Ok(()),
        }
    }

    /// EIO for readers of an export whose disk changed.
    fn changed_under_reader(&self, source: &Source) -> Error {
        let message = format!(
            "the disk, name or configuration of {} changed while it was read (was the box started?); read it again",
            self.store.exports().disks.describe(source)
        );
        self.store.events().info(&message);
        Error::new(libc::EIO, message)
    }
}
