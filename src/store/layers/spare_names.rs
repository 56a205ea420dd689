//! The [spare names](super::spares) that there are.

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

/// Every spare name at one moment.
#[derive(Default)]
pub struct Spares {
    names: Vec<Spare>,
    by_id: HashMap<FileId, usize>,
    by_base: HashMap<PathBuf, usize>,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Spare {
    /// `.boxlitefs/layers/ID.qcow2`.
    pub path: PathBuf,
    /// `bases/ID.qcow2`, whether that is there or not.
    pub base: PathBuf,
    /// The file.
    pub id: FileId,
    /// Bytes it takes on the disk.
    pub allocated: u64,
}

impl Spares {
    /// All spare names.
    pub fn all(&self) -> &[Spare] {
        &self.names
    }

    /// How many of a file's names are spare ones.
    pub fn count_of(&self, id: FileId) -> u64 {
        self.by_id.get(&id).map_or(0, |count| *count as u64)
    }

    /// The spare name of a base.
    pub fn of_base(&self, base: &Path) -> Option<&Spare> {
        self.by_base
            .get(base)
            .and_then(|index| self.names.get(*index))
    }

    fn add(&mut self, spare: Spare) {
        *self.by_id.entry(spare.id).or_default() += 1;
        self.by_base.insert(spare.base.clone(), self.names.len());
        self.names.push(spare);
    }
}

/// Kept with the layers they are names of.
pub type SharedSpares = Arc<Spares>;

/// The further names of layers of ours, below `.boxlitefs/layers/`.
pub struct SpareNames {
    home: Arc<Home>,
    workspace: Arc<Workspace>,
}

impl SpareNames {
    /// Returns those of a home.
    pub fn new(home: Arc<Home>, workspace: Arc<Workspace>) -> SpareNames {
        SpareNames { home, workspace }
    }

    pub fn dir(&self) -> PathBuf {
        self.home.staging_dir().join("layers")
    }

    /// The spare name of a base.
    pub fn of(&self, base: &Path) -> Option<PathBuf> {
        (base.parent() == Some(self.home.bases_dir().as_path()))
            .then(|| Some(self.dir().join(base.file_name()?)))?
    }

    /// Every spare name. What is no regular file, or belongs to somebody else than the home, is none: a
    /// mount may be root's.
    pub fn scan(&self) -> Result<Spares> {
        let mut spares = Spares::default();
        let dir = self.dir();
        if dir.is_symlink() {
            return Ok(spares);
        }
        for name in names_in(&dir)? {
            let path = dir.join(&name);
            let Ok(meta) = fs::symlink_metadata(&path) else {
                continue;
            };
            if name.ends_with(".qcow2") && meta.is_file() && meta.uid() == self.home.owner().uid {
                spares.add(Spare {
                    path,
                    base: self.home.bases_dir().join(name),
                    id: FileId::of(&meta),
                    allocated: meta.blocks() * 512,
                });
            }
        }
        Ok(spares)
    }

    /// Gives a base of ours its spare name, if it has not got it. What can't be done is done without.
    pub fn keep(&self, base: &Path) {
        if let Err(error) = self.renew(base) {
            log::info!("{} has no spare name: {error}", base.display());
        }
    }

    /// Has the spare name of a base be one of the file that the base is now.
    ///
    /// # Errors
    /// Those of the system calls.
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

    /// Has the spare name of a base whose file is another now follow it, on disk when this returns: what the
    /// old file read from is about to go.
    ///
    /// # Errors
    /// Those of the system calls.
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

    /// Takes the spare name from a base that is about to become a live disk; on disk when this returns.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn drop_durably(&self, base: &Path) -> Result<()> {
        self.of(base)
            .map_or(Ok(()), |spare| durable::unlink(&spare))
    }

    /// Removes the spare name of a base that is freed. It need not be flushed: if a power loss brings
    /// the name back, no header refers to it.
    pub fn free(&self, base: &Path) {
        if let Some(spare) = self.of(base)
            && let Err(error) = fs::remove_file(&spare)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", spare.display());
        }
    }
}
