//! A reserve of space for changes that free some.

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use crate::home::Space;
use crate::store::Store;

/// Bytes of the reserve. A deletion writes database pages, some more than once, and directory
/// blocks; btrfs demands more space for a new name than it then uses.
const RESERVE: u64 = 1 << 20;

/// The reserve is at most one part in so many of the free space; else none is kept.
const PART_OF_FREE: u64 = 16;

fn reserve_path(store: &Store) -> PathBuf {
    store.home().staging_dir().join("reserve")
}

/// Removes the reserve, so that its space is free. Returns false if there is none.
pub fn use_reserve(store: &Store) -> bool {
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
