//! Where the files of a disk state are, and what a box or a snapshot is called in messages.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::disk::{Chain, FileId, Scope};
use crate::files::listing::resolve;
use crate::home::{Activity, BoxRecord, Catalog, Home, SnapshotRecord};
use crate::{Error, Result};

/// A disk state that can be read, cloned and exported.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The live disk of a box.
    Live {
        /// The box's id.
        box_id: String,
    },
    /// A snapshot of a box.
    Snapshot {
        /// The box's id.
        box_id: String,
        /// The snapshot's id.
        snapshot_id: String,
    },
}

impl Source {
    /// The id of the box it belongs to.
    pub fn box_id(&self) -> &str {
        match self {
            Source::Live { box_id } | Source::Snapshot { box_id, .. } => box_id,
        }
    }

    /// Whether it is there.
    pub(crate) fn is_in(&self, catalog: &Catalog) -> bool {
        match self {
            Source::Live { box_id } => catalog.box_by_id(box_id).is_some(),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => catalog.snapshot_by_id(box_id, snapshot_id).is_some(),
        }
    }
}

/// Finds the files of disk states by their rows.
pub struct Disks {
    home: Arc<Home>,
}

impl Disks {
    /// Returns the disks of a home.
    pub(crate) fn new(home: Arc<Home>) -> Disks {
        Disks { home }
    }

    /// Where the layer of a snapshot is: what BoxLite's row says, if that is among the snapshots of
    /// its box or in `bases/`; else (a copied home) where it must be in this home.
    pub(crate) fn snapshot_layer(&self, snapshot: &SnapshotRecord) -> PathBuf {
        let own = self.home.snapshot_disk(&snapshot.box_id, &snapshot.name);
        // As BoxLite and we write it, and nothing to be resolved: there may be thousands.
        if snapshot
            .base_path()
            .is_some_and(|path| Path::new(&path) == own)
        {
            return own;
        }
        let snapshots = self.home.snapshots_dir(&snapshot.box_id);
        let recorded = snapshot
            .base_path()
            .and_then(|path| resolve(Path::new(&path)).ok());
        match recorded {
            Some(path)
                if path.starts_with(&snapshots)
                    || path.parent() == Some(self.home.bases_dir().as_path()) =>
            {
                path
            }
            _ => own,
        }
    }

    /// Where the layers below a file of the home may be. Those of a box that was written elsewhere, as in a
    /// backup of a home, are looked for in this home first: what headers name is not there any more, or
    /// another home's, which went on.
    pub(crate) fn scope_of(&self, top: &Path) -> Scope {
        let boxes = self.home.boxes_dir();
        let id = top
            .strip_prefix(&boxes)
            .ok()
            .and_then(|path| path.iter().next());
        let catalog = id.and_then(|_| self.home.catalog().ok());
        let record = id
            .and_then(|id| id.to_str())
            .zip(catalog.as_ref())
            .and_then(|(id, catalog)| catalog.box_by_id(id));
        let is_elsewhere = record.is_some_and(|record| !self.is_at_home(record));
        let moved = [
            ("bases", self.home.bases_dir()),
            ("boxes", boxes),
            ("images", self.home.root().join("images")),
        ];
        Scope {
            homes: self.home.directories().map(Path::to_owned).collect(),
            owner: self.home.owner().uid,
            moved: moved.into_iter().filter(|_| is_elsewhere).collect(),
        }
    }

    /// The file on top of the chain of a disk state.
    ///
    /// # Errors
    /// ENOENT when the box or snapshot is gone.
    pub(crate) fn top_of(&self, source: &Source) -> Result<PathBuf> {
        match source {
            Source::Live { box_id } => Ok(self.home.live_disk(box_id)),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => {
                let catalog = self.home.catalog()?;
                catalog
                    .snapshot_by_id(box_id, snapshot_id)
                    .map(|snapshot| self.snapshot_layer(snapshot))
                    .ok_or_else(|| Error::new(libc::ENOENT, "the snapshot is gone"))
            }
        }
    }

    /// Whether there is a disk to export.
    pub fn has_disk(&self, source: &Source) -> bool {
        self.top_of(source).is_ok_and(|top| top.is_file())
    }

    /// When the disk state last changed.
    pub fn changed_at(&self, source: &Source) -> Option<SystemTime> {
        let top = self.top_of(source).ok()?;
        fs::metadata(top).and_then(|meta| meta.modified()).ok()
    }

    pub(crate) fn record_of(&self, source: &Source) -> Result<BoxRecord> {
        self.home
            .catalog()?
            .box_by_id(source.box_id())
            .cloned()
            .ok_or_else(|| Error::new(libc::ENOENT, "the box is gone"))
    }

    /// The file on top of a chain that is there.
    pub(crate) fn existing_top(&self, source: &Source, record: &BoxRecord) -> Result<PathBuf> {
        let top = self.top_of(source)?;
        if top.is_file() {
            return Ok(top);
        }
        Err(Error::new(
            libc::ENODATA,
            format!(
                "box {} has no disk yet; start it once with BoxLite",
                display_name(record)
            ),
        ))
    }

    /// EBUSY while somebody may write to the box's disk.
    pub(crate) fn refuse_active(&self, record: &BoxRecord) -> Result<()> {
        match self.home.activity(record) {
            Activity::Idle => Ok(()),
            Activity::Active(why) => Err(Error::busy(format!(
                "box {} is busy: {why}; stop it first",
                display_name(record)
            ))),
        }
    }

    /// Whether a box lives in this home, by its configuration.
    pub(crate) fn is_at_home(&self, record: &BoxRecord) -> bool {
        self.refuse_copied(record).is_ok()
    }

    fn is_box_home(&self, box_home: &Path, here: &Path) -> bool {
        // A box that never started may have no directory at all. Whoever comes by a link is at home, too.
        box_home == here
            || std::fs::metadata(box_home)
                .and_then(|there| Ok(FileId::of(&there) == FileId::of(&std::fs::metadata(here)?)))
                .unwrap_or(false)
    }

    /// In a copied home the configuration still names the original's directory, and changes by
    /// BoxLite or by us would hit the original.
    pub(crate) fn refuse_copied(&self, record: &BoxRecord) -> Result<()> {
        let config = record.config()?;
        let box_home = config["box_home"].as_str().unwrap_or_default();
        let here = self.home.box_dir(&record.id);
        if self.is_box_home(Path::new(box_home), &here) {
            return Ok(());
        }
        Err(Error::new(
            libc::EPERM,
            format!(
                "box {} says it lives in {box_home}, not in {}: this home is a copy, and changes could hit the original; export its boxes and import them into a new home",
                display_name(record),
                here.display()
            ),
        ))
    }

    /// How a box is called in the log.
    pub(crate) fn name_of(&self, box_id: &str) -> String {
        self.home
            .catalog()
            .ok()
            .and_then(|catalog| {
                catalog
                    .box_by_id(box_id)
                    .map(|record| display_name(record).to_owned())
            })
            .unwrap_or_else(|| box_id.to_owned())
    }

    /// A source in a message.
    pub(crate) fn describe(&self, source: &Source) -> String {
        let name = self.name_of(source.box_id());
        match source {
            Source::Live { .. } => format!("box {name}"),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => {
                let catalog = self.home.catalog().ok();
                let snapshot = catalog
                    .as_ref()
                    .and_then(|catalog| catalog.snapshot_by_id(box_id, snapshot_id))
                    .map_or(snapshot_id.as_str(), |snapshot| snapshot.name.as_str());
                format!("snapshot {snapshot} of box {name}")
            }
        }
    }

    /// How a snapshot is called in the log.
    pub(crate) fn snapshot_name(&self, box_id: &str, snapshot_id: &str) -> Result<String> {
        Ok(self
            .home
            .catalog()?
            .snapshot_by_id(box_id, snapshot_id)
            .map_or_else(|| snapshot_id.to_owned(), |snapshot| snapshot.name.clone()))
    }

    /// Opens a chain. A change of ours may move a layer's name between reading a header and opening
    /// what it names; then the header has the new name already.
    pub(crate) fn open_chain(&self, top: &Path) -> Result<Chain> {
        let scope = self.scope_of(top);
        let open = || Chain::open_in(top, &scope);
        match open() {
            Err(error) if error.errno() == libc::ENOENT => open().map_err(|error| {
                // Its name is there: that it can't be read is no ENOENT, which is taken for gone.
                match error.errno() == libc::ENOENT && top.exists() {
                    true => Error::damaged(error.to_string()),
                    false => error,
                }
            }),
            result => result,
        }
    }
}

/// How a box is called in messages: its name, or its id where it has none.
pub(crate) fn display_name(record: &BoxRecord) -> &str {
    record.name.as_deref().unwrap_or(&record.id)
}
