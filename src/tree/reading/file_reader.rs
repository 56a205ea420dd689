//! Opens files for reading, and reads them.

use crate::exports::Source;
use crate::process::Caller;
use crate::store;
use crate::tree::nodes::box_json;
use crate::tree::nodes::kept_names::why_json;
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::reading::home_view::HomeView;
use crate::tree::reading::open_files::{Handle, Opened};
use crate::tree::staging::staged_file::StagedContent;
use crate::{Error, Result};

/// Opens a file for reading.
///
/// # Errors
/// EBUSY for the export of a running box, ENODATA, EISDIR, ESTALE, EIO.
pub fn open(home: &HomeView, caller: Caller, node: Node) -> Result<Opened> {
    if let Node::DiskImage(state) = &node
        && let Some(writing) = store::join_disk(&home.store, state.source())
    {
        return Ok(home.open.add_disk(writing));
    }
    let (handle, is_of_state) = match &node {
        Node::Export(source) => return home.exports.open_plain(caller, source),
        // The inode is of this state and no other.
        Node::Guest(_) | Node::DiskImage(_) => (home.guests.open(&node)?, true),
        Node::Running(Derived::DiskImage, source) => {
            (home.guests.open_running(caller, source)?, false)
        }
        Node::Log => (Handle::Log, false),
        Node::Status(version) => {
            let bytes = version.bytes.clone();
            (Handle::Bytes { node, bytes }, false)
        }
        Node::BoxJson(id) => {
            let record = home.boxes.record(id)?;
            let bytes = box_json::box_json(&record, store::usage_of_box(&home.store, id)?)?;
            (Handle::Bytes { node, bytes }, false)
        }
        Node::Why(id) => {
            let bytes = why_json(&home.boxes.kept_by_id(id)?.rows);
            (Handle::Bytes { node, bytes }, false)
        }
        Node::SnapshotJson(id, snapshot) => {
            let row = home.boxes.snapshot(id, snapshot)?;
            let usage = store::usage_of(
                &home.store,
                &Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: snapshot.clone(),
                },
            )?;
            let bytes = box_json::snapshot_json(&row, usage)?;
            (Handle::Bytes { node, bytes }, false)
        }
        _ => return Err(Error::new(libc::EISDIR, "that is a directory")),
    };
    Ok(opened(home, handle, is_of_state))
}

/// Opens a description that was copied in, with these bytes.
pub fn open_text(home: &HomeView, node: Node, bytes: Vec<u8>) -> Opened {
    opened(home, Handle::Bytes { node, bytes }, false)
}

/// Opens a file for reading if that takes no I/O. Returns None otherwise.
pub fn open_at_once(home: &HomeView, node: &Node) -> Option<Result<Opened>> {
    let handle = home.guests.open_held(node)?;
    Some(handle.map(|handle| opened(home, handle, true)))
}

/// Adds a handle. If it `is_of_state`, the inode is of one state of a disk, and so are the pages that
/// the kernel has of it.
fn opened(home: &HomeView, handle: Handle, is_of_state: bool) -> Opened {
    Opened {
        handle: home.open.add(handle),
        direct: !is_of_state,
        keep_pages: is_of_state,
        spool: None,
    }
}

/// Fills `buf` with a file's bytes from `offset` on, completely unless it ends; returns how many
/// bytes that are.
///
/// # Errors
/// EIO when the disk changes while it is read; EBADF.
pub fn read(home: &HomeView, handle: &Handle, offset: u64, buf: &mut [u8]) -> Result<usize> {
    match handle {
        Handle::Export { .. } | Handle::Compressed { .. } => home.exports.read(handle, offset, buf),
        Handle::Inside { node, inside } => home.guests.read(node, inside, offset, buf),
        Handle::Disk(writing) => writing.read(offset, buf),
        Handle::Bytes { bytes, .. } => Ok(copy_out(bytes, offset, buf)),
        Handle::Log => {
            let bytes = home.store.events().read_at(offset, buf.len());
            Ok(copy_out(&bytes, 0, buf))
        }
        Handle::Writing(file) if file.is_edit() => match &file.state().content {
            StagedContent::Text(text) => Ok(copy_out(text, offset, buf)),
            _ => Ok(0),
        },
        Handle::List(_) | Handle::GuestDirectory { .. } | Handle::Writing(_) => {
            Err(Error::new(libc::EBADF, "that is not open for reading"))
        }
    }
}

/// Returns where from `offset` on there is data (`data`), or a hole: lseek(2) with SEEK_DATA or
/// SEEK_HOLE.
///
/// # Errors
/// ENXIO past the end; EIO for what is damaged.
pub fn seek(home: &HomeView, handle: &Handle, offset: u64, data: bool) -> Result<u64> {
    let past_the_end = || Error::new(libc::ENXIO, "there is nothing more in the file");
    // What we make has no holes.
    let end = match handle {
        Handle::Inside { node, inside } => {
            let found = home.guests.seek(node, inside, offset, data)?;
            return found.ok_or_else(past_the_end);
        }
        Handle::Log => home.store.events().len(),
        other => other.size().ok_or_else(past_the_end)?,
    };
    if offset >= end {
        return Err(past_the_end());
    }
    Ok(if data { offset } else { end })
}

/// Copies what of `bytes` lies from `offset` on into `buf`; returns how much that is.
fn copy_out(bytes: &[u8], offset: u64, buf: &mut [u8]) -> usize {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let from = bytes.get(offset..).unwrap_or_default();
    let len = from.len().min(buf.len());
    if let (Some(to), Some(from)) = (buf.get_mut(..len), from.get(..len)) {
        to.copy_from_slice(from);
    }
    len
}
