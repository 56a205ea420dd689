//! `rootfs` and `disk.img`: what is in a disk, by the hidden view.

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guest::{Attributes, Entry, FileKind, FileSystem, Guest, LinkPlace, Time};
use crate::store::{DiskState, Inside, Source};
use crate::tree::nodes::attr::{Add, Attr, DirEntry, Kept, Kind, Wanted};
use crate::tree::nodes::guest_numbers::{Access, GuestVolume};
use crate::tree::nodes::node::{Derived, GuestFile, Node};
use crate::tree::reading::open_file::{Handle, Opened};
use crate::tree::staging::caller::Caller;
use crate::tree::{Links, Tree};
use crate::{Error, Result};

fn not_there() -> Error {
    Error::new(libc::ENOENT, "the guest has no such file")
}

/// For whoever would change anything in a disk.
pub(in crate::tree) fn only_for_reading() -> Error {
    Error::new(libc::EROFS, "what is in a disk is only for reading")
}

/// A file of a guest, and what it is read from.
struct Found<'a> {
    tree: &'a Tree,
    file: &'a GuestFile,
    inside: &'a Inside,
}

impl GuestFile {
    /// Whether it is no directory of the guest, but has the partitions, or nothing that can be read.
    pub(in crate::tree) fn is_ours(&self) -> bool {
        self.inode == 0
    }

    fn state(&self) -> &Arc<DiskState> {
        &self.volume.state
    }
}

impl<'a> Found<'a> {
    fn file_system(&self) -> Result<&'a FileSystem> {
        let guest = self.inside.guest()?;
        if self.file.volume.partition == 0 {
            return guest.file_system().ok_or_else(not_there);
        }
        let partition = guest.partition(self.file.volume.partition);
        partition.ok_or_else(not_there)?.file_system()
    }

    fn attributes(&self) -> Result<Attributes> {
        self.file_system()?.attributes(self.file.inode)
    }

    /// The file system, to go on to what is in this directory.
    fn enter(&self) -> Result<&'a FileSystem> {
        match self.file.volume.access {
            Access::Closed => Err(Error::damaged(format!(
                "the directory with inode {} does not say that it is where it was found; e2fsck \
                 repairs that, and the mount option links=guest goes on all the same",
                self.file.inode
            ))),
            _ => self.file_system(),
        }
    }

    fn child(&self, name: &OsStr) -> Result<(GuestFile, Attr)> {
        if self.file.is_ours() {
            let guest = self.inside.guest().map_err(|_| not_there())?;
            let number = shown_partitions(guest)
                .find(|number| name == OsStr::new(&partition_name(*number)))
                .ok_or_else(not_there)?;
            let file = self.root_of_partition(number)?;
            let attr = self.tree.attr_of_found(&self.other(&file))?;
            return Ok((file, attr));
        }
        let found = self.enter()?.lookup(self.file.inode, name.as_bytes())?;
        self.child_of_inode(found.ok_or_else(not_there)?)
    }

    /// What a name in this directory stands for.
    fn child_of_inode(&self, inode: u32) -> Result<(GuestFile, Attr)> {
        let attributes = self.enter()?.attributes(inode)?;
        let access = self.access_of(&attributes)?;
        let file = self.file_as(inode, access)?;
        let attr = self.other(&file).shown(&attributes)?;
        Ok((file, attr))
    }

    /// How what is in this directory may be used.
    fn access_of(&self, attributes: &Attributes) -> Result<Access> {
        let (files, directory) = (self.file_system()?, self.file.inode);
        let inode = attributes.inode;
        Ok(match (self.tree.links, attributes.kind) {
            (Links::Guest, _) => Access::Plain,
            (Links::Inside, FileKind::Directory) => {
                // Damage shows when it is listed.
                match files.is_entered_from(inode, directory).unwrap_or(false) {
                    true => Access::Plain,
                    false => Access::Closed,
                }
            }
            (Links::Inside, FileKind::Symlink) => match files.link_place(inode, directory) {
                Ok(place) => Access::of_link(place),
                Err(_) => Access::LinkAt(0),
            },
            (Links::Inside, _) => Access::Plain,
        })
    }

    /// A file of the same partition and state.
    fn file_as(&self, inode: u32, access: Access) -> Result<GuestFile> {
        let here = &self.file.volume;
        let volume = match here.access == access {
            true => here.clone(),
            false => {
                let GuestVolume {
                    state, partition, ..
                } = &**here;
                self.tree.numbers.volume(state, *partition, access)?
            }
        };
        Ok(GuestFile { volume, inode })
    }

    fn root_of_partition(&self, partition: u32) -> Result<GuestFile> {
        let (numbers, state) = (&self.tree.numbers, self.file.state());
        Ok(GuestFile {
            volume: numbers.volume(state, partition, Access::Plain)?,
            inode: FileSystem::ROOT,
        })
    }

    fn other<'b>(&'b self, file: &'b GuestFile) -> Found<'b> {
        Found { file, ..*self }
    }

    /// The target of a symbolic link, as it is shown.
    fn link(&self) -> Result<Vec<u8>> {
        let (files, inode) = (self.file_system()?, self.file.inode);
        match self.file.volume.access {
            Access::LinkAt(depth) => files.link_within(inode, LinkPlace::Depth(depth)),
            Access::LinkIn(directory) => files.link_within(inode, LinkPlace::Directory(directory)),
            _ => files.read_link(inode),
        }
    }

    /// What stat shows of it.
    fn shown(&self, attributes: &Attributes) -> Result<Attr> {
        let size = match (attributes.kind, self.file.volume.access) {
            // A link that can't be read says so then.
            (FileKind::Symlink, Access::LinkAt(_) | Access::LinkIn(_)) => self
                .link()
                .map_or(attributes.size, |link| link.len() as u64),
            _ => attributes.size,
        };
        Ok(Attr {
            ino: Node::Guest(self.file.clone()).ino(),
            generation: 0,
            kind: kind_of(attributes.kind),
            size,
            blocks: attributes.blocks,
            perm: attributes.permissions,
            nlink: attributes.links,
            uid: attributes.uid,
            gid: attributes.gid,
            device: u32::try_from(attributes.device).unwrap_or(0),
            atime: time_of(attributes.accessed),
            mtime: time_of(attributes.modified),
            ctime: time_of(attributes.changed),
            created: attributes.created.map_or(UNIX_EPOCH, time_of),
            kept: match self.file.volume.access {
                Access::Closed => Kept::Moment,
                _ => Kept::Long,
            },
        })
    }

    /// Gives the names from `offset` on to `add` until it is full; whether there were any.
    fn list_from(&self, offset: u64, wanted: Wanted, add: Add<'_, '_>) -> Result<()> {
        let files = self.enter()?;
        let symlinks = match self.tree.links {
            Links::Guest => Access::Plain,
            Links::Inside => Access::LinkAt(files.depth(self.file.inode).unwrap_or(0)),
        };
        let mut failed = None;
        files.list(self.file.inode, offset, &mut |entry| match self
            .add_entry(&entry, symlinks, wanted, add)
        {
            Ok(false) => ControlFlow::Continue(()),
            Ok(true) => ControlFlow::Break(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        })?;
        failed.map_or(Ok(()), Err)
    }

    fn add_entry(
        &self,
        entry: &Entry<'_>,
        symlinks: Access,
        wanted: Wanted,
        add: Add<'_, '_>,
    ) -> Result<bool> {
        // Where the directory does not say what a file is, its inode does.
        let attributes = || self.file_system()?.attributes(entry.inode);
        let kind = entry.kind.or_else(|| Some(attributes().ok()?.kind));
        let kind = kind.map_or(Kind::File, kind_of);
        let child = match wanted {
            Wanted::Attributes => self.child_of_inode(entry.inode).ok(),
            Wanted::Names => None,
        };
        let (file, attr) = match child {
            Some((file, attr)) => (file, Some(attr)),
            None => {
                let access = match (wanted, kind) {
                    (_, Kind::Symlink) => symlinks,
                    // The kernel must not take what can't be looked at for the directory that it is.
                    (Wanted::Attributes, _) => Access::Closed,
                    (Wanted::Names, _) => Access::Plain,
                };
                (self.file_as(entry.inode, access)?, None)
            }
        };
        let node = Node::Guest(file);
        let listed = DirEntry {
            name: OsString::from_vec(entry.name.to_vec()),
            kind,
            ino: node.ino(),
        };
        if wanted == Wanted::Attributes {
            self.tree.tell(&node);
        }
        let is_full = add(&listed, entry.next, attr.as_ref());
        if is_full && wanted == Wanted::Attributes {
            self.tree.forget(listed.ino, 1);
        }
        Ok(is_full)
    }
}

/// The numbers of partitions.
fn shown_partitions(guest: &Guest) -> impl Iterator<Item = u32> + '_ {
    guest.partitions().iter().map(|it| it.number())
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
    pub(in crate::tree) fn look_inside(&self, source: &Source) -> Result<Arc<Inside>> {
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
        let inside = self.store.look_again(file.state())?;
        self.with_inside(file, &inside, work)
    }

    /// Likewise, with a state that is open.
    fn with_inside<T>(
        &self,
        file: &GuestFile,
        inside: &Inside,
        work: impl FnOnce(&Found<'_>) -> Result<T>,
    ) -> Result<T> {
        let done = work(&self.found(file, inside));
        // What was read while the disk changed is not to be had, nor what seemed damaged then.
        inside.refuse_changed()?;
        done.map_err(|error| self.noted_look(file.state().source(), error))
    }

    fn found<'a>(&'a self, file: &'a GuestFile, inside: &'a Inside) -> Found<'a> {
        Found {
            tree: self,
            file,
            inside,
        }
    }

    /// The directory that all of a guest is in.
    pub(in crate::tree) fn root_of(&self, inside: &Inside) -> Result<GuestFile> {
        let guest = inside.guest();
        let is_file_system = guest.is_ok_and(|guest| guest.file_system().is_some());
        Ok(GuestFile {
            volume: self.numbers.volume(inside.state(), 0, Access::Plain)?,
            inode: if is_file_system { FileSystem::ROOT } else { 0 },
        })
    }

    /// Notes what can't be read of a guest. What is not there, or not any more, is no news.
    fn noted_look(&self, source: &Source, error: Error) -> Error {
        if !matches!(error.errno(), libc::ESTALE | libc::ENOENT | libc::ENODATA) {
            let what = self.store.describe(source);
            let message = format!("looking into {what}: {error}");
            self.store.events().info_once(&message);
        }
        error
    }

    /// Finds a name in a directory of a guest; the kernel is told of what is found.
    pub(in crate::tree) fn lookup_guest(&self, parent: &GuestFile, name: &OsStr) -> Result<Attr> {
        let (file, attr) = self.with_guest(parent, |parent| parent.child(name))?;
        self.tell(&Node::Guest(file));
        Ok(attr)
    }

    /// Attributes of a file of a guest, as the guest has them.
    pub(in crate::tree) fn guest_attr(&self, file: &GuestFile) -> Result<Attr> {
        self.with_guest(file, |found| self.attr_of_found(found))
    }

    fn attr_of_found(&self, found: &Found<'_>) -> Result<Attr> {
        let file = found.file;
        let node = Node::Guest(file.clone());
        let directory = |below| Ok(self.directory(&node, below, file.state().changed()));
        if file.is_ours() {
            let guest = found.inside.guest();
            return directory(guest.map_or(0, |guest| guest.partitions().len()));
        }
        match found.attributes() {
            // A partition that can't be read is there, and says so when it is listed.
            Err(_) if file.inode == FileSystem::ROOT && file.volume.partition > 0 => directory(0),
            attributes => found.shown(&attributes?),
        }
    }

    /// The raw disk as a file.
    pub(in crate::tree) fn disk_image_attr(&self, state: &Arc<DiskState>) -> Result<Attr> {
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

    /// The partitions in the directory that has them.
    pub(in crate::tree) fn list_partitions(&self, file: &GuestFile) -> Result<Vec<DirEntry>> {
        self.with_guest(file, |found| {
            let guest: &Guest = found.inside.guest()?;
            let entry = |number: u32| {
                Ok(DirEntry {
                    name: partition_name(number).into(),
                    kind: Kind::Directory,
                    ino: Node::Guest(found.root_of_partition(number)?).ino(),
                })
            };
            shown_partitions(guest).map(entry).collect()
        })
    }

    /// Opens a directory of a guest to be listed.
    pub(in crate::tree) fn open_guest_directory(&self, file: &GuestFile) -> Result<Handle> {
        let inside = self.inside(file.state())?;
        self.with_inside(file, &inside, |found| {
            found
                .enter()?
                .list(file.inode, u64::MAX, &mut |_| ControlFlow::Break(()))
        })?;
        Ok(Handle::GuestDirectory {
            file: file.clone(),
            inside,
        })
    }

    /// Gives the names in a directory of a guest from `offset` on to `add` until that is full.
    pub(in crate::tree) fn list_guest(
        &self,
        (file, inside): (&GuestFile, &Inside),
        offset: u64,
        wanted: Wanted,
        add: Add<'_, '_>,
    ) -> Result<()> {
        let mut added = Vec::new();
        let listed = self.with_inside(file, inside, |found| {
            let done = found.list_from(offset, wanted, &mut |entry, next, attr| {
                let is_full = add(entry, next, attr);
                if !is_full {
                    added.push(entry.ino);
                }
                is_full
            });
            // What is damaged is told of where nothing is before it.
            match done {
                Err(_) if !added.is_empty() => Ok(()),
                done => done,
            }
        });
        if listed.is_err() && wanted == Wanted::Attributes {
            for ino in added {
                self.forget(ino, 1);
            }
        }
        listed
    }

    /// The target of a guest's symbolic link: what leads to the guest's own file, or, with the option
    /// `links=guest`, what the guest said.
    pub(in crate::tree) fn guest_link(&self, file: &GuestFile) -> Result<PathBuf> {
        let target = self.with_guest(file, |found| found.link())?;
        Ok(OsString::from_vec(target).into())
    }

    /// Opens a file of a guest, or the raw disk, for reading.
    pub(in crate::tree) fn open_inside(&self, node: &Node) -> Result<Opened> {
        let state = match node {
            Node::Guest(file) => file.state(),
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
    pub(in crate::tree) fn read_inside(
        &self,
        node: &Node,
        inside: &Inside,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize> {
        let read = match node {
            Node::Guest(file) => {
                let files = self.found(file, inside).file_system()?;
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
            let found = self.seek_inside(node, inside, offset, data);
            inside.refuse_changed()?;
            return found
                .map_err(|error| self.noted_look(inside.state().source(), error))?
                .ok_or_else(past_the_end);
        }
        // What we make has no holes.
        let end = match &*handle {
            Handle::Log => self.store.events().len(),
            other => other.size().ok_or_else(past_the_end)?,
        };
        match offset < end {
            true if data => Ok(offset),
            true => Ok(end),
            false => Err(past_the_end()),
        }
    }

    /// An extended attribute of a guest's file.
    pub(in crate::tree) fn guest_xattr(&self, file: &GuestFile, name: &OsStr) -> Result<Vec<u8>> {
        let found = match file.is_ours() {
            true => None,
            false => self.with_guest(file, |found| {
                let files = found.file_system()?;
                files.xattr(found.file.inode, name.as_bytes())
            })?,
        };
        found.ok_or_else(|| Error::new(libc::ENODATA, "there is no such attribute"))
    }

    /// The names of all of them, each ended by a NUL. As everywhere, `trusted.*` is for those alone who
    /// may read it.
    pub(in crate::tree) fn guest_xattr_names(
        &self,
        caller: Caller,
        file: &GuestFile,
    ) -> Result<Vec<u8>> {
        if file.is_ours() {
            return Ok(Vec::new());
        }
        let mut names = self.with_guest(file, |found| {
            found.file_system()?.xattr_names(found.file.inode)
        })?;
        let is_trusted = |name: &Vec<u8>| name.starts_with(b"trusted.");
        if names.iter().any(is_trusted) && !caller.is_admin() {
            names.retain(|name| !is_trusted(name));
        }
        let ended = names.into_iter().map(|mut name| {
            name.push(0);
            name
        });
        Ok(ended.flatten().collect())
    }

    /// Where from `offset` on a file has data, or a hole; its end is one.
    fn seek_inside(
        &self,
        node: &Node,
        inside: &Inside,
        offset: u64,
        data: bool,
    ) -> Result<Option<u64>> {
        if let Node::Guest(file) = node {
            let files = self.found(file, inside).file_system()?;
            return match data {
                true => files.next_data(file.inode, offset),
                false => files.next_hole(file.inode, offset),
            };
        }
        let end = inside.state().size();
        if offset >= end {
            return Ok(None);
        }
        let found = inside.chain().next(offset, data)?;
        Ok(found.or_else(|| (!data).then_some(end)))
    }
}
