//! rename: gives what is being made its final name.

use std::ffi::OsStr;
use std::sync::Arc;

use super::caller::Caller;
use super::change::{exists, not_there};
use super::names::decode;
use super::node::Node;
use super::staged_file::{Place, Role, StagedFile, role_of};
use super::staging::What;
use super::{Tree, text};
use crate::{Error, Result};

/// renameat2's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Over whatever has the name.
    Replace,
    /// RENAME_NOREPLACE.
    Keep,
    /// RENAME_EXCHANGE, RENAME_WHITEOUT and others.
    Unsupported,
}

impl Tree {
    /// rename(2): gives a file being made its final name, which commits it when its data is
    /// complete.
    ///
    /// # Errors
    /// EXDEV between boxes (mv then copies), EEXIST, EPERM, EINVAL.
    pub fn rename(
        &self,
        caller: Caller,
        from: (u64, &OsStr),
        to: (u64, &OsStr),
        mode: RenameMode,
    ) -> Result<()> {
        self.refuse_read_only()?;
        if mode == RenameMode::Unsupported {
            return Err(Error::new(
                libc::EINVAL,
                "that kind of rename is not possible here",
            ));
        }
        let (from_parent, to_parent) = (self.node(from.0)?, self.node(to.0)?);
        let (from_name, to_name) = (text(from.1)?, text(to.1)?);
        if from_parent == to_parent && from_name == to_name {
            return Ok(());
        }
        let moved = match (&from_parent, &to_parent) {
            (Node::Root, Node::Root) => self.rename_in_root(caller, from_name, to_name)?,
            _ => self.rename_staged(
                caller,
                (&from_parent, from_name),
                (&to_parent, to_name),
                mode,
            )?,
        };
        match moved {
            Moved::File(file) => self.settle(&file),
            Moved::Other => Ok(()),
            Moved::Nothing => {
                self.child(caller, &from_parent, from_name)?;
                Err(self.refuse(
                    libc::EPERM,
                    format!("{from_name}: boxes and snapshots that exist can't be renamed yet"),
                ))
            }
        }
    }

    fn rename_in_root(&self, caller: Caller, from: &str, to: &str) -> Result<Moved> {
        let is_file = self.staging.lock().root_file(caller, from).is_some();
        if is_file && role_of(&Node::Root, to) == Some(Role::NewBox) {
            self.refuse_taken_box(to)?;
        }
        let names = self.names()?;
        let mut staging = self.staging.lock();
        if is_file {
            if role_of(&Node::Root, to).is_none() || staging.files.contains_key(to) {
                return Err(Error::new(
                    libc::EPERM,
                    format!("{to} can't be an archive's name"),
                ));
            }
            let Some(root_file) = staging.files.remove(from) else {
                return Err(not_there());
            };
            let file = root_file.file.clone();
            staging.files.insert(to.to_owned(), root_file);
            drop(staging);
            file.state.lock().place.name = to.to_owned();
            return Ok(Moved::File(file));
        }
        let Some(id) = staging.names.get(from).cloned() else {
            return Ok(Moved::Nothing);
        };
        decode(to)?;
        if names.id_of(to).is_some() || staging.names.contains_key(to) {
            return Err(exists(to));
        }
        staging.names.remove(from);
        staging.names.insert(to.to_owned(), id);
        Ok(Moved::Other)
    }

    fn rename_staged(
        &self,
        caller: Caller,
        (from_parent, from): (&Node, &str),
        (to_parent, to): (&Node, &str),
        mode: RenameMode,
    ) -> Result<Moved> {
        let mut staging = self.staging.lock();
        if staging.box_of(from_parent) != staging.box_of(to_parent) {
            return Err(Error::new(libc::EXDEV, "that is another box; copy it"));
        }
        let Some(staged) = staging.face(caller, from_parent) else {
            return Ok(Moved::Nothing);
        };
        let taken = staged.child(to_parent, to).is_some();
        if taken && mode == RenameMode::Keep {
            return Err(exists(to));
        }
        if !staged.children.contains_key(&to_parent.ino()) {
            return Err(not_there());
        }
        let child = staged
            .children
            .get_mut(&from_parent.ino())
            .and_then(|names| names.remove(from))
            .ok_or_else(not_there)?;
        let file = match &child.what {
            What::File(file) => Some(file.clone()),
            _ => None,
        };
        if let Some(names) = staged.children.get_mut(&to_parent.ino()) {
            names.insert(to.to_owned(), child);
        }
        drop(staging);
        let Some(file) = file else {
            return Ok(Moved::Other);
        };
        file.state.lock().place = Place {
            parent: to_parent.clone(),
            name: to.to_owned(),
        };
        Ok(Moved::File(file))
    }
}

/// What a rename moved.
enum Moved {
    File(Arc<StagedFile>),
    Other,
    Nothing,
}
