//! Installs a finished box: moves its directory into `boxes/` and records it.

use std::path::Path;

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::{mark_unrecorded, unmark};
use crate::home::{BoxRecord, Change, NewBox, container_id, normalize_imported};
use crate::store::Store;
use crate::store::layers::bases::now;

/// The identity of a box that is about to be made.
#[derive(Clone, Debug)]
pub struct NewBoxIdentity {
    /// The id of the box, chosen by the caller ([`crate::home::box_id`]).
    pub id: String,
    /// The name of the box.
    pub name: String,
    /// The box.json that came with its disk, where there was one. Options that were edited there
    /// count in place of those that came with the disk.
    pub description: Option<serde_json::Value>,
}

/// Moves the finished directory `dir` into `boxes/`, then records the box and its references to
/// `bases` in one transaction. The configuration comes from `options`, or else from the box
/// `source`.
///
/// A failure removes the directory again, unless the row may exist.
///
/// # Errors
/// EBUSY when another runtime began meanwhile; EIO; those of the database.
pub fn install(
    store: &Store,
    change: &mut Change<'_>,
    dir: &Path,
    new: &NewBoxIdentity,
    source: Option<&BoxRecord>,
    options: Option<serde_json::Value>,
    bases: &[String],
) -> Result<()> {
    let created_at = now();
    let config = source.map(BoxRecord::config).transpose()?;
    let options = match (options, source) {
        (Some(options), _) => options,
        (None, Some(source)) => normalize_imported(source.options_for_copy()?, None),
        (None, None) => normalize_imported(serde_json::Value::Null, None),
    };
    let target = store.home().box_dir(&new.id);
    let row = NewBox {
        id: new.id.clone(),
        name: new.name.clone(),
        container_id: container_id()?,
        box_home: target.display().to_string(),
        created_at,
        options,
        config_of_source: config,
        state_of_source: source.map(BoxRecord::state).transpose()?,
        lock_id: change.new_lock_id()?,
    };
    let undo = || {
        // The id is new, so nothing else is in this directory.
        let _ = std::fs::remove_dir_all(&target);
        let _ = std::fs::remove_file(store.home().box_lock(row.lock_id));
    };
    change.begin_exclusive()?;
    place(dir, &target).inspect_err(|_| undo())?;
    crash_point("install.renamed");
    let recorded = change.transaction(|rows| {
        rows.insert_box(&row)?;
        bases
            .iter()
            .try_for_each(|base| rows.insert_ref(base, &new.id))
    });
    // A runtime that started before the row existed removes the directory.
    let recorded = recorded.and_then(|()| {
        change.refuse_other_runtime().inspect_err(|_| {
            // The result does not matter: whether the row exists is checked below.
            let _ = change.withdraw(|rows| rows.delete_box(&new.id));
        })
    });
    if let Err(error) = recorded {
        // A failed commit may be durable all the same. If the row exists, or cannot be looked up,
        // the directory and its mark stay for recovery.
        if change
            .box_by_id(&new.id)
            .is_err_and(|e| e.errno() == libc::ENOENT)
        {
            undo();
        }
        return Err(error);
    }
    crash_point("install.recorded");
    unmark(&target)
}

/// Marks a box's directory as unrecorded and moves it to its place, durably.
///
/// # Errors
/// EIO and others of the file system.
pub fn place(dir: &Path, target: &Path) -> Result<()> {
    durable::sync_dir(&dir.join("disks"))?;
    mark_unrecorded(dir)?;
    durable::rename(dir, target)
}
