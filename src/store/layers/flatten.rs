//! The upper layers of a chain, or all of them, written out as one image in the workspace.

use std::fs;
use std::fs::{File, FileTimes};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::disk::{Chain, FileId, Flattened};
use crate::files::listing::resolve;
use crate::files::priority::BehindAll;
use crate::files::workspace::discard;
use crate::store::Store;
use crate::{Context, Result, disk};

/// Told how many bytes were written since the last time; an error ends the work.
pub type Pace<'p> = dyn FnMut(u64) -> Result<()> + 'p;

/// An image that has what the upper layers of a chain have, on top of the layer after them, and the
/// state of the top it was written from. Its file goes with it unless it was moved away.
pub struct FlattenedLayers {
    pub file: PathBuf,
    pub top: FileId,
    pub changed: SystemTime,
    /// The layer it lies on; None for an image that stands alone.
    pub below: Option<FileId>,
}

/// A [`FlattenedLayers`] that is not written yet.
pub struct FlattenPlan {
    chain: Arc<Chain>,
    image: Flattened,
    top: PathBuf,
    upper: usize,
}

/// Looks what the `upper` layers on top of a chain are as one. Reads tables, no data. Waits
/// until whatever changes the chain shows.
pub fn plan_flatten(store: &Store, top: &Path, upper: usize) -> Result<FlattenPlan> {
    let (chain, _) = store.exports.states.open_settled(top)?;
    plan_flatten_of(Arc::new(chain), top, upper)
}

/// Likewise, of a chain that is open; `top` is what it is called.
pub fn plan_flatten_of(chain: Arc<Chain>, top: &Path, upper: usize) -> Result<FlattenPlan> {
    let image = match chain.layers().get(upper) {
        Some(below) => Flattened::plan_upper(chain.clone(), upper, &resolve(below.path())?)?,
        None => Flattened::plan(chain.clone())?,
    };
    Ok(FlattenPlan {
        chain,
        image,
        top: top.to_owned(),
        upper,
    })
}

/// Writes a combination into the workspace, flushed.
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
        below: plan.chain.layers().get(plan.upper).map(|layer| layer.id()),
    };
    let message = || format!("cannot write {}", flattened.file.display());
    let out = File::create_new(&flattened.file).context(message)?;
    plan.image.write_to(&out, pace)?;
    plan.chain.unchanged()?;
    let mode = fs::metadata(&plan.top).context(message)?.permissions();
    out.set_permissions(mode).context(message)?;
    store.home().give_to_owner(&flattened.file)?;
    // The time of the state, which a top that is being written to does not have any more.
    let times = FileTimes::new()
        .set_accessed(flattened.changed)
        .set_modified(flattened.changed);
    out.set_times(times).context(message)?;
    out.sync_all().context(message)?;
    store
        .exports
        .states
        .note_stand_in(&out, &plan.chain, plan.upper)?;
    Ok(flattened)
}

impl FlattenPlan {
    /// Length of the image in bytes.
    pub fn len(&self) -> u64 {
        self.image.len()
    }
}

impl FlattenedLayers {
    /// Has it name the layer it lies on by the path that the chain at `top` now names that by: it may
    /// have been adopted since. False when that layer is not in the chain any more.
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
        // Moved into place, or not needed.
        discard(&self.file);
    }
}
