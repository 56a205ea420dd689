//! Room for what makes room: on a full disk, deleting needs some itself, for rows and marks.
//!
//! What can be made again goes first: compressed archives, then files nobody needs. Then a reserve that is
//! kept for this, and is filled again once there is room.

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use crate::Result;
use crate::files::durable;
use crate::store::Store;
use crate::store::access::home_recovery::free_unneeded;
use crate::store::layers::collect::has_unneeded;

/// Bytes set aside: the changed pages of a deletion, some more than once, and directories' blocks; btrfs wants
/// more room for a new name than it takes.
const RESERVE: u64 = 1 << 20;

/// It is only kept where it is no more than this part of what is free.
const PART_OF_FREE: u64 = 16;

/// Deletes something. Where that fails for lack of room, room is made and it is tried again; that it is
/// gone by then is success.
pub fn delete_with_room(store: &Store, delete: &dyn Fn() -> Result<()>) -> Result<()> {
    let mut result = delete();
    let steps: [(&str, &dyn Fn() -> bool); 3] = [
        ("compressed archives were let go of", &|| drop_spools(store)),
        ("what nothing needs was freed", &|| free_for_room(store)),
        ("the reserve was used", &|| use_reserve(store)),
    ];
    for (what, make_room) in steps {
        let is_full = |error: &crate::Error| matches!(error.errno(), libc::ENOSPC | libc::EDQUOT);
        if !result.as_ref().is_err_and(is_full) {
            break;
        }
        if !make_room() {
            continue;
        }
        // Some file systems give room back only with what they write next.
        let _ = durable::sync_file_system(store.home().root());
        log::info!("the disk is full: {what}");
        result = match delete() {
            Err(error) if error.errno() == libc::ENOENT => Ok(()),
            result => result,
        };
    }
    keep_reserve(store);
    result
}

/// Lets go of compressed archives that nobody reads. False if there was none.
fn drop_spools(store: &Store) -> bool {
    store.exports.plain.let_go_of_unread();
    store.exports.compressed.drop_unread()
}

/// Frees layers that nothing reads. A change without a reader needs no room before it frees the first.
fn free_for_room(store: &Store) -> bool {
    let Ok(catalog) = store.home().catalog() else {
        return false;
    };
    has_unneeded(store, &catalog).is_ok_and(|it| it) && free_unneeded(store).is_ok()
}

fn reserve_path(store: &Store) -> PathBuf {
    store.home().staging_dir().join("reserve")
}

/// Gives the reserve back to the file system. False if there is none.
fn use_reserve(store: &Store) -> bool {
    fs::remove_file(reserve_path(store)).is_ok()
}

/// Sets the reserve aside, if there is room for it. Nothing depends on it.
pub fn keep_reserve(store: &Store) {
    let path = reserve_path(store);
    if store.is_read_only() || fs::symlink_metadata(&path).is_ok() {
        return;
    }
    let free = store
        .home()
        .space()
        .map_or(0, |space| space.available_bytes());
    if free / PART_OF_FREE < RESERVE || store.home().make_staging_dir().is_err() {
        return;
    }
    let mut options = OpenOptions::new();
    let made = options.write(true).create_new(true).mode(0o600).open(&path);
    let kept = made.and_then(|file| {
        // Not posix_fallocate, which writes all of it where the file system can't do it.
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, flags, 0, RESERVE).map_err(std::io::Error::from)
    });
    let kept = kept
        .map_err(|e| e.to_string())
        .and_then(|()| store.home().give_to_owner(&path).map_err(|e| e.to_string()));
    if let Err(error) = kept {
        log::info!("no room is kept for deleting on a full disk: {error}");
        let _ = fs::remove_file(&path);
    }
}
