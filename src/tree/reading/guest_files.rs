//! `rootfs` and `disk.img`: what is in a disk, by the hidden view.

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::exports::{DiskState, OpenDisk, Source};
use crate::guest::{FileSystem, Guest};
use crate::home::is_kept_id;
use crate::process::Caller;
use crate::store::{self, Store};
use crate::tree::nodes::attr::{Add, Attr, DirEntry, Kept, Kind, WantedOfList};
use crate::tree::nodes::guest_numbers::GuestAccess;
use crate::tree::nodes::node::{Derived, GuestFile, Node};
use crate::tree::reading::guest_file::{
    GuestNodes, OpenGuestFile, not_there, partition_name, shown_partitions,
};
use crate::tree::reading::open_files::Handle;
use crate::{Error, Result};

/// The files in the disks of a home, for reading.
pub struct GuestFiles {
    store: Arc<Store>,
    nodes: GuestNodes,
}

/// EROFS for changes in a disk.
pub fn only_for_reading() -> Error {
    Error::new(libc::EROFS, "the files in a disk are read-only")
}

impl GuestFiles {
    /// Returns the files in the disks of a home.
    pub fn new(store: Arc<Store>, nodes: GuestNodes) -> GuestFiles {
        GuestFiles { store, nodes }
    }

    /// Returns the state of the disk that `rootfs` and `disk.img` of a source stand for now.
    ///
    /// # Errors
    /// ENODATA, EBUSY, EIO.
    pub fn look_inside(&self, source: &Source) -> Result<Arc<OpenDisk>> {
        self.store
            .exports()
            .views
            .open(source)
            .map_err(|error| self.log_failed_look(source, error))
    }

    /// Returns the disk of a running box in the state that it has now, or that the caller's process
    /// has just seen.
    ///
    /// # Errors
    /// EBUSY when that is not cheap, ENOSPC, EIO.
    pub fn look_into_running(&self, caller: Caller, source: &Source) -> Result<Arc<OpenDisk>> {
        let views = &self.store.exports().views;
        views
            .look(source, caller.process())
            .map_err(|error| self.log_failed_look(source, error))
    }

    /// Finds a name in `rootfs` of a running box.
    ///
    /// # Errors
    /// ENOENT, and those of [`GuestFiles::look_into_running`].
    pub fn lookup_in_running(&self, caller: Caller, source: &Source, name: &OsStr) -> Result<Attr> {
        let inside = self.look_into_running(caller, source)?;
        let mut attr = self.lookup(&self.root_of(&inside)?, name)?;
        // Another look finds another state.
        attr.kept = Kept::Not;
        Ok(attr)
    }

    /// Opens `rootfs` of a running box for listing.
    ///
    /// # Errors
    /// Those of [`GuestFiles::look_into_running`] and of listing.
    pub fn list_running(&self, caller: Caller, source: &Source) -> Result<Handle> {
        let inside = self.look_into_running(caller, source)?;
        let root = self.root_of(&inside)?;
        if root.is_ours() {
            return Ok(Handle::List(self.list_partitions(&root)?));
        }
        self.open_directory(&root)
    }

    /// Returns whether finding a name may have to wait: for the clock of a file system, that of what
    /// is in a disk that was written to just now, or for a copy of a running box's disk.
    pub fn lookup_may_wait(&self, parent: &Node, name: &OsStr) -> bool {
        let derived = name.to_str().and_then(Derived::named);
        let looks_inside = matches!(derived, Some(Derived::Rootfs | Derived::DiskImage));
        match parent {
            Node::Running(..) => true,
            Node::ViewOf(source) if looks_inside => self.store.exports().views.may_wait(source),
            _ => false,
        }
    }

    /// Returns the disk in the state that a file is in.
    ///
    /// # Errors
    /// ESTALE when the disk has changed.
    fn inside(&self, state: &DiskState) -> Result<Arc<OpenDisk>> {
        let inside = self.store.exports().views.reopen(state)?;
        inside.refuse_changed()?;
        Ok(inside)
    }

    /// Runs `work` with a file of a guest, and refuses the result if the disk changed meanwhile.
    fn with_guest<T>(
        &self,
        file: &GuestFile,
        work: impl FnOnce(&OpenGuestFile<'_>) -> Result<T>,
    ) -> Result<T> {
        let inside = self.store.exports().views.reopen(file.state())?;
        self.with_inside(file, &inside, work)
    }

    /// Does the same with a disk that is open.
    fn with_inside<T>(
        &self,
        file: &GuestFile,
        inside: &OpenDisk,
        work: impl FnOnce(&OpenGuestFile<'_>) -> Result<T>,
    ) -> Result<T> {
        let done = work(&self.found(file, inside));
        // What was read while the disk changed does not count, and neither does damage that was
        // seen then.
        inside.refuse_changed()?;
        done.map_err(|error| self.log_failed_look(file.state().source(), error))
    }

    /// Returns a file together with its disk.
    fn found<'a>(&'a self, file: &'a GuestFile, inside: &'a OpenDisk) -> OpenGuestFile<'a> {
        OpenGuestFile {
            nodes: &self.nodes,
            file,
            inside,
        }
    }

    /// Returns the directory that all of a guest is in.
    ///
    /// # Errors
    /// ENFILE when the kernel knows files of too many volumes.
    pub fn root_of(&self, inside: &OpenDisk) -> Result<GuestFile> {
        let guest = inside.guest();
        let is_file_system = guest.is_ok_and(|guest| guest.file_system().is_some());
        Ok(GuestFile {
            volume: self
                .nodes
                .numbers
                .volume(inside.state(), 0, GuestAccess::Plain)?,
            inode: if is_file_system { FileSystem::ROOT } else { 0 },
        })
    }

    /// Logs what can't be read of a guest, once. A file that does not exist, or does not exist any
    /// more, is not logged.
    fn log_failed_look(&self, source: &Source, error: Error) -> Error {
        if !matches!(error.errno(), libc::ESTALE | libc::ENOENT | libc::ENODATA) {
            let what = self.store.exports().disks.describe(source);
            let message = format!("looking into {what}: {error}");
            self.store.events().info_once(&message);
        }
        error
    }

    /// Finds a name in a directory of a guest; the kernel is told of what is found.
    ///
    /// # Errors
    /// ENOENT, ESTALE, EIO for what is damaged.
    pub fn lookup(&self, parent: &GuestFile, name: &OsStr) -> Result<Attr> {
        let (file, attr) = self.with_guest(parent, |parent| parent.child(name))?;
        self.nodes.kernel.tell(&Node::Guest(file));
        Ok(attr)
    }

    /// Returns the attributes of a file of a guest, as the guest has them.
    ///
    /// # Errors
    /// ESTALE, EIO for what is damaged.
    pub fn attr(&self, file: &GuestFile) -> Result<Attr> {
        self.with_guest(file, |found| found.attr())
    }

    /// Returns whether the attributes of a file take one look into a disk that is open.
    pub fn has_attr_at_hand(&self, file: &GuestFile) -> bool {
        file.volume.access == GuestAccess::Plain
            && self.store.exports().views.held(file.state()).is_some()
    }

    /// Returns the attributes of the raw disk.
    ///
    /// # Errors
    /// ESTALE, EIO.
    pub fn disk_image_attr(&self, state: &Arc<DiskState>) -> Result<Attr> {
        let node = Node::DiskImage(state.clone());
        let of_file = |changed| Attr::of_file(self.nodes.owner, &node, state.size(), changed);
        if store::written_disk(&self.store, state.source()).is_some() {
            return Ok(of_file(SystemTime::now()));
        }
        let allocated = self
            .inside(state)?
            .allocated()
            .map_err(|error| self.log_failed_look(state.source(), error))?;
        let mut attr = of_file(state.changed());
        let source = state.source();
        let is_live = matches!(source, Source::Live { .. }) && !is_kept_id(source.box_id());
        if !is_live || self.store.is_read_only() {
            attr.perm &= !0o222;
        }
        attr.blocks = allocated.div_ceil(512);
        attr.kept = Kept::Moment;
        Ok(attr)
    }

    /// Returns the partitions, in the directory that has them.
    ///
    /// # Errors
    /// ESTALE, EIO for what is damaged, ENFILE.
    pub fn list_partitions(&self, file: &GuestFile) -> Result<Vec<DirEntry>> {
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

    /// Opens a directory of a guest for listing.
    ///
    /// # Errors
    /// ESTALE, EIO for what is damaged.
    pub fn open_directory(&self, file: &GuestFile) -> Result<Handle> {
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
    ///
    /// # Errors
    /// ESTALE, EIO for what is damaged, ENFILE.
    pub fn list(
        &self,
        (file, inside): (&GuestFile, &OpenDisk),
        offset: u64,
        wanted: WantedOfList,
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
            // Damage is an error only where no name comes before it.
            match done {
                Err(_) if !added.is_empty() => Ok(()),
                done => done,
            }
        });
        if listed.is_err() && wanted == WantedOfList::Attributes {
            for ino in added {
                self.nodes.kernel.forget(ino, 1);
            }
        }
        listed
    }

    /// Returns the target of a guest's symbolic link: what leads to the guest's own file, or, with
    /// the option `links=guest`, what the guest said.
    ///
    /// # Errors
    /// ESTALE, EIO for what is damaged.
    pub fn link(&self, file: &GuestFile) -> Result<PathBuf> {
        let target = self.with_guest(file, |found| found.link())?;
        Ok(OsString::from_vec(target).into())
    }

    /// Opens a file of a guest, or the raw disk, for reading.
    ///
    /// # Errors
    /// ESTALE, EIO.
    pub fn open(&self, node: &Node) -> Result<Handle> {
        let state = match node {
            Node::Guest(file) => file.state(),
            Node::DiskImage(state) => state,
            _ => return Err(not_there()),
        };
        Ok(Handle::Inside {
            node: node.clone(),
            inside: self.inside(state)?,
        })
    }

    /// Opens a guest's file without I/O if its disk is already open. Returns None otherwise.
    pub fn open_held(&self, node: &Node) -> Option<Result<Handle>> {
        let Node::Guest(file) = node else {
            return None;
        };
        let inside = self.store.exports().views.held(file.state())?;
        let node = node.clone();
        let opened = inside.refuse_changed();
        Some(opened.map(|()| Handle::Inside { node, inside }))
    }

    /// Opens the raw disk of a running box for reading.
    ///
    /// # Errors
    /// Those of [`GuestFiles::look_into_running`].
    pub fn open_running(&self, caller: Caller, source: &Source) -> Result<Handle> {
        let inside = self.look_into_running(caller, source)?;
        let node = Node::DiskImage(inside.state().clone());
        Ok(Handle::Inside { node, inside })
    }

    /// Fills `buf` from `offset` on; returns how many bytes there were.
    ///
    /// # Errors
    /// ESTALE, EIO for what is damaged.
    pub fn read(
        &self,
        node: &Node,
        inside: &OpenDisk,
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
        read.map_err(|error| self.log_failed_look(inside.state().source(), error))
    }

    /// Returns where from `offset` on a file has data (`data`), or a hole; its end is one. None
    /// past the end.
    ///
    /// # Errors
    /// EIO for what is damaged, ESTALE.
    pub fn seek(
        &self,
        node: &Node,
        inside: &OpenDisk,
        offset: u64,
        data: bool,
    ) -> Result<Option<u64>> {
        let found = self.find_next(node, inside, offset, data);
        inside.refuse_changed()?;
        found.map_err(|error| self.log_failed_look(inside.state().source(), error))
    }

    /// Returns an extended attribute of a guest's file.
    ///
    /// # Errors
    /// ENODATA, ESTALE, EIO for what is damaged.
    pub fn xattr(&self, file: &GuestFile, name: &OsStr) -> Result<Vec<u8>> {
        let found = if file.is_ours() {
            None
        } else {
            self.with_guest(file, |found| {
                let files = found.file_system()?;
                files.xattr(found.file.inode, name.as_bytes())
            })?
        };
        found.ok_or_else(|| Error::new(libc::ENODATA, "there is no such attribute"))
    }

    /// Returns the names of all of them, each ended by a NUL. As everywhere, `trusted.*` is only
    /// for callers that may read it.
    ///
    /// # Errors
    /// ESTALE, EIO for what is damaged.
    pub fn xattr_names(&self, caller: Caller, file: &GuestFile) -> Result<Vec<u8>> {
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

    /// Returns the same, without a look whether the disk changed.
    fn find_next(
        &self,
        node: &Node,
        inside: &OpenDisk,
        offset: u64,
        data: bool,
    ) -> Result<Option<u64>> {
        if let Node::Guest(file) = node {
            let files = self.found(file, inside).file_system()?;
            return if data {
                files.next_data(file.inode, offset)
            } else {
                files.next_hole(file.inode, offset)
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
