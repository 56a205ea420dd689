//! Translates answers of the tree into fuser's replies.

use std::time::Duration;

use fuser::{
    Errno, FileAttr, FileType, Generation, INodeNo, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyWrite,
    ReplyXattr, Request,
};

use crate::tree::{Attr, Caller, Kept, Kind};
use crate::{Error, Result};

/// How long the kernel may cache a name or attributes that can change behind its back: a change by
/// BoxLite has to show within a second.
const MOMENT: Duration = Duration::from_millis(500);

/// How long the kernel may cache what never changes: a file of a guest in one state of its disk.
const LONG: Duration = Duration::from_secs(24 * 3600);

pub(super) fn caller(request: &Request) -> Caller {
    Caller { tid: request.pid() }
}

pub(super) fn errno(error: &Error) -> Errno {
    log::debug!("{error}");
    Errno::from_i32(error.errno())
}

pub(super) fn file_type(kind: Kind) -> FileType {
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

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
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
        blksize: attr.transfer,
        flags: 0,
    }
}

pub(super) fn ttl(attr: &Attr) -> Duration {
    match attr.kept {
        Kept::Not => Duration::ZERO,
        Kept::Moment => MOMENT,
        Kept::Long => LONG,
    }
}

pub(super) fn reply_entry(reply: ReplyEntry, result: Result<Attr>) {
    match result {
        Ok(attr) => reply.entry(&ttl(&attr), &file_attr(&attr), Generation(attr.generation)),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_attr(reply: ReplyAttr, result: Result<Attr>) {
    match result {
        Ok(attr) => reply.attr(&ttl(&attr), &file_attr(&attr)),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Answers a request for an extended attribute. A `size` of 0 asks how long the answer is.
pub(super) fn reply_xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>>) {
    match result {
        Ok(bytes) if size == 0 => reply.size(u32::try_from(bytes.len()).unwrap_or(u32::MAX)),
        Ok(bytes) if bytes.len() <= size as usize => reply.data(&bytes),
        Ok(_) => reply.error(Errno::ERANGE),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn reply_written(reply: ReplyWrite, result: Result<u32>) {
    match result {
        Ok(written) => reply.written(written),
        Err(error) => reply.error(errno(&error)),
    }
}
