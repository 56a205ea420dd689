//! Files that are written over the export of a box or a snapshot that exists.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::exports::Source;
use crate::process::{Caller, ProcessGroup};
use crate::store::Store;
use crate::tree::changes::checks::Checks;
use crate::tree::nodes::names::{BOX_JSON, EXPORT};
use crate::tree::nodes::node::Node;
use crate::tree::reading::guest_files::only_for_reading;
use crate::tree::staging::box_edit::BoxEdits;
use crate::tree::staging::program::Program;
use crate::tree::staging::role::{
    FileRole, StagedPlace, is_edit_temporary, is_gio_temporary, role_of,
};
use crate::tree::staging::staged_file::StagedFile;
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// How long a program that opened an export for writing may set the file's size, times and mode.
const FRESH: Duration = Duration::from_secs(60);

/// The processes that opened the export of a box, or its box.json, for writing, by the inode number,
/// and when. Copy tools set its size, times and mode.
#[derive(Default)]
struct RecentWriters {
    writers: Mutex<HashMap<u64, (ProcessGroup, Instant)>>,
}

impl RecentWriters {
    fn add(&self, caller: Caller, node: &Node) {
        let mut writers = self.writers.lock();
        writers.retain(|_, (group, last)| last.elapsed() < FRESH && group.any_alive());
        match writers.get_mut(&node.ino()) {
            Some((group, last)) => {
                group.join(caller);
                *last = Instant::now();
            }
            None => {
                let entry = (ProcessGroup::begin(caller), Instant::now());
                writers.insert(node.ino(), entry);
            }
        }
    }

    fn includes(&self, caller: Caller, node: &Node) -> bool {
        let mut writers = self.writers.lock();
        writers
            .get_mut(&node.ino())
            .is_some_and(|(group, last)| last.elapsed() < FRESH && group.includes(caller))
    }
}

/// Begins to write over exports.
pub struct Overwriter {
    store: Arc<Store>,
    staging: Arc<StagingArea>,
    checks: Arc<Checks>,
    edits: Arc<BoxEdits>,
    writers: RecentWriters,
}

impl Overwriter {
    /// Returns one for the exports of a home.
    pub fn new(
        store: Arc<Store>,
        staging: Arc<StagingArea>,
        checks: Arc<Checks>,
        edits: Arc<BoxEdits>,
    ) -> Overwriter {
        Overwriter {
            store,
            staging,
            checks,
            edits,
            writers: RecentWriters::default(),
        }
    }

    /// Returns whether the caller opened an export, or box.json, for writing a moment ago.
    pub fn is_writer(&self, caller: Caller, node: &Node) -> bool {
        self.writers.includes(caller, node)
    }

    /// Begins a file that is to become a box's disk, under the name of its export (which the caller
    /// has removed before) or under a temporary one.
    ///
    /// # Errors
    /// EPERM for what can't be put into a box, EEXIST, ENODATA, and those of a restore.
    pub fn create(&self, caller: Caller, parent: &Node, name: &str) -> Result<Arc<StagedFile>> {
        if let Node::Box(id) = parent
            && begins_edit(caller, name)
        {
            let file = self.edits.create(caller, id, name)?;
            self.writers.add(caller, &Node::BoxJson(id.clone()));
            return Ok(file);
        }
        let id = match (parent, role_of(parent, name)) {
            (Node::Box(id), Some(FileRole::BoxDisk | FileRole::TemporaryArchive)) => {
                self.checks.refuse_restore(caller, id)?;
                id
            }
            (
                Node::Snapshot(id, snapshot),
                Some(FileRole::SnapshotDisk | FileRole::TemporaryArchive),
            ) => {
                self.checks.refuse_replacing(caller, id, snapshot, name)?;
                id
            }
            _ => return Err(self.checks.refuse_put(caller, parent, name)),
        };
        let place = StagedPlace {
            parent: parent.clone(),
            name: name.to_owned(),
        };
        let export = Node::Export(Source::Live { box_id: id.clone() });
        self.writers.add(caller, &export);
        let node = self.staging.new_node();
        let file = StagedFile::overwriting_export(node, id.clone(), place, caller);
        self.staging.loose.add(caller, parent, name, file.clone())?;
        Ok(file)
    }

    /// Opens the box.json of a box to write over it.
    ///
    /// # Errors
    /// Those of [`BoxEdits::open`].
    pub fn open_json(&self, caller: Caller, id: &str) -> Result<Arc<StagedFile>> {
        let file = self.edits.open(caller, id)?;
        self.writers.add(caller, &Node::BoxJson(id.to_owned()));
        Ok(file)
    }

    /// Opens an export to write over it. Nothing comes of it before an archive is complete. Returns
    /// what open(2) is answered with: ESTALE when the file was begun.
    ///
    /// What is written gets an inode of its own, which the kernel finds when it looks the name up
    /// again after ESTALE. A write makes the inode longer, and readers of the export would get
    /// zeros after its end.
    pub fn open(&self, caller: Caller, node: &Node, flags: i32) -> Error {
        let appends = flags & libc::O_APPEND != 0;
        let message = match node {
            Node::Export(source) if !appends => {
                let directory = match source.clone() {
                    Source::Live { box_id } => Node::Box(box_id),
                    Source::Snapshot {
                        box_id,
                        snapshot_id,
                    } => Node::Snapshot(box_id, snapshot_id),
                };
                return match self.create(caller, &directory, EXPORT) {
                    Ok(_) => Error::new(libc::ESTALE, "it is written in an inode of its own"),
                    Err(error) => error,
                };
            }
            Node::Export(Source::Live { .. }) => {
                "an export can't be appended to; write a whole archive over it to restore".into()
            }
            Node::Export(source) => format!(
                "{} stays as it is; to restore it, copy its export over that of its box",
                self.store.exports().disks.describe(source)
            ),
            Node::BoxJson(_) => "box.json can't be appended to; write all of it".into(),
            Node::Guest(_) | Node::DiskImage(_) | Node::Running(..) => return only_for_reading(),
            _ => "snapshot.json, compressed archives and the log are read-only".into(),
        };
        if !matches!(node, Node::Export(Source::Live { .. })) {
            self.checks.remember_refused_copy(caller, node);
        }
        self.checks.refuse(libc::EPERM, message)
    }
}

/// Returns whether a file of this name in a box that exists is a new text of its box.json. A gio that
/// copies a box.json says so on its command line.
fn begins_edit(caller: Caller, name: &str) -> bool {
    let program = Program::of(caller);
    // perl -i makes names of any eight characters.
    name == BOX_JSON
        || is_edit_temporary(name)
        || (program.is("perl") && name.len() == 8)
        || (is_gio_temporary(name) && program.copies_only(BOX_JSON))
}
