//! The boxes and snapshots that the home has now, and the names that they are shown by.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::exports::Source;
use crate::home::{BoxRecord, KeptBox, SnapshotRecord, is_kept_id};
use crate::store::Store;
use crate::tree::nodes::box_names::BoxNames;
use crate::tree::nodes::kept_names::kept_names;
use crate::tree::nodes::kernel_view::KernelView;
use crate::tree::nodes::names::{HIDDEN, SNAPSHOTS, VIEW, not_there};
use crate::tree::nodes::node::{Derived, Node};
use crate::{Error, Result};

/// The boxes of a home by the names that they are shown by.
pub struct Boxes {
    store: Arc<Store>,
    kernel: Arc<KernelView>,
    latest: Mutex<Option<Arc<BoxNames>>>,
}

impl Boxes {
    /// Returns the boxes of a home. The kernel is told where links point elsewhere.
    pub fn new(store: Arc<Store>, kernel: Arc<KernelView>) -> Boxes {
        Boxes {
            store,
            kernel,
            latest: Mutex::default(),
        }
    }

    /// Returns the names that the boxes have now.
    ///
    /// # Errors
    /// Those of reading the home.
    pub fn names(&self) -> Result<Arc<BoxNames>> {
        let catalog = self.store.home().catalog()?;
        let mut latest = self.latest.lock();
        if let Some(names) = &*latest
            && Arc::ptr_eq(names.catalog(), &catalog)
        {
            return Ok(names.clone());
        }
        self.store.exports().forget_gone(&catalog);
        let fresh = Arc::new(match &*latest {
            Some(before) => before.after(catalog),
            None => BoxNames::of(catalog),
        });
        if let Some(before) = &*latest {
            for link in &ChangedNames::between(before, &fresh).links {
                self.kernel.raise_generation(link);
            }
        }
        *latest = Some(fresh.clone());
        Ok(fresh)
    }

    /// Returns the row of a box.
    ///
    /// # Errors
    /// ENOENT, and those of reading the home.
    pub fn record(&self, id: &str) -> Result<BoxRecord> {
        self.names()?
            .catalog()
            .box_by_id(id)
            .cloned()
            .ok_or_else(not_there)
    }

    /// Returns the row of a snapshot.
    ///
    /// # Errors
    /// ENOENT, and those of reading the home.
    pub fn snapshot(&self, id: &str, snapshot: &str) -> Result<SnapshotRecord> {
        self.names()?
            .catalog()
            .snapshot_by_id(id, snapshot)
            .cloned()
            .ok_or_else(not_there)
    }

    /// Returns whether a box, or a snapshot, still exists.
    pub fn has(&self, source: &Source) -> bool {
        let names = self.names();
        names.is_ok_and(|names| source.is_in(names.catalog()))
    }

    /// Runs a change that replaces the disk of a box, or renames or removes it or a snapshot of it.
    /// Has the kernel drop what it keeps of the old state for a moment, in the view: the next look
    /// by a full path finds the new one, and the old name may soon be another's.
    ///
    /// # Errors
    /// Those of the change, and of reading the home.
    pub fn change(&self, box_id: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.names()?;
        // A change that failed may have been undone in more than one step.
        let changed = change();
        let box_id = box_id.to_owned();
        let view = Node::ViewOf(Source::Live { box_id });
        for derived in [Derived::Rootfs, Derived::DiskImage] {
            self.kernel.drop_name(&view, derived.name());
        }
        // If the rows can't be read now, the kernel keeps the names for its moment.
        if let Ok(after) = self.names() {
            self.drop_changed(&ChangedNames::between(&before, &after));
        }
        changed
    }

    fn drop_changed(&self, moved: &ChangedNames) {
        for link in &moved.links {
            self.kernel.drop_pages(link);
        }
        for (directory, name) in &moved.names {
            self.kernel.drop_name(directory, name);
        }
    }

    /// Returns where the link in the directory of a box or a snapshot points: into the hidden view.
    /// It has names and no ids, so that a box and its backup have the same links.
    ///
    /// # Errors
    /// ENOENT when the box or the snapshot is gone.
    pub fn link_target(&self, derived: Derived, source: &Source) -> Result<PathBuf> {
        let names = self.names()?;
        let gone = || Error::new(libc::ENOENT, "that is gone");
        if is_kept_id(source.box_id()) {
            return self.link_target_of_kept(derived, source);
        }
        let shown = names.of_id(source.box_id()).ok_or_else(gone)?;
        let what = derived.name();
        Ok(match source {
            Source::Live { .. } => format!("../{HIDDEN}/{VIEW}/{shown}/{what}").into(),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => {
                let row = names.catalog().snapshot_by_id(box_id, snapshot_id);
                let name = &row.ok_or_else(gone)?.name;
                format!("../../../{HIDDEN}/{VIEW}/{shown}/{SNAPSHOTS}/{name}/{what}").into()
            }
        })
    }

    /// Returns where the link in the directory of an entry points: to the entry by its id.
    fn link_target_of_kept(&self, derived: Derived, source: &Source) -> Result<PathBuf> {
        let (id, what) = (source.box_id(), derived.name());
        Ok(match source {
            Source::Live { .. } => format!("../../../{HIDDEN}/{VIEW}/{id}/{what}").into(),
            Source::Snapshot { snapshot_id, .. } => {
                let name = self.snapshot(id, snapshot_id)?.name;
                let up = "../../../../..";
                format!("{up}/{HIDDEN}/{VIEW}/{id}/{SNAPSHOTS}/{name}/{what}").into()
            }
        })
    }

    /// Returns what can be had back, by name, oldest first.
    ///
    /// # Errors
    /// Those of reading the home.
    pub fn kept(&self) -> Result<Vec<(String, Arc<KeptBox>)>> {
        let names = self.names()?;
        Ok(kept_names(self.store.home(), names.catalog()))
    }

    /// Returns an entry.
    ///
    /// # Errors
    /// ENOENT, and those of reading the home.
    pub fn kept_by_id(&self, id: &str) -> Result<Arc<KeptBox>> {
        let names = self.names()?;
        let entry = names.catalog().kept_by_id(id).cloned();
        entry.ok_or_else(not_there)
    }
}

/// What stands for something else than before, because boxes or snapshots were renamed or removed.
#[derive(Default)]
struct ChangedNames {
    /// Links that point elsewhere.
    links: Vec<Node>,
    /// Names in the view, each with its directory.
    names: Vec<(Node, String)>,
}

impl ChangedNames {
    fn between(before: &BoxNames, after: &BoxNames) -> ChangedNames {
        let mut moved = ChangedNames::default();
        for id in after.changed_since(before) {
            let now = after.of_id(&id);
            let Some(name) = before.of_id(&id).filter(|name| Some(*name) != now) else {
                moved.add_snapshots(&id, false, before, after);
                continue;
            };
            moved.names.push((Node::View, name.to_owned()));
            if now.is_some() {
                let box_id = id.clone();
                moved.add_links(&Source::Live { box_id });
                moved.add_snapshots(&id, true, before, after);
            }
        }
        moved
    }

    /// Adds the snapshots of a box that were renamed or removed, or whose box (`all`) was renamed.
    fn add_snapshots(&mut self, id: &str, all: bool, before: &BoxNames, after: &BoxNames) {
        let rows = after.catalog().snapshots_of(id).iter();
        let names: HashMap<&str, &str> = rows.map(|row| (&*row.id, &*row.name)).collect();
        for row in before.catalog().snapshots_of(id) {
            let now = names.get(&*row.id);
            if now.is_none_or(|now| *now != row.name) {
                let directory = Node::ViewSnapshots(id.to_owned());
                self.names.push((directory, row.name.clone()));
            }
            if now.is_some_and(|now| all || *now != row.name) {
                self.add_links(&Source::Snapshot {
                    box_id: id.to_owned(),
                    snapshot_id: row.id.clone(),
                });
            }
        }
    }

    fn add_links(&mut self, source: &Source) {
        let links = Derived::ALL.map(|derived| Node::Link(derived, source.clone()));
        self.links.extend(links);
    }
}
