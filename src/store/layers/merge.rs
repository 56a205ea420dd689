//! Merges layers. A layer that only the layer above it needs becomes one with that layer, which
//! reclaims the space of data written twice. A live disk with too long a chain takes in as many
//! layers as a virtual machine needs to start from it again.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk::{FileId, Format, Header, Layer};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::listing::resolve;
use crate::files::workspace::Scratch;
use crate::home::{Space, is_open, is_open_for_writing};
use crate::store::Store;
use crate::store::access::lock::{lock_box, switch_to};
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::adopt::rebase;
use crate::store::layers::catalog_index::CatalogIndex;
use crate::store::layers::collect::{drop_base, named_by_rows};
use crate::store::layers::flatten::{FlattenedLayers, Pace, plan_flatten, write_flattened};
use crate::store::layers::graph::stamp;
use crate::store::layers::mergeable::{MergePlan, merges, shortening};
use crate::store::layers::references::free_surplus;
use crate::{Context, Error, Result};

/// How layers become one.
enum MergeStrategy {
    /// The layers below the top hold no data: the top's header names the layer below them.
    Rebase(PathBuf),
    /// The top is a live disk without data: the layer below takes its place.
    Promote,
    /// All layers are written out as one image.
    Copy(FlattenedLayers),
}

/// The result of a merge.
#[derive(Clone, Copy, Debug, Default)]
pub struct Merged {
    /// Bytes of disk space reclaimed. Negative for a live disk that received a copy of layers
    /// others keep.
    pub freed: i64,
}

/// Merges the layers of a plan. If they can't be merged now, because a box is running or a program
/// reads them, returns an error that says why and changes nothing.
///
/// Order: the boxes are locked and prepared; the layers are written as one image into the
/// workspace, without the lock; the boxes are locked again and the layers checked to be unchanged;
/// each name of the top is replaced by a name of the new file; the bases that nothing reads any
/// more are freed like any other. A crash leaves each name with the old or the new file, which read
/// the same, and bases of ours that nothing reads, which recovery frees.
///
/// # Errors
/// EBUSY, ENOSPC, EIO; ENODATA if merging would reclaim no space; the error of `pace`.
pub fn merge_layers(store: &Store, plan: &MergePlan, pace: &mut Pace<'_>) -> Result<Merged> {
    let plan = {
        let locked = lock_boxes(store, &plan.boxes)?;
        replan(&locked, plan)?.ok_or_else(|| changed(plan))?
    };
    // Any change from here on shows when the layers are checked again.
    store.exports.states.wait_for_clock(&plan.stamped());
    let strategy = choose_strategy(store, &plan, pace)?;
    crash_point("merge.prepared");
    store.exports.plain.let_go_of_unread();
    store.exports.views.let_go_of_unused();
    let mut locked = lock_boxes(store, &plan.boxes)?;
    let current = replan(&locked, &plan)?;
    if !current.is_some_and(|current| current.starts_with(&plan)) {
        return Err(changed(&plan));
    }
    refuse_open(&plan)?;
    // Holds the layers open until the lock is released: freeing large files takes time.
    let parts = plan.layers.iter();
    let open_layers: Vec<File> = parts
        .filter_map(|part| File::open(&part.path).ok())
        .collect();
    let old = match strategy {
        MergeStrategy::Rebase(_) => None,
        MergeStrategy::Promote | MergeStrategy::Copy(_) => link_live_aside(&locked, &plan)?,
    };
    let merged = match strategy {
        MergeStrategy::Rebase(below) => rebase_top(&mut locked, &plan, &below),
        MergeStrategy::Promote => promote(&mut locked, &plan),
        MergeStrategy::Copy(flattened) => replace_top(&mut locked, &plan, flattened),
    };
    if let Err(error) = merged {
        // A guest must not keep writing to a file that a power loss would remove.
        if let Some(old) = &old {
            let _ = restore_live(&plan, old);
        }
        return Err(error);
    }
    if let Some(old) = &old {
        refuse_written(&plan, old)?;
    }
    let dropped = drop_merged(&mut locked, &plan)?;
    drop(locked);
    drop((open_layers, old));
    let before = plan.layers.first().map_or(0, |part| part.allocated) + dropped;
    let after = allocated(plan.top());
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    Ok(Merged {
        freed: signed(before) - signed(after),
    })
}

/// Takes the lock and prepares all these boxes for a change.
fn lock_boxes<'s>(store: &'s Store, boxes: &BTreeSet<String>) -> Result<LockedBox<'s>> {
    let mut boxes = boxes.iter();
    let Some(first) = boxes.next() else {
        return Err(Error::damaged("cannot merge: no box reads these layers"));
    };
    let mut locked = lock_box(store, first)?;
    boxes.try_for_each(|id| switch_to(&mut locked, id))?;
    Ok(locked)
}

/// Chooses how to merge. Writes the image, if one is needed.
fn choose_strategy(store: &Store, plan: &MergePlan, pace: &mut Pace<'_>) -> Result<MergeStrategy> {
    if plan.frees
        && let Some(below) = base_below_empty(plan)?
    {
        return Ok(MergeStrategy::Rebase(below));
    }
    if is_promotable(plan)? {
        return Ok(MergeStrategy::Promote);
    }
    let flatten = plan_flatten(store, plan.top(), plan.layers.len())?;
    let lengths: u64 = plan.layers.iter().map(|part| part.stamp.0).sum();
    if plan.frees && flatten.len() > lengths {
        return Err(no_gain(plan));
    }
    refuse_full(store, flatten.len())?;
    let flattened = write_flattened(store, flatten, pace)?;
    if plan.frees && allocated(&flattened.file) > plan.allocated() {
        return Err(no_gain(plan));
    }
    Ok(MergeStrategy::Copy(flattened))
}

/// Refuses with ENOSPC unless the file system has room for that many bytes and a reserve.
fn refuse_full(store: &Store, bytes: u64) -> Result<()> {
    let space = Space::of(store.home())?;
    let left = space.available_bytes().saturating_sub(bytes);
    // The reserve for what guests and other programs write meanwhile.
    if left >= (space.bytes() / 100).min(1 << 30) {
        return Ok(());
    }
    Err(Error::new(
        libc::ENOSPC,
        format!(
            "cannot merge: merging writes {bytes} bytes before it reclaims any, and there is no room for them; free some space first"
        ),
    ))
}

fn no_gain(plan: &MergePlan) -> Error {
    Error::new(
        libc::ENODATA,
        format!(
            "{} and the layers below it would take more space merged than they take now",
            plan.top().display()
        ),
    )
}

/// Returns the bytes allocated to a file on the disk; 0 if it can't be read.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// Returns the EBUSY of a plan whose layers changed.
pub fn changed(plan: &MergePlan) -> Error {
    Error::busy(format!(
        "{} or a layer below it was changed just now; try again",
        plan.top().display()
    ))
}

/// Returns the layer below those below the top, if the top reads the same without them because they
/// hold no data.
///
/// # Errors
/// Those of reading the layers.
pub fn base_below_empty(plan: &MergePlan) -> Result<Option<PathBuf>> {
    let Some((top, below)) = plan.layers.split_first() else {
        return Ok(None);
    };
    let Some(last) = below.last() else {
        return Ok(None);
    };
    let header = qcow2_header(&last.path)?;
    let Some(base) = header.backing_path(&last.path) else {
        return Ok(None);
    };
    let base = resolve(&base)?;
    // The header declares a qcow2 backing file, and can't name a raw image.
    let Some(base_header) = Header::open(&base)? else {
        return Ok(None);
    };
    let seen = qcow2_header(&top.path)?
        .virtual_size
        .min(base_header.virtual_size);
    for part in below {
        let layer = Layer::open(&part.path, Format::Qcow2)?;
        // Beyond its end, a layer reads as zeros, whatever is below it.
        if layer.virtual_size() < seen || layer.holds_data()? {
            return Ok(None);
        }
    }
    Ok(Some(base))
}

/// Returns whether the layer below can become the live disk itself.
///
/// # Errors
/// Those of reading the layers.
pub fn is_promotable(plan: &MergePlan) -> Result<bool> {
    let [top, below, ..] = plan.layers.as_slice() else {
        return Ok(false);
    };
    if !plan.is_live || !plan.frees {
        return Ok(false);
    }
    let same_size =
        qcow2_header(&top.path)?.virtual_size == qcow2_header(&below.path)?.virtual_size;
    Ok(same_size && !Layer::open(&top.path, Format::Qcow2)?.holds_data()?)
}

fn qcow2_header(path: &Path) -> Result<Header> {
    Header::open(path)?
        .ok_or_else(|| Error::damaged(format!("{} is not a qcow2 image", path.display())))
}

/// Returns the plan as it is now. Returns None if its layers can't be merged any more.
fn replan(locked: &LockedBox<'_>, plan: &MergePlan) -> Result<Option<MergePlan>> {
    let layers = locked.layers()?;
    let Some(named) = named_by_rows(locked.store, &locked.change, &layers)? else {
        return Err(Error::busy(
            "cannot merge: the layer graph is incomplete; run boxlitefs check",
        ));
    };
    let (boxes, bases) = (locked.change.boxes()?, locked.change.bases()?);
    let rows = CatalogIndex::new(&boxes, &bases, &named);
    let current = if plan.frees {
        merges(&layers, &rows)
            .into_iter()
            .find(|merge| merge.top_id() == plan.top_id())
    } else {
        shortening(&layers, &rows, plan.top())
    };
    let Some(mut current) = current else {
        return Ok(None);
    };
    for name in &current.names {
        if let Some(row) = rows.bases.get(name)
            && locked.change.has_digest(&row.id)?
        {
            return Ok(None);
        }
    }
    current.layers.truncate(plan.layers.len());
    Ok((current.layers.len() > 1).then_some(current))
}

/// Refuses with EBUSY while any process has one of the layers open.
fn refuse_open(plan: &MergePlan) -> Result<()> {
    match plan.layers.iter().find(|part| is_open(&part.path)) {
        None => Ok(()),
        Some(part) => Err(Error::busy(format!(
            "{} is being read; try again when no program has it open",
            part.path.display()
        ))),
    }
}

/// Gives a live disk that is about to be replaced another name in the workspace.
fn link_live_aside(locked: &LockedBox<'_>, plan: &MergePlan) -> Result<Option<Scratch>> {
    if !plan.is_live {
        return Ok(None);
    }
    let old = locked.store.workspace().scratch("old")?;
    durable::link(plan.top(), &old)?;
    Ok(Some(old))
}

/// Refuses with EBUSY, and restores the old live disk, if that was written to while it was
/// replaced. No guest starts while we hold the lock, but a program like qemu-io, which ignores
/// BoxLite's locks, may have written to the disk.
fn refuse_written(plan: &MergePlan, old: &Path) -> Result<()> {
    let Some(top) = plan.layers.first() else {
        return Ok(());
    };
    let message = || format!("cannot look at {}", old.display());
    let meta = std::fs::symlink_metadata(old).context(message)?;
    let (length, modified, _) = stamp(&meta);
    let is_same = (length, modified) == (top.stamp.0, top.stamp.1);
    if is_same && !is_open_for_writing(old) {
        return Ok(());
    }
    restore_live(plan, old)?;
    Err(Error::busy(format!(
        "{} was written to while it was being replaced, so the old file is back in place; stop what writes to it and try again",
        plan.top().display()
    )))
}

/// Restores the live disk that was replaced.
fn restore_live(plan: &MergePlan, old: &Path) -> Result<()> {
    if let Some(below) = plan.layers.get(1)
        && FileId::at(plan.top())? == below.id
    {
        // The base that was moved over the live disk gets its name back first.
        durable::link(plan.top(), &below.path)?;
    }
    durable::rename(old, plan.top())
}

/// Rebases the top onto the layer below those without data. A crash leaves the old or the new
/// backing path.
fn rebase_top(locked: &mut LockedBox<'_>, plan: &MergePlan, below: &Path) -> Result<()> {
    let layers = locked.layers()?;
    if let Some(top) = layers.at(plan.top()) {
        rebase(locked, &layers, top, below)?;
    }
    crash_point("merge.rebased");
    Ok(())
}

/// Moves the layer below over a live disk that holds no data. A crash before the move leaves a base
/// of ours; a crash after it leaves a row of ours without a file.
fn promote(locked: &mut LockedBox<'_>, plan: &MergePlan) -> Result<()> {
    let [top, below, ..] = plan.layers.as_slice() else {
        return Ok(());
    };
    claim_base(locked, &below.path)?;
    crash_point("merge.claimed");
    // A live disk is written to, so no spare name may point to it.
    locked.store.spares.drop_durably(&below.path)?;
    // The state keeps its time.
    durable::copy_times(&top.path, &below.path)?;
    durable::sync_file(&below.path)?;
    durable::rename(&below.path, &top.path)?;
    durable::sync_dir(&locked.store.home().bases_dir())?;
    crash_point("merge.promoted");
    Ok(())
}

/// Moves a name of the new file over each name of the top. All new names are made first, so that
/// the moves follow each other without a pause.
fn replace_top(
    locked: &mut LockedBox<'_>,
    plan: &MergePlan,
    flattened: FlattenedLayers,
) -> Result<()> {
    if !flattened.lies_on_chain_of(plan.top())? {
        return Err(changed(plan));
    }
    let length = std::fs::metadata(&flattened.file).map_or(0, |meta| meta.len());
    let mut moves = Vec::new();
    for name in &plan.names {
        let link = locked.store.workspace().scratch("name")?;
        durable::link(&flattened.file, &link)?;
        moves.push((link, name));
    }
    // The image keeps no name of its own in the workspace.
    drop(flattened);
    crash_point("merge.written");
    for (new, name) in moves {
        locked.store.workspace().replace(&new, name)?;
        crash_point("merge.renamed");
        // The spare name follows before the layers below the old file are freed.
        locked.store.spares.follow(name)?;
    }
    locked.change.transaction(|rows| {
        let mut names = plan.names.iter();
        names.try_for_each(|name| rows.resize_layer(&name.display().to_string(), length))
    })
}

/// Marks a base as ours, if it is not.
///
/// # Errors
/// Those of SQLite.
pub fn claim_base(locked: &mut LockedBox<'_>, path: &Path) -> Result<()> {
    match locked.base_at(path)?.filter(|row| !row.is_ours()) {
        None => Ok(()),
        Some(row) => locked.change.transaction(|rows| rows.claim_base(&row.id)),
    }
}

/// Removes the bases below the top that nothing reads any more, and the references to them. Returns
/// the bytes they had allocated.
fn drop_merged(locked: &mut LockedBox<'_>, plan: &MergePlan) -> Result<u64> {
    if !plan.frees {
        free_surplus(locked)?;
        return Ok(0);
    }
    let mut layers = locked.layers()?;
    let mut dropped = 0;
    for part in plan.layers.iter().skip(1) {
        let path = &part.path;
        let is_needed = layers.readers_of(path).next().is_some()
            || layers.at(path).is_some_and(|file| file.names != 1);
        let Some(row) = locked.base_at(path)?.filter(|_| !is_needed) else {
            break;
        };
        drop_base(locked.store, &mut locked.change, &row, path)?;
        layers.forget(path);
        dropped += part.allocated;
    }
    Ok(dropped)
}
