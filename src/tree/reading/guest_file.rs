//! A file or directory of a guest: its attributes, its names, and how it may be used.

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::exports::{DiskState, OpenDisk};
use crate::guest::{Attributes, Entry, FileKind, FileSystem, Guest, LinkPlace, Time};
use crate::home::Owner;
use crate::tree::Links;
use crate::tree::nodes::attr::{Add, Attr, DirEntry, Kept, Kind, READ_AT_ONCE, WantedOfList};
use crate::tree::nodes::guest_numbers::{GuestAccess, GuestNumbers, GuestVolume};
use crate::tree::nodes::kernel_view::KernelView;
use crate::tree::nodes::node::{GuestFile, Node};
use crate::{Error, Result};

/// ENOENT for a name that the guest has no file of.
pub fn not_there() -> Error {
    Error::new(libc::ENOENT, "the guest has no such file")
}

/// What the nodes of guests' files follow from.
pub struct GuestNodes {
    /// What they are numbered by.
    pub numbers: GuestNumbers,
    /// What links are shown to say.
    pub links: Links,
    /// The owner of the home.
    pub owner: Owner,
    /// What the kernel was told of them.
    pub kernel: Arc<KernelView>,
}

/// A file of a guest, and the disk that it is read from.
pub struct OpenGuestFile<'a> {
    /// What its node follows from.
    pub nodes: &'a GuestNodes,
    /// The file.
    pub file: &'a GuestFile,
    /// The disk.
    pub inside: &'a OpenDisk,
}

impl GuestFile {
    /// Returns whether it is no directory of the guest, but the one that has the partitions, or
    /// nothing that can be read.
    pub fn is_ours(&self) -> bool {
        self.inode == 0
    }

    /// Returns the state of the disk that it is in.
    pub fn state(&self) -> &Arc<DiskState> {
        &self.volume.state
    }
}

impl<'a> OpenGuestFile<'a> {
    /// Returns the file system that it is in.
    ///
    /// # Errors
    /// ENOENT where the disk has none; EIO for one that can't be read.
    pub fn file_system(&self) -> Result<&'a FileSystem> {
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

    /// Returns the file system, to go on to what is in this directory.
    ///
    /// # Errors
    /// EIO for a directory that must not be entered, and those of `file_system`.
    pub fn enter(&self) -> Result<&'a FileSystem> {
        match self.file.volume.access {
            GuestAccess::Closed => Err(Error::damaged(format!(
                "the `..` of the directory with inode {} does not lead back to where the directory was \
                 found; e2fsck repairs that, and the mount option links=guest ignores it",
                self.file.inode
            ))),
            _ => self.file_system(),
        }
    }

    /// Finds a name in this directory. Returns the file and its attributes.
    ///
    /// # Errors
    /// ENOENT; EIO for what is damaged.
    pub fn child(&self, name: &OsStr) -> Result<(GuestFile, Attr)> {
        if self.file.is_ours() {
            let guest = self.inside.guest().map_err(|_| not_there())?;
            let number = shown_partitions(guest)
                .find(|number| name == OsStr::new(&partition_name(*number)))
                .ok_or_else(not_there)?;
            let file = self.root_of_partition(number)?;
            let attr = self.other(&file).attr()?;
            return Ok((file, attr));
        }
        let found = self.enter()?.lookup(self.file.inode, name.as_bytes())?;
        self.child_of_inode(found.ok_or_else(not_there)?)
    }

    /// Returns the file with this inode in this directory, and its attributes.
    fn child_of_inode(&self, inode: u32) -> Result<(GuestFile, Attr)> {
        let attributes = self.enter()?.attributes(inode)?;
        let access = self.access_of(&attributes)?;
        let file = self.file_as(inode, access)?;
        let attr = self.other(&file).shown(&attributes)?;
        Ok((file, attr))
    }

    /// Returns how a file in this directory may be used.
    fn access_of(&self, attributes: &Attributes) -> Result<GuestAccess> {
        let (files, directory) = (self.file_system()?, self.file.inode);
        let inode = attributes.inode;
        Ok(match (self.nodes.links, attributes.kind) {
            (Links::Guest, _) => GuestAccess::Plain,
            (Links::Inside, FileKind::Directory) => {
                // A damaged directory can be seen; the error comes when it is listed.
                if files.is_entered_from(inode, directory).unwrap_or(false) {
                    GuestAccess::Plain
                } else {
                    GuestAccess::Closed
                }
            }
            (Links::Inside, FileKind::Symlink) => match files.link_place(inode, directory) {
                Ok(place) => GuestAccess::of_link(place),
                Err(_) => GuestAccess::LinkAt(0),
            },
            (Links::Inside, _) => GuestAccess::Plain,
        })
    }

    /// Returns a file of the same partition and state.
    fn file_as(&self, inode: u32, access: GuestAccess) -> Result<GuestFile> {
        let here = &self.file.volume;
        let volume = if here.access == access {
            here.clone()
        } else {
            let GuestVolume {
                state, partition, ..
            } = &**here;
            self.nodes.numbers.volume(state, *partition, access)?
        };
        Ok(GuestFile { volume, inode })
    }

    /// Returns the root directory of a partition.
    ///
    /// # Errors
    /// ENFILE when the kernel knows files of too many volumes.
    pub fn root_of_partition(&self, partition: u32) -> Result<GuestFile> {
        let (numbers, state) = (&self.nodes.numbers, self.file.state());
        Ok(GuestFile {
            volume: numbers.volume(state, partition, GuestAccess::Plain)?,
            inode: FileSystem::ROOT,
        })
    }

    /// Returns another file of the same disk.
    fn other<'b>(&'b self, file: &'b GuestFile) -> OpenGuestFile<'b> {
        OpenGuestFile { file, ..*self }
    }

    /// Returns its attributes, as the guest has them.
    ///
    /// # Errors
    /// EIO for what is damaged.
    pub fn attr(&self) -> Result<Attr> {
        let directory = |below| {
            let node = Node::Guest(self.file.clone());
            let changed = self.file.state().changed();
            Attr::of_directory(self.nodes.owner, &node, below, changed)
        };
        if self.file.is_ours() {
            let guest = self.inside.guest();
            return Ok(directory(guest.map_or(0, |guest| guest.partitions().len())));
        }
        match self.attributes() {
            // A partition that can't be read has a directory; the error comes when that is listed.
            Err(_) if self.file.inode == FileSystem::ROOT && self.file.volume.partition > 0 => {
                Ok(directory(0))
            }
            attributes => self.shown(&attributes?),
        }
    }

    /// Returns the target of a symbolic link, as it is shown.
    ///
    /// # Errors
    /// EIO for what is damaged.
    pub fn link(&self) -> Result<Vec<u8>> {
        let (files, inode) = (self.file_system()?, self.file.inode);
        match self.file.volume.access {
            GuestAccess::LinkAt(depth) => files.link_within(inode, LinkPlace::Depth(depth)),
            GuestAccess::LinkIn(directory) => {
                files.link_within(inode, LinkPlace::Directory(directory))
            }
            _ => files.read_link(inode),
        }
    }

    /// Returns what stat shows of it.
    fn shown(&self, attributes: &Attributes) -> Result<Attr> {
        let size = match (attributes.kind, self.file.volume.access) {
            // A link that can't be read has its own size; the error comes when it is read.
            (FileKind::Symlink, GuestAccess::LinkAt(_) | GuestAccess::LinkIn(_)) => self
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
            transfer: READ_AT_ONCE,
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
                GuestAccess::Closed => Kept::Moment,
                _ => Kept::Long,
            },
        })
    }

    /// Gives the names from `offset` on to `add` until it is full.
    ///
    /// # Errors
    /// EIO for what is damaged; ENFILE.
    pub fn list_from(&self, offset: u64, wanted: WantedOfList, add: Add<'_, '_>) -> Result<()> {
        let files = self.enter()?;
        let symlinks = match self.nodes.links {
            Links::Guest => GuestAccess::Plain,
            Links::Inside => GuestAccess::LinkAt(files.depth(self.file.inode).unwrap_or(0)),
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

    /// Gives one name to `add`. Returns whether there was no room for it.
    fn add_entry(
        &self,
        entry: &Entry<'_>,
        symlinks: GuestAccess,
        wanted: WantedOfList,
        add: Add<'_, '_>,
    ) -> Result<bool> {
        // Where the directory does not say what a file is, its inode does.
        let attributes = || self.file_system()?.attributes(entry.inode);
        let kind = entry.kind.or_else(|| Some(attributes().ok()?.kind));
        let kind = kind.map_or(Kind::File, kind_of);
        let child = match wanted {
            WantedOfList::Attributes => self.child_of_inode(entry.inode).ok(),
            WantedOfList::Names => None,
        };
        let (file, attr) = match child {
            Some((file, attr)) => (file, Some(attr)),
            None => {
                let access = match (wanted, kind) {
                    (_, Kind::Symlink) => symlinks,
                    // The attributes can't be read, so the kernel must not take it for a directory
                    // that it may enter.
                    (WantedOfList::Attributes, _) => GuestAccess::Closed,
                    (WantedOfList::Names, _) => GuestAccess::Plain,
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
        if wanted == WantedOfList::Attributes {
            self.nodes.kernel.tell(&node);
        }
        let is_full = add(&listed, entry.next, attr.as_ref());
        if is_full && wanted == WantedOfList::Attributes {
            self.nodes.kernel.forget(listed.ino, 1);
        }
        Ok(is_full)
    }
}

/// Returns the numbers of the partitions.
pub fn shown_partitions(guest: &Guest) -> impl Iterator<Item = u32> + '_ {
    guest.partitions().iter().map(|it| it.number())
}

/// Returns the name of a partition's directory.
pub fn partition_name(number: u32) -> String {
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
    let second = if time.seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    second
        .and_then(|second| second.checked_add(within))
        .unwrap_or(UNIX_EPOCH)
}
