//! Freezes any disk state, so that an overlay can start from it.

use crate::Result;
use crate::exports::Source;
use crate::home::is_kept_id;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::draft::Draft;
use crate::store::layers::freeze::{adopt_snapshot_layer, freeze_live, install_flattened};
use crate::store::layers::frozen::FrozenDisk;
use crate::store::layers::running::freeze_running;

/// Freezes the source, so that an overlay can start from it.
///
/// # Errors
/// EBUSY when the source is the live disk of a running box; those of [`freeze_live`],
/// [`install_flattened`], [`adopt_snapshot_layer`] and [`freeze_running`].
pub fn freeze_source(
    locked: &mut LockedBox<'_>,
    source: &Source,
    draft: &Draft,
) -> Result<FrozenDisk> {
    if let Some(state) = &draft.running {
        return freeze_running(locked, state);
    }
    // A snapshot can be used while its box is running: the live disk is left alone.
    if let Source::Live { .. } = source {
        locked.store.exports.disks.refuse_active(&locked.record)?;
    }
    let layer = match source {
        Source::Live { box_id } => locked.store.home().live_disk(box_id),
        Source::Snapshot { snapshot_id, .. } => locked
            .store
            .exports
            .disks
            .snapshot_layer(&locked.snapshot(snapshot_id)?),
    };
    let disks = &locked.store.exports.disks;
    disks.refuse_written(source, &layer)?;
    if let Some(flat) = install_flattened(locked, draft, &layer)? {
        return Ok(flat);
    }
    match source {
        Source::Live { box_id } if !is_kept_id(box_id) => freeze_live(locked, draft),
        Source::Live { .. } => adopt_snapshot_layer(locked, &layer),
        Source::Snapshot { .. } => adopt_snapshot_layer(locked, &layer),
    }
}
