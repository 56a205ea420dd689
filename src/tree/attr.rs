//! Attributes as stat shows them.

use std::time::SystemTime;

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// What stat shows of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number, which is also FUSE's node id.
    pub ino: u64,
    /// FUSE's generation: raised when an export's contents change, so that the kernel makes a new
    /// inode with pages and a size of its own, and whoever reads the old one gets EIO.
    pub generation: u64,
    /// Directory, file or link.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub perm: u16,
    /// Names; for a directory 2 and one for each subdirectory.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When the contents last changed.
    pub mtime: SystemTime,
    /// When it was made.
    pub created: SystemTime,
    /// Whether the kernel may keep name and attributes for a moment: false for all whose size or
    /// face can change.
    pub lasting: bool,
}

impl Attr {
    /// Blocks of 512 bytes. Never fewer than the size: cp takes a file with fewer for sparse, and
    /// reads it where it could have asked for a copy that moves nothing.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(512)
    }
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its inode number.
    pub ino: u64,
}
