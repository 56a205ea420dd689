//! Deleting on a full disk: a deletion itself needs some space, for rows and marks.
//!
//! Space is freed in three steps: compressed archives, which can be made again; layers that are no
//! longer needed; then a reserve kept for this purpose. The reserve is made again once there is
//! space.

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use crate::Result;
use crate::files::durable;
use crate::home::Space;
use crate::store::Store;
use crate::store::access::home_recovery::free_unneeded;
use crate::store::layers::collect::has_unneeded;

/// Bytes of the reserve. A deletion writes database pages, some more than once, and directory
/// blocks; btrfs demands more space for a new name than it then uses.
const RESERVE: u64 = 1 << 20;

/// The reserve is at most one part in so many of the free space; else none is kept.
const PART_OF_FREE: u64 = 16;

/// Runs a deletion. While it fails for lack of space, frees some and tries again. ENOENT in a later
/// attempt is success: an earlier one deleted the object.
///
/// # Errors
/// Those of the deletion; ENOSPC or EDQUOT when no space can be freed.
pub fn delete_with_room(store: &Store, delete: &dyn Fn() -> Result<()>) -> Result<()> {
    let mut result = delete();
    let steps: [(&str, &dyn Fn() -> bool); 3] = [
        ("removed compressed archives", &|| drop_spools(store)),
        ("freed layers that are no longer needed", &|| {
            free_for_room(store)
        }),
        ("used the reserve", &|| use_reserve(store)),
    ];
    for (step, make_room) in steps {
        let is_full = |error: &crate::Error| matches!(error.errno(), libc::ENOSPC | libc::EDQUOT);
        if !result.as_ref().is_err_and(is_full) {
            break;
        }
        if !make_room() {
            continue;
        }
        // Some file systems release freed space only with their next commit.
        let _ = durable::sync_file_system(store.home().root());
        log::info!("the disk is full: {step} to delete");
        result = match delete() {
            Err(error) if error.errno() == libc::ENOENT => Ok(()),
            result => result,
        };
    }
    keep_reserve(store);
    result
}

/// Drops compressed archives that are not being read. Returns false if there was none.
fn drop_spools(store: &Store) -> bool {
    store.exports.plain.let_go_of_unread();
    store.exports.compressed.drop_unread()
}

/// Frees layers that are no longer read. Such a change needs no space before it frees the first
/// one. Returns false if nothing was freed.
fn free_for_room(store: &Store) -> bool {
    let Ok(catalog) = store.home().catalog() else {
        return false;
    };
    has_unneeded(store, &catalog).unwrap_or(false) && free_unneeded(store).is_ok()
}

fn reserve_path(store: &Store) -> PathBuf {
    store.home().staging_dir().join("reserve")
}

/// Removes the reserve, so that its space is free. Returns false if there is none.
fn use_reserve(store: &Store) -> bool {
    fs::remove_file(reserve_path(store)).is_ok()
}

/// Makes the reserve if it is missing and there is enough space. A failure is logged: changes work
/// without it.
pub fn keep_reserve(store: &Store) {
    let path = reserve_path(store);
    if store.is_read_only() || fs::symlink_metadata(&path).is_ok() {
        return;
    }
    let free = Space::of(store.home()).map_or(0, |space| space.available_bytes());
    if free / PART_OF_FREE < RESERVE || store.home().make_staging_dir().is_err() {
        return;
    }
    let mut options = OpenOptions::new();
    let made = options.write(true).create_new(true).mode(0o600).open(&path);
    let kept = made.and_then(|file| {
        // Not posix_fallocate, which writes zeros where the file system does not support it.
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, flags, 0, RESERVE).map_err(std::io::Error::from)
    });
    let kept = kept
        .map_err(|e| e.to_string())
        .and_then(|()| store.home().give_to_owner(&path).map_err(|e| e.to_string()));
    if let Err(error) = kept {
        log::info!("cannot reserve space for deletions on a full disk: {error}");
        let _ = fs::remove_file(&path);
    }
}
