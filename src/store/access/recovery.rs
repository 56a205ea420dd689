//! Recovery of one box. Files and rows show what a crash, ours or BoxLite's, cut off; the change is
//! undone or finished as the table in `docs/design/layers.md` says.
//!
//! Recovery runs only under the lock, and only for a box that is not running.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::disk::{FileId, Header};
use crate::exports::display_name;
use crate::files::durable;
use crate::files::listing::{names_in, resolve};
use crate::files::markers::UNRECORDED;
use crate::home::{SnapshotRecord, is_snapshot_name};
use crate::store::access::locked_box::LockedBox;
use crate::store::kept::entries::remove_undone;
use crate::store::layers::adopt::adopt;
use crate::store::layers::graph::{LayerGraph, Role};
use crate::store::layers::snapshot_place::{NewSnapshotIdentity, record_snapshot};
use crate::{Error, Result};

/// Brings the box into a state that a change may start from.
///
/// # Errors
/// EBUSY when only BoxLite can recover the box, EIO when others read from its live disk.
pub fn recover_box(locked: &mut LockedBox<'_>) -> Result<()> {
    // The box has a row, so its directory is no longer unrecorded.
    durable::unlink(
        &locked
            .store
            .home()
            .box_dir(&locked.record.id)
            .join(UNRECORDED),
    )?;
    remove_undone(locked.store, Some(&locked.record.id))?;
    undo_pending_snapshot(locked)?;
    undo_freeze(locked)?;
    recover_snapshot_dirs(locked)
}

/// Undoes a snapshot that BoxLite's own crash marker says is pending. If it is half made, the live
/// disk lies in the snapshot's directory and is moved back, as litebox/local_snapshot.rs does at
/// the next start of a runtime. A snapshot that is complete on disk is left to
/// [`recover_snapshot_dirs`].
fn undo_pending_snapshot(locked: &mut LockedBox<'_>) -> Result<()> {
    let home = locked.store.home();
    let marker = home.pending_marker(&locked.record.id);
    let Ok(text) = fs::read_to_string(&marker) else {
        return Ok(());
    };
    let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    if value["copy"] == Value::Bool(true) {
        // Only BoxLite knows whether the copy is complete, so BoxLite has to remove it.
        return Err(Error::busy(format!(
            "BoxLite ended while it copied a snapshot of box {}; start BoxLite once to clean up",
            display_name(&locked.record)
        )));
    }
    let live = home.live_disk(&locked.record.id);
    if !live.exists() {
        let taken = pending_layer(locked, &value).ok_or_else(|| {
            Error::busy(format!(
                "BoxLite left box {} in the middle of a snapshot ({}); start BoxLite once to recover the box",
                display_name(&locked.record),
                marker.display()
            ))
        })?;
        durable::rename(&taken, &live)?;
        if let Some(dir) = taken.parent() {
            // Removes only an empty directory: other files in it are not ours.
            let _ = durable::remove_dir(dir);
        }
        locked.store.events().info(&format!(
            "box {}: moved the disk back from a snapshot that BoxLite had not finished",
            display_name(&locked.record)
        ));
    }
    if let Some(layer) = pending_layer(locked, &value)
        && locked.layers()?.readers_of(&layer).next().is_some()
    {
        // BoxLite put the snapshot where one of that name, deleted since, had been left.
        durable::unlink(&layer.with_file_name(UNRECORDED))?;
    }
    durable::unlink(&marker)
}

/// Returns the file to which BoxLite moved the live disk, by its marker, if that file lies in this
/// box and belongs to no recorded snapshot.
fn pending_layer(locked: &LockedBox<'_>, marker: &Value) -> Option<PathBuf> {
    let dir = resolve(Path::new(marker["snapshot_dir"].as_str()?)).ok()?;
    let snapshots = locked.store.home().snapshots_dir(&locked.record.id);
    let name = dir.file_name()?.to_str()?.to_owned();
    let has_row = locked.snapshots().ok()?.iter().any(|row| row.name == name);
    let layer = dir.join("disk.qcow2");
    (dir.parent() == Some(snapshots.as_path()) && !has_row && layer.is_file()).then_some(layer)
}

/// Undoes a freeze that was cut off. A live disk has one name; a second one in `bases/` comes from
/// such a freeze, so the row, the references and the name are removed. The freeze is never
/// finished: a guest may have written to the disk since.
fn undo_freeze(locked: &mut LockedBox<'_>) -> Result<()> {
    let live = locked.store.home().live_disk(&locked.record.id);
    let Ok(meta) = fs::symlink_metadata(&live) else {
        return Ok(());
    };
    if meta.nlink() < 2 {
        return Ok(());
    }
    let layers = locked.layers()?;
    let id = FileId::of(&meta);
    // A freeze makes the spare name last but does not flush it, so it may be on disk although the
    // steps before it are not.
    for spare in layers.spares().all().iter().filter(|spare| spare.id == id) {
        durable::unlink(&spare.path)?;
    }
    for name in layers.names_of(id) {
        if !matches!(name.role, Role::Base { .. }) {
            continue;
        }
        if layers.readers_of(&name.path).next().is_some() {
            return Err(Error::damaged(format!(
                "{} is the live disk of box {}, but other disks read from it; the box is not recovered. Stop using the box, and export the boxes that read from it",
                name.path.display(),
                display_name(&locked.record)
            )));
        }
        let rows = locked.change.bases()?;
        let ours: Vec<&str> = rows
            .iter()
            .filter(|row| row.is_ours() && is_at(&row.base_path, &name.path))
            .map(|row| row.id.as_str())
            .collect();
        if ours.is_empty() && rows.iter().any(|row| is_at(&row.base_path, &name.path)) {
            continue;
        }
        locked
            .change
            .transaction(|rows| ours.iter().try_for_each(|id| rows.delete_base(id)))?;
        durable::unlink(&name.path)?;
    }
    Ok(())
}

/// Recovers the directories under `snapshots/` that have no row.
fn recover_snapshot_dirs(locked: &mut LockedBox<'_>) -> Result<()> {
    let rows = locked.snapshots()?;
    let rows = with_layers(&rows);
    let snapshots = locked.store.home().snapshots_dir(&locked.record.id);
    for name in names_in(&snapshots)? {
        let dir = snapshots.join(&name);
        let is_marked = dir.join(UNRECORDED).exists();
        if is_recorded(&rows, &dir) {
            durable::unlink(&dir.join(UNRECORDED))?;
            continue;
        }
        // Beside a runtime we make directories under a name that no snapshot can have.
        if !is_snapshot_name(&name) && !is_marked {
            // The last step of removing a snapshot may be left. Removes only an empty directory.
            if name.starts_with('.') {
                let _ = durable::remove_dir(&dir);
            }
            continue;
        }
        recover_snapshot_dir(locked, &name)?;
    }
    Ok(())
}

/// Returns whether one of these rows of a box belongs to a directory below its `snapshots/`.
pub fn has_row(rows: &[SnapshotRecord], dir: &Path) -> bool {
    is_recorded(&with_layers(rows), dir)
}

/// Returns the rows with the resolved paths of their layers.
fn with_layers(rows: &[SnapshotRecord]) -> Vec<(&SnapshotRecord, PathBuf)> {
    let layer = |row: &SnapshotRecord| {
        let recorded = row.base_path().unwrap_or_default();
        resolve(Path::new(&recorded)).unwrap_or_default()
    };
    rows.iter().map(|row| (row, layer(row))).collect()
}

fn is_recorded(rows: &[(&SnapshotRecord, PathBuf)], dir: &Path) -> bool {
    let is_marked = dir.join(UNRECORDED).exists();
    let name = dir.file_name().and_then(|name| name.to_str());
    rows.iter().any(|(row, layer)| {
        // A snapshot that replaced this one has its name, and another directory.
        let is_elsewhere = || dir.parent().is_some_and(|all| layer.starts_with(all));
        let has_name = name == Some(row.name.as_str());
        layer.starts_with(dir) || (has_name && !(is_marked && is_elsewhere()))
    })
}

/// Recovers one directory under `snapshots/` that has no row, in this order:
///
/// * A header names its layer, and it is not marked: BoxLite completed this snapshot on disk, so it
///   gets its row.
/// * It is marked, or its layer has another name: an import, rename, deletion or snapshot of ours
///   was cut off, or a deleted snapshot was left beside a runtime. The directory is removed. If
///   BoxLite restored the deleted snapshot at that moment, its layer is adopted first.
/// * Neither: it stays where it is.
fn recover_snapshot_dir(locked: &mut LockedBox<'_>, name: &str) -> Result<()> {
    let home = locked.store.home();
    let path = home.snapshot_disk(&locked.record.id, name);
    let dir = home.snapshots_dir(&locked.record.id).join(name);
    let mark = dir.join(UNRECORDED);
    if !path.exists() {
        if mark.exists() {
            durable::unlink(&mark)?;
        }
        // Removes only an empty directory.
        let _ = durable::remove_dir(&dir);
        return Ok(());
    }
    let layers = locked.layers()?;
    let is_read = layers.readers_of(&path).next().is_some();
    if is_read && !mark.exists() && is_snapshot_name(name) {
        let virtual_size = Header::open(&path)?.map_or(0, |header| header.virtual_size);
        adopt(locked, &path)?;
        let new = NewSnapshotIdentity::taken_now(name)?;
        record_snapshot(locked, &new, &path, virtual_size)?;
        locked.store.events().info(&format!(
            "box {}: recorded snapshot {name}, which BoxLite had completed without a row",
            display_name(&locked.record)
        ));
    } else if mark.exists() || has_another_name(&layers, &path)? {
        if is_read {
            adopt(locked, &path)?;
        }
        durable::unlink(&path)?;
        durable::unlink(&mark)?;
        durable::remove_dir(&dir)?;
    }
    Ok(())
}

fn is_at(row_path: &str, path: &Path) -> bool {
    resolve(Path::new(row_path)).is_ok_and(|resolved| resolved == path)
}

fn has_another_name(layers: &LayerGraph, path: &Path) -> Result<bool> {
    let id = FileId::at(path)?;
    Ok(layers.names_of(id).any(|name| name.path != path))
}
