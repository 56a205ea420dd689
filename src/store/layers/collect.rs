//! Frees bases that nothing needs any more.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::listing::resolve;
use crate::home::{BaseRecord, Catalog, Change, Home, Queries, SnapshotRecord};
use crate::store::Store;
use crate::store::layers::catalog_index::CatalogIndex;
use crate::store::layers::graph::LayerGraph;

/// Frees the bases of ours that no header names and that are no snapshot's layer.
///
/// The file is removed before its row. Recovery recognises a row of ours without a file as a
/// leftover. A file without a row could be BoxLite's: a crash inside its clone leaves one, and it
/// can be a box's only disk.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn free_unreached(store: &Store, change: &mut Change<'_>) -> Result<()> {
    free_bases(store, change, &BaseRecord::is_ours)
}

/// Frees the unneeded bases that `may_go` accepts, as [`free_unreached`] does. A base of BoxLite's
/// is freed only when no box refers to it. It becomes ours first, so that a crash leaves no
/// half-removed base of BoxLite's.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn free_bases(
    store: &Store,
    change: &mut Change<'_>,
    may_go: &dyn Fn(&BaseRecord) -> bool,
) -> Result<()> {
    match ScannedHome::by(store, change)? {
        Some(scanned) => free_bases_in(store, change, scanned, may_go),
        None => Ok(()),
    }
}

/// A scan of the whole home that is certain what is needed.
pub struct ScannedHome {
    /// All image files.
    pub layers: LayerGraph,
    /// Every path that a snapshot's row names.
    named: BTreeSet<PathBuf>,
}

impl ScannedHome {
    /// Scans the home, whose rows are these. Returns None while it is uncertain what is needed, as
    /// [`named_by_rows`] does.
    ///
    /// # Errors
    /// Those of reading the directories and of SQLite.
    pub fn by(store: &Store, rows: &Queries) -> Result<Option<ScannedHome>> {
        let layers = store.layers.scan()?;
        let named = named_by_rows(store, rows, &layers)?;
        Ok(named.map(|named| ScannedHome { layers, named }))
    }
}

/// Frees bases as [`free_bases`] does, by this scan of the whole home, whose rows have not changed
/// since.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn free_bases_in(
    store: &Store,
    change: &mut Change<'_>,
    scanned: ScannedHome,
    may_go: &dyn Fn(&BaseRecord) -> bool,
) -> Result<()> {
    let ScannedHome { layers, named } = scanned;
    let rows = rows_that_may_go(store, change, may_go)?;
    free_each(layers, &named, &rows, &mut |row, path| {
        drop_base(store, change, row, path)
    })
}

/// Frees the bases of ours that nothing needs, without the runtime lock: also beside a runtime.
///
/// What BoxLite does at that moment needs no base that nothing reads. It makes overlays on the
/// layers of snapshots, which are there, and on live disks, which it moves: to a snapshot or a new
/// base, never out of the directories that are scanned. If it moved one while they were read, the
/// scan misses the live disk of a box that refers to bases, or the file that an overlay names.
/// Then nothing is freed.
///
/// # Errors
/// EBUSY when a runtime was faster; those of system calls and of SQLite.
pub fn free_without_lock(store: &Store, change: &mut Change<'_>) -> Result<()> {
    change.begin_exclusive()?;
    match ScannedHome::by(store, change)? {
        Some(scanned) => free_without_lock_in(store, change, scanned, &BaseRecord::is_ours),
        None => Ok(()),
    }
}

/// Frees the bases of ours that `may_go` accepts as [`free_without_lock`] does, by this scan of the
/// whole home, whose rows have not changed since.
///
/// # Errors
/// Those of [`free_without_lock`].
pub fn free_without_lock_in(
    store: &Store,
    change: &mut Change<'_>,
    scanned: ScannedHome,
    may_go: &dyn Fn(&BaseRecord) -> bool,
) -> Result<()> {
    let ScannedHome { layers, named } = scanned;
    if layers.unseen(store.home()).is_some() {
        return Ok(());
    }
    let rows = rows_that_may_go(store, change, &|row| row.is_ours() && may_go(row))?;
    let mut freed = Vec::new();
    free_each(layers, &named, &rows, &mut |row, path| {
        unlink_base(store, path)?;
        freed.push(row.id.clone());
        Ok(())
    })?;
    if freed.is_empty() {
        return Ok(());
    }
    change.transaction(|rows| freed.iter().try_for_each(|id| rows.delete_base(id)))
}

/// Rows of bases by the resolved paths of their files.
type RowsByPath = HashMap<PathBuf, BaseRecord>;

/// Returns the rows of bases that `may_go` accepts, without those of BoxLite's that a box refers
/// to.
fn rows_that_may_go(
    store: &Store,
    change: &Change<'_>,
    may_go: &dyn Fn(&BaseRecord) -> bool,
) -> Result<RowsByPath> {
    let referred = change.referred_bases()?;
    let mut rows = change.bases()?;
    rows.retain(|row| may_go(row) && (row.is_ours() || !referred.contains(&row.id)));
    let rows = rows.into_iter();
    Ok(rows
        .filter_map(|row| Some((store.layers.path_of_base(&row).ok()?, row)))
        .collect())
}

/// Calls `free` with each base among `rows` that nothing needs, or that nothing needs once those above
/// it are freed.
fn free_each(
    mut layers: LayerGraph,
    named: &BTreeSet<PathBuf>,
    rows: &RowsByPath,
    free: &mut dyn FnMut(&BaseRecord, &Path) -> Result<()>,
) -> Result<()> {
    let unneeded = layers
        .files()
        .filter(|file| layers.is_unneeded(file, named));
    let mut next: Vec<PathBuf> = unneeded.map(|file| file.path.clone()).collect();
    while let Some(path) = next.pop() {
        let Some(row) = rows.get(&path) else { continue };
        free(row, &path)?;
        let below = layers.forget(&path);
        let below = below.filter(|path| {
            let file = layers.at(path);
            file.is_some_and(|file| layers.is_unneeded(file, named))
        });
        next.extend(below);
    }
    Ok(())
}

/// Removes a base that nothing reads and that has no other name: first the file, then the row.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn drop_base(
    store: &Store,
    change: &mut Change<'_>,
    row: &BaseRecord,
    path: &Path,
) -> Result<()> {
    if !row.is_ours() {
        change.transaction(|rows| rows.claim_base(&row.id))?;
        crash_point("free.claimed");
    }
    unlink_base(store, path)?;
    change.transaction(|rows| rows.delete_base(&row.id))
}

fn unlink_base(store: &Store, path: &Path) -> Result<()> {
    durable::unlink(path)?;
    crash_point("free.unlinked");
    store.spares.free(path);
    Ok(())
}

/// Returns every path that a snapshot's row names. Returns None while it is uncertain what else is
/// needed:
///
/// * a header can't be read, and may name anything;
/// * a layer that a box or a snapshot needs is missing, and may have another name;
/// * a box has rows that say it has a disk, and the disk is not in its place: it may have been put
///   aside.
///
/// # Errors
/// Those of SQLite.
pub fn named_by_rows(
    store: &Store,
    rows: &Queries,
    layers: &LayerGraph,
) -> Result<Option<BTreeSet<PathBuf>>> {
    if layers.damaged().is_some() {
        return Ok(None);
    }
    let mut tops = layers.files().filter(|file| file.box_id().is_some());
    let is_broken = |top: &Path| {
        let chain = layers.chain(top);
        chain
            .iter()
            .any(|path| is_missing(path, layers, store.home()))
    };
    if tops.any(|top| is_broken(&top.path)) {
        return Ok(None);
    }
    let snapshots = rows.snapshots()?;
    let mut started = rows.referring_boxes()?;
    started.extend(snapshots.iter().map(|snapshot| snapshot.box_id.clone()));
    let boxes = rows.boxes()?;
    let has_disk = |id: &str| layers.at(&store.home().live_disk(id)).is_some();
    if boxes
        .iter()
        .any(|record| started.contains(&record.id) && !has_disk(&record.id))
    {
        return Ok(None);
    }
    let boxes: HashSet<&str> = boxes.iter().map(|record| record.id.as_str()).collect();
    let mut named = BTreeSet::new();
    for snapshot in snapshots
        .iter()
        .filter(|it| boxes.contains(it.box_id.as_str()))
    {
        if layers
            .at(&store.exports.disks.snapshot_layer(snapshot))
            .is_none()
        {
            return Ok(None);
        }
        named.extend(named_by(store, snapshot));
    }
    Ok(Some(named))
}

/// Returns the paths that a snapshot's row names: its layer in this home, and the path as recorded,
/// wherever it leads.
pub fn named_by(store: &Store, snapshot: &SnapshotRecord) -> Vec<PathBuf> {
    let mut named = vec![store.exports.disks.snapshot_layer(snapshot)];
    let recorded = PathBuf::from(snapshot.base_path().unwrap_or_default());
    if !named.contains(&recorded) {
        named.extend(resolve(&recorded));
    }
    named
}

/// Returns whether a path in the home, which something names, has no file.
pub fn is_missing(path: &Path, layers: &LayerGraph, home: &Home) -> bool {
    layers.at(path).is_none()
        && home.contains(path)
        && std::fs::symlink_metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

/// Returns whether a base with a row seems to be unneeded. Takes no lock.
///
/// # Errors
/// Those of reading the home and of SQLite.
pub fn has_unneeded(store: &Store, catalog: &Catalog) -> Result<bool> {
    let layers = store.layers.scan()?;
    let named = named_in(store, catalog);
    let bases = store.home().bases()?;
    let rows = CatalogIndex::new(catalog.boxes(), &bases, &named);
    let mut files = layers.files();
    Ok(files.any(|file| rows.is_unneeded(file, &layers)))
}

/// Returns every path that a snapshot's row names.
pub fn named_in(store: &Store, catalog: &Catalog) -> BTreeSet<PathBuf> {
    let boxes = catalog.boxes();
    let snapshots = boxes.flat_map(|record| catalog.snapshots_of(&record.id));
    snapshots
        .flat_map(|snapshot| named_by(store, snapshot))
        .collect()
}
