//! Replies with directory listings.

use fuser::{Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::reply::{errno, file_attr, file_type, ttl};
use crate::tree::{Attr, Caller, DirEntry, Kind, Tree, WantedOfList};

/// Replies with names, from an offset on. `place` is the directory's inode and its handle.
pub(super) fn reply_names(
    tree: &Tree,
    caller: Caller,
    place: (u64, u64),
    offset: u64,
    mut reply: ReplyDirectory,
) {
    for (next, entry) in (1..).zip(dots(place.0)).skip(dots_before(offset)) {
        if reply.add(INodeNo(entry.ino), next, file_type(entry.kind), &entry.name) {
            return reply.ok();
        }
    }
    let mut add = |entry: &DirEntry, next: u64, _: Option<&Attr>| {
        reply.add(INodeNo(entry.ino), next, file_type(entry.kind), &entry.name)
    };
    match tree.read_list(caller, place, offset, WantedOfList::Names, &mut add) {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Replies with names and the attributes of each.
pub(super) fn reply_attributes(
    tree: &Tree,
    caller: Caller,
    place: (u64, u64),
    offset: u64,
    mut reply: ReplyDirectoryPlus,
) {
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
    for (next, entry) in (1..).zip(dots(place.0)).skip(dots_before(offset)) {
        if add(&entry, next, None) {
            return reply.ok();
        }
    }
    match tree.read_list(caller, place, offset, WantedOfList::Attributes, &mut add) {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// The two entries of a directory that the tree does not list: itself and its parent.
fn dots(ino: u64) -> [DirEntry; 2] {
    // The kernel uses its own tree for both; the numbers are only shown.
    [".", ".."].map(|name| DirEntry {
        name: name.into(),
        kind: Kind::Directory,
        ino,
    })
}

/// How many of those two are before an offset.
fn dots_before(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
