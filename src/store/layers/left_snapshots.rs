//! Layers of deleted snapshots that are not removed yet, because BoxLite may be about to restore
//! those snapshots.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The layer of a deleted snapshot: its row is gone, and its directory is marked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftSnapshot {
    /// The id of the box.
    pub box_id: String,
    /// The path of the layer, below the snapshots of the box.
    pub layer: PathBuf,
}

/// The layers that are left. Time is counted while this process runs and the computer is awake:
/// BoxLite's process had that time as well.
#[derive(Default)]
pub struct LeftSnapshots {
    layers: Mutex<Vec<(LeftSnapshot, Instant)>>,
}

impl LeftSnapshots {
    /// Adds a layer that may be freed later. One that is known keeps its time.
    pub fn add(&self, box_id: &str, layer: &Path) {
        let left = LeftSnapshot {
            box_id: box_id.to_owned(),
            layer: layer.to_owned(),
        };
        let mut layers = self.layers.lock();
        if layers.iter().all(|(known, _)| *known != left) {
            layers.push((left, Instant::now()));
        }
    }

    /// Takes out the layers that have been left for `time` at least.
    pub fn take_due(&self, time: Duration) -> Vec<LeftSnapshot> {
        let mut layers = self.layers.lock();
        let is_due = |(_, since): &mut (LeftSnapshot, Instant)| since.elapsed() >= time;
        layers
            .extract_if(.., is_due)
            .map(|(left, _)| left)
            .collect()
    }
}
