//! What happens before every change: take the lock, read fresh rows, check whether the box may be
//! changed, and recover it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::disk::chain_paths;
use crate::exports::{Source, display_name};
use crate::files::durable;
use crate::home::{
    Activity, BaseRecord, BoxRecord, Change, VmProcess, is_kept_id, reject_linked_box,
};
use crate::store::Store;
use crate::store::access::beside_runtime::{cloned_just_now, refuse_pending, refuse_unsettled};
use crate::store::access::locked_box::LockedBox;
use crate::store::access::path_spelling::{has_right_paths, put_paths_right, refuse_mounted_twice};
use crate::store::access::recovery::recover_box;
use crate::store::layers::adopt::{adopt_frozen_chains, adopt_own_chains};
use crate::store::layers::bases::new_base;
use crate::store::layers::chains::Chains;
use crate::store::layers::graph::LayerGraph;
use crate::store::layers::put_back::put_back_bases;
use crate::{Error, Result};

/// Takes the lock and makes the box ready for a change. The lock is held until the returned value
/// is dropped, so keep the change short.
///
/// # Errors
/// EBUSY when a runtime holds the lock or the box is active, EROFS on a read-only mount, EPERM
/// in a copied home or when a chain leaves the home.
pub fn lock_box<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    let mut locked = lock_unprepared(store, box_id)?;
    make_ready(&mut locked)?;
    Ok(locked)
}

/// Makes the box ready for a change that is safe beside a BoxLite runtime. Unless the mount has the
/// option `exclusive`, this succeeds even while a runtime holds the lock.
///
/// # Errors
/// Those of [`lock_box`]. Beside a runtime also EBUSY while BoxLite is changing the box, or when
/// the box needs recovery first.
pub fn lock_shared<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    shared_or_exclusive(store, &|change| {
        let mut locked = lock_within(store, change, box_id)?;
        make_ready(&mut locked)?;
        Ok(locked)
    })
}

/// Locks a box for a change that is safe beside a runtime. If that is refused although no runtime
/// has the home, locks it for a change with the runtime lock: the box needs recovery, or has no
/// lock file of its own.
fn shared_or_exclusive<'s>(
    store: &'s Store,
    lock: &dyn Fn(Change<'s>) -> Result<LockedBox<'s>>,
) -> Result<LockedBox<'s>> {
    for _ in 0..SHARED_TRIES {
        let change = begin_shared_change(store)?;
        let is_alone = change.is_alone();
        match lock(change) {
            Err(error) if is_alone && error.errno() == libc::EBUSY => {
                if !error.is_for_a_moment() {
                    break;
                }
                // Perhaps a runtime is starting, which makes the lock files again.
                std::thread::sleep(PAUSE);
            }
            ended => return ended,
        }
    }
    // If a runtime has started meanwhile, the next try is beside it.
    lock(begin_exclusive_change(store).map_err(Error::for_a_moment)?)
}

/// Makes a source box ready, as [`lock_shared`] does. The change only reads from the box, so it may
/// be running.
///
/// # Errors
/// Those of [`lock_shared`].
pub fn lock_source<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    shared_or_exclusive(store, &|change| {
        let mut locked = box_within(store, change, box_id)?;
        make_source_ready(&mut locked)?;
        Ok(locked)
    })
}

fn box_within<'s>(store: &'s Store, change: Change<'s>, box_id: &str) -> Result<LockedBox<'s>> {
    let record = record_in(store, &change, box_id)?;
    Ok(LockedBox::new(store, change, record))
}

/// Refuses to change what is kept to be had back.
fn refuse_kept(box_id: &str) -> Result<()> {
    if !is_kept_id(box_id) {
        return Ok(());
    }
    Err(Error::new(
        libc::EPERM,
        "what is kept stays as it is; move it to where it was, or copy it",
    ))
}

/// Returns the row of a box, or that of an entry, which is a box that only can be read.
fn record_in(store: &Store, change: &Change<'_>, box_id: &str) -> Result<BoxRecord> {
    if !is_kept_id(box_id) {
        return change.box_by_id(box_id);
    }
    let catalog = store.home().catalog()?;
    let record = catalog.box_by_id(box_id).cloned();
    record.ok_or_else(|| Error::new(libc::ENOENT, "that is no longer kept"))
}

/// Checks that the box may be changed by a change that is safe beside a runtime, as far as its live
/// disk tells: the change itself looks at all its layers.
///
/// # Errors
/// Those of [`lock_shared`].
pub fn lock_shared_unprepared<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    shared_or_exclusive(store, &|change| {
        refuse_kept(box_id)?;
        let locked = box_within(store, change, box_id)?;
        refuse_unfit_disk(&locked)?;
        Ok(locked)
    })
}

/// Takes the lock and checks that the box may be changed, without recovering it. This is enough for
/// a change that touches no layer.
///
/// # Errors
/// Those of [`lock_box`].
pub fn lock_unprepared<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    lock_within(store, begin_exclusive_change(store)?, box_id)
}

fn lock_within<'s>(store: &'s Store, change: Change<'s>, box_id: &str) -> Result<LockedBox<'s>> {
    refuse_kept(box_id)?;
    let locked = box_within(store, change, box_id)?;
    refuse_unfit(&locked)?;
    Ok(locked)
}

/// Refuses a box that may not be changed. Beside a runtime, first keeps the runtime from starting
/// the box, so that the answer stays true.
///
/// # Errors
/// EBUSY, EPERM.
pub fn refuse_unfit(locked: &LockedBox<'_>) -> Result<()> {
    refuse_in_use(locked)?;
    refuse_foreign_paths(locked)
}

/// Refuses a box as [`refuse_unfit`] does. Of its layers, it looks at those of the live disk alone.
fn refuse_unfit_disk(locked: &LockedBox<'_>) -> Result<()> {
    refuse_in_use(locked)?;
    refuse_foreign_rows(locked)?;
    let chain = locked.live().and_then(|live| chain_paths(&live).ok());
    refuse_outside(locked, chain.iter().flatten().map(PathBuf::as_path))
}

fn refuse_in_use(locked: &LockedBox<'_>) -> Result<()> {
    locked.change.watch(&locked.record)?;
    locked.store.exports.disks.refuse_active(&locked.record)
}

/// Recovers the box, and completes its layers and references. Recovery needs the runtime lock,
/// which is taken for it if no runtime has the home.
///
/// # Errors
/// Those of [`lock_box`].
pub fn make_ready(locked: &mut LockedBox<'_>) -> Result<()> {
    if locked.change.is_shared() {
        let ready = refuse_unsettled(locked).and_then(|()| complete(locked));
        match ready {
            Err(error) if needs_lock(locked, &error) && locked.change.take_lock()? => {
                locked.record = locked.change.box_by_id(&locked.record.id)?;
            }
            ended => return ended,
        }
    }
    recover_box(locked)?;
    put_back_own_bases(locked)?;
    complete(locked)
}

/// Returns whether a box was refused that could be recovered, since no runtime has the home.
fn needs_lock(locked: &LockedBox<'_>, error: &Error) -> bool {
    error.errno() == libc::EBUSY && !error.is_for_a_moment() && locked.change.is_alone()
}

/// Completes the layers and references of a box that needs no recovery.
fn complete(locked: &mut LockedBox<'_>) -> Result<()> {
    let chains = adopt_own_chains(locked)?;
    complete_refs(locked, &chains)
}

/// Switches to another box under the same lock and makes it ready.
///
/// # Errors
/// Those of [`lock_box`].
pub fn switch_to(locked: &mut LockedBox<'_>, box_id: &str) -> Result<()> {
    locked.record = locked.change.box_by_id(box_id)?;
    refuse_unfit(locked)?;
    make_ready(locked)
}

/// Switches to a source box under the same lock. The change only reads from it, so it may be
/// running.
///
/// # Errors
/// Those of [`lock_source`].
pub fn switch_to_source(locked: &mut LockedBox<'_>, box_id: &str) -> Result<()> {
    locked.record = record_in(locked.store, &locked.change, box_id)?;
    make_source_ready(locked)
}

/// Makes a source box ready. A running box is not recovered, and the header of its disk is not
/// written.
fn make_source_ready(locked: &mut LockedBox<'_>) -> Result<()> {
    if is_kept_id(&locked.record.id) {
        // Its layers are bases, and nobody writes to them.
        return refuse_foreign_paths(locked);
    }
    locked.change.watch(&locked.record)?;
    refuse_foreign_paths(locked)?;
    if locked.store.home().activity(&locked.record) == Activity::Idle {
        return make_ready(locked);
    }
    if VmProcess::of(locked.store.home(), &locked.record).is_none() {
        return locked.store.exports.disks.refuse_active(&locked.record);
    }
    refuse_pending(locked)?;
    adopt_frozen_chains(locked)?;
    let chains = locked.chains()?;
    complete_refs(locked, &chains)
}

/// Switches to another box under the same lock, for a change that touches none of its layers.
///
/// # Errors
/// ENOENT; beside a runtime those of [`lock_shared`].
pub fn switch_to_target(locked: &mut LockedBox<'_>, box_id: &str) -> Result<()> {
    locked.record = locked.change.box_by_id(box_id)?;
    if locked.change.is_shared() {
        refuse_unfit_disk(locked)?;
        return match refuse_unsettled(locked) {
            Err(error) if needs_lock(locked, &error) && locked.change.take_lock()? => Ok(()),
            ended => ended,
        };
    }
    Ok(())
}

/// Refuses a box whose rows or headers name files of another home.
///
/// # Errors
/// EPERM.
pub fn refuse_foreign_paths(locked: &LockedBox<'_>) -> Result<()> {
    refuse_foreign_rows(locked)?;
    refuse_outside(locked, locked.chains()?.all())
}

fn refuse_foreign_rows(locked: &LockedBox<'_>) -> Result<()> {
    locked.store.exports.disks.refuse_copied(&locked.record)?;
    reject_linked_box(locked.store.home(), &locked.record.id)
}

/// Refuses a box as [`refuse_foreign_paths`] does, by headers that were already read.
///
/// # Errors
/// EPERM.
pub fn refuse_foreign_paths_in(locked: &LockedBox<'_>, layers: &LayerGraph) -> Result<()> {
    refuse_foreign_rows(locked)?;
    let tops = locked.tops()?;
    refuse_outside(locked, tops.iter().flat_map(|top| layers.chain(top)))
}

/// Refuses with EPERM a box if one of its layers is outside of the home.
fn refuse_outside<'p>(
    locked: &LockedBox<'_>,
    mut layers: impl Iterator<Item = &'p Path>,
) -> Result<()> {
    layers
        .find(|path| !locked.store.home().contains(path))
        .map_or(Ok(()), |outside| Err(outside_home(locked, outside)))
}

fn outside_home(locked: &LockedBox<'_>, layer: &Path) -> Error {
    Error::new(
        libc::EPERM,
        format!(
            "the disk of box {} reads from {}, outside this home. The box is not changed, because that file may belong to another home. Export the box and import it again, so that all of its layers lie in this home",
            display_name(&locked.record),
            layer.display()
        ),
    )
}

/// Restores deleted bases from their spare names where a chain of the box is broken without them.
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

/// Adds the missing references from the box to every base in `chains`, which are its own. BoxLite
/// collects bases by references, and its own are incomplete. A base without a row gets one of ours: a
/// crash inside BoxLite's clone leaves such a base.
fn complete_refs(locked: &mut LockedBox<'_>, chains: &Chains) -> Result<()> {
    let bases_dir = locked.store.home().bases_dir();
    let layers = locked.near()?;
    let rows = locked.change.bases_of(&locked.record.id)?.into_iter();
    let referred: HashMap<PathBuf, BaseRecord> = rows
        .filter_map(|row| Some((locked.store.layers.path_of_base(&row).ok()?, row)))
        .collect();
    let mut new_bases = Vec::new();
    let mut new_refs = Vec::new();
    let is_base = |path: &&Path| path.parent() == Some(bases_dir.as_path());
    for path in chains.all().filter(is_base) {
        let known = referred.get(path);
        if known.is_some_and(|row| !row.is_ours() || layers.has_spare(path)) {
            continue;
        }
        let id = match locked.base_at(path)? {
            Some(row) => {
                // A base of an older version has no spare name yet.
                if row.is_ours() {
                    locked.store.spares.keep(path);
                }
                row.id
            }
            None if locked.change.is_shared() => {
                return Err(cloned_just_now(locked, path));
            }
            None => {
                let base = new_base(path, path)?;
                let id = base.id.clone();
                new_bases.push(base);
                id
            }
        };
        if known.is_none() {
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

/// Times that a change is made again after an error that is over in a moment.
const TRIES: u32 = 30;
/// The tries before the first one that takes the runtime lock.
const PATIENT_TRIES: u32 = 15;
/// Tries to lock a box without the runtime lock, while no runtime has the home.
const SHARED_TRIES: u32 = 10;
/// The pause before it is made again: a runtime that starts takes some milliseconds for a home.
const PAUSE: Duration = Duration::from_millis(50);

/// Makes a shared change. Makes it again if a BoxLite runtime started in the middle, or changed the
/// box at the same moment. Where runtimes start all the time, it takes the runtime lock in the end.
///
/// # Errors
/// Those of `change`.
pub fn made_again<T>(store: &Store, change: &dyn Fn() -> Result<T>) -> Result<T> {
    for number in 1..TRIES {
        let insists = number > PATIENT_TRIES && number % 2 == 0;
        let insisting = insists.then(|| store.access.insist());
        match change() {
            Err(error) if error.is_for_a_moment() || (insists && error.errno() == libc::EBUSY) => {
                drop(insisting);
                std::thread::sleep(PAUSE);
            }
            ended => return ended,
        }
    }
    change()
}

/// Makes a shared change of a box or a snapshot, as [`made_again`] does. Makes it again as well where
/// a file is missing or unfinished though the rows are there: BoxLite moves a live disk before it
/// makes another, and records nothing meanwhile. A caller that gets ENOENT would take what it
/// removes for gone.
///
/// # Errors
/// Those of `change`; EBUSY for those of files that BoxLite may be moving.
pub fn made_again_on<T>(
    store: &Store,
    source: &Source,
    change: &dyn Fn() -> Result<T>,
) -> Result<T> {
    made_again(store, &|| {
        change().map_err(|error| store.exports.disks.busy_if_moving(source, error))
    })
}

fn begin_change(store: &Store) -> Result<()> {
    store.refuse_read_only()?;
    store.opened.foreground.touch();
    // A crash leaves the workspace behind, which tells the next mount of the crash. Making it fails
    // on a full disk; the change goes on, for it may be the one that frees space.
    let _ = store.workspace().make();
    Ok(())
}

/// Begins a change that needs the home exclusively: it takes the runtime lock.
///
/// # Errors
/// EROFS, EBUSY, EIO while the disk fails.
pub fn begin_exclusive_change(store: &Store) -> Result<Change<'_>> {
    begin_change(store)?;
    let change = put_paths_right(store).and_then(|()| store.home().change());
    let change = change.map_err(|error| {
        if store.access.is_shared && error.errno() == libc::EBUSY {
            Error::busy(format!(
                "{error}. Meanwhile everything else is possible but renaming boxes, editing box.json, merging and repairing"
            ))
        } else {
            error
        }
    })?;
    durable::sync_unflushed()?;
    Ok(change)
}

/// Begins a change that is safe beside a BoxLite runtime. With the option `exclusive` it takes the
/// runtime lock all the same.
///
/// # Errors
/// EROFS, EBUSY, EIO while the disk fails.
pub fn begin_shared_change(store: &Store) -> Result<Change<'_>> {
    if !store.access.is_shared || store.access.insists() {
        return begin_exclusive_change(store);
    }
    begin_change(store)?;
    let mut change = store.home().change_shared()?;
    // A large home that was just mounted has its paths put right behind.
    let is_unrecovered = store.is_unrecovered.load(Ordering::Acquire);
    if change.is_alone() && !has_right_paths(store) && !is_unrecovered {
        drop(change);
        // A runtime that started meanwhile may keep us from it.
        put_paths_right(store).map_err(Error::for_a_moment)?;
        change = store.home().change_shared()?;
    }
    refuse_mounted_twice(store, &change)?;
    durable::sync_unflushed()?;
    Ok(change)
}
