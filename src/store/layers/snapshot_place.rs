//! The directory and the row of a snapshot.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::exports::display_name;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::markers::{UNRECORDED, mark_unrecorded, unmark, write_mark};
use crate::files::workspace::Scratch;
use crate::home::{NewSnapshot, SnapshotRecord, snapshot_id};
use crate::store::Store;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::adopt::adopt;
use crate::store::layers::bases::now;
use crate::store::layers::frozen::{Frozen, FrozenDisk};
use crate::{Context, Error, Result};

/// The identity of a snapshot that is about to be made.
#[derive(Clone, Debug)]
pub struct NewSnapshotIdentity {
    /// The id of the snapshot ([`crate::home::snapshot_id`]).
    pub id: String,
    /// The name of the snapshot.
    pub name: String,
    /// When it was taken, in seconds since 1970; None for now.
    pub created_at: Option<i64>,
    /// The id of the snapshot that it takes the place of, if any. That one is removed in the same
    /// transaction.
    pub replaces: Option<String>,
}

impl NewSnapshotIdentity {
    /// Returns one of this name, with an id of its own, for a snapshot that is taken now.
    ///
    /// # Errors
    /// EIO without random bytes.
    pub fn taken_now(name: &str) -> Result<NewSnapshotIdentity> {
        Ok(NewSnapshotIdentity {
            id: snapshot_id()?,
            name: name.to_owned(),
            created_at: None,
            replaces: None,
        })
    }
}

/// Returns the path of a snapshot's layer that may be removed: the path in the row if it is in this
/// box's snapshots, otherwise the path in the directory that BoxLite would remove. Adopts the layer
/// if any chain names it.
///
/// # Errors
/// Those of [`adopt`].
pub fn unread_layer(locked: &mut LockedBox<'_>, snapshot: &SnapshotRecord) -> Result<PathBuf> {
    let home = &locked.store.home();
    let recorded = locked.store.exports.disks.snapshot_layer(snapshot);
    let own = home.snapshot_disk(&locked.record.id, &snapshot.name);
    let in_own_directory = recorded.parent().and_then(Path::parent)
        == Some(home.snapshots_dir(&locked.record.id).as_path());
    let layer = if in_own_directory { recorded } else { own };
    if locked.all_readers()?.readers_of(&layer).next().is_some() {
        adopt(locked, &layer)?;
    }
    Ok(layer)
}

/// Marks the directory of a snapshot's layer whose row is about to be removed or to name another
/// directory.
///
/// # Errors
/// Those of system calls.
pub fn mark_unrecorded_snapshot(layer: &Path) -> Result<()> {
    match layer.parent() {
        Some(dir) if dir.is_dir() => mark_unrecorded(dir),
        _ => Ok(()),
    }
}

/// Refuses a name that a snapshot of the box or a directory in its place has.
///
/// # Errors
/// EEXIST, and those of SQLite.
pub fn refuse_taken_snapshot_name(locked: &LockedBox<'_>, name: &str) -> Result<()> {
    if locked
        .snapshots()?
        .iter()
        .any(|snapshot| snapshot.name == name)
    {
        return Err(Error::new(
            libc::EEXIST,
            format!(
                "box {} already has a snapshot {name}",
                display_name(&locked.record)
            ),
        ));
    }
    let dir = locked
        .store
        .home()
        .snapshots_dir(&locked.record.id)
        .join(name);
    // A marked directory belongs to a deleted snapshot and is no obstacle: recovery has removed it
    // by now, or the change is beside a runtime and uses another directory.
    if dir.exists() && !dir.join(UNRECORDED).exists() {
        return Err(Error::new(
            libc::EEXIST,
            format!(
                "{} exists, but no snapshot has that name; run boxlitefs check to see what it is",
                dir.display()
            ),
        ));
    }
    Ok(())
}

/// Makes a snapshot of a frozen state. Returns the layer of the snapshot that it replaced, if any,
/// whose row is gone and whose name is still there.
///
/// Order: the directory, the layer's name in it, the row. A crash before the row leaves a directory
/// without one, whose layer has another name: recovery unlinks it. Shared access runs no recovery,
/// so a failure beside a runtime removes the directory here.
///
/// # Errors
/// Those of system calls and of SQLite.
pub fn name_layer(
    locked: &mut LockedBox<'_>,
    frozen: &FrozenDisk,
    new: &NewSnapshotIdentity,
) -> Result<Option<PathBuf>> {
    // The mark tells recovery that the directory, whose name no snapshot has, is ours.
    let needs_mark = locked.change.is_shared() || new.replaces.is_some();
    let marked = needs_mark.then(|| marked_dir(locked.store)).transpose()?;
    locked.change.begin_exclusive()?;
    let path = snapshot_place(locked, &place_of(locked, new), marked.as_deref())?;
    crash_point("snapshot.directory");
    let linked = match &frozen.layer {
        Frozen::Base { path: base } => durable::link(base, &path),
        // The layer is an empty overlay on an image: copy it, a few clusters.
        Frozen::Below { .. } => copy_empty_overlay(locked, frozen, &path),
    };
    crash_point("snapshot.linked");
    let recorded = linked.and_then(|()| record_snapshot(locked, new, &path, frozen.virtual_size));
    settle_place(locked, &path, recorded)
}

/// Removes the mark, if there is one, from the directory of a recorded snapshot. If the snapshot
/// was not recorded, removes the directory beside a runtime; otherwise recovery does. Returns
/// `recorded`.
///
/// # Errors
/// That of `recorded`, and those of removing the mark.
pub fn settle_place<T>(locked: &LockedBox<'_>, path: &Path, recorded: Result<T>) -> Result<T> {
    match &recorded {
        Ok(_) => path.parent().map_or(Ok(()), unmark)?,
        Err(_) if locked.change.is_shared() => remove_place(locked, path),
        Err(_) => {}
    }
    recorded
}

/// Removes the directory of a snapshot that was not recorded. Recovery removes what can't be
/// removed now.
pub fn remove_place(locked: &LockedBox<'_>, path: &Path) {
    let mark = path.with_file_name(UNRECORDED);
    let removed = durable::unlink(path).and_then(|()| durable::unlink(&mark));
    if let Err(error) = removed.and_then(|()| path.parent().map_or(Ok(()), durable::remove_dir)) {
        locked.store.events().info(&error.to_string());
    }
}

/// Returns the name of a snapshot's directory. Beside a runtime it is one that BoxLite does not use
/// when it is asked for a snapshot of the same name at that moment: BoxLite would move the live
/// disk there, over this layer or into a directory that is about to be removed. A snapshot that
/// replaces another also has such a name, because the other one still has the directory.
pub fn place_of(locked: &LockedBox<'_>, new: &NewSnapshotIdentity) -> String {
    if locked.change.is_shared() || new.replaces.is_some() {
        format!(".{}", new.id)
    } else {
        new.name.clone()
    }
}

/// Returns a name for a snapshot's directory that no other snapshot has, and that BoxLite gives
/// none.
///
/// # Errors
/// EIO without random bytes.
pub fn own_place() -> Result<String> {
    Ok(format!(".{}", snapshot_id()?))
}

/// Returns whether a snapshot's layer lies in a directory that BoxLite gives no snapshot, whatever
/// its name.
pub fn has_own_place(layer: &Path) -> bool {
    let place = layer.parent().and_then(Path::file_name);
    place.is_some_and(|place| place.as_encoded_bytes().starts_with(b"."))
}

/// Makes the directories of `snapshots/PLACE/disk.qcow2` and returns that path. `prepared` is a
/// directory to move to the place, if given.
///
/// # Errors
/// Those of system calls.
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
    // An existing directory may not be flushed: its maker was killed, or the flush failed.
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

/// Returns the time of a snapshot made now. It is later than that of every snapshot the box has,
/// even with several in one second, so that BoxLite and tools that go by times agree on the newest.
fn next_time(locked: &LockedBox<'_>) -> Result<i64> {
    let newest = locked.snapshots()?.iter().map(|it| it.shown_at).max();
    Ok(newest.map_or(now(), |newest| now().max(newest.saturating_add(1))))
}

/// Records a snapshot whose layer is in place, and deletes the row of the one that it replaces.
/// Returns the layer of that one.
///
/// # Errors
/// Those of reading the layer and of SQLite; ENOENT when the snapshot to replace is gone.
pub fn record_snapshot(
    locked: &mut LockedBox<'_>,
    new: &NewSnapshotIdentity,
    path: &Path,
    virtual_size: u64,
) -> Result<Option<PathBuf>> {
    let replaced = match &new.replaces {
        Some(id) => Some(mark_replaced(locked, id)?),
        None => None,
    };
    let created_at = match new.created_at {
        Some(created_at) => created_at,
        None => next_time(locked)?,
    };
    let meta = fs::metadata(path).context(|| format!("cannot look at {}", path.display()))?;
    let row = NewSnapshot {
        id: new.id.clone(),
        box_id: locked.record.id.clone(),
        name: new.name.clone(),
        path: path.display().to_string(),
        virtual_size,
        file_size: meta.len(),
        created_at,
    };
    locked.change.transaction(|rows| {
        if let Some(id) = &new.replaces {
            rows.delete_snapshot(&row.box_id, id)?;
        }
        rows.insert_snapshot(&row)
    })?;
    crash_point("snapshot.recorded");
    Ok(replaced)
}

/// Marks the directory of a snapshot that is about to be replaced, and returns its layer.
fn mark_replaced(locked: &mut LockedBox<'_>, id: &str) -> Result<PathBuf> {
    let snapshot = locked.snapshot(id)?;
    let layer = unread_layer(locked, &snapshot)?;
    mark_unrecorded_snapshot(&layer)?;
    crash_point("replace.marked");
    Ok(layer)
}

/// Makes a marked directory in the workspace for a snapshot that is not recorded yet.
///
/// # Errors
/// Those of system calls.
pub fn marked_dir(store: &Store) -> Result<Scratch> {
    let dir = store.workspace().scratch("snapshot")?;
    store.home().make_dir(&dir)?;
    write_mark(&dir)?;
    Ok(dir)
}

/// Removes the marked directory of a former snapshot. If other files are in it, they stay and
/// nothing is undone.
pub fn remove_snapshot_dir(store: &Store, dir: Option<&Path>) {
    if let Some(dir) = dir
        && let Err(error) =
            durable::unlink(&dir.join(UNRECORDED)).and_then(|()| durable::remove_dir(dir))
    {
        store
            .events()
            .info(&format!("{error}; its other files are left there"));
    }
}
