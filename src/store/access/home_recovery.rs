//! Recovery of all boxes of a home, and reclaiming of what is no longer needed.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;

use crate::exports::display_name;
use crate::files::durable;
use crate::files::listing::names_in;
use crate::files::markers::UNRECORDED;
use crate::home::{Activity, BaseRecord, Change};
use crate::store::Store;
use crate::store::access::lock::refuse_foreign_paths_in;
use crate::store::access::locked_box::LockedBox;
use crate::store::access::path_spelling::put_paths_right;
use crate::store::access::recovery::recover_box;
use crate::store::kept::entries::{put_back_kept, remove_torn, remove_undone};
use crate::store::layers::collect::{free_bases, free_unreached};
use crate::store::layers::put_back::{put_back_bases, tidy_spares};
use crate::store::layers::references::drop_leftover_refs;
use crate::{Context, Result};

/// Recovers all idle boxes, then frees everything in the home that is no longer needed.
///
/// # Errors
/// EBUSY when a runtime holds the lock, EROFS, EIO.
pub fn free_unneeded(store: &Store) -> Result<()> {
    put_paths_right(store)?;
    let change = store.home().change()?;
    durable::sync_unflushed()?;
    recover_home(store, change, true)
}

/// Recovers all idle boxes under the lock that `change` holds, then frees bases that are no longer
/// needed. With `thorough`, this includes bases that BoxLite made from a box and would keep until
/// the box is removed.
///
/// # Errors
/// EIO, or an error of the database. A box that cannot be recovered is logged and left as it is.
pub fn recover_home(store: &Store, mut change: Change<'_>, thorough: bool) -> Result<()> {
    remove_unrecorded(store, &change)?;
    remove_torn(store)?;
    remove_undone(store, None)?;
    let mut boxes = change.boxes()?;
    let Some(first) = boxes.pop() else {
        if !store.home().kept_ids()?.is_empty() {
            let layers = store.layers.scan()?;
            put_back_bases(store, &mut change, &layers)?;
        }
        drop_rows_without_files(store, &mut change)?;
        put_back_kept(store, &mut change)?;
        free_unreached(store, &mut change)?;
        return tidy_spares(store, &change);
    };
    boxes.push(first.clone());
    let mut locked = LockedBox::new(store, change, first);
    // One scan before recovery and one after it serve all boxes: the lock is held.
    let mut layers = store.layers.scan()?;
    if boxes
        .iter()
        .all(|record| store.exports.disks.is_at_home(record))
        && put_back_bases(store, &mut locked.change, &layers)? > 0
    {
        layers = store.layers.scan()?;
    }
    let mut all_are_at_home = true;
    let mut recovered = Vec::new();
    for record in boxes {
        locked.record = record;
        if let Err(error) = refuse_foreign_paths_in(&locked, &layers) {
            all_are_at_home = false;
            store.events().info(&error.to_string());
            continue;
        }
        if store.home().activity(&locked.record) != Activity::Idle {
            continue;
        }
        match recover_box(&mut locked) {
            Ok(()) => recovered.push(locked.record.clone()),
            Err(error) => {
                let name = display_name(&locked.record);
                store
                    .events()
                    .info(&format!("recovery of box {name} failed: {error}"));
            }
        }
    }
    if !all_are_at_home {
        // Paths in rows and headers may name files of another home.
        return Ok(());
    }
    let layers = store.layers.scan()?;
    let mut unreferenced = BTreeSet::new();
    let mut refs = locked.change.refs()?;
    let bases = locked.change.bases()?.into_iter();
    let bases: HashMap<String, BaseRecord> = bases.map(|row| (row.id.clone(), row)).collect();
    for record in recovered {
        let referred = refs.remove(&record.id).unwrap_or_default();
        let referred = referred.iter().filter_map(|id| bases.get(id).cloned());
        locked.record = record;
        let dropped = drop_leftover_refs(&mut locked, &layers, referred.collect(), thorough)?;
        unreferenced.extend(dropped.into_iter().map(|row| row.id));
    }
    drop_rows_without_files(store, &mut locked.change)?;
    put_back_kept(store, &mut locked.change)?;
    // BoxLite frees a base of its own with the last box that refers to it. If we removed that box
    // beside a runtime, the base was left.
    let boxes: HashSet<String> = locked.change.boxes()?.into_iter().map(|it| it.id).collect();
    let is_of_no_box =
        |row: &BaseRecord| row.kind != "rootfs" && !boxes.contains(&row.source_box_id);
    free_bases(store, &mut locked.change, &|row| {
        row.is_ours() || unreferenced.contains(&row.id) || is_of_no_box(row)
    })?;
    tidy_spares(store, &locked.change)
}

/// Finishes or undoes the making of boxes that a crash cut off. A marked directory without a row is
/// removed; one with a row loses its mark. A directory that has neither row nor mark is not ours:
/// it stays for BoxLite or the user.
fn remove_unrecorded(store: &Store, change: &Change<'_>) -> Result<()> {
    for id in names_in(&store.home().boxes_dir())? {
        let dir = store.home().box_dir(&id);
        let mark = dir.join(UNRECORDED);
        if !mark.exists() {
            continue;
        }
        match change.box_by_id(&id) {
            Ok(_) => durable::unlink(&mark)?,
            Err(error) if error.errno() == libc::ENOENT => {
                store
                    .events()
                    .info(&format!("removed the unfinished box {id}"));
                fs::remove_dir_all(&dir).context(|| format!("cannot remove {}", dir.display()))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Deletes the rows of our own bases whose file is missing and that no header names.
fn drop_rows_without_files(store: &Store, change: &mut Change<'_>) -> Result<()> {
    let layers = store.layers.scan()?;
    let orphaned: Vec<String> = change
        .bases()?
        .into_iter()
        .filter(|row| {
            let Ok(path) = store.layers.path_of_base(row) else {
                return false;
            };
            let is_absent = || {
                fs::symlink_metadata(&path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
            };
            row.is_ours()
                && layers.at(&path).is_none()
                && is_absent()
                && path.parent() == Some(store.home().bases_dir().as_path())
                && layers.damaged().is_none()
                && layers.readers_of(&path).next().is_none()
        })
        .map(|row| row.id)
        .collect();
    if orphaned.is_empty() {
        return Ok(());
    }
    change.transaction(|rows| orphaned.iter().try_for_each(|id| rows.delete_base(id)))
}
