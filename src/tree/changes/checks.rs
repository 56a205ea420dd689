//! What is refused before a change begins. Many programs ignore the result of close, so a copy is
//! refused at its first step if it would be refused at its last.

use std::sync::Arc;

use crate::exports::Source;
use crate::process::Caller;
use crate::store::{self, Store};
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::names::{EXPORT, SNAPSHOTS, archive_stem, decode, is_nameless_archive};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::nodes::refusal::{refuse, refuse_copied_box};
use crate::tree::staging::caller_history::CallerHistory;
use crate::tree::staging::program::Program;
use crate::tree::staging::role::role_of;
use crate::tree::staging::staged_file::StagedContent;
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// Refuses changes that would fail, or that would lose something.
pub struct Checks {
    store: Arc<Store>,
    boxes: Arc<Boxes>,
    staging: Arc<StagingArea>,
    history: Arc<CallerHistory>,
}

impl Checks {
    /// Returns the checks of a home.
    pub fn new(
        store: Arc<Store>,
        boxes: Arc<Boxes>,
        staging: Arc<StagingArea>,
        history: Arc<CallerHistory>,
    ) -> Checks {
        Checks {
            store,
            boxes,
            staging,
            history,
        }
    }

    /// Logs a refusal, and returns it as an error.
    pub fn refuse(&self, errno: i32, message: impl Into<String>) -> Error {
        refuse(&self.store, errno, message)
    }

    /// Refuses a new box that could not be made now.
    ///
    /// # Errors
    /// Those of an import.
    pub fn refuse_new_box(&self, name: &str) -> Result<()> {
        store::refuse_unready_for_import(&self.store)
            .map_err(|error| self.refuse(error.errno(), format!("{name}: {error}")))
    }

    /// Refuses `.Trash-0` and its like.
    ///
    /// # Errors
    /// EPERM.
    pub fn refuse_dotted(&self, name: &str) -> Result<()> {
        if !name.starts_with('.') {
            return Ok(());
        }
        Err(self.refuse(
            libc::EPERM,
            format!("{name}: directories with a leading dot are not allowed among boxes"),
        ))
    }

    /// Refuses an archive in the root whose box exists or is being made.
    ///
    /// # Errors
    /// EEXIST; EINVAL for a name that no box can have.
    pub fn refuse_taken_box(&self, name: &str) -> Result<()> {
        // Its name comes with its manifest.
        if is_nameless_archive(name) {
            return Ok(());
        }
        let shown = archive_stem(name).unwrap_or(name);
        decode(shown).map_err(|error| self.refuse(error.errno(), error.to_string()))?;
        let names = self.boxes.names()?;
        if names.id_of(shown).is_some() || self.staging.boxes.id_of(shown).is_some() {
            return Err(self.refuse(
                libc::EEXIST,
                format!("{name}: there is a box {shown} already"),
            ));
        }
        Ok(())
    }

    /// Refuses a directory in a box or a snapshot being made that no backup of ours has: what would
    /// be put into it would not be kept.
    ///
    /// # Errors
    /// EPERM.
    pub fn refuse_directory(&self, parent: &Node, name: &str) -> Result<()> {
        let message = match parent {
            Node::Box(_) if name == SNAPSHOTS => return Ok(()),
            Node::Box(id) if !self.staging.boxes.is_unfinished(id) => {
                return Err(self.refuse_meaningless_directory(parent, name));
            }
            Node::Snapshots(_) => return Ok(()),
            Node::Box(_) | Node::Snapshot(..) if Derived::named(name).is_some() => format!(
                "{name}: the guest's files come with {EXPORT}; copy without following links (cp -r, \
                 not cp -rL; copytree(…, symlinks=True))"
            ),
            Node::Box(_) => format!(
                "{name}: a box is made of {EXPORT}, box.json and {SNAPSHOTS}; other directories are \
                 not kept, so keep them elsewhere"
            ),
            _ => return Err(self.refuse_meaningless_directory(parent, name)),
        };
        Err(self.refuse(libc::EPERM, message))
    }

    /// EPERM for a directory that means nothing where it is made.
    pub fn refuse_meaningless_directory(&self, parent: &Node, name: &str) -> Error {
        if let Node::Box(id) = parent
            && let Some((of, snapshot)) = self.snapshot_named(id, name)
        {
            let message = format!(
                "{name}: a snapshot is not copied into its box; to restore {snapshot}, copy its \
                 export: cp {of}/{SNAPSHOTS}/{name}/{EXPORT} {of}/{EXPORT}"
            );
            return self.refuse(libc::EPERM, message);
        }
        self.refuse(
            libc::EPERM,
            format!("{name}: a directory means something in the root (a box) and in {SNAPSHOTS} (a snapshot) only"),
        )
    }

    /// Returns the name that a box is shown by, and the description of its snapshot of this name.
    fn snapshot_named(&self, id: &str, name: &str) -> Option<(String, String)> {
        let names = self.boxes.names().ok()?;
        let shown = names.of_id(id)?.to_owned();
        let mut snapshots = names.catalog().snapshots_of(id).iter();
        let row = snapshots.find(|row| row.name == name)?;
        let source = Source::Snapshot {
            box_id: id.to_owned(),
            snapshot_id: row.id.clone(),
        };
        Some((shown, self.store.exports().disks.describe(&source)))
    }

    /// Refuses a file of a process that copies a whole box over one that exists: it would put parts
    /// of the one into the other, or take a snapshot of today under the name of an old one.
    ///
    /// # Errors
    /// EPERM.
    pub fn refuse_copying_over(&self, caller: Caller, id: &str, name: &str) -> Result<()> {
        if self.history.goes_on_copying(caller, id) {
            return Err(refuse_copied_box(&self.store, name));
        }
        Ok(())
    }

    /// Records that something was refused that a copy of a whole box over one that exists would
    /// begin with.
    pub fn remember_refused_copy(&self, caller: Caller, node: &Node) {
        if let Some(id) = node.box_id() {
            self.history.refuse_copy(caller, id);
        }
    }

    /// Refuses to put something into a box that exists.
    pub fn refuse_put(&self, caller: Caller, parent: &Node, name: &str) -> Error {
        if role_of(parent, name).is_some() || Derived::named(name).is_some() {
            self.remember_refused_copy(caller, parent);
        }
        let message = match parent {
            Node::Snapshot(..) => format!(
                "{name}: nothing can be put into a snapshot that exists; copy the snapshot to another name"
            ),
            _ => format!(
                "{name}: nothing can be put into a box that exists; copy to a new name to make another"
            ),
        };
        self.refuse(libc::EPERM, message)
    }

    /// Refuses to write over a snapshot, unless it is what the box's disk is: then nothing is lost
    /// where a snapshot that is copied takes its place.
    ///
    /// # Errors
    /// EPERM, and those of reading the home.
    pub fn refuse_replacing(
        &self,
        caller: Caller,
        id: &str,
        snapshot: &str,
        name: &str,
    ) -> Result<()> {
        self.refuse_copying_over(caller, id, name)?;
        let source = Source::Snapshot {
            box_id: id.to_owned(),
            snapshot_id: snapshot.to_owned(),
        };
        self.refuse_destroying(caller, &source)?;
        if store::live_equals_snapshot(&self.store, id, snapshot)? {
            return Ok(());
        }
        self.remember_refused_copy(caller, &Node::Export(source.clone()));
        let which = self.store.exports().disks.describe(&source);
        Err(self.refuse(
            libc::EPERM,
            format!(
                "{name}: {which} stays as it is; copy to another name, or over the box's {EXPORT} to \
                 restore it"
            ),
        ))
    }

    /// Refuses truncate, shred and the like: nothing would come of them.
    fn refuse_destroying(&self, caller: Caller, source: &Source) -> Result<()> {
        if !Program::of(caller).only_destroys() {
            return Ok(());
        }
        let of = self.store.exports().disks.describe(source);
        let message = format!(
            "{EXPORT}: {of} always has its export; to restore, write a whole archive over that of the box"
        );
        Err(self.refuse(libc::EPERM, message))
    }

    /// Refuses to write over a box's export what could not become its disk.
    ///
    /// # Errors
    /// EPERM for a copy of a whole directory, ENODATA for a box without a disk, and those of a
    /// restore.
    pub fn refuse_restore(&self, caller: Caller, id: &str) -> Result<()> {
        self.refuse_copying_over(caller, id, EXPORT)?;
        if self.history.has_edited(caller, id) {
            return Err(refuse_copied_box(&self.store, EXPORT));
        }
        let source = Source::Live {
            box_id: id.to_owned(),
        };
        self.refuse_destroying(caller, &source)?;
        // A whole box that is copied over another may begin with any of its files.
        if Program::of(caller).copies_tree_without(EXPORT) {
            self.remember_refused_copy(caller, &Node::Export(source.clone()));
            return Err(self.refuse(
                libc::EPERM,
                format!(
                    "{EXPORT}: a whole directory may be copied over {}; copy that to a new name; to \
                     restore, name {EXPORT} in the command",
                    self.store.exports().disks.describe(&source)
                ),
            ));
        }
        if !self.store.exports().disks.has_disk(&source) {
            return Err(self.refuse(
                libc::ENODATA,
                format!(
                    "{} has no disk yet; start it once with BoxLite, or import under a new name",
                    self.store.exports().disks.describe(&source)
                ),
            ));
        }
        refuse_waiting_copies(&self.store, &self.staging, |copied| *copied == source)?;
        store::refuse_unready_for_restore(&self.store, id).map_err(|error| {
            let message = format!(
                "restore of {}: {error}",
                self.store.exports().disks.describe(&source)
            );
            self.refuse(error.errno(), message)
        })
    }

    /// Records that something of a box being made was refused: what comes of the rest goes with its
    /// makers.
    pub fn fail_made(&self, caller: Caller, parent: &Node) {
        let process = caller.process();
        self.staging
            .boxes
            .with_made_by(caller, parent, |staged| staged.fail(process));
    }
}

/// Refuses to remove or replace a state of which a copy waits for its box or its name: mv removes
/// what it has copied, and the copy is not made yet.
///
/// # Errors
/// EBUSY.
pub fn refuse_waiting_copies(
    store: &Store,
    staging: &StagingArea,
    is_source: impl Fn(&Source) -> bool,
) -> Result<()> {
    for file in staging.files() {
        let state = file.state();
        if let StagedContent::FromHome { source, .. } = &state.content
            && state.open == 0
            && is_source(source)
        {
            let which = store.exports().disks.describe(source);
            return Err(refuse(
                store,
                libc::EBUSY,
                format!(
                    "{}, a copy of {which}, waits for its box or its name; complete it first, or remove it",
                    state.place.name
                ),
            ));
        }
    }
    Ok(())
}
