//! Writes the upper layers of a chain, or all of them, as one image in the workspace.

use std::fs;
use std::fs::{File, FileTimes};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::disk::{Chain, FileId, Flattened, LeftOut};
use crate::files::listing::resolve;
use crate::files::priority::BehindAll;
use crate::files::workspace::discard;
use crate::store::Store;
use crate::{Context, Error, Result, disk};

/// Is called with the bytes written since the last call. An error ends the work.
pub type Pace<'p> = dyn FnMut(u64) -> Result<()> + 'p;

/// An image with the contents of the upper layers of a chain, on top of the layer below them.
/// Records the state of the top it was written from. Dropping it removes the file, unless that was
/// moved away.
pub struct FlattenedLayers {
    /// The image in the workspace.
    pub file: PathBuf,
    /// The top layer it was written from.
    pub top: FileId,
    /// When the state changed last.
    pub changed: SystemTime,
    /// The layer below the image; None for an image that stands alone.
    pub below: Option<FileId>,
}

/// A [`FlattenedLayers`] to be written.
pub struct FlattenPlan {
    chain: Arc<Chain>,
    image: Flattened,
    top: PathBuf,
    /// The layer below the image.
    below: Option<FileId>,
    /// How many layers of the chain it takes the place of, if it does.
    upper: Option<usize>,
}

/// Plans the image of the `upper` layers of the chain at `top`. Reads tables, but no data. Waits
/// until every later change of the chain shows in its timestamps.
///
/// # Errors
/// EBUSY when the chain is written to all the time; EIO and others of reading it.
pub fn plan_flatten(store: &Store, top: &Path, upper: usize) -> Result<FlattenPlan> {
    let (chain, _) = store.exports.states.open_settled(top)?;
    plan_flatten_of(Arc::new(chain), top, upper)
}

/// Plans the image of the `upper` layers of an open chain. `top` is the path of its top layer.
///
/// # Errors
/// Those of reading the chain.
pub fn plan_flatten_of(chain: Arc<Chain>, top: &Path, upper: usize) -> Result<FlattenPlan> {
    let image = match chain.layers().get(upper) {
        Some(below) => Flattened::plan_upper(chain.clone(), upper, &resolve(below.path())?)?,
        None => Flattened::plan(chain.clone())?,
    };
    Ok(FlattenPlan {
        below: chain.layers().get(upper).map(|layer| layer.id()),
        chain,
        image,
        top: top.to_owned(),
        upper: Some(upper),
    })
}

/// Plans the image of what differs in an open chain from another one, on top of that. `top` is the
/// path of the chain's top layer; each has so many layers on top of those that they share.
///
/// # Errors
/// Those of reading the chains.
pub fn plan_difference(
    (chain, upper): (Arc<Chain>, usize),
    (other, other_upper): (Arc<Chain>, usize),
    top: &Path,
) -> Result<FlattenPlan> {
    let base = other
        .layers()
        .first()
        .ok_or_else(|| Error::damaged("the disk has no layers"))?;
    let (below, path) = (base.id(), resolve(base.path())?);
    let image = Flattened::plan_differing((chain.clone(), upper), (other, other_upper), &path)?;
    Ok(FlattenPlan {
        chain,
        image,
        top: top.to_owned(),
        below: Some(below),
        upper: None,
    })
}

/// Plans an overlay with the clusters that were written of a received disk, at `received`. The layer
/// `id` at `base` has the rest.
///
/// # Errors
/// Those of reading the disk and the state.
pub fn plan_received(
    received: &Path,
    left_out: Arc<LeftOut>,
    (base, id): (&Path, FileId),
) -> Result<FlattenPlan> {
    let chain = Arc::new(Chain::open(received, Path::new("/"), 0)?);
    let image = Flattened::plan_received(chain.clone(), left_out, base)?;
    Ok(FlattenPlan {
        chain,
        image,
        top: received.to_owned(),
        below: Some(id),
        upper: None,
    })
}

/// Writes a planned image into the workspace and flushes it.
///
/// # Errors
/// EIO when the chain changed meanwhile; ENOSPC; the error of `pace`.
pub fn write_flattened(
    store: &Store,
    plan: FlattenPlan,
    pace: &mut Pace<'_>,
) -> Result<FlattenedLayers> {
    let _behind_all = BehindAll::begin();
    let flattened = FlattenedLayers {
        file: store.workspace().fresh_path("combined")?,
        top: plan
            .chain
            .layers()
            .first()
            .map_or_else(|| FileId::at(&plan.top), |layer| Ok(layer.id()))?,
        changed: plan.chain.changed_at(),
        below: plan.below,
    };
    let message = || format!("cannot write {}", flattened.file.display());
    let out = File::create_new(&flattened.file).context(message)?;
    plan.image.write_to(&out, pace)?;
    plan.chain.unchanged()?;
    let mode = fs::metadata(&plan.top).context(message)?.permissions();
    out.set_permissions(mode).context(message)?;
    store.home().give_to_owner(&flattened.file)?;
    // The time of the state. The top may have a later one by now, if it is being written to.
    let times = FileTimes::new()
        .set_accessed(flattened.changed)
        .set_modified(flattened.changed);
    out.set_times(times).context(message)?;
    out.sync_all().context(message)?;
    if let Some(upper) = plan.upper {
        let states = &store.exports.states;
        states.note_stand_in(&out, &plan.chain, upper)?;
    }
    Ok(flattened)
}

impl FlattenPlan {
    /// Returns the length of the image in bytes.
    pub fn len(&self) -> u64 {
        self.image.len()
    }
}

impl FlattenedLayers {
    /// Rebases the image onto the path by which the chain at `top` names its lower layer now: the
    /// layer may have been adopted meanwhile. Returns false when that layer has left the chain.
    ///
    /// # Errors
    /// Those of reading the chain and of the rebase.
    pub fn lies_on_chain_of(&self, top: &Path) -> Result<bool> {
        let Some(below) = self.below else {
            return Ok(true);
        };
        for path in disk::chain_paths(top)? {
            let path = resolve(&path)?;
            if FileId::at(&path)? == below {
                disk::rebase(&self.file, &path)?;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Drop for FlattenedLayers {
    fn drop(&mut self) {
        // The file is either moved into place or no longer needed.
        discard(&self.file);
    }
}
