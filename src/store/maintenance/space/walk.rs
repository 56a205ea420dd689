//! Counts the blocks of all files of a home, each file once, as `du -s` does.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk::FileId;
use crate::files::listing::is_absent;
use crate::home::{Catalog, Home};

use super::attribution::{Attribution, Owner};

/// The files in the directory of a box that are not layers.
#[derive(Default)]
pub(super) struct BoxFiles {
    /// Bytes of all, with the directories.
    pub all: u64,
    /// Bytes in the directory of each snapshot, by the name of the directory.
    pub snapshots: HashMap<String, u64>,
    /// Bytes of files with names elsewhere, which stay when the directory is removed.
    linked: HashMap<FileId, (u64, u64)>,
}

impl BoxFiles {
    /// Returns the bytes that go with the directory.
    pub fn removable(&self) -> u64 {
        let stay = self.linked.values().filter(|(_, names)| *names > 0);
        self.all - stay.map(|(bytes, _)| bytes).sum::<u64>().min(self.all)
    }
}

/// A file, and what it takes.
pub(super) struct FoundFile {
    path: PathBuf,
    id: FileId,
    bytes: u64,
    names: u64,
    is_dir: bool,
}

/// All names of all files below a home.
#[derive(Default)]
pub(super) struct Found {
    pub files: Vec<FoundFile>,
    /// The directories that could not be read.
    pub unread: Vec<String>,
}

/// Finds the files of a home, and those where its directories lead; none if it is not a home.
pub(super) fn files_of(home: &Path) -> Found {
    let mut found = Found::default();
    if !home.join("db/boxlite.db").is_file() {
        return found;
    }
    let places = ["", "boxes", "bases", "images"].map(|name| fs::canonicalize(home.join(name)));
    let mut next: Vec<PathBuf> = places.into_iter().flatten().collect();
    let mut walked = HashSet::new();
    while let Some(path) = next.pop() {
        let names = fs::symlink_metadata(&path).and_then(|meta| {
            let id = FileId::of(&meta);
            let is_dir = meta.is_dir();
            found.files.push(FoundFile {
                path: path.clone(),
                id,
                bytes: meta.blocks() * 512,
                names: meta.nlink(),
                is_dir,
            });
            if !is_dir || !walked.insert(id) {
                return Ok(Vec::new());
            }
            fs::read_dir(&path)?.collect()
        });
        match names {
            Ok(names) => next.extend(names.into_iter().map(|entry| entry.path())),
            Err(error) if is_absent(&error) => {}
            Err(error) => found.unread.push(format!("{}: {error}", path.display())),
        }
    }
    found
}

/// Adds up the files of a home by their owners.
pub(super) struct Walk<'a> {
    home: &'a Home,
    attribution: &'a Attribution,
    seen: HashSet<FileId>,
    parts: BTreeMap<Owner, u64>,
    boxes: HashMap<String, BoxFiles>,
}

impl<'a> Walk<'a> {
    /// Returns the walk through a home that has counted no file yet.
    pub fn new(home: &'a Home, catalog: &Catalog, attribution: &'a Attribution) -> Walk<'a> {
        let ids = catalog.boxes().map(|record| &*record.id);
        let ids = ids.chain(catalog.kept().iter().map(|entry| entry.id()));
        Walk {
            home,
            attribution,
            seen: HashSet::new(),
            parts: BTreeMap::new(),
            boxes: ids.map(|id| (id.to_owned(), BoxFiles::default())).collect(),
        }
    }

    /// Returns the bytes of all files.
    pub fn total(&self) -> u64 {
        self.parts.values().sum()
    }

    /// Returns the bytes of each part of the home.
    pub fn parts(&self) -> Vec<(Owner, u64)> {
        let bytes = |owner: Owner| self.parts.get(&owner).copied().unwrap_or(0);
        Owner::ALL.map(|owner| (owner, bytes(owner))).to_vec()
    }

    /// Returns the files of a box, or of an entry, that are not layers.
    pub fn of_box(&self, id: &str) -> Option<&BoxFiles> {
        self.boxes.get(id)
    }

    /// Counts a file, if it was not counted by another name.
    pub fn add(&mut self, file: &FoundFile) {
        let layer = self.attribution.of_layer(file.id);
        let inside = self.place_of(&file.path);
        let of_box = match layer {
            Some(_) => None,
            None => self.box_at(&inside),
        };
        if !file.is_dir
            && file.names > 1
            && let Some((box_id, _)) = &of_box
            && let Some(files) = self.boxes.get_mut(box_id)
        {
            let first = (file.bytes, file.names);
            let linked = files.linked.entry(file.id).or_insert(first);
            linked.1 = linked.1.saturating_sub(1);
        }
        if !self.seen.insert(file.id) {
            return;
        }
        let owner = match (layer, of_box) {
            (Some(owner), _) => owner,
            (None, Some((box_id, snapshot))) => self.add_to_box(&box_id, snapshot, file.bytes),
            (None, None) => Owner::by_place(&inside),
        };
        *self.parts.entry(owner).or_default() += file.bytes;
    }

    fn add_to_box(&mut self, box_id: &str, snapshot: Option<String>, bytes: u64) -> Owner {
        if let Some(files) = self.boxes.get_mut(box_id) {
            files.all += bytes;
            if let Some(snapshot) = snapshot {
                *files.snapshots.entry(snapshot).or_default() += bytes;
            }
        }
        if crate::home::is_kept_id(box_id) {
            Owner::Undo
        } else {
            Owner::Boxes
        }
    }

    /// Returns the path in the home, as if no directory of it were a link.
    fn place_of(&self, path: &Path) -> PathBuf {
        let (boxes, bases) = (self.home.boxes_dir(), self.home.bases_dir());
        let of = |dir: &Path, name: &str| Some(Path::new(name).join(path.strip_prefix(dir).ok()?));
        of(&boxes, "boxes")
            .or_else(|| of(&bases, "bases"))
            .or_else(|| Some(path.strip_prefix(self.home.root()).ok()?.to_owned()))
            .unwrap_or_else(|| Path::new("images").to_owned())
    }

    /// Returns the box or the entry with this path in its directory, and the snapshot's directory, if
    /// the path is in one.
    fn box_at(&self, inside: &Path) -> Option<(String, Option<String>)> {
        let below = inside
            .strip_prefix("boxes")
            .or_else(|_| inside.strip_prefix(".boxlitefs/undo"))
            .ok()?;
        let mut names = below.iter().map(|name| name.to_str());
        let id = names.next()??;
        if !self.boxes.contains_key(id) {
            return None;
        }
        let snapshot = (names.next() == Some(Some("snapshots")))
            .then(|| names.next())
            .flatten();
        Some((id.to_owned(), snapshot.flatten().map(str::to_owned)))
    }
}
