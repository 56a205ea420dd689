//! Drops entries: when their time is over, when there is no room, and when they are told to go.

use std::time::SystemTime;

use crate::files::durable;
use crate::home::Change;
use crate::store::Store;
use crate::store::access::lock::{begin_shared_change, made_again};
use crate::store::access::reserve::{keep_reserve, use_reserve};
use crate::store::kept::entries::{remove_entry, remove_torn};
use crate::store::kept::keep::has_room;
use crate::store::layers::collect::{free_unreached, free_without_lock};
use crate::store::layers::unfreed::Freeable;
use crate::{Error, Result};

/// Drops an entry, and frees what only that needed.
///
/// # Errors
/// EROFS, ENOENT when it is gone, EBUSY; those of system calls and of SQLite.
pub fn drop_kept(store: &Store, id: &str) -> Result<()> {
    let action = format!("end of keeping {}", name_of(store, id));
    let result = made_again(store, &|| {
        if store
            .home()
            .read_kept(id)
            .is_err_and(|e| e.errno() == libc::ENOENT)
        {
            return Err(Error::new(libc::ENOENT, "that is no longer kept"));
        }
        drop_entries(store, &[id.to_owned()], false)
    });
    store.events().log_outcome(&action, result)
}

/// Returns what an entry keeps, for messages.
fn name_of(store: &Store, id: &str) -> String {
    let catalog = store.home().catalog().ok();
    let entry = catalog.and_then(|catalog| catalog.kept_by_id(id).cloned());
    entry.map_or_else(
        || id.to_owned(),
        |entry| format!("what was there before the {}", entry.rows.what),
    )
}

/// Order: the rows of each entry, its files, the bases that nothing needs. A crash leaves files of no
/// entry, which recovery removes, or bases of ours that nothing needs, which it frees.
fn drop_entries(store: &Store, ids: &[String], now: bool) -> Result<()> {
    let mut change = begin_shared_change(store)?;
    for id in ids {
        remove_entry(store, id)?;
    }
    let mut freed = free(store, &mut change, now);
    if freed.as_ref().is_err_and(is_full) && use_reserve(store) {
        // The rows of what is freed need some space themselves.
        freed = free(store, &mut change, now);
    }
    drop(change);
    keep_reserve(store);
    tell_of_unfreed(store, freed);
    Ok(())
}

/// Says in the log why the space of what was kept is not freed yet.
pub fn tell_of_unfreed(store: &Store, freed: Result<()>) {
    if let Err(error) = freed {
        let message = format!("{error}; the space of what was kept is freed later");
        store.events().info(&message);
    }
}

/// Frees the bases that nothing needs any more; in a large home behind, unless room is needed now.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn free(store: &Store, change: &mut Change<'_>, now: bool) -> Result<()> {
    if store.layers.is_large() && !now {
        store.unfreed.add(Freeable::default());
        return Ok(());
    }
    if change.is_shared() {
        free_without_lock(store, change)
    } else {
        free_unreached(store, change)
    }
}

/// Drops the oldest entry but `spared` to make room. Returns false if there is none, or it can't be
/// dropped now.
pub fn drop_oldest(store: &Store, spared: Option<&str>) -> bool {
    let oldest = || {
        let catalog = store.home().catalog().ok()?;
        let mut kept = catalog.kept().iter();
        let entry = kept.find(|entry| Some(entry.id()) != spared)?;
        Some((entry.id().to_owned(), entry.rows.what.clone()))
    };
    let Some((id, what)) = oldest() else {
        return false;
    };
    let ids = [id];
    let is_listed = || {
        let catalog = store.home().catalog();
        catalog.is_ok_and(|catalog| ids.iter().any(|id| catalog.kept_by_id(id).is_some()))
    };
    let mut dropped = drop_entries(store, &ids, true);
    if dropped.as_ref().is_err_and(is_full) && use_reserve(store) {
        dropped = drop_entries(store, &ids, true);
    }
    match dropped {
        // Its files could not be removed: to drop it again would do no better.
        Ok(()) if is_listed() => false,
        Ok(()) => {
            store.events().info(&format!(
                "the {what} can't be undone any more: its room was needed"
            ));
            // Some file systems release freed space only with their next commit.
            let _ = durable::sync_file_system(store.home().root());
            true
        }
        Err(error) => {
            log::info!("the {what} is still kept: {error}");
            false
        }
    }
}

/// Makes a change. While it fails for lack of space, drops the oldest entry, but not the one that the
/// change is of, and makes it again.
///
/// # Errors
/// Those of `change`.
pub fn with_room<T>(
    store: &Store,
    spared: Option<&str>,
    change: &dyn Fn() -> Result<T>,
) -> Result<T> {
    loop {
        match change() {
            Err(error) if is_full(&error) && drop_oldest(store, spared) => {}
            ended => return ended,
        }
    }
}

/// Returns whether an error says that there is no space.
pub fn is_full(error: &Error) -> bool {
    matches!(error.errno(), libc::ENOSPC | libc::EDQUOT)
}

/// Drops the entries whose time is over, and while less than a tenth of the disk is free, the oldest.
/// What can't be dropped now is left for the next time.
pub fn expire(store: &Store) {
    if let Err(error) = drop_over(store, false) {
        log::debug!("entries whose time is over: {error}");
    }
    let is_any = || store.home().catalog().is_ok_and(|it| !it.kept().is_empty());
    if is_any() {
        while !has_room(store) && drop_oldest(store, None) {}
    }
}

/// Drops the entries whose time is over. Their space is freed behind in a large home, unless it is to
/// be freed `now`.
///
/// # Errors
/// Those of [`drop_kept`].
pub fn drop_over(store: &Store, now: bool) -> Result<()> {
    let catalog = store.home().catalog()?;
    let time = SystemTime::now();
    let over = catalog.kept().iter();
    let over = over.filter(|entry| entry.rows.is_over(time));
    let over: Vec<String> = over.map(|entry| entry.id().to_owned()).collect();
    if over.is_empty() {
        return Ok(());
    }
    drop_entries(store, &over, now)
}

/// Drops all entries, also those whose rows can't be read. Returns how many.
///
/// # Errors
/// Those of [`drop_kept`].
pub fn purge(store: &Store) -> Result<usize> {
    let ids = store.home().kept_ids()?;
    if !ids.is_empty() {
        remove_torn(store)?;
        let ids = store.home().kept_ids()?;
        made_again(store, &|| drop_entries(store, &ids, true))?;
    }
    Ok(ids.len())
}
