//! The boxes and snapshots that the home has now, and the names that they are shown by.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::exports::Source;
use crate::home::{BoxRecord, SnapshotRecord};
use crate::store::Store;
use crate::tree::nodes::box_names::BoxNames;
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
            for link in links_elsewhere(before, &fresh) {
                self.kernel.raise_generation(&link);
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

    /// Runs `rename`, which renames a box or a snapshot, and has the kernel forget where the links
    /// pointed: the old name may soon be another's.
    ///
    /// # Errors
    /// Those of `rename`, and of reading the home.
    pub fn rename(&self, rename: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.names()?;
        rename()?;
        let after = self.names()?;
        for link in links_elsewhere(&before, &after) {
            self.kernel.drop_pages(&link);
        }
        Ok(())
    }

    /// Returns where the link in the directory of a box or a snapshot points: into the hidden view.
    /// It has names and no ids, so that a box and its backup have the same links.
    ///
    /// # Errors
    /// ENOENT when the box or the snapshot is gone.
    pub fn link_target(&self, derived: Derived, source: &Source) -> Result<PathBuf> {
        let names = self.names()?;
        let gone = || Error::new(libc::ENOENT, "that is gone");
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
}

/// Returns the links that point elsewhere than before, because names changed.
fn links_elsewhere(before: &BoxNames, after: &BoxNames) -> Vec<Node> {
    let mut sources = Vec::new();
    for id in after.renamed_since(before) {
        let Some(now) = after.of_id(&id) else {
            continue;
        };
        let is_moved = before.of_id(&id).is_some_and(|name| name != now);
        if is_moved {
            let box_id = id.clone();
            sources.push(Source::Live { box_id });
        }
        for row in before.catalog().snapshots_of(&id) {
            let now = after.catalog().snapshot_by_id(&id, &row.id);
            if now.is_some_and(|now| is_moved || now.name != row.name) {
                sources.push(Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: row.id.clone(),
                });
            }
        }
    }
    let links = |source: Source| Derived::ALL.map(|derived| Node::Link(derived, source.clone()));
    sources.into_iter().flat_map(links).collect()
}
