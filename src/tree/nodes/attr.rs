//! Attributes as stat shows them.

use std::ffi::OsString;
use std::time::SystemTime;

use crate::home::Owner;
use crate::tree::nodes::node::Node;

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A character device of a guest.
    CharDevice,
    /// A block device of a guest.
    BlockDevice,
    /// A pipe of a guest.
    Fifo,
    /// A socket of a guest.
    Socket,
}

/// How long the kernel may keep a name and its attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Not at all: its size can change, or what callers see of it.
    Not,
    /// For a moment.
    Moment,
    /// As long as it likes, for what never changes.
    Long,
}

/// What tools are told to read at once: with more they read no faster, and map worse pieces.
pub const READ_AT_ONCE: u32 = 4096;
/// What tools are told to write at once. Each write is a request of its own, and cp makes them of
/// 128 KiB unless it is told otherwise.
const WRITTEN_AT_ONCE: u32 = 1 << 20;

/// What stat shows of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number, which is also FUSE's node id.
    pub ino: u64,
    /// FUSE's generation. It is raised when an export's contents change, so that the kernel makes a
    /// new inode with pages and a size of its own, and readers of the old one get EIO.
    pub generation: u64,
    /// Directory, file or link.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes. For what we make never fewer than the size has: cp takes a file with
    /// fewer for sparse, and reads it where it could have asked for a copy that moves no byte.
    pub blocks: u64,
    /// How many bytes tools that ask should read or write at once.
    pub transfer: u32,
    /// Permission bits.
    pub perm: u16,
    /// Number of names; for a directory 2 and one for each subdirectory.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device number, of a guest's device.
    pub device: u32,
    /// When it was last read.
    pub atime: SystemTime,
    /// When the contents last changed.
    pub mtime: SystemTime,
    /// When anything of it last changed.
    pub ctime: SystemTime,
    /// When it was made.
    pub created: SystemTime,
    /// How long the kernel may keep name and attributes.
    pub kept: Kept,
}

impl Attr {
    /// Returns the attributes of a directory with this many subdirectories.
    pub fn of_directory(
        owner: Owner,
        node: &Node,
        subdirectories: usize,
        changed: SystemTime,
    ) -> Attr {
        Attr {
            kind: Kind::Directory,
            size: 0,
            blocks: 0,
            // As open as the home is, and never more.
            perm: 0o755 & u16::try_from(owner.mode & 0o777).unwrap_or(0o700),
            nlink: u32::try_from(subdirectories + 2).unwrap_or(u32::MAX),
            kept: Kept::Moment,
            ..Attr::of_file(owner, node, 0, changed)
        }
    }

    /// Returns the attributes of a regular file of this many bytes.
    pub fn of_file(owner: Owner, node: &Node, size: u64, changed: SystemTime) -> Attr {
        Attr {
            ino: node.ino(),
            generation: 0,
            kind: Kind::File,
            size,
            blocks: size.div_ceil(512),
            transfer: READ_AT_ONCE,
            device: 0,
            // Archives hold secrets, and disks the data of guests: only the owner of the home may
            // read them.
            perm: 0o600,
            nlink: 1,
            uid: owner.uid,
            gid: owner.gid,
            atime: changed,
            mtime: changed,
            ctime: changed,
            created: changed,
            kept: Kept::Not,
        }
    }

    /// Returns the attributes of a file that is being written, of this many bytes so far.
    pub fn of_arriving_file(owner: Owner, node: &Node, size: u64, changed: SystemTime) -> Attr {
        Attr {
            transfer: WRITTEN_AT_ONCE,
            ..Attr::of_file(owner, node, size, changed)
        }
    }

    /// Returns the attributes of a symbolic link to a target of this many bytes.
    pub fn of_link(owner: Owner, node: &Node, size: u64, changed: SystemTime) -> Attr {
        Attr {
            kind: Kind::Symlink,
            perm: 0o777,
            ..Attr::of_file(owner, node, size, changed)
        }
    }

    /// Sets another size, with as many blocks as that takes.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        self.blocks = size.div_ceil(512);
    }
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: OsString,
    /// What it is.
    pub kind: Kind,
    /// Its inode number.
    pub ino: u64,
}

/// What a listing wants of each name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WantedOfList {
    /// The name, what kind of file it is of, and its number.
    Names,
    /// Attributes too; the kernel is told of each file whose attributes it gets.
    Attributes,
}

/// Takes an entry, the offset after it, and its attributes; None where those are not wanted, or
/// can't be read. Returns true if there was no room for it.
pub type Add<'a, 'f> = &'a mut (dyn FnMut(&DirEntry, u64, Option<&Attr>) -> bool + 'f);
