//! Nodes: the files and directories of the mount. A node is identified by what it stands for, never
//! by a path, and its inode number follows from that. So it is stable across remounts, renames and
//! staging.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::exports::{DiskState, Source};
use crate::tree::nodes::guest_numbers::GuestVolume;
use crate::tree::nodes::names::{COMPRESSED, DISK_IMAGE, ROOTFS};

/// A file or directory of the mount.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Node {
    /// The mount's root: one directory per box.
    Root,
    /// `.boxlite`, reachable by name and never listed.
    Hidden,
    /// `.boxlite/log`.
    Log,
    /// A version of `.boxlite/status`.
    Status(Arc<StatusVersion>),
    /// `.boxlite/undo`: what can be had back.
    Undo,
    /// `why.json` of an entry, by its id.
    Why(String),
    /// The directory of a box, by its id; also while it is being made. Or that of an entry.
    Box(String),
    /// `box.json` of a box.
    BoxJson(String),
    /// `export.boxlite` of a box or a snapshot.
    Export(Source),
    /// A link in the directory of a box or a snapshot, which points into the view.
    Link(Derived, Source),
    /// `export.boxlite.zst`, in the view.
    Compressed(Source),
    /// `disk.img`, in the view.
    DiskImage(Arc<DiskState>),
    /// `rootfs`, in the view, and what is in it.
    Guest(GuestFile),
    /// `rootfs` or `disk.img` of a box that runs, in the view. To look at it starts nothing; what is
    /// in it is of the state that the disk has when somebody looks into it.
    Running(Derived, Source),
    /// `.boxlite/view`.
    View,
    /// `.boxlite/view/BOX`, and `.boxlite/view/BOX/snapshots/NAME`.
    ViewOf(Source),
    /// `.boxlite/view/BOX/snapshots`.
    ViewSnapshots(String),
    /// `snapshots` of a box.
    Snapshots(String),
    /// The directory of a snapshot: box id, snapshot id.
    Snapshot(String, String),
    /// `snapshot.json` of a snapshot: box id, snapshot id.
    SnapshotJson(String, String),
    /// Something a copy tool made that stands for nothing by itself: an archive dropped in the
    /// root, a temporary file, a name that is accepted and dropped.
    Made(u64),
}

/// Numbers the nodes that stand for nothing by themselves.
#[derive(Debug, Default)]
pub struct MadeNodes(AtomicU64);

impl MadeNodes {
    /// Returns a node that no other has been.
    pub fn next(&self) -> Node {
        Node::Made(self.0.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// What is shown of a disk state in the view, and by links that point there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Derived {
    /// The archive, compressed.
    Compressed,
    /// The guest's files.
    Rootfs,
    /// The raw disk.
    DiskImage,
}

impl Derived {
    /// All of them, in the order they are listed.
    pub const ALL: [Derived; 3] = [Derived::Compressed, Derived::Rootfs, Derived::DiskImage];

    /// Returns its name, in the view and in the directory of a box or a snapshot.
    pub fn name(self) -> &'static str {
        match self {
            Derived::Compressed => COMPRESSED,
            Derived::Rootfs => ROOTFS,
            Derived::DiskImage => DISK_IMAGE,
        }
    }

    /// Returns the one with this name.
    pub fn named(name: &str) -> Option<Derived> {
        Derived::ALL
            .into_iter()
            .find(|derived| derived.name() == name)
    }

    /// Returns its place among the files of a directory.
    fn place(self) -> u64 {
        match self {
            Derived::Compressed => 3,
            Derived::Rootfs => 4,
            Derived::DiskImage => 5,
        }
    }
}

/// One version of `.boxlite/status`.
#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StatusVersion {
    /// Tells it from others.
    pub number: u64,
    /// Its text.
    pub bytes: Vec<u8>,
    /// When it was made.
    pub made: SystemTime,
}

/// A file of a guest, as it was in one state of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestFile {
    /// The partition it is in, and the state.
    pub volume: Arc<GuestVolume>,
    /// The guest's inode number; 0 for the directory of the partitions.
    pub inode: u32,
}

/// The root's number in FUSE.
pub const ROOT_INO: u64 = 1;

/// All inode numbers are smaller. Programs that keep them as floating point numbers, as JavaScript
/// does, can tell them apart only up to here.
pub const NUMBERS: u64 = 1 << 53;

/// The bit that the numbers of guests' files have, and no others. These numbers say by themselves
/// what they are of: 20 bits are for the slot of the volume, 32 for the guest's own number.
const OF_GUEST: u64 = NUMBERS >> 1;

/// The bits of a number that are a hash.
const HASHED: u64 = OF_GUEST - 0x10;

/// Returns the slot of the volume and the inode that a number is of, if it is a guest file's.
pub fn guest_number(ino: u64) -> Option<(u32, u32)> {
    let of_guest = ino & OF_GUEST != 0;
    of_guest.then_some(((ino >> 32) as u32 & 0xf_ffff, ino as u32))
}

/// Returns the number to take where another node has this one already.
pub fn next_number(ino: u64) -> u64 {
    let group = ino.wrapping_add(0x10) & HASHED;
    group.max(0x10) | (ino & 0xf)
}

impl Node {
    /// Returns the inode number: 1 for the root, else 48 bits of a hash of the box or snapshot, and
    /// the place of the file in its directory. cp goes by inode numbers. So box.json, which says
    /// that a whole box is being copied, always comes first, and the snapshots come when the box
    /// exists.
    ///
    /// Two nodes may want one number, though hardly ever. The node that the kernel is told of later
    /// then gets another.
    pub fn ino(&self) -> u64 {
        let (key, place) = match self {
            Node::Root => return ROOT_INO,
            Node::Hidden => ("hidden".to_owned(), 0),
            Node::Log => ("hidden".to_owned(), 1),
            Node::View => ("hidden".to_owned(), 2),
            Node::Undo => ("hidden".to_owned(), 3),
            Node::Status(version) => (format!("status/{}", version.number), 0),
            Node::Box(id) => (format!("box/{id}"), 0),
            Node::BoxJson(id) => (format!("box/{id}"), 1),
            Node::Why(id) => (format!("box/{id}"), 6),
            Node::Snapshot(id, snapshot) => (format!("box/{id}/snapshot/{snapshot}"), 0),
            Node::SnapshotJson(id, snapshot) => (format!("box/{id}/snapshot/{snapshot}"), 1),
            Node::Export(source) => (key_of(source), 2),
            Node::Link(derived, source) => (key_of(source), derived.place()),
            Node::DiskImage(state) => (format!("inside/{}", state.number()), 5),
            Node::Guest(file) => {
                let slot = u64::from(file.volume.slot());
                return OF_GUEST | slot << 32 | u64::from(file.inode);
            }
            Node::Snapshots(id) => (format!("box/{id}"), 15),
            Node::ViewOf(source) => (format!("view/{}", key_of(source)), 0),
            Node::Compressed(source) => (format!("view/{}", key_of(source)), 3),
            Node::Running(derived, source) => {
                (format!("running/{}", key_of(source)), derived.place())
            }
            Node::ViewSnapshots(id) => (format!("view/box/{id}"), 15),
            Node::Made(number) => (format!("made/{number}"), 0),
        };
        let digest = Sha256::digest(key.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        // The lowest four bits are for the place; never 0 (no inode) or 1 (the root).
        let group = u64::from_le_bytes(first) & HASHED;
        group.max(0x10) | place
    }

    /// Returns the box that it is in, if any.
    pub fn box_id(&self) -> Option<&str> {
        match self {
            Node::Box(id)
            | Node::BoxJson(id)
            | Node::Why(id)
            | Node::Snapshots(id)
            | Node::Snapshot(id, _)
            | Node::SnapshotJson(id, _) => Some(id),
            Node::Export(source) | Node::Link(_, source) => Some(source.box_id()),
            // What is in the view is never staged.
            Node::Compressed(_)
            | Node::DiskImage(_)
            | Node::Guest(_)
            | Node::Running(..)
            | Node::View
            | Node::ViewOf(_)
            | Node::ViewSnapshots(_) => None,
            Node::Root
            | Node::Hidden
            | Node::Log
            | Node::Status(_)
            | Node::Undo
            | Node::Made(_) => None,
        }
    }

    /// Returns the snapshot that it is, or is in, if any.
    pub fn snapshot_id(&self) -> Option<&str> {
        match self {
            Node::Snapshot(_, snapshot) | Node::SnapshotJson(_, snapshot) => Some(snapshot),
            Node::Export(Source::Snapshot { snapshot_id, .. })
            | Node::Link(_, Source::Snapshot { snapshot_id, .. }) => Some(snapshot_id),
            _ => None,
        }
    }

    /// Returns the state whose export, or whose description, this file is.
    pub fn source(&self) -> Option<Source> {
        match self {
            Node::Export(source) => Some(source.clone()),
            Node::BoxJson(id) => Some(Source::Live { box_id: id.clone() }),
            Node::SnapshotJson(id, snapshot) => Some(Source::Snapshot {
                box_id: id.clone(),
                snapshot_id: snapshot.clone(),
            }),
            _ => None,
        }
    }
}

/// Returns what the nodes of a disk state are numbered by.
fn key_of(source: &Source) -> String {
    match source {
        Source::Live { box_id } => format!("box/{box_id}"),
        Source::Snapshot {
            box_id,
            snapshot_id,
        } => format!("box/{box_id}/snapshot/{snapshot_id}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(number: u64) -> Node {
        Node::Status(Arc::new(StatusVersion {
            number,
            bytes: Vec::new(),
            made: SystemTime::UNIX_EPOCH,
        }))
    }

    #[test]
    fn numbers_follow_from_what_a_node_is_and_differ() {
        let nodes = [
            Node::Root,
            Node::Hidden,
            Node::Log,
            status(1),
            status(2),
            Node::Box("a".into()),
            Node::BoxJson("a".into()),
            Node::Export(Source::Live { box_id: "a".into() }),
            Node::Snapshots("a".into()),
            Node::Snapshot("a".into(), "s".into()),
            Node::Box("b".into()),
            Node::Made(1),
        ];
        let numbers: std::collections::BTreeSet<u64> = nodes.iter().map(Node::ino).collect();
        assert_eq!(numbers.len(), nodes.len());
        assert!(numbers.iter().all(|number| *number < NUMBERS));
        assert_eq!(Node::Box("a".into()).ino(), Node::Box("a".into()).ino());
        assert_eq!(Node::Root.ino(), ROOT_INO);
    }

    #[test]
    fn in_the_order_of_numbers_box_json_comes_first_and_snapshots_last() {
        let live = Source::Live { box_id: "a".into() };
        let files = [
            Node::BoxJson("a".into()),
            Node::Export(live.clone()),
            Node::Link(Derived::Compressed, live),
            Node::Snapshots("a".into()),
        ];
        assert!(files.iter().map(Node::ino).is_sorted());
    }
}
