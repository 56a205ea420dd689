//! Directories that are open: their names, in portions.
//!
//! What we make ourselves is short, and listed as it was when the directory was opened. A directory
//! of a guest may have any number of names, and can't change: it is read where the listing goes on.

use std::sync::Arc;

use crate::process::Caller;
use crate::tree::nodes::attr::{Add, Attr, DirEntry, Kept, WantedOfList};
use crate::tree::nodes::kernel_view::KernelView;
use crate::tree::nodes::node::Node;
use crate::tree::reading::caller_view::CallerView;
use crate::tree::reading::lookup::Lookup;
use crate::tree::reading::open_files::Handle;
use crate::tree::staging::caller_history::CallerHistory;
use crate::{Error, Result};

/// Where a listing begins. Smaller offsets are for `.` and `..`, which are not listed here; those
/// of guests' directories are larger anyway.
const FIRST: u64 = 2;

/// A directory that was opened, and what the kernel may do with it.
pub struct OpenedList {
    /// The handle for later calls.
    pub handle: u64,
    /// Its names never change: the kernel may keep them.
    pub is_constant: bool,
}

/// Lists directories.
pub struct Listing {
    kernel: Arc<KernelView>,
    view: Arc<CallerView>,
    lookup: Arc<Lookup>,
    history: Arc<CallerHistory>,
}

impl Listing {
    /// Returns one that lists what callers see.
    pub fn new(
        kernel: Arc<KernelView>,
        view: Arc<CallerView>,
        lookup: Arc<Lookup>,
        history: Arc<CallerHistory>,
    ) -> Listing {
        Listing {
            kernel,
            view,
            lookup,
            history,
        }
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// ENOENT when it is gone.
    pub fn open(&self, caller: Caller, ino: u64) -> Result<OpenedList> {
        let node = self.kernel.node(ino)?;
        if let Node::Box(id) = &node {
            self.history.note_listing(caller, id);
        }
        let handle = match &node {
            Node::Guest(file) if !file.is_ours() => self.view.home.guests.open_directory(file)?,
            Node::Running(_, source) => self.view.home.guests.list_running(caller, source)?,
            _ => Handle::List(self.view.list(caller, &node)?),
        };
        Ok(OpenedList {
            // What is in a running box's disk is of another state at each look.
            is_constant: matches!(
                (&node, &handle),
                (Node::Guest(_), Handle::GuestDirectory { .. })
            ),
            handle: self.view.home.open.add(handle),
        })
    }

    /// Gives the names in an open directory from `offset` on to `add`, until that is full.
    ///
    /// # Errors
    /// EBADF; EIO and ESTALE for a guest's directory.
    pub fn read(
        &self,
        caller: Caller,
        (ino, handle): (u64, u64),
        offset: u64,
        wanted: WantedOfList,
        add: Add<'_, '_>,
    ) -> Result<()> {
        match &*self.view.home.open.get(handle)? {
            Handle::List(entries) => {
                let entries = (FIRST + 1..).zip(entries.iter());
                let skipped = usize::try_from(offset.saturating_sub(FIRST));
                for (next, entry) in entries.skip(skipped.unwrap_or(usize::MAX)) {
                    if self.add_listed(caller, ino, (entry, next), wanted, add) {
                        break;
                    }
                }
                Ok(())
            }
            Handle::GuestDirectory { file, inside } => {
                let from = if offset <= FIRST { 0 } else { offset };
                let guests = &self.view.home.guests;
                if !matches!(self.kernel.node(ino), Ok(Node::Running(..))) {
                    return guests.list((file, inside), from, wanted, add);
                }
                // The directory is of any state that the box has, and the names are of one.
                let mut add_of_state = |entry: &DirEntry, next: u64, attr: Option<&Attr>| {
                    let attr = attr.cloned().map(|attr| Attr {
                        kept: Kept::Not,
                        ..attr
                    });
                    add(entry, next, attr.as_ref())
                };
                guests.list((file, inside), from, wanted, &mut add_of_state)
            }
            _ => Err(Error::new(libc::ENOTDIR, "that is not a directory")),
        }
    }

    /// Adds a name of ours; true if there is no room for it.
    fn add_listed(
        &self,
        caller: Caller,
        ino: u64,
        (entry, next): (&DirEntry, u64),
        wanted: WantedOfList,
        add: Add<'_, '_>,
    ) -> bool {
        let found = match wanted {
            WantedOfList::Names => None,
            // A listing does not wait for a clock. The kernel looks such a name up on its own
            // later.
            WantedOfList::Attributes if self.may_wait(ino, entry) => None,
            // It is gone since it was listed, or can't be planned. Its own stat says why.
            WantedOfList::Attributes => self.lookup.find(caller, ino, &entry.name).ok(),
        };
        let is_full = add(entry, next, found.as_ref());
        if let Some(attr) = found.filter(|_| is_full) {
            self.kernel.forget(attr.ino, 1);
        }
        is_full
    }

    fn may_wait(&self, ino: u64, entry: &DirEntry) -> bool {
        let parent = self.kernel.node(ino);
        let guests = &self.view.home.guests;
        parent.is_ok_and(|parent| guests.lookup_may_wait(&parent, &entry.name))
    }
}
