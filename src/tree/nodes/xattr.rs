//! Extended attributes: `user.boxlite.id`, `.status`, `.image` and `.created_at` of boxes, `.id` and
//! `.created_at` of snapshots.

use std::ffi::OsStr;

use crate::home::rfc3339;
use crate::tree::Tree;
use crate::tree::nodes::node::Node;
use crate::tree::staging::caller::Caller;
use crate::{Error, Result};

const PREFIX: &str = "user.boxlite.";

impl Tree {
    /// The value of an extended attribute.
    ///
    /// # Errors
    /// ENODATA when there is none of that name.
    pub fn xattr(&self, caller: Caller, ino: u64, name: &OsStr) -> Result<Vec<u8>> {
        if let Node::Guest(file) = self.node(ino)? {
            return self.guest_xattr(&file, name);
        }
        let wanted = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let none = || Error::new(libc::ENODATA, "there is no such attribute");
        let wanted = wanted.ok_or_else(none)?;
        self.xattrs(caller, ino)?
            .into_iter()
            .find(|(name, _)| *name == wanted)
            .map(|(_, value)| value.into_bytes())
            .ok_or_else(none)
    }

    /// The names of all extended attributes, each ended by a NUL.
    ///
    /// # Errors
    /// ESTALE when the file is gone.
    pub fn xattr_names(&self, caller: Caller, ino: u64) -> Result<Vec<u8>> {
        if let Node::Guest(file) = self.node(ino)? {
            return self.guest_xattr_names(caller, &file);
        }
        let names = self.xattrs(caller, ino)?;
        Ok(names
            .iter()
            .flat_map(|(name, _)| format!("{PREFIX}{name}\0").into_bytes())
            .collect())
    }

    fn xattrs(&self, caller: Caller, ino: u64) -> Result<Vec<(&'static str, String)>> {
        let node = self.node(ino)?;
        if self.staging.lock().face(caller, &node).is_some() {
            return Ok(Vec::new());
        }
        Ok(match &node {
            Node::Box(id) => {
                let record = self.record(id)?;
                let image = record.image();
                vec![
                    ("id", record.id),
                    ("status", record.status),
                    ("image", image),
                    ("created_at", rfc3339(record.created_at)),
                ]
            }
            Node::Snapshot(id, snapshot) => {
                let row = self.snapshot(id, snapshot)?;
                vec![("id", row.id), ("created_at", rfc3339(row.shown_at))]
            }
            _ => Vec::new(),
        })
    }
}
