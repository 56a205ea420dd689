//! Gives a name in a box being made another one.

use std::sync::Arc;

use crate::home::is_snapshot_name;
use crate::store::Store;
use crate::tree::nodes::names::{exists, not_there};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::nodes::refusal::refuse;
use crate::tree::staging::role::role_of;
use crate::tree::staging::staged_box::{Staged, StagedBox, StagedChild};
use crate::tree::staging::staged_file::StagedFile;
use crate::{Error, Result};

/// What renaming a child of a box being made has done.
pub enum StagedRename {
    /// Nothing: no such child is being made.
    NotStaged,
    /// Nothing: the child exists in the box by now, and is to be renamed there.
    IsInBox,
    /// A file has the name.
    File(Arc<StagedFile>),
    /// A directory or a link has the name.
    Other,
}

/// Renames a child of a box being made. `replaces` says whether it may take the place of another.
///
/// # Errors
/// Those of `StagedBoxes::rename_child`.
pub fn rename(
    store: &Store,
    staged: &mut StagedBox,
    ((from_parent, from), (to_parent, to)): ((&Node, &str), (&Node, &str)),
    is_same_box: bool,
    replaces: bool,
) -> Result<StagedRename> {
    let child = staged.child(from_parent, from);
    if child.is_none() && staged.committed {
        return Ok(StagedRename::NotStaged);
    }
    let is_directory = child.is_some_and(|child| matches!(child.what, Staged::Directory));
    let is_kept = match child.map(|child| (&child.what, &child.node)) {
        Some((Staged::File(_), _)) => role_of(to_parent, to).is_some(),
        Some((Staged::Directory, Node::Snapshot(..))) => {
            matches!(to_parent, Node::Snapshots(_)) && is_snapshot_name(to)
        }
        Some((Staged::Directory, _)) => from == to && from_parent == to_parent,
        _ => Derived::named(to).is_some(),
    };
    if !is_kept {
        return Err(refuse(
            store,
            libc::EPERM,
            format!("{to} would not be kept: it is not part of a backup"),
        ));
    }
    if !is_same_box {
        return Err(Error::new(libc::EXDEV, "that is another box; copy it"));
    }
    let is_there = |child: &StagedChild| match (&child.what, &child.node) {
        (Staged::File(file), _) => file.is_committed(),
        (Staged::Directory, Node::Snapshot(_, id)) => staged.arrived.contains(id),
        _ => false,
    };
    if staged.committed && child.is_some_and(is_there) {
        return Ok(StagedRename::IsInBox);
    }
    let file = child.and_then(StagedChild::file).cloned();
    if let Some(taken) = staged.child(to_parent, to) {
        if !replaces {
            return Err(exists(to));
        }
        refuse_overwriting(taken, is_directory, staged, to)?;
    }
    if !staged.move_child((from_parent, from), (to_parent, to)) {
        return Err(not_there());
    }
    Ok(file.map_or(StagedRename::Other, StagedRename::File))
}

/// Refuses to put a child in the place of another that can't be replaced by it.
///
/// # Errors
/// Those of rename(2): EISDIR, ENOTDIR, ENOTEMPTY.
fn refuse_overwriting(
    taken: &StagedChild,
    is_directory: bool,
    staged: &StagedBox,
    name: &str,
) -> Result<()> {
    match (&taken.what, is_directory) {
        (Staged::Directory, false) => {
            Err(Error::new(libc::EISDIR, format!("{name} is a directory")))
        }
        (Staged::Directory, true) => staged.refuse_full(taken.node.ino(), name),
        (Staged::File(_) | Staged::Link(_), true) => {
            Err(Error::new(libc::ENOTDIR, format!("{name} is a file")))
        }
        _ => Ok(()),
    }
}
