//! Room for what makes room: on a full disk, deleting needs some itself, for rows and marks.
//!
//! What can be made again goes first: compressed archives, then files nobody needs. Then a reserve that is
//! kept for this, and is filled again once there is room.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::{Store, durable};
use crate::Result;
use crate::home::Space;

/// Bytes set aside: the changed pages of a deletion, some more than once, and directories' blocks; btrfs wants
/// more room for a new name than it takes.
const RESERVE: u64 = 1 << 20;

/// It is only kept where it is no more than this part of what is free.
const PART_OF_FREE: u64 = 16;

impl Store {
    /// Deletes something. Where that fails for lack of room, room is made and it is tried again; that it is
    /// gone by then is success.
    pub(super) fn delete_with_room(&self, delete: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut result = delete();
        let steps: [(&str, &dyn Fn() -> bool); 3] = [
            ("compressed archives were let go of", &|| self.drop_spools()),
            ("what nothing needs was freed", &|| self.free_for_room()),
            ("the reserve was used", &|| self.use_reserve()),
        ];
        for (what, make_room) in steps {
            let is_full =
                |error: &crate::Error| matches!(error.errno(), libc::ENOSPC | libc::EDQUOT);
            if !result.as_ref().is_err_and(is_full) {
                break;
            }
            if !make_room() {
                continue;
            }
            // Some file systems give room back only with what they write next.
            let _ = durable::sync_file_system(self.home.root());
            log::info!("the disk is full: {what}");
            result = match delete() {
                Err(error) if error.errno() == libc::ENOENT => Ok(()),
                result => result,
            };
        }
        self.keep_reserve();
        result
    }

    /// Lets go of compressed archives that nobody reads. False if there was none.
    fn drop_spools(&self) -> bool {
        self.let_go_of_unread_exports();
        let mut cache = self.compressed.lock();
        let mut dropped = false;
        while cache.drop_any_spool() {
            dropped = true;
        }
        dropped
    }

    /// Frees layers that nothing reads. A change without a reader needs no room before it frees the first.
    fn free_for_room(&self) -> bool {
        let Ok(catalog) = self.home.catalog() else {
            return false;
        };
        self.has_unneeded(&catalog).is_ok_and(|it| it) && self.free_unneeded().is_ok()
    }

    fn reserve(&self) -> PathBuf {
        self.home.staging_dir().join("reserve")
    }

    /// Gives the reserve back to the file system. False if there is none.
    fn use_reserve(&self) -> bool {
        fs::remove_file(self.reserve()).is_ok()
    }

    /// Sets the reserve aside, if there is room for it. Nothing depends on it.
    pub(super) fn keep_reserve(&self) {
        let path = self.reserve();
        if self.read_only || fs::symlink_metadata(&path).is_ok() {
            return;
        }
        let free = Space::of(&self.home).map_or(0, |space| space.available_bytes());
        if free / PART_OF_FREE < RESERVE || self.home.make_staging_dir().is_err() {
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
            .and_then(|()| self.home.give_to_owner(&path).map_err(|e| e.to_string()));
        if let Err(error) = kept {
            log::info!("no room is kept for deleting on a full disk: {error}");
            let _ = fs::remove_file(&path);
        }
    }
}
