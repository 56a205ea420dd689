//! Puts back bases that were deleted, from their spare names: further names of every layer of ours,
//! below `.boxlitefs/layers/`.
//!
//! A spare name takes no space and is removed only when we free the layer. So a layer that another
//! program deletes from `bases/` (a faulty orphan collection of BoxLite's, a mistaken `rm`) comes
//! back with the next mount, the next change, or `boxlitefs check --repair`.
//!
//! A spare name is made once its layer is in place. It is not flushed, because everything works
//! without it. One rule matters: it never stands for another state than its base. It is removed
//! before a base becomes a live disk. When a base's file is replaced, the spare name follows,
//! durably, before the layers that the old file read are freed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use crate::disk::{FileId, Header};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::home::{BaseRecord, Change};
use crate::store::Store;
use crate::store::layers::bases::new_base;
use crate::store::layers::collect::named_by_rows;
use crate::store::layers::graph::{LayerGraph, Role, is_row_of};
use crate::store::layers::spare_names::Spare;
use crate::{Context, Result};

/// Names made while the lock is held once.
const BATCH: usize = 256;

/// Gives spare names to all bases of ours that have none, such as those of an older version.
///
/// # Errors
/// EBUSY when a runtime has the lock; those of SQLite.
pub fn keep_spares(store: &Store) -> Result<()> {
    let spares = store.spares.scan()?;
    let lacks = |row: &BaseRecord| {
        let path = store.layers.path_of_base(row).ok()?;
        let is_ours = row.is_ours() && path.extension().is_some_and(|it| it == "qcow2");
        (is_ours && spares.of_base(&path).is_none() && path.is_file()).then_some(path)
    };
    let lacking: Vec<PathBuf> = store.home().bases()?.iter().filter_map(lacks).collect();
    for some in lacking.chunks(BATCH) {
        let _change = store.home().change()?;
        let layers = store.layers.scan()?;
        for base in some {
            if layers
                .at(base)
                .is_some_and(|file| !is_live(&layers, file.id))
            {
                store.spares.keep(base);
            }
        }
    }
    Ok(())
}

/// Puts back bases that are missing from `bases/` and have another name: those that a header names,
/// and all of ours. Returns how many.
///
/// Order: rows for the bases that have none, the names, the flush. A crash leaves rows of ours
/// without files, which headers name; the next run completes the work.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn put_back_bases(
    store: &Store,
    change: &mut Change<'_>,
    layers: &LayerGraph,
) -> Result<usize> {
    let rows = change.bases()?;
    let missing = missing_with_links(store, change, layers, &rows)?;
    if missing.is_empty() {
        return Ok(0);
    }
    let mut new = Vec::new();
    for (base, file) in &missing {
        if !rows.iter().any(|row| is_row_of(row, base)) {
            new.push(new_base(base, file)?);
        }
    }
    change.transaction(|rows| new.iter().try_for_each(|base| rows.insert_base(base)))?;
    crash_point("put-back.recorded");
    let dir = store.home().bases_dir();
    if !dir.is_dir() {
        store.home().make_dir(&dir)?;
        durable::sync_parent(&dir)?;
    }
    for (base, file) in &missing {
        fs::hard_link(file, base)
            .context(|| format!("cannot link {} to {}", file.display(), base.display()))?;
        crash_point("put-back.linked");
    }
    durable::count_change();
    durable::sync_dir(&dir)?;
    // The headers of these bases were not checked.
    store.access.paths_are_right.store(false, Ordering::Release);
    for (base, _) in &missing {
        store.spares.keep(base);
    }
    let names: Vec<String> = missing.iter().map(|(base, _)| name_of(base)).collect();
    store.events().warn(&format!(
        "{} layers had been deleted from {} and were put back: {}",
        missing.len(),
        dir.display(),
        names.join(", ")
    ));
    Ok(missing.len())
}

/// Returns the missing bases that have another name, each with that name.
///
/// # Errors
/// Those of SQLite.
pub fn missing_with_links(
    store: &Store,
    change: &Change<'_>,
    layers: &LayerGraph,
    rows: &[BaseRecord],
) -> Result<Vec<(PathBuf, PathBuf)>> {
    let missing = missing_bases(store, layers, rows);
    let spares = layers.spares();
    let mut linked = Vec::new();
    let mut without_spare = Vec::new();
    for base in missing {
        match spares.of_base(&base) {
            Some(spare) if !is_live(layers, spare.id) => {
                linked.push((base, spare.path.clone()));
            }
            Some(_) => {}
            None => without_spare.push(base),
        }
    }
    if !without_spare.is_empty() {
        linked.extend(snapshots_of_missing(
            store,
            change,
            layers,
            rows,
            &without_spare,
        )?);
    }
    Ok(linked)
}

/// Returns the bases without a file that a header or a row of ours names.
fn missing_bases(store: &Store, layers: &LayerGraph, rows: &[BaseRecord]) -> BTreeSet<PathBuf> {
    let dir = store.home().bases_dir();
    let named = layers.named().map(Path::to_owned);
    let ours = rows.iter().filter(|row| row.is_ours());
    let ours = ours.filter_map(|row| store.layers.path_of_base(row).ok());
    named
        .chain(ours)
        .filter(|path| {
            path.parent() == Some(dir.as_path())
                && path.extension().is_some_and(|it| it == "qcow2")
                && fs::symlink_metadata(path)
                    .is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
        })
        .collect()
}

/// Returns names for missing bases of an older version, which had no spare names: those of the
/// snapshots made with them. A match must be unambiguous: the rows were made at the same moment and
/// agree on the file, and only this file and this base match.
fn snapshots_of_missing(
    store: &Store,
    change: &Change<'_>,
    layers: &LayerGraph,
    rows: &[BaseRecord],
    missing: &[PathBuf],
) -> Result<Vec<(PathBuf, PathBuf)>> {
    /// Seconds from the row of a base to the row of its snapshot.
    const STEP: std::ops::RangeInclusive<i64> = 0..=1;
    let snapshots = change.snapshots()?;
    let mut matches: Vec<(PathBuf, PathBuf, FileId)> = Vec::new();
    for base in missing {
        let row = rows
            .iter()
            .find(|row| row.is_ours() && is_row_of(row, base));
        let Some(recorded) = row.and_then(BaseRecord::file) else {
            continue;
        };
        for snapshot in &snapshots {
            let path = store.exports.disks.snapshot_layer(snapshot);
            let Some(file) = layers.at(&path) else {
                continue;
            };
            let has_base = layers
                .names_of(file.id)
                .any(|name| !matches!(name.role, Role::Snapshot { .. }));
            let is_same = STEP.contains(&(snapshot.created_at - recorded.created_at))
                && file.stamp.0 == recorded.size_bytes
                && Header::open(&path)
                    .is_ok_and(|it| it.is_some_and(|it| it.virtual_size == recorded.virtual_size));
            let is_new = !matches
                .iter()
                .any(|(of, _, id)| of == base && *id == file.id);
            if is_same && is_new && !has_base && file.backing.as_ref() != Some(base) {
                matches.push((base.clone(), path, file.id));
            }
        }
    }
    let is_alone = |base: &Path, id: FileId| {
        let is_other = |(of, _, it): &&(PathBuf, PathBuf, FileId)| of == base || *it == id;
        matches.iter().filter(is_other).count() == 1
    };
    let alone = matches.iter().filter(|(base, _, id)| is_alone(base, *id));
    Ok(alone
        .map(|(base, path, _)| (base.clone(), path.clone()))
        .collect())
}

/// Removes spare names that stand for nothing any more, and renews those whose base is another file
/// now. Removes no name of a deleted base while it is uncertain what is needed.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn tidy_spares(store: &Store, change: &Change<'_>) -> Result<()> {
    let is_right = |spare: &Spare| FileId::at(&spare.base).is_ok_and(|id| id == spare.id);
    if store.spares.scan()?.all().iter().all(is_right) {
        return Ok(());
    }
    let layers = store.layers.scan()?;
    let spares = layers.spares();
    let is_complete = named_by_rows(store, change, &layers)?.is_some();
    for spare in spares.all() {
        match layers.at(&spare.base) {
            Some(base) if base.id == spare.id => {}
            Some(base) if !is_live(&layers, base.id) => store.spares.keep(&spare.base),
            Some(_) => {}
            None if is_live(&layers, spare.id) => durable::unlink(&spare.path)?,
            None if is_complete && layers.readers_of(&spare.base).next().is_none() => {
                durable::unlink(&spare.path)?;
            }
            None => {}
        }
    }
    Ok(())
}

/// Returns whether a file is a live disk. A live disk is written to and stands for no layer.
pub fn is_live(layers: &LayerGraph, id: FileId) -> bool {
    layers
        .names_of(id)
        .any(|name| matches!(name.role, Role::Live { .. }))
}

/// Returns the last component of a path, for messages.
pub fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
