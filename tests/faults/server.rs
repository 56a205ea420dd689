//! A FUSE file system for homes, served by the test. It records each call with its data, and can
//! fail a given call.
//!
//! Threads of the test process serve it. To avoid a deadlock, a test that accesses its files must
//! not hold anything that the server needs.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::common::run;
use super::files::{Attributes, Bytes, Files, Kind, Node, Number, PAGE, ROOT};
use super::record::{Done, empty};

/// The cache time of names and attributes. Without a cache, all processes see each change at once.
const NOW: Duration = Duration::ZERO;

/// Kinds of calls that can be failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
    Read,
    Write,
    Resize,
    /// `fsync` of a file.
    Flush,
    FlushDirectory,
    Create,
    MakeDirectory,
    Link,
    Rename,
    Unlink,
    RemoveDirectory,
    /// A change of mode, owner or times.
    Describe,
    /// Any of the above except `Read`.
    Change,
}

/// All kinds of calls.
pub const CALLS: [Call; 13] = [
    Call::Read,
    Call::Write,
    Call::Resize,
    Call::Flush,
    Call::FlushDirectory,
    Call::Create,
    Call::MakeDirectory,
    Call::Link,
    Call::Rename,
    Call::Unlink,
    Call::RemoveDirectory,
    Call::Describe,
    Call::Change,
];

/// Which calls fail, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    pub call: Call,
    /// The index of the first failing call among those of its kind.
    pub nth: usize,
    pub errno: i32,
    /// Whether all later calls of the kind fail, too.
    pub lasts: bool,
}

struct State {
    files: Files,
    calls: Vec<Done>,
    /// Open directory listings, by handle.
    listings: HashMap<u64, Vec<(OsString, Number, FileType)>>,
    next_handle: u64,
    fault: Option<Fault>,
    counts: HashMap<Call, usize>,
    failed: usize,
    /// Whether two names can be exchanged, as on most file systems.
    can_exchange: bool,
}

type Answer<T> = Result<T, i32>;

/// The file system, mounted until it is dropped.
pub struct FaultyDisk {
    state: Arc<Mutex<State>>,
    session: Option<BackgroundSession>,
    at: PathBuf,
}

impl FaultyDisk {
    /// Mounts a disk that holds these files.
    pub fn mount(at: &Path, files: Files) -> FaultyDisk {
        let state = Arc::new(Mutex::new(State {
            files,
            calls: Vec::new(),
            listings: HashMap::new(),
            next_handle: 1,
            fault: None,
            counts: HashMap::new(),
            failed: 0,
            can_exchange: true,
        }));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("faulty-disk".into())];
        config.n_threads = Some(2);
        let served = Served(state.clone());
        let session = fuser::spawn_mount(served, at, &config).expect("a mount of the faulty disk");
        FaultyDisk {
            state,
            session: Some(session),
            at: at.to_owned(),
        }
    }

    /// Makes it a disk that can't exchange two names.
    pub fn without_exchange(self) -> FaultyDisk {
        self.state().can_exchange = false;
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Resets the counters and sets the fault, if any.
    pub fn arm(&self, fault: Option<Fault>) {
        let mut state = self.state();
        state.counts.clear();
        state.fault = fault;
        state.failed = 0;
    }

    /// Removes the fault; returns the number of calls that failed.
    pub fn disarm(&self) -> usize {
        let mut state = self.state();
        state.fault = None;
        state.failed
    }

    /// Returns the number of calls of each kind since [`FaultyDisk::arm`].
    pub fn counts(&self) -> HashMap<Call, usize> {
        self.state().counts.clone()
    }

    /// Returns the number of recorded calls so far.
    pub fn calls_so_far(&self) -> usize {
        self.state().calls.len()
    }

    /// Returns the recorded calls so far.
    pub fn calls(&self) -> Vec<Done> {
        self.state().calls.clone()
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        let at = self.at.to_str().unwrap();
        if !run(&["umount", at]).status.success() {
            run(&["umount", "-l", at]);
        }
        if let Some(session) = self.session.take() {
            drop(session);
        }
    }
}

impl State {
    /// Counts a call, and returns the fault's errno if the call is to fail.
    fn meet(&mut self, call: Call) -> Answer<()> {
        let mut kinds = vec![call];
        if call != Call::Read {
            kinds.push(Call::Change);
        }
        for kind in kinds {
            let count = self.counts.entry(kind).or_default();
            let nth = *count;
            *count += 1;
            if let Some(fault) = self.fault.filter(|fault| fault.call == kind)
                && (nth == fault.nth || fault.lasts && nth > fault.nth)
            {
                self.failed += 1;
                return Err(fault.errno);
            }
        }
        Ok(())
    }

    fn node(&mut self, number: Number) -> Answer<&mut Node> {
        self.files.nodes.get_mut(&number).ok_or(libc::ENOENT)
    }

    fn find(&self, parent: Number, name: &OsStr) -> Answer<Number> {
        self.files.lookup(parent, name).ok_or(libc::ENOENT)
    }

    fn touch(&mut self, number: Number, contents: bool) {
        if let Some(node) = self.files.nodes.get_mut(&number) {
            let now = SystemTime::now();
            node.attributes.changed = now;
            if contents {
                node.attributes.modified = now;
            }
        }
    }

    fn attr(&self, number: Number) -> Answer<FileAttr> {
        let node = self.files.nodes.get(&number).ok_or(libc::ENOENT)?;
        let (kind, size, allocated) = match &node.kind {
            Kind::File(bytes) => (FileType::RegularFile, bytes.len(), bytes.allocated()),
            Kind::Directory(_) => (FileType::Directory, PAGE, PAGE),
            Kind::Link(path) => (FileType::Symlink, path.as_os_str().len() as u64, 0),
        };
        let attributes = &node.attributes;
        Ok(FileAttr {
            ino: INodeNo(number),
            size,
            blocks: allocated / 512,
            atime: attributes.accessed,
            mtime: attributes.modified,
            ctime: attributes.changed,
            crtime: attributes.changed,
            kind,
            perm: attributes.mode as u16,
            nlink: node.names,
            uid: attributes.uid,
            gid: attributes.gid,
            rdev: 0,
            blksize: PAGE as u32,
            flags: 0,
        })
    }

    fn make(
        &mut self,
        call: Call,
        request: &Request,
        parent: Number,
        name: &OsStr,
        mode: u32,
        kind: Kind,
    ) -> Answer<Number> {
        if self.files.lookup(parent, name).is_some() {
            return Err(libc::EEXIST);
        }
        self.meet(call)?;
        let number = self.files.next;
        self.files.next += 1;
        let node = empty(kind, Attributes::new(mode, request.uid(), request.gid()));
        self.files.nodes.insert(number, node.clone());
        self.calls.push(Done::Make { number, node });
        self.enter(parent, name, number);
        Ok(number)
    }

    fn enter(&mut self, directory: Number, name: &OsStr, number: Number) {
        self.files
            .entries_mut(directory)
            .insert(name.to_owned(), number);
        self.touch(directory, true);
        self.calls.push(Done::Enter {
            directory,
            name: name.to_owned(),
            number,
        });
    }

    fn link(&mut self, number: Number, parent: Number, name: &OsStr) -> Answer<()> {
        if self.files.lookup(parent, name).is_some() {
            return Err(libc::EEXIST);
        }
        self.meet(Call::Link)?;
        self.node(number)?.names += 1;
        self.touch(number, false);
        self.enter(parent, name, number);
        Ok(())
    }

    fn remove(&mut self, call: Call, parent: Number, name: &OsStr) -> Answer<()> {
        let number = self.find(parent, name)?;
        match (&self.node(number)?.kind, call) {
            (Kind::Directory(entries), Call::RemoveDirectory) if !entries.is_empty() => {
                return Err(libc::ENOTEMPTY);
            }
            (Kind::Directory(_), Call::Unlink) => return Err(libc::EISDIR),
            (Kind::File(_) | Kind::Link(_), Call::RemoveDirectory) => return Err(libc::ENOTDIR),
            _ => {}
        }
        self.meet(call)?;
        self.files.entries_mut(parent).remove(name);
        self.loses_a_name(number);
        self.touch(parent, true);
        self.calls.push(Done::Leave {
            directory: parent,
            name: name.to_owned(),
        });
        Ok(())
    }

    /// Removes one name of a file. A file without names stays, because it may still be open.
    fn loses_a_name(&mut self, number: Number) {
        if let Some(node) = self.files.nodes.get_mut(&number) {
            node.names = node.names.saturating_sub(1);
        }
        self.touch(number, false);
    }

    fn rename(&mut self, from: (Number, &OsStr), to: (Number, &OsStr), keep: bool) -> Answer<()> {
        let number = self.find(from.0, from.1)?;
        let other = self.files.lookup(to.0, to.1);
        if other.is_some() && keep {
            return Err(libc::EEXIST);
        }
        if let Some(other) = other
            && let Kind::Directory(entries) = &self.node(other)?.kind
            && !entries.is_empty()
        {
            return Err(libc::ENOTEMPTY);
        }
        self.meet(Call::Rename)?;
        if other == Some(number) {
            return Ok(());
        }
        self.files.entries_mut(from.0).remove(from.1);
        self.files.entries_mut(to.0).insert(to.1.to_owned(), number);
        if let Some(other) = other {
            self.loses_a_name(other);
        }
        self.touch(from.0, true);
        self.touch(to.0, true);
        self.touch(number, false);
        self.calls.push(Done::Move {
            from: (from.0, from.1.to_owned()),
            to: (to.0, to.1.to_owned()),
            number,
        });
        Ok(())
    }

    fn exchange(&mut self, one: (Number, &OsStr), other: (Number, &OsStr)) -> Answer<()> {
        if !self.can_exchange {
            return Err(libc::EINVAL);
        }
        let numbers = (self.find(one.0, one.1)?, self.find(other.0, other.1)?);
        self.meet(Call::Rename)?;
        self.files
            .entries_mut(one.0)
            .insert(one.1.to_owned(), numbers.1);
        self.files
            .entries_mut(other.0)
            .insert(other.1.to_owned(), numbers.0);
        for changed in [one.0, other.0] {
            self.touch(changed, true);
        }
        for changed in [numbers.0, numbers.1] {
            self.touch(changed, false);
        }
        self.calls.push(Done::Exchange {
            one: (one.0, one.1.to_owned(), numbers.0),
            other: (other.0, other.1.to_owned(), numbers.1),
        });
        Ok(())
    }

    fn flush(&mut self, call: Call, number: Number) -> Answer<()> {
        let met = self.meet(call);
        self.calls.push(Done::Flush {
            number,
            succeeded: met.is_ok(),
        });
        met
    }

    fn write(&mut self, number: Number, offset: u64, bytes: &[u8]) -> Answer<()> {
        self.meet(Call::Write)?;
        self.files.bytes_mut(number).write(offset, bytes);
        self.touch(number, true);
        self.calls.push(Done::Write {
            number,
            offset,
            bytes: bytes.to_owned(),
        });
        Ok(())
    }

    fn resize(&mut self, number: Number, length: u64) -> Answer<()> {
        self.meet(Call::Resize)?;
        self.files.bytes_mut(number).set_len(length);
        self.touch(number, true);
        self.calls.push(Done::Resize { number, length });
        Ok(())
    }

    fn describe(&mut self, number: Number, change: impl FnOnce(&mut Attributes)) -> Answer<()> {
        self.meet(Call::Describe)?;
        let attributes = &mut self.node(number)?.attributes;
        change(attributes);
        attributes.changed = SystemTime::now();
        let attributes = attributes.clone();
        self.calls.push(Done::Describe { number, attributes });
        Ok(())
    }

    fn list(&mut self, directory: Number) -> Answer<u64> {
        let entries = self.files.entries(directory).ok_or(libc::ENOTDIR)?;
        let listing = entries.iter().map(|(name, number)| {
            let kind = match &self.files.nodes[number].kind {
                Kind::File(_) => FileType::RegularFile,
                Kind::Directory(_) => FileType::Directory,
                Kind::Link(_) => FileType::Symlink,
            };
            (name.clone(), *number, kind)
        });
        let dots = [".", ".."].map(|name| (name.into(), ROOT, FileType::Directory));
        let listing = dots.into_iter().chain(listing).collect();
        let handle = self.next_handle;
        self.next_handle += 1;
        self.listings.insert(handle, listing);
        Ok(handle)
    }
}

/// The implementation of fuser's callbacks.
struct Served(Arc<Mutex<State>>);

impl Served {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> Answer<T>) -> Result<T, Errno> {
        work(&mut self.0.lock().unwrap()).map_err(Errno::from_i32)
    }

    fn answer(&self, reply: ReplyEmpty, work: impl FnOnce(&mut State) -> Answer<()>) {
        match self.with(work) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn answer_entry(&self, reply: ReplyEntry, work: impl FnOnce(&mut State) -> Answer<Number>) {
        match self.with(|state| work(state).and_then(|number| state.attr(number))) {
            Ok(attr) => reply.entry(&NOW, &attr, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }
}

fn time(wanted: TimeOrNow) -> SystemTime {
    match wanted {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.answer_entry(reply, |state| state.find(parent.0, name));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.with(|state| state.attr(ino.0)) {
            Ok(attr) => reply.attr(&NOW, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = self.with(|state| {
            if let Some(length) = size {
                state.resize(ino.0, length)?;
            }
            let is_described = mode.or(uid).or(gid).is_some();
            if is_described || accessed.is_some() || modified.is_some() {
                state.describe(ino.0, |attributes| {
                    attributes.mode = mode.map_or(attributes.mode, |mode| mode & 0o7777);
                    attributes.uid = uid.unwrap_or(attributes.uid);
                    attributes.gid = gid.unwrap_or(attributes.gid);
                    attributes.accessed = accessed.map_or(attributes.accessed, time);
                    attributes.modified = modified.map_or(attributes.modified, time);
                })?;
            }
            state.attr(ino.0)
        });
        match changed {
            Ok(attr) => reply.attr(&NOW, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.with(|state| match &state.node(ino.0)?.kind {
            Kind::Link(target) => Ok(target.clone()),
            _ => Err(libc::EINVAL),
        });
        match target {
            Ok(target) => reply.data(target.as_os_str().as_encoded_bytes()),
            Err(errno) => reply.error(errno),
        }
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let kind = Kind::Directory(Default::default());
        self.answer_entry(reply, |state| {
            let mode = mode & !umask;
            state.make(Call::MakeDirectory, request, parent.0, name, mode, kind)
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.answer(reply, |state| state.remove(Call::Unlink, parent.0, name));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.answer(reply, |state| {
            state.remove(Call::RemoveDirectory, parent.0, name)
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
        let kind = Kind::Link(target.to_owned());
        self.answer_entry(reply, |state| {
            state.make(Call::Create, request, parent.0, name, 0o777, kind)
        });
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.answer(reply, |state| {
            if flags == RenameFlags::RENAME_EXCHANGE {
                return state.exchange((parent.0, name), (new_parent.0, new_name));
            }
            if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
                return Err(libc::EINVAL);
            }
            let keep = flags.contains(RenameFlags::RENAME_NOREPLACE);
            state.rename((parent.0, name), (new_parent.0, new_name), keep)
        });
    }

    fn link(
        &self,
        _: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        self.answer_entry(reply, |state| {
            state.link(ino.0, new_parent.0, new_name)?;
            Ok(ino.0)
        });
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // The kernel may keep cached pages, because all writes go through it. SQLite's shared
        // memory is made of such pages.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let kind = Kind::File(Bytes::default());
        let made = self.with(|state| {
            let mode = mode & !umask;
            let number = state.make(Call::Create, request, parent.0, name, mode, kind)?;
            state.attr(number)
        });
        match made {
            Ok(attr) => reply.created(
                &NOW,
                &attr,
                Generation(0),
                FileHandle(0),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let bytes = self.with(|state| {
            state.meet(Call::Read)?;
            Ok(state.files.bytes_mut(ino.0).read(offset, size.into()))
        });
        match bytes {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.with(|state| state.write(ino.0, offset, data)) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.answer(reply, |state| state.flush(Call::Flush, ino.0));
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.answer(reply, |state| state.flush(Call::FlushDirectory, ino.0));
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.with(|state| state.list(ino.0)) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listing = self.with(|state| Ok(state.listings[&handle.0].clone()));
        let listing = listing.into_iter().flatten().enumerate();
        for (at, (name, number, kind)) in listing.skip(offset as usize) {
            if reply.add(INodeNo(number), at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.answer(reply, |state| {
            state.listings.remove(&handle.0);
            Ok(())
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let (blocks, free) = (1 << 24, 1 << 23);
        let page = PAGE as u32;
        reply.statfs(blocks, free, free, blocks, free, page, 255, page);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.with(|state| {
            let bytes = state.files.bytes_mut(ino.0);
            let offset = offset as u64;
            if offset >= bytes.len() {
                return Err(libc::ENXIO);
            }
            match whence {
                libc::SEEK_DATA => bytes.next_data(offset).ok_or(libc::ENXIO),
                libc::SEEK_HOLE => Ok(bytes.next_hole(offset)),
                _ => Err(libc::EINVAL),
            }
        });
        match found {
            Ok(at) => reply.offset(at as i64),
            Err(errno) => reply.error(errno),
        }
    }
}
