//! The path in the mount by which a node is shown, for messages.

use std::path::PathBuf;

use crate::exports::Source;
use crate::home::is_kept_id;
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::names::{
    BOX_JSON, COMPRESSED, EXPORT, HIDDEN, LOG, SNAPSHOT_JSON, SNAPSHOTS, STATUS, UNDO, VIEW,
    WHY_JSON,
};
use crate::tree::nodes::node::Node;

/// Returns the path of a node below the mountpoint, `.` for the root; None for what is being made,
/// or gone.
pub fn shown_path(boxes: &Boxes, node: &Node) -> Option<PathBuf> {
    let of_box = |id: &str| path_of_box(boxes, id);
    let of_state = |source: &Source| path_of_state(boxes, source);
    let view = || PathBuf::from(HIDDEN).join(VIEW);
    Some(match node {
        Node::Root => PathBuf::from("."),
        Node::Hidden => PathBuf::from(HIDDEN),
        Node::Log => PathBuf::from(HIDDEN).join(LOG),
        Node::Status(_) => PathBuf::from(HIDDEN).join(STATUS),
        Node::Undo => PathBuf::from(HIDDEN).join(UNDO),
        Node::View => view(),
        Node::Box(id) => of_box(id)?,
        Node::BoxJson(id) => of_box(id)?.join(BOX_JSON),
        Node::Why(id) => of_box(id)?.join(WHY_JSON),
        Node::Snapshots(id) => of_box(id)?.join(SNAPSHOTS),
        Node::Snapshot(box_id, snapshot_id) | Node::SnapshotJson(box_id, snapshot_id) => {
            let dir = of_state(&Source::Snapshot {
                box_id: box_id.clone(),
                snapshot_id: snapshot_id.clone(),
            })?;
            match node {
                Node::SnapshotJson(..) => dir.join(SNAPSHOT_JSON),
                _ => dir,
            }
        }
        Node::Export(source) => of_state(source)?.join(EXPORT),
        Node::Link(derived, source) | Node::Running(derived, source) => {
            of_state(source)?.join(derived.name())
        }
        Node::Compressed(source) => of_state(source)?.join(COMPRESSED),
        Node::ViewOf(source) => view().join(of_state(source)?),
        Node::ViewSnapshots(id) => view().join(of_box(id)?).join(SNAPSHOTS),
        Node::DiskImage(_) | Node::Guest(_) | Node::Made(_) => return None,
    })
}

fn path_of_box(boxes: &Boxes, id: &str) -> Option<PathBuf> {
    if is_kept_id(id) {
        let mut kept = boxes.kept().ok()?.into_iter();
        let (name, _) = kept.find(|(_, entry)| entry.id() == id)?;
        return Some(PathBuf::from(HIDDEN).join(UNDO).join(name));
    }
    Some(PathBuf::from(boxes.names().ok()?.of_id(id)?))
}

fn path_of_state(boxes: &Boxes, source: &Source) -> Option<PathBuf> {
    match source {
        Source::Live { box_id } => path_of_box(boxes, box_id),
        Source::Snapshot {
            box_id,
            snapshot_id,
        } => {
            let row = boxes.snapshot(box_id, snapshot_id).ok()?;
            Some(path_of_box(boxes, box_id)?.join(SNAPSHOTS).join(row.name))
        }
    }
}
