//! The state of a running box's disk as a layer of the home.

use std::fs::File;
use std::sync::Arc;

use crate::archive::Export;
use crate::disk::FileId;
use crate::exports::Source;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::listing::resolve;
use crate::home::base_id;
use crate::store::Store;
use crate::store::access::beside_runtime::replaced_just_now;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::flatten::{
    FlattenedLayers, plan_difference, plan_flatten_of, write_flattened,
};
use crate::store::layers::frozen::{Frozen, FrozenDisk, record_frozen};
use crate::store::layers::mergeable::{BACKING_LEFT, MOST_BACKING};
use crate::{Context, Error, Result, disk};

/// Writes the top layers of the copy as a proper image: the copied file may end in the middle of a
/// change of its tables. Takes as many layers as it needs to reach one outside of all boxes.
///
/// # Errors
/// ENOSPC, EIO and others of writing the image.
pub fn write_running(store: &Store, box_id: &str, export: &Export) -> Result<RunningState> {
    let chain = export.chain();
    let boxes = store.home().boxes_dir();
    let is_outside =
        |layer: &disk::Layer| resolve(layer.path()).is_ok_and(|path| !path.starts_with(&boxes));
    let mut upper = 1;
    while chain
        .layers()
        .get(upper)
        .is_some_and(|layer| !is_outside(layer))
    {
        upper += 1;
    }
    // A live disk on top of the image must be able to start.
    let len = chain.layers().len();
    if len - upper + 2 > MOST_BACKING {
        upper = (len + 1).saturating_sub(BACKING_LEFT).max(upper);
    }
    let virtual_size = chain.virtual_size();
    let live = chain.layers().first().map(|layer| layer.path().to_owned());
    let live = live.ok_or_else(|| Error::damaged("the disk has no layers"))?;
    let plan = plan_flatten_of(chain.clone(), &live, upper)?;
    // The difference from an earlier snapshot, where that is worth a layer more.
    let difference = match earlier_copy(store, box_id, chain, upper)? {
        Some(earlier) => Some(plan_difference((chain.clone(), upper), earlier, &live)?),
        None => None,
    };
    let plan = match difference {
        Some(difference) if difference.len() <= plan.len() / 2 => difference,
        _ => plan,
    };
    Ok(RunningState {
        image: write_flattened(store, plan, &mut |_| Ok(()))?,
        virtual_size,
    })
}

/// Returns the disk of the newest snapshot of the box that has the same layers as the chain below
/// the chain's `upper` ones, and the number of layers above them. None if there is no such snapshot,
/// or none on which a layer and a live disk can lie that still starts.
fn earlier_copy(
    store: &Store,
    box_id: &str,
    chain: &disk::Chain,
    upper: usize,
) -> Result<Option<(Arc<disk::Chain>, usize)>> {
    let catalog = store.home().catalog()?;
    let shared: Vec<FileId> = chain
        .layers()
        .iter()
        .skip(upper)
        .map(disk::Layer::id)
        .collect();
    let layers = store.layers.near(&store.home().queries()?, box_id)?;
    let mut snapshots: Vec<_> = catalog.snapshots_of(box_id).iter().collect();
    snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.shown_at));
    for snapshot in snapshots {
        let place = store.exports.disks.snapshot_layer(snapshot);
        let source = Source::Snapshot {
            box_id: box_id.to_owned(),
            snapshot_id: snapshot.id.clone(),
        };
        // BoxLite's snapshot of a running box goes on changing.
        if store.exports.disks.refuse_written(&source, &place).is_err() {
            continue;
        }
        let base = layers.at(&place).and_then(|file| layers.base_of(file.id));
        let Some(base) = base else { continue };
        let scope = store.exports.disks.scope_of(&base.path);
        let Ok(earlier) = disk::Chain::open_in(&base.path, &scope) else {
            continue;
        };
        let ids: Vec<FileId> = earlier.layers().iter().map(disk::Layer::id).collect();
        let is_same_size = earlier.virtual_size() == chain.virtual_size();
        if is_same_size
            && ids.len() > shared.len()
            && ids.ends_with(&shared)
            && ids.len() < MOST_BACKING
        {
            return Ok(Some((Arc::new(earlier), ids.len() - shared.len())));
        }
    }
    Ok(None)
}

/// Moves the written state into `bases/`. Order: the row, the file. Recovery frees both if nothing
/// reads them.
///
/// # Errors
/// EBUSY when the layer below is gone; those of system calls and of SQLite.
pub fn freeze_running(locked: &mut LockedBox<'_>, state: &RunningState) -> Result<FrozenDisk> {
    let base = locked.store.home().base_disk(&base_id()?);
    let file = &state.image.file;
    if let Some(below) = state.image.below {
        let layers = locked.layers()?;
        let is_there = layers.names_of(below).next().is_some()
            || disk::chain_paths(file)?
                .get(1)
                .is_some_and(|path| path.is_file());
        if !is_there {
            return Err(replaced_just_now(locked));
        }
    }
    record_frozen(locked, &base, file, state.virtual_size, None)?;
    crash_point("flat.recorded");
    locked.change.begin_exclusive()?;
    durable::rename(file, &base)?;
    crash_point("flat.installed");
    locked.store.spares.keep(&base);
    let opened = File::open(&base).context(|| format!("cannot open {}", base.display()))?;
    Ok(FrozenDisk {
        layer: Frozen::Base { path: base.clone() },
        virtual_size: state.virtual_size,
        top: base,
        file: Arc::new(opened),
    })
}

/// The state of a running box's disk, written as an image in the workspace.
pub struct RunningState {
    /// The image.
    pub image: FlattenedLayers,
    /// Virtual size in bytes.
    pub virtual_size: u64,
}
