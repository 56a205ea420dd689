//! References from boxes to bases that nothing in the box needs any more.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::disk::FileId;
use crate::home::BaseRecord;
use crate::store::Store;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::collect::{free_bases, free_without_lock};
use crate::store::layers::graph::{ImageFile, LayerGraph};

/// Drops the references of the box that nothing in it needs any more, and frees the bases that
/// nothing needs now. That includes BoxLite's: BoxLite goes by references and would keep them
/// forever. Those take the runtime lock; beside a runtime they wait, and only ours are freed. In a
/// large home all of this is done behind.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn free_surplus(locked: &mut LockedBox<'_>) -> Result<()> {
    if locked.store.layers.is_large() {
        locked.store.unfreed.add_box(&locked.record.id);
        return Ok(());
    }
    if locked.change.is_shared() && !may_free_all(locked)? {
        return free_surplus_of_ours(locked);
    }
    let layers = locked.layers()?;
    let surplus = drop_surplus_refs(locked, &layers, true)?;
    let may_go = |row: &BaseRecord| row.is_ours() || surplus.iter().any(|it| it.id == row.id);
    free_bases(locked.store, &mut locked.change, &may_go)
}

/// Takes the runtime lock if a base of BoxLite's is surplus and no runtime has the home. Returns
/// whether it was taken.
fn may_free_all(locked: &mut LockedBox<'_>) -> Result<bool> {
    if !locked.change.is_alone() {
        return Ok(false);
    }
    let mut referred = locked.change.bases_of(&locked.record.id)?;
    referred.retain(|row| !row.is_ours());
    if referred.is_empty() {
        return Ok(false);
    }
    let layers = locked.layers()?;
    let has_surplus = !surplus_refs(locked, &layers, referred)?.is_empty();
    Ok(has_surplus && locked.change.take_lock()?)
}

/// Drops the references to bases of ours that nothing in the box needs any more, and frees those
/// that nothing needs now, without the runtime lock.
fn free_surplus_of_ours(locked: &mut LockedBox<'_>) -> Result<()> {
    locked.change.begin_exclusive()?;
    let layers = locked.layers()?;
    drop_surplus_refs(locked, &layers, false)?;
    free_without_lock(locked.store, &mut locked.change)
}

/// Drops surplus references that a crash left, if they would keep BoxLite from removing another
/// box. Returns their bases. BoxLite frees the bases it made of this box through its references to
/// them: those are dropped only if `thorough`.
///
/// # Errors
/// Those of reading the home and of SQLite.
pub fn drop_leftover_refs(
    locked: &mut LockedBox<'_>,
    layers: &LayerGraph,
    referred: Vec<BaseRecord>,
    thorough: bool,
) -> Result<Vec<BaseRecord>> {
    let mut surplus = surplus_refs(locked, layers, referred)?;
    surplus.retain(|row| thorough || row.source_box_id != locked.record.id);
    drop_refs(locked, &surplus)?;
    Ok(surplus)
}

/// Drops the references of the box that nothing in it needs any more, and returns their bases.
/// `theirs` includes bases that BoxLite made. Without the runtime lock, drops nothing if the scan
/// missed a file.
///
/// # Errors
/// Those of reading the home and of SQLite.
pub fn drop_surplus_refs(
    locked: &mut LockedBox<'_>,
    layers: &LayerGraph,
    theirs: bool,
) -> Result<Vec<BaseRecord>> {
    if locked.change.is_shared() && layers.unseen(locked.store.home()).is_some() {
        return Ok(Vec::new());
    }
    let mut referred = locked.change.bases_of(&locked.record.id)?;
    referred.retain(|row| theirs || row.is_ours());
    let surplus = surplus_refs(locked, layers, referred)?;
    drop_refs(locked, &surplus)?;
    Ok(surplus)
}

fn drop_refs(locked: &mut LockedBox<'_>, surplus: &[BaseRecord]) -> Result<()> {
    if surplus.is_empty() {
        return Ok(());
    }
    let box_id = locked.record.id.clone();
    locked.change.transaction(|rows| {
        surplus
            .iter()
            .try_for_each(|row| rows.delete_ref(&row.id, &box_id))
    })
}

/// Returns the bases among `referred` that no file of the box reads or is another name of. A
/// snapshot of an unchanged clone is another name of BoxLite's base, which BoxLite frees with the
/// last reference. Returns none while it is uncertain what the box reads.
fn surplus_refs(
    locked: &LockedBox<'_>,
    layers: &LayerGraph,
    referred: Vec<BaseRecord>,
) -> Result<Vec<BaseRecord>> {
    if referred.is_empty() || locked.live().is_none() {
        return Ok(Vec::new());
    }
    let mut tops: Vec<PathBuf> = Vec::new();
    for snapshot in locked.snapshots()? {
        tops.push(locked.store.exports.disks.snapshot_layer(&snapshot));
    }
    if layers.damaged().is_some() || tops.iter().any(|top| layers.at(top).is_none()) {
        return Ok(Vec::new());
    }
    let own = layers.of_box(&locked.record.id);
    tops.extend(own.map(|file| file.path.clone()));
    let mut surplus = referred;
    surplus.retain(not_reached_from(locked.store, layers, &tops));
    Ok(surplus)
}

/// Returns a function that says whether a base is neither in a chain of one of `tops` nor another
/// name of one. False for cached images, which are read through files that are not among the layers.
pub fn not_reached_from<'l>(
    store: &'l Store,
    layers: &'l LayerGraph,
    tops: &'l [PathBuf],
) -> impl Fn(&BaseRecord) -> bool + use<'l> {
    let reached: BTreeSet<&Path> = tops.iter().flat_map(|top| layers.chain(top)).collect();
    let named = tops.iter().filter_map(|top| layers.at(top));
    let named: HashSet<FileId> = named.map(|file| file.id).collect();
    move |row| {
        let is_needed = |path: PathBuf| {
            let is_named = |file: &ImageFile| named.contains(&file.id);
            reached.contains(path.as_path()) || layers.at(&path).is_some_and(is_named)
        };
        let path = store.layers.path_of_base(row);
        row.kind != "rootfs" && path.is_ok_and(|path| !is_needed(path))
    }
}
