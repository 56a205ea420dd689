//! The upper layers of a chain, or all of them, written out as one image in the workspace.

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::Store;
use super::layers::resolve;
use super::priority::BehindAll;
use super::workspace::discard;
use crate::disk::{self, Chain, FileId, Flattened};
use crate::{Context, Result};

/// Told how many bytes were written since the last time; an error ends the work.
pub(super) type Pace<'p> = dyn FnMut(u64) -> Result<()> + 'p;

/// An image that has what the upper layers of a chain have, on top of the layer after them, and the
/// state of the top it was written from. Its file goes with it unless it was moved away.
pub(super) struct Combined {
    pub file: PathBuf,
    pub top: FileId,
    pub changed: SystemTime,
    /// The layer it lies on; None for an image that stands alone.
    pub below: Option<FileId>,
}

/// A [`Combined`] that is not written yet.
pub(super) struct Combining {
    chain: Arc<Chain>,
    image: Flattened,
    top: PathBuf,
    upper: usize,
}

impl Store {
    /// Looks what the `upper` layers on top of a chain are as one. Reads tables, no data. Waits
    /// until whatever changes the chain shows.
    pub(super) fn combining(&self, top: &Path, upper: usize) -> Result<Combining> {
        let (chain, _) = self.open_settled(top)?;
        self.combining_chain(Arc::new(chain), top, upper)
    }

    /// Likewise, of a chain that is open; `top` is what it is called.
    pub(super) fn combining_chain(
        &self,
        chain: Arc<Chain>,
        top: &Path,
        upper: usize,
    ) -> Result<Combining> {
        let image = match chain.layers().get(upper) {
            Some(below) => Flattened::plan_upper(chain.clone(), upper, &resolve(below.path())?)?,
            None => Flattened::plan(chain.clone())?,
        };
        Ok(Combining {
            chain,
            image,
            top: top.to_owned(),
            upper,
        })
    }

    /// Writes a combination into the workspace, flushed.
    pub(super) fn combine(&self, plan: Combining, pace: &mut Pace<'_>) -> Result<Combined> {
        let _behind_all = BehindAll::begin();
        let combined = Combined {
            file: self.fresh_path("combined")?,
            top: plan
                .chain
                .layers()
                .first()
                .map_or_else(|| FileId::at(&plan.top), |layer| Ok(layer.id()))?,
            changed: plan.chain.changed_at(),
            below: plan.chain.layers().get(plan.upper).map(|layer| layer.id()),
        };
        let message = || format!("cannot write {}", combined.file.display());
        let out = File::create_new(&combined.file).context(message)?;
        plan.image.write_to(&out, pace)?;
        plan.chain.unchanged()?;
        let mode = fs::metadata(&plan.top).context(message)?.permissions();
        out.set_permissions(mode).context(message)?;
        self.home.give_to_owner(&combined.file)?;
        // The time of the state, which a top that is being written to does not have any more.
        let times = FileTimes::new()
            .set_accessed(combined.changed)
            .set_modified(combined.changed);
        out.set_times(times).context(message)?;
        out.sync_all().context(message)?;
        self.note_stand_in(&out, &plan.chain, plan.upper)?;
        Ok(combined)
    }
}

impl Combining {
    /// Length of the image in bytes.
    pub fn len(&self) -> u64 {
        self.image.len()
    }
}

impl Combined {
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

impl Drop for Combined {
    fn drop(&mut self) {
        // Moved into place, or not needed.
        discard(&self.file);
    }
}
