//! What rows say of the image files.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

use crate::home::{BaseRecord, BoxRecord};
use crate::store::layers::graph::{Directories, ImageFile, LayerGraph, Role};

/// What rows say of the layers.
pub struct CatalogIndex<'r> {
    pub boxes: HashSet<&'r str>,
    pub bases: HashMap<PathBuf, &'r BaseRecord>,
    pub named: &'r BTreeSet<PathBuf>,
}

impl<'r> CatalogIndex<'r> {
    /// Of all boxes and bases, and every path that a snapshot's row names.
    pub fn new(
        boxes: &'r [BoxRecord],
        bases: &'r [BaseRecord],
        named: &'r BTreeSet<PathBuf>,
    ) -> CatalogIndex<'r> {
        let mut directories = Directories::default();
        let mut at = |row: &BaseRecord| directories.resolve(PathBuf::from(&row.base_path));
        CatalogIndex {
            boxes: boxes.iter().map(|record| record.id.as_str()).collect(),
            bases: bases.iter().map(|row| (at(row), row)).collect(),
            named,
        }
    }

    /// Whether a file is a base with a row and no other name, that no header and no snapshot's row names.
    pub fn is_unneeded(&self, file: &ImageFile, layers: &LayerGraph) -> bool {
        let row = self.bases.get(&file.path);
        matches!(file.role, Role::Base { .. })
            && file.names == 1
            && row.is_some_and(|row| row.kind != "rootfs")
            && layers.readers_of(&file.path).next().is_none()
            && !self.named.contains(&file.path)
    }

    /// Whether a name of a file is one that rows know.
    pub fn has_row(&self, file: &ImageFile) -> bool {
        match &file.role {
            Role::Live { box_id } => self.boxes.contains(box_id.as_str()),
            Role::Snapshot { .. } => self.named.contains(&file.path),
            Role::Base { .. } => self.bases.contains_key(&file.path),
        }
    }
}
