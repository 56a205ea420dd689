//! The files of entries, and what recovery does with them.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use crate::disk::FileId;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::workspace::discard;
use crate::home::base_id;
use crate::home::{Change, WHY};
use crate::store::Store;
use crate::store::layers::bases::new_base;
use crate::store::layers::graph::Role;
use crate::{Context, Result};

/// The name of an entry's rows while it is being removed.
const GONE: &str = "why.json.gone";

/// Removes the files of an entry. Its rows lose their name first, durably: from then on it is no
/// entry, and the rest is removed by recovery if a crash leaves it. If that can't be flushed, the name
/// comes back, so that the entry can be removed again.
///
/// # Errors
/// Those of system calls.
pub fn remove_entry(store: &Store, id: &str) -> Result<()> {
    let dir = store.home().undo_dir().join(id);
    let (why, gone) = (dir.join(WHY), dir.join(GONE));
    match fs::rename(&why, &gone) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        // A name can be removed from a full file system, where another may have no room.
        Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            durable::unlink(&why)?;
        }
        renamed => {
            renamed.context(|| format!("cannot remove {}", why.display()))?;
            durable::sync_dir(&dir).inspect_err(|_| {
                let _ = fs::rename(&gone, &why);
            })?;
        }
    }
    crash_point("undo.unrecorded");
    discard(&dir);
    durable::count_change();
    crash_point("undo.removed");
    // What a power loss brings back is no entry.
    let _ = durable::sync_dir(&store.home().undo_dir());
    Ok(())
}

/// Removes what is left of entries that were removed.
///
/// # Errors
/// Those of reading the directory.
pub fn remove_torn(store: &Store) -> Result<()> {
    for id in store.home().kept_ids()? {
        let dir = store.home().undo_dir().join(&id);
        let why = fs::symlink_metadata(dir.join(WHY));
        if why.is_err_and(|e| e.kind() == ErrorKind::NotFound) {
            discard(&dir);
        }
    }
    Ok(())
}

/// Removes the entries of which nothing is gone: those of one box, or of all. Their change was cut
/// off, or they were had back. Must be called under the lock.
///
/// # Errors
/// Those of reading the catalog and of removing files.
pub fn remove_undone(store: &Store, box_id: Option<&str>) -> Result<()> {
    let catalog = store.home().catalog()?;
    for entry in catalog.kept() {
        let is_asked = box_id.is_none_or(|id| entry.box_id() == id);
        if is_asked && !store.home().is_gone(entry, &catalog) {
            remove_entry(store, entry.id())?;
        }
    }
    Ok(())
}

/// Puts disks of entries back among the bases whose name there was lost, with a row: without it, an
/// older boxlitefs would not know that they are read, and free what they read.
///
/// Order: the rows, the names. A crash leaves rows of ours without a file, which recovery drops.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn put_back_kept(store: &Store, change: &mut Change<'_>) -> Result<()> {
    if store.home().kept_ids()?.is_empty() {
        return Ok(());
    }
    let layers = store.layers.scan()?;
    let mut lost: Vec<(PathBuf, FileId)> = Vec::new();
    for file in layers.files() {
        let is_elsewhere = || {
            let mut names = layers.names_of(file.id);
            names.any(|name| matches!(name.role, Role::Base { .. } | Role::Live { .. }))
        };
        let is_kept = matches!(file.role, Role::Kept { .. }) && file.damaged.is_none();
        if is_kept && !lost.iter().any(|(_, id)| *id == file.id) && !is_elsewhere() {
            lost.push((file.path.clone(), file.id));
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    let mut bases = Vec::new();
    for (file, _) in &lost {
        let base = store.home().base_disk(&base_id()?);
        bases.push((new_base(&base, file)?, base));
    }
    change.transaction(|rows| bases.iter().try_for_each(|(row, _)| rows.insert_base(row)))?;
    crash_point("undo.completed");
    for ((file, _), (_, base)) in lost.iter().zip(&bases) {
        durable::link(file, base)?;
        store.spares.keep(base);
    }
    Ok(())
}
