//! A file that a copy tool is writing: what it will be follows from where it is, what has come so
//! far is kept here until its name is final and its data complete.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

use crate::archive::Export;
use crate::progress::Operation;
use crate::store::{Arrival, Contents, Source};
use crate::tree::nodes::box_json;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, archive_stem};
use crate::tree::nodes::node::Node;
use crate::tree::staging::aside::ASIDE_PREFIX;
use crate::tree::staging::caller::{Caller, Makers};
use crate::{Error, Result};

/// Bytes of a small text (snapshot.json) that are kept.
const MOST_TEXT: usize = 1024 * 1024;

/// What a written file will be when it is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) enum Role {
    /// `NEW.boxlite` in the root: a new box.
    NewBox,
    /// `export.boxlite` of a box being made: its disk.
    BoxDisk,
    /// `export.boxlite` of a snapshot of it.
    SnapshotDisk,
    /// A temporary name of one of these (rsync's `.NAME.XXXXXX`, gio's `.goutputstream-XXXXXX`).
    TemporaryArchive,
    /// box.json or snapshot.json: what they say follows from the disk that comes with them.
    Json,
    /// tar makes an empty file where a link will be, and removes it at its end. It takes no bytes.
    Placeholder,
}

/// The role a name gives; None for a name whose bytes would not be kept.
pub(in crate::tree) fn role_of(parent: &Node, name: &str) -> Option<Role> {
    let temporary = temporary_for(name);
    let (disk, json) = match parent {
        Node::Root if archive_stem(name).is_some() && !name.starts_with('.') => {
            return Some(Role::NewBox);
        }
        Node::Root => {
            let is_archives = temporary.is_some_and(|inner| archive_stem(inner).is_some());
            let is_temporary = is_archives || is_gio_temporary(name) || is_shortened(name);
            return is_temporary.then_some(Role::TemporaryArchive);
        }
        Node::Box(_) => (Role::BoxDisk, BOX_JSON),
        Node::Snapshot(..) => (Role::SnapshotDisk, SNAPSHOT_JSON),
        _ => return None,
    };
    match name {
        EXPORT => Some(disk),
        _ if name == json || temporary == Some(json) => Some(Role::Json),
        // A box is made of a snapshot that is copied into the root.
        SNAPSHOT_JSON => Some(Role::Json),
        _ if temporary == Some(SNAPSHOT_JSON) => Some(Role::Json),
        _ if temporary == Some(EXPORT) || is_gio_temporary(name) => Some(Role::TemporaryArchive),
        _ => None,
    }
}

/// The final name in a temporary one: rsync's `.NAME.XXXXXX` and `.~tmp~/NAME`, rclone's `NAME.XXXXXXXX.partial`, the
/// `NAME.part` of browsers and of KDE, and those of other programs that upload.
pub(in crate::tree) fn temporary_for(name: &str) -> Option<&str> {
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

/// rsync cuts a name that is too long for its `.NAME.XXXXXX`, and its suffix with it.
fn is_shortened(name: &str) -> bool {
    const NEARLY_LONGEST: usize = 245;
    name.len() >= NEARLY_LONGEST && name.starts_with('.') && temporary_for(name).is_some()
}

fn is_gio_temporary(name: &str) -> bool {
    name.starts_with(".goutputstream-")
}

/// Where a file is now, by its last name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::tree) struct Place {
    pub parent: Node,
    pub name: String,
}

/// What has come of a file so far.
pub(in crate::tree) enum Content {
    /// Nothing.
    Nothing,
    /// Bytes of an archive.
    Archive(Box<Arrival>),
    /// The start of an export, asked for with copy_file_range: no byte moved.
    Shared {
        source: Source,
        export: Arc<Export>,
        /// What the export's bytes are of.
        contents: Contents,
        covered: u64,
    },
    /// box.json or snapshot.json of a box or snapshot, likewise.
    SharedJson(Source),
    /// A small text.
    Text(Vec<u8>),
}

/// A file being written.
pub(in crate::tree) struct StagedFile {
    pub node: Node,
    /// The box it will be, or be part of: an id nobody has yet, or that of the box being made; of the
    /// box whose disk it will be, where it `restores` one.
    pub box_id: String,
    /// Written over the export of a box that exists.
    pub restores: bool,
    /// Who began to write, where it `restores` a box.
    pub writer: Makers,
    /// The process that made it, if that is a program that leaves its source in place.
    pub copier: Option<u32>,
    pub created: SystemTime,
    pub begun: Instant,
    /// Bytes written so far, as stat shows them.
    pub size: AtomicU64,
    /// Whether it has become what its name says: from then on that is what is seen of it.
    pub is_there: AtomicBool,
    /// Whether it is a complete archive that was closed and waits for its final name or its box. The program
    /// that copied it got success, so its source may be gone. That of [`Content::Shared`] is in the home, and
    /// is not removed meanwhile.
    pub waits: AtomicBool,
    pub state: Mutex<FileState>,
}

pub(in crate::tree) struct FileState {
    pub place: Place,
    pub content: Content,
    /// Opened and not yet released.
    pub open: usize,
    /// What is told of an archive that arrives.
    pub operation: Option<Operation>,
    /// Whether it has become what its name says.
    pub committed: bool,
    /// The refusal, once there is one: errno and message. It is sticky.
    pub refused: Option<(i32, String)>,
}

impl StagedFile {
    pub fn new(node: Node, box_id: String, place: Place, by: Caller) -> Arc<StagedFile> {
        StagedFile::begin(node, box_id, (by, false), place)
    }

    /// A file that is written over the export of a box that exists, or will be.
    pub fn restoring(node: Node, box_id: String, place: Place, by: Caller) -> Arc<StagedFile> {
        StagedFile::begin(node, box_id, (by, true), place)
    }

    fn begin(
        node: Node,
        box_id: String,
        (by, restores): (Caller, bool),
        place: Place,
    ) -> Arc<StagedFile> {
        let process = by.process();
        Arc::new(StagedFile {
            node,
            box_id,
            restores,
            writer: match restores {
                true => Makers::begin(by),
                false => Makers::default(),
            },
            copier: process.filter(|_| by.keeps_sources()),
            created: SystemTime::now(),
            begun: Instant::now(),
            size: AtomicU64::new(0),
            is_there: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            state: Mutex::new(FileState {
                place,
                content: Content::Nothing,
                open: 0,
                operation: None,
                committed: false,
                refused: None,
            }),
        })
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Its name was removed, or given to another: what comes of it from now on counts for nothing.
    pub fn was_removed(&self, name: &str) {
        let mut state = self.state.lock();
        self.waits.store(false, Ordering::Relaxed);
        if !state.committed {
            state.content = Content::Nothing;
            let error = Error::new(libc::ENOENT, format!("{name} was removed"));
            state.refuse(&error);
        }
    }

    /// The file is at least this long.
    pub fn reaches(&self, end: u64) {
        self.size.fetch_max(end, Ordering::Relaxed);
    }
}

impl FileState {
    pub fn role(&self) -> Role {
        role_of(&self.place.parent, &self.place.name).unwrap_or(Role::Placeholder)
    }

    pub fn refused(&self) -> Result<()> {
        match &self.refused {
            Some((errno, message)) => Err(Error::new(*errno, message.clone())),
            None => Ok(()),
        }
    }

    /// Keeps a refusal for all later calls.
    pub fn refuse(&mut self, error: &Error) {
        self.refused
            .get_or_insert_with(|| (error.errno(), error.to_string()));
    }

    /// Adds bytes to a small text.
    pub fn put_text(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let is_of_snapshot = self.is_of_snapshot();
        let Content::Text(text) = &mut self.content else {
            self.content = Content::Text(Vec::new());
            return self.put_text(offset, bytes);
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(bytes.len());
        if end > MOST_TEXT {
            return Err(Error::new(
                libc::EFBIG,
                "a box.json or snapshot.json is a few kilobytes long",
            ));
        }
        if text.len() < end {
            text.resize(end, 0);
        }
        text[start..end].copy_from_slice(bytes);
        box_json::refuse_foreign(is_of_snapshot, text)
    }

    /// Whether it is to be a snapshot.json, and no box.json.
    fn is_of_snapshot(&self) -> bool {
        self.place.name.contains(SNAPSHOT_JSON)
    }

    /// Whether a description is of the kind that this one is: of a box, or of a snapshot.
    pub fn describes(&self, node: &Node) -> bool {
        match self.is_of_snapshot() {
            true => matches!(node, Node::SnapshotJson(..)),
            false => matches!(node, Node::BoxJson(_)),
        }
    }

    /// EINVAL for a box.json or snapshot.json that ended in the middle.
    pub fn refuse_partial_text(&self) -> Result<()> {
        match &self.content {
            Content::Text(text) => box_json::refuse_partial(text),
            _ => Ok(()),
        }
    }
}

/// Notes that a range of an export was copied; the bytes taken, or None when it is not the next
/// part of one and the same export.
pub(in crate::tree) fn share(
    state: &mut FileState,
    (source, export, contents): (&Source, &Arc<Export>, &Contents),
    offset: u64,
    length: u64,
) -> Option<u64> {
    let end = export.len();
    let next = offset.saturating_add(length).min(end);
    match (state.role(), &mut state.content) {
        (Role::Json | Role::Placeholder, _) => None,
        (_, Content::Nothing) if offset == 0 => {
            state.content = Content::Shared {
                source: source.clone(),
                export: export.clone(),
                contents: *contents,
                covered: next,
            };
            Some(next)
        }
        (
            _,
            Content::Shared {
                source: known,
                export: same,
                covered,
                ..
            },
        ) if known == source && Arc::ptr_eq(same, export) && *covered == offset => {
            *covered = next;
            Some(next.saturating_sub(offset))
        }
        _ => None,
    }
}

/// Whether the data is complete; `size` is the file's length in bytes. An empty file is no error. A part
/// of an archive is an error, and so is a file that is only a hole.
pub(in crate::tree) fn is_complete(state: &mut FileState, size: u64) -> Result<bool> {
    let only_hole = || match size {
        0 => Ok(false),
        _ => Err(Error::bad_archive("there is only a hole in it")),
    };
    match &mut state.content {
        Content::Text(_) | Content::SharedJson(_) => Ok(false),
        Content::Nothing => only_hole(),
        Content::Archive(arrival) if arrival.is_untouched() => only_hole(),
        Content::Archive(arrival) => arrival.finish().map(|()| true),
        Content::Shared {
            export, covered, ..
        } if *covered < export.len() => {
            Err(Error::bad_archive("only a part of the archive was copied"))
        }
        Content::Shared { .. } => Ok(true),
    }
}

/// Whether the data was complete already, without bringing it to an end.
pub(in crate::tree) fn is_whole(content: &Content) -> bool {
    match content {
        Content::Archive(arrival) => arrival.is_complete(),
        Content::Shared {
            export, covered, ..
        } => *covered == export.len(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_says_what_a_file_will_be() {
        let a_box = Node::Box("a".into());
        let snapshot = Node::Snapshot("a".into(), "s".into());
        for (parent, name, role) in [
            (&Node::Root, "web.boxlite", Some(Role::NewBox)),
            (&Node::Root, "web.txt", None),
            (&Node::Root, ".boxlite", None),
            (
                &Node::Root,
                ".web.boxlite.Ab12Cd",
                Some(Role::TemporaryArchive),
            ),
            (&Node::Root, ".web.txt.Ab12Cd", None),
            (
                &Node::Root,
                "web.boxlite.0a1b2c3d.partial",
                Some(Role::TemporaryArchive),
            ),
            (
                &Node::Root,
                "web.boxlite.part",
                Some(Role::TemporaryArchive),
            ),
            (&Node::Root, "web.part", None),
            (&a_box, "export.boxlite", Some(Role::BoxDisk)),
            (
                &a_box,
                ".export.boxlite.Ab12Cd",
                Some(Role::TemporaryArchive),
            ),
            (&a_box, ".box.json.Ab12Cd", Some(Role::Json)),
            (&a_box, "box.json", Some(Role::Json)),
            (&a_box, "notes.txt", None),
            (&a_box, "snapshot.json", Some(Role::Json)),
            (&a_box, "rootfs", None),
            (&snapshot, "export.boxlite", Some(Role::SnapshotDisk)),
            (&snapshot, "snapshot.json", Some(Role::Json)),
            (&snapshot, "box.json", None),
            (&Node::Made(3), "export.boxlite", None),
            (&Node::Root, "web.boxlite.zst", Some(Role::NewBox)),
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
            assert_eq!(role, Some(Role::TemporaryArchive), "{name}");
        }
        for name in ["web.filepart", ".web.tmp", "web.tmp", ".tmp"] {
            assert_eq!(role_of(&Node::Root, name), None, "{name}");
        }
    }
}
