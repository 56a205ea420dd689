//! Extended attributes: `user.boxlite.id`, `.status`, `.image` and `.created_at` of boxes, `.id`
//! and `.created_at` of snapshots.

use std::ffi::OsStr;

use crate::home::rfc3339;
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::node::Node;
use crate::{Error, Result};

const PREFIX: &str = "user.boxlite.";

/// ENODATA for an attribute that does not exist.
pub fn none() -> Error {
    Error::new(libc::ENODATA, "there is no such attribute")
}

/// Returns the name without its prefix.
///
/// # Errors
/// ENODATA for a name that none of our attributes has.
pub fn own_name(name: &OsStr) -> Result<&str> {
    let name = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
    name.ok_or_else(none)
}

/// Returns the value of an extended attribute of a box or a snapshot; `wanted` is its name without
/// the prefix.
///
/// # Errors
/// ENODATA when there is none of that name, and those of reading the home.
pub fn value(boxes: &Boxes, node: &Node, wanted: &str) -> Result<Vec<u8>> {
    all(boxes, node)?
        .into_iter()
        .find(|(name, _)| *name == wanted)
        .map(|(_, value)| value.into_bytes())
        .ok_or_else(none)
}

/// Returns the names of all extended attributes of a box or a snapshot, each ended by a NUL.
///
/// # Errors
/// ENOENT when it is gone, and those of reading the home.
pub fn names(boxes: &Boxes, node: &Node) -> Result<Vec<u8>> {
    let names = all(boxes, node)?.into_iter();
    let ended = names.flat_map(|(name, _)| format!("{PREFIX}{name}\0").into_bytes());
    Ok(ended.collect())
}

fn all(boxes: &Boxes, node: &Node) -> Result<Vec<(&'static str, String)>> {
    Ok(match node {
        Node::Box(id) => {
            let record = boxes.record(id)?;
            let image = record.image();
            vec![
                ("id", record.id),
                ("status", record.status),
                ("image", image),
                ("created_at", rfc3339(record.created_at)),
            ]
        }
        Node::Snapshot(id, snapshot) => {
            let row = boxes.snapshot(id, snapshot)?;
            vec![("id", row.id), ("created_at", rfc3339(row.shown_at))]
        }
        _ => Vec::new(),
    })
}
