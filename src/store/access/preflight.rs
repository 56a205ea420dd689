//! Checks before work begins that ends in a change, so that a change that would be refused fails
//! before anything is copied.

use crate::Result;
use crate::exports::Source;
use crate::store::Store;
use crate::store::access::deletion_space::delete_with_room;
use crate::store::access::lock::{
    begin_shared_change, lock_shared_unprepared, made_again, made_again_on,
};

/// Refuses if the removal of the box would be refused now. On a full disk it first gives up the
/// space that is reserved for deleting. Unless the mount has the option `exclusive`, a removal is
/// possible beside a runtime.
///
/// # Errors
/// EROFS, EBUSY while the box runs, EPERM in a copied home, ENOENT.
pub fn refuse_unready(store: &Store, box_id: &str) -> Result<()> {
    store.refuse_read_only()?;
    delete_with_room(store, &|| {
        made_again_on(store, &live(box_id), &|| {
            lock_shared_unprepared(store, box_id).map(drop)
        })
    })
}

/// Refuses if a restore of the box would be refused now. Unless the mount has the option
/// `exclusive`, a restore is possible beside a runtime.
///
/// # Errors
/// Those of [`refuse_unready`].
pub fn refuse_unready_for_restore(store: &Store, box_id: &str) -> Result<()> {
    made_again_on(store, &live(box_id), &|| {
        lock_shared_unprepared(store, box_id).map(drop)
    })
}

fn live(box_id: &str) -> Source {
    Source::Live {
        box_id: box_id.to_owned(),
    }
}

/// Refuses if a new box could not be made now.
///
/// # Errors
/// EROFS, EBUSY while a runtime has the home (with the option `exclusive`), EPERM when the home is
/// mounted in two places.
pub fn refuse_unready_for_import(store: &Store) -> Result<()> {
    store.refuse_read_only()?;
    made_again(store, &|| begin_shared_change(store).map(drop))
}
