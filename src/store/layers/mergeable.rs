//! Which layers can become one.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::disk::{FileId, Stamped};
use crate::store::Store;
use crate::store::layers::catalog_index::CatalogIndex;
use crate::store::layers::collect::named_in;
use crate::store::layers::graph::{ImageFile, LayerGraph, Role, Stamp};

/// Most backing files a live disk may have: with one more libkrun can't start the box.
pub const MOST_BACKING: usize = 8;

/// Most backing files that a chain which was too long is left with: so that the next few changes find
/// room.
pub const BACKING_LEFT: usize = 4;

/// LayerGraph that can become one. Comparable: it is the same as long as none of them changed, nor who
/// reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergePlan {
    /// Every name of the layer on top, which is replaced.
    pub names: Vec<PathBuf>,
    pub is_live: bool,
    /// The layers, top first: at least two.
    pub layers: Vec<MergeLayer>,
    /// The boxes that read through the top.
    pub boxes: BTreeSet<String>,
    /// Whether all below the top go: else others read them, and stay.
    pub frees: bool,
}

/// One of the layers of a [`MergePlan`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeLayer {
    pub path: PathBuf,
    pub id: FileId,
    pub stamp: Stamp,
    pub allocated: u64,
}

impl MergePlan {
    /// Bytes that its layers take on the disk.
    pub fn allocated(&self) -> u64 {
        self.layers.iter().map(|part| part.allocated).sum()
    }

    /// Its layers, each with the time it changed last.
    pub fn stamped(&self) -> Vec<Stamped> {
        let parts = self.layers.iter();
        let stamped = parts.map(|part| Stamped {
            path: part.path.clone(),
            dev: part.id.dev,
            time: part.stamp.1.max(part.stamp.2),
        });
        stamped.collect()
    }

    /// The path the layer on top is read by.
    pub fn top(&self) -> &Path {
        self.names.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// The file on top.
    pub fn top_id(&self) -> Option<FileId> {
        self.layers.first().map(|part| part.id)
    }

    /// How many layers become one.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether all layers below the top go.
    pub fn frees(&self) -> bool {
        self.frees
    }

    /// Whether the layer on top is in this chain.
    pub fn is_in(&self, chain: &[PathBuf]) -> bool {
        self.names.iter().any(|name| chain.contains(name))
    }

    /// The boxes that read through it, by their ids.
    pub fn boxes(&self) -> &BTreeSet<String> {
        &self.boxes
    }

    /// The same without layers at its end that are far larger than all above them: to write those again
    /// would cost far more than it gives. None if fewer than two are left.
    pub fn worthwhile(mut self) -> Option<MergePlan> {
        /// What lies over a layer has to be this part of it.
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

    pub fn starts_with(&self, other: &MergePlan) -> bool {
        self.layers.get(..other.layers.len()) == Some(&other.layers)
            && (&self.names, &self.boxes, self.frees) == (&other.names, &other.boxes, other.frees)
    }
}

/// The layers that one layer alone needs, each run of them with that.
pub fn merges(layers: &LayerGraph, rows: &CatalogIndex<'_>) -> Vec<MergePlan> {
    let removable: HashSet<&Path> = layers
        .files()
        .iter()
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

/// A live disk whose chain is too long, with so many of the layers below it that it is not.
pub fn shortening(layers: &LayerGraph, rows: &CatalogIndex<'_>, live: &Path) -> Option<MergePlan> {
    let top = layers.at(live)?;
    let chain = layers.chain(live);
    if chain.len() - 1 <= MOST_BACKING {
        return None;
    }
    let below = chain.get(1..chain.len() - BACKING_LEFT)?.to_vec();
    merge_of(layers, rows, top, below, false)
}

/// A base with a row and no other name, that no snapshot's row names and one file alone reads.
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

/// The merge of a layer with some below it. None if it has a name nobody knows (a backup made of hard
/// links would be left without what lies below it), or nobody reads it.
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
    // Snapshots' names first: until its own name is replaced, a base is read by the others.
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
    fn of(file: &ImageFile) -> MergeLayer {
        MergeLayer {
            path: file.path.clone(),
            id: file.id,
            stamp: file.stamp,
            allocated: file.allocated,
        }
    }
}

/// What could be merged as things are, the cheapest first, and after that the live disks that would
/// still be too long. Looks without the lock: a merge looks again.
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
