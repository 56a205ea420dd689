//! What makes names: mkdir, create, symlink; and setattr on what is being made.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::attr::Attr;
use super::caller::{Caller, Makers};
use super::handle::Opened;
use super::names::{ARCHIVE_SUFFIX, EXPORT, SNAPSHOTS, decode};
use super::node::{Derived, Node};
use super::staged_file::{Content, Place, Role, StagedFile, role_of};
use super::staging::{Child, LooseFile, StagedBox, What};
use super::{Tree, text};
use crate::home::{box_id, is_snapshot_name, snapshot_id};
use crate::store::Source;
use crate::{Error, Result};

/// How long a copy into a snapshot that the same process has just taken takes it back: cp and rsync
/// put files into a directory right after they made it.
const FRESH: Duration = Duration::from_secs(60);

/// What setattr is asked to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// The size in bytes: truncate(2), or O_TRUNC, which comes without a handle.
    pub size: Option<u64>,
}

pub(super) fn exists(name: &str) -> Error {
    Error::new(libc::EEXIST, format!("{name} is there already"))
}

pub(super) fn not_there() -> Error {
    Error::new(libc::ENOENT, "there is no such file")
}

impl Tree {
    /// `mkdir`: in the root a box begins to be made, under `snapshots` a snapshot is taken.
    ///
    /// # Errors
    /// EEXIST, EINVAL, EBUSY, EPERM where directories mean nothing, EROFS.
    pub fn mkdir(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<Attr> {
        let parent = self.node_to_change(parent)?;
        let name = text(name)?;
        let node = match &parent {
            Node::Root => self.begin_box(caller, name)?,
            Node::Box(id) if name == SNAPSHOTS && self.has_removed(caller, &parent, name) => {
                self.dealings.lock().bring_back(id, &parent, name);
                Node::Snapshots(id.clone())
            }
            _ => match self.make_staged(caller, &parent, name, What::Directory)? {
                Some(node) => node,
                None => self.make_snapshot(caller, &parent, name)?,
            },
        };
        let mut attr = self.attr(caller, &node)?;
        attr.ino = self.tell(&node);
        Ok(attr)
    }

    fn begin_box(&self, caller: Caller, name: &str) -> Result<Node> {
        self.refuse_dotted(name)?;
        decode(name).map_err(|error| self.refuse(error.errno(), error.to_string()))?;
        let names = self.names()?;
        let mut staging = self.staging.lock();
        staging.sweep();
        if names.id_of(name).is_some() || staging.names.contains_key(name) {
            return Err(exists(name));
        }
        let id = box_id()?;
        let staged = StagedBox::new(id.clone(), caller);
        staging.names.insert(name.to_owned(), id.clone());
        staging.boxes.insert(id.clone(), staged);
        Ok(Node::Box(id))
    }

    /// EPERM for `.Trash-0` and its like.
    pub(super) fn refuse_dotted(&self, name: &str) -> Result<()> {
        if !name.starts_with('.') {
            return Ok(());
        }
        Err(self.refuse(
            libc::EPERM,
            format!("{name}: directories with a leading dot have no place among boxes"),
        ))
    }

    fn make_snapshot(&self, caller: Caller, parent: &Node, name: &str) -> Result<Node> {
        let Node::Snapshots(id) = parent else {
            return Err(self.refuse(
                libc::EPERM,
                format!("{name}: a directory means something in the root (a box) and in snapshots (a snapshot) only"),
            ));
        };
        self.refuse_copying_over(caller, id, name)?;
        let snapshot = self.store.snapshot(id, name)?;
        self.remember_fresh(&snapshot, caller);
        Ok(Node::Snapshot(id.clone(), snapshot))
    }

    /// Remembers for a while who took a snapshot.
    fn remember_fresh(&self, snapshot: &str, caller: Caller) {
        let mut fresh = self.fresh.lock();
        fresh.retain(|_, (makers, taken)| taken.elapsed() < FRESH && makers.any_alive());
        fresh.insert(snapshot.to_owned(), (Makers::begin(caller), Instant::now()));
    }

    /// EPERM for a process that copies a whole box over one that exists: it would put parts of the one
    /// into the other, or take a snapshot of today under the name of an old one.
    pub(super) fn refuse_copying_over(&self, caller: Caller, id: &str, name: &str) -> Result<()> {
        let mut dealings = self.dealings.lock();
        let Some(dealing) = dealings.of(caller, id).filter(|d| d.goes_on_copying()) else {
            return Ok(());
        };
        // It may have more to copy.
        dealing.copying_was_refused();
        Err(self.refuse_copied_box(name))
    }

    pub(super) fn refuse_copied_box(&self, name: &str) -> Error {
        self.refuse(
            libc::EPERM,
            format!("{name}: the same process tried to write other files of the box, so it copies a whole box over one that exists; copy it to a new name, or export.boxlite alone to restore"),
        )
    }

    /// Something was refused that a copy of a whole box over one that exists would begin with.
    pub(super) fn remember_refused_copy(&self, caller: Caller, node: &Node) {
        if let Some(id) = node.box_id() {
            let mut dealings = self.dealings.lock();
            dealings.begin(caller, id).copying_was_refused();
        }
    }

    /// Refuses to put something into a box that exists. Where a copy tool has just made the
    /// snapshot it wants to put it into, that snapshot is of today's disk, and not of what is being
    /// copied: it is taken back.
    fn refuse_put(&self, caller: Caller, parent: &Node, name: &str) -> Error {
        if role_of(parent, name) != Some(Role::Dropped) || Derived::named(name).is_some() {
            self.remember_refused_copy(caller, parent);
        }
        if let Node::Snapshot(id, snapshot) = parent {
            let mine = self
                .fresh
                .lock()
                .get_mut(snapshot)
                .is_some_and(|(makers, taken)| taken.elapsed() < FRESH && makers.includes(caller));
            if mine {
                let taken_back = self.store.remove_snapshot(id, snapshot);
                self.fresh.lock().remove(snapshot);
                let end = match taken_back {
                    Ok(()) => "it was taken back",
                    Err(_) => "it stays",
                };
                return self.refuse(
                    libc::EPERM,
                    format!("{name}: snapshots can't be copied into a box that exists; the mkdir had taken one of the disk as it is now, {end}"),
                );
            }
        }
        self.refuse(
            libc::EPERM,
            format!("{name}: nothing can be put into a box that exists; copy to a new name to make another"),
        )
    }

    /// A file that is to become a box's disk, under the name of its export (which the caller has
    /// removed before) or under a temporary one.
    pub(super) fn create_over(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
    ) -> Result<Arc<StagedFile>> {
        let Node::Box(id) = parent else {
            return Err(self.refuse_put(caller, parent, name));
        };
        if !matches!(
            role_of(parent, name),
            Some(Role::BoxDisk | Role::TemporaryArchive)
        ) {
            return Err(self.refuse_put(caller, parent, name));
        }
        self.refuse_restore(caller, id)?;
        let place = Place {
            parent: parent.clone(),
            name: name.to_owned(),
        };
        self.remember_writer(caller, id);
        let file = StagedFile::restoring(self.fresh_made(), id.clone(), place, caller);
        let mut staging = self.staging.lock();
        if staging.is_written(parent, name) {
            return Err(exists(name));
        }
        let loose = LooseFile::new(parent.clone(), name, file.clone(), caller);
        staging.files.push(loose);
        Ok(file)
    }

    /// Somebody is about to write over a box's export.
    pub(super) fn remember_writer(&self, caller: Caller, id: &str) {
        let export = Node::Export(Source::Live {
            box_id: id.to_owned(),
        });
        let mut writers = self.writers.lock();
        writers.retain(|_, (makers, last)| last.elapsed() < FRESH && makers.any_alive());
        match writers.get_mut(&export.ino()) {
            Some((makers, last)) => {
                makers.join(caller);
                *last = Instant::now();
            }
            None => {
                writers.insert(export.ino(), (Makers::begin(caller), Instant::now()));
            }
        }
    }

    fn is_writer(&self, caller: Caller, node: &Node) -> bool {
        let mut writers = self.writers.lock();
        writers
            .get_mut(&node.ino())
            .is_some_and(|(makers, last)| last.elapsed() < FRESH && makers.includes(caller))
    }

    /// Refuses at the first byte what would be refused at the last.
    pub(super) fn refuse_restore(&self, caller: Caller, id: &str) -> Result<()> {
        self.refuse_copying_over(caller, id, EXPORT)?;
        let source = Source::Live {
            box_id: id.to_owned(),
        };
        if !self.store.has_disk(&source) {
            return Err(self.refuse(
                libc::ENODATA,
                format!(
                    "{} has no disk yet; start it once with BoxLite, or import under a new name",
                    self.store.describe(&source)
                ),
            ));
        }
        self.store.refuse_unready_for_restore(id).map_err(|error| {
            let sentence = format!("restore of {}: {error}", self.store.describe(&source));
            self.refuse(error.errno(), sentence)
        })
    }

    /// Makes a name in a box being made. None when the caller sees a real box there.
    fn make_staged(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
        what: What,
    ) -> Result<Option<Node>> {
        let mut staging = self.staging.lock();
        let Some(staged) = staging.face(caller, parent) else {
            return Ok(None);
        };
        if !staged.makers.take_over(caller) {
            return Err(self.refuse(
                libc::EBUSY,
                format!("{name}: another process is making that box"),
            ));
        }
        staged.touch();
        let id = staged.id.clone();
        let node = self.node_for_made(parent, &id, name, &what)?;
        let directory = staged
            .children
            .get_mut(&parent.ino())
            .ok_or_else(not_there)?;
        if directory.contains_key(name) {
            return Err(exists(name));
        }
        let is_directory = matches!(what, What::Directory);
        let child = Child {
            node: node.clone(),
            what,
        };
        directory.insert(name.to_owned(), child);
        if is_directory {
            staged.children.insert(node.ino(), BTreeMap::new());
        }
        staging.made_in.insert(node.ino(), id);
        Ok(Some(node))
    }

    /// The node of a name being made: that of the real thing it will be, so that its inode stays.
    fn node_for_made(&self, parent: &Node, id: &str, name: &str, what: &What) -> Result<Node> {
        Ok(match (parent, what) {
            (Node::Box(_), What::Directory) if name == SNAPSHOTS => Node::Snapshots(id.to_owned()),
            (Node::Snapshots(_), What::Directory) => {
                if !is_snapshot_name(name) {
                    return Err(
                        self.refuse(libc::EINVAL, format!("{name:?} can't be a snapshot's name"))
                    );
                }
                Node::Snapshot(id.to_owned(), snapshot_id()?)
            }
            (_, What::File(file)) => file.node.clone(),
            _ => self.fresh_made(),
        })
    }

    /// creat(2): an archive in the root, or a file of a box being made.
    ///
    /// # Errors
    /// EEXIST, EPERM for what can't become anything, EROFS.
    pub fn create(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<(Attr, Opened)> {
        let parent = self.node_to_change(parent)?;
        let name = text(name)?;
        let file = match &parent {
            Node::Root => self.create_in_root(caller, name)?,
            _ => self.create_staged(caller, &parent, name)?,
        };
        file.state.lock().open = 1;
        let mut attr = self.attr_of_made(&file);
        attr.ino = self.tell(&file.node);
        Ok((attr, self.opened_for_writing(file)))
    }

    fn create_in_root(&self, caller: Caller, name: &str) -> Result<Arc<StagedFile>> {
        let Some(role) = role_of(&Node::Root, name) else {
            return Err(self.refuse(
                libc::EPERM,
                format!("{name}: only archives can be put here; call it NEW{ARCHIVE_SUFFIX} to import it as box NEW"),
            ));
        };
        if role == Role::NewBox {
            self.refuse_taken_box(name)?;
        }
        let place = Place {
            parent: Node::Root,
            name: name.to_owned(),
        };
        let file = StagedFile::new(self.fresh_made(), box_id()?, place);
        let mut staging = self.staging.lock();
        if staging.has_loose_file(&Node::Root, name) {
            // Another maker's file: this caller does not see it, or cp would have found it.
            return Err(exists(name));
        }
        let loose = LooseFile::new(Node::Root, name, file.clone(), caller);
        staging.files.push(loose);
        Ok(file)
    }

    /// EEXIST when the box that `NAME.boxlite` would make is there or is being made.
    pub(super) fn refuse_taken_box(&self, name: &str) -> Result<()> {
        let shown = name.strip_suffix(ARCHIVE_SUFFIX).unwrap_or(name);
        decode(shown).map_err(|error| self.refuse(error.errno(), error.to_string()))?;
        let names = self.names()?;
        if names.id_of(shown).is_some() || self.staging.lock().names.contains_key(shown) {
            return Err(self.refuse(
                libc::EEXIST,
                format!("{name}: there is a box {shown} already"),
            ));
        }
        Ok(())
    }

    fn create_staged(&self, caller: Caller, parent: &Node, name: &str) -> Result<Arc<StagedFile>> {
        let id = self.staging.lock().box_of(parent).unwrap_or_default();
        if matches!(parent, Node::Made(_)) && name.ends_with(ARCHIVE_SUFFIX) {
            // In a directory that means nothing it would be dropped, and look as if it was kept.
            return Err(self.refuse(
                libc::EPERM,
                format!("{name}: an archive means nothing here; copy it to the name of a new box"),
            ));
        }
        let node = match parent {
            Node::Box(_) if name == EXPORT => Node::Export(Source::Live { box_id: id.clone() }),
            Node::Snapshot(_, snapshot) if name == EXPORT => Node::Export(Source::Snapshot {
                box_id: id.clone(),
                snapshot_id: snapshot.clone(),
            }),
            _ => self.fresh_made(),
        };
        let place = Place {
            parent: parent.clone(),
            name: name.to_owned(),
        };
        let file = StagedFile::new(node, id, place);
        match self.make_staged(caller, parent, name, What::File(file.clone()))? {
            Some(_) => Ok(file),
            None => self.create_over(caller, parent, name),
        }
    }

    /// symlink(2): accepted and dropped in a box being made.
    ///
    /// # Errors
    /// EPERM elsewhere.
    pub fn symlink(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        target: &Path,
    ) -> Result<Attr> {
        let parent = self.node_to_change(parent)?;
        let name = text(name)?;
        let link = What::Link(PathBuf::from(target));
        let node = self
            .make_staged(caller, &parent, name, link)?
            .ok_or_else(|| {
                self.remember_refused_copy(caller, &parent);
                self.refuse(libc::EPERM, format!("{name}: links have no place here"))
            })?;
        let mut attr = self.attr(caller, &node)?;
        attr.ino = self.tell(&node);
        Ok(attr)
    }

    /// mknod(2) of anything but a regular file.
    ///
    /// # Errors
    /// Always EPERM.
    pub fn mknod(&self, name: &OsStr) -> Result<Attr> {
        Err(self.refuse(
            libc::EPERM,
            format!(
                "{}: pipes, sockets and devices have no place here",
                name.display()
            ),
        ))
    }

    /// setattr: what copy tools set on what they make is accepted and dropped; the attributes of
    /// what exists follow from the home.
    ///
    /// # Errors
    /// EPERM on what exists, EROFS.
    pub fn setattr(
        &self,
        caller: Caller,
        ino: u64,
        handle: Option<u64>,
        set: SetAttr,
    ) -> Result<Attr> {
        let node = self.node_to_change(ino)?;
        let (made, file) = {
            let mut staging = self.staging.lock();
            let made =
                staging.loose_file_at(&node).is_some() || staging.face(caller, &node).is_some();
            (made, made.then(|| staging.file_at(&node)).flatten())
        };
        let file = file.or_else(|| self.written_over(&node, handle));
        // O_TRUNC comes without a handle and says nothing: an archive counts once it is complete.
        let says_nothing = handle.is_none() && matches!(set.size, None | Some(0));
        let is_writer = says_nothing && self.is_writer(caller, &node);
        if !made && file.is_none() && !is_writer {
            return Err(Error::new(
                libc::EPERM,
                "modes, owners, times and sizes follow from the home; they can't be set here",
            ));
        }
        if let (Some(file), Some(size)) = (file, set.size) {
            resize(&file, size)?;
        }
        self.attr(caller, &node)
    }
}

/// truncate(2) on a file being made: to nothing starts it anew, to more leaves a hole at the end.
fn resize(file: &StagedFile, size: u64) -> Result<()> {
    let mut state = file.state.lock();
    if state.committed {
        return Ok(());
    }
    if size == 0 {
        state.content = Content::Nothing;
        state.refused = None;
        file.size.store(0, Ordering::Relaxed);
        return Ok(());
    }
    if size < file.size() {
        return Err(Error::new(
            libc::EINVAL,
            "an archive can't be cut; copy it again from the start",
        ));
    }
    if let Content::Archive(arrival) = &mut state.content {
        arrival.set_length(size);
    }
    file.reaches(size);
    Ok(())
}
