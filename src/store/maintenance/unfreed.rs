//! Frees the bases that changes of a large home have left for later.
//!
//! The home is scanned before the lock is taken, so other changes may run during the scan. A base is
//! freed if the scan found no reader and no second name of it, and if no box refers to it once the lock
//! is held. Our changes record a reference to a base before they make a file that reads it. BoxLite
//! makes no new readers of our bases: it moves files that read them, or makes overlays on layers inside
//! a box that do. The scan found these. If it missed one that BoxLite moved meanwhile, a header names a
//! file that the scan has not seen, and nothing is freed.

use std::sync::Arc;

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::home::{BaseRecord, Catalog};
use crate::store::Store;
use crate::store::access::lock::begin_shared_change;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::collect::{ScannedHome, free_bases_in, free_without_lock_in};
use crate::store::layers::references::drop_surplus_refs;
use crate::store::layers::unfreed::Freeable;

/// The most scans in a row, if something is recorded during each. After that, the caller tries again
/// later.
const SCANS: usize = 3;

/// Frees what can be freed. Returns whether nothing is left for later.
///
/// # Errors
/// EBUSY; those of system calls and of SQLite. Everything is left then.
pub fn free_unfreed(store: &Store) -> Result<bool> {
    let Some(left) = store.unfreed.take() else {
        return Ok(true);
    };
    crash_point("unfreed.taken");
    for _ in 0..SCANS {
        let freed = scan_unlocked(store).and_then(|(catalog, scanned)| {
            scanned.map_or(Ok(true), |scanned| {
                free_scanned(store, &catalog, scanned, &left)
            })
        });
        match freed {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error) => {
                store.unfreed.add(left);
                return Err(error);
            }
        }
    }
    store.unfreed.add(left);
    Ok(false)
}

/// Scans the home without a lock, and returns with it the rows from before. Those that the scan is
/// compared with are read later; if they are others, the lock finds other rows as well.
fn scan_unlocked(store: &Store) -> Result<(Arc<Catalog>, Option<ScannedHome>)> {
    let catalog = store.home().catalog()?;
    Ok((catalog, ScannedHome::by(store, &store.home().queries()?)?))
}

/// Frees by a scan from before the lock was taken. Returns false if the rows are others by now.
fn free_scanned(
    store: &Store,
    catalog: &Arc<Catalog>,
    scanned: ScannedHome,
    left: &Freeable,
) -> Result<bool> {
    let mut change = begin_shared_change(store)?;
    let rows = change.bases()?;
    let is_theirs = |row: &BaseRecord| !row.is_ours() && left.bases.contains(&row.id);
    let refers_to_theirs = left
        .boxes
        .iter()
        .try_fold(false, |found, id| -> Result<bool> {
            Ok(found || change.bases_of(id)?.iter().any(|row| !row.is_ours()))
        })?;
    let has_theirs = refers_to_theirs || rows.iter().any(is_theirs);
    let has_lock = !change.is_shared() || (has_theirs && change.take_lock()?);
    change.begin_exclusive()?;
    let is_as_scanned = Arc::ptr_eq(&store.home().catalog()?, catalog);
    if !is_as_scanned || scanned.layers.unseen(store.home()).is_some() {
        return Ok(false);
    }
    // The scan may have seen a box in the middle of a change, so check again what the boxes need.
    let mut surplus = left.bases.clone();
    for box_id in &left.boxes {
        let Ok(record) = change.box_by_id(box_id) else {
            continue;
        };
        let mut locked = LockedBox::new(store, change, record);
        let near = locked.near()?;
        let dropped = drop_surplus_refs(&mut locked, &near, has_lock)?;
        surplus.extend(dropped.into_iter().map(|row| row.id));
        change = locked.change;
    }
    crash_point("unfreed.dropped");
    change.begin_exclusive()?;
    let referred = change.referred_bases()?;
    let may_go = |row: &BaseRecord| {
        (row.is_ours() || surplus.contains(&row.id)) && !referred.contains(&row.id)
    };
    if has_lock {
        free_bases_in(store, &mut change, scanned, &may_go)?;
    } else {
        free_without_lock_in(store, &mut change, scanned, &may_go)?;
    }
    Ok(true)
}
