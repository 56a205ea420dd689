//! The names and files a user sees, without FUSE.
//!
//! Plain Rust that returns [`Result`]; `fuse/` only translates. The rooms, from the top down,
//! each of which uses only those below:
//!
//! * `changes`: what makes, renames and removes names.
//! * `reading`: what exists, what each caller sees of it, and open files.
//! * `staging`: what is being copied in, and what callers did before.
//! * `nodes`: what a node is, and what the kernel was told of it.

mod changes;
mod handles;
mod nodes;
mod options;
mod reading;
mod refusals;
mod staging;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use changes::Changes;
use nodes::attr::Add;
use nodes::boxes::Boxes;
use nodes::guest_numbers::GuestNumbers;
use nodes::kernel_view::KernelView;
use nodes::shown_path::shown_path;
use nodes::status_file::StatusFile;
use nodes::xattr;
use parking_lot::Mutex;
use reading::caller_view::CallerView;
use reading::export_files::ExportFiles;
use reading::guest_file::GuestNodes;
use reading::guest_files::{GuestFiles, only_for_reading};
use reading::home_view::HomeView;
use reading::listing::Listing;
use reading::lookup::Lookup;
use reading::open_files::OpenFiles;
use refusals::{Refusals, is_refusal, path_in};
use staging::box_edit::BoxEdits;
use staging::caller_history::CallerHistory;
use staging::commit::Committer;
use staging::receiver::Receiver;
use staging::staging_area::StagingArea;

use crate::home::is_kept_id;
use crate::store::{BackgroundCompaction, Store};
use crate::{Error, Result};

pub use crate::exports::Compression;
pub use crate::home::Space;
pub use crate::process::Caller;
pub use crate::store::{Compacting, ImportLimits};
pub use changes::create::SetAttr;
pub use changes::rename::RenameMode;
pub use handles::OpenAnswer;
pub use nodes::attr::{Attr, DirEntry, Kept, Kind, WantedOfList};
pub use nodes::kernel_view::KernelCache;
pub use nodes::node::{Node, ROOT_INO};
pub use nodes::status_file::MountFacts;
pub use options::{Links, Options, Undo};
pub use reading::listing::OpenedList;
pub use reading::open_files::Opened;
pub use refusals::Attempt;

/// The extended attribute of the root that has the last refusals of the user who reads it.
pub const REFUSALS: &str = "user.boxlite.why";

/// The attribute that has the last refusals of all users, for root.
pub const REFUSALS_OF_ALL: &str = "user.boxlite.why.all";

/// A home as a tree of files. It gives what the kernel asks for to the parts that have it.
pub struct Tree {
    store: Arc<Store>,
    kernel: Arc<KernelView>,
    view: Arc<CallerView>,
    lookup: Arc<Lookup>,
    listing: Listing,
    staging: Arc<StagingArea>,
    receiver: Receiver,
    committer: Arc<Committer>,
    changes: Changes,
    refusals: Refusals,
    /// Merges layers in the background until the tree is closed.
    upkeep: Mutex<Option<BackgroundCompaction>>,
}

impl Tree {
    /// Opens a home for showing.
    ///
    /// # Errors
    /// Those of [`Store::open`]: no such home, a foreign directory, a damaged database.
    pub fn open(home: &Path, options: Options) -> Result<Tree> {
        let store = Store::open_for_mount(
            home,
            options.read_only,
            !options.is_exclusive,
            options.compression,
        )?;
        let store = store.with_import_limits(options.imports);
        let store = Arc::new(store.with_undo(options.undo.keep_for));
        let upkeep = if store.is_read_only() {
            None
        } else {
            BackgroundCompaction::begin(&store, options.compacting)
        };
        let kernel = Arc::new(KernelView::default());
        let boxes = Arc::new(Boxes::new(store.clone(), kernel.clone()));
        let staging = Arc::new(StagingArea::new(store.clone()));
        let history = Arc::new(CallerHistory::default());
        let home = home_view(&store, &kernel, &boxes, options.links);
        let view = CallerView::new(home, staging.clone(), history.clone());
        let view = Arc::new(view);
        let lookup = Lookup::new(kernel.clone(), view.clone(), staging.clone());
        let lookup = Arc::new(lookup);
        let edits = BoxEdits::new(
            store.clone(),
            boxes.clone(),
            staging.clone(),
            history.clone(),
        );
        let edits = Arc::new(edits);
        let committer = Committer::new(
            store.clone(),
            boxes.clone(),
            staging.clone(),
            history.clone(),
            edits.clone(),
        );
        let committer = Arc::new(committer);
        Ok(Tree {
            changes: Changes::new(&kernel, &view, (&staging, &history), &committer, &edits),
            listing: Listing::new(kernel.clone(), view.clone(), lookup.clone(), history),
            receiver: Receiver::new(store.clone(), staging.clone(), boxes, edits),
            store,
            kernel,
            view,
            lookup,
            staging,
            committer,
            refusals: Refusals::default(),
            upkeep: Mutex::new(upkeep),
        })
    }

    /// Returns whether nothing can be changed: it was asked for, or the home can't be written.
    pub fn is_read_only(&self) -> bool {
        self.store.is_read_only()
    }

    /// Sets what `.boxlite/status` says of the mount itself. Only the first call counts.
    pub fn set_mount_facts(&self, facts: MountFacts) {
        self.view.home.status.set_facts(facts);
    }

    /// Sets what the kernel keeps of the tree. Only the first call counts.
    pub fn set_kernel_cache(&self, cache: impl KernelCache + 'static) {
        self.kernel.set_cache(cache);
    }

    /// Makes a box of each archive that waits. The log has the name of each box, and each failure.
    pub fn make_boxes_of_waiting_archives(&self) {
        self.committer.waiting().keep_all();
    }

    /// Ends background work. Opens that still wait for an archive get an error.
    pub fn close(&self) {
        drop(self.upkeep.lock().take());
        self.store.exports().compressed.stop();
    }

    /// Does what a listing of the root does, with all locks that takes, and forgets what it found.
    ///
    /// # Errors
    /// Those of reading the home.
    pub fn check_alive(&self) -> Result<()> {
        let caller = Caller {
            tid: std::process::id(),
        };
        self.view.list(caller, &Node::Root)?;
        self.getattr(caller, ROOT_INO, None).map(|_| ())
    }

    /// Returns the space on the home's file system.
    ///
    /// # Errors
    /// What statvfs says.
    pub fn space(&self) -> Result<Space> {
        Space::of(self.store.home())
    }

    /// Records that the kernel forgets `times` of what it was told of a node.
    pub fn forget(&self, ino: u64, times: u64) {
        self.kernel.forget(ino, times);
    }

    /// Returns whether attributes of this inode may take longer than a look into memory: they need
    /// an export's size.
    pub fn is_slow(&self, ino: u64) -> bool {
        matches!(
            self.kernel.node(ino),
            Ok(Node::Export(_)
                | Node::Compressed(_)
                | Node::Box(_)
                | Node::Snapshot(..)
                | Node::ViewOf(_)
                | Node::Guest(_)
                | Node::Running(..)
                | Node::DiskImage(_))
        )
    }

    /// Returns whether the attributes of this inode alone may take longer than a look into memory.
    /// Those of a guest's file are in one block of a disk that is open; those of a link, which is
    /// followed to tell its length, are not.
    pub fn is_attr_slow(&self, ino: u64) -> bool {
        match self.kernel.node(ino) {
            Ok(Node::Guest(file)) => !self.view.home.guests.has_attr_at_hand(&file),
            _ => self.is_slow(ino),
        }
    }

    /// Returns whether finding a name may have to wait for the clock of a file system: that of what
    /// is in a disk that was written to just now.
    pub fn lookup_may_wait(&self, parent: u64, name: &OsStr) -> bool {
        let parent = self.kernel.node(parent);
        let guests = &self.view.home.guests;
        parent.is_ok_and(|parent| guests.lookup_may_wait(&parent, name))
    }

    /// Finds a name in a directory; the kernel is told of what is found.
    ///
    /// # Errors
    /// ENOENT, or EIO when an export can't be planned.
    pub fn lookup(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<Attr> {
        self.lookup.find(caller, parent, name)
    }

    /// Returns the attributes of an inode; those of the open file where there is one.
    ///
    /// # Errors
    /// ESTALE or ENOENT when it is gone.
    pub fn getattr(&self, caller: Caller, ino: u64, handle: Option<u64>) -> Result<Attr> {
        self.lookup.attr(caller, ino, handle)
    }

    /// Returns where a symbolic link points.
    ///
    /// # Errors
    /// EINVAL for what is no link.
    pub fn readlink(&self, caller: Caller, ino: u64) -> Result<PathBuf> {
        self.view.link_target(caller, &self.kernel.node(ino)?)
    }

    /// Returns the value of an extended attribute.
    ///
    /// # Errors
    /// ENODATA when there is none of that name.
    pub fn xattr(&self, caller: Caller, ino: u64, name: &OsStr) -> Result<Vec<u8>> {
        let node = self.kernel.node(ino)?;
        if let Node::Guest(file) = &node {
            return self.view.home.guests.xattr(file, name);
        }
        let wanted = xattr::own_name(name)?;
        if self.staging.boxes.is_view_for(caller, &node) {
            return Err(xattr::none());
        }
        xattr::value(&self.view.home.boxes, &node, wanted)
    }

    /// Returns the names of all extended attributes, each ended by a NUL.
    ///
    /// # Errors
    /// ESTALE when the file is gone.
    pub fn xattr_names(&self, caller: Caller, ino: u64) -> Result<Vec<u8>> {
        let node = self.kernel.node(ino)?;
        if let Node::Guest(file) = &node {
            return self.view.home.guests.xattr_names(caller, file);
        }
        if self.staging.boxes.is_view_for(caller, &node) {
            return Ok(Vec::new());
        }
        xattr::names(&self.view.home.boxes, &node)
    }

    /// Remembers the name of what is being made, for messages.
    fn note_made(&self, parent: u64, ino: u64, name: &OsStr) {
        let path = path_in(&self.shown_path(parent), name);
        self.refusals.note_made(ino, path);
    }

    /// Remembers why a request is refused, for the user who made it.
    pub fn note_refusal(&self, attempt: &Attempt, error: &Error) {
        if is_refusal(attempt.operation, error.errno()) {
            let path_of = |ino| self.shown_path(ino);
            self.refusals.note(attempt, error, path_of);
        }
    }

    /// Returns the last refusals of a user, an object of JSON on each line, if the name is that of the
    /// attribute. Root may ask for those of all users.
    pub fn refusals_for(&self, uid: u32, ino: u64, name: &OsStr) -> Option<Vec<u8>> {
        match name.to_str()? {
            _ if ino != ROOT_INO => None,
            REFUSALS => Some(self.refusals.text(Some(uid))),
            REFUSALS_OF_ALL if uid == 0 => Some(self.refusals.text(None)),
            _ => None,
        }
    }

    /// Returns the path of an inode in the mount, as far as it is known.
    fn shown_path(&self, ino: u64) -> String {
        let node = self.kernel.node(ino).ok();
        let shown = node.and_then(|node| shown_path(&self.view.home.boxes, &node));
        let shown = shown.map(|path| path.to_string_lossy().into_owned());
        shown
            .or_else(|| self.refusals.name_of_made(ino))
            // A state of a disk, with its guest's files, may be that of several boxes.
            .unwrap_or_else(|| "…".to_owned())
    }

    /// Opens a directory for listing.
    ///
    /// # Errors
    /// ENOENT when it is gone.
    pub fn open_list(&self, caller: Caller, ino: u64) -> Result<OpenedList> {
        self.listing.open(caller, ino)
    }

    /// Gives the names in an open directory from `offset` on to `add`, until that is full.
    ///
    /// # Errors
    /// EBADF; EIO and ESTALE for a guest's directory.
    pub fn read_list(
        &self,
        caller: Caller,
        place: (u64, u64),
        offset: u64,
        wanted: WantedOfList,
        add: Add<'_, '_>,
    ) -> Result<()> {
        self.listing.read(caller, place, offset, wanted, add)
    }

    /// Returns attributes for a listed name of which nothing but its kind is known; to be asked for
    /// again.
    pub fn listed_attr(&self, entry: &DirEntry) -> Attr {
        let owner = self.store.home().owner();
        let mut attr = Attr::of_file(owner, &Node::Root, 0, SystemTime::UNIX_EPOCH);
        attr.ino = entry.ino;
        attr.kind = entry.kind;
        attr
    }

    /// Returns the node of a file that is to be changed, or of a directory in which something is.
    ///
    /// # Errors
    /// EROFS when mounted read-only, and for files in a disk; ESTALE.
    fn node_to_change(&self, ino: u64) -> Result<Node> {
        self.store.refuse_read_only()?;
        match self.kernel.node(ino)? {
            Node::Guest(_) | Node::DiskImage(_) | Node::Running(..) => Err(only_for_reading()),
            node => Ok(node),
        }
    }

    /// Returns the node of a directory in which something is to be made.
    ///
    /// # Errors
    /// EPERM for what is kept; those of [`Tree::node_to_change`].
    fn node_to_fill(&self, ino: u64) -> Result<Node> {
        let node = self.node_to_change(ino)?;
        if node.box_id().is_some_and(is_kept_id) || node == Node::Undo {
            let message = "what is kept stays as it is; move it to where it was, or copy it";
            return Err(nodes::refusal::refuse(&self.store, libc::EPERM, message));
        }
        Ok(node)
    }

    /// Makes a directory: in the root a box begins to be made, under `snapshots` a snapshot is
    /// taken.
    ///
    /// # Errors
    /// EEXIST, EINVAL, EBUSY, EPERM where directories mean nothing, EROFS.
    pub fn mkdir(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<Attr> {
        let parent_ino = parent;
        let parent = self.node_to_fill(parent)?;
        let maker = &self.changes.maker;
        let node = maker.directory(&self.view.home, caller, &parent, name)?;
        let attr = self.lookup.tell_made(caller, &node)?;
        self.note_made(parent_ino, attr.ino, name);
        Ok(attr)
    }

    /// Makes a symbolic link in a box being made: one that our boxes have, which follows from the
    /// disk.
    ///
    /// # Errors
    /// EPERM for any other, and elsewhere; EROFS.
    pub fn symlink(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        target: &Path,
    ) -> Result<Attr> {
        let parent = self.node_to_fill(parent)?;
        let node = self.changes.maker.link(caller, &parent, name, target)?;
        self.lookup.tell_made(caller, &node)
    }

    /// Refuses mknod(2) of anything but a regular file.
    ///
    /// # Errors
    /// Always EPERM.
    pub fn mknod(&self, name: &OsStr) -> Result<Attr> {
        let name = name.display();
        let message = format!("{name}: pipes, sockets and devices are not allowed here");
        Err(nodes::refusal::refuse(&self.store, libc::EPERM, message))
    }

    /// Creates a file (creat(2)): an archive in the root, or a file of a box being made.
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
        let parent_ino = parent;
        let parent = self.node_to_fill(parent)?;
        let creator = &self.changes.creator;
        let file = creator.create(caller, parent, name, mode)?;
        let owner = self.store.home().owner();
        let mut attr = Attr::of_arriving_file(owner, &file.node, file.size(), file.created);
        attr.ino = self.kernel.tell(&file.node);
        self.note_made(parent_ino, attr.ino, name);
        Ok((attr, self.view.home.open.add_writing(file)))
    }

    /// Sets attributes. What copy tools set on what they make is accepted and dropped; the
    /// attributes of what exists follow from the home.
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
        if let Some(size) = set.size
            && let Ok(node) = self.kernel.node(ino)
            && let Node::DiskImage(state) = &node
        {
            if size == state.size() {
                return self.view.attr(caller, &node);
            }
            let message = "disk.img keeps its size; write into it without cutting it (dd \
                           conv=notrunc), or copy an archive over export.boxlite";
            return Err(nodes::refusal::refuse(&self.store, libc::EPERM, message));
        }
        let node = self.node_to_change(ino)?;
        let parts = (&*self.view.home.open, &*self.committer);
        let creator = &self.changes.creator;
        creator.set_attr(parts, caller, (&node, handle), set)?;
        self.view.attr(caller, &node)
    }

    /// Renames (rename(2)): gives a box or a snapshot another name, or a file being made its final
    /// one, which commits it when its data is complete.
    ///
    /// # Errors
    /// EXDEV where a copy means something (mv then makes one), EEXIST and ENOTEMPTY for a name that
    /// is taken, EBUSY, EPERM, EINVAL.
    pub fn rename(
        &self,
        caller: Caller,
        from: (u64, &OsStr),
        to: (u64, &OsStr),
        mode: RenameMode,
    ) -> Result<()> {
        if mode == RenameMode::Unsupported {
            return Err(Error::new(
                libc::EINVAL,
                "names can't be exchanged here; rename one after the other",
            ));
        }
        let from = (self.node_to_change(from.0)?, from.1);
        let to = (self.node_to_change(to.0)?, to.1);
        self.changes.renamer.rename(caller, from, to, mode)
    }

    /// Removes a directory (rmdir(2)). Under `snapshots` that deletes a snapshot; a box goes only
    /// for a caller that has removed all that is in it before.
    ///
    /// # Errors
    /// ENOTEMPTY for a box, EBUSY, ENOENT, EPERM, EROFS.
    pub fn rmdir(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<()> {
        let parent = self.node_to_change(parent)?;
        self.changes.remover.directory(caller, &parent, name)
    }

    /// Removes a file (unlink(2)): takes back what is being made. A file of a box that exists is
    /// hidden from the caller alone: a step of removing the box, and nothing if the rest never
    /// comes.
    ///
    /// # Errors
    /// EBUSY when the box can't be removed now, EPERM for what stays, ENOENT, EROFS.
    pub fn unlink(&self, caller: Caller, parent: u64, name: &OsStr) -> Result<()> {
        let parent = self.node_to_change(parent)?;
        let remover = &self.changes.remover;
        remover.file(&self.receiver, caller, parent, name)
    }
}

/// Returns the view of what exists in a home.
fn home_view(
    store: &Arc<Store>,
    kernel: &Arc<KernelView>,
    boxes: &Arc<Boxes>,
    links: Links,
) -> HomeView {
    let open = Arc::new(OpenFiles::default());
    let guests = GuestNodes {
        numbers: GuestNumbers::default(),
        links,
        owner: store.home().owner(),
        kernel: kernel.clone(),
    };
    HomeView {
        store: store.clone(),
        boxes: boxes.clone(),
        exports: Arc::new(ExportFiles::new(
            store.clone(),
            kernel.clone(),
            open.clone(),
        )),
        guests: Arc::new(GuestFiles::new(store.clone(), guests)),
        status: Arc::new(StatusFile::new(store.clone())),
        open,
    }
}
