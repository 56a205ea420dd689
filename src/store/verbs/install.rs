//! Putting a finished box into its place.

use std::path::Path;

use crate::Result;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::{UNRECORDED, mark_unrecorded};
use crate::home::{BoxRecord, Change, NewBox, container_id, normalize_imported};
use crate::store::Store;
use crate::store::layers::bases::now;

/// A box about to be made.
#[derive(Clone, Debug)]
pub struct NewClone {
    /// The id it gets, chosen by the caller ([`crate::home::box_id`]).
    pub id: String,
    /// The name it gets.
    pub name: String,
}

/// Moves a finished directory into `boxes/` and records the box.
pub fn install(
    store: &Store,
    change: &mut Change<'_>,
    dir: &Path,
    new: &NewClone,
    source: Option<&BoxRecord>,
    options: Option<serde_json::Value>,
    bases: &[String],
) -> Result<()> {
    let created_at = now();
    let config = source.map(BoxRecord::config).transpose()?;
    let options = match (options, &config) {
        (Some(options), _) => options,
        (None, Some(config)) => normalize_imported(config["options"].clone(), None),
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
    let take_back = || {
        // Nothing else is there: its id is new.
        let _ = std::fs::remove_dir_all(&target);
        let _ = std::fs::remove_file(store.home().box_lock(row.lock_id));
    };
    change.begin_exclusive()?;
    place(dir, &target).inspect_err(|_| take_back())?;
    crash_point("install.renamed");
    let recorded = change.transaction(|rows| {
        rows.insert_box(&row)?;
        bases
            .iter()
            .try_for_each(|base| rows.insert_ref(base, &new.id))
    });
    // A runtime that began before the row was there removes the directory.
    let recorded = recorded.and_then(|()| {
        change.refuse_other_runtime().inspect_err(|_| {
            // What it says does not count: the box is looked for below.
            let _ = change.transaction(|rows| rows.delete_box(&new.id));
        })
    });
    if let Err(error) = recorded {
        // A commit that reports an error can be durable all the same. Where the row is there, or
        // can't be looked for, the directory stays, and its mark for recovery.
        if change
            .box_by_id(&new.id)
            .is_err_and(|e| e.errno() == libc::ENOENT)
        {
            take_back();
        }
        return Err(error);
    }
    crash_point("install.recorded");
    durable::unlink(&target.join(UNRECORDED))
}

/// Marks a box's directory as one without a row and moves it to its place.
pub fn place(dir: &Path, target: &Path) -> Result<()> {
    durable::sync_dir(&dir.join("disks"))?;
    mark_unrecorded(dir)?;
    durable::rename(dir, target)
}
