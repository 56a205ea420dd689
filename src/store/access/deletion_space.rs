//! Deleting on a full disk: a deletion itself needs some space, for rows and marks.
//!
//! Space is freed in four steps: undo entries; compressed archives, which can be made again; layers
//! that are no longer needed; then a reserve for this purpose. The reserve is made again once there is
//! space.

use crate::Result;
use crate::files::durable;
use crate::store::Store;
use crate::store::access::home_recovery::free_unneeded;
use crate::store::access::reserve::{keep_reserve, use_reserve};
use crate::store::kept::expire::{is_full, with_room};
use crate::store::layers::collect::has_unneeded;

/// Runs a deletion. While it fails for lack of space, frees some and tries again. ENOENT in a later
/// attempt is success: an earlier one deleted the object.
///
/// # Errors
/// Those of the deletion; ENOSPC or EDQUOT when no space can be freed.
pub fn delete_with_room(store: &Store, delete: &dyn Fn() -> Result<()>) -> Result<()> {
    let mut result = with_room(store, None, delete);
    let steps: [(&str, &dyn Fn() -> bool); 3] = [
        ("removed compressed archives", &|| drop_spools(store)),
        ("freed layers that are no longer needed", &|| {
            free_for_room(store)
        }),
        ("used the reserve", &|| use_reserve(store)),
    ];
    for (step, make_room) in steps {
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
