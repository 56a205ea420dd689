//! `boxlitefs du`: what takes the space of a home, and what removals would free. Only reads.

mod attribution;
mod walk;

use std::collections::HashMap;
use std::path::Path;

use crate::Result;
use crate::exports::{Source, display_name};
use crate::home::{BoxRecord, Catalog};
use crate::store::Store;
use crate::store::layers::forecast::{Forecast, Going};
use crate::store::layers::graph::{LayerGraph, Role};
use crate::store::maintenance::summary::open;
use crate::store::maintenance::usage::{Usage, Usages, states_of};

use attribution::Attribution;
use walk::{BoxFiles, Walk};

pub use crate::store::layers::forecast::Freed;
pub use attribution::Owner;

/// A disk, a snapshot or a box with all its snapshots.
#[derive(Clone, Debug)]
pub struct Item {
    /// The id of the box or the snapshot.
    pub id: String,
    /// The name; the id of a box without one.
    pub name: String,
    /// Bytes that nothing else reads, and those that others read as well.
    pub usage: Usage,
    /// What removing it gives back.
    pub freed: Freed,
}

/// A box and its snapshots.
#[derive(Clone, Debug)]
pub struct BoxSpace {
    /// The box with all its snapshots and other files.
    pub whole: Item,
    /// Its disk as it is now.
    pub disk: Usage,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Item>,
}

/// An entry that can be had back.
#[derive(Clone, Debug)]
pub struct EntrySpace {
    /// Its id.
    pub id: String,
    /// What was done, such as "removal of box web".
    pub what: String,
    /// What dropping it gives back.
    pub freed: Freed,
}

/// The space that a home takes.
#[derive(Clone, Debug)]
pub struct HomeSpace {
    /// The path of the home.
    pub home: String,
    /// All of it, as `du -s` counts: each file once.
    pub total: u64,
    /// The parts that the total is the sum of.
    pub parts: Vec<(Owner, u64)>,
    /// The boxes, by name.
    pub boxes: Vec<BoxSpace>,
    /// What can be had back, oldest first.
    pub entries: Vec<EntrySpace>,
    /// What compacting gives back now.
    pub compacting: Option<u64>,
    /// Directories that can't be read, and that count for nothing.
    pub unread: Vec<String>,
}

/// Returns what takes the space of a home, and what removals would free.
///
/// # Errors
/// Those of opening and reading the home.
pub fn report(home: &Path) -> Result<HomeSpace> {
    // Files that SQLite has while the database is open count only where another program has it open.
    let found = walk::files_of(home);
    let store = open(home)?;
    let catalog = store.home().catalog()?;
    let layers = store.layers.scan()?;
    let rows = store.home().queries()?;
    let forecast = Forecast::new(&store, &layers, &catalog, &rows)?;
    let states = states_of(&store, &layers, &catalog, catalog.boxes());
    let attribution = Attribution::of(&layers, &states);
    let usages = Usages::of(states);
    let mut walk = Walk::new(store.home(), &catalog, &attribution);
    found.files.iter().for_each(|file| walk.add(file));
    let of_box = |record: &BoxRecord| {
        let files = walk.of_box(&record.id);
        box_space(
            &store,
            (&catalog, &layers),
            &forecast,
            &usages,
            record,
            files,
        )
    };
    let mut boxes: Vec<BoxSpace> = catalog.boxes().map(of_box).collect();
    boxes.sort_by(|one, other| one.whole.name.cmp(&other.whole.name));
    Ok(HomeSpace {
        home: store.home().root().to_string_lossy().into_owned(),
        total: walk.total(),
        parts: walk.parts(),
        boxes,
        entries: entries(&catalog, &layers, &forecast, &walk),
        compacting: forecast.of_compacting(),
        unread: found.unread,
    })
}

fn box_space(
    store: &Store,
    (catalog, layers): (&Catalog, &LayerGraph),
    forecast: &Forecast<'_>,
    usages: &Usages,
    record: &BoxRecord,
    files: Option<&BoxFiles>,
) -> BoxSpace {
    let id = &record.id;
    let rows = catalog.snapshots_of(id);
    let of_state = |source: &Source| usages.states.get(source).copied().unwrap_or_default();
    let directory_of = |path: &Path| {
        let name = path.parent().and_then(Path::file_name);
        let name = name.and_then(|name| name.to_str());
        let known = files.zip(name);
        known.and_then(|(files, name)| files.snapshots.get(name).copied())
    };
    let mut snapshots = Vec::new();
    for row in rows {
        let top = store.exports.disks.snapshot_layer(row);
        let other = directory_of(&top).unwrap_or(0);
        let going = Going {
            names: [top].into(),
            snapshots: [row.id.clone()].into(),
            box_id: Some(id.clone()),
            is_box: false,
        };
        let source = Source::Snapshot {
            box_id: id.clone(),
            snapshot_id: row.id.clone(),
        };
        snapshots.push(Item {
            id: row.id.clone(),
            name: row.name.clone(),
            usage: with_files(of_state(&source), other),
            freed: freed(forecast, &going, other),
        });
    }
    let going = Going {
        names: layers.of_box(id).map(|file| file.path.clone()).collect(),
        snapshots: rows.iter().map(|row| row.id.clone()).collect(),
        box_id: Some(id.clone()),
        is_box: true,
    };
    let usage = usages.boxes.get(id).copied().unwrap_or_default();
    BoxSpace {
        whole: Item {
            id: id.clone(),
            name: display_name(record).to_string(),
            usage: with_files(usage, files.map_or(0, |files| files.all)),
            freed: freed(forecast, &going, files.map_or(0, BoxFiles::removable)),
        },
        disk: of_state(&Source::Live { box_id: id.clone() }),
        snapshots,
    }
}

fn with_files(usage: Usage, bytes: u64) -> Usage {
    Usage {
        own: usage.own + bytes,
        ..usage
    }
}

/// Returns what a removal gives back that removes so many bytes of other files, too.
fn freed(forecast: &Forecast<'_>, going: &Going, other: u64) -> Freed {
    let layers = forecast.of(going);
    Freed {
        now: layers.now + other,
        compacted: layers.compacted.map(|bytes| bytes + other),
    }
}

fn entries(
    catalog: &Catalog,
    layers: &LayerGraph,
    forecast: &Forecast<'_>,
    walk: &Walk<'_>,
) -> Vec<EntrySpace> {
    let mut names: HashMap<&str, Going> = HashMap::new();
    for file in layers.files() {
        if let Role::Kept { id } = &file.role {
            let going = names.entry(id).or_default();
            going.names.insert(file.path.clone());
        }
    }
    let kept = catalog.kept().iter().map(|entry| {
        let going = names.remove(entry.id()).unwrap_or_default();
        let other = walk.of_box(entry.id()).map_or(0, BoxFiles::removable);
        EntrySpace {
            id: entry.id().to_owned(),
            what: entry.rows.what.clone(),
            freed: freed(forecast, &going, other),
        }
    });
    kept.collect()
}
