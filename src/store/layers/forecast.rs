//! Works out how much space the removal of files would free, without removing them.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::disk::FileId;
use crate::home::{BaseRecord, Catalog, Queries};
use crate::store::Store;
use crate::store::layers::catalog_index::CatalogIndex;
use crate::store::layers::collect::{named_by, named_by_rows};
use crate::store::layers::graph::{ImageFile, LayerGraph, Role};
use crate::store::layers::merge_gain::gain_of;
use crate::store::layers::mergeable::{MergeLayer, MergePlan, merges};

/// What is removed together.
#[derive(Clone, Debug, Default)]
pub struct Going {
    /// The names of image files that go.
    pub names: HashSet<PathBuf>,
    /// The ids of the snapshots that lose their rows.
    pub snapshots: HashSet<String>,
    /// The box that is removed, or loses a snapshot.
    pub box_id: Option<String>,
    /// The rows of the box go as well.
    pub is_box: bool,
}

/// What a removal gives back, in bytes. It counts once the removal is complete and nothing keeps it to
/// be had back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// By the removal itself.
    pub now: u64,
    /// Once the home has been compacted as well, beyond what compacting gives back anyway. None
    /// where that can't be told.
    pub compacted: Option<u64>,
}

/// A merge that is possible now.
struct Planned {
    layers: Vec<FileId>,
    gain: Option<u64>,
}

/// Answers what removals from a home would give back, by one scan of it.
pub struct Forecast<'s> {
    store: &'s Store,
    layers: &'s LayerGraph,
    bases: HashMap<PathBuf, BaseRecord>,
    boxes: HashSet<String>,
    /// The boxes that refer to a base, by its id.
    referring: HashMap<String, Vec<String>>,
    /// The ids of the snapshots whose rows name a path.
    named: HashMap<PathBuf, Vec<String>>,
    /// False while it is uncertain what else is needed: then no base is freed.
    is_certain: bool,
    /// By the top layer.
    planned: HashMap<FileId, Planned>,
    /// Bytes of layers that the next compaction frees, since nothing needs them.
    unneeded: u64,
    gains: RefCell<HashMap<Vec<FileId>, Option<u64>>>,
}

impl<'s> Forecast<'s> {
    /// Returns the forecast for a home with these rows and files.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn new(
        store: &'s Store,
        layers: &'s LayerGraph,
        catalog: &Catalog,
        rows: &Queries,
    ) -> Result<Forecast<'s>> {
        let certain = named_by_rows(store, rows, layers)?;
        let mut named: HashMap<PathBuf, Vec<String>> = HashMap::new();
        for record in catalog.boxes() {
            for snapshot in catalog.snapshots_of(&record.id) {
                for path in named_by(store, snapshot) {
                    named.entry(path).or_default().push(snapshot.id.clone());
                }
            }
        }
        let mut referring: HashMap<String, Vec<String>> = HashMap::new();
        for (box_id, bases) in rows.refs()? {
            for base in bases {
                referring.entry(base).or_default().push(box_id.clone());
            }
        }
        let base_rows = rows.bases()?;
        let paths: BTreeSet<PathBuf> = named.keys().cloned().collect();
        let index = CatalogIndex::new(catalog.boxes(), &base_rows, &paths);
        let plans = merges(layers, &index);
        let owned = index.bases.iter();
        let bases = owned.map(|(path, row)| (path.clone(), (*row).clone()));
        let mut forecast = Forecast {
            store,
            layers,
            bases: bases.collect(),
            boxes: index.boxes.iter().map(|id| (*id).to_owned()).collect(),
            referring,
            named,
            is_certain: certain.is_some(),
            planned: HashMap::new(),
            unneeded: 0,
            gains: RefCell::default(),
        };
        for plan in plans {
            let Some(top) = plan.top_id() else { continue };
            let planned = Planned {
                layers: ids_of(&plan),
                gain: forecast.gain(&plan),
            };
            forecast.planned.insert(top, planned);
        }
        forecast.unneeded = forecast.unneeded_bytes();
        Ok(forecast)
    }

    /// Returns what compacting the home gives back now; None where that can't be told.
    pub fn of_compacting(&self) -> Option<u64> {
        let gains = self.planned.values().map(|planned| planned.gain);
        let gains: Option<u64> = gains.sum();
        gains
            .filter(|_| self.is_certain)
            .map(|it| it + self.unneeded)
    }

    /// Returns what a removal gives back.
    pub fn of(&self, going: &Going) -> Freed {
        let (gone, edge) = self.gone_with(going);
        let now = gone.values().sum();
        Freed {
            now,
            compacted: self.gain_after(going, &gone, &edge).map(|gain| {
                let all = i128::from(now) + gain;
                u64::try_from(all).unwrap_or(0)
            }),
        }
    }

    /// Returns the bytes of the bases that nothing needs, and of those below that nothing else does.
    fn unneeded_bytes(&self) -> u64 {
        if !self.is_certain {
            return 0;
        }
        let bases = self.layers.files().filter(|file| {
            matches!(file.role, Role::Base { .. })
                && self.layers.readers_of(&file.path).next().is_none()
        });
        // No name is removed for itself: a base that has no row, or another name, stays.
        let (gone, _) = self.gone_from(bases.map(|file| file.id).collect(), &Going::default());
        gone.values().sum()
    }

    /// Returns the files that go, with their bytes, and the files next to them that stay.
    fn gone_with(&self, going: &Going) -> (HashMap<FileId, u64>, HashSet<FileId>) {
        let tops = going.names.iter().filter_map(|path| self.layers.at(path));
        self.gone_from(tops.map(|file| file.id).collect(), going)
    }

    /// Returns which of some files and of those below them go, with their bytes, and which stay.
    fn gone_from(
        &self,
        mut next: Vec<FileId>,
        going: &Going,
    ) -> (HashMap<FileId, u64>, HashSet<FileId>) {
        let (mut gone, mut edge) = (HashMap::new(), HashSet::new());
        while let Some(id) = next.pop() {
            if gone.contains_key(&id) {
                continue;
            }
            if self.is_needed(id, going, &gone) {
                edge.insert(id);
                continue;
            }
            edge.remove(&id);
            gone.insert(id, self.bytes(id));
            next.extend(self.below(id));
        }
        (gone, edge)
    }

    /// Returns whether a file stays once `going` and `gone` are gone.
    fn is_needed(&self, id: FileId, going: &Going, gone: &HashMap<FileId, u64>) -> bool {
        let mut names = self.names_left(id, going);
        self.has_foreign_name(id)
            || !self.readers_left(id, gone).is_empty()
            || names.any(|name| !self.is_freed_base(name, going))
    }

    /// Returns whether the name of a base is removed, once nothing else needs its file.
    fn is_freed_base(&self, name: &ImageFile, going: &Going) -> bool {
        let row = self.row_of_base(name, going);
        row.is_some_and(|row| self.may_go(row, going))
    }

    /// Returns the row of a base that only its readers keep.
    fn row_of_base(&self, name: &ImageFile, going: &Going) -> Option<&BaseRecord> {
        let row = self.bases.get(&name.path)?;
        let is_free = self.is_certain
            && matches!(name.role, Role::Base { .. })
            && !self.is_named(&name.path, going)
            && row.kind != "rootfs";
        is_free.then_some(row)
    }

    /// Returns whether a base is ours, or one of BoxLite's that only the box refers to.
    fn may_go(&self, row: &BaseRecord, going: &Going) -> bool {
        let referring = self.referring.get(&row.id);
        let mut referring = referring.into_iter().flatten().peekable();
        let is_from_box = going.is_box && going.box_id.as_ref() == Some(&row.source_box_id);
        row.is_ours()
            || ((referring.peek().is_some() || is_from_box)
                && referring.all(|box_id| going.box_id.as_ref() == Some(box_id)))
    }

    /// Returns whether the row of a snapshot that stays names a path.
    fn is_named(&self, path: &Path, going: &Going) -> bool {
        let snapshots = self.named.get(path).into_iter().flatten();
        let mut left = snapshots.filter(|snapshot| !going.snapshots.contains(*snapshot));
        left.next().is_some()
    }

    fn names_left<'a>(
        &'a self,
        id: FileId,
        going: &'a Going,
    ) -> impl Iterator<Item = &'a ImageFile> {
        let names = self.layers.names_of(id);
        names.filter(|name| !going.names.contains(&name.path))
    }

    /// Returns whether a file has a name that the home does not know, as in a backup of hard links.
    fn has_foreign_name(&self, id: FileId) -> bool {
        let names = self.layers.names_of(id).count() as u64;
        self.file(id).is_none_or(|file| file.names > names)
    }

    /// Returns the files that read this one, without those that are gone.
    fn readers_left(&self, id: FileId, gone: &HashMap<FileId, u64>) -> HashSet<FileId> {
        let names = self.layers.names_of(id);
        let readers = names.flat_map(|name| self.layers.readers_of(&name.path));
        let readers = readers.map(|reader| reader.id);
        readers
            .filter(|reader| !gone.contains_key(reader))
            .collect()
    }

    fn file(&self, id: FileId) -> Option<&ImageFile> {
        self.layers.names_of(id).next()
    }

    fn bytes(&self, id: FileId) -> u64 {
        self.file(id).map_or(0, |file| file.allocated)
    }

    fn below(&self, id: FileId) -> Option<FileId> {
        let backing = self.file(id)?.backing.as_ref()?;
        self.layers.at(backing).map(|file| file.id)
    }

    /// Returns how many bytes more than now compacting gives back after a removal.
    fn gain_after(
        &self,
        going: &Going,
        gone: &HashMap<FileId, u64>,
        edge: &HashSet<FileId>,
    ) -> Option<i128> {
        if !self.is_certain {
            return None;
        }
        let tops: HashSet<FileId> = edge
            .iter()
            .map(|id| self.top_over(*id, going, gone))
            .collect();
        let mut lost: HashSet<FileId> = gone.keys().copied().collect();
        let mut gained = 0;
        for top in tops {
            let run = self.run_below(top, going, gone);
            let is_same = self
                .planned
                .get(&top)
                .is_some_and(|planned| planned.layers == run);
            if run.len() > 1 && !is_same && self.is_mergeable_top(top, going, gone) {
                gained += i128::from(self.gain(&self.plan_of(&run, going)?)?);
            } else if is_same {
                continue;
            }
            lost.extend(run);
        }
        for id in lost {
            if let Some(planned) = self.planned.get(&id) {
                gained -= i128::from(planned.gain?);
            }
        }
        Some(gained)
    }

    /// Returns the layer that this one is merged into after a removal; itself if there is none.
    fn top_over(&self, id: FileId, going: &Going, gone: &HashMap<FileId, u64>) -> FileId {
        let (mut top, mut seen) = (id, HashSet::new());
        while seen.insert(top)
            && let Some(reader) = self.only_reader(top, going, gone)
        {
            top = reader;
        }
        top
    }

    /// Returns the layers that become one with the layer `top` after a removal, that first.
    fn run_below(&self, top: FileId, going: &Going, gone: &HashMap<FileId, u64>) -> Vec<FileId> {
        let mut run = vec![top];
        let mut below = self.below(top);
        while let Some(id) = below
            && !run.contains(&id)
            && self.only_reader(id, going, gone).is_some()
        {
            run.push(id);
            below = self.below(id);
        }
        run
    }

    /// Returns the layer that alone reads this one after a removal, if this one can be merged into
    /// it: it is a base then, without another name. A layer in the directory of what goes becomes a
    /// base when something reads it.
    fn only_reader(
        &self,
        id: FileId,
        going: &Going,
        gone: &HashMap<FileId, u64>,
    ) -> Option<FileId> {
        let mut names = self.names_left(id, going);
        let is_base = match (names.next(), names.next()) {
            (None, _) => true,
            (Some(name), None) => self.row_of_base(name, going).is_some(),
            _ => false,
        };
        let is_damaged = self.file(id).is_none_or(|file| file.damaged.is_some());
        let readers = self.readers_left(id, gone);
        if !is_base || is_damaged || readers.len() != 1 || self.has_foreign_name(id) {
            return None;
        }
        readers.into_iter().next()
    }

    /// Returns whether layers can be merged into this one: rows know all its names, and those of
    /// the boxes above it.
    fn is_mergeable_top(&self, id: FileId, going: &Going, gone: &HashMap<FileId, u64>) -> bool {
        let names: Vec<&ImageFile> = self.names_left(id, going).collect();
        let has_row = |name: &ImageFile| match &name.role {
            Role::Live { box_id } => self.boxes.contains(box_id),
            Role::Snapshot { .. } => self.is_named(&name.path, going),
            Role::Base { .. } => self.bases.contains_key(&name.path),
            Role::Kept { .. } => false,
        };
        let is_live = |name: &&ImageFile| matches!(name.role, Role::Live { .. });
        let has_live = names.iter().any(is_live);
        let mut boxes = names
            .iter()
            .flat_map(|name| self.layers.boxes_above(&name.path))
            .filter(|id| !(going.is_box && going.box_id.as_ref() == Some(id)))
            .peekable();
        let has_readers = names
            .iter()
            .any(|name| is_live(name) || self.is_named(&name.path, going))
            || !self.readers_left(id, gone).is_empty();
        has_readers
            && !self.has_foreign_name(id)
            && (!has_live || names.len() == 1)
            && names
                .iter()
                .all(|name| name.damaged.is_none() && has_row(name))
            && boxes.peek().is_some()
            && boxes.all(|id| self.boxes.contains(&id))
    }

    fn plan_of(&self, run: &[FileId], going: &Going) -> Option<MergePlan> {
        let top = *run.first()?;
        let names = self.names_left(top, going);
        let live = |name: &ImageFile| matches!(name.role, Role::Live { .. });
        let layers = run.iter().map(|id| self.file(*id).map(MergeLayer::of));
        Some(MergePlan {
            names: names.map(|name| name.path.clone()).collect(),
            is_live: self.names_left(top, going).any(live),
            layers: layers.collect::<Option<Vec<_>>>()?,
            boxes: BTreeSet::new(),
            frees: true,
        })
    }

    /// Returns what a merge gives back; None where its layers can't be read.
    fn gain(&self, plan: &MergePlan) -> Option<u64> {
        let key = ids_of(plan);
        if let Some(known) = self.gains.borrow().get(&key) {
            return *known;
        }
        let gain = gain_of(self.store, plan)
            .inspect_err(|error| log::debug!("what a merge gives back: {error}"))
            .ok();
        self.gains.borrow_mut().insert(key, gain);
        gain
    }
}

fn ids_of(plan: &MergePlan) -> Vec<FileId> {
    plan.layers.iter().map(|layer| layer.id).collect()
}
