//! Disk usage of boxes and snapshots: bytes that would go with them, and bytes shared with others.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Result;
use crate::disk::FileId;
use crate::exports::Source;
use crate::home::{BoxRecord, Catalog, Queries, is_kept_id};
use crate::store::Store;
use crate::store::layers::graph::{LayerGraph, Role};

/// How long a result stays valid while the rows are unchanged. A program that asks for all boxes in
/// turn then causes one scan a second, not one for each box.
const VALID_FOR: Duration = Duration::from_secs(1);

/// Bytes on disk, by who reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of layers that nothing else reads.
    pub own: u64,
    /// Bytes of layers that others read as well.
    pub shared: u64,
}

/// A result may be this many times as old as it took to make, even if other boxes changed since: so
/// a program that copies a box with hundreds of snapshots spends little of its time on this.
const PATIENCE: u32 = 8;

/// The last result.
#[derive(Default)]
pub struct UsageCache(Option<KnownUsages>);

struct KnownUsages {
    made_at: Instant,
    took: Duration,
    catalog: Arc<Catalog>,
    usages: Arc<Usages>,
}

impl KnownUsages {
    /// Returns whether the usages of a box and of its states hold for this catalog.
    fn holds_for(&self, box_id: &str, catalog: &Arc<Catalog>) -> bool {
        let age = self.made_at.elapsed();
        let is_of_same = || {
            self.catalog.box_by_id(box_id) == catalog.box_by_id(box_id)
                && self.catalog.snapshots_of(box_id) == catalog.snapshots_of(box_id)
        };
        self.usages.boxes.contains_key(box_id)
            && if Arc::ptr_eq(&self.catalog, catalog) {
                age < VALID_FOR
            } else {
                age < self.took * PATIENCE && is_of_same()
            }
    }
}

/// The usage of every box and of every disk state of a home.
#[derive(Default)]
pub struct Usages {
    /// By the id of the box.
    pub boxes: HashMap<String, Usage>,
    /// By the state.
    pub states: HashMap<Source, Usage>,
}

/// Returns the disk usage of a box with all its snapshots. `own` are layers that no other box
/// reads.
///
/// # Errors
/// EIO; those of the database.
pub fn usage_of_box(store: &Store, box_id: &str) -> Result<Usage> {
    let usages = usages(store, box_id)?;
    Ok(usages.boxes.get(box_id).copied().unwrap_or_default())
}

/// Returns the disk usage of every box with all its snapshots, by its id.
///
/// # Errors
/// EIO; those of the database.
pub fn usage_of_boxes(store: &Store) -> Result<HashMap<String, Usage>> {
    let catalog = store.home().catalog()?;
    let layers = store.layers.scan()?;
    let states = states_of(store, &layers, &catalog, catalog.boxes());
    Ok(Usages::of(states).boxes)
}

/// Returns the disk usage of a live disk or of a snapshot. `own` are layers that no other disk
/// state reads.
///
/// # Errors
/// Those of [`usage_of_box`].
pub fn usage_of(store: &Store, source: &Source) -> Result<Usage> {
    let usages = usages(store, source.box_id())?;
    Ok(usages.states.get(source).copied().unwrap_or_default())
}

/// What is kept to be had back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeptUsage {
    /// The number of entries.
    pub entries: usize,
    /// Bytes on disk of layers that nothing else reads. None in a large home, where that takes long.
    pub bytes: Option<u64>,
}

/// Returns what is kept to be had back, and the space that it takes.
///
/// # Errors
/// Those of [`usage_of_box`].
pub fn usage_of_kept(store: &Store) -> Result<KeptUsage> {
    let entries = store.home().catalog()?.kept().len();
    if entries == 0 || store.layers.is_large() {
        let bytes = (entries == 0).then_some(0);
        return Ok(KeptUsage { entries, bytes });
    }
    let layers = store.layers.scan()?;
    let below = |is_top: &dyn Fn(&Role) -> bool| -> HashMap<FileId, u64> {
        let tops = layers.files().filter(|file| is_top(&file.role));
        let files = tops.flat_map(|top| layers.chain(&top.path));
        let files = files.filter_map(|path| layers.at(path));
        files.map(|file| (file.id, file.allocated)).collect()
    };
    let kept = below(&|role| matches!(role, Role::Kept { .. }));
    let read = below(&|role| matches!(role, Role::Live { .. } | Role::Snapshot { .. }));
    let own = kept.iter().filter(|(id, _)| !read.contains_key(id));
    Ok(KeptUsage {
        entries,
        bytes: Some(own.map(|(_, bytes)| bytes).sum()),
    })
}

/// Returns usages, that of this box and of its states among them.
fn usages(store: &Store, box_id: &str) -> Result<Arc<Usages>> {
    let catalog = store.home().catalog()?;
    if let Some(known) = &store.usage.lock().0
        && known.holds_for(box_id, &catalog)
    {
        return Ok(known.usages.clone());
    }
    let made_at = Instant::now();
    let states = if store.layers.is_large() {
        states_near(store, &catalog, box_id)?
    } else {
        let boxes = catalog.boxes().chain(catalog.kept_boxes());
        states_of(store, &store.layers.scan()?, &catalog, boxes)
    };
    let usages = Arc::new(Usages::of(states));
    store.usage.lock().0 = Some(KnownUsages {
        made_at,
        took: made_at.elapsed(),
        catalog,
        usages: usages.clone(),
    });
    Ok(usages)
}

/// A disk state with the image files of its chain that lie in the home: file → bytes on disk.
pub type State = (Source, HashMap<FileId, u64>);

/// Returns the states of a box and of those that BoxLite cloned from it. A box that only refers to
/// some of their bases has one state, of these bases.
fn states_near(store: &Store, catalog: &Catalog, box_id: &str) -> Result<Vec<State>> {
    let rows = store.home().queries()?;
    let layers = store.layers.near(&rows, box_id)?;
    let near: HashSet<&str> = layers.boxes().collect();
    let of_entry = is_kept_id(box_id).then(|| catalog.box_by_id(box_id));
    let records = near.iter().filter_map(|id| catalog.box_by_id(id));
    let records = records.chain(of_entry.flatten());
    let mut sharing: HashMap<PathBuf, Vec<String>> = HashMap::new();
    for of_box in &near {
        sharing.extend(rows.sharing_boxes(of_box)?);
    }
    let mut others: HashMap<String, HashMap<FileId, u64>> = HashMap::new();
    for file in layers.files() {
        if !matches!(file.role, Role::Base { .. }) {
            continue;
        }
        let referring = match sharing.remove(&file.path) {
            Some(referring) => referring,
            // No box near here refers to it, or the row spells its path in another way.
            None => boxes_referring_to(&rows, &file.path)?,
        };
        for other in referring {
            if !near.contains(other.as_str()) {
                let files = others.entry(other).or_default();
                files.insert(file.id, file.allocated);
            }
        }
    }
    let mut states = states_of(store, &layers, catalog, records);
    let others = others.into_iter();
    states.extend(others.map(|(box_id, files)| (Source::Live { box_id }, files)));
    Ok(states)
}

fn boxes_referring_to(rows: &Queries, base: &Path) -> Result<Vec<String>> {
    let mut boxes = Vec::new();
    for row in rows.bases_at(base)? {
        boxes.extend(rows.boxes_referring_to(&row.id)?);
    }
    Ok(boxes)
}

/// Returns the states of these boxes.
pub fn states_of<'r>(
    store: &Store,
    layers: &LayerGraph,
    catalog: &Catalog,
    boxes: impl Iterator<Item = &'r BoxRecord>,
) -> Vec<State> {
    let mut states = Vec::new();
    for record in boxes {
        let box_id = record.id.clone();
        let live = store.home().live_disk(&box_id);
        let snapshots = catalog.snapshots_of(&box_id).iter().map(|snapshot| {
            let source = Source::Snapshot {
                box_id: box_id.clone(),
                snapshot_id: snapshot.id.clone(),
            };
            (source, store.exports.disks.snapshot_layer(snapshot))
        });
        let live = (
            Source::Live {
                box_id: box_id.clone(),
            },
            live,
        );
        for (source, top) in std::iter::once(live).chain(snapshots) {
            let files = layers.chain(&top).into_iter();
            let files = files.filter_map(|path| layers.at(path));
            let files = files.map(|file| (file.id, file.allocated)).collect();
            states.push((source, files));
        }
    }
    states
}

impl Usages {
    /// Works out the usages from all states that may share files.
    pub fn of(states: Vec<(Source, HashMap<FileId, u64>)>) -> Usages {
        // File → how many states read it, and which boxes.
        let mut readers: HashMap<FileId, (usize, HashSet<&str>)> = HashMap::new();
        let mut files: HashMap<&str, HashMap<FileId, u64>> = HashMap::new();
        for (source, chain) in &states {
            let of_box = files.entry(source.box_id()).or_default();
            for (id, bytes) in chain {
                let (count, boxes) = readers.entry(*id).or_default();
                *count += 1;
                boxes.insert(source.box_id());
                of_box.insert(*id, *bytes);
            }
        }
        let sum = |files: &HashMap<FileId, u64>, is_own: &dyn Fn(&FileId) -> bool| {
            let mut usage = Usage::default();
            for (id, bytes) in files {
                if is_own(id) {
                    usage.own += bytes;
                } else {
                    usage.shared += bytes;
                }
            }
            usage
        };
        let by_one_box = |id: &FileId| readers.get(id).is_some_and(|(_, boxes)| boxes.len() == 1);
        let by_one_state = |id: &FileId| readers.get(id).is_some_and(|(count, _)| *count == 1);
        let boxes = files
            .iter()
            .map(|(id, files)| ((*id).to_owned(), sum(files, &by_one_box)))
            .collect();
        let states = states
            .iter()
            .map(|(source, files)| (source.clone(), sum(files, &by_one_state)))
            .collect();
        Usages { boxes, states }
    }
}
