//! Directories that are open: their names, in portions.
//!
//! What we make ourselves is short, and listed as it was when the directory was opened. A directory of a
//! guest may have any number of names, and can't change: it is read where the listing goes on.

use std::sync::Arc;
use std::time::SystemTime;

use crate::tree::Tree;
use crate::tree::nodes::attr::{Add, Attr, DirEntry, Wanted};
use crate::tree::nodes::node::Node;
use crate::tree::reading::open_file::Handle;
use crate::tree::staging::caller::Caller;
use crate::{Error, Result};

/// Where a listing begins. Smaller offsets are for `.` and `..`, which are not listed here; those of
/// guests' directories are larger anyway.
pub const FIRST: u64 = 2;

impl Tree {
    /// Opens a directory for listing.
    ///
    /// # Errors
    /// ENOENT when it is gone.
    pub fn open_list(&self, caller: Caller, ino: u64) -> Result<u64> {
        let node = self.node(ino)?;
        if let Node::Box(id) = &node {
            self.dealings.lock().look(caller, id);
        }
        let handle = match &node {
            Node::Guest(file) if !file.is_ours() => self.open_guest_directory(file)?,
            _ => Handle::List(Arc::new(self.list(caller, &node)?)),
        };
        Ok(self.add_handle(handle))
    }

    /// Gives the names in an open directory from `offset` on to `add`, until that is full.
    ///
    /// # Errors
    /// EBADF; EIO and ESTALE for a guest's directory.
    pub fn read_list(
        &self,
        caller: Caller,
        (ino, handle): (u64, u64),
        offset: u64,
        wanted: Wanted,
        add: Add<'_, '_>,
    ) -> Result<()> {
        match &*self.handle(handle)? {
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
                self.list_guest((file, inside), from, wanted, add)
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
        wanted: Wanted,
        add: Add<'_, '_>,
    ) -> bool {
        let found = match wanted {
            Wanted::Names => None,
            // A listing does not wait, neither for what is looked up by itself then.
            Wanted::Attributes if self.lookup_may_wait(ino, &entry.name) => None,
            // Gone since it was listed, or can't be planned: its own stat says why.
            Wanted::Attributes => self.lookup(caller, ino, &entry.name).ok(),
        };
        let is_full = add(entry, next, found.as_ref());
        if let Some(attr) = found.filter(|_| is_full) {
            self.forget(attr.ino, 1);
        }
        is_full
    }

    /// Attributes for a listed name of which nothing but its kind is known; to be asked for again.
    pub fn listed_attr(&self, entry: &DirEntry) -> Attr {
        let mut attr = self.file(&Node::Root, 0, SystemTime::UNIX_EPOCH);
        attr.ino = entry.ino;
        attr.kind = entry.kind;
        attr
    }
}
