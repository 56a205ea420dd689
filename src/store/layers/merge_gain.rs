//! Works out what a merge would give back, without making it.

use std::path::PathBuf;

use crate::Result;
use crate::disk::Flattened;
use crate::store::Store;
use crate::store::layers::merge::{base_below_empty, is_promotable};
use crate::store::layers::mergeable::MergePlan;

/// Returns what a merge that frees the layers below the top would give back, by the way that it
/// would choose.
///
/// # Errors
/// Those of reading the layers.
pub fn gain_of(store: &Store, plan: &MergePlan) -> Result<u64> {
    let [top, below @ ..] = plan.layers.as_slice() else {
        return Ok(0);
    };
    if base_below_empty(plan)?.is_some() {
        return Ok(below.iter().map(|layer| layer.allocated).sum());
    }
    if is_promotable(plan)? {
        let rest = MergePlan {
            names: below.iter().take(1).map(|it| it.path.clone()).collect(),
            layers: below.to_vec(),
            ..plan.clone()
        };
        return Ok(top.allocated + gain_of(store, &rest)?);
    }
    let chain = store.exports.disks.open_chain(plan.top())?;
    let backing = chain.layers().get(plan.len());
    let backing = backing.map_or_else(PathBuf::new, |layer| layer.path().to_owned());
    let merged = Flattened::plan_upper(chain.into(), plan.len(), &backing)?;
    let lengths: u64 = plan.layers.iter().map(|layer| layer.stamp.0).sum();
    if merged.len() > lengths {
        // Such a merge is not made.
        return Ok(0);
    }
    Ok(plan.allocated().saturating_sub(merged.allocation()?))
}
