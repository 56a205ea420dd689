//! Adopts layers that BoxLite froze inside a box: they become files of `bases/`. Headers may name
//! no other paths, so removing or renaming a snapshot touches no other file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::disk::FileId;
use crate::files::copies::copy_file;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::home::{Activity, base_id};
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::bases::new_base;
use crate::store::layers::chains::Chains;
use crate::store::layers::graph::{ImageFile, LayerGraph, Role};
use crate::{Error, Result, disk};

/// Limit on the rounds of adoption, more than any chain has layers. A chain that still names a
/// layer inside a box after that many rounds is a cycle.
const MAX_ROUNDS: usize = 256;

/// Adopts every layer inside a box that a chain of this box names. Returns the layers of the chains
/// after that.
///
/// # Errors
/// EIO when a chain is a cycle, and those of [`adopt`].
pub fn adopt_own_chains(locked: &mut LockedBox<'_>) -> Result<Rc<Chains>> {
    let boxes = locked.store.home().boxes_dir();
    for _ in 0..MAX_ROUNDS {
        let chains = locked.chains()?;
        let named = chains.named.iter();
        let unadopted: Vec<PathBuf> = named
            .filter(|path| path.starts_with(&boxes))
            .cloned()
            .collect();
        if unadopted.is_empty() {
            return Ok(chains);
        }
        for path in unadopted {
            adopt(locked, &path)?;
        }
    }
    Err(Error::damaged(format!(
        "box {} still reads layers inside of boxes after {MAX_ROUNDS} rounds of adoption, so its backing chain is a cycle; run boxlitefs check",
        locked.record.id
    )))
}

/// Adopts the layers inside a box that a chain of this running box names. The header of the live
/// disk stays as it is and keeps naming its layer by the name inside the box.
///
/// # Errors
/// Those of [`adopt`].
pub fn adopt_frozen_chains(locked: &mut LockedBox<'_>) -> Result<()> {
    let boxes = locked.store.home().boxes_dir();
    let chains = locked.chains()?;
    let live = locked.live();
    let inside = chains.all().filter(|path| path.starts_with(&boxes));
    let unadopted: Vec<PathBuf> = inside
        .filter(|path| Some(*path) != live.as_deref())
        .map(Path::to_owned)
        .collect();
    for path in unadopted {
        if layers_at(locked, &path)?.readers_of(&path).next().is_some() {
            adopt_with(locked, &path, true)?;
        }
    }
    Ok(())
}

/// Makes `path`, a layer inside a box, a base, and rebases every reader onto it. Returns the path
/// of the base.
///
/// Order: the row with the references of all readers, the name in `bases/`, the headers. A crash
/// leaves either a row without a file, which the next mount drops, or a second name with a row,
/// which the next adoption finds and uses. A rebase can be repeated. The row comes first because a
/// name without a row looks like the leftover of a crash inside BoxLite's clone, and would stay
/// forever.
///
/// # Errors
/// EPERM when the file is a live disk. EBUSY when a box that reads it is running, or when the file
/// was replaced. Those of system calls and of SQLite.
pub fn adopt(locked: &mut LockedBox<'_>, path: &Path) -> Result<PathBuf> {
    let is_running = locked.store.home().activity(&locked.record) != Activity::Idle;
    adopt_with(locked, path, is_running)
}

/// Adopts a layer. With `is_running`, the header of this box's live disk stays as it is.
fn adopt_with(locked: &mut LockedBox<'_>, path: &Path, is_running: bool) -> Result<PathBuf> {
    let layers = layers_at(locked, path)?;
    refuse_active_readers(locked, &layers, path)?;
    let id = FileId::at(path)?;
    if let Some(live) = layers
        .names_of(id)
        .find(|name| matches!(name.role, Role::Live { .. }))
    {
        return Err(Error::new(
            libc::EPERM,
            format!(
                "{} is a live disk: its guest writes to it, so box {} must not read from it. Export what can still be read correctly, then import that",
                live.path.display(),
                locked.record.id
            ),
        ));
    }
    let existing = layers.base_of(id);
    let base = match existing {
        Some(name) => name.path.clone(),
        None => locked.store.home().base_disk(&base_id()?),
    };
    record_base(locked, &base, path, &layers.boxes_above(path))?;
    crash_point("adopt.recorded");
    locked.change.begin_exclusive()?;
    match existing {
        None => {
            durable::link(path, &base)?;
            crash_point("adopt.linked");
        }
        // A process may have been killed between making the name and flushing it.
        Some(_) => durable::sync_dir(&locked.store.home().bases_dir())?,
    }
    if FileId::at(&base)? != id {
        return Err(Error::busy(format!(
            "{} was replaced while it was being adopted; try again",
            path.display()
        )));
    }
    locked.store.spares.keep(&base);
    let mut rebased = BTreeSet::new();
    for reader in layers.readers_of(path) {
        let is_own = matches!(&reader.role, Role::Live { box_id } if *box_id == locked.record.id);
        if is_running && is_own {
            continue;
        }
        if rebased.insert(reader.id) {
            rebase(locked, &layers, reader, &base)?;
            crash_point("adopt.rebased");
        }
    }
    Ok(base)
}

/// Returns the graph with all readers of this layer, and all names of those readers.
fn layers_at(locked: &LockedBox<'_>, path: &Path) -> Result<Rc<LayerGraph>> {
    let inside = locked.store.home().box_of(path);
    let layers = locked.near_box(inside.unwrap_or(&locked.record.id))?;
    if is_adopted(locked, &layers, path)? {
        return Ok(layers);
    }
    // Boxes may share a reader, or a backup may have it; who does is known from all files.
    let all_named = layers
        .readers_of(path)
        .all(|reader| layers.names_of(reader.id).count() as u64 == reader.names);
    let is_named = |file: &ImageFile| layers.names_of(file.id).count() as u64 == file.names;
    if all_named && layers.at(path).is_some_and(is_named) {
        Ok(layers)
    } else {
        locked.layers().map(Rc::new)
    }
}

/// Returns whether a layer is a base already that no header names by this path, and no live disk.
/// Then it does not matter who else shares it: boxes that do refer to the base.
fn is_adopted(locked: &LockedBox<'_>, layers: &LayerGraph, path: &Path) -> Result<bool> {
    let Some(file) = layers.at(path) else {
        return Ok(false);
    };
    let (Some(base), None) = (layers.base_of(file.id), layers.readers_of(path).next()) else {
        return Ok(false);
    };
    let Some(row) = locked.base_at(&base.path)? else {
        return Ok(false);
    };
    let is_live = |id: &String| {
        let live = FileId::at(&locked.store.home().live_disk(id));
        live.is_ok_and(|live| live == file.id)
    };
    let boxes = locked.change.boxes_referring_to(&row.id)?;
    Ok(!boxes.iter().any(is_live))
}

/// Refuses to adopt a layer that another running box reads: its virtual machine has the header
/// open.
fn refuse_active_readers(locked: &LockedBox<'_>, layers: &LayerGraph, path: &Path) -> Result<()> {
    for reader in layers.readers_of(path) {
        if let Role::Live { box_id } = &reader.role
            && *box_id != locked.record.id
            && let Ok(record) = locked.change.box_by_id(box_id)
        {
            locked.change.watch(&record)?;
            locked.store.exports.disks.refuse_active(&record)?;
        }
    }
    Ok(())
}

/// Records the base, if it has no row yet, and a reference to it from each of these boxes.
fn record_base(
    locked: &mut LockedBox<'_>,
    base: &Path,
    file: &Path,
    boxes: &BTreeSet<String>,
) -> Result<()> {
    let row = locked.base_at(base)?;
    let new = match &row {
        Some(_) => None,
        None => Some(new_base(base, file)?),
    };
    let id = match (&row, &new) {
        (Some(row), _) => row.id.clone(),
        (None, Some(new)) => new.id.clone(),
        (None, None) => return Ok(()),
    };
    let has_row = |id: &&String| locked.change.box_by_id(id).is_ok();
    let with_rows: Vec<String> = boxes.iter().filter(has_row).cloned().collect();
    locked.change.transaction(|rows| {
        if let Some(new) = &new {
            rows.insert_base(new)?;
        }
        with_rows
            .iter()
            .try_for_each(|box_id| rows.insert_ref(&id, box_id))
    })
}

/// Rebases `reader` onto `base`. A file with names that the home does not know (a backup made of
/// hard links, for example) is copied first, so the header in the backup stays as it is.
///
/// # Errors
/// EBUSY when another file has the reader's name by now. Those of system calls.
pub fn rebase(
    locked: &LockedBox<'_>,
    layers: &LayerGraph,
    reader: &ImageFile,
    base: &Path,
) -> Result<()> {
    durable::count_change();
    let names: Vec<&ImageFile> = layers.names_of(reader.id).collect();
    if reader.names <= names.len() as u64 {
        return disk::rebase_this(&reader.path, reader.id, base);
    }
    let copy = locked.store.workspace().scratch("copy")?;
    copy_file(&reader.path, &copy)?;
    locked.store.home().give_to_owner(&copy)?;
    disk::rebase(&copy, base)?;
    durable::copy_times(&reader.path, &copy)?;
    durable::sync_file(&copy)?;
    for name in names {
        let link = locked.store.workspace().scratch("name")?;
        durable::link(&copy, &link)?;
        locked.store.workspace().replace(&link, &name.path)?;
        if matches!(name.role, Role::Base { .. }) {
            locked.store.spares.follow(&name.path)?;
        }
    }
    durable::unlink(&copy)
}
