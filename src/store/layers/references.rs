//! References of boxes to bases that nothing in the box needs any more.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::disk::FileId;
use crate::home::BaseRecord;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::collect::free_bases;
use crate::store::layers::graph::{ImageFile, LayerGraph};

/// Drops what references of the box nothing in it needs any more, and frees the bases that nobody
/// needs now; also BoxLite's, which goes by references and would keep them for ever.
/// Beside a runtime that waits: BoxLite's next step may need what nothing needs now.
pub fn free_surplus(locked: &mut LockedBox<'_>) -> Result<()> {
    if locked.change.is_shared() {
        return Ok(());
    }
    let surplus = drop_surplus_refs(locked, &locked.layers()?)?;
    let may_go = |row: &BaseRecord| row.is_ours() || surplus.iter().any(|it| it.id == row.id);
    free_bases(locked.store, &mut locked.change, &may_go)
}

/// Drops all references of the box that nothing in it needs any more. Returns the bases.
pub fn drop_surplus_refs(
    locked: &mut LockedBox<'_>,
    layers: &LayerGraph,
) -> Result<Vec<BaseRecord>> {
    let referred = locked.change.bases_of(&locked.record.id)?;
    let surplus = surplus_refs(locked, layers, referred)?;
    drop_refs(locked, &surplus)?;
    Ok(surplus)
}

/// Drops surplus references that a crash left, as far as they would keep BoxLite from removing
/// another box. Those to what BoxLite made of this one are how it frees that. Returns the bases.
/// `thorough`: those, too.
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

/// The bases that the box refers to (`referred`), and that none of its files reads from any more or is another name
/// of: a snapshot of a clone that did not change is one of BoxLite's base, which frees that with the
/// last reference only. None while what the box reads from can't be told for certain.
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
    let reached: BTreeSet<&Path> = tops.iter().flat_map(|top| layers.chain(top)).collect();
    let named = tops.iter().filter_map(|top| layers.at(top));
    let named: HashSet<FileId> = named.map(|file| file.id).collect();
    let is_needed = |path: &Path| {
        let is_named = |file: &ImageFile| named.contains(&file.id);
        reached.contains(path) || layers.at(path).is_some_and(is_named)
    };
    let mut surplus = referred;
    // A cache of images is read through files that are none of the layers.
    surplus.retain(|row| {
        row.kind != "rootfs"
            && locked
                .store
                .layers
                .path_of_base(row)
                .is_ok_and(|path| !is_needed(&path))
    });
    Ok(surplus)
}
