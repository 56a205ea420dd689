//! Finds the layers that can become one.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::disk::{FileId, Stamped};
use crate::store::Store;
use crate::store::layers::catalog_index::CatalogIndex;
use crate::store::layers::collect::named_in;
use crate::store::layers::graph::{ImageFile, LayerGraph, Role, Stamp};

/// Most backing files of a live disk: libkrun can't start a box with more.
pub const MOST_BACKING: usize = 8;

/// Most backing files of a chain after it was shortened: the next few changes find room.
pub const BACKING_LEFT: usize = 4;

/// Layers that can become one. Two plans are equal as long as none of the layers and none of their
/// readers changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergePlan {
    /// Every name of the top layer, which is replaced.
    pub names: Vec<PathBuf>,
    /// Whether the top layer is a live disk.
    pub is_live: bool,
    /// The layers, top first; at least two.
    pub layers: Vec<MergeLayer>,
    /// The ids of the boxes that read the top layer.
    pub boxes: BTreeSet<String>,
    /// Whether all layers below the top are freed. Otherwise others read them, and they stay.
    pub frees: bool,
}

/// A layer of a [`MergePlan`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeLayer {
    /// The path of the layer.
    pub path: PathBuf,
    /// The inode.
    pub id: FileId,
    /// Changes whenever the file does.
    pub stamp: Stamp,
    /// Bytes allocated on the disk.
    pub allocated: u64,
}

impl MergePlan {
    /// Returns the bytes that the layers have allocated on the disk.
    pub fn allocated(&self) -> u64 {
        self.layers.iter().map(|part| part.allocated).sum()
    }

    /// Returns the layers, each with the time of its last change.
    pub fn stamped(&self) -> Vec<Stamped> {
        let parts = self.layers.iter();
        let stamped = parts.map(|part| Stamped {
            path: part.path.clone(),
            dev: part.id.dev,
            time: part.stamp.1.max(part.stamp.2),
        });
        stamped.collect()
    }

    /// Returns the path of the top layer.
    pub fn top(&self) -> &Path {
        self.names.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Returns the inode of the top layer.
    pub fn top_id(&self) -> Option<FileId> {
        self.layers.first().map(|part| part.id)
    }

    /// Returns how many layers become one.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Returns whether all layers below the top are freed.
    pub fn frees(&self) -> bool {
        self.frees
    }

    /// Returns whether the top layer is in this chain.
    pub fn is_in(&self, chain: &[PathBuf]) -> bool {
        self.names.iter().any(|name| chain.contains(name))
    }

    /// Returns the ids of the boxes that read the top layer.
    pub fn boxes(&self) -> &BTreeSet<String> {
        &self.boxes
    }

    /// Returns the plan without the lowest layers that are far larger than all layers above them:
    /// writing those again costs far more than it reclaims. Returns None if fewer than two layers
    /// remain.
    pub fn worthwhile(mut self) -> Option<MergePlan> {
        /// A layer may be at most this many times the size of all layers above it.
        const MAX_RATIO: u64 = 8;
        while self.layers.len() > 1 {
            let last = self.layers.last().map_or(0, |part| part.allocated);
            let above = self.allocated() - last;
            if above.saturating_mul(MAX_RATIO) >= last {
                return Some(self);
            }
            self.layers.pop();
        }
        None
    }

    /// Returns whether `other` is this plan, or this plan without its lowest layers.
    pub fn starts_with(&self, other: &MergePlan) -> bool {
        self.layers.get(..other.layers.len()) == Some(&other.layers)
            && (&self.names, &self.boxes, self.frees) == (&other.names, &other.boxes, other.frees)
    }
}

/// Returns a plan for each run of layers that only the layer above them needs, together with that
/// layer.
pub fn merges(layers: &LayerGraph, rows: &CatalogIndex<'_>) -> Vec<MergePlan> {
    let removable: HashSet<&Path> = layers
        .files()
        .filter(|file| is_removable(file, layers, rows))
        .map(|file| file.path.as_path())
        .collect();
    let mut tops = BTreeSet::new();
    for path in &removable {
        for reader in layers.readers_of(path) {
            let mut names = layers.names_of(reader.id);
            if names.all(|name| !removable.contains(name.path.as_path())) {
                tops.insert(reader.id);
            }
        }
    }
    let merge = |id: FileId| {
        let top = layers.names_of(id).next()?;
        let below = layers.chain(&top.path).into_iter().skip(1);
        let run = below.take_while(|path| removable.contains(path));
        merge_of(layers, rows, top, run.collect(), true)
    };
    tops.into_iter().filter_map(merge).collect()
}

/// Returns the plan that merges a live disk with as many of the layers below it as make its chain
/// short enough. Returns None if the chain is short enough.
pub fn shortening(layers: &LayerGraph, rows: &CatalogIndex<'_>, live: &Path) -> Option<MergePlan> {
    let top = layers.at(live)?;
    let chain = layers.chain(live);
    if chain.len() - 1 <= MOST_BACKING {
        return None;
    }
    let below = chain.get(1..chain.len() - BACKING_LEFT)?.to_vec();
    merge_of(layers, rows, top, below, false)
}

/// Returns whether a file is a base with a row and no other name, which one file alone reads and no
/// snapshot's row names.
fn is_removable(file: &ImageFile, layers: &LayerGraph, rows: &CatalogIndex<'_>) -> bool {
    let mut readers = layers.readers_of(&file.path).map(|reader| reader.id);
    let Some(reader) = readers.next() else {
        return false;
    };
    matches!(file.role, Role::Base { .. })
        && file.names == 1
        && file.damaged.is_none()
        && readers.all(|other| other == reader)
        && !rows.named.contains(&file.path)
        && rows
            .bases
            .get(&file.path)
            .is_some_and(|row| row.kind != "rootfs")
}

/// Returns the plan that merges a layer with those below it. Returns None if no box reads the
/// layer, or if it has a name that no row knows: a backup made of hard links would lose the layers
/// below it.
fn merge_of(
    layers: &LayerGraph,
    rows: &CatalogIndex<'_>,
    top: &ImageFile,
    below: Vec<&Path>,
    frees: bool,
) -> Option<MergePlan> {
    let names: Vec<&ImageFile> = layers.names_of(top.id).collect();
    let is_live = |name: &&ImageFile| matches!(name.role, Role::Live { .. });
    let live_names = names.iter().filter(|name| is_live(name)).count();
    let is_mergeable = names.len() as u64 == top.names
        && (live_names == 0 || names.len() == 1)
        && names
            .iter()
            .all(|name| name.damaged.is_none() && rows.has_row(name));
    let boxes: BTreeSet<String> = names
        .iter()
        .flat_map(|name| layers.boxes_above(&name.path))
        .collect();
    let all_recorded = boxes.iter().all(|id| rows.boxes.contains(id.as_str()));
    if !is_mergeable || boxes.is_empty() || !all_recorded || below.is_empty() {
        return None;
    }
    let mut parts = vec![MergeLayer::of(top)];
    for path in below {
        parts.push(MergeLayer::of(layers.at(path)?));
    }
    // Names of snapshots come first: until a base's own name is replaced, others read by it.
    let mut names: Vec<PathBuf> = names.iter().map(|name| name.path.clone()).collect();
    names.sort_by_key(|path| layers.readers_of(path).next().is_some());
    Some(MergePlan {
        names,
        is_live: live_names > 0,
        layers: parts,
        boxes,
        frees,
    })
}

impl MergeLayer {
    /// Returns the layer that a file is.
    pub fn of(file: &ImageFile) -> MergeLayer {
        MergeLayer {
            path: file.path.clone(),
            id: file.id,
            stamp: file.stamp,
            allocated: file.allocated,
        }
    }
}

/// Returns what can be merged now, the cheapest plan first, then the live disks whose chains would
/// still be too long. Takes no lock: a merge checks the plan again.
///
/// # Errors
/// Those of reading the home and of SQLite.
pub fn mergeable(store: &Store) -> Result<Vec<MergePlan>> {
    let layers = store.layers.scan()?;
    let catalog = store.home().catalog()?;
    let bases = store.home().bases()?;
    let named = named_in(store, &catalog);
    let rows = CatalogIndex::new(catalog.boxes(), &bases, &named);
    let mut plans = merges(&layers, &rows);
    plans.sort_by_key(MergePlan::allocated);
    let planned: HashSet<FileId> = plans.iter().filter_map(MergePlan::top_id).collect();
    for record in catalog.boxes() {
        let live = store.home().live_disk(&record.id);
        let shortened = shortening(&layers, &rows, &live);
        plans.extend(
            shortened.filter(|merge| merge.top_id().is_some_and(|id| !planned.contains(&id))),
        );
    }
    Ok(plans)
}
