//! Whether a change would be refused, before something is begun that ends in one.

use crate::Result;
use crate::store::Store;
use crate::store::access::lock::{begin_shared_change, lock_shared_unprepared, lock_unprepared};
use crate::store::access::room::delete_with_room;

/// Whether a change of the box would be refused as things are: before something is begun that ends
/// in one.
///
/// # Errors
/// EROFS, EBUSY while the box runs or a runtime has the home, EPERM in a copied home, ENOENT.
pub fn refuse_unready(store: &Store, box_id: &str) -> Result<()> {
    store.refuse_read_only()?;
    delete_with_room(store, &|| lock_unprepared(store, box_id).map(drop))
}

/// Likewise for a restore, which can be made beside a runtime.
///
/// # Errors
/// As [`Store::refuse_unready`].
pub fn refuse_unready_for_restore(store: &Store, box_id: &str) -> Result<()> {
    lock_shared_unprepared(store, box_id).map(drop)
}

/// Refuses if a new box could not be made now.
///
/// # Errors
/// EROFS, EBUSY while a runtime has the home and that matters, EPERM in a copied home.
pub fn refuse_unready_for_import(store: &Store) -> Result<()> {
    store.refuse_read_only()?;
    begin_shared_change(store).map(drop)
}
