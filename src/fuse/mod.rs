//! fuser's callbacks on the tree. The only file that knows fuser, and nothing else: it translates
//! arguments and errors, and sends replies from where the work ends, so that a long job never
//! holds a thread that `ls` needs.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BackingId, BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, Session, SessionACL, TimeOrNow, WriteFlags,
};

use crate::store::Spool;
use crate::tree::{
    Attr, Caller, DirEntry, Kept, Kind, Opened, RenameMode, SetAttr, Tree, WantedOfList,
};
use crate::{Error, Result};
use parking_lot::{Condvar, Mutex};

/// Threads that take requests from the kernel and answer what needs no disk.
const REQUEST_THREADS: usize = 4;

/// Threads for looking at exports: their size needs a plan, made once per disk state.
const LOOK_THREADS: usize = 8;

/// Threads for reading: a read of an export's end has to hash all that comes before it.
const READ_THREADS: usize = 16;

/// Threads for writing and changes. Each kind has its own, so that however much is copied, `ls` and
/// `mkdir` are answered.
const WORK_THREADS: usize = 16;

/// How long the work that an unmount found under way may take before the process ends over it.
const LAST_WORK: Duration = Duration::from_secs(10);

/// Largest write and readahead in bytes.
const TRANSFER: u32 = 1024 * 1024;

/// How long the kernel may keep a name or attributes that can change behind its back: what BoxLite
/// does is to show within a second.
const MOMENT: Duration = Duration::from_millis(500);

/// How long it may keep what never changes: a file of a guest in one state of its disk.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// Who gets into the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Who mounted it, alone.
    Owner,
    /// root, too.
    RootToo,
    /// Every user, as far as modes allow.
    Everybody,
}

/// Serves the tree to the kernel, whose requests come from `requests`, a descriptor of /dev/fuse, until the
/// file system is unmounted and nothing of it is open. Calls `ready` once the kernel has agreed, and
/// `failed` as soon as it can't be served any more though the kernel still has it. It mounts nothing and
/// unmounts nothing: fuser would, by path, and so what is mounted there by then.
///
/// # Errors
/// What the kernel says, or `failed`.
pub fn serve(
    tree: Arc<Tree>,
    requests: OwnedFd,
    access: Access,
    ready: impl FnOnce(),
    failed: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let filesystem = Mounted {
        tree: tree.clone(),
        backings: Arc::default(),
        looking: Threads::start("look", LOOK_THREADS)?,
        reading: Threads::start("read", READ_THREADS)?,
        working: Threads::start("work", WORK_THREADS)?,
    };
    let (acl, config) = session_config(access);
    let session = Session::from_fd(filesystem, requests, acl, config)
        .map_err(|e| Error::io("the kernel does not agree on the mount", e))?;
    let notifier = session.notifier();
    tree.on_drop_pages(move |ino| {
        // ENOENT: the kernel has none.
        if let Err(error) = notifier.inval_inode(INodeNo(ino), 0, 0) {
            log::debug!("inode {ino} keeps its pages: {error}");
        }
    });
    ready();
    let served = session
        .run()
        .map_err(|e| Error::io("serving the mount ended", e));
    let served = served.or_else(|error| failed().and(Err(error)));
    tree.keep_waiting();
    tree.close();
    // What was under way comes to its end, and the workspace goes with the tree.
    let deadline = Instant::now() + LAST_WORK;
    while Arc::strong_count(&tree) > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(tree);
    served
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that do one job after another and sleep in between. (A work-stealing pool, and channels
/// too, look for work for a while before they sleep; with a job for every request that takes more
/// time than the requests, of cores the reader needs.) They end with the pool, after what is under
/// way.
struct Threads {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    is_over: bool,
}

impl Queue {
    /// The next job, waited for; None when there will be no more.
    fn next(&self) -> Option<Job> {
        let mut waiting = self.waiting.lock();
        loop {
            if let Some(job) = waiting.jobs.pop_front() {
                return Some(job);
            }
            if waiting.is_over {
                return None;
            }
            self.more.wait(&mut waiting);
        }
    }
}

impl Threads {
    fn start(name: &'static str, count: usize) -> Result<Threads> {
        let queue = Arc::new(Queue::default());
        for index in 0..count {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("{name}-{index}"))
                .spawn(move || {
                    while let Some(job) = queue.next() {
                        // A fault of ours costs the one request, which fuser answers with EIO, and
                        // not the mount.
                        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                        if done.is_err() {
                            log::error!("a request failed; this is a fault of boxlitefs");
                        }
                    }
                })
                .map_err(|e| Error::io("cannot start threads", e))?;
        }
        Ok(Threads { queue })
    }

    fn run(&self, job: impl FnOnce() + Send + 'static) {
        self.queue.waiting.lock().jobs.push_back(Box::new(job));
        self.queue.more.notify_one();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.queue.waiting.lock().is_over = true;
        self.queue.more.notify_all();
    }
}

fn session_config(access: Access) -> (SessionACL, Config) {
    let acl = match access {
        Access::Owner => SessionACL::Owner,
        Access::RootToo => SessionACL::RootAndOwner,
        Access::Everybody => SessionACL::All,
    };
    let mut session = Config::default();
    session.acl = acl;
    session.n_threads = Some(REQUEST_THREADS);
    session.clone_fd = true;
    (acl, session)
}

thread_local! {
    /// What a reading thread reads into.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Files the kernel reads by itself for us (FUSE passthrough), where it can.
#[derive(Default)]
struct Backings {
    /// By spool: an inode must be opened with the same backing each time.
    known: Mutex<HashMap<u64, Weak<BackingId>>>,
    /// By handle: kept as long as it is open.
    open: Mutex<HashMap<u64, Arc<BackingId>>>,
}

impl Backings {
    fn reply(&self, opened: Opened, reply: ReplyOpen) {
        if let Some(spool) = &opened.spool
            && let Some(backing) = self.of(spool, &reply)
        {
            self.open.lock().insert(opened.handle, backing.clone());
            let handle = FileHandle(opened.handle);
            return reply.opened_passthrough(handle, FopenFlags::empty(), &backing);
        }
        let mut how = FopenFlags::empty();
        how.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct);
        how.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_pages);
        // Whoever only reads need not wait when he closes.
        how.set(FopenFlags::FOPEN_NOFLUSH, opened.keep_pages);
        reply.opened(FileHandle(opened.handle), how);
    }

    /// The backing of a spool. None where the kernel has no passthrough, or not for us (it is root's).
    fn of(&self, spool: &Spool, reply: &ReplyOpen) -> Option<Arc<BackingId>> {
        let mut known = self.known.lock();
        known.retain(|_, backing| backing.strong_count() > 0);
        if let Some(backing) = known.get(&spool.number()).and_then(Weak::upgrade) {
            return Some(backing);
        }
        let backing = reply
            .open_backing(spool.file())
            .inspect_err(|error| log::debug!("no passthrough: {error}"))
            .ok()?;
        let backing = Arc::new(backing);
        known.insert(spool.number(), Arc::downgrade(&backing));
        Some(backing)
    }

    fn release(&self, handle: u64) {
        self.open.lock().remove(&handle);
    }
}

struct Mounted {
    tree: Arc<Tree>,
    backings: Arc<Backings>,
    looking: Threads,
    reading: Threads,
    working: Threads,
}

impl Mounted {
    /// Does work that may take long away from the thread that takes requests.
    fn later(&self, work: impl FnOnce(&Arc<Tree>) + Send + 'static) {
        let tree = self.tree.clone();
        self.working.run(move || work(&tree));
    }

    /// Reads, likewise.
    fn read_later(&self, work: impl FnOnce(&Tree) + Send + 'static) {
        let tree = self.tree.clone();
        self.reading.run(move || work(&tree));
    }

    /// Answers at once; a fault of ours is an EIO.
    fn at_once<T>(&self, work: impl FnOnce(&Tree) -> Result<T>) -> Result<T> {
        let tree: &Tree = &self.tree;
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(tree)))
            .unwrap_or_else(|_| Err(Error::damaged("this is a fault of boxlitefs")))
    }

    /// Looks at what may need an export's plan, likewise.
    fn look(&self, work: impl FnOnce(&Arc<Tree>) + Send + 'static) {
        let tree = self.tree.clone();
        self.looking.run(move || work(&tree));
    }
}

/// Does in a thread of its own what waits for a clock. Without one, the request is answered with
/// EIO.
fn apart(work: impl FnOnce() + Send + 'static) {
    let started = std::thread::Builder::new().name("wait".into()).spawn(work);
    if let Err(error) = started {
        log::warn!("cannot start a thread to wait in: {error}");
    }
}

fn caller(request: &Request) -> Caller {
    Caller { tid: request.pid() }
}

fn errno(error: &Error) -> Errno {
    log::debug!("{error}");
    Errno::from_i32(error.errno())
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.atime,
        mtime: attr.mtime,
        ctime: attr.ctime,
        crtime: attr.created,
        kind: file_type(attr.kind),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.device,
        // Larger, and tools that go by it read in pieces no better and mmap in worse ones.
        blksize: 4096,
        flags: 0,
    }
}

fn ttl(attr: &Attr) -> Duration {
    match attr.kept {
        Kept::Not => Duration::ZERO,
        Kept::Moment => MOMENT,
        Kept::Long => LONG,
    }
}

fn reply_entry(reply: ReplyEntry, result: Result<Attr>) {
    match result {
        Ok(attr) => reply.entry(&ttl(&attr), &file_attr(&attr), Generation(attr.generation)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_attr(reply: ReplyAttr, result: Result<Attr>) {
    match result {
        Ok(attr) => reply.attr(&ttl(&attr), &file_attr(&attr)),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// A size of 0 asks how long the answer is.
fn reply_xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>>) {
    match result {
        Ok(bytes) if size == 0 => reply.size(u32::try_from(bytes.len()).unwrap_or(u32::MAX)),
        Ok(bytes) if bytes.len() <= size as usize => reply.data(&bytes),
        Ok(_) => reply.error(Errno::ERANGE),
        Err(error) => reply.error(errno(&error)),
    }
}

fn reply_written(reply: ReplyWrite, result: Result<u32>) {
    match result {
        Ok(written) => reply.written(written),
        Err(error) => reply.error(errno(&error)),
    }
}

/// The names of a directory that the tree does not list: itself and its parent.
fn dots(ino: u64) -> [DirEntry; 2] {
    // The kernel goes by its own tree for both; the numbers are for show.
    [".", ".."].map(|name| DirEntry {
        name: name.into(),
        kind: Kind::Directory,
        ino,
    })
}

/// How many of them are before an offset.
fn dots_before(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl Filesystem for Mounted {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // The tree says when one points elsewhere.
            InitFlags::FUSE_CACHE_SYMLINKS,
            // What is not read through the kernel's pages can be mapped all the same.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            InitFlags::FUSE_PASSTHROUGH,
        ] {
            // A kernel without one of these is slower and nothing else.
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(TRANSFER);
        let _ = config.set_max_readahead(TRANSFER);
        let _ = config.set_max_background(64);
        // For passthrough to files of the home, which is on no stacked file system.
        let _ = config.set_max_stack_depth(1);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let caller = caller(request);
        if !self.tree.is_slow(parent.0) {
            let found = self.at_once(|tree| tree.lookup(caller, parent.0, name));
            return reply_entry(reply, found);
        }
        let name = name.to_owned();
        self.look(move |tree| {
            let tree = tree.clone();
            let waits = tree.lookup_may_wait(parent.0, &name);
            let find = move || reply_entry(reply, tree.lookup(caller, parent.0, &name));
            if waits {
                apart(find);
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
        if !self.tree.is_slow(ino.0) {
            let found = self.at_once(|tree| tree.getattr(caller, ino.0, handle));
            return reply_attr(reply, found);
        }
        self.look(move |tree| reply_attr(reply, tree.getattr(caller, ino.0, handle)));
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
        self.later(move |tree| reply_attr(reply, tree.setattr(caller, ino.0, handle, set)));
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.at_once(|tree| tree.readlink(caller(request), ino.0)) {
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
        self.later(move |tree| reply_entry(reply, tree.mkdir(caller, parent.0, &name)));
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply_entry(reply, self.at_once(|tree| tree.mknod(name)));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(request), name.to_owned());
        self.later(move |tree| reply_empty(reply, tree.unlink(caller, parent.0, &name)));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (caller, name) = (caller(request), name.to_owned());
        self.later(move |tree| reply_empty(reply, tree.rmdir(caller, parent.0, &name)));
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        reply_entry(
            reply,
            self.tree.symlink(caller(request), parent.0, name, target),
        );
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
        self.later(move |tree| {
            let (from, to) = ((parent.0, &*name), (new_parent.0, &*new_name));
            reply_empty(reply, tree.rename(caller, from, to, mode));
        });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller(request);
        let backings = self.backings.clone();
        self.later(move |tree| {
            let answer = move |opened: Result<Opened>| match opened {
                Ok(opened) => backings.reply(opened, reply),
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
        self.later(
            move |tree| match tree.create(caller, parent.0, &name, mode) {
                Ok((attr, opened)) => reply.created(
                    &ttl(&attr),
                    &file_attr(&attr),
                    Generation(0),
                    FileHandle(opened.handle),
                    FopenFlags::FOPEN_DIRECT_IO,
                ),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.read_later(move |tree| {
            READ_BUFFER.with_borrow_mut(|buffer| {
                // Only grown, never cleared: a new one would be faulted in page by page.
                let length = size as usize;
                if buffer.len() < length {
                    buffer.resize(length, 0);
                }
                let buffer = buffer.get_mut(..length).unwrap_or_default();
                match tree.read(handle.0, offset, buffer) {
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
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let bytes = data.to_vec();
        self.later(move |tree| reply_written(reply, tree.write(handle.0, offset, &bytes)));
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        handle_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        handle_out: FileHandle,
        offset_out: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.later(move |tree| {
            let (from, to) = (handle_in.0, handle_out.0);
            reply_written(
                reply,
                tree.copy_range(from, offset_in, to, offset_out, length),
            );
        });
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.later(move |tree| reply_empty(reply, tree.flush(handle.0)));
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
        let backings = self.backings.clone();
        self.later(move |tree| {
            backings.release(handle.0);
            tree.release(handle.0);
            reply.ok();
        });
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // What is committed is on disk already, and nothing else has anything to lose.
        reply.ok();
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
        let answer = |listed: Result<u64>, reply: ReplyOpen| match listed {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(errno(&error)),
        };
        if !self.tree.is_slow(ino.0) {
            return answer(self.at_once(|tree| tree.open_list(caller, ino.0)), reply);
        }
        self.look(move |tree| answer(tree.open_list(caller, ino.0), reply));
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let caller = caller(request);
        let work = move |tree: &Arc<Tree>| {
            for (next, entry) in (1..).zip(dots(ino.0)).skip(dots_before(offset)) {
                if reply.add(INodeNo(entry.ino), next, file_type(entry.kind), &entry.name) {
                    return reply.ok();
                }
            }
            let mut add = |entry: &DirEntry, next: u64, _: Option<&Attr>| {
                reply.add(INodeNo(entry.ino), next, file_type(entry.kind), &entry.name)
            };
            let place = (ino.0, handle.0);
            match tree.read_list(caller, place, offset, WantedOfList::Names, &mut add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        };
        match self.tree.is_slow(ino.0) {
            true => self.look(work),
            false => work(&self.tree),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let caller = caller(request);
        self.look(move |tree| {
            let mut add = |entry: &DirEntry, next: u64, attr: Option<&Attr>| {
                let unknown = || tree.listed_attr(entry);
                let attr = attr.cloned().unwrap_or_else(unknown);
                reply.add(
                    INodeNo(attr.ino),
                    next,
                    entry.name.as_os_str(),
                    &ttl(&attr),
                    &file_attr(&attr),
                    Generation(attr.generation),
                )
            };
            for (next, entry) in (1..).zip(dots(ino.0)).skip(dots_before(offset)) {
                if add(&entry, next, None) {
                    return reply.ok();
                }
            }
            let place = (ino.0, handle.0);
            match tree.read_list(caller, place, offset, WantedOfList::Attributes, &mut add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
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
        self.look(move |tree| {
            let from = u64::try_from(offset).unwrap_or(u64::MAX);
            let found = match whence {
                libc::SEEK_DATA | libc::SEEK_HOLE => tree.seek(handle.0, from, data),
                _ => Err(Error::new(libc::EINVAL, "that is no way to seek")),
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
        let value = self.at_once(|tree| tree.xattr(caller(request), ino.0, name));
        reply_xattr(reply, size, value);
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.at_once(|tree| tree.xattr_names(caller(request), ino.0));
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
        self.later(move |tree| {
            let set = tree.setattr(caller, ino.0, None, SetAttr::default());
            reply_empty(reply, set.map(|_| ()));
        });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.setxattr(request, ino, name, &[], 0, 0, reply);
    }
}
