//! `rootfs` and `disk.img`: what is in a disk, by the hidden view.

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Tree;
use super::attr::{Attr, DirEntry, Kept, Kind};
use super::handle::{Handle, Opened};
use super::node::{Derived, GuestFile, Node};
use crate::guest::{Attributes, FileKind, FileSystem, Guest, Time};
use crate::store::{DiskState, Inside, Source};
use crate::{Error, Result};

/// Longest listing of a guest's directory, in bytes of names: more than any real one has.
const LONGEST_LISTING: usize = 64 << 20;

fn not_there() -> Error {
    Error::new(libc::ENOENT, "the guest has no such file")
}

/// For whoever would change anything in a disk.
pub(super) fn only_for_reading() -> Error {
    Error::new(libc::EROFS, "what is in a disk is only for reading")
}

/// A file of a guest, and what it is read from.
struct Found<'a> {
    file: &'a GuestFile,
    inside: &'a Inside,
}

impl GuestFile {
    /// The directory that all else is in.
    pub(super) fn root_of(inside: &Inside) -> GuestFile {
        let guest = inside.guest();
        let is_file_system = guest.is_ok_and(|guest| guest.file_system().is_some());
        GuestFile {
            state: inside.state().clone(),
            partition: 0,
            inode: if is_file_system { FileSystem::ROOT } else { 0 },
        }
    }

    /// Whether it is no directory of the guest, but has the partitions, or nothing that can be read.
    fn is_ours(&self) -> bool {
        self.inode == 0
    }

    fn in_same(&self, inode: u32) -> GuestFile {
        GuestFile {
            inode,
            ..self.clone()
        }
    }

    fn root_of_partition(&self, partition: u32) -> GuestFile {
        GuestFile {
            partition,
            ..self.in_same(FileSystem::ROOT)
        }
    }
}

impl<'a> Found<'a> {
    fn file_system(&self) -> Result<&'a FileSystem> {
        let guest = self.inside.guest()?;
        if self.file.partition == 0 {
            return guest.file_system().ok_or_else(not_there);
        }
        let partition = guest.partition(self.file.partition);
        partition.ok_or_else(not_there)?.file_system()
    }

    fn attributes(&self) -> Result<Attributes> {
        self.file_system()?.attributes(self.file.inode)
    }

    fn child(&self, name: &OsStr) -> Result<GuestFile> {
        if !self.file.is_ours() {
            let found = self
                .file_system()?
                .lookup(self.file.inode, name.as_bytes())?;
            return found
                .map(|inode| self.file.in_same(inode))
                .ok_or_else(not_there);
        }
        let guest = self.inside.guest().map_err(|_| not_there())?;
        shown_partitions(guest)
            .find(|number| name == OsStr::new(&partition_name(*number)))
            .map(|number| self.file.root_of_partition(number))
            .ok_or_else(not_there)
    }

    fn list(&self) -> Result<Vec<DirEntry>> {
        match self.file.is_ours() {
            true => self.list_partitions(),
            false => self.list_directory(),
        }
    }

    fn list_partitions(&self) -> Result<Vec<DirEntry>> {
        let guest: &Guest = self.inside.guest()?;
        let entry = |number: u32| DirEntry {
            name: partition_name(number).into(),
            kind: Kind::Directory,
            ino: Node::Guest(self.file.root_of_partition(number)).ino(),
        };
        Ok(shown_partitions(guest).map(entry).collect())
    }

    fn list_directory(&self) -> Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        let files = self.file_system()?;
        files.list(self.file.inode, 0, &mut |entry| {
            bytes += entry.name.len() + size_of::<DirEntry>();
            // The kernel only goes by the kind; where the directory does not say, a stat will.
            entries.push(DirEntry {
                name: OsString::from_vec(entry.name.to_vec()),
                kind: entry.kind.map_or(Kind::File, kind_of),
                ino: Node::Guest(self.file.in_same(entry.inode)).ino(),
            });
            match bytes > LONGEST_LISTING {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        if bytes > LONGEST_LISTING {
            return Err(Error::damaged("a directory of the guest has no end"));
        }
        Ok(entries)
    }
}

/// The numbers of partitions; no real disk has as many as inode numbers have no room for.
fn shown_partitions(guest: &Guest) -> impl Iterator<Item = u32> + '_ {
    let numbers = guest.partitions().iter().map(|it| it.number());
    numbers.filter(|number| *number <= 0xff)
}

/// What the directory of a partition is called.
fn partition_name(number: u32) -> String {
    format!("p{number}")
}

fn kind_of(kind: FileKind) -> Kind {
    match kind {
        FileKind::Regular => Kind::File,
        FileKind::Directory => Kind::Directory,
        FileKind::Symlink => Kind::Symlink,
        FileKind::CharDevice => Kind::CharDevice,
        FileKind::BlockDevice => Kind::BlockDevice,
        FileKind::Fifo => Kind::Fifo,
        FileKind::Socket => Kind::Socket,
    }
}

fn time_of(time: Time) -> SystemTime {
    let within = Duration::from_nanos(time.nanoseconds.into());
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let second = match time.seconds < 0 {
        true => UNIX_EPOCH.checked_sub(whole),
        false => UNIX_EPOCH.checked_add(whole),
    };
    second
        .and_then(|second| second.checked_add(within))
        .unwrap_or(UNIX_EPOCH)
}

impl Tree {
    /// What `rootfs` or `disk.img` in the view of a disk state stands for now.
    pub(super) fn look_inside(&self, source: &Source) -> Result<Arc<Inside>> {
        self.store
            .look_inside(source)
            .map_err(|error| self.noted_look(source, error))
    }

    /// Whether finding a name may have to wait for the clock of a file system: that of what is in a
    /// disk that was written to just now.
    pub fn lookup_may_wait(&self, parent: u64, name: &OsStr) -> bool {
        let derived = name.to_str().and_then(Derived::named);
        let looks_inside = matches!(derived, Some(Derived::Rootfs | Derived::DiskImage));
        match self.node(parent) {
            Ok(Node::ViewOf(source)) if looks_inside => self.store.look_may_wait(&source),
            _ => false,
        }
    }

    /// The state a file is in, open and unchanged.
    fn inside(&self, state: &DiskState) -> Result<Arc<Inside>> {
        let inside = self.store.look_again(state)?;
        inside.refuse_changed()?;
        Ok(inside)
    }

    /// Does something with a file of a guest whose disk is as it was.
    fn with_guest<T>(
        &self,
        file: &GuestFile,
        work: impl FnOnce(&Found<'_>) -> Result<T>,
    ) -> Result<T> {
        let inside = self.store.look_again(&file.state)?;
        let found = Found {
            file,
            inside: &inside,
        };
        let done = work(&found);
        // What was read while the disk changed is not to be had, nor what seemed damaged then.
        inside.refuse_changed()?;
        done.map_err(|error| self.noted_look(file.state.source(), error))
    }

    /// Notes what can't be read of a guest. What is not there, or not any more, is no news.
    fn noted_look(&self, source: &Source, error: Error) -> Error {
        if !matches!(error.errno(), libc::ESTALE | libc::ENOENT | libc::ENODATA) {
            let what = self.store.describe(source);
            let sentence = format!("looking into {what}: {error}");
            self.store.journal().note_once(&sentence);
        }
        error
    }

    /// Finds a name in a directory of a guest; the kernel is told of what is found.
    pub(super) fn lookup_guest(&self, parent: &GuestFile, name: &OsStr) -> Result<Attr> {
        let (file, attr) = self.with_guest(parent, |parent| {
            let file = parent.child(name)?;
            let attr = self.attr_of_found(&Found {
                file: &file,
                inside: parent.inside,
            })?;
            Ok((file, attr))
        })?;
        self.tell(&Node::Guest(file));
        Ok(attr)
    }

    /// Attributes of a file of a guest, as the guest has them.
    pub(super) fn guest_attr(&self, file: &GuestFile) -> Result<Attr> {
        self.with_guest(file, |found| self.attr_of_found(found))
    }

    fn attr_of_found(&self, found: &Found<'_>) -> Result<Attr> {
        let file = found.file;
        let node = Node::Guest(file.clone());
        let directory = |below| Ok(self.directory(&node, below, file.state.changed()));
        if file.is_ours() {
            let guest = found.inside.guest();
            return directory(guest.map_or(0, |guest| guest.partitions().len()));
        }
        let found = match found.attributes() {
            // A partition that can't be read is there, and says so when it is listed.
            Err(_) if file.inode == FileSystem::ROOT && file.partition > 0 => return directory(0),
            attributes => attributes?,
        };
        Ok(Attr {
            ino: node.ino(),
            generation: 0,
            kind: kind_of(found.kind),
            size: found.size,
            blocks: found.blocks,
            perm: found.permissions,
            nlink: found.links,
            uid: found.uid,
            gid: found.gid,
            device: u32::try_from(found.device).unwrap_or(0),
            atime: time_of(found.accessed),
            mtime: time_of(found.modified),
            ctime: time_of(found.changed),
            created: found.created.map_or(UNIX_EPOCH, time_of),
            kept: Kept::Long,
        })
    }

    /// The raw disk as a file.
    pub(super) fn disk_image_attr(&self, state: &Arc<DiskState>) -> Result<Attr> {
        let node = Node::DiskImage(state.clone());
        let allocated = self
            .inside(state)?
            .allocated()
            .map_err(|error| self.noted_look(state.source(), error))?;
        let mut attr = self.file(&node, state.size(), state.changed());
        attr.perm &= !0o222;
        attr.blocks = allocated.div_ceil(512);
        attr.kept = Kept::Moment;
        Ok(attr)
    }

    /// The names in a directory of a guest.
    pub(super) fn list_guest(&self, file: &GuestFile) -> Result<Vec<DirEntry>> {
        self.with_guest(file, |found| found.list())
    }

    /// The target of a guest's symbolic link, as the guest has it.
    pub(super) fn guest_link(&self, file: &GuestFile) -> Result<PathBuf> {
        let target = self.with_guest(file, |found| {
            found.file_system()?.read_link(found.file.inode)
        })?;
        Ok(OsString::from_vec(target).into())
    }

    /// Opens a file of a guest, or the raw disk, for reading.
    pub(super) fn open_inside(&self, node: &Node) -> Result<Opened> {
        let state = match node {
            Node::Guest(file) => &file.state,
            Node::DiskImage(state) => state,
            _ => return Err(not_there()),
        };
        let handle = Handle::Inside {
            node: node.clone(),
            inside: self.inside(state)?,
        };
        Ok(Opened {
            handle: self.add_handle(handle),
            direct: false,
            // The inode is of this state and no other.
            keep_pages: true,
            spool: None,
        })
    }

    /// Fills `buf` from `offset` on; returns how many bytes there were.
    pub(super) fn read_inside(
        &self,
        node: &Node,
        inside: &Inside,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize> {
        let read = match node {
            Node::Guest(file) => {
                let files = Found { file, inside }.file_system()?;
                files.read_at(file.inode, offset, buf)
            }
            _ => {
                let rest = inside.state().size().saturating_sub(offset);
                let length = usize::try_from(rest).map_or(buf.len(), |rest| rest.min(buf.len()));
                let piece = buf.get_mut(..length).unwrap_or_default();
                inside.chain().read_at(offset, piece).map(|()| length)
            }
        };
        inside.refuse_changed()?;
        read.map_err(|error| self.noted_look(inside.state().source(), error))
    }

    /// lseek(2) with SEEK_DATA (`data`) or SEEK_HOLE.
    ///
    /// # Errors
    /// ENXIO past the end; EIO for what is damaged.
    pub fn seek(&self, handle: u64, offset: u64, data: bool) -> Result<u64> {
        let past_the_end = || Error::new(libc::ENXIO, "there is nothing more in the file");
        let handle = self.handle(handle)?;
        if let Handle::Inside { node, inside } = &*handle {
            let found = seek_inside(node, inside, offset, data);
            inside.refuse_changed()?;
            return found
                .map_err(|error| self.noted_look(inside.state().source(), error))?
                .ok_or_else(past_the_end);
        }
        // What we make has no holes.
        let end = match &*handle {
            Handle::Log => self.store.journal().len(),
            other => other.size().ok_or_else(past_the_end)?,
        };
        match offset < end {
            true if data => Ok(offset),
            true => Ok(end),
            false => Err(past_the_end()),
        }
    }

    /// An extended attribute of a guest's file.
    pub(super) fn guest_xattr(&self, file: &GuestFile, name: &OsStr) -> Result<Vec<u8>> {
        let found = match file.is_ours() {
            true => None,
            false => self.with_guest(file, |found| {
                let files = found.file_system()?;
                files.xattr(found.file.inode, name.as_bytes())
            })?,
        };
        found.ok_or_else(|| Error::new(libc::ENODATA, "there is no such attribute"))
    }

    /// The names of all of them, each ended by a NUL.
    pub(super) fn guest_xattr_names(&self, file: &GuestFile) -> Result<Vec<u8>> {
        if file.is_ours() {
            return Ok(Vec::new());
        }
        let names = self.with_guest(file, |found| {
            found.file_system()?.xattr_names(found.file.inode)
        })?;
        let ended = names.into_iter().map(|mut name| {
            name.push(0);
            name
        });
        Ok(ended.flatten().collect())
    }
}

/// Where from `offset` on a file has data, or a hole; its end is one.
fn seek_inside(node: &Node, inside: &Inside, offset: u64, data: bool) -> Result<Option<u64>> {
    match node {
        Node::Guest(file) => {
            let files = Found { file, inside }.file_system()?;
            match data {
                true => files.next_data(file.inode, offset),
                false => files.next_hole(file.inode, offset),
            }
        }
        _ => {
            let end = inside.state().size();
            if offset >= end {
                return Ok(None);
            }
            let found = inside.chain().next(offset, data)?;
            Ok(found.or_else(|| (!data).then_some(end)))
        }
    }
}
