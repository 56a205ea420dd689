//! Adopting layers that BoxLite froze inside a box: they become files of `bases/`, the one place
//! whose paths headers may name, so that removing or renaming a snapshot touches no other file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::disk::FileId;
use crate::files::copies::copy_file;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::home::{Activity, base_id};
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::bases::new_base;
use crate::store::layers::graph::{ImageFile, LayerGraph, Role};
use crate::{Error, Result, disk};

/// More rounds than any chain has layers: a chain that still names a box's layer after as many is
/// a cycle.
const MAX_ROUNDS: usize = 256;

/// Adopts every layer inside a box that a chain of this box names.
pub fn adopt_own_chains(locked: &mut LockedBox<'_>) -> Result<()> {
    let boxes = locked.store.home().boxes_dir();
    for _ in 0..MAX_ROUNDS {
        let unadopted: BTreeSet<PathBuf> = locked
            .chains()?
            .into_iter()
            .flat_map(|chain| chain.into_iter().skip(1))
            .filter(|path| path.starts_with(&boxes))
            .collect();
        if unadopted.is_empty() {
            return Ok(());
        }
        for path in unadopted {
            adopt(locked, &path)?;
        }
    }
    Err(Error::damaged(format!(
        "the chain of box {} does not end",
        locked.record.id
    )))
}

/// Likewise of a box that runs, but for what lies above them all: the header of its live disk is left as it
/// is, and goes on naming the layer by the name inside the box.
pub fn adopt_frozen_chains(locked: &mut LockedBox<'_>) -> Result<()> {
    let boxes = locked.store.home().boxes_dir();
    let chains = locked.chains()?.into_iter().flatten();
    let live = locked.live();
    let unadopted: BTreeSet<PathBuf> = chains
        .filter(|path| path.starts_with(&boxes) && Some(path) != live.as_ref())
        .collect();
    for path in unadopted {
        if locked.layers()?.readers_of(&path).next().is_some() {
            adopt_with(locked, &path, true)?;
        }
    }
    Ok(())
}

/// Makes `path`, a layer inside a box, a base, and has every header that names it name the
/// base. Order: the row with the references of all readers, then the name in `bases/`, then the
/// headers. A crash leaves a row without a file, which the next mount drops, or a further name
/// with a row, which is found and used the next time; a rebase can be repeated. The row comes
/// first because a name without one can't be told from what a crash in BoxLite's clone leaves,
/// and would stay for ever.
pub fn adopt(locked: &mut LockedBox<'_>, path: &Path) -> Result<PathBuf> {
    let is_running = locked.store.home().activity(&locked.record) != Activity::Idle;
    adopt_with(locked, path, is_running)
}

/// `is_running`: the header of this box's live disk stays as it is.
fn adopt_with(locked: &mut LockedBox<'_>, path: &Path, is_running: bool) -> Result<PathBuf> {
    let layers = locked.layers()?;
    refuse_active_readers(locked, &layers, path)?;
    let id = FileId::at(path)?;
    if let Some(live) = layers
        .names_of(id)
        .find(|name| matches!(name.role, Role::Live { .. }))
    {
        return Err(Error::new(
            libc::EPERM,
            format!(
                "{} is a box's live disk, which its guest writes to; box {} must not read from it. Export what still reads right and import it again",
                live.path.display(),
                locked.record.id
            ),
        ));
    }
    let existing = layers
        .names_of(id)
        .find(|name| matches!(name.role, Role::Base { .. }));
    let base = match existing {
        Some(name) => name.path.clone(),
        None => locked.store.home().base_disk(&base_id()?),
    };
    record_base(locked, &base, path, &layers.boxes_above(path))?;
    crash_point("adopt.recorded");
    locked.change.hold()?;
    match existing {
        None => {
            durable::link(path, &base)?;
            crash_point("adopt.linked");
        }
        // Whoever was killed after he had made the name may not have come to flush it.
        Some(_) => durable::sync_dir(&locked.store.home().bases_dir())?,
    }
    if FileId::at(&base)? != id {
        return Err(Error::busy(format!(
            "{} was replaced at this moment; try again",
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

/// A header of a running box's disk is not touched: its virtual machine has it open.
fn refuse_active_readers(locked: &LockedBox<'_>, layers: &LayerGraph, path: &Path) -> Result<()> {
    for reader in layers.readers_of(path) {
        if let Role::Live { box_id } = &reader.role
            && *box_id != locked.record.id
            && let Ok(record) = locked.change.box_by_id(box_id)
        {
            locked.change.keep(&record)?;
            locked.store.exports.disks.refuse_active(&record)?;
        }
    }
    Ok(())
}

/// The row of a base, if it has none yet, and references of these boxes.
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
    let with_rows: Vec<String> = locked
        .change
        .boxes()?
        .into_iter()
        .map(|record| record.id)
        .filter(|id| boxes.contains(id))
        .collect();
    locked.change.transaction(|rows| {
        if let Some(new) = &new {
            rows.insert_base(new)?;
        }
        with_rows
            .iter()
            .try_for_each(|box_id| rows.insert_ref(&id, box_id))
    })
}

/// Has `reader` name `base`. A file with more names than the home knows (a backup made of hard
/// links, say) is copied first, so that the backup keeps the header it has.
pub fn rebase(
    locked: &LockedBox<'_>,
    layers: &LayerGraph,
    reader: &ImageFile,
    base: &Path,
) -> Result<()> {
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
