//! What makes names: mkdir, create, symlink; and setattr on what is being made.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::home::{box_id, is_snapshot_name, snapshot_id};
use crate::store::Source;
use crate::tree::nodes::attr::Attr;
use crate::tree::nodes::names::{
    ARCHIVE_SUFFIX, BOX_JSON, EXPORT, HIDDEN, SNAPSHOTS, VIEW, archive_stem, decode, exists,
    not_there,
};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::reading::open_file::Opened;
use crate::tree::staging::caller::{Caller, Makers};
use crate::tree::staging::staged_file::{Content, Place, Role, StagedFile, role_of};
use crate::tree::staging::staging_area::{Child, LooseFile, StagedBox, Unlisted, What};
use crate::tree::{Tree, text};
use crate::{Error, Result};

/// How long a program that opened an export for writing may set the file's size, times and mode.
const FRESH: Duration = Duration::from_secs(60);

/// What setattr is asked to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// The size in bytes: truncate(2), or O_TRUNC, which comes without a handle.
    pub size: Option<u64>,
}

impl Tree {
    /// `mkdir`: in the root a box begins to be made, under `snapshots` a snapshot is taken.
    ///
    /// # Errors
    /// EEXIST, EINVAL, EBUSY, EPERM where directories mean nothing, EROFS.
    pub fn mkdir(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<Attr> {
        let parent = self.node_to_change(parent)?;
        let name = text(name)?;
        if let Some(aside) = self.make_aside(caller, &parent, name)? {
            let mut attr = self.attr(caller, &aside)?;
            attr.ino = self.tell(&aside);
            return Ok(attr);
        }
        let node = match &parent {
            Node::Root => self.begin_box(caller, name)?,
            Node::Box(id) if name == SNAPSHOTS && self.has_removed(caller, &parent, name) => {
                self.dealings.lock().bring_back(id, &parent, name);
                Node::Snapshots(id.clone())
            }
            Node::Snapshots(id) if self.exists(id) => self.make_in_snapshots(caller, id, name)?,
            _ => {
                self.refuse_directory(&parent, name)?;
                self.make_staged(caller, &parent, name, What::Directory)?
                    .ok_or_else(|| self.refuse_meaningless_directory(name))?
            }
        };
        let mut attr = self.attr(caller, &node)?;
        attr.ino = self.tell(&node);
        Ok(attr)
    }

    fn begin_box(&self, caller: Caller, name: &str) -> Result<Node> {
        self.refuse_dotted(name)?;
        decode(name).map_err(|error| self.refuse(error.errno(), error.to_string()))?;
        self.refuse_new_box(name)?;
        let names = self.names()?;
        let mut staging = self.staging.lock();
        staging.sweep();
        if names.id_of(name).is_some() || staging.names.contains_key(name) {
            return Err(exists(name));
        }
        let id = box_id()?;
        let mut staged = StagedBox::new(id.clone(), caller);
        staged.is_made_in_by(caller);
        staging.names.insert(name.to_owned(), id.clone());
        staging.boxes.insert(id.clone(), staged);
        Ok(Node::Box(id))
    }

    /// Refuses a new box at the first step if it would be refused at the last: many programs ignore the
    /// result of close.
    fn refuse_new_box(&self, name: &str) -> Result<()> {
        self.store
            .refuse_unready_for_import()
            .map_err(|error| self.refuse(error.errno(), format!("{name}: {error}")))
    }

    /// EPERM for `.Trash-0` and its like.
    pub(in crate::tree) fn refuse_dotted(&self, name: &str) -> Result<()> {
        if !name.starts_with('.') {
            return Ok(());
        }
        Err(self.refuse(
            libc::EPERM,
            format!("{name}: directories with a leading dot have no place among boxes"),
        ))
    }

    /// Whether a box of this id is there, or was, and is not only being made.
    fn exists(&self, id: &str) -> bool {
        let staging = self.staging.lock();
        let staged = staging.boxes.get(id);
        staged.is_none_or(|staged| staged.committed)
    }

    /// EPERM for a directory in a box or a snapshot being made that no backup of ours has: what would
    /// be put into it would not be kept.
    fn refuse_directory(&self, parent: &Node, name: &str) -> Result<()> {
        let message = match parent {
            Node::Box(_) if name == SNAPSHOTS => return Ok(()),
            Node::Box(id) if self.exists(id) => {
                return Err(self.refuse_meaningless_directory(name));
            }
            Node::Snapshots(_) => return Ok(()),
            Node::Box(_) | Node::Snapshot(..) if Derived::named(name).is_some() => format!(
                "{name}: the guest's files come with {EXPORT}; copy without following links (cp -r, \
                 not cp -rL; copytree(…, symlinks=True))"
            ),
            Node::Box(_) => format!(
                "{name}: a box is made of {EXPORT}, box.json and {SNAPSHOTS}; other directories are \
                 not kept, so keep them elsewhere"
            ),
            _ => return Err(self.refuse_meaningless_directory(name)),
        };
        Err(self.refuse(libc::EPERM, message))
    }

    fn refuse_meaningless_directory(&self, name: &str) -> Error {
        self.refuse(
            libc::EPERM,
            format!("{name}: a directory means something in the root (a box) and in {SNAPSHOTS} (a snapshot) only"),
        )
    }

    /// `mkdir` in the `snapshots` of a box that exists takes a snapshot. For a program that copies, it
    /// makes room for one that it brings: a snapshot of today would stand under the name of an old one
    /// until then, and for good if the tool skips what is there.
    fn make_in_snapshots(&self, caller: Caller, id: &str, name: &str) -> Result<Node> {
        self.refuse_copying_over(caller, id, name)?;
        if caller.is_outside() {
            return Err(self.refuse(
                libc::EPERM,
                format!(
                    "snapshot {name}: this process is in a pid namespace that the mount can't see into, so \
                     nobody can say whether it takes a snapshot or copies one; take it where the home is \
                     mounted, or with BoxLite"
                ),
            ));
        }
        let is_copying =
            caller.copies() || (caller.looks_first() && self.staging.lock().is_new_by(caller, id));
        if !is_copying {
            let snapshot = self.store.snapshot(id, name)?;
            self.dealings.lock().end(caller, id);
            let mut staging = self.staging.lock();
            let staged = staging.existing(caller, id);
            if caller.serves_others() {
                staged
                    .unlisted
                    .insert(snapshot.clone(), Unlisted::by(caller));
            }
            return Ok(Node::Snapshot(id.to_owned(), snapshot));
        }
        let parent = Node::Snapshots(id.to_owned());
        if self.real_child(&parent, name).is_ok() {
            return Err(exists(name));
        }
        self.store
            .refuse_unready_for_restore(id)
            .map_err(|error| self.refuse(error.errno(), format!("snapshot {name}: {error}")))?;
        self.staging.lock().existing(caller, id);
        self.make_staged(caller, &parent, name, What::Directory)?
            .ok_or_else(not_there)
    }

    /// EPERM for a process that copies a whole box over one that exists: it would put parts of the one
    /// into the other, or take a snapshot of today under the name of an old one.
    pub(in crate::tree) fn refuse_copying_over(
        &self,
        caller: Caller,
        id: &str,
        name: &str,
    ) -> Result<()> {
        let mut dealings = self.dealings.lock();
        let Some(dealing) = dealings.of(caller, id).filter(|d| d.goes_on_copying()) else {
            return Ok(());
        };
        // It may have more to copy.
        dealing.copying_was_refused();
        Err(self.refuse_copied_box(name))
    }

    pub(in crate::tree) fn refuse_copied_box(&self, name: &str) -> Error {
        self.refuse(
            libc::EPERM,
            format!("{name}: the same process tried to write other files of the box, so it copies a whole box over one that exists; copy it to a new name, or export.boxlite alone to restore"),
        )
    }

    /// Something was refused that a copy of a whole box over one that exists would begin with.
    pub(in crate::tree) fn remember_refused_copy(&self, caller: Caller, node: &Node) {
        if let Some(id) = node.box_id() {
            let mut dealings = self.dealings.lock();
            dealings.begin(caller, id).copying_was_refused();
        }
    }

    /// Refuses to put something into a box that exists.
    fn refuse_put(&self, caller: Caller, parent: &Node, name: &str) -> Error {
        if role_of(parent, name).is_some() || Derived::named(name).is_some() {
            self.remember_refused_copy(caller, parent);
        }
        let message = match parent {
            Node::Snapshot(..) => format!(
                "{name}: nothing can be put into a snapshot that exists; copy the snapshot to another name"
            ),
            _ => format!(
                "{name}: nothing can be put into a box that exists; copy to a new name to make another"
            ),
        };
        self.refuse(libc::EPERM, message)
    }

    /// EPERM unless the snapshot is what the box's disk is, so that nothing is lost where a snapshot
    /// that is copied takes its place.
    fn refuse_replacing(&self, caller: Caller, id: &str, snapshot: &str, name: &str) -> Result<()> {
        self.refuse_copying_over(caller, id, name)?;
        if self.store.is_live(id, snapshot)? {
            return Ok(());
        }
        let source = Source::Snapshot {
            box_id: id.to_owned(),
            snapshot_id: snapshot.to_owned(),
        };
        self.remember_refused_copy(caller, &Node::Export(source.clone()));
        let which = self.store.describe(&source);
        Err(self.refuse(
            libc::EPERM,
            format!(
                "{name}: {which} stays as it is; copy to another name, or over the box's {EXPORT} to \
                 restore it"
            ),
        ))
    }

    /// A file that is to become a box's disk, under the name of its export (which the caller has
    /// removed before) or under a temporary one.
    pub(in crate::tree) fn create_over(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
    ) -> Result<Arc<StagedFile>> {
        let id = match (parent, role_of(parent, name)) {
            (Node::Box(id), Some(Role::BoxDisk | Role::TemporaryArchive)) => {
                self.refuse_restore(caller, id)?;
                id
            }
            (Node::Snapshot(id, snapshot), Some(Role::SnapshotDisk | Role::TemporaryArchive)) => {
                self.refuse_replacing(caller, id, snapshot, name)?;
                id
            }
            _ => return Err(self.refuse_put(caller, parent, name)),
        };
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
    pub(in crate::tree) fn remember_writer(&self, caller: Caller, id: &str) {
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
    pub(in crate::tree) fn refuse_restore(&self, caller: Caller, id: &str) -> Result<()> {
        self.refuse_copying_over(caller, id, EXPORT)?;
        let source = Source::Live {
            box_id: id.to_owned(),
        };
        // A whole box that is copied over another may begin with any of its files.
        if caller.copies_tree_without(EXPORT) {
            self.remember_refused_copy(caller, &Node::Export(source.clone()));
            return Err(self.refuse(
                libc::EPERM,
                format!(
                    "{EXPORT}: a whole directory may be copied over {}; copy that to a new name; to \
                     restore, name {EXPORT} in the command",
                    self.store.describe(&source)
                ),
            ));
        }
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
            let message = format!("restore of {}: {error}", self.store.describe(&source));
            self.refuse(error.errno(), message)
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
        let Some(staged) = staging.made_by(caller, parent) else {
            return Ok(None);
        };
        if !staged.is_made_in_by(caller) {
            return Err(self.refuse(
                libc::EBUSY,
                format!("{name}: another process is making that box"),
            ));
        }
        staged.touch();
        let id = staged.id.clone();
        let node = self.node_for_made(parent, &id, name, &what)?;
        // A directory of a box that exists was not made here.
        let is_there = staged.committed && !matches!(parent, Node::Made(_));
        let directory = match staged.children.get_mut(&parent.ino()) {
            Some(directory) => directory,
            None if is_there => staged.children.entry(parent.ino()).or_default(),
            None => return Err(not_there()),
        };
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
    pub fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
    ) -> Result<(Attr, Opened)> {
        let parent = self.node_to_change(parent)?;
        let (parent, name) = self.change_aside(caller, parent, text(name)?);
        let name = name.as_ref();
        if caller.puts_files_elsewhere() {
            self.remember_failure(caller, &parent);
            return Err(self.refuse(
                libc::EPERM,
                format!("{name}: rsync can't put files aside in a directory of that name here; leave --partial-dir away"),
            ));
        }
        let file = match &parent {
            Node::Root => self.create_in_root(caller, name)?,
            _ => self.create_staged(caller, &parent, name, mode)?,
        };
        self.was_made(caller, &parent, name);
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
        self.refuse_new_box(name)?;
        let place = Place {
            parent: Node::Root,
            name: name.to_owned(),
        };
        let file = StagedFile::new(self.fresh_made(), box_id()?, place, caller);
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
    pub(in crate::tree) fn refuse_taken_box(&self, name: &str) -> Result<()> {
        let shown = archive_stem(name).unwrap_or(name);
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

    fn create_staged(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
        mode: u32,
    ) -> Result<Arc<StagedFile>> {
        let id = {
            let mut staging = self.staging.lock();
            let id = staging.box_of(parent).unwrap_or_default();
            let is_mine = staging.made_by(caller, parent).is_some();
            drop(staging);
            if is_mine {
                self.refuse_file(caller, parent, name, mode)?;
            }
            id
        };
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
        if self.replaces_disk(parent, name) {
            return self.create_over(caller, parent, name);
        }
        if name == EXPORT {
            self.refuse_new_box(name)
                .inspect_err(|_| self.remember_failure(caller, parent))?;
        }
        let file = StagedFile::new(node, id, place, caller);
        match self.make_staged(caller, parent, name, What::File(file.clone()))? {
            Some(_) => Ok(file),
            None => self.create_over(caller, parent, name),
        }
    }

    /// Whether a name stands for the disk of a box, or of a snapshot, that exists.
    fn replaces_disk(&self, parent: &Node, name: &str) -> bool {
        let is_disk = matches!(
            role_of(parent, name),
            Some(Role::BoxDisk | Role::SnapshotDisk | Role::TemporaryArchive)
        );
        is_disk
            && match parent {
                Node::Box(id) => self.exists(id),
                Node::Snapshot(id, snapshot) => self.snapshot(id, snapshot).is_ok(),
                _ => false,
            }
    }

    /// EPERM for a file in a box or a snapshot being made whose bytes would not be kept.
    fn refuse_file(&self, caller: Caller, parent: &Node, name: &str, mode: u32) -> Result<()> {
        let is_refused = {
            let mut staging = self.staging.lock();
            let staged = staging.made_by(caller, parent);
            staged.is_some_and(|staged| staged.refused.contains(&parent.ino()))
        };
        if role_of(parent, name).is_some() && !is_refused {
            return Ok(());
        }
        let derived = Derived::named(name);
        // tar makes an empty file nobody may open where a link will be, and a link in its place
        // at its end.
        if derived.is_some() && mode & 0o777 == 0 {
            return Ok(());
        }
        // A whole box is copied to where a snapshot was expected.
        if matches!(parent, Node::Snapshot(..)) && name == BOX_JSON {
            let mut staging = self.staging.lock();
            if let Some(staged) = staging.made_by(caller, parent) {
                staged.refused.insert(parent.ino());
            }
        }
        self.remember_failure(caller, parent);
        let message = match derived {
            Some(_) => format!(
                "{name}: it comes with {EXPORT}; copy without following links (cp -r, not cp -rL; \
                 copytree(…, symlinks=True))"
            ),
            None => format!(
                "{name} would not be kept: a box is made of {EXPORT}, box.json and {SNAPSHOTS}, or of \
                 an archive that is copied to NEW{ARCHIVE_SUFFIX}"
            ),
        };
        Err(self.refuse(libc::EPERM, message))
    }

    /// Something of a box being made was refused: what comes of the rest goes with its makers.
    fn remember_failure(&self, caller: Caller, parent: &Node) {
        let mut staging = self.staging.lock();
        if let Some(staged) = staging.made_by(caller, parent) {
            staged.fail(caller.process());
        }
    }

    /// symlink(2): in a box being made, the links that our boxes have, which follow from its disk.
    ///
    /// # Errors
    /// EPERM for any other, and elsewhere.
    pub fn symlink(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        target: &Path,
    ) -> Result<Attr> {
        let parent = self.node_to_change(parent)?;
        let name = text(name)?;
        if !is_ours(&parent, name, target) {
            self.remember_failure(caller, &parent);
            return Err(self.refuse(
                libc::EPERM,
                format!("{name}: other links than those of our boxes would not be kept; copy what it points to, as {EXPORT}"),
            ));
        }
        let link = What::Link(PathBuf::from(target));
        let node = self
            .make_staged(caller, &parent, name, link)?
            .ok_or_else(|| {
                self.remember_refused_copy(caller, &parent);
                self.refuse(libc::EPERM, format!("{name}: links have no place here"))
            })?;
        self.was_made(caller, &parent, name);
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
                staging.loose_file_at(&node).is_some() || staging.made_by(caller, &node).is_some();
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
        if let (Some(file), Some(size)) = (&file, set.size) {
            resize(file, size)?;
        } else if let Some(file) = &file
            && file.waits.load(Ordering::Relaxed)
        {
            // `touch` tries again to make what an archive is for.
            self.settle(file)?;
        } else if set.size.is_some_and(|size| size > 0) {
            return Err(self.refuse(
                libc::EPERM,
                "sizes follow from the home; they can't be set here",
            ));
        }
        self.attr(caller, &node)
    }
}

/// Whether a link is one that our boxes, or snapshots, have: into the view of any mount.
fn is_ours(parent: &Node, name: &str, target: &Path) -> bool {
    if !matches!(parent, Node::Box(_) | Node::Snapshot(..)) {
        return false;
    }
    // A box may be made of a snapshot's directory, whose links lead from further below. And rsync's daemon
    // puts this in front of links, where it is not confined (munge symlinks).
    let target = target.to_str().map(|target| {
        let target = target.strip_prefix("/rsyncd-munged/").unwrap_or(target);
        target.trim_start_matches("../")
    });
    let below = target.and_then(|target| target.strip_prefix(&format!("{HIDDEN}/{VIEW}/")));
    Derived::named(name).is_some()
        && below.is_some_and(|below| below.rsplit('/').next() == Some(name))
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
