//! Boxes and snapshots that exist: lookup, attributes, listings.

use std::ffi::OsStr;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::home::{BoxRecord, SnapshotRecord};
use crate::store::{Contents, Source, Usage};
use crate::tree::nodes::attr::{Attr, DirEntry, Kept, Kind};
use crate::tree::nodes::box_json;
use crate::tree::nodes::names::{
    BOX_JSON, EXPORT, HIDDEN, LOG, SNAPSHOT_JSON, SNAPSHOTS, STATUS, VIEW,
};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::staging::caller::Caller;
use crate::tree::{Tree, text};
use crate::{Error, Result};

fn not_there() -> Error {
    Error::new(libc::ENOENT, "there is no such file")
}

fn gone() -> Error {
    Error::new(libc::ESTALE, "that is gone")
}

impl Tree {
    /// Finds a name in a directory; the kernel is told of what is found.
    ///
    /// # Errors
    /// ENOENT, or EIO when an export can't be planned.
    pub fn lookup(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<Attr> {
        let parent = self.node(parent)?;
        if let Node::Guest(directory) = &parent {
            return self.lookup_guest(directory, name);
        }
        let name = text(name).map_err(|_| not_there())?;
        let (parent, name) = self.beside_aside(parent, name);
        let node = self.child(caller, &parent, &name).map_err(|error| {
            // The kernel may have kept the directory's name a moment too long, and another has it
            // by now: after ESTALE it looks again, from the root on.
            match &parent {
                Node::ViewOf(source) if !self.is_there(source) => gone(),
                // Or a link led here that the kernel kept too long.
                Node::View | Node::ViewSnapshots(_) if error.errno() == libc::ENOENT => gone(),
                _ => error,
            }
        })?;
        let staged = self.staged_attr(caller, &node);
        let is_staged = staged.is_some();
        let mut attr = match staged {
            Some(attr) => attr,
            None => self.attr(caller, &node)?,
        };
        if let Node::ViewOf(source) = &parent
            && let Node::Guest(_) | Node::DiskImage(_) = &node
        {
            // The state it is of never changes; which one the name stands for does.
            attr.kept = match source {
                Source::Live { .. } => Kept::Not,
                Source::Snapshot { .. } => Kept::Moment,
            };
        }
        if let Node::Export(_) | Node::Compressed(_) = &node {
            let contents = match is_staged {
                true => None,
                false => self.contents(&node)?,
            };
            if let Some(contents) = contents {
                // One moment's size and generation: a size may become known between two looks.
                attr.resize(contents.size);
            }
            attr.generation = self.generation(&node, contents);
        } else {
            attr.generation = self.raised.lock().get(&node.ino()).copied().unwrap_or(0);
        }
        attr.ino = self.tell(&node);
        Ok(attr)
    }

    /// Whether a box, or a snapshot, still is.
    fn is_there(&self, source: &Source) -> bool {
        let names = self.names();
        names.is_ok_and(|names| source.is_in(names.catalog()))
    }

    /// What a name in a directory stands for, for this caller.
    pub(in crate::tree) fn child(&self, caller: Caller, parent: &Node, name: &str) -> Result<Node> {
        if let Some(aside) = self.aside_child(parent, name) {
            return Ok(aside);
        }
        if let Some(answer) = self.staged_child(caller, parent, name) {
            return answer;
        }
        if self.has_removed(caller, parent, name)
            || self.is_made_by_copy(caller, parent, name)
            || self.is_unlisted(caller, parent, name)
        {
            return Err(not_there());
        }
        self.real_child(parent, name).or_else(|error| {
            let arriving = self.arriving_child(caller, parent, name);
            arriving
                .filter(|_| error.errno() == libc::ENOENT)
                .ok_or(error)
        })
    }

    pub(in crate::tree) fn real_child(&self, parent: &Node, name: &str) -> Result<Node> {
        let node = match parent {
            Node::Root if name == HIDDEN => Node::Hidden,
            Node::Root => {
                let names = self.names()?;
                Node::Box(names.id_of(name).ok_or_else(not_there)?.to_owned())
            }
            Node::Hidden if name == LOG => Node::Log,
            Node::Hidden if name == STATUS => self.status_node()?,
            Node::Hidden if name == VIEW => Node::View,
            Node::View => {
                let names = self.names()?;
                Node::ViewOf(live(names.id_of(name).ok_or_else(not_there)?))
            }
            Node::ViewOf(source) if Derived::named(name).is_some() => {
                let derived = Derived::named(name).filter(|_| self.store.has_disk(source));
                self.derived(derived.ok_or_else(not_there)?, source)?
            }
            Node::ViewOf(Source::Live { box_id }) if name == SNAPSHOTS => {
                Node::ViewSnapshots(box_id.clone())
            }
            Node::ViewSnapshots(id) => {
                let names = self.names()?;
                let row = names.catalog().snapshot_by_name(id, name);
                Node::ViewOf(Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: row.ok_or_else(not_there)?.id.clone(),
                })
            }
            Node::Box(id) => self.child_of_box(id, name)?,
            Node::Snapshots(id) => {
                let names = self.names()?;
                let snapshot = names.catalog().snapshot_by_name(id, name);
                Node::Snapshot(id.clone(), snapshot.ok_or_else(not_there)?.id.clone())
            }
            Node::Snapshot(id, snapshot) => {
                let source = Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: snapshot.clone(),
                };
                match name {
                    SNAPSHOT_JSON => Node::SnapshotJson(id.clone(), snapshot.clone()),
                    _ => self.child_of_state(source, name)?,
                }
            }
            _ => return Err(not_there()),
        };
        Ok(node)
    }

    fn child_of_box(&self, id: &str, name: &str) -> Result<Node> {
        let source = Source::Live {
            box_id: id.to_owned(),
        };
        match name {
            BOX_JSON => Ok(Node::BoxJson(id.to_owned())),
            SNAPSHOTS => Ok(Node::Snapshots(id.to_owned())),
            _ => self.child_of_state(source, name),
        }
    }

    /// What there is of a disk state. A box that never started has none yet.
    fn child_of_state(&self, source: Source, name: &str) -> Result<Node> {
        let derived = Derived::named(name);
        // The export of a box that never started can't be opened: so a copy of the box fails, and a
        // move that could not bring it back removes nothing.
        let is_shown = match derived {
            Some(_) => self.store.has_disk(&source),
            None => name == EXPORT,
        };
        if !is_shown {
            return Err(not_there());
        }
        Ok(match derived {
            Some(derived) => Node::Link(derived, source),
            None => Node::Export(source),
        })
    }

    /// What a link into the view points to.
    fn derived(&self, derived: Derived, source: &Source) -> Result<Node> {
        Ok(match derived {
            Derived::Compressed => Node::Compressed(source.clone()),
            Derived::DiskImage => Node::DiskImage(self.look_inside(source)?.state().clone()),
            Derived::Rootfs => {
                let inside = self.look_inside(source)?;
                Node::Guest(self.root_of(&inside)?)
            }
        })
    }

    /// Attributes of an inode; those of the open file where there is one.
    ///
    /// # Errors
    /// ESTALE or ENOENT when it is gone.
    pub fn getattr(&self, caller: Caller, ino: u64, handle: Option<u64>) -> Result<Attr> {
        let mut attr = self.attr_of_known(caller, ino, handle)?;
        attr.ino = ino;
        Ok(attr)
    }

    fn attr_of_known(&self, caller: Caller, ino: u64, handle: Option<u64>) -> Result<Attr> {
        let node = self.node(ino)?;
        if let Some(size) = handle.and_then(|handle| self.size_at_open(handle)) {
            let mut attr = self.attr(caller, &node)?;
            attr.resize(size);
            return Ok(attr);
        }
        if let Node::Export(source) | Node::Compressed(source) = &node
            && let Some(attr) = self.attr_of_open_export(&node, source, handle)?
        {
            return Ok(attr);
        }
        self.attr(caller, &node)
    }

    /// Attributes of an export that is open: those of what is being read, also when its name is
    /// gone. EIO when its contents changed since the kernel was told of it, and not a size that does
    /// not belong to the pages it has: that would cut a reader off, or give it zeros. None when the
    /// kernel was told of the new contents, for then it asks for their new inode.
    fn attr_of_open_export(
        &self,
        node: &Node,
        source: &Source,
        handle: Option<u64>,
    ) -> Result<Option<Attr>> {
        let Some(open) = self.open_export_of(node, handle) else {
            return Ok(None);
        };
        if handle.is_none() && self.told(node).is_some_and(|told| told != open) {
            return Ok(None);
        }
        let now = self.contents(node);
        let gone = now.as_ref().is_err_and(|e| e.errno() == libc::ENOENT);
        // A compressed archive that is there as a whole goes on being what it is.
        if !gone && now? != Some(open) && !self.is_open_as_whole(node, handle) {
            return Err(self.changed_under_reader(source));
        }
        Ok(Some(self.file(node, open.size, open.changed)))
    }

    /// What an export's bytes are of, plain or compressed. None when there is no disk.
    pub(in crate::tree) fn contents(&self, node: &Node) -> Result<Option<Contents>> {
        match node {
            Node::Export(source) => self.store.export_contents(source),
            Node::Compressed(source) => self.store.compressed_contents(source),
            _ => Ok(None),
        }
    }

    pub(in crate::tree) fn attr(&self, caller: Caller, node: &Node) -> Result<Attr> {
        if let Some(attr) = self
            .aside_attr(node)
            .or_else(|| self.staged_attr(caller, node))
        {
            return Ok(attr);
        }
        let mut attr = self.real_attr(node)?;
        // The kernel keeps one answer for all processes: none while a box has two faces.
        if self.has_two_faces(node) {
            attr.kept = Kept::Not;
        }
        Ok(attr)
    }

    fn real_attr(&self, node: &Node) -> Result<Attr> {
        match node {
            Node::Root => self.root_attr(),
            Node::Hidden => Ok(self.directory(node, 0, self.store.events().changed_at())),
            Node::Log => {
                let events = self.store.events();
                Ok(self.file(node, events.len(), events.changed_at()))
            }
            Node::Status(number) => self.status_attr(node, *number),
            Node::Made(_) => Err(not_there()),
            Node::Box(id) => {
                let record = self.record(id)?;
                let mut attr = self.directory(node, 1, self.disk_time(&live(id), &record));
                attr.created = at(record.created_at);
                Ok(attr)
            }
            Node::BoxJson(id) => {
                let record = self.record(id)?;
                let size = box_json::box_json(&record, Usage::default())?.len() as u64;
                let mut attr = self.file(node, size, updated(&record));
                attr.created = at(record.created_at);
                Ok(attr)
            }
            Node::Snapshots(id) => {
                let record = self.record(id)?;
                let names = self.names()?;
                let count = names.catalog().snapshots_of(id).len();
                let changed = fs::metadata(self.store.home().snapshots_dir(id))
                    .and_then(|meta| meta.modified())
                    .unwrap_or_else(|_| at(record.created_at));
                Ok(self.directory(node, count, changed))
            }
            Node::Snapshot(id, snapshot) => {
                let made = at(self.snapshot(id, snapshot)?.shown_at);
                Ok(self.directory(node, 0, made))
            }
            Node::SnapshotJson(id, snapshot) => {
                let row = self.snapshot(id, snapshot)?;
                let size = box_json::snapshot_json(&row, Usage::default())?.len() as u64;
                Ok(self.file(node, size, at(row.shown_at)))
            }
            Node::View => Ok(self.directory(node, self.names()?.all().len(), UNIX_EPOCH)),
            Node::ViewOf(source) => {
                let record = self.record(source.box_id())?;
                let below = usize::from(matches!(source, Source::Live { .. }));
                Ok(self.directory(node, below, self.disk_time(source, &record)))
            }
            Node::ViewSnapshots(id) => {
                let mut attr = self.real_attr(&Node::Snapshots(id.clone()))?;
                attr.ino = node.ino();
                Ok(attr)
            }
            Node::Guest(file) => self.guest_attr(file),
            Node::DiskImage(state) => self.disk_image_attr(state),
            Node::Link(derived, source) => {
                let record = self.record(source.box_id())?;
                let target = self.link_target(*derived, source)?;
                let size = target.as_os_str().len() as u64;
                let mut attr = self.file(node, size, at(record.created_at));
                attr.kind = Kind::Symlink;
                attr.perm = 0o777;
                attr.kept = Kept::Moment;
                Ok(attr)
            }
            Node::Export(source) | Node::Compressed(source) => {
                let record = self.record(source.box_id())?;
                let mut attr = match self.contents(node)? {
                    Some(contents) => self.file(node, contents.size, contents.changed),
                    None if matches!(node, Node::Export(Source::Live { .. })) => {
                        self.file(node, 0, at(record.created_at))
                    }
                    None => return Err(not_there()),
                };
                attr.created = at(record.created_at);
                Ok(attr)
            }
        }
    }

    fn root_attr(&self) -> Result<Attr> {
        let boxes = self.names()?.all().len() + self.staged_directories();
        let changed = fs::metadata(self.store.home().boxes_dir())
            .and_then(|meta| meta.modified())
            .unwrap_or(UNIX_EPOCH);
        Ok(self.directory(&Node::Root, boxes, changed))
    }

    /// When the disk state changed last; a box without a disk has only when it was made.
    fn disk_time(&self, source: &Source, record: &BoxRecord) -> SystemTime {
        self.store
            .changed_at(source)
            .unwrap_or_else(|| at(record.created_at))
    }

    pub(in crate::tree) fn record(&self, id: &str) -> Result<BoxRecord> {
        self.names()?
            .catalog()
            .box_by_id(id)
            .cloned()
            .ok_or_else(not_there)
    }

    pub(in crate::tree) fn snapshot(&self, id: &str, snapshot: &str) -> Result<SnapshotRecord> {
        self.names()?
            .catalog()
            .snapshot_by_id(id, snapshot)
            .cloned()
            .ok_or_else(not_there)
    }

    /// A directory with this many subdirectories.
    pub(in crate::tree) fn directory(
        &self,
        node: &Node,
        subdirectories: usize,
        changed: SystemTime,
    ) -> Attr {
        let owner = self.store.home().owner();
        Attr {
            ino: node.ino(),
            generation: 0,
            kind: Kind::Directory,
            size: 0,
            blocks: 0,
            device: 0,
            // As open as the home is, never more.
            perm: 0o755 & mode_of_directories(owner.mode),
            nlink: u32::try_from(subdirectories + 2).unwrap_or(u32::MAX),
            uid: owner.uid,
            gid: owner.gid,
            atime: changed,
            mtime: changed,
            ctime: changed,
            created: changed,
            kept: Kept::Moment,
        }
    }

    /// A regular file of this many bytes.
    pub(in crate::tree) fn file(&self, node: &Node, size: u64, changed: SystemTime) -> Attr {
        let owner = self.store.home().owner();
        Attr {
            ino: node.ino(),
            generation: 0,
            kind: Kind::File,
            size,
            blocks: size.div_ceil(512),
            device: 0,
            // Archives hold secrets, and disks what guests keep: for the owner of the home alone.
            perm: 0o600,
            nlink: 1,
            uid: owner.uid,
            gid: owner.gid,
            atime: changed,
            mtime: changed,
            ctime: changed,
            created: changed,
            kept: Kept::Not,
        }
    }

    /// Every name in a directory, in the order it is listed: `snapshots` last, so that `cp -r` has
    /// made the box when it comes to its snapshots.
    pub(in crate::tree) fn list(&self, caller: Caller, node: &Node) -> Result<Vec<DirEntry>> {
        if let Node::Made(_) = node {
            return self.list_aside(node);
        }
        self.was_listed(caller, node);
        let mut entries = self.list_all(caller, node)?;
        self.fold_aside(node, &mut entries);
        Ok(entries)
    }

    fn list_all(&self, caller: Caller, node: &Node) -> Result<Vec<DirEntry>> {
        if let Node::Guest(directory) = node {
            return self.list_partitions(directory);
        }
        if let Some(entries) = self.staged_list(caller, node) {
            return Ok(entries);
        }
        let names = self.names()?;
        let children: Vec<(String, Node, Kind)> = match node {
            Node::Root => names
                .all()
                .iter()
                .map(|(name, id)| (name.clone(), Node::Box(id.clone()), Kind::Directory))
                .collect(),
            Node::Hidden => vec![
                (LOG.to_owned(), Node::Log, Kind::File),
                (STATUS.to_owned(), self.status_node()?, Kind::File),
                (VIEW.to_owned(), Node::View, Kind::Directory),
            ],
            Node::View => names
                .all()
                .iter()
                .map(|(name, id)| (name.clone(), Node::ViewOf(live(id)), Kind::Directory))
                .collect(),
            Node::ViewOf(source) => self.view_of(source)?,
            Node::ViewSnapshots(id) => {
                self.record(id)?;
                let rows = names.catalog().snapshots_of(id).iter();
                rows.map(|row| {
                    let source = Source::Snapshot {
                        box_id: id.clone(),
                        snapshot_id: row.id.clone(),
                    };
                    (row.name.clone(), Node::ViewOf(source), Kind::Directory)
                })
                .collect()
            }
            Node::Box(id) => {
                self.record(id)?;
                let mut children =
                    vec![(BOX_JSON.to_owned(), Node::BoxJson(id.clone()), Kind::File)];
                let of_disk = exports(live(id)).into_iter();
                let shown = if self.store.has_disk(&live(id)) { 4 } else { 1 };
                children.extend(of_disk.take(shown));
                let snapshots = Node::Snapshots(id.clone());
                children.push((SNAPSHOTS.to_owned(), snapshots, Kind::Directory));
                children
            }
            Node::Snapshots(id) => {
                self.record(id)?;
                let rows = names.catalog().snapshots_of(id).iter();
                let there = rows.map(|row| {
                    let node = Node::Snapshot(id.clone(), row.id.clone());
                    (row.name.clone(), node, Kind::Directory)
                });
                there.chain(self.arriving_in(id)).collect()
            }
            Node::Snapshot(id, snapshot) => {
                self.snapshot(id, snapshot)?;
                let json = Node::SnapshotJson(id.clone(), snapshot.clone());
                let mut children = vec![(SNAPSHOT_JSON.to_owned(), json, Kind::File)];
                let source = Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: snapshot.clone(),
                };
                if self.store.has_disk(&source) {
                    children.extend(exports(source));
                }
                children
            }
            _ => return Err(Error::new(libc::ENOTDIR, "that is not a directory")),
        };
        let mut entries: Vec<DirEntry> = children
            .into_iter()
            .filter(|(name, ..)| !self.has_removed(caller, node, name))
            .map(|(name, node, kind)| DirEntry {
                ino: node.ino(),
                name: name.into(),
                kind,
            })
            .collect();
        if *node == Node::Root {
            entries.extend(self.staged_in_root());
        }
        Ok(entries)
    }

    /// What the view has of a disk state.
    fn view_of(&self, source: &Source) -> Result<Vec<(String, Node, Kind)>> {
        self.record(source.box_id())?;
        let mut children = Vec::new();
        if self.store.has_disk(source) {
            for derived in Derived::ALL {
                // What is inside follows from looking there, which a listing alone does not.
                let (kind, node) = match derived {
                    Derived::Compressed => (Kind::File, Node::Compressed(source.clone())),
                    Derived::Rootfs => (Kind::Directory, Node::ViewOf(source.clone())),
                    Derived::DiskImage => (Kind::File, Node::ViewOf(source.clone())),
                };
                children.push((derived.name().to_owned(), node, kind));
            }
        }
        if let Source::Live { box_id } = source {
            let node = Node::ViewSnapshots(box_id.clone());
            children.push((SNAPSHOTS.to_owned(), node, Kind::Directory));
        }
        Ok(children)
    }
}

/// The archive and the links in the directory of a box or a snapshot.
fn exports(source: Source) -> Vec<(String, Node, Kind)> {
    let links = Derived::ALL.map(|derived| {
        let link = Node::Link(derived, source.clone());
        (derived.name().to_owned(), link, Kind::Symlink)
    });
    let export = Node::Export(source);
    let mut all = vec![(EXPORT.to_owned(), export, Kind::File)];
    all.extend(links);
    all
}

fn live(id: &str) -> Source {
    Source::Live {
        box_id: id.to_owned(),
    }
}

fn mode_of_directories(home: u32) -> u16 {
    u16::try_from(home & 0o777).unwrap_or(0o700)
}

/// A time of BoxLite's rows.
pub(in crate::tree) fn at(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// When the row changed last, as far as BoxLite says.
fn updated(record: &BoxRecord) -> SystemTime {
    record
        .state()
        .ok()
        .and_then(|state| {
            let time = state["last_updated"].as_str()?;
            time.parse::<jiff::Timestamp>().ok()
        })
        .map_or_else(
            || at(record.created_at),
            |time| {
                let nanoseconds = u32::try_from(time.subsec_nanosecond()).unwrap_or(0);
                at(time.as_second()) + Duration::from_nanos(nanoseconds.into())
            },
        )
}
