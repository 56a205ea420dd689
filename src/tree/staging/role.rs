//! What a written file will be, which follows from its directory and its name.

use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, WHY_JSON, archive_stem};
use crate::tree::nodes::node::Node;

/// What the name of a file in a directory for files put aside begins with. See
/// [`aside`](crate::tree::staging::aside).
pub const ASIDE_PREFIX: &str = ".~tmp~/";

/// What a written file will be when it is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// `NEW.boxlite` or `NEW.boxlite.zst` in the root: a new box.
    NewBox,
    /// `export.boxlite` of a box that is being made, or that exists: its disk.
    BoxDisk,
    /// `export.boxlite` of a snapshot: its disk.
    SnapshotDisk,
    /// A temporary name of one of these (rsync's `.NAME.XXXXXX`, gio's `.goutputstream-XXXXXX`).
    TemporaryArchive,
    /// box.json or snapshot.json: what they say follows from the disk that comes with them.
    Json,
    /// tar makes an empty file where a link will be, and removes it at its end. It takes no bytes.
    Placeholder,
}

/// Returns the role that a name gives; None for a name whose bytes would not be kept.
pub fn role_of(parent: &Node, name: &str) -> Option<FileRole> {
    let temporary = temporary_for(name);
    let (disk, json) = match parent {
        Node::Root if archive_stem(name).is_some() && !name.starts_with('.') => {
            return Some(FileRole::NewBox);
        }
        Node::Root => {
            let is_archives = temporary.is_some_and(|inner| archive_stem(inner).is_some());
            let is_temporary = is_archives || is_gio_temporary(name) || is_shortened(name);
            return is_temporary.then_some(FileRole::TemporaryArchive);
        }
        Node::Box(_) => (FileRole::BoxDisk, BOX_JSON),
        Node::Snapshot(..) => (FileRole::SnapshotDisk, SNAPSHOT_JSON),
        _ => return None,
    };
    match name {
        EXPORT => Some(disk),
        _ if name == json || temporary == Some(json) => Some(FileRole::Json),
        // A box is made of a snapshot that is copied into the root.
        SNAPSHOT_JSON => Some(FileRole::Json),
        _ if temporary == Some(SNAPSHOT_JSON) => Some(FileRole::Json),
        // So is a box of what was kept.
        _ if name == WHY_JSON || temporary == Some(WHY_JSON) => Some(FileRole::Json),
        _ if temporary == Some(EXPORT) || is_gio_temporary(name) => {
            Some(FileRole::TemporaryArchive)
        }
        _ => None,
    }
}

/// Returns the final name in a temporary one: rsync's `.NAME.XXXXXX` and `.~tmp~/NAME`, rclone's
/// `NAME.XXXXXXXX.partial`, the `NAME.part` of browsers and of KDE, and those of other programs
/// that upload.
pub fn temporary_for(name: &str) -> Option<&str> {
    let random = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|b| b.is_ascii_alphanumeric())
    };
    if let Some(inner) = name.strip_prefix(ASIDE_PREFIX) {
        return Some(inner);
    }
    let ends = [".part", ".filepart", ".crdownload", ".partial~"];
    let inner = if let Some(inner) = ends.iter().find_map(|end| name.strip_suffix(end)) {
        inner
    } else if let Some(inner) = name.strip_suffix(".partial") {
        let (inner, _) = inner.rsplit_once('.').filter(|(_, end)| random(end, 8))?;
        inner
    } else if let Some(inner) = name.strip_suffix(".tmp") {
        let begins = [".syncthing.", "~syncthing~", "."];
        begins.iter().find_map(|begin| inner.strip_prefix(begin))?
    } else {
        let (inner, _) = name
            .strip_prefix('.')?
            .rsplit_once('.')
            .filter(|(_, end)| random(end, 6))?;
        inner
    };
    (!inner.is_empty()).then_some(inner)
}

/// Returns whether programs write a new box.json under a name like this, and rename it then: sed with
/// -i, Qt's QSaveFile, Python's tempfile, and those of [`temporary_for`].
pub fn is_edit_temporary(name: &str) -> bool {
    let random = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let qt = name
        .strip_prefix(BOX_JSON)
        .and_then(|end| end.strip_prefix('.'));
    temporary_for(name) == Some(BOX_JSON)
        || name.strip_prefix("sed").is_some_and(|end| random(end, 6))
        || name.strip_prefix("tmp").is_some_and(|end| random(end, 8))
        || qt.is_some_and(|end| random(end, 6))
}

/// Returns whether rsync has cut a name that was too long for its `.NAME.XXXXXX`, and its suffix
/// with it.
fn is_shortened(name: &str) -> bool {
    const NEARLY_LONGEST: usize = 245;
    name.len() >= NEARLY_LONGEST && name.starts_with('.') && temporary_for(name).is_some()
}

/// Returns whether gio writes a file under a name like this, which tells nothing of its final one.
pub fn is_gio_temporary(name: &str) -> bool {
    name.starts_with(".goutputstream-")
}

/// Where a file is now, by its last name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedPlace {
    pub parent: Node,
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_says_what_a_file_will_be() {
        let a_box = Node::Box("a".into());
        let snapshot = Node::Snapshot("a".into(), "s".into());
        for (parent, name, role) in [
            (&Node::Root, "web.boxlite", Some(FileRole::NewBox)),
            (&Node::Root, "web.txt", None),
            (&Node::Root, ".boxlite", None),
            (
                &Node::Root,
                ".web.boxlite.Ab12Cd",
                Some(FileRole::TemporaryArchive),
            ),
            (&Node::Root, ".web.txt.Ab12Cd", None),
            (
                &Node::Root,
                "web.boxlite.0a1b2c3d.partial",
                Some(FileRole::TemporaryArchive),
            ),
            (
                &Node::Root,
                "web.boxlite.part",
                Some(FileRole::TemporaryArchive),
            ),
            (&Node::Root, "web.part", None),
            (&a_box, "export.boxlite", Some(FileRole::BoxDisk)),
            (
                &a_box,
                ".export.boxlite.Ab12Cd",
                Some(FileRole::TemporaryArchive),
            ),
            (&a_box, ".box.json.Ab12Cd", Some(FileRole::Json)),
            (&a_box, "box.json", Some(FileRole::Json)),
            (&a_box, "notes.txt", None),
            (&a_box, "snapshot.json", Some(FileRole::Json)),
            (&a_box, "rootfs", None),
            (&snapshot, "export.boxlite", Some(FileRole::SnapshotDisk)),
            (&snapshot, "snapshot.json", Some(FileRole::Json)),
            (&snapshot, "box.json", None),
            (&Node::Made(3), "export.boxlite", None),
            (&Node::Root, "web.boxlite.zst", Some(FileRole::NewBox)),
            (&Node::Root, ".boxlite.zst", None),
        ] {
            assert_eq!(role_of(parent, name), role, "{name} in {parent:?}");
        }
    }

    #[test]
    fn temporary_names_of_programs_that_upload_are_taken() {
        for name in [
            "web.boxlite.filepart",
            "web.boxlite.crdownload",
            "web.boxlite.partial~",
            ".web.boxlite.tmp",
            ".syncthing.web.boxlite.tmp",
            "~syncthing~web.boxlite.tmp",
            ".web.boxlite.zst.Ab12Cd",
            &format!(".{}.Ab12Cd", "w".repeat(247)),
        ] {
            let role = role_of(&Node::Root, name);
            assert_eq!(role, Some(FileRole::TemporaryArchive), "{name}");
        }
        for name in ["web.filepart", ".web.tmp", "web.tmp", ".tmp"] {
            assert_eq!(role_of(&Node::Root, name), None, "{name}");
        }
    }
}
