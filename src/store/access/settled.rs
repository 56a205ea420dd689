//! Whether a home needs no recovery, as far as can be seen without a lock. Then a mount of a large home
//! need not take the lock, which would keep BoxLite and all changes waiting.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use crate::Result;
use crate::files::listing::names_in;
use crate::files::markers::UNRECORDED;
use crate::home::{BaseRecord, Catalog};
use crate::store::Store;
use crate::store::access::path_spelling::misspelled_now;
use crate::store::layers::catalog_index::CatalogIndex;
use crate::store::layers::collect::{is_missing, named_in};
use crate::store::layers::graph::{ImageFile, LayerGraph, Role};
use crate::store::layers::references::not_reached_from;

/// Returns whether recovery would find nothing to do. While a change is under way, the answer is no.
///
/// # Errors
/// Those of reading the home and of SQLite.
pub fn is_settled(store: &Store, catalog: &Catalog, layers: &LayerGraph) -> Result<bool> {
    let rows = store.home().bases()?;
    Ok(layers.damaged().is_none()
        && misspelled_now(store, Some(layers))?.is_empty()
        && are_bases_settled(store, catalog, layers, &rows)
        && are_spares_right(layers)
        && are_entries_settled(store, catalog, layers)?
        && are_boxes_settled(store, catalog, layers)?
        && are_refs_needed(store, layers, &rows)?)
}

/// Returns whether every base that is named is there, every one of ours with a row has its file, and
/// none is unneeded.
fn are_bases_settled(
    store: &Store,
    catalog: &Catalog,
    layers: &LayerGraph,
    rows: &[BaseRecord],
) -> bool {
    let named = named_in(store, catalog);
    let index = CatalogIndex::new(catalog.boxes(), rows, &named);
    let is_there =
        |(path, row): (&PathBuf, &&BaseRecord)| !row.is_ours() || layers.at(path).is_some();
    let mut headers = layers.named();
    let mut files = layers.files();
    index.bases.iter().all(is_there)
        && !headers.any(|path| is_missing(path, layers, store.home()))
        && !files.any(|file| index.is_unneeded(file, layers))
}

/// Returns whether what every entry keeps is gone, and each of its disks is a base.
fn are_entries_settled(store: &Store, catalog: &Catalog, layers: &LayerGraph) -> Result<bool> {
    let home = store.home();
    let is_base = |file: &ImageFile| matches!(file.role, Role::Base { .. });
    let mut kept = layers
        .files()
        .filter(|file| matches!(file.role, Role::Kept { .. }));
    Ok(home.kept_ids()?.len() == catalog.kept().len()
        && catalog
            .kept()
            .iter()
            .all(|entry| home.is_gone(entry, catalog))
        && kept.all(|file| layers.names_of(file.id).any(is_base)))
}

fn are_spares_right(layers: &LayerGraph) -> bool {
    layers.spares().all().iter().all(|spare| {
        let base = layers.at(&spare.base);
        base.is_some_and(|base| base.id == spare.id)
    })
}

/// Returns whether no box has a mark, a live disk with a second name, or a snapshot without a row.
fn are_boxes_settled(store: &Store, catalog: &Catalog, layers: &LayerGraph) -> Result<bool> {
    let home = store.home();
    for box_id in names_in(&home.boxes_dir())? {
        let live = layers.at(&home.live_disk(&box_id));
        let has_second_name = live.is_some_and(|live| {
            layers.names_of(live.id).count() > 1 || layers.spares().count_of(live.id) > 0
        });
        if has_second_name
            || home.box_dir(&box_id).join(UNRECORDED).exists()
            || home.pending_marker(&box_id).exists()
        {
            return Ok(false);
        }
        let rows = catalog.snapshots_of(&box_id).iter();
        let places: HashSet<PathBuf> = rows
            .map(|row| store.exports.disks.snapshot_layer(row))
            .collect();
        for name in names_in(&home.snapshots_dir(&box_id))? {
            let layer = home.snapshot_disk(&box_id, &name);
            if !places.contains(&layer) || layer.with_file_name(UNRECORDED).exists() {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Returns whether every box needs all bases that it refers to.
fn are_refs_needed(store: &Store, layers: &LayerGraph, rows: &[BaseRecord]) -> Result<bool> {
    let rows: HashMap<&str, &BaseRecord> = rows.iter().map(|row| (row.id.as_str(), row)).collect();
    for (box_id, referred) in store.home().queries()?.refs()? {
        let tops: Vec<PathBuf> = layers
            .of_box(&box_id)
            .map(|file| file.path.clone())
            .collect();
        let is_surplus = not_reached_from(store, layers, &tops);
        let mut referred = referred.iter().filter_map(|id| rows.get(id.as_str()));
        if !tops.is_empty() && referred.any(|row| is_surplus(row)) {
            return Ok(false);
        }
    }
    Ok(true)
}
