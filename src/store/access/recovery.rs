//! Recovery by looking at files and rows: what a crash of ours, or of BoxLite, left is undone or
//! finished the way the table in `docs/design/layers.md` says. Always under the lock, and only for a box
//! that is not running.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::disk::{FileId, Header};
use crate::exports::display_name;
use crate::files::durable;
use crate::files::listing::{names_in, resolve};
use crate::files::markers::UNRECORDED;
use crate::home::{is_snapshot_name, snapshot_id};
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::adopt::adopt;
use crate::store::layers::graph::{LayerGraph, Role};
use crate::store::layers::snapshot_place::record_snapshot;
use crate::{Error, Result};

/// Brings the box into a state that a change may start from.
pub fn recover_box(locked: &mut LockedBox<'_>) -> Result<()> {
    // It has a row.
    durable::unlink(
        &locked
            .store
            .home()
            .box_dir(&locked.record.id)
            .join(UNRECORDED),
    )?;
    honour_pending(locked)?;
    undo_freeze(locked)?;
    settle_snapshot_directories(locked)
}

/// BoxLite's own crash marker. With its snapshot half made, the live disk lies in the
/// snapshot's directory and has to come back (litebox/local_snapshot.rs does the same at the
/// next start of a runtime); a snapshot that was finished on disk is settled further down.
fn honour_pending(locked: &mut LockedBox<'_>) -> Result<()> {
    let home = &locked.store.home();
    let marker = home.pending_marker(&locked.record.id);
    let Ok(text) = fs::read_to_string(&marker) else {
        return Ok(());
    };
    let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    if value["copy"] == Value::Bool(true) {
        // Its half-made copy is BoxLite's to remove: only it knows whether the copy is whole.
        return Err(Error::busy(format!(
            "BoxLite was copying a snapshot of box {} when it ended; start BoxLite once, it cleans up",
            display_name(&locked.record)
        )));
    }
    let live = home.live_disk(&locked.record.id);
    if !live.exists() {
        let taken = pending_layer(locked, &value).ok_or_else(|| {
            Error::busy(format!(
                "BoxLite left box {} in the middle of a snapshot ({}); start BoxLite once, it recovers it",
                display_name(&locked.record),
                marker.display()
            ))
        })?;
        durable::rename(&taken, &live)?;
        if let Some(dir) = taken.parent() {
            // Anything else in it is not ours to remove.
            let _ = durable::remove_dir(dir);
        }
        locked.store.events().info(&format!(
            "box {}: brought back the disk from a snapshot that BoxLite had not finished",
            display_name(&locked.record)
        ));
    }
    durable::unlink(&marker)
}

/// Where BoxLite's marker says the live disk went, if that is in this box and is no snapshot.
fn pending_layer(locked: &LockedBox<'_>, marker: &Value) -> Option<PathBuf> {
    let dir = resolve(Path::new(marker["snapshot_dir"].as_str()?)).ok()?;
    let snapshots = locked.store.home().snapshots_dir(&locked.record.id);
    let name = dir.file_name()?.to_str()?.to_owned();
    let has_row = locked.snapshots().ok()?.iter().any(|row| row.name == name);
    let layer = dir.join("disk.qcow2");
    (dir.parent() == Some(snapshots.as_path()) && !has_row && layer.is_file()).then_some(layer)
}

/// A live disk has one name. A second one in `bases/` is a freeze that did not come to its end:
/// the row, the references and the name go. Never finished: BoxLite may have let a guest write
/// to it since.
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
    // Made last, but without a flush: it may be on disk without what came before it.
    for spare in layers.spares().all().iter().filter(|it| it.id == id) {
        durable::unlink(&spare.path)?;
    }
    for name in layers.names_of(id) {
        if !matches!(name.role, Role::Base { .. }) {
            continue;
        }
        if layers.readers_of(&name.path).next().is_some() {
            return Err(Error::damaged(format!(
                "{} is the live disk of box {} and others read from it; nothing is changed. Stop using the box and export what reads from it",
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

/// Directories under `snapshots/` that have no row.
fn settle_snapshot_directories(locked: &mut LockedBox<'_>) -> Result<()> {
    let rows = locked.snapshots()?;
    let snapshots = locked.store.home().snapshots_dir(&locked.record.id);
    for name in names_in(&snapshots)? {
        let has_row = rows.iter().any(|row| {
            let recorded = row.base_path().unwrap_or_default();
            let resolved = resolve(Path::new(&recorded));
            row.name == name || resolved.is_ok_and(|p| p.starts_with(snapshots.join(&name)))
        });
        if has_row {
            durable::unlink(&snapshots.join(&name).join(UNRECORDED))?;
            continue;
        }
        // One of ours that was made beside a runtime has a name that no snapshot can have.
        let is_marked = snapshots.join(&name).join(UNRECORDED).exists();
        if !is_snapshot_name(&name) && !is_marked {
            continue;
        }
        settle_snapshot_directory(locked, &name)?;
    }
    Ok(())
}

/// Read by path: a snapshot BoxLite finished on disk, it gets its row. Its layer named
/// elsewhere too: ours, being made or being deleted, it goes. Marked: an import, a rename or a
/// deletion of ours that did not come to its end, likewise. None of these: left where it is.
fn settle_snapshot_directory(locked: &mut LockedBox<'_>, name: &str) -> Result<()> {
    let home = &locked.store.home();
    let path = home.snapshot_disk(&locked.record.id, name);
    let dir = home.snapshots_dir(&locked.record.id).join(name);
    let mark = dir.join(UNRECORDED);
    if !path.exists() {
        if mark.exists() {
            durable::unlink(&mark)?;
        }
        // Only an empty directory goes.
        let _ = durable::remove_dir(&dir);
        return Ok(());
    }
    let layers = locked.layers()?;
    if layers.readers_of(&path).next().is_some() && is_snapshot_name(name) {
        let virtual_size = Header::open(&path)?.map_or(0, |header| header.virtual_size);
        adopt(locked, &path)?;
        record_snapshot(locked, &snapshot_id()?, name, &path, virtual_size, None)?;
        locked.store.events().info(&format!(
            "box {}: recorded snapshot {name}, which BoxLite had made but not recorded",
            display_name(&locked.record)
        ));
    } else if mark.exists() || has_another_name(&layers, &path)? {
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
