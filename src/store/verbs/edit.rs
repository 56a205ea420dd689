//! `sed -i s/512/2048/ web/box.json`: changes the options of a stopped box.

use serde_json::Value;

use crate::Result;
use crate::exports::Source;
use crate::files::crash_points::crash_point;
use crate::home::{BoxRecord, OptionEdit, described_options};
use crate::store::Store;
use crate::store::access::lock::{lock_shared_unprepared, made_again_on};
use crate::store::access::locked_box::LockedBox;

/// Refuses if an edit of the box would be refused now, whatever it changes.
///
/// # Errors
/// EROFS, EPERM in a copied home, EBUSY while the box runs or a BoxLite runtime has the home, ENOENT.
pub fn refuse_unready_for_edit(store: &Store, box_id: &str) -> Result<()> {
    store.refuse_read_only()?;
    made_again_on(store, &live(box_id), &|| {
        lock_unread(store, box_id).map(drop)
    })
}

/// Checks an edited `box.json`, as text that was parsed, and changes nothing.
///
/// # Errors
/// EINVAL naming the field that can't be changed, and those of [`refuse_unready_for_edit`].
pub fn check_edit(store: &Store, box_id: &str, written: &Value) -> Result<()> {
    let result = made_again_on(store, &live(box_id), &|| {
        let locked = lock_unread(store, box_id)?;
        edit_of(store, &locked.record, written)
    });
    log_refusal(store, box_id, result).map(drop)
}

/// Gives a box the options of its edited `box.json`.
///
/// # Errors
/// Those of [`check_edit`].
pub fn edit_box(store: &Store, box_id: &str, written: &Value) -> Result<()> {
    let result = made_again_on(store, &live(box_id), &|| {
        record_options(store, box_id, &|record| edit_of(store, record, written))
    });
    log_changes(store, box_id, result)
}

/// Gives a box that was just made the options of the `box.json` of the backup that it was made from,
/// where that was edited. `original` are the options that it was made with, and the version of its
/// archive.
///
/// # Errors
/// Those of [`check_edit`].
pub fn describe_box(
    store: &Store,
    box_id: &str,
    original: (&Value, Option<u64>),
    description: &Value,
) -> Result<()> {
    let result = description_of(store, original, description).and_then(|edit| {
        made_again_on(store, &live(box_id), &|| {
            record_options(store, box_id, &|_| Ok(edit.clone()))
        })
    });
    log_changes(store, box_id, result)
}

/// Checks such a `box.json`, and changes nothing.
///
/// # Errors
/// Those of [`check_edit`].
pub fn check_description(
    store: &Store,
    box_id: &str,
    original: (&Value, Option<u64>),
    description: &Value,
) -> Result<()> {
    let result = description_of(store, original, description);
    log_refusal(store, box_id, result).map(drop)
}

fn description_of(
    store: &Store,
    (options, version): (&Value, Option<u64>),
    description: &Value,
) -> Result<OptionEdit> {
    described_options(options, version, description, store.imports.untrusted)
}

fn live(box_id: &str) -> Source {
    Source::Live {
        box_id: box_id.to_owned(),
    }
}

/// Locks a box of which no runtime has read anything that it may go on with.
fn lock_unread<'s>(store: &'s Store, box_id: &str) -> Result<LockedBox<'s>> {
    let locked = lock_shared_unprepared(store, box_id)?;
    locked.change.refuse_runtime()?;
    Ok(locked)
}

fn edit_of(store: &Store, record: &BoxRecord, written: &Value) -> Result<OptionEdit> {
    record.edited(written, store.imports.untrusted)
}

/// Updates one row. A runtime that starts after the check reads what was recorded, because its
/// first reads of a box come later than its start.
fn record_options(
    store: &Store,
    box_id: &str,
    edit: &dyn Fn(&BoxRecord) -> Result<OptionEdit>,
) -> Result<Vec<String>> {
    let mut locked = lock_unread(store, box_id)?;
    let edit = edit(&locked.record)?;
    if edit.changed.is_empty() {
        return Ok(edit.changed);
    }
    locked.change.begin_exclusive()?;
    locked.change.refuse_runtime()?;
    let change = &mut locked.change;
    change.transaction(|rows| rows.set_options(box_id, &edit.options))?;
    crash_point("edit.recorded");
    Ok(edit.changed)
}

fn log_changes(store: &Store, box_id: &str, result: Result<Vec<String>>) -> Result<()> {
    let changed = log_refusal(store, box_id, result)?;
    if !changed.is_empty() {
        let name = store.exports.disks.name_of(box_id);
        let message = format!("edit of box {name}: {}", changed.join(", "));
        store.events().info(&message);
    }
    Ok(())
}

fn log_refusal<T>(store: &Store, box_id: &str, result: Result<T>) -> Result<T> {
    result.inspect_err(|error| {
        let name = store.exports.disks.name_of(box_id);
        store
            .events()
            .warn(&format!("edit of box {name} failed: {error}"));
    })
}
