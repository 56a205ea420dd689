//! Makes directories and symbolic links.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Result;
use crate::process::Caller;
use crate::store::{self, Store};
use crate::tree::changes::checks::Checks;
use crate::tree::nodes::names::{EXPORT, HIDDEN, SNAPSHOTS, VIEW, decode, exists, not_there, text};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::reading::home_view::HomeView;
use crate::tree::staging::caller_history::CallerHistory;
use crate::tree::staging::program::Program;
use crate::tree::staging::staged_box::{Staged, StagedBox};
use crate::tree::staging::staging_area::StagingArea;

/// Makes directories and links.
pub struct Maker {
    store: Arc<Store>,
    staging: Arc<StagingArea>,
    history: Arc<CallerHistory>,
    checks: Arc<Checks>,
}

impl Maker {
    /// Returns one for a home.
    pub fn new(
        store: Arc<Store>,
        staging: Arc<StagingArea>,
        history: Arc<CallerHistory>,
        checks: Arc<Checks>,
    ) -> Maker {
        Maker {
            store,
            staging,
            history,
            checks,
        }
    }

    /// Makes a directory: in the root a box begins to be made, under `snapshots` a snapshot is
    /// taken. `home` is what exists.
    ///
    /// # Errors
    /// EEXIST, EINVAL, EBUSY, EPERM where directories mean nothing.
    pub fn directory(
        &self,
        home: &HomeView,
        caller: Caller,
        parent: &Node,
        name: &OsStr,
    ) -> Result<Node> {
        let name = text(name)?;
        if let Some(aside) = self.staging.make_aside(caller, parent, name)? {
            return Ok(aside);
        }
        match parent {
            Node::Root => self.begin_box(home, caller, name),
            Node::Box(id)
                if name == SNAPSHOTS && self.history.has_removed(caller, parent, name) =>
            {
                self.history.bring_back(id, parent, name);
                Ok(Node::Snapshots(id.clone()))
            }
            Node::Snapshots(id) if !self.staging.boxes.is_unfinished(id) => {
                self.snapshot(home, caller, id, name)
            }
            _ => {
                self.checks.refuse_directory(parent, name)?;
                let boxes = &self.staging.boxes;
                boxes
                    .make(caller, parent, name, Staged::Directory)?
                    .ok_or_else(|| self.checks.refuse_meaningless_directory(parent, name))
            }
        }
    }

    fn begin_box(&self, home: &HomeView, caller: Caller, name: &str) -> Result<Node> {
        self.checks.refuse_dotted(name)?;
        decode(name).map_err(|error| self.checks.refuse(error.errno(), error.to_string()))?;
        self.checks.refuse_new_box(name)?;
        if home.boxes.names()?.id_of(name).is_some() {
            return Err(exists(name));
        }
        self.staging.boxes.begin(caller, name)
    }

    /// Takes a snapshot of a box that exists. For a program that copies, it makes room for a
    /// snapshot that the program brings: a snapshot of today would stand under the name of an old
    /// one until then, and for good if the tool skips what is there.
    fn snapshot(&self, home: &HomeView, caller: Caller, id: &str, name: &str) -> Result<Node> {
        self.checks.refuse_copying_over(caller, id, name)?;
        if caller.is_outside() {
            return Err(self.checks.refuse(
                libc::EPERM,
                format!(
                    "snapshot {name}: this process is in a pid namespace that the mount can't see into, so \
                     the mount can't tell whether it takes a snapshot or copies one; take it where the home is \
                     mounted, or with BoxLite"
                ),
            ));
        }
        let program = Program::of(caller);
        let boxes = &self.staging.boxes;
        let has_made_box = |staged: &mut StagedBox| staged.is_new_by(caller);
        let is_copying = program.copies()
            || (program.looks_first() && boxes.with_swept(id, has_made_box) == Some(true));
        if !is_copying {
            let snapshot = store::snapshot_box(&self.store, id, name, &|| !caller.is_dying())?;
            self.history.cancel(caller, id);
            let unlisted = program.serves_others().then(|| snapshot.clone());
            boxes.begin_in_existing(caller, id, unlisted);
            return Ok(Node::Snapshot(id.to_owned(), snapshot));
        }
        let parent = Node::Snapshots(id.to_owned());
        if home.child(&parent, name).is_ok() {
            return Err(exists(name));
        }
        store::refuse_unready_for_restore(&self.store, id).map_err(|error| {
            let message = format!("snapshot {name}: {error}");
            self.checks.refuse(error.errno(), message)
        })?;
        boxes.begin_in_existing(caller, id, None);
        boxes
            .make(caller, &parent, name, Staged::Directory)?
            .ok_or_else(not_there)
    }

    /// Makes a symbolic link in a box being made: one that our boxes have, which follows from the
    /// disk.
    ///
    /// # Errors
    /// EPERM for any other, and elsewhere.
    pub fn link(&self, caller: Caller, parent: &Node, name: &OsStr, target: &Path) -> Result<Node> {
        let name = text(name)?;
        if !is_ours(parent, name, target) {
            self.checks.fail_made(caller, parent);
            return Err(self.checks.refuse(
                libc::EPERM,
                format!("{name}: other links than those of our boxes would not be kept; copy what it points to, as {EXPORT}"),
            ));
        }
        let link = Staged::Link(PathBuf::from(target));
        let made = self.staging.boxes.make(caller, parent, name, link)?;
        let node = made.ok_or_else(|| {
            self.checks.remember_refused_copy(caller, parent);
            let message = format!("{name}: links are made only in a box that is being copied in");
            self.checks.refuse(libc::EPERM, message)
        })?;
        self.staging.was_made(caller, parent, name);
        Ok(node)
    }
}

/// Returns whether a link is one that our boxes, or snapshots, have: into the view of any mount.
fn is_ours(parent: &Node, name: &str, target: &Path) -> bool {
    if !matches!(parent, Node::Box(_) | Node::Snapshot(..)) {
        return false;
    }
    // A box may be made of a snapshot's directory, whose links lead from further below. And rsync's
    // daemon puts this in front of links, where it is not confined (munge symlinks).
    let target = target.to_str().map(|target| {
        let target = target.strip_prefix("/rsyncd-munged/").unwrap_or(target);
        target.trim_start_matches("../")
    });
    let below = target.and_then(|target| target.strip_prefix(&format!("{HIDDEN}/{VIEW}/")));
    Derived::named(name).is_some()
        && below.is_some_and(|below| below.rsplit('/').next() == Some(name))
}
