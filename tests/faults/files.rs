//! Files and directories in memory: a snapshot of a disk. Copies are cheap because they share the
//! contents.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Bytes of a page, the unit that a power loss keeps or loses as a whole.
pub const PAGE: u64 = 4096;

/// The inode number of a file or directory.
pub type Number = u64;

/// The number of the root directory, as FUSE requires.
pub const ROOT: Number = 1;

/// The contents of a file, including holes.
#[derive(Clone, Debug, Default)]
pub struct Bytes {
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
    length: u64,
}

impl Bytes {
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Returns the number of bytes that are not in holes.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Reads `length` bytes at `offset`, or fewer at the end of the file.
    pub fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let end = self.length.min(offset.saturating_add(length));
        let mut bytes = vec![0; end.saturating_sub(offset) as usize];
        if bytes.is_empty() {
            return bytes;
        }
        for (number, page) in self.pages.range(offset / PAGE..=(end - 1) / PAGE) {
            let (from, to) = (offset.max(number * PAGE), end.min((number + 1) * PAGE));
            let inside = (from - number * PAGE) as usize..(to - number * PAGE) as usize;
            bytes[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&page[inside]);
        }
        bytes
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for piece in pages(offset, bytes.len() as u64) {
            let page = self.pages.entry(piece.start / PAGE);
            let page = Arc::make_mut(page.or_insert_with(|| Arc::new([0; PAGE as usize])));
            let at = (piece.start % PAGE) as usize;
            let part = &bytes[(piece.start - offset) as usize..(piece.end - offset) as usize];
            page[at..at + part.len()].copy_from_slice(part);
        }
        self.length = self.length.max(offset + bytes.len() as u64);
    }

    pub fn set_len(&mut self, length: u64) {
        if length < self.length {
            self.pages.split_off(&length.div_ceil(PAGE));
            if let Some(page) = self.pages.get_mut(&(length / PAGE)) {
                Arc::make_mut(page)[(length % PAGE) as usize..].fill(0);
            }
        }
        self.length = length;
    }

    /// Returns where data begins at or after `offset`; None if only a hole is left.
    pub fn next_data(&self, offset: u64) -> Option<u64> {
        let (number, _) = self.pages.range(offset / PAGE..).next()?;
        let at = offset.max(number * PAGE);
        (at < self.length).then_some(at)
    }

    /// Returns where a hole begins at or after `offset`. The end of the file counts as a hole.
    pub fn next_hole(&self, offset: u64) -> u64 {
        let mut number = offset / PAGE;
        while self.pages.contains_key(&number) {
            number += 1;
        }
        offset.max(number * PAGE).min(self.length)
    }
}

/// Splits a range at page boundaries.
pub fn pages(offset: u64, length: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    let end = offset + length;
    (offset / PAGE..end.div_ceil(PAGE))
        .map(move |page| offset.max(page * PAGE)..end.min((page + 1) * PAGE))
        .filter(|range| !range.is_empty())
}

/// The metadata of a file.
#[derive(Clone, Debug)]
pub struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub accessed: SystemTime,
    pub modified: SystemTime,
    pub changed: SystemTime,
}

impl Attributes {
    /// Makes the attributes of a new file.
    pub fn new(mode: u32, uid: u32, gid: u32) -> Attributes {
        let now = SystemTime::now();
        Attributes {
            mode: mode & 0o7777,
            uid,
            gid,
            accessed: now,
            modified: now,
            changed: now,
        }
    }
}

/// The type and contents of a node.
#[derive(Clone, Debug)]
pub enum Kind {
    File(Bytes),
    Directory(BTreeMap<OsString, Number>),
    Link(PathBuf),
}

/// A file, a directory or a symbolic link.
#[derive(Clone, Debug)]
pub struct Node {
    pub kind: Kind,
    pub attributes: Attributes,
    /// The number of its names.
    pub names: u32,
}

/// The contents of a disk.
#[derive(Clone, Debug)]
pub struct Files {
    pub nodes: HashMap<Number, Node>,
    pub next: Number,
}

impl Files {
    /// Loads everything below a directory.
    pub fn load(root: &Path) -> Files {
        let mut files = Files {
            nodes: HashMap::new(),
            next: ROOT,
        };
        files.load_below(root, &mut HashMap::new());
        files
    }

    fn load_below(&mut self, path: &Path, known: &mut HashMap<u64, Number>) -> Number {
        let meta = fs::symlink_metadata(path).unwrap();
        if let Some(number) = known.get(&meta.ino()) {
            self.nodes.get_mut(number).unwrap().names += 1;
            return *number;
        }
        let number = self.next;
        self.next += 1;
        known.insert(meta.ino(), number);
        let kind = if meta.is_dir() {
            let mut entries = BTreeMap::new();
            for entry in fs::read_dir(path).unwrap() {
                let entry = entry.unwrap();
                entries.insert(entry.file_name(), self.load_below(&entry.path(), known));
            }
            Kind::Directory(entries)
        } else if meta.is_symlink() {
            Kind::Link(fs::read_link(path).unwrap())
        } else {
            Kind::File(load_file(path))
        };
        let attributes = Attributes {
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            accessed: meta.accessed().unwrap(),
            modified: meta.modified().unwrap(),
            changed: meta.modified().unwrap(),
        };
        let node = Node {
            kind,
            attributes,
            names: 1,
        };
        self.nodes.insert(number, node);
        number
    }

    /// Replaces everything below a directory with these files.
    pub fn store(&self, root: &Path) {
        for entry in fs::read_dir(root).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }
        self.store_below(ROOT, root, &mut HashMap::new());
    }

    fn store_below(&self, number: Number, path: &Path, known: &mut HashMap<Number, PathBuf>) {
        let node = &self.nodes[&number];
        let Attributes { uid, gid, .. } = node.attributes;
        match &node.kind {
            Kind::Link(target) => return symlink(target, path).unwrap(),
            Kind::File(bytes) => {
                if let Some(first) = known.get(&number) {
                    return fs::hard_link(first, path).unwrap();
                }
                known.insert(number, path.to_owned());
                let file = File::create_new(path).unwrap();
                file.set_len(bytes.len()).unwrap();
                for (page, contents) in &bytes.pages {
                    let length = PAGE.min(bytes.len().saturating_sub(page * PAGE));
                    let contents = &contents[..length as usize];
                    file.write_all_at(contents, page * PAGE).unwrap();
                }
                let times = FileTimes::new()
                    .set_accessed(node.attributes.accessed)
                    .set_modified(node.attributes.modified);
                file.set_times(times).unwrap();
            }
            Kind::Directory(entries) => {
                if number != ROOT {
                    fs::create_dir(path).unwrap();
                }
                for (name, number) in entries {
                    self.store_below(*number, &path.join(name), known);
                }
            }
        }
        chown(path, Some(uid), Some(gid)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(node.attributes.mode)).unwrap();
    }

    /// Hashes names and contents.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash_below(ROOT, &mut hasher);
        hasher.finish()
    }

    fn hash_below(&self, number: Number, hasher: &mut DefaultHasher) {
        match &self.nodes[&number].kind {
            Kind::Link(target) => target.hash(hasher),
            Kind::File(bytes) => {
                bytes.len().hash(hasher);
                bytes.pages.hash(hasher);
            }
            Kind::Directory(entries) => {
                for (name, number) in entries {
                    name.hash(hasher);
                    self.hash_below(*number, hasher);
                }
                entries.len().hash(hasher);
            }
        }
    }

    pub fn entries(&self, directory: Number) -> Option<&BTreeMap<OsString, Number>> {
        match &self.nodes.get(&directory)?.kind {
            Kind::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    pub fn entries_mut(&mut self, directory: Number) -> &mut BTreeMap<OsString, Number> {
        match &mut self.nodes.get_mut(&directory).unwrap().kind {
            Kind::Directory(entries) => entries,
            _ => panic!("{directory} is not a directory"),
        }
    }

    pub fn bytes_mut(&mut self, file: Number) -> &mut Bytes {
        match &mut self.nodes.get_mut(&file).unwrap().kind {
            Kind::File(bytes) => bytes,
            _ => panic!("{file} is not a file"),
        }
    }

    pub fn lookup(&self, directory: Number, name: &OsStr) -> Option<Number> {
        self.entries(directory)?.get(name).copied()
    }
}

fn load_file(path: &Path) -> Bytes {
    let contents = fs::read(path).unwrap();
    let mut bytes = Bytes::default();
    for (number, page) in contents.chunks(PAGE as usize).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            bytes.write(number as u64 * PAGE, page);
        }
    }
    bytes.set_len(contents.len() as u64);
    bytes
}
