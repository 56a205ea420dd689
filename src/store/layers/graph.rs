//! The layer graph: every image file of the home and the backing path its header names.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::Result;
use crate::disk::{FileId, Header, Moment};
use crate::exports::States;
use crate::files::listing::{is_absent, names_in, resolve};
use crate::home::{BaseRecord, Home};
use crate::store::layers::spare_names::{SharedSpares, SpareNames, Spares};

/// The role of a file in BoxLite's layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// `boxes/ID/disks/disk.qcow2`.
    Live { box_id: String },
    /// `boxes/ID/snapshots/NAME/disk.qcow2`.
    Snapshot { box_id: String, name: String },
    /// `bases/ID.qcow2`.
    Base { id: String },
}

/// One name of an image file.
#[derive(Clone, Debug)]
pub struct ImageFile {
    /// The path of this name.
    pub path: PathBuf,
    /// The inode.
    pub id: FileId,
    /// How many names the inode has, known to the home or not, without those of [`Spares`].
    pub names: u64,
    /// While this is unchanged, so is the header.
    pub stamp: Stamp,
    /// Bytes allocated on the disk.
    pub allocated: u64,
    /// The role of this name.
    pub role: Role,
    /// The backing path as the header spells it.
    pub stored: Option<PathBuf>,
    /// The backing path, resolved; None for an image without one.
    pub backing: Option<PathBuf>,
    /// Why the header can't be read. Such a file may read from any other.
    pub damaged: Option<String>,
}

impl ImageFile {
    /// Returns an entry for a file that can't be inspected: it may read from any other.
    fn unreadable(path: PathBuf, role: Role, why: String) -> ImageFile {
        ImageFile {
            damaged: Some(format!("{}: {why}", path.display())),
            path,
            id: FileId { dev: 0, ino: 0 },
            names: 0,
            stamp: Stamp::default(),
            allocated: 0,
            role,
            stored: None,
            backing: None,
        }
    }

    /// Returns the id of the box whose directory the file is in.
    pub fn box_id(&self) -> Option<&str> {
        match &self.role {
            Role::Live { box_id } | Role::Snapshot { box_id, .. } => Some(box_id),
            Role::Base { .. } => None,
        }
    }
}

/// All image files of a home at one moment.
#[derive(Default)]
pub struct LayerGraph {
    files: Vec<ImageFile>,
    by_path: HashMap<PathBuf, usize>,
    by_id: HashMap<FileId, Vec<usize>>,
    by_box: HashMap<String, Vec<usize>>,
    /// The files whose header names a path.
    readers: HashMap<PathBuf, Vec<usize>>,
    spares: SharedSpares,
}

impl LayerGraph {
    fn new(files: Vec<ImageFile>, spares: SharedSpares) -> Self {
        let mut layers = LayerGraph {
            spares,
            ..LayerGraph::default()
        };
        for (index, file) in files.iter().enumerate() {
            layers.by_path.insert(file.path.clone(), index);
            layers.by_id.entry(file.id).or_default().push(index);
            if let Some(box_id) = file.box_id() {
                let of_box = layers.by_box.entry(box_id.to_owned());
                of_box.or_default().push(index);
            }
            if let Some(backing) = &file.backing {
                layers
                    .readers
                    .entry(backing.clone())
                    .or_default()
                    .push(index);
            }
        }
        layers.files = files;
        layers
    }

    /// Returns the spare names of bases.
    pub fn spares(&self) -> &Spares {
        &self.spares
    }

    /// Returns every path that a header names.
    pub fn named(&self) -> impl Iterator<Item = &Path> {
        self.readers.keys().map(PathBuf::as_path)
    }

    /// Returns every name of every file.
    pub fn files(&self) -> &[ImageFile] {
        &self.files
    }

    /// Returns the file with this resolved path.
    pub fn at(&self, path: &Path) -> Option<&ImageFile> {
        self.by_path.get(path).map(|index| &self.files[*index])
    }

    fn all<'l>(&'l self, indexes: Option<&'l Vec<usize>>) -> impl Iterator<Item = &'l ImageFile> {
        let indexes = indexes.into_iter().flatten();
        indexes.filter_map(|index| self.files.get(*index))
    }

    /// Returns all names of one inode.
    pub fn names_of(&self, id: FileId) -> impl Iterator<Item = &ImageFile> {
        self.all(self.by_id.get(&id))
    }

    /// Returns the files in the directory of a box.
    pub fn of_box(&self, box_id: &str) -> impl Iterator<Item = &ImageFile> + use<'_> {
        self.all(self.by_box.get(box_id))
    }

    /// Returns the files whose header names this path.
    pub fn readers_of(&self, path: &Path) -> impl Iterator<Item = &ImageFile> + use<'_> {
        self.all(self.readers.get(path))
    }

    /// Returns the ids of the boxes with a chain through `path`.
    pub fn boxes_above(&self, path: &Path) -> BTreeSet<String> {
        let mut boxes = BTreeSet::new();
        let mut seen = HashSet::from([path]);
        let mut next: Vec<&Path> = vec![path];
        while let Some(path) = next.pop() {
            boxes.extend(self.at(path).and_then(ImageFile::box_id).map(str::to_owned));
            let readers = self
                .all(self.readers.get(path))
                .map(|file| file.path.as_path());
            next.extend(readers.filter(|path| seen.insert(path)));
        }
        boxes
    }

    /// Returns the graph without these paths.
    pub fn without(&self, removed: &[PathBuf]) -> LayerGraph {
        let files = self.files.iter();
        let remaining = files.filter(|file| !removed.contains(&file.path));
        let mut remaining: Vec<ImageFile> = remaining.cloned().collect();
        for file in &mut remaining {
            let lost = self
                .names_of(file.id)
                .filter(|name| removed.contains(&name.path));
            file.names = file.names.saturating_sub(lost.count() as u64);
        }
        LayerGraph::new(remaining, self.spares.clone())
    }

    /// Returns the paths of a file's chain, the file first. The chain ends with the first path that
    /// is no image file of the home (a raw image, a file outside), or before a path repeats.
    pub fn chain<'l>(&'l self, top: &'l Path) -> Vec<&'l Path> {
        let mut chain = vec![top];
        let mut at = top;
        while let Some(backing) = self.at(at).and_then(|file| file.backing.as_deref()) {
            if chain.contains(&backing) {
                break;
            }
            chain.push(backing);
            at = backing;
        }
        chain
    }

    /// Returns a layer that a header names, that is there, and that the scan did not find. Beside a
    /// runtime, BoxLite may have moved a disk there while the directories were read, and what that
    /// disk reads was not seen.
    pub fn unseen(&self, home: &Home) -> Option<&Path> {
        let is_layer = |path: &Path| {
            path.starts_with(home.boxes_dir())
                || (path.parent() == Some(home.bases_dir().as_path())
                    && path
                        .extension()
                        .is_some_and(|extension| extension == "qcow2"))
        };
        self.named()
            .find(|path| is_layer(path) && self.at(path).is_none() && path.exists())
    }

    /// Returns the first file whose header can't be read. Such a file may read from any other, so
    /// nothing may be freed.
    pub fn damaged(&self) -> Option<&ImageFile> {
        self.files.iter().find(|file| file.damaged.is_some())
    }
}

/// Length, modification time and change time (ns). Any rebase changes the last.
pub type Stamp = (u64, i128, i128);

/// Returns the stamp of a file with this metadata.
pub fn stamp(meta: &fs::Metadata) -> Stamp {
    let nanoseconds = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
    (
        meta.len(),
        nanoseconds(meta.mtime(), meta.mtime_nsec()),
        nanoseconds(meta.ctime(), meta.ctime_nsec()),
    )
}

/// The state of a scan.
#[derive(Default)]
struct Scan {
    /// The moment before the first file was inspected.
    moment: Moment,
    files: Vec<ImageFile>,
    spares: Spares,
    directories: Directories,
}

/// A cache of resolved directories: thousands of headers name files in the same few.
#[derive(Default)]
pub struct Directories {
    resolved: HashMap<PathBuf, Option<PathBuf>>,
}

impl Directories {
    /// Resolves the directory of a path, as [`resolve`] does. A path whose directory is missing
    /// stays as it is.
    pub fn resolve(&mut self, path: PathBuf) -> PathBuf {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return path;
        };
        let resolved = match self.resolved.get(dir) {
            Some(resolved) => resolved,
            None => {
                let resolved = fs::canonicalize(dir).ok();
                self.resolved.entry(dir.to_owned()).or_insert(resolved)
            }
        };
        match resolved {
            Some(dir) => dir.join(name),
            None => path,
        }
    }
}

/// Returns whether the row of a base names the file with this resolved path.
pub fn is_row_of(row: &BaseRecord, path: &Path) -> bool {
    let row = Path::new(&row.base_path);
    row == path || (row.file_name() == path.file_name() && resolve(row).is_ok_and(|p| p == path))
}

/// Backing paths read from headers, each valid while the file's stamp is unchanged.
type HeaderCache = HashMap<FileId, (Stamp, std::result::Result<Option<PathBuf>, String>)>;

/// Finds all image files of a home, and reads the headers that changed since the last scan.
pub struct LayerScanner {
    home: Arc<Home>,
    states: Arc<States>,
    spares: Arc<SpareNames>,
    headers: Mutex<HeaderCache>,
}

impl LayerScanner {
    /// Returns a scanner that has read no header yet.
    pub fn new(home: Arc<Home>, states: Arc<States>, spares: Arc<SpareNames>) -> LayerScanner {
        LayerScanner {
            home,
            states,
            spares,
            headers: Mutex::default(),
        }
    }

    /// Returns the resolved path that the row of a base names.
    ///
    /// # Errors
    /// ENOENT when its directory does not exist.
    pub fn path_of_base(&self, row: &BaseRecord) -> Result<PathBuf> {
        let path = PathBuf::from(&row.base_path);
        if path.parent() == Some(self.home.bases_dir().as_path()) {
            // The path of the home is resolved already.
            Ok(path)
        } else {
            resolve(&path)
        }
    }

    /// Scans `bases/` and `boxes/` for image files, with rows or without.
    ///
    /// # Errors
    /// Those of reading the directories.
    pub fn scan(&self) -> Result<LayerGraph> {
        let mut scan = Scan {
            moment: self.states.moment_now(&self.home.bases_dir()),
            spares: self.spares.scan()?,
            ..Scan::default()
        };
        for name in names_in(&self.home.bases_dir())? {
            if let Some(id) = name.strip_suffix(".qcow2") {
                let role = Role::Base { id: id.to_owned() };
                self.add_file(self.home.base_disk(id), role, &mut scan);
            }
        }
        for box_id in names_in(&self.home.boxes_dir())? {
            let role = Role::Live {
                box_id: box_id.clone(),
            };
            self.add_file(self.home.live_disk(&box_id), role, &mut scan);
            for name in names_in(&self.home.snapshots_dir(&box_id))? {
                let path = self.home.snapshot_disk(&box_id, &name);
                let role = Role::Snapshot {
                    box_id: box_id.clone(),
                    name,
                };
                self.add_file(path, role, &mut scan);
            }
        }
        let layers = LayerGraph::new(scan.files, SharedSpares::new(scan.spares));
        let mut headers = self.headers.lock();
        headers.retain(|id, _| layers.by_id.contains_key(id));
        drop(headers);
        Ok(layers)
    }

    /// Adds the file at `path` to the scan, if there is one.
    fn add_file(&self, path: PathBuf, role: Role, scan: &mut Scan) {
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(e) if is_absent(&e) => return,
            Err(e) => {
                return scan
                    .files
                    .push(ImageFile::unreadable(path, role, e.to_string()));
            }
        };
        if !meta.is_file() {
            let why = "not a regular file".to_owned();
            return scan.files.push(ImageFile::unreadable(path, role, why));
        }
        let id = FileId::of(&meta);
        let stamp = stamp(&meta);
        let (backing, damaged) = match self.backing_of(&path, id, stamp, &scan.moment) {
            Ok(backing) => (backing, None),
            Err(why) => (None, Some(why)),
        };
        // A relative path starts at the directory of the name that the file is read by.
        let stored = backing;
        let backing = stored.clone().map(|stored| match path.parent() {
            Some(dir) => scan.directories.resolve(dir.join(stored)),
            None => stored,
        });
        scan.files.push(ImageFile {
            path,
            id,
            names: meta.nlink().saturating_sub(scan.spares.count_of(id)),
            stamp,
            allocated: meta.blocks() * 512,
            role,
            stored,
            backing,
            damaged,
        });
    }

    /// Returns the backing path that a header names, as stored, or why the header can't be read.
    fn backing_of(
        &self,
        path: &Path,
        id: FileId,
        stamp: Stamp,
        moment: &Moment,
    ) -> std::result::Result<Option<PathBuf>, String> {
        if let Some((cached, backing)) = self.headers.lock().get(&id)
            && *cached == stamp
        {
            return backing.clone();
        }
        let backing = match Header::open(path) {
            Ok(Some(header)) => Ok(header.backing.map(|backing| backing.path)),
            // Truncated or overwritten: the backing path is unknown.
            Ok(None) => Err(format!("{} is not a qcow2 image", path.display())),
            Err(error) => Err(error.to_string()),
        };
        // A header that changed within the clock's tick can change again with the same stamp.
        if moment.is_after(id.dev, stamp.2) {
            self.headers.lock().insert(id, (stamp, backing.clone()));
        }
        backing
    }
}
