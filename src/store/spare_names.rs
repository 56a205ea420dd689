//! The [spare names](super::spares) that there are.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Store;
use super::listing::names_in;
use crate::Result;
use crate::disk::FileId;

/// Every spare name at one moment.
#[derive(Default)]
pub(super) struct Spares {
    names: Vec<Spare>,
    by_id: HashMap<FileId, usize>,
    by_base: HashMap<PathBuf, usize>,
}

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct Spare {
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

impl Store {
    pub(super) fn spares_dir(&self) -> PathBuf {
        self.home.staging_dir().join("layers")
    }

    /// The spare name of a base.
    pub(super) fn spare_of(&self, base: &Path) -> Option<PathBuf> {
        (base.parent() == Some(self.home.bases_dir().as_path()))
            .then(|| Some(self.spares_dir().join(base.file_name()?)))?
    }

    /// Every spare name. What is no regular file, or belongs to somebody else than the home, is none: a
    /// mount may be root's.
    pub(super) fn scan_spares(&self) -> Result<Spares> {
        let mut spares = Spares::default();
        let dir = self.spares_dir();
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
}

/// Kept with the layers they are names of.
pub(super) type SharedSpares = Arc<Spares>;
