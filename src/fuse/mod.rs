//! fuser's callbacks on the tree. This is the only room that knows fuser, and it does nothing else:
//! it translates arguments and errors, and sends each reply from where the work ends, so a long job
//! never holds a thread that `ls` needs.

mod attempt;
mod listing;
mod passthrough;
mod pool;
mod reply;
mod session;
mod spare_buffers;

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::tree::{Opened, OpenedList, RenameMode, SetAttr, Tree};
use crate::{Error, Result};

pub use session::{Access, serve};

use attempt::Asked;
use passthrough::PassthroughFiles;
use pool::{WorkerPool, spawn_thread};
use reply::{
    caller, errno, file_attr, reply_attr, reply_empty, reply_entry, reply_written, reply_xattr, ttl,
};
use spare_buffers::SpareBuffers;

/// Threads for lookups of exports: their size needs a plan, which is made once per disk state.
const LOOK_THREADS: usize = 8;

/// Threads for reads: reading the end of an export has to hash everything before it.
const READ_THREADS: usize = 16;

/// Threads for writes and changes. Each kind has its own threads, so `ls` and `mkdir` are answered
/// however much is copied.
const WORK_THREADS: usize = 16;

/// Largest write and readahead, in bytes.
const TRANSFER: u32 = 1024 * 1024;

thread_local! {
    /// The buffer that a reading thread reads into.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct BoxliteFs {
    tree: Arc<Tree>,
    passthrough: Arc<PassthroughFiles>,
    lookups: WorkerPool,
    reads: WorkerPool,
    writes: WorkerPool,
    /// Buffers for the bytes of writes.
    spare: Arc<SpareBuffers>,
}

impl BoxliteFs {
    /// Starts the threads that serve a tree.
    fn new(tree: Arc<Tree>) -> Result<BoxliteFs> {
        Ok(BoxliteFs {
            tree,
            passthrough: Arc::default(),
            lookups: WorkerPool::start("look", LOOK_THREADS)?,
            reads: WorkerPool::start("read", READ_THREADS)?,
            writes: WorkerPool::start("work", WORK_THREADS)?,
            spare: Arc::default(),
        })
    }

    /// Runs a change, or other work that may take long, on another thread than the one that takes
    /// requests.
    fn spawn_write(&self, work: impl FnOnce(&Arc<Tree>) + Send + 'static) {
        let tree = self.tree.clone();
        self.writes.spawn(move || work(&tree));
    }

    /// Runs a read on a thread for reads.
    fn spawn_read(&self, work: impl FnOnce(&Tree) + Send + 'static) {
        let tree = self.tree.clone();
        self.reads.spawn(move || work(&tree));
    }

    /// Runs work that needs no disk on this thread. A panic becomes an EIO.
    fn inline<T>(&self, work: impl FnOnce(&Tree) -> Result<T>) -> Result<T> {
        let tree: &Tree = &self.tree;
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(tree)))
            .unwrap_or_else(|_| Err(Error::damaged("this is a fault of boxlitefs")))
    }

    /// Returns what a request asks of an inode, or of a name in that directory.
    fn asked(
        &self,
        request: &Request,
        operation: &'static str,
        ino: INodeNo,
        name: Option<&OsStr>,
    ) -> Asked {
        Asked::of(&self.tree, request, operation, ino.0, name)
    }

    /// Runs a lookup that may need an export's plan on a thread for lookups.
    fn spawn_lookup(&self, work: impl FnOnce(&Arc<Tree>) + Send + 'static) {
        let tree = self.tree.clone();
        self.lookups.spawn(move || work(&tree));
    }
}

impl Filesystem for BoxliteFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // The tree tells the kernel when a link points elsewhere.
            InitFlags::FUSE_CACHE_SYMLINKS,
            // Allows mmap of files that are read past the page cache.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_PASSTHROUGH,
        ] {
            // A kernel without one of these is only slower.
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(TRANSFER);
        let _ = config.set_max_readahead(TRANSFER);
        let _ = config.set_max_background(64);
        // For passthrough to files of the home, which is not on a stacked file system.
        let _ = config.set_max_stack_depth(1);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let caller = caller(request);
        if !self.tree.is_slow(parent.0) {
            let found = self.inline(|tree| tree.lookup(caller, parent.0, name));
            return reply_entry(reply, found);
        }
        let asked = self.asked(request, "lookup", parent, Some(name));
        let name = name.to_owned();
        self.spawn_lookup(move |tree| {
            let tree = tree.clone();
            let waits = tree.lookup_may_wait(parent.0, &name);
            let find = move || {
                let found = tree.lookup(caller, parent.0, &name);
                reply_entry(reply, asked.answered(found));
            };
            if waits {
                spawn_thread(find);
            } else {
                find();
            }
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, times: u64) {
        self.tree.forget(ino.0, times);
    }

    fn getattr(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let caller = caller(request);
        let handle = handle.map(|handle| handle.0);
        if !self.tree.is_attr_slow(ino.0) {
            let found = self.inline(|tree| tree.getattr(caller, ino.0, handle));
            return reply_attr(reply, found);
        }
        self.spawn_lookup(move |tree| reply_attr(reply, tree.getattr(caller, ino.0, handle)));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let caller = caller(request);
        let handle = handle.map(|handle| handle.0);
        let set = SetAttr { size };
        let asked = self.asked(request, "setattr", ino, None);
        self.spawn_write(move |tree| {
            let set = tree.setattr(caller, ino.0, handle, set);
            reply_attr(reply, asked.answered(set));
        });
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.inline(|tree| tree.readlink(caller(request), ino.0)) {
            Ok(target) => reply.data(target.as_os_str().as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let (caller, name) = (caller(request), name.to_owned());
        let asked = self.asked(request, "mkdir", parent, Some(&name));
        self.spawn_write(move |tree| {
            let made = tree.mkdir(caller, parent.0, &name);
            reply_entry(reply, asked.answered(made));
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let asked = self.asked(request, "mknod", parent, Some(name));
        reply_entry(reply, asked.answered(self.inline(|tree| tree.mknod(name))));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(request), name.to_owned());
        let asked = self.asked(request, "unlink", parent, Some(&name));
        self.spawn_write(move |tree| {
            let removed = tree.unlink(caller, parent.0, &name);
            reply_empty(reply, asked.answered(removed));
        });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(request), name.to_owned());
        let asked = self.asked(request, "rmdir", parent, Some(&name));
        self.spawn_write(move |tree| {
            let removed = tree.rmdir(caller, parent.0, &name);
            reply_empty(reply, asked.answered(removed));
        });
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let asked = self.asked(request, "symlink", parent, Some(name));
        let made = self.tree.symlink(caller(request), parent.0, name, target);
        reply_entry(reply, asked.answered(made));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let caller = caller(request);
        let (name, new_name) = (OsString::from(name), OsString::from(new_name));
        let mode = if flags.is_empty() {
            RenameMode::Replace
        } else if flags == RenameFlags::RENAME_NOREPLACE {
            RenameMode::Keep
        } else {
            RenameMode::Unsupported
        };
        let asked = self.asked(request, "rename", parent, Some(&name));
        let asked = asked.to(new_parent.0, &new_name);
        self.spawn_write(move |tree| {
            let (from, to) = ((parent.0, &*name), (new_parent.0, &*new_name));
            reply_empty(reply, asked.answered(tree.rename(caller, from, to, mode)));
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        // Programs that read a tree open each file: another thread would take longer than the work.
        if let Ok(Some(opened)) = self.inline(|tree| tree.open_at_once(ino.0, flags.0).transpose())
        {
            return self.passthrough.reply(opened, reply);
        }
        let caller = caller(request);
        let passthrough = self.passthrough.clone();
        let asked = self.asked(request, "open", ino, None);
        self.spawn_write(move |tree| {
            let answer = move |opened: Result<Opened>| match asked.answered(opened) {
                Ok(opened) => passthrough.reply(opened, reply),
                Err(error) => reply.error(errno(&error)),
            };
            tree.open_and_answer(caller, ino.0, flags.0, Box::new(answer));
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let (caller, name) = (caller(request), name.to_owned());
        let asked = self.asked(request, "create", parent, Some(&name));
        self.spawn_write(move |tree| {
            match asked.answered(tree.create(caller, parent.0, &name, mode)) {
                Ok((attr, opened)) => reply.created(
                    &ttl(&attr),
                    &file_attr(&attr),
                    Generation(0),
                    FileHandle(opened.handle),
                    FopenFlags::FOPEN_DIRECT_IO,
                ),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let asked = self.asked(request, "read", ino, None);
        self.spawn_read(move |tree| {
            READ_BUFFER.with_borrow_mut(|buffer| {
                // It only grows and is never cleared: a new buffer would be faulted in page by
                // page.
                let length = size as usize;
                if buffer.len() < length {
                    buffer.resize(length, 0);
                }
                let buffer = buffer.get_mut(..length).unwrap_or_default();
                match asked.answered(tree.read(handle.0, offset, buffer)) {
                    Ok(read) => {
                        let bytes = buffer.get(..read).unwrap_or_default();
                        reply.data(bytes);
                        tree.have_read(handle.0, offset, bytes);
                    }
                    Err(error) => reply.error(errno(&error)),
                }
            });
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let bytes = self.spare.copy_of(data);
        let spare = self.spare.clone();
        let asked = self.asked(request, "write", ino, None);
        self.spawn_write(move |tree| {
            reply_written(reply, asked.answered(tree.write(handle.0, offset, &bytes)));
            spare.put(bytes);
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.spawn_write(move |tree| {
            reply_empty(reply, tree.allocate(handle.0, offset, length, mode));
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _ino_in: INodeNo,
        handle_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        handle_out: FileHandle,
        offset_out: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let asked = self.asked(request, "copy_file_range", ino_out, None);
        self.spawn_write(move |tree| {
            let (from, to) = (handle_in.0, handle_out.0);
            let copied = tree.copy_range(from, offset_in, to, offset_out, length);
            reply_written(reply, asked.answered(copied));
        });
    }

    fn flush(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let asked = self.asked(request, "close", ino, None);
        self.spawn_write(move |tree| reply_empty(reply, asked.answered(tree.flush(handle.0))));
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if self.tree.release_at_once(handle.0) {
            return reply.ok();
        }
        let passthrough = self.passthrough.clone();
        self.spawn_write(move |tree| {
            passthrough.release(handle.0);
            tree.release(handle.0);
            reply.ok();
        });
    }

    fn fsync(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let asked = self.asked(request, "fsync", ino, None);
        self.spawn_write(move |tree| reply_empty(reply, asked.answered(tree.sync(handle.0))));
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller(request);
        let answer = |listed: Result<OpenedList>, reply: ReplyOpen| match listed {
            Ok(list) => {
                let mut how = FopenFlags::empty();
                // The first flag has the kernel keep the names, the second those it has already.
                let keep = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
                how.set(keep, list.is_constant);
                reply.opened(FileHandle(list.handle), how);
            }
            Err(error) => reply.error(errno(&error)),
        };
        if !self.tree.is_slow(ino.0) {
            return answer(self.inline(|tree| tree.open_list(caller, ino.0)), reply);
        }
        self.spawn_lookup(move |tree| answer(tree.open_list(caller, ino.0), reply));
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let caller = caller(request);
        let place = (ino.0, handle.0);
        let work = move |tree: &Arc<Tree>| listing::reply_names(tree, caller, place, offset, reply);
        if self.tree.is_slow(ino.0) {
            self.spawn_lookup(work);
        } else {
            work(&self.tree);
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let caller = caller(request);
        self.spawn_lookup(move |tree| {
            listing::reply_attributes(tree, caller, (ino.0, handle.0), offset, reply);
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let data = whence == libc::SEEK_DATA;
        self.spawn_lookup(move |tree| {
            let from = u64::try_from(offset).unwrap_or(u64::MAX);
            let found = match whence {
                libc::SEEK_DATA | libc::SEEK_HOLE => tree.seek(handle.0, from, data),
                _ => Err(Error::new(libc::EINVAL, "unsupported `whence`")),
            };
            match found.map(i64::try_from) {
                Ok(Ok(at)) => reply.offset(at),
                Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.release(handle.0);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.tree.space() {
            Ok(space) => reply.statfs(
                space.blocks,
                space.free,
                space.available,
                space.files,
                space.files_free,
                space.block_size,
                255,
                space.block_size,
            ),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn getxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let uid = request.uid();
        let value = self.inline(|tree| match tree.refusals_for(uid, ino.0, name) {
            Some(refusals) => Ok(refusals),
            None => tree.xattr(caller(request), ino.0, name),
        });
        reply_xattr(reply, size, value);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.inline(|tree| tree.xattr_names(caller(request), ino.0));
        reply_xattr(reply, size, names);
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let caller = caller(request);
        self.spawn_write(move |tree| {
            let set = tree.setattr(caller, ino.0, None, SetAttr::default());
            reply_empty(reply, set.map(|_| ()));
        });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.setxattr(request, ino, name, &[], 0, 0, reply);
    }
}
