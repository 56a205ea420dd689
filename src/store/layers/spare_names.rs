//! Spare names of bases; [`put_back`](super::put_back) says what they are for.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::FileId;
use crate::files::durable;
use crate::files::listing::names_in;
use crate::files::workspace::Workspace;
use crate::home::Home;
use crate::{Context, Result};

/// All spare names at one moment.
#[derive(Default)]
pub struct Spares {
    names: Vec<Spare>,
    by_id: HashMap<FileId, usize>,
    by_base: HashMap<PathBuf, usize>,
}

/// A spare name.
#[derive(Clone, Debug)]
pub struct Spare {
    /// `.boxlitefs/layers/ID.qcow2`.
    pub path: PathBuf,
    /// `bases/ID.qcow2`, whether it exists or not.
    pub base: PathBuf,
    /// The inode.
    pub id: FileId,
    /// Bytes allocated on the disk.
    pub allocated: u64,
}

impl Spares {
    /// Returns all spare names.
    pub fn all(&self) -> &[Spare] {
        &self.names
    }

    /// Returns how many of a file's names are spare names.
    pub fn count_of(&self, id: FileId) -> u64 {
        self.by_id.get(&id).map_or(0, |count| *count as u64)
    }

    /// Returns the spare name of a base, if it has one.
    pub fn of_base(&self, base: &Path) -> Option<&Spare> {
        self.by_base
            .get(base)
            .and_then(|index| self.names.get(*index))
    }

    /// Adds a spare name.
    pub fn add(&mut self, spare: Spare) {
        *self.by_id.entry(spare.id).or_default() += 1;
        self.by_base.insert(spare.base.clone(), self.names.len());
        self.names.push(spare);
    }
}

/// Spare names, shared by the layer graphs that one scan led to.
pub type SharedSpares = Arc<Spares>;

/// Makes, renews and removes the spare names below `.boxlitefs/layers/`.
pub struct SpareNames {
    home: Arc<Home>,
    workspace: Arc<Workspace>,
}

impl SpareNames {
    /// Returns the spare names of a home.
    pub fn new(home: Arc<Home>, workspace: Arc<Workspace>) -> SpareNames {
        SpareNames { home, workspace }
    }

    /// Returns the directory of the spare names.
    pub fn dir(&self) -> PathBuf {
        self.home.staging_dir().join("layers")
    }

    /// Returns the path of the spare name of a base; None for a file outside of `bases/`.
    pub fn of(&self, base: &Path) -> Option<PathBuf> {
        (base.parent() == Some(self.home.bases_dir().as_path()))
            .then(|| Some(self.dir().join(base.file_name()?)))?
    }

    /// Lists every spare name. Skips what is not a regular file, and files of another owner than
    /// the home's: the mount may run as root.
    ///
    /// # Errors
    /// Those of reading the directory.
    pub fn scan(&self) -> Result<Spares> {
        let mut spares = Spares::default();
        let dir = self.dir();
        if dir.is_symlink() {
            return Ok(spares);
        }
        for name in names_in(&dir)? {
            if name.ends_with(".qcow2")
                && let Some(spare) = self.spare_of(&self.home.bases_dir().join(name))
            {
                spares.add(spare);
            }
        }
        Ok(spares)
    }

    /// Returns the spare name of a base, as [`SpareNames::scan`] would.
    pub fn spare_of(&self, base: &Path) -> Option<Spare> {
        let path = self.of(base)?;
        let meta = fs::symlink_metadata(&path).ok()?;
        let is_ours = meta.is_file() && meta.uid() == self.home.owner().uid;
        is_ours.then(|| Spare {
            path,
            base: base.to_owned(),
            id: FileId::of(&meta),
            allocated: meta.blocks() * 512,
        })
    }

    /// Gives a base of ours its spare name, if it has none. A failure is only logged.
    pub fn keep(&self, base: &Path) {
        if let Err(error) = self.renew(base) {
            log::info!("cannot give {} a spare name: {error}", base.display());
        }
    }

    /// Makes the spare name of a base a name of the base's present file.
    ///
    /// # Errors
    /// Those of system calls.
    pub fn renew(&self, base: &Path) -> Result<()> {
        let Some(spare) = self.of(base) else {
            return Ok(());
        };
        let id = FileId::at(base)?;
        let is_there = match FileId::at(&spare) {
            Ok(current) if current == id => return Ok(()),
            Ok(_) => true,
            Err(_) => false,
        };
        self.make_dir()?;
        durable::count_change();
        let message = || format!("cannot link {} to {}", base.display(), spare.display());
        if !is_there {
            return fs::hard_link(base, &spare).context(message);
        }
        let link = self.workspace.scratch("spare")?;
        fs::hard_link(base, &*link).context(message)?;
        fs::rename(&*link, &spare).context(message)
    }

    fn make_dir(&self) -> Result<()> {
        let dir = self.dir();
        if fs::symlink_metadata(&dir).is_ok() {
            return Ok(());
        }
        self.home.make_staging_dir()?;
        self.home.make_dir(&dir)
    }

    /// Makes the spare name of a base whose file was replaced follow it, or removes it. The result
    /// is durable when this returns: the layers that the old file read are about to be freed.
    ///
    /// # Errors
    /// Those of system calls.
    pub fn follow(&self, base: &Path) -> Result<()> {
        let Some(spare) = self.of(base) else {
            return Ok(());
        };
        if self.renew(base).is_err() {
            durable::unlink(&spare)?;
        }
        match self.dir() {
            dir if dir.is_dir() => durable::sync_dir(&dir),
            _ => Ok(()),
        }
    }

    /// Removes the spare name of a base that is about to become a live disk, durably.
    ///
    /// # Errors
    /// Those of system calls.
    pub fn drop_durably(&self, base: &Path) -> Result<()> {
        self.of(base)
            .map_or(Ok(()), |spare| durable::unlink(&spare))
    }

    /// Removes the spare name of a base that is freed. No flush is needed: if a power loss brings
    /// the name back, no header refers to it.
    pub fn free(&self, base: &Path) {
        durable::count_change();
        if let Some(spare) = self.of(base)
            && let Err(error) = fs::remove_file(&spare)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", spare.display());
        }
    }
}
