//! What the kernel does with open files: open, read, write, close.
//!
//! Some opens wait: for a copy of a running disk, for the clock of a file system, or for the size
//! of a compressed archive. No thread that takes requests waits with them.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::exports::{Form, OpenedCompressed, Source, Waiter};
use crate::process::Caller;
use crate::store;
use crate::tree::Tree;
use crate::tree::nodes::node::Node;
use crate::tree::reading::copy_range::copy_range;
use crate::tree::reading::file_reader;
use crate::tree::reading::open_files::{Handle, Opened};
use crate::{Error, Result};

/// Takes the answer to an open that may have to wait.
pub type OpenAnswer = Box<dyn FnOnce(Result<Opened>) + Send>;

impl Tree {
    /// Opens a file and gives the result to `answer`, for a compressed archive when its exact size
    /// is known. `flags` are open(2)'s. What waits holds the tree until it has answered.
    pub fn open_and_answer(
        self: &Arc<Self>,
        caller: Caller,
        ino: u64,
        flags: i32,
        answer: OpenAnswer,
    ) {
        let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
        let exports = &self.view.home.exports;
        match self.kernel.node(ino) {
            Ok(Node::Compressed(source)) if reads => {
                let tree = self.clone();
                let waits = exports.waits_first(&source, Form::Compressed);
                let open = move |answer| tree.open_compressed(caller, source, answer);
                if waits {
                    run_apart(open, answer);
                } else {
                    open(answer);
                }
            }
            Ok(Node::Export(source)) if reads && exports.waits_first(&source, Form::Plain) => {
                let tree = self.clone();
                let open = move |answer: OpenAnswer| answer(tree.open_file(caller, ino, flags));
                run_apart(open, answer);
            }
            _ => answer(self.open_file(caller, ino, flags)),
        }
    }

    /// Opens a guest's file for reading if that takes no I/O. Returns None otherwise; use
    /// [`open_and_answer`](Tree::open_and_answer) then.
    pub fn open_at_once(&self, ino: u64, flags: i32) -> Option<Result<Opened>> {
        let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
        let node = self.kernel.node(ino).ok().filter(|_| reads)?;
        file_reader::open_at_once(&self.view.home, &node)
    }

    /// Opens a file.
    ///
    /// # Errors
    /// EPERM for writing to what can't be written, EBUSY for the export of a running box, ENODATA.
    fn open_file(&self, caller: Caller, ino: u64, flags: i32) -> Result<Opened> {
        let node = self.kernel.node(ino)?;
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let open = &self.view.home.open;
        if let Some(file) = self.staging.file_for(caller, &node)
            && (writes || !file.is_committed())
        {
            if !writes && let Some(text) = file.text() {
                return Ok(file_reader::open_text(&self.view.home, node, text));
            }
            self.changes.creator.open(&file, writes, flags)?;
            return Ok(open.add_writing(file));
        }
        if !writes {
            if let Node::Export(Source::Live { box_id }) = &node {
                self.view.note_reading(caller, box_id);
            }
            return file_reader::open(&self.view.home, caller, node);
        }
        if let Some(file) = self.changes.creator.description(caller, &node) {
            return Ok(open.add_writing(file));
        }
        let overwriter = &self.changes.overwriter;
        match &node {
            Node::DiskImage(state) if flags & libc::O_APPEND == 0 => {
                let writing = store::open_disk(&self.store, caller, state);
                let writing = writing.inspect_err(|error| {
                    self.store.events().warn(&format!("disk.img: {error}"));
                })?;
                Ok(open.add_disk(writing))
            }
            Node::BoxJson(id) if flags & libc::O_APPEND == 0 => {
                Ok(open.add_writing(overwriter.open_json(caller, id)?))
            }
            _ => Err(overwriter.open(caller, &node, flags)),
        }
    }

    fn open_compressed(self: &Arc<Self>, caller: Caller, source: Source, answer: OpenAnswer) {
        let tree = self.clone();
        // What the kernel was told before this open waits: the caller's inode has that size,
        // whatever others are told meanwhile.
        let told = self.view.home.exports.told_of_compressed(&source);
        let opened_by = source.clone();
        let done = move |opened: Result<OpenedCompressed>| {
            let exports = &tree.view.home.exports;
            answer(exports.open_compressed(&opened_by, told, opened));
        };
        let waiter = Waiter {
            is_dying: Box::new(move || caller.is_dying()),
            answer: Box::new(done),
        };
        self.store.exports().compressed.open(&source, waiter);
    }

    /// Fills `buf` with a file's bytes from `offset` on, completely unless it ends; returns how
    /// many bytes that are. [`have_read`](Tree::have_read) is to follow.
    ///
    /// # Errors
    /// EIO when the disk changes while it is read.
    pub fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let home = &self.view.home;
        file_reader::read(home, &*home.open.get(handle)?, offset, buf)
    }

    /// Adds bytes that were read to the checksum of an export's disk. Called after the reader has
    /// them, so that it does not wait for that.
    pub fn have_read(&self, handle: u64, offset: u64, bytes: &[u8]) {
        if let Ok(handle) = self.view.home.open.get(handle)
            && let Handle::Export { export, .. } = &*handle
        {
            export.take_along(offset, bytes);
        }
    }

    /// Returns where from `offset` on there is data (`data`), or a hole: lseek(2) with SEEK_DATA or
    /// SEEK_HOLE.
    ///
    /// # Errors
    /// ENXIO past the end; EIO for what is damaged.
    pub fn seek(&self, handle: u64, offset: u64, data: bool) -> Result<u64> {
        let home = &self.view.home;
        file_reader::seek(home, &*home.open.get(handle)?, offset, data)
    }

    /// Writes bytes of a file being made.
    ///
    /// # Errors
    /// EBADMSG in the write that shows the archive is none; ENOSPC, EIO.
    pub fn write(&self, handle: u64, offset: u64, bytes: &[u8]) -> Result<u32> {
        match &*self.view.home.open.get(handle)? {
            Handle::Writing(file) => self.receiver.write(file, offset, bytes),
            Handle::Disk(writing) => {
                writing.write(offset, bytes)?;
                Ok(u32::try_from(bytes.len()).unwrap_or(u32::MAX))
            }
            _ => Err(Error::new(libc::EBADF, "that is not open for writing")),
        }
    }

    /// Makes a range of a disk zeros (fallocate(2) with PUNCH_HOLE or ZERO_RANGE).
    ///
    /// # Errors
    /// EOPNOTSUPP for other modes and files; those of [`Tree::write`].
    pub fn allocate(&self, handle: u64, offset: u64, length: u64, mode: i32) -> Result<()> {
        match &*self.view.home.open.get(handle)? {
            Handle::Disk(writing)
                if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 =>
            {
                writing.zero(offset, length)
            }
            _ => Err(Error::new(libc::EOPNOTSUPP, "no room is reserved here")),
        }
    }

    /// Copies a range from an open file to one being made without moving bytes: what is copied says
    /// what is meant.
    ///
    /// # Errors
    /// EOPNOTSUPP where a tool should read and write instead.
    pub fn copy_range(
        &self,
        from: u64,
        from_offset: u64,
        to: u64,
        to_offset: u64,
        length: u64,
    ) -> Result<u32> {
        let open = &self.view.home.open;
        let (from, to) = (open.get(from)?, open.get(to)?);
        copy_range(&self.store, (&from, from_offset), (&to, to_offset), length)
    }

    /// Closes one descriptor (close(2)): commits what is complete.
    ///
    /// # Errors
    /// EBADMSG for an archive that is incomplete, EEXIST, EBUSY, ENOSPC: the copier sees it.
    pub fn flush(&self, handle: u64) -> Result<()> {
        match &*self.view.home.open.get(handle)? {
            Handle::Writing(file) => self.committer.commit_if_ready(file),
            Handle::Disk(writing) => writing.flush(),
            _ => Ok(()),
        }
    }

    /// Writes to the disk what was written by a handle (fsync(2)): records an edit of box.json that
    /// is complete. All else is on disk when its write, or its close, is answered.
    ///
    /// # Errors
    /// Those of an edit.
    pub fn sync(&self, handle: u64) -> Result<()> {
        match &*self.view.home.open.get(handle)? {
            Handle::Writing(file) if file.is_edit() && file.is_whole_edit() => {
                self.committer.commit_if_ready(file)
            }
            Handle::Disk(writing) => writing.flush(),
            _ => Ok(()),
        }
    }

    /// Closes a handle of a guest's file whose last descriptor is gone. Returns false for all others:
    /// then [`release`](Tree::release) does, which may take long.
    pub fn release_at_once(&self, handle: u64) -> bool {
        let open = &self.view.home.open;
        let is_inside = open
            .get(handle)
            .is_ok_and(|it| matches!(&*it, Handle::Inside { .. }));
        is_inside && open.remove(handle).is_some()
    }

    /// Closes a handle whose last descriptor is gone, and lets go of a file that became nothing.
    pub fn release(&self, handle: u64) {
        let handle = self.view.home.open.remove(handle);
        match handle.as_deref() {
            Some(Handle::Export { export, .. } | Handle::Compressed { export, .. }) => {
                self.store.exports().compressed.note_digest(export);
            }
            Some(Handle::Writing(file)) => self.receiver.close(file),
            Some(Handle::Disk(writing)) => store::close_disk(&self.store, writing),
            _ => {}
        }
    }
}

/// Runs an open that waits in a thread of its own.
fn run_apart(open: impl FnOnce(OpenAnswer) + Send + 'static, answer: OpenAnswer) {
    let answer = Arc::new(Mutex::new(Some(answer)));
    let of_thread = answer.clone();
    let work = move || {
        if let Some(answer) = of_thread.lock().take() {
            open(answer);
        }
    };
    let started = std::thread::Builder::new().name("wait".into()).spawn(work);
    if let Err(error) = started
        && let Some(answer) = answer.lock().take()
    {
        answer(Err(Error::io(
            "cannot start a thread to copy a disk",
            error,
        )));
    }
}
