//! What the rows of the catalog say about the image files.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

use crate::home::{BaseRecord, BoxRecord};
use crate::store::layers::graph::{Directories, ImageFile, LayerGraph, Role};

/// The boxes, bases and snapshot layers that have rows.
pub struct CatalogIndex<'r> {
    /// The ids of all boxes.
    pub boxes: HashSet<&'r str>,
    /// The rows of bases, by resolved path.
    pub bases: HashMap<PathBuf, &'r BaseRecord>,
    /// Every path that a snapshot's row names.
    pub named: &'r BTreeSet<PathBuf>,
}

impl<'r> CatalogIndex<'r> {
    /// Returns the index of these boxes and bases. `named` holds every path that a snapshot's row
    /// names.
    pub fn new(
        boxes: impl IntoIterator<Item = &'r BoxRecord>,
        bases: &'r [BaseRecord],
        named: &'r BTreeSet<PathBuf>,
    ) -> CatalogIndex<'r> {
        let mut directories = Directories::default();
        let mut at = |row: &BaseRecord| directories.resolve(PathBuf::from(&row.base_path));
        CatalogIndex {
            boxes: boxes.into_iter().map(|record| record.id.as_str()).collect(),
            bases: bases.iter().map(|row| (at(row), row)).collect(),
            named,
        }
    }

    /// Returns whether the file is a base that can be freed: it has a row and one name, no header
    /// reads it, and no snapshot's row names it.
    pub fn is_unneeded(&self, file: &ImageFile, layers: &LayerGraph) -> bool {
        let row = self.bases.get(&file.path);
        row.is_some_and(|row| row.kind != "rootfs") && layers.is_unneeded(file, self.named)
    }

    /// Returns whether a row knows this name of a file. None knows a name that only an entry has: its
    /// layer stays as it is.
    pub fn has_row(&self, file: &ImageFile) -> bool {
        match &file.role {
            Role::Live { box_id } => self.boxes.contains(box_id.as_str()),
            Role::Snapshot { .. } => self.named.contains(&file.path),
            Role::Base { .. } => self.bases.contains_key(&file.path),
            Role::Kept { .. } => false,
        }
    }
}
