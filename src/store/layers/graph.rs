//! The layer graph: every image file of the home and the backing path its header names.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use parking_lot::Mutex;

use crate::Result;
use crate::disk::{FileId, Header, Moment};
use crate::exports::{OpenHome, States};
use crate::files::listing::{is_absent, names_in, resolve};
use crate::home::{BaseRecord, Home, KnownHeader, SizeCache, is_kept_id};
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
    /// A disk of the entry ID, below `.boxlitefs/undo/ID`.
    Kept { id: String },
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
            Role::Base { .. } | Role::Kept { .. } => None,
        }
    }
}

/// All image files of a home at one moment.
#[derive(Default)]
pub struct LayerGraph {
    files: Vec<ImageFile>,
    /// Resolved paths are the same if their bytes are, and those are quicker to hash than a path's
    /// components.
    by_path: HashMap<OsString, usize>,
    by_id: HashMap<FileId, Vec<usize>>,
    by_box: HashMap<String, Vec<usize>>,
    /// The files whose header names a path.
    readers: HashMap<OsString, Vec<usize>>,
    /// The names that were removed since.
    forgotten: HashSet<usize>,
    spares: SharedSpares,
}

impl LayerGraph {
    fn new(files: Vec<ImageFile>, spares: SharedSpares) -> Self {
        let mut layers = LayerGraph {
            spares,
            ..LayerGraph::default()
        };
        for (index, file) in files.iter().enumerate() {
            layers.by_path.insert(file.path.clone().into(), index);
            layers.by_id.entry(file.id).or_default().push(index);
            if let Some(box_id) = file.box_id() {
                let of_box = layers.by_box.entry(box_id.to_owned());
                of_box.or_default().push(index);
            }
            if let Some(backing) = &file.backing {
                layers
                    .readers
                    .entry(backing.clone().into())
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

    /// Returns whether a base has a spare name, and both are names of one file.
    pub fn has_spare(&self, base: &Path) -> bool {
        let spare = self.spares.of_base(base);
        spare.is_some_and(|spare| self.at(base).is_some_and(|file| file.id == spare.id))
    }

    /// Returns every path that a header names.
    pub fn named(&self) -> impl Iterator<Item = &Path> {
        let read = self.readers.iter().filter(|(_, by)| !by.is_empty());
        read.map(|(path, _)| Path::new(path))
    }

    /// Returns every name of every file.
    pub fn files(&self) -> impl Iterator<Item = &ImageFile> {
        let files = self.files.iter().enumerate();
        files
            .filter(|(index, _)| !self.forgotten.contains(index))
            .map(|(_, file)| file)
    }

    /// Returns whether a file is a base that no header names, that has no other name (it is no
    /// snapshot, no live disk and in no backup), and that is not in `named`.
    pub fn is_unneeded(&self, file: &ImageFile, named: &BTreeSet<PathBuf>) -> bool {
        matches!(file.role, Role::Base { .. })
            && file.names == 1
            && self.readers_of(&file.path).next().is_none()
            && !named.contains(&file.path)
    }

    /// Returns the file with this resolved path.
    pub fn at(&self, path: &Path) -> Option<&ImageFile> {
        self.by_path
            .get(path.as_os_str())
            .map(|index| &self.files[*index])
    }

    fn all<'l>(&'l self, indexes: Option<&'l Vec<usize>>) -> impl Iterator<Item = &'l ImageFile> {
        let indexes = indexes.into_iter().flatten();
        indexes.filter_map(|index| self.files.get(*index))
    }

    /// Returns all names of one inode.
    pub fn names_of(&self, id: FileId) -> impl Iterator<Item = &ImageFile> {
        self.all(self.by_id.get(&id))
    }

    /// Returns the name that an inode has in `bases/`, if it has one.
    pub fn base_of(&self, id: FileId) -> Option<&ImageFile> {
        self.names_of(id)
            .find(|name| matches!(name.role, Role::Base { .. }))
    }

    /// Returns the ids of the boxes that have files.
    pub fn boxes(&self) -> impl Iterator<Item = &str> {
        self.by_box.keys().map(String::as_str)
    }

    /// Returns the files in the directory of a box.
    pub fn of_box(&self, box_id: &str) -> impl Iterator<Item = &ImageFile> + use<'_> {
        self.all(self.by_box.get(box_id))
    }

    /// Returns the files whose header names this path.
    pub fn readers_of(&self, path: &Path) -> impl Iterator<Item = &ImageFile> + use<'_> {
        self.all(self.readers.get(path.as_os_str()))
    }

    /// Returns the ids of the boxes with a chain through `path`.
    pub fn boxes_above(&self, path: &Path) -> BTreeSet<String> {
        let mut boxes = BTreeSet::new();
        let mut seen = HashSet::from([path]);
        let mut next: Vec<&Path> = vec![path];
        while let Some(path) = next.pop() {
            boxes.extend(self.at(path).and_then(ImageFile::box_id).map(str::to_owned));
            let readers = self
                .all(self.readers.get(path.as_os_str()))
                .map(|file| file.path.as_path());
            next.extend(readers.filter(|path| seen.insert(path)));
        }
        boxes
    }

    /// Forgets a name that was removed. Returns what its header named.
    pub fn forget(&mut self, path: &Path) -> Option<PathBuf> {
        let index = self.by_path.remove(path.as_os_str())?;
        self.forgotten.insert(index);
        let file = self.files.get(index)?;
        let (id, backing) = (file.id, file.backing.clone());
        let lists = [
            self.by_id.get_mut(&id),
            file.box_id().and_then(|id| self.by_box.get_mut(id)),
            backing
                .as_ref()
                .and_then(|path| self.readers.get_mut(path.as_os_str())),
        ];
        for list in lists.into_iter().flatten() {
            list.retain(|other| *other != index);
        }
        for other in self.by_id.get(&id).into_iter().flatten() {
            if let Some(name) = self.files.get_mut(*other) {
                name.names = name.names.saturating_sub(1);
            }
        }
        backing
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
        self.files().find(|file| file.damaged.is_some())
    }
}

/// Returns the graph of files at these paths, whose headers name those paths.
#[cfg(test)]
pub(super) fn made_of(files: &[(&str, Option<&str>)]) -> LayerGraph {
    let file = |(path, backing): &(&str, Option<&str>)| {
        let role = Role::Base {
            id: path.to_string(),
        };
        let file = ImageFile::unreadable(PathBuf::from(path), role, String::new());
        ImageFile {
            damaged: None,
            backing: backing.map(PathBuf::from),
            ..file
        }
    };
    LayerGraph::new(files.iter().map(file).collect(), SharedSpares::default())
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
pub(super) struct Scan {
    /// The moment before the first file was inspected.
    moment: Moment,
    files: Vec<ImageFile>,
    spares: Spares,
    directories: Directories,
}

impl Scan {
    /// Returns the files that were added so far. Their names include spare names.
    pub(super) fn files(&self) -> &[ImageFile] {
        &self.files
    }

    /// Returns the graph of the files.
    pub(super) fn into_graph(mut self) -> LayerGraph {
        for file in &mut self.files {
            file.names = file.names.saturating_sub(self.spares.count_of(file.id));
        }
        LayerGraph::new(self.files, SharedSpares::new(self.spares))
    }
}

/// A cache of resolved directories: thousands of headers name files in the same few.
#[derive(Default)]
pub struct Directories {
    resolved: HashMap<OsString, Option<PathBuf>>,
}

impl Directories {
    /// Resolves the directory of a path, as [`resolve`] does. A path whose directory is missing
    /// stays as it is.
    pub fn resolve(&mut self, path: PathBuf) -> PathBuf {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return path;
        };
        let resolved = match self.resolved.get(dir.as_os_str()) {
            Some(resolved) => resolved,
            None => {
                let resolved = fs::canonicalize(dir).ok();
                self.resolved.entry(dir.into()).or_insert(resolved)
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
    pub(super) home: Arc<Home>,
    states: Arc<States>,
    spares: Arc<SpareNames>,
    /// Where headers are kept from one mount to the next.
    kept: Arc<SizeCache>,
    /// Whether headers of earlier mounts were fetched from there.
    has_fetched: Once,
    headers: Mutex<HeaderCache>,
    /// How many headers were read that are not kept yet.
    unkept: AtomicUsize,
    /// The boxes inside which the last scan of the whole home found layers that files of other
    /// boxes read. None before the first scan.
    across: Mutex<Option<HashSet<String>>>,
    /// How many files there are, by the last scan.
    size: AtomicUsize,
    /// The most files that are scanned while somebody waits.
    most_at_once: usize,
}

/// The most image files that are scanned while somebody waits: that takes a millisecond.
const MOST_AT_ONCE: usize = 400;

/// Test builds take another number from the environment.
fn most_at_once() -> usize {
    let asked = cfg!(debug_assertions)
        .then(|| std::env::var("BOXLITEFS_MOST_AT_ONCE").ok()?.parse().ok())
        .flatten();
    asked.unwrap_or(MOST_AT_ONCE)
}

/// Returns the ids of the boxes inside which others read layers: files of other boxes, or bases that
/// were not made of the box. BoxLite's clone leaves a base that reads a layer inside the box it was
/// made of.
///
/// # Errors
/// Those of SQLite.
fn read_across(layers: &LayerGraph, home: &Home) -> Result<HashSet<String>> {
    let mut across = HashSet::new();
    let mut rows: Option<Vec<BaseRecord>> = None;
    for file in &layers.files {
        let Some(inside) = file.backing.as_deref().and_then(|path| home.box_of(path)) else {
            continue;
        };
        let is_known = match &file.role {
            Role::Live { box_id } | Role::Snapshot { box_id, .. } => box_id == inside,
            Role::Base { .. } => {
                if rows.is_none() {
                    rows = Some(home.bases()?);
                }
                let is_of_box =
                    |row: &BaseRecord| row.source_box_id == inside && is_row_of(row, &file.path);
                rows.as_ref().is_some_and(|rows| rows.iter().any(is_of_box))
            }
            Role::Kept { .. } => false,
        };
        if !is_known {
            across.insert(inside.to_owned());
        }
    }
    Ok(across)
}

impl LayerScanner {
    /// Returns a scanner that has read no header yet.
    pub fn new(opened: &OpenHome, states: Arc<States>, spares: Arc<SpareNames>) -> LayerScanner {
        LayerScanner {
            home: opened.home.clone(),
            states,
            spares,
            kept: opened.sizes.clone(),
            has_fetched: Once::new(),
            headers: Mutex::default(),
            unkept: AtomicUsize::default(),
            across: Mutex::default(),
            size: AtomicUsize::default(),
            most_at_once: most_at_once(),
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

    /// Scans `bases/`, `boxes/` and what can be had back for image files, with rows or without.
    ///
    /// # Errors
    /// Those of reading the directories.
    pub fn scan(&self) -> Result<LayerGraph> {
        if self.is_large() {
            self.has_fetched.call_once(|| self.fetch_headers());
        }
        let mut scan = self.begin();
        scan.spares = self.spares.scan()?;
        for name in names_in(&self.home.bases_dir())? {
            if let Some(id) = name.strip_suffix(".qcow2") {
                let role = Role::Base { id: id.to_owned() };
                self.add_file(self.home.base_disk(id), role, &mut scan);
            }
        }
        for box_id in names_in(&self.home.boxes_dir())? {
            self.add_box(&box_id, &mut scan)?;
        }
        for id in self.home.kept_ids()? {
            self.add_box(&id, &mut scan)?;
        }
        let layers = scan.into_graph();
        let mut headers = self.headers.lock();
        headers.retain(|id, _| layers.by_id.contains_key(id));
        drop(headers);
        *self.across.lock() = Some(read_across(&layers, &self.home)?);
        self.size.store(layers.files.len(), Ordering::Relaxed);
        Ok(layers)
    }

    /// Fetches the headers that an earlier mount kept.
    fn fetch_headers(&self) {
        let mut headers = self.headers.lock();
        for known in self.kept.headers() {
            let id = FileId {
                dev: known.device,
                ino: known.inode,
            };
            let (modified, changed) = known.times;
            let stamp = (known.length, modified.into(), changed.into());
            headers.entry(id).or_insert((stamp, Ok(known.backing)));
        }
    }

    /// Keeps the headers of a large home for the next mount, if any was read anew.
    pub fn keep_headers(&self) {
        if !self.is_large() || self.unkept.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        let headers = self.headers.lock();
        let known = headers.iter().filter_map(|(id, (stamp, backing))| {
            Some(KnownHeader {
                device: id.dev,
                inode: id.ino,
                length: stamp.0,
                times: (stamp.1.try_into().ok()?, stamp.2.try_into().ok()?),
                backing: backing.as_ref().ok()?.clone(),
            })
        });
        let known: Vec<KnownHeader> = known.collect();
        drop(headers);
        self.kept.put_headers(&known);
    }

    /// Returns whether the home is so large that what needs a scan of all of it is done behind.
    pub fn is_large(&self) -> bool {
        self.size.load(Ordering::Relaxed) > self.most_at_once
    }

    /// Notes how many image files the home has, before the first scan.
    pub fn expect(&self, size: usize) {
        self.size.store(size, Ordering::Relaxed);
    }

    /// Returns whether the last scan of the whole home found files of other boxes that read a layer
    /// inside this one; None before the first scan. Nobody makes such readers, except by hand:
    /// BoxLite and we put what another box shall read into `bases/`.
    pub fn is_read_from_outside(&self, box_id: &str) -> Option<bool> {
        let across = self.across.lock();
        across.as_ref().map(|boxes| boxes.contains(box_id))
    }

    /// Begins a scan that has found nothing yet.
    pub(super) fn begin(&self) -> Scan {
        Scan {
            moment: self.states.moment_now(&self.home.bases_dir()),
            ..Scan::default()
        }
    }

    /// Adds the live disk and the snapshots of a box, or the disks of an entry, to the scan.
    ///
    /// # Errors
    /// Those of reading the directory of the snapshots.
    pub(super) fn add_box(&self, box_id: &str, scan: &mut Scan) -> Result<()> {
        let id = || box_id.to_owned();
        let is_kept = is_kept_id(box_id);
        let role = if is_kept {
            Role::Kept { id: id() }
        } else {
            Role::Live { box_id: id() }
        };
        self.add_file(self.home.live_disk(box_id), role, scan);
        for name in names_in(&self.home.snapshots_dir(box_id))? {
            let path = self.home.snapshot_disk(box_id, &name);
            let role = if is_kept {
                Role::Kept { id: id() }
            } else {
                Role::Snapshot { box_id: id(), name }
            };
            self.add_file(path, role, scan);
        }
        Ok(())
    }

    /// Adds a base and its spare name to the scan.
    pub(super) fn add_base(&self, path: &Path, scan: &mut Scan) {
        let Some(id) = path.file_stem().and_then(|id| id.to_str()) else {
            return;
        };
        let role = Role::Base { id: id.to_owned() };
        self.add_file(path.to_owned(), role, scan);
        if let Some(spare) = self.spares.spare_of(path) {
            scan.spares.add(spare);
        }
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
            names: meta.nlink(),
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
            self.unkept.fetch_add(1, Ordering::Relaxed);
        }
        backing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Format, create_overlay, rebase};
    use crate::event_log::EventLog;
    use crate::exports::{Compression, Exports};
    use crate::home::home_in;

    fn scanner_of(dir: &Path) -> LayerScanner {
        let home = home_in(dir);
        let events = EventLog::open(&home, false);
        let opened = OpenHome::new(home, events, false);
        let states = Exports::new(&opened, Compression::default()).states;
        let spares = SpareNames::new(opened.home.clone(), opened.workspace.clone());
        let scanner = LayerScanner::new(&opened, states, Arc::new(spares));
        scanner.expect(MOST_AT_ONCE + 1);
        scanner
    }

    /// The backing path of a base, and how many headers were read to find it.
    fn scan(scanner: &LayerScanner, base: &Path) -> (Option<PathBuf>, usize) {
        let before = scanner.unkept.load(Ordering::Relaxed);
        scanner.expect(MOST_AT_ONCE + 1);
        let layers = scanner.scan().unwrap();
        scanner.expect(MOST_AT_ONCE + 1);
        let read = scanner.unkept.load(Ordering::Relaxed) - before;
        (layers.at(base).unwrap().stored.clone(), read)
    }

    #[test]
    fn headers_that_an_earlier_mount_kept_are_read_again_only_if_they_changed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("bases")).unwrap();
        let scanner = scanner_of(dir.path());
        let base = scanner.home.base_disk("one");
        let below = [dir.path().join("below"), dir.path().join("other")];
        create_overlay(&base, &below[0], Format::Raw, 1 << 20).unwrap();
        // A header that changed within a tick of the clock is not remembered.
        let known = (0..1000).find(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            scan(&scanner, &base).1 == 1
        });
        assert!(known.is_some());
        scanner.keep_headers();
        let later = scanner_of(dir.path());
        assert_eq!(scan(&later, &base), (Some(below[0].clone()), 0));
        rebase(&base, &below[1]).unwrap();
        let last = scanner_of(dir.path());
        assert_eq!(scan(&last, &base).0, Some(below[1].clone()));
    }
}
