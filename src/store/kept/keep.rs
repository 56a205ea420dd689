//! Makes entries: before a box, a snapshot or a disk goes, the entry is complete on disk.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::disk::{FileId, Header};
use crate::exports::display_name;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::workspace::Scratch;
use crate::home::{KeptFrom, KeptRows, NewBase, SnapshotRecord, Space, WHY, base_id};
use crate::store::Store;
use crate::store::access::beside_runtime::{cloned_just_now, replaced_just_now};
use crate::store::access::locked_box::LockedBox;
use crate::store::kept::entries::{remove_entry, remove_undone};
use crate::store::layers::bases::new_base;
use crate::store::layers::freeze::layer_below_empty;
use crate::store::layers::frozen::Frozen;
use crate::store::layers::graph::LayerGraph;
use crate::{Context, Error, Result, disk};

/// The disk of an entry, and the file that it is a name of.
struct KeptDisk {
    file: PathBuf,
    id: FileId,
    /// The path in the entry.
    place: PathBuf,
}

impl KeptDisk {
    fn of(file: PathBuf, place: impl Into<PathBuf>) -> Result<KeptDisk> {
        Ok(KeptDisk {
            id: FileId::at(&file)?,
            place: place.into(),
            file,
        })
    }
}

/// Where an entry has the disk of its box, or of its snapshot.
const DISK: &str = "disks/disk.qcow2";

/// An entry that is complete, before what it keeps is gone.
pub struct NewEntry {
    id: String,
    /// The bases that were made for it: rows and names of disks that were no bases.
    bases: Vec<(NewBase, PathBuf)>,
}

/// Returns whether at least a tenth of the home's file system is free. Only then is anything kept.
pub fn has_room(store: &Store) -> bool {
    // The tests of everything else must not depend on the machine's disk.
    if cfg!(debug_assertions)
        && std::env::var_os("BOXLITEFS_UNDO_ANY_ROOM").is_some_and(|it| it == "1")
    {
        return true;
    }
    let space = Space::of(store.home());
    space.is_ok_and(|space| space.available_bytes() >= space.bytes() / 10)
}

fn keep_for(store: &Store) -> Option<Duration> {
    store.undo.filter(|_| has_room(store))
}

/// Flushes the live disk of a box that is about to be kept, before the lock is taken: the flush under
/// the lock is short then.
pub fn flush_early(store: &Store, box_id: &str) {
    if store.undo.is_some() {
        // A failure is met again under the lock.
        let _ = durable::sync_file(&store.home().live_disk(box_id));
    }
}

/// Keeps a box that is about to be removed, with all its snapshots that can be read. None if the mount
/// keeps nothing, or the box can't be kept, which is logged.
///
/// # Errors
/// EBUSY when BoxLite changed the box meanwhile; EIO.
pub fn keep_box(locked: &mut LockedBox<'_>) -> Result<Option<NewEntry>> {
    let Some(keep_for) = keep_for(locked.store) else {
        return Ok(None);
    };
    let kept = kept_box(locked, keep_for);
    or_without(locked, kept)
}

fn kept_box(locked: &mut LockedBox<'_>, keep_for: Duration) -> Result<NewEntry> {
    let mut disks = Vec::new();
    if let Some(live) = locked.live().filter(|live| is_image(live)) {
        disks.push(KeptDisk::of(live, DISK)?);
    }
    let mut snapshots = locked.snapshots()?;
    let layer = |row: &SnapshotRecord| locked.store.exports.disks.snapshot_layer(row);
    snapshots.retain(|row| is_image(&layer(row)));
    for row in &snapshots {
        let place = Path::new("snapshots").join(&row.id).join("disk.qcow2");
        disks.push(KeptDisk::of(layer(row), place)?);
    }
    let what = format!("removal of box {}", display_name(&locked.record));
    let from = KeptFrom::BoxRemoved;
    let rows = KeptRows::new(from, what, keep_for, &locked.record, snapshots);
    keep(locked, rows, &disks)
}

/// Keeps a snapshot that is about to be removed, as [`keep_box`] does a box.
///
/// # Errors
/// Those of [`keep_box`].
pub fn keep_snapshot(
    locked: &mut LockedBox<'_>,
    snapshot: &SnapshotRecord,
) -> Result<Option<NewEntry>> {
    let layer = locked.store.exports.disks.snapshot_layer(snapshot);
    let Some(keep_for) = keep_for(locked.store).filter(|_| is_image(&layer)) else {
        return Ok(None);
    };
    let name = display_name(&locked.record);
    let what = format!("removal of snapshot {} of box {name}", snapshot.name);
    let from = KeptFrom::SnapshotRemoved;
    let rows = KeptRows::new(from, what, keep_for, &locked.record, vec![snapshot.clone()]);
    let kept = KeptDisk::of(layer, DISK).and_then(|disk| keep(locked, rows, &[disk]));
    or_without(locked, kept)
}

/// Keeps the live disk, whose file is `old` and which is about to be replaced, as [`keep_box`] does a
/// box. None if it has nothing that a snapshot of the box does not have. `what` replaces it.
///
/// # Errors
/// Those of [`keep_box`].
pub fn keep_disk(
    locked: &mut LockedBox<'_>,
    live: &Path,
    old: FileId,
    what: String,
) -> Result<Option<NewEntry>> {
    let Some(keep_for) = keep_for(locked.store).filter(|_| is_image(live)) else {
        return Ok(None);
    };
    if equals_a_snapshot(locked, live).unwrap_or(false) {
        return Ok(None);
    }
    let from = KeptFrom::DiskReplaced;
    let rows = KeptRows::new(from, what, keep_for, &locked.record, Vec::new());
    let disk = KeptDisk {
        file: live.to_owned(),
        id: old,
        place: DISK.into(),
    };
    let kept = keep(locked, rows, &[disk]);
    or_without(locked, kept)
}

/// Returns whether a live disk is an empty overlay on the layer of a snapshot of its box.
fn equals_a_snapshot(locked: &LockedBox<'_>, live: &Path) -> Result<bool> {
    let Some(header) = Header::open(live)? else {
        return Ok(false);
    };
    let Some(Frozen::Base { path }) = layer_below_empty(locked, live, &header)? else {
        return Ok(false);
    };
    let below = FileId::at(&path)?;
    let snapshots = locked.snapshots()?;
    let mut layers = snapshots
        .iter()
        .map(|row| locked.store.exports.disks.snapshot_layer(row));
    Ok(layers.any(|layer| FileId::at(&layer).is_ok_and(|id| id == below)))
}

/// Returns whether a disk is an image whose chain can be followed. What can't be read is not kept.
fn is_image(file: &Path) -> bool {
    file.is_file()
        && Header::open(file).is_ok_and(|header| header.is_some())
        && disk::chain_paths(file).is_ok()
}

/// Goes on without an entry where none can be made: a full disk, or one without hard links, is no
/// reason to refuse a removal.
fn or_without(locked: &LockedBox<'_>, kept: Result<NewEntry>) -> Result<Option<NewEntry>> {
    match kept {
        Ok(entry) => Ok(Some(entry)),
        Err(error) if [libc::EBUSY, libc::EIO, libc::EROFS].contains(&error.errno()) => Err(error),
        Err(error) => {
            let name = display_name(&locked.record);
            locked.store.events().info(&format!(
                "box {name}: what goes now can't be had back, because it could not be kept: {error}"
            ));
            Ok(None)
        }
    }
}

/// What `bases/` and its rows lack of an entry's disks and of the layers below them.
#[derive(Default)]
struct Missing {
    /// Bases to make, each a further name of a file.
    bases: Vec<(NewBase, PathBuf)>,
    files: Vec<PathBuf>,
    /// Rows of bases that have none: a crash inside BoxLite's clone leaves such a base.
    rows: Vec<NewBase>,
    /// Ids of BoxLite's bases below. BoxLite goes by references and would delete them with the last
    /// box that refers to them.
    claimed: Vec<String>,
}

impl Missing {
    fn is_empty(&self) -> bool {
        self.bases.is_empty() && self.rows.is_empty() && self.claimed.is_empty()
    }
}

/// Makes an entry.
///
/// Order: the entry in the workspace; one transaction: rows of ours for disks that are no bases, and
/// BoxLite's bases below them become ours; the names in `bases/`; the entry is moved to its place.
///
/// A crash leaves an entry of something that is not gone, which recovery removes, and bases that
/// nothing needs. A live disk with a name in `bases/` is a freeze that was cut off, which recovery
/// undoes.
fn keep(locked: &mut LockedBox<'_>, mut rows: KeptRows, disks: &[KeptDisk]) -> Result<NewEntry> {
    let store = locked.store;
    remove_undone(store, Some(&locked.record.id))?;
    let catalog = store.home().catalog()?;
    let alike = catalog.kept().iter().filter(|it| it.rows.looks_like(&rows));
    rows.number += alike.map(|entry| entry.rows.number).max().unwrap_or(0);
    let id = store.home().new_kept_id(&rows)?;
    let prepared = prepare(store, &rows, disks)?;
    let missing = missing_of(locked, disks)?;
    if !missing.is_empty() {
        locked.change.transaction(|rows| {
            let made = missing.bases.iter().map(|(row, _)| row);
            let mut bases = made.chain(&missing.rows);
            bases.try_for_each(|row| rows.insert_base(row))?;
            let mut claimed = missing.claimed.iter();
            claimed.try_for_each(|id| rows.claim_base(id))
        })?;
    }
    crash_point("undo.recorded");
    let entry = NewEntry {
        id,
        bases: missing.bases,
    };
    let placed = locked.change.begin_exclusive().and_then(|()| {
        refuse_moved(locked, disks)?;
        entry.place(store, &missing.files, &prepared)
    });
    if let Err(error) = placed {
        entry.withdraw(locked);
        return Err(error);
    }
    Ok(entry)
}

fn refuse_moved(locked: &LockedBox<'_>, disks: &[KeptDisk]) -> Result<()> {
    let is_there = |disk: &KeptDisk| FileId::at(&disk.file).is_ok_and(|id| id == disk.id);
    if disks.iter().all(is_there) {
        return Ok(());
    }
    Err(replaced_just_now(locked))
}

/// Builds an entry in the workspace, durably.
fn prepare(store: &Store, rows: &KeptRows, disks: &[KeptDisk]) -> Result<Scratch> {
    let dir = store.workspace().scratch("undo")?;
    make_private_dir(store, &dir)?;
    // The deepest comes last when they are made, and first when they are flushed. All are made before
    // the first is flushed: then that flush writes the names of all of them.
    let mut parents = BTreeSet::new();
    for disk in disks {
        durable::sync_file(&disk.file)?;
        let name = dir.join(&disk.place);
        let mut of_disk: Vec<PathBuf> = disk
            .place
            .ancestors()
            .skip(1)
            .map(|it| dir.join(it))
            .collect();
        of_disk.reverse();
        for parent in of_disk {
            if !parent.is_dir() {
                make_private_dir(store, &parent)?;
            }
            parents.insert(parent);
        }
        fs::hard_link(&disk.file, &name)
            .context(|| format!("cannot link {} to {}", disk.file.display(), name.display()))?;
        durable::count_change();
        if FileId::at(&name)? != disk.id {
            return Err(Error::busy("the disk was replaced just now; try again").for_a_moment());
        }
    }
    for parent in parents.iter().rev() {
        durable::sync_file(parent)?;
    }
    let why = dir.join(WHY);
    let message = || format!("cannot write {}", why.display());
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        // It has secrets.
        .mode(0o600)
        .open(&why)
        .context(message)?;
    file.write_all(&rows.to_bytes()).context(message)?;
    file.sync_all().context(message)?;
    store.home().give_to_owner(&why)?;
    durable::sync_file(&dir)?;
    Ok(dir)
}

fn make_private_dir(store: &Store, dir: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().mode(0o700).create(dir);
    made.context(|| format!("cannot make the directory {}", dir.display()))?;
    store.home().give_to_owner(dir)
}

/// Returns the graph with a base among the names of each disk that has one.
fn layers_of(locked: &LockedBox<'_>, disks: &[KeptDisk]) -> Result<Rc<LayerGraph>> {
    let near = locked.near()?;
    let is_known = |disk: &KeptDisk| {
        let names = near.at(&disk.file).map_or(0, |file| file.names);
        // The entry that is being prepared is a name more.
        near.base_of(disk.id).is_some() || near.names_of(disk.id).count() as u64 + 1 >= names
    };
    if disks.iter().all(is_known) {
        Ok(near)
    } else {
        locked.layers().map(Rc::new)
    }
}

fn missing_of(locked: &LockedBox<'_>, disks: &[KeptDisk]) -> Result<Missing> {
    let layers = layers_of(locked, disks)?;
    let bases_dir = locked.store.home().bases_dir();
    let mut missing = Missing::default();
    let mut seen = Vec::new();
    for disk in disks {
        if seen.contains(&disk.id) {
            continue;
        }
        seen.push(disk.id);
        let base = layers.base_of(disk.id).map(|name| name.path.clone());
        let below = layers.chain(&disk.file).into_iter().skip(1);
        let below: Vec<PathBuf> = below.map(Path::to_owned).collect();
        if base.is_none() {
            let path = locked.store.home().base_disk(&base_id()?);
            missing.bases.push((new_base(&path, &disk.file)?, path));
            missing.files.push(disk.file.clone());
        }
        let reached = base.into_iter().chain(below);
        for path in reached.filter(|path| path.parent() == Some(bases_dir.as_path())) {
            match locked.base_at(&path)? {
                Some(row) if row.is_ours() || row.kind == "rootfs" => {}
                Some(row) if missing.claimed.contains(&row.id) => {}
                Some(row) => missing.claimed.push(row.id),
                None if locked.change.is_shared() => {
                    return Err(cloned_just_now(locked, &path));
                }
                None if missing.rows.iter().any(|row| Path::new(&row.path) == path) => {}
                None => missing.rows.push(new_base(&path, &path)?),
            }
        }
    }
    Ok(missing)
}

impl NewEntry {
    /// Gives the disks their names in `bases/`, then the entry its place.
    fn place(&self, store: &Store, files: &[PathBuf], prepared: &Path) -> Result<()> {
        for (file, (_, base)) in files.iter().zip(&self.bases) {
            let message = || format!("cannot link {} to {}", file.display(), base.display());
            fs::hard_link(file, base).context(message)?;
            durable::count_change();
        }
        if !self.bases.is_empty() {
            durable::sync_dir(&store.home().bases_dir())?;
        }
        crash_point("undo.linked");
        let undo = store.home().undo_dir();
        if !undo.is_dir() {
            make_private_dir(store, &undo)?;
            store.undo_is_durable.store(false, Ordering::Release);
        }
        if !store.undo_is_durable.load(Ordering::Acquire) {
            // Up to the home: whoever made these directories may not have flushed their names.
            durable::sync_parent(&undo)?;
            durable::sync_parent(&store.home().staging_dir())?;
            store.undo_is_durable.store(true, Ordering::Release);
        }
        durable::rename(prepared, &undo.join(&self.id))?;
        crash_point("undo.placed");
        Ok(())
    }

    /// Gives the bases that were made their spare names, once what the entry keeps is gone. A failure
    /// is only logged.
    pub fn finish(&self, store: &Store) {
        for (_, base) in &self.bases {
            store.spares.keep(base);
        }
    }

    /// Takes the entry back: what it keeps is not gone. What can't be removed now is left for
    /// recovery.
    pub fn withdraw(&self, locked: &mut LockedBox<'_>) {
        let store = locked.store;
        let mut removed = if store.home().undo_dir().join(&self.id).exists() {
            remove_entry(store, &self.id)
        } else {
            Ok(())
        };
        for (row, base) in &self.bases {
            let unlinked = durable::unlink(base);
            removed = removed.and(unlinked);
            let deleted = locked.change.withdraw(|rows| rows.delete_base(&row.id));
            removed = removed.and(deleted);
        }
        if let Err(error) = removed {
            let message = format!("{error}; the next mount of the home removes the rest");
            store.events().info(&message);
        }
    }
}
