//! Boxes and snapshots that exist: names, attributes, listings.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::exports::{Source, UNREADABLE};
use crate::home::{BoxRecord, KeptBox, KeptFrom, is_kept_id};
use crate::store::{self, Store, Usage};
use crate::tree::nodes::attr::{Attr, Kept, Kind};
use crate::tree::nodes::box_json;
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::kept_names::why_json;
use crate::tree::nodes::names::{
    BOX_JSON, EXPORT, HIDDEN, LOG, SNAPSHOT_JSON, SNAPSHOTS, STATUS, UNDO, VIEW, WHY_JSON,
    not_there,
};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::nodes::status_file::StatusFile;
use crate::tree::reading::export_files::ExportFiles;
use crate::tree::reading::guest_files::GuestFiles;
use crate::tree::reading::open_files::OpenFiles;
use crate::{Error, Result};

/// The files of a home as they are without what is being copied in.
pub struct HomeView {
    /// The home.
    pub store: Arc<Store>,
    /// Its boxes.
    pub boxes: Arc<Boxes>,
    /// Their exports.
    pub exports: Arc<ExportFiles>,
    /// The files in their disks.
    pub guests: Arc<GuestFiles>,
    /// What the mount does now.
    pub status: Arc<StatusFile>,
    /// What is open, for the status.
    pub open: Arc<OpenFiles>,
}

impl HomeView {
    /// Returns what a name in a directory stands for.
    ///
    /// # Errors
    /// ENOENT, and those of reading the home.
    pub fn child(&self, parent: &Node, name: &str) -> Result<Node> {
        let node = match parent {
            Node::Root if name == HIDDEN => Node::Hidden,
            Node::Root => {
                let names = self.boxes.names()?;
                Node::Box(names.id_of(name).ok_or_else(not_there)?.to_owned())
            }
            Node::Hidden if name == LOG => Node::Log,
            Node::Hidden if name == STATUS => Node::Status(self.status.version(self.open.len())?),
            Node::Hidden if name == VIEW => Node::View,
            Node::Hidden if name == UNDO => Node::Undo,
            Node::Undo => {
                let mut kept = self.boxes.kept()?.into_iter();
                let entry = kept.find(|(other, _)| other == name);
                Node::Box(entry.ok_or_else(not_there)?.1.id().to_owned())
            }
            Node::View => {
                let names = self.boxes.names()?;
                // Links in entries lead to them by their ids.
                let kept = || names.catalog().kept_by_id(name).map(|entry| entry.id());
                let id = names.id_of(name).or_else(kept);
                Node::ViewOf(live(id.ok_or_else(not_there)?))
            }
            Node::ViewOf(source) if Derived::named(name).is_some() => {
                let derived =
                    Derived::named(name).filter(|_| self.store.exports().disks.has_disk(source));
                self.derived(derived.ok_or_else(not_there)?, source)?
            }
            Node::ViewOf(Source::Live { box_id }) if name == SNAPSHOTS => {
                Node::ViewSnapshots(box_id.clone())
            }
            Node::ViewSnapshots(id) => {
                let names = self.boxes.names()?;
                let row = names.catalog().snapshot_by_name(id, name);
                Node::ViewOf(Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: row.ok_or_else(not_there)?.id.clone(),
                })
            }
            Node::Box(id) => self.child_of_box(id, name)?,
            Node::Snapshots(id) => {
                let names = self.boxes.names()?;
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
            WHY_JSON if is_kept_id(id) => Ok(Node::Why(id.to_owned())),
            SNAPSHOTS if self.has_snapshots(id) => Ok(Node::Snapshots(id.to_owned())),
            _ => self.child_of_state(source, name),
        }
    }

    /// Returns whether a box has a directory of snapshots, as every box has, and an entry of a box.
    fn has_snapshots(&self, id: &str) -> bool {
        let is_box = |entry: Arc<KeptBox>| entry.rows.action == KeptFrom::BoxRemoved;
        !is_kept_id(id) || self.boxes.kept_by_id(id).is_ok_and(is_box)
    }

    /// Returns what there is of a disk state. A box that never started has none yet.
    fn child_of_state(&self, source: Source, name: &str) -> Result<Node> {
        let derived = Derived::named(name);
        // The export of a box that never started can't be opened: so a copy of the box fails, and a
        // move that could not bring it back removes nothing.
        let is_shown = match derived {
            Some(_) => self.store.exports().disks.has_disk(&source),
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

    /// Returns what a link into the view points to.
    fn derived(&self, derived: Derived, source: &Source) -> Result<Node> {
        if derived == Derived::DiskImage
            && let Some(writing) = store::written_disk(&self.store, source)
        {
            return Ok(Node::DiskImage(writing.state().clone()));
        }
        Ok(match derived {
            Derived::Compressed => Node::Compressed(source.clone()),
            _ if self.store.exports().views.running.is_running(source) => {
                Node::Running(derived, source.clone())
            }
            Derived::DiskImage => Node::DiskImage(self.guests.look_inside(source)?.state().clone()),
            Derived::Rootfs => {
                let inside = self.guests.look_inside(source)?;
                Node::Guest(self.guests.root_of(&inside)?)
            }
        })
    }

    /// Returns attributes.
    ///
    /// # Errors
    /// ENOENT, and those of reading the home and of planning exports.
    pub fn attr(&self, node: &Node) -> Result<Attr> {
        let owner = self.store.home().owner();
        let directory = |below, changed| Attr::of_directory(owner, node, below, changed);
        let file = |size, changed| Attr::of_file(owner, node, size, changed);
        match node {
            Node::Root => Ok(directory(self.boxes.names()?.all().len(), self.changed())),
            Node::Hidden => Ok(directory(0, self.store.events().changed_at())),
            Node::Undo => self.undo_attr(),
            Node::Why(id) => {
                let entry = self.boxes.kept_by_id(id)?;
                let text = why_json(&entry.rows);
                Ok(file(text.len() as u64, at(entry.rows.seconds())))
            }
            Node::Log => {
                let events = self.store.events();
                Ok(file(events.len(), events.changed_at()))
            }
            Node::Status(version) => {
                let size = version.bytes.len() as u64;
                Ok(file(size, version.made))
            }
            Node::Made(_) => Err(not_there()),
            Node::Box(id) => {
                let record = self.boxes.record(id)?;
                let below = usize::from(self.has_snapshots(id));
                let mut attr = directory(below, self.disk_time(&live(id), &record));
                attr.created = at(record.created_at);
                if is_kept_id(id) {
                    // It goes when its time is over, and its name may be another's after a rename.
                    attr.kept = Kept::Not;
                }
                Ok(attr)
            }
            Node::BoxJson(id) => {
                let record = self.boxes.record(id)?;
                let size = box_json::box_json(&record, Usage::default())?.len() as u64;
                let mut attr = file(size, updated(&record));
                attr.created = at(record.created_at);
                Ok(attr)
            }
            Node::Snapshots(id) => {
                let record = self.boxes.record(id)?;
                let names = self.boxes.names()?;
                let count = names.catalog().snapshots_of(id).len();
                let changed = fs::metadata(self.store.home().snapshots_dir(id))
                    .and_then(|meta| meta.modified())
                    .unwrap_or_else(|_| at(record.created_at));
                Ok(directory(count, changed))
            }
            Node::Snapshot(id, snapshot) => {
                let made = at(self.boxes.snapshot(id, snapshot)?.shown_at);
                Ok(directory(0, made))
            }
            Node::SnapshotJson(id, snapshot) => {
                let row = self.boxes.snapshot(id, snapshot)?;
                let size = box_json::snapshot_json(&row, Usage::default())?.len() as u64;
                Ok(file(size, at(row.shown_at)))
            }
            Node::View => Ok(directory(self.boxes.names()?.all().len(), UNIX_EPOCH)),
            Node::ViewOf(source) => {
                let record = self.boxes.record(source.box_id())?;
                let below = usize::from(matches!(source, Source::Live { .. }));
                Ok(directory(below, self.disk_time(source, &record)))
            }
            Node::ViewSnapshots(id) => {
                let mut attr = self.attr(&Node::Snapshots(id.clone()))?;
                attr.ino = node.ino();
                Ok(attr)
            }
            Node::Guest(inner) => self.guests.attr(inner),
            Node::DiskImage(state) => self.guests.disk_image_attr(state),
            Node::Running(Derived::DiskImage, source) => {
                let mut attr = file(
                    self.store.exports().disks.virtual_size(source)?,
                    self.disk_time(source, &self.boxes.record(source.box_id())?),
                );
                attr.perm &= !0o222;
                Ok(attr)
            }
            Node::Running(_, source) => {
                let changed = self.disk_time(source, &self.boxes.record(source.box_id())?);
                let mut attr = directory(0, changed);
                attr.perm &= !0o222;
                attr.kept = Kept::Not;
                Ok(attr)
            }
            Node::Link(derived, source) => {
                let record = self.boxes.record(source.box_id())?;
                let target = self.boxes.link_target(*derived, source)?;
                let size = target.as_os_str().len() as u64;
                let mut attr = Attr::of_link(owner, node, size, at(record.created_at));
                attr.kept = Kept::Moment;
                Ok(attr)
            }
            Node::Export(source) | Node::Compressed(source) => {
                let record = self.boxes.record(source.box_id())?;
                let mut attr = match self.exports.contents(node)? {
                    Some(contents) => file(contents.size, contents.changed),
                    None if matches!(node, Node::Export(Source::Live { .. })) => {
                        file(UNREADABLE, at(record.created_at))
                    }
                    None => return Err(not_there()),
                };
                attr.created = at(record.created_at);
                Ok(attr)
            }
        }
    }

    /// Returns the attributes of `.boxlite/undo`, which changes with its entries.
    fn undo_attr(&self) -> Result<Attr> {
        let kept = self.boxes.kept()?;
        let changed = kept.last().map_or(0, |(_, entry)| entry.rows.seconds());
        let owner = self.store.home().owner();
        let mut attr = Attr::of_directory(owner, &Node::Undo, kept.len(), at(changed));
        attr.kept = Kept::Not;
        Ok(attr)
    }

    /// Returns when a box was made or removed last.
    fn changed(&self) -> SystemTime {
        fs::metadata(self.store.home().boxes_dir())
            .and_then(|meta| meta.modified())
            .unwrap_or(UNIX_EPOCH)
    }

    /// Returns when the disk state changed last; a box without a disk has only when it was made.
    fn disk_time(&self, source: &Source, record: &BoxRecord) -> SystemTime {
        self.store
            .exports()
            .disks
            .changed_at(source)
            .unwrap_or_else(|| at(record.created_at))
    }

    /// Returns every name in a directory, in the order it is listed: `snapshots` last, so that
    /// `cp -r` has made the box when it comes to its snapshots.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, and those of reading the home.
    pub fn list(&self, node: &Node) -> Result<Vec<(String, Node, Kind)>> {
        let names = self.boxes.names()?;
        Ok(match node {
            Node::Root => names
                .all()
                .iter()
                .map(|(name, id)| (name.to_string(), Node::Box(id.to_string()), Kind::Directory))
                .collect(),
            Node::Hidden => vec![
                (LOG.to_owned(), Node::Log, Kind::File),
                (
                    STATUS.to_owned(),
                    Node::Status(self.status.version(self.open.len())?),
                    Kind::File,
                ),
                (VIEW.to_owned(), Node::View, Kind::Directory),
                (UNDO.to_owned(), Node::Undo, Kind::Directory),
            ],
            Node::Undo => {
                let kept = self.boxes.kept()?.into_iter();
                kept.map(|(name, entry)| (name, Node::Box(entry.id().to_owned()), Kind::Directory))
                    .collect()
            }
            Node::View => names
                .all()
                .iter()
                .map(|(name, id)| (name.to_string(), Node::ViewOf(live(id)), Kind::Directory))
                .collect(),
            Node::ViewOf(source) => self.view_of(source)?,
            Node::ViewSnapshots(id) => {
                self.boxes.record(id)?;
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
                self.boxes.record(id)?;
                let mut children =
                    vec![(BOX_JSON.to_owned(), Node::BoxJson(id.clone()), Kind::File)];
                let of_disk = exports(live(id)).into_iter();
                let shown = if self.store.exports().disks.has_disk(&live(id)) {
                    4
                } else {
                    1
                };
                children.extend(of_disk.take(shown));
                if is_kept_id(id) {
                    children.push((WHY_JSON.to_owned(), Node::Why(id.clone()), Kind::File));
                }
                if self.has_snapshots(id) {
                    let snapshots = Node::Snapshots(id.clone());
                    children.push((SNAPSHOTS.to_owned(), snapshots, Kind::Directory));
                }
                children
            }
            Node::Snapshots(id) => {
                self.boxes.record(id)?;
                let rows = names.catalog().snapshots_of(id).iter();
                rows.map(|row| {
                    let node = Node::Snapshot(id.clone(), row.id.clone());
                    (row.name.clone(), node, Kind::Directory)
                })
                .collect()
            }
            Node::Snapshot(id, snapshot) => {
                self.boxes.snapshot(id, snapshot)?;
                let json = Node::SnapshotJson(id.clone(), snapshot.clone());
                let mut children = vec![(SNAPSHOT_JSON.to_owned(), json, Kind::File)];
                let source = Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: snapshot.clone(),
                };
                if self.store.exports().disks.has_disk(&source) {
                    children.extend(exports(source));
                }
                children
            }
            _ => return Err(Error::new(libc::ENOTDIR, "that is not a directory")),
        })
    }

    /// Returns what the view has of a disk state.
    fn view_of(&self, source: &Source) -> Result<Vec<(String, Node, Kind)>> {
        self.boxes.record(source.box_id())?;
        let mut children = Vec::new();
        if self.store.exports().disks.has_disk(source) {
            for derived in Derived::ALL {
                // Which nodes these are is known only after a look into the disk, and a listing
                // does not look there.
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

/// Returns the archive and the links in the directory of a box or a snapshot.
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

/// Returns a time of BoxLite's rows.
fn at(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Returns when the row changed last, as far as BoxLite says.
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
