//! The directory and the row of a snapshot.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::exports::display_name;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::{UNRECORDED, mark_unrecorded, write_mark};
use crate::files::workspace::Scratch;
use crate::home::{NewSnapshot, SnapshotRecord};
use crate::store::Store;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::adopt::adopt;
use crate::store::layers::bases::now;
use crate::store::layers::frozen::{Frozen, FrozenDisk};
use crate::{Context, Error, Result};

/// The name of a snapshot's layer that may go: in the directory BoxLite would remove, that of the
/// row's path, where it is one of this box's. Adopted first if any chain names it.
pub fn unread_layer(locked: &mut LockedBox<'_>, snapshot: &SnapshotRecord) -> Result<PathBuf> {
    let home = &locked.store.home();
    let recorded = locked.store.exports.disks.snapshot_layer(snapshot);
    let own = home.snapshot_disk(&locked.record.id, &snapshot.name);
    let in_own_directory = recorded.parent().and_then(Path::parent)
        == Some(home.snapshots_dir(&locked.record.id).as_path());
    let layer = if in_own_directory { recorded } else { own };
    if locked.layers()?.readers_of(&layer).next().is_some() {
        adopt(locked, &layer)?;
    }
    Ok(layer)
}

/// Marks the directory of a snapshot's layer, whose row is about to go or to name another.
pub fn mark_unrecorded_snapshot(layer: &Path) -> Result<()> {
    match layer.parent() {
        Some(dir) if dir.is_dir() => mark_unrecorded(dir),
        _ => Ok(()),
    }
}

/// EEXIST when the box has a snapshot of that name, or a directory that would be in its way.
pub fn refuse_taken(locked: &LockedBox<'_>, name: &str) -> Result<()> {
    if locked
        .snapshots()?
        .iter()
        .any(|snapshot| snapshot.name == name)
    {
        return Err(Error::new(
            libc::EEXIST,
            format!(
                "box {} has a snapshot {name} already",
                display_name(&locked.record)
            ),
        ));
    }
    let dir = locked
        .store
        .home()
        .snapshots_dir(&locked.record.id)
        .join(name);
    if dir.exists() {
        return Err(Error::new(
            libc::EEXIST,
            format!(
                "{} is there without a snapshot of that name; look at it with boxlitefs check",
                dir.display()
            ),
        ));
    }
    Ok(())
}

/// Makes a snapshot of a frozen state and returns its id. Without `created_at` it is of now.
///
/// Order: the directory, the layer's further name in it, the row. A crash before the row leaves
/// a directory without one, whose layer has another name: recovery unlinks it. Beside a runtime nobody
/// does later: then it goes at once.
pub fn name_layer(
    locked: &mut LockedBox<'_>,
    frozen: &FrozenDisk,
    id: &str,
    name: &str,
    created_at: Option<i64>,
) -> Result<String> {
    // By its mark recovery knows a directory whose name no snapshot has.
    let is_shared = locked.change.is_beside_a_runtime();
    let marked = is_shared.then(|| marked_dir(locked.store)).transpose()?;
    locked.change.hold()?;
    let path = snapshot_place(locked, &place_of(locked, name, id), marked.as_deref())?;
    crash_point("snapshot.directory");
    let linked = match &frozen.layer {
        Frozen::Base { path: base } => durable::link(base, &path),
        // An empty overlay on an image: the snapshot is a copy of it, a few clusters long.
        Frozen::Below { .. } => copy_empty_overlay(locked, frozen, &path),
    };
    crash_point("snapshot.linked");
    let recorded = linked
        .and_then(|()| record_snapshot(locked, id, name, &path, frozen.virtual_size, created_at));
    settle_place(locked, &path, recorded)
}

/// Takes the mark, if there is one, from the directory of a snapshot that was recorded. Beside a runtime
/// the directory goes if it was not.
pub fn settle_place<T>(locked: &LockedBox<'_>, path: &Path, recorded: Result<T>) -> Result<T> {
    match &recorded {
        Ok(_) => durable::unlink(&path.with_file_name(UNRECORDED))?,
        Err(_) if locked.change.is_beside_a_runtime() => remove_place(locked, path),
        Err(_) => {}
    }
    recorded
}

/// Removes the directory of a snapshot that was not recorded. What can't be removed is for recovery.
fn remove_place(locked: &LockedBox<'_>, path: &Path) {
    let mark = path.with_file_name(UNRECORDED);
    let removed = durable::unlink(path).and_then(|()| durable::unlink(&mark));
    if let Err(error) = removed.and_then(|()| path.parent().map_or(Ok(()), durable::remove_dir)) {
        locked.store.events().info(&error.to_string());
    }
}

/// The name of a snapshot's directory. Beside a runtime one that BoxLite, asked for a snapshot of the same
/// name at that moment, does not use: it puts the live disk there, over this one, or where this one
/// would be taken back from.
pub fn place_of(locked: &LockedBox<'_>, name: &str, id: &str) -> String {
    if locked.change.is_beside_a_runtime() {
        format!(".{id}")
    } else {
        name.to_owned()
    }
}

/// `snapshots/PLACE/disk.qcow2`, its directories made; `prepared` is a directory to be moved there.
pub fn snapshot_place(
    locked: &LockedBox<'_>,
    place: &str,
    prepared: Option<&Path>,
) -> Result<PathBuf> {
    let home = &locked.store.home();
    let snapshots = home.snapshots_dir(&locked.record.id);
    if !snapshots.is_dir() {
        home.make_dir(&snapshots)?;
    }
    // Also where it is there: who made it may not have come to flush that, or it failed.
    durable::sync_dir(&home.box_dir(&locked.record.id))?;
    let dir = snapshots.join(place);
    match prepared {
        Some(prepared) => durable::rename(prepared, &dir)?,
        None => {
            home.make_dir(&dir)?;
            durable::sync_dir(&snapshots)?;
        }
    }
    Ok(home.snapshot_disk(&locked.record.id, place))
}

fn copy_empty_overlay(locked: &LockedBox<'_>, frozen: &FrozenDisk, path: &Path) -> Result<()> {
    let copy = locked.store.workspace().scratch("overlay")?;
    let message = || format!("cannot copy {}", frozen.top.display());
    let mode = frozen.file.metadata().context(message)?.permissions();
    let mut out = File::create_new(&*copy).context(message)?;
    std::io::copy(&mut &*frozen.file, &mut out).context(message)?;
    out.set_permissions(mode).context(message)?;
    locked.store.home().give_to_owner(&copy)?;
    durable::copy_times(&frozen.top, &copy)?;
    durable::sync_file(&copy)?;
    durable::rename(&copy, path)
}

/// The time of a snapshot that is made now: later than those of all that the box has, though
/// there be several in a second. Both BoxLite and tools that go by times see which one is the
/// newest.
fn next_time(locked: &LockedBox<'_>) -> Result<i64> {
    let newest = locked.snapshots()?.iter().map(|it| it.shown_at).max();
    Ok(newest.map_or(now(), |newest| now().max(newest.saturating_add(1))))
}

/// The row of a snapshot whose layer is in place.
pub fn record_snapshot(
    locked: &mut LockedBox<'_>,
    id: &str,
    name: &str,
    path: &Path,
    virtual_size: u64,
    created_at: Option<i64>,
) -> Result<String> {
    let created_at = match created_at {
        Some(created_at) => created_at,
        None => next_time(locked)?,
    };
    let meta = fs::metadata(path).context(|| format!("cannot look at {}", path.display()))?;
    let row = NewSnapshot {
        id: id.to_owned(),
        box_id: locked.record.id.clone(),
        name: name.to_owned(),
        path: path.display().to_string(),
        virtual_size,
        file_size: meta.len(),
        created_at,
    };
    locked
        .change
        .transaction(|rows| rows.insert_snapshot(&row))?;
    crash_point("snapshot.recorded");
    Ok(row.id)
}

/// A directory in the workspace for a snapshot whose row is still to come.
pub fn marked_dir(store: &Store) -> Result<Scratch> {
    let dir = store.workspace().scratch("snapshot")?;
    store.home().make_dir(&dir)?;
    write_mark(&dir)?;
    Ok(dir)
}

/// Removes the marked directory a snapshot was in. That something else lies in it takes nothing
/// back.
pub fn remove_snapshot_dir(store: &Store, dir: Option<&Path>) {
    if let Some(dir) = dir
        && let Err(error) =
            durable::unlink(&dir.join(UNRECORDED)).and_then(|()| durable::remove_dir(dir))
    {
        store
            .events()
            .info(&format!("{error}; the rest is left there"));
    }
}
