//! Finding the files of a disk state, and naming boxes and snapshots in messages.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::disk::{self, Chain, FileId, Header, Scope};
use crate::files::listing::resolve;
use crate::home::{
    Activity, BoxRecord, Catalog, Home, SnapshotRecord, is_kept_id, is_open_for_writing,
};
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
    /// Returns the id of the box it belongs to.
    pub fn box_id(&self) -> &str {
        match self {
            Source::Live { box_id } | Source::Snapshot { box_id, .. } => box_id,
        }
    }

    /// Returns whether the catalog has the box or the snapshot.
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

/// Finds the files of disk states by the rows of BoxLite's database.
pub struct Disks {
    home: Arc<Home>,
}

impl Disks {
    /// Returns the disks of a home.
    pub(crate) fn new(home: Arc<Home>) -> Disks {
        Disks { home }
    }

    /// Returns the path of a snapshot's layer: the one in BoxLite's row, if it lies among the
    /// snapshots of the box or in `bases/`. Otherwise the home is a copy, and this is the path that
    /// the layer has in it: in the directory of the same name.
    pub(crate) fn snapshot_layer(&self, snapshot: &SnapshotRecord) -> PathBuf {
        self.snapshot_layer_among(snapshot, &|_| false)
    }

    /// Returns the path of a snapshot's layer, as [`Disks::snapshot_layer`] does. `is_there` knows
    /// of some files that they exist.
    pub(crate) fn snapshot_layer_among(
        &self,
        snapshot: &SnapshotRecord,
        is_there: &dyn Fn(&Path) -> bool,
    ) -> PathBuf {
        let own = self.home.snapshot_disk(&snapshot.box_id, &snapshot.name);
        let snapshots = self.home.snapshots_dir(&snapshot.box_id);
        let recorded = snapshot.base_path().map(PathBuf::from);
        // Paths as BoxLite and we write them. Resolve no links then: there may be thousands of
        // snapshots.
        if let Some(path) = &recorded
            && (*path == own
                || self.is_plain_place(path, &snapshots) && (is_there(path) || path.exists()))
        {
            return path.clone();
        }
        match recorded.as_deref().and_then(|path| resolve(path).ok()) {
            Some(path)
                if path.starts_with(&snapshots)
                    || path.parent() == Some(self.home.bases_dir().as_path()) =>
            {
                path
            }
            _ => {
                let directory = recorded.as_deref().and_then(Path::parent);
                let name = directory.and_then(Path::file_name);
                let here = name.map(|name| snapshots.join(name).join("disk.qcow2"));
                here.filter(|path| path.is_file()).unwrap_or(own)
            }
        }
    }

    /// Returns whether a path is that of a layer in a directory of `snapshots`, or in `bases/`, by its
    /// names alone.
    fn is_plain_place(&self, path: &Path, snapshots: &Path) -> bool {
        let Some(parent) = path.parent() else {
            return false;
        };
        let is_snapshot = parent.file_name().is_some() && parent.parent() == Some(snapshots);
        path.file_name().is_some() && (is_snapshot || parent == self.home.bases_dir())
    }

    /// Returns where the layers below a file of the home may lie. For a box written in another
    /// home, such as the original of a backup, this home is searched first: the paths in the
    /// headers lead nowhere, or into the other home, which has changed since.
    pub(crate) fn scope_of(&self, top: &Path) -> Scope {
        let boxes = self.home.boxes_dir();
        let undo = self.home.undo_dir();
        let inside = top
            .strip_prefix(&boxes)
            .or_else(|_| top.strip_prefix(&undo));
        let box_id = inside.ok().and_then(|path| path.iter().next());
        let catalog = box_id.and_then(|_| self.home.catalog().ok());
        let record = box_id
            .and_then(|id| id.to_str())
            .zip(catalog.as_ref())
            .and_then(|(id, catalog)| catalog.box_by_id(id));
        let is_from_elsewhere = record.is_some_and(|record| !self.is_at_home(record));
        let moved = [
            ("bases", self.home.bases_dir()),
            ("boxes", boxes),
            ("images", self.home.root().join("images")),
        ];
        Scope {
            homes: self.home.directories().map(Path::to_owned).collect(),
            owner: self.home.owner().uid,
            moved: moved.into_iter().filter(|_| is_from_elsewhere).collect(),
        }
    }

    /// Returns the path of a disk state's topmost file. The file may be missing.
    ///
    /// # Errors
    /// ENOENT when the snapshot is gone; those of reading the catalog.
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

    /// Returns whether there is a disk to export.
    pub fn has_disk(&self, source: &Source) -> bool {
        self.top_of(source).is_ok_and(|top| top.is_file())
    }

    /// Returns when the disk last changed. None when there is no disk.
    pub fn changed_at(&self, source: &Source) -> Option<SystemTime> {
        let top = self.top_of(source).ok()?;
        fs::metadata(top).and_then(|meta| meta.modified()).ok()
    }

    /// Returns the size of the disk in bytes, as its guest sees it.
    ///
    /// # Errors
    /// ENODATA when the box has no disk yet; EIO when its topmost file is damaged.
    pub fn virtual_size(&self, source: &Source) -> Result<u64> {
        let top = self.existing_top(source, &self.record_of(source)?)?;
        match Header::open(&top)? {
            Some(header) => Ok(header.virtual_size),
            None => Err(Error::damaged(format!(
                "{} is not a qcow2 image",
                top.display()
            ))),
        }
    }

    /// Returns the row of the box that a disk state belongs to.
    ///
    /// # Errors
    /// ENOENT when the box is gone; those of reading the catalog.
    pub(crate) fn record_of(&self, source: &Source) -> Result<BoxRecord> {
        self.home
            .catalog()?
            .box_by_id(source.box_id())
            .cloned()
            .ok_or_else(|| Error::new(libc::ENOENT, "the box is gone"))
    }

    /// Returns whether a file of a box or a snapshot that is missing may be there in a moment: a
    /// runtime has the home, the rows are there, and the box had a disk.
    fn may_be_moving(&self, source: &Source) -> bool {
        let disks = self.home.box_dir(source.box_id()).join("disks");
        disks.is_dir()
            && self.home.runtime().is_some()
            && self
                .home
                .catalog()
                .is_ok_and(|catalog| source.is_in(&catalog))
    }

    /// Makes an error of a missing or unfinished file EBUSY, for a moment, if BoxLite may be moving
    /// the disks of the source. Any other error stays as it is.
    pub(crate) fn busy_if_moving(&self, source: &Source, error: Error) -> Error {
        const OF_FILES: [i32; 4] = [libc::ENOENT, libc::ENODATA, libc::EOPNOTSUPP, libc::ESTALE];
        if !OF_FILES.contains(&error.errno()) || !self.may_be_moving(source) {
            return error;
        }
        Error::busy(format!(
            "{error}; BoxLite may be changing {} at this moment: try again",
            self.describe(source)
        ))
        .for_a_moment()
    }

    /// Returns the path of a disk state's topmost file, which exists.
    ///
    /// # Errors
    /// ENODATA when the box has no disk yet, EBUSY when BoxLite may be replacing it; as
    /// [`Disks::top_of`].
    pub(crate) fn existing_top(&self, source: &Source, record: &BoxRecord) -> Result<PathBuf> {
        let top = self.top_of(source)?;
        if top.is_file() {
            return Ok(top);
        }
        if self.may_be_moving(source) {
            return Err(Error::busy(format!(
                "box {} has no disk at this moment: BoxLite is replacing it, or has never started the box; try again",
                display_name(record)
            ))
            .for_a_moment());
        }
        Err(Error::new(
            libc::ENODATA,
            format!(
                "box {} has no disk yet; start it once with BoxLite",
                display_name(record)
            ),
        ))
    }

    /// Fails while the box is active: another process may write to its disk.
    ///
    /// # Errors
    /// EBUSY, with the reason.
    pub(crate) fn refuse_active(&self, record: &BoxRecord) -> Result<()> {
        match self.home.activity(record) {
            Activity::Idle => Ok(()),
            Activity::Active(why) if self.home.is_written(&record.id) => {
                let name = display_name(record);
                // A program that has just closed it is not told when the last of it is closed.
                Err(
                    Error::busy(format!("box {name} is busy: {why}; close it first"))
                        .for_a_moment(),
                )
            }
            Activity::Active(why) => Err(Error::busy(format!(
                "box {} is busy: {why}; stop it first",
                display_name(record)
            ))),
        }
    }

    /// Returns whether a box belongs to this home, by its configuration.
    pub(crate) fn is_at_home(&self, record: &BoxRecord) -> bool {
        self.refuse_copied(record).is_ok()
    }

    fn is_box_home(&self, box_home: &Path, here: &Path) -> bool {
        // Compare paths first: a box that never started may have no directory. Then compare
        // directories: the home may be reached by a link.
        box_home == here
            || std::fs::metadata(box_home)
                .and_then(|there| Ok(FileId::of(&there) == FileId::of(&std::fs::metadata(here)?)))
                .unwrap_or(false)
    }

    /// Fails in a copied home: a box's configuration still names its directory in the original
    /// home, so changes by BoxLite or by us would hit the original.
    ///
    /// # Errors
    /// EPERM; those of reading the box's configuration.
    pub(crate) fn refuse_copied(&self, record: &BoxRecord) -> Result<()> {
        let config = record.config()?;
        let box_home = config["box_home"].as_str().unwrap_or_default();
        let here = self.home.box_dir(&record.id);
        let is_here = if is_kept_id(&record.id) {
            // An entry has the configuration of its box, whose directory is gone.
            let boxes = Path::new(box_home).parent().unwrap_or(Path::new(""));
            self.is_box_home(boxes, &self.home.boxes_dir())
        } else {
            self.is_box_home(Path::new(box_home), &here)
        };
        if is_here {
            return Ok(());
        }
        Err(Error::new(
            libc::EPERM,
            format!(
                "the configuration of box {} names {box_home}, not {}: this home is a copy, and changes could hit the original; export its boxes and import them into a new home",
                display_name(record),
                here.display()
            ),
        ))
    }

    /// Refuses a state of which a layer is still being written. BoxLite up to 0.11.0 snapshots and
    /// clones a running box by renaming its disk, and the machine goes on writing to that file. So
    /// the snapshot, and every state above it, changes until the machine ends.
    ///
    /// # Errors
    /// EBUSY.
    pub(crate) fn refuse_written(&self, source: &Source, top: &Path) -> Result<()> {
        // A broken chain is for the caller to find.
        let chain = disk::chain_paths(top).unwrap_or_default();
        let is_written = |layer: &PathBuf| {
            // A header of ours is written for a moment.
            let mut tries = 0..4;
            is_open_for_writing(layer)
                && tries.all(|_| {
                    std::thread::sleep(Duration::from_millis(25));
                    is_open_for_writing(layer)
                })
        };
        match chain.iter().find(|layer| is_written(layer)) {
            None => Ok(()),
            Some(layer) => Err(Error::busy(format!(
                "{} still changes: a machine writes to {}, because BoxLite took a snapshot or a clone of its box while it ran; stop that box first, or take a snapshot of it with mkdir and use that",
                self.describe(source),
                layer.display()
            ))),
        }
    }

    /// Returns the name of a box for messages, or its id if it has no name or is gone.
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

    /// Returns the name of a disk state for messages: "box web", or "snapshot a of box web".
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

    /// Returns the name of a snapshot for messages, or its id if it is gone.
    ///
    /// # Errors
    /// Those of reading the catalog.
    pub(crate) fn snapshot_name(&self, box_id: &str, snapshot_id: &str) -> Result<String> {
        Ok(self
            .home
            .catalog()?
            .snapshot_by_id(box_id, snapshot_id)
            .map_or_else(|| snapshot_id.to_owned(), |snapshot| snapshot.name.clone()))
    }

    /// Opens a chain. A change of ours may rename a layer between reading a header and opening the
    /// layer it names. Then the header names the new path already, and a second try succeeds.
    ///
    /// # Errors
    /// ENOENT when the topmost file is gone; EIO when a layer is missing or damaged.
    pub(crate) fn open_chain(&self, top: &Path) -> Result<Chain> {
        let scope = self.scope_of(top);
        let open = || Chain::open_in(top, &scope);
        match open() {
            Err(error) if error.errno() == libc::ENOENT => open().map_err(|error| {
                // The disk exists, so a missing layer is damage. ENOENT would mean that the disk is
                // gone.
                if error.errno() == libc::ENOENT && top.exists() {
                    Error::damaged(error.to_string())
                } else {
                    error
                }
            }),
            result => result,
        }
    }
}

/// Returns the name of a box for messages, or its id if it has no name.
pub(crate) fn display_name(record: &BoxRecord) -> &str {
    record.name.as_deref().unwrap_or(&record.id)
}
