//! Before every change: the lock, fresh rows, recovery, and everything that refuses it.

use std::path::{Path, PathBuf};

use crate::exports::display_name;
use crate::files::durable;
use crate::home::{Activity, Change};
use crate::store::Store;
use crate::store::access::locked_box::LockedBox;
use crate::store::access::path_spelling::{has_right_paths, put_paths_right, refuse_mounted_twice};
use crate::store::access::recovery::recover_box;
use crate::store::access::shared::{cloned_just_now, refuse_pending, refuse_unsettled};
use crate::store::layers::adopt::{adopt_frozen_chains, adopt_own_chains};
use crate::store::layers::bases::new_base;
use crate::store::layers::graph::LayerGraph;
use crate::store::layers::put_back::put_back_bases;
use crate::{Error, Result};

/// Takes the lock and makes the box ready for a change. Keep it short: the lock is held until
/// the value is dropped.
///
/// # Errors
/// EBUSY when a runtime holds the lock or the box is active, EROFS on a read-only mount, EPERM
/// in a copied home or when a chain leaves the home.
pub fn lock_box<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    let mut locked = lock_unprepared(store, box_id)?;
    make_ready(&mut locked)?;
    Ok(locked)
}

/// Likewise, for a change that is safe beside a BoxLite runtime: with the option `shared` it is made
/// also while one has the lock.
///
/// # Errors
/// As [`Store::prepare`]; EBUSY also when BoxLite is at work on the box.
pub fn lock_shared<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    let mut locked = lock_shared_unprepared(store, box_id)?;
    make_ready(&mut locked)?;
    Ok(locked)
}

/// Likewise, for a box of which something is only read: that may run.
///
/// # Errors
/// As [`Store::prepare_beside`].
pub fn lock_source<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    let change = begin_shared_change(store)?;
    let record = change.box_by_id(box_id)?;
    let mut locked = LockedBox {
        store,
        change,
        record,
    };
    make_source_ready(&mut locked)?;
    Ok(locked)
}

/// As [`Store::look_at_box`], for such a change.
pub fn lock_shared_unprepared<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    look_within(store, begin_shared_change(store)?, box_id)
}

/// Takes the lock and makes sure that the box may be changed, without making it ready: enough for
/// what touches no layer.
///
/// # Errors
/// As [`Store::prepare`].
pub fn lock_unprepared<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    look_within(store, begin_exclusive_change(store)?, box_id)
}

fn look_within<'s>(store: &'s Store, change: Change<'s>, box_id: &str) -> Result<LockedBox<'s>> {
    let record = change.box_by_id(box_id)?;
    let locked = LockedBox {
        store,
        change,
        record,
    };
    refuse_unfit(&locked)?;
    Ok(locked)
}

/// Makes sure that the box may be changed, and stays so.
fn refuse_unfit(locked: &LockedBox<'_>) -> Result<()> {
    locked.change.watch(&locked.record)?;
    locked.store.exports.disks.refuse_active(&locked.record)?;
    refuse_strangers(locked)
}

fn make_ready(locked: &mut LockedBox<'_>) -> Result<()> {
    match locked.change.is_shared() {
        true => refuse_unsettled(locked)?,
        false => {
            recover_box(locked)?;
            put_back_own_bases(locked)?;
        }
    }
    adopt_own_chains(locked)?;
    complete_refs(locked)
}

/// Goes on with another box, which is made ready too, under the same lock.
///
/// # Errors
/// As [`Store::prepare`].
pub fn switch_to(locked: &mut LockedBox<'_>, box_id: &str) -> Result<()> {
    switch_unprepared(locked, box_id)?;
    make_ready(locked)
}

/// Likewise with one of which something is only read.
///
/// # Errors
/// As [`Store::prepare_source`].
pub fn switch_to_source(locked: &mut LockedBox<'_>, box_id: &str) -> Result<()> {
    locked.record = locked.change.box_by_id(box_id)?;
    make_source_ready(locked)
}

/// A box that runs is left alone: neither recovered, nor is the header of its disk touched.
fn make_source_ready(locked: &mut LockedBox<'_>) -> Result<()> {
    locked.change.watch(&locked.record)?;
    refuse_strangers(locked)?;
    if locked.store.home().activity(&locked.record) == Activity::Idle {
        return make_ready(locked);
    }
    if locked.store.home().vm_process(&locked.record).is_none() {
        return locked.store.exports.disks.refuse_active(&locked.record);
    }
    refuse_pending(locked)?;
    adopt_frozen_chains(locked)?;
    complete_refs(locked)
}

/// Goes on with another box, no layer of which is touched.
///
/// # Errors
/// ENOENT; beside a runtime as [`Store::prepare`].
pub fn switch_to_target(locked: &mut LockedBox<'_>, box_id: &str) -> Result<()> {
    if locked.change.is_shared() {
        switch_unprepared(locked, box_id)?;
        return refuse_unsettled(locked);
    }
    locked.record = locked.change.box_by_id(box_id)?;
    Ok(())
}

fn switch_unprepared(locked: &mut LockedBox<'_>, box_id: &str) -> Result<()> {
    locked.record = locked.change.box_by_id(box_id)?;
    refuse_unfit(locked)
}

/// EPERM when rows or headers of the box speak of another home.
pub fn refuse_strangers(locked: &LockedBox<'_>) -> Result<()> {
    locked.store.exports.disks.refuse_copied(&locked.record)?;
    locked.store.home().refuse_linked_box(&locked.record.id)?;
    refuse_foreign_layers(locked)
}

/// Likewise, by headers that were read already.
pub fn refuse_strangers_in(locked: &LockedBox<'_>, layers: &LayerGraph) -> Result<()> {
    locked.store.exports.disks.refuse_copied(&locked.record)?;
    locked.store.home().refuse_linked_box(&locked.record.id)?;
    let tops = locked.tops()?;
    let mut paths = tops.iter().flat_map(|top| layers.chain(top));
    paths
        .find(|path| !locked.store.home().contains(path))
        .map_or(Ok(()), |outside| Err(outside_home(locked, outside)))
}

/// EPERM when a chain leaves the home.
fn refuse_foreign_layers(locked: &LockedBox<'_>) -> Result<()> {
    for chain in locked.chains()? {
        if let Some(outside) = chain
            .iter()
            .find(|path| !locked.store.home().contains(path))
        {
            return Err(outside_home(locked, outside));
        }
    }
    Ok(())
}

fn outside_home(locked: &LockedBox<'_>, layer: &Path) -> Error {
    Error::new(
        libc::EPERM,
        format!(
            "the disk of box {} reads from {}, outside this home; nothing is changed, for that file may be another home's. Export the box and import it again to make it whole",
            display_name(&locked.record),
            layer.display()
        ),
    )
}

/// Puts bases back that were deleted, where a chain of the box can't be followed without.
fn put_back_own_bases(locked: &mut LockedBox<'_>) -> Result<()> {
    let is_broken = |top: &PathBuf| {
        crate::disk::chain_paths(top).is_err_and(|error| error.errno() == libc::ENOENT)
    };
    if locked.tops()?.iter().any(is_broken) {
        let layers = locked.layers()?;
        put_back_bases(locked.store, &mut locked.change, &layers)?;
    }
    Ok(())
}

/// Makes every base in any chain of the box referred to by the box, so that BoxLite does not
/// collect it (it goes by references, and its own are incomplete). A base without a row gets
/// one of ours: a crash inside BoxLite's clone leaves such.
fn complete_refs(locked: &mut LockedBox<'_>) -> Result<()> {
    let bases_dir = locked.store.home().bases_dir();
    let mut reached: Vec<PathBuf> = locked.chains()?.into_iter().flatten().collect();
    reached.retain(|path| path.parent() == Some(bases_dir.as_path()));
    reached.sort();
    reached.dedup();
    let referred = locked.change.refs_of(&locked.record.id)?;
    let mut new_bases = Vec::new();
    let mut new_refs = Vec::new();
    for path in reached {
        let id = match locked.base_at(&path)? {
            Some(row) => {
                // One of an older version has no spare name yet.
                if row.is_ours() {
                    locked.store.spares.keep(&path);
                }
                row.id
            }
            None if locked.change.is_shared() => {
                return Err(cloned_just_now(locked, &path));
            }
            None => {
                let base = new_base(&path, &path)?;
                let id = base.id.clone();
                new_bases.push(base);
                id
            }
        };
        if !referred.contains(&id) {
            new_refs.push(id);
        }
    }
    if new_refs.is_empty() {
        return Ok(());
    }
    let box_id = locked.record.id.clone();
    locked.change.transaction(|rows| {
        new_bases
            .iter()
            .try_for_each(|base| rows.insert_base(base))?;
        new_refs
            .iter()
            .try_for_each(|base| rows.insert_ref(base, &box_id))
    })
}

fn begin_change(store: &Store) -> Result<()> {
    store.refuse_read_only()?;
    store.shared.foreground.touch();
    // A crash leaves it, by which the next mount knows of the crash. Where it can't be made, the disk
    // may be full, and what comes now may be what makes room.
    let _ = store.workspace().make();
    Ok(())
}

/// The right to change the home, with nobody else in it.
///
/// # Errors
/// EROFS, EBUSY, EIO while the disk fails.
pub fn begin_exclusive_change(store: &Store) -> Result<Change<'_>> {
    begin_change(store)?;
    let change = put_paths_right(store).and_then(|()| store.home().change());
    let change = change.map_err(|error| {
        match store.access.is_shared && error.errno() == libc::EBUSY {
            true => Error::busy(format!(
                "{error}. Beside it, the option shared allows snapshots, clones, imports and restores only"
            )),
            false => error,
        }
    })?;
    durable::sync_unflushed()?;
    Ok(change)
}

/// The right to change the home; with the option `shared`, also while a BoxLite runtime has it.
///
/// # Errors
/// EROFS, EBUSY, EIO while the disk fails.
pub fn begin_shared_change(store: &Store) -> Result<Change<'_>> {
    match store.access.is_shared {
        true => {
            begin_change(store)?;
            let mut change = store.home().change_shared()?;
            if !change.is_shared() && !has_right_paths(store) {
                drop(change);
                put_paths_right(store)?;
                change = store.home().change_shared()?;
            }
            refuse_mounted_twice(store, &change)?;
            durable::sync_unflushed()?;
            Ok(change)
        }
        false => begin_exclusive_change(store),
    }
}
