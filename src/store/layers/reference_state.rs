//! The state of a box that a snapshot is compared with while it is copied in, so that only what
//! differs is stored.
//!
//! A box that comes back from a backup brings its snapshots one after the other, each as a whole
//! disk. They differ little from each other and from the box. The state is frozen before the first
//! byte is compared: what was left out because the state has it must not change any more.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{self, Chain, FileId, Header, Layer};
use crate::exports::Source;
use crate::store::Store;
use crate::store::access::lock::lock_shared;
use crate::store::layers::draft::draft_snapshot_clone;
use crate::store::layers::freeze_source::freeze_source;
use crate::store::layers::frozen::Frozen;
use crate::store::layers::mergeable::MOST_BACKING;
use crate::{Context, Result};

/// Most states that a disk is compared with to find the one that it differs from least.
const MOST_COMPARED: usize = 8;

/// Most clusters of 64 KiB that are compared for each of them.
const MOST_SAMPLES: usize = 32;

/// A frozen state of a box.
pub struct ReferenceState {
    /// The id of the box.
    pub box_id: String,
    /// Its layer in `bases/`.
    pub base: PathBuf,
    /// That file.
    pub id: FileId,
    /// Its layers, which stay open.
    pub chain: Arc<Chain>,
}

/// A state that a snapshot may be compared with.
struct Candidate {
    source: Source,
    /// When it was recorded, in seconds since 1970; the present state comes last.
    time: i64,
    /// Files of its chain.
    layers: usize,
}

/// A snapshot that is copied in: what is known of it before its disk.
#[derive(Clone, Copy)]
pub struct ComingSnapshot<'n> {
    /// The id of its box.
    pub box_id: &'n str,
    /// The id of the snapshot that it replaces, if any: a snapshot of the present state that was
    /// made with its directory.
    pub replaces: Option<&'n str>,
    /// When it was taken, in seconds since 1970.
    pub created_at: Option<i64>,
}

/// Freezes the state of its box that a snapshot probably differs from least. None if the box has no
/// state that the snapshot can be put on, for example because it runs; then the snapshot is stored
/// whole.
pub fn freeze_reference(store: &Store, coming: ComingSnapshot<'_>) -> Option<ReferenceState> {
    let frozen = candidates(store, coming)
        .map(|candidates| choose(candidates, coming.created_at))
        .and_then(|source| source.map_or(Ok(None), |source| freeze(store, &source)));
    frozen.unwrap_or_else(|error| {
        log::debug!(
            "a snapshot of box {} is stored whole: {error}",
            coming.box_id
        );
        None
    })
}

/// Freezes a state of the box that has most of what `disk`, which is on top of `reference`, has in
/// its top layer. None if no other state has more than half of it. Looks at the states nearest in
/// time, or at the newest, as far as they are known by now.
///
/// # Errors
/// EBUSY, EIO and others of reading and freezing the states.
pub fn freeze_nearer(
    store: &Store,
    coming: ComingSnapshot<'_>,
    reference: &ReferenceState,
    disk: &Chain,
) -> Result<Option<ReferenceState>> {
    let candidates = candidates(store, coming)?.filter(Candidate::has_room);
    let mut best = None;
    for (number, candidate) in candidates.take(MOST_COMPARED).enumerate() {
        let top = store.exports.disks.top_of(&candidate.source)?;
        let chain = store.exports.disks.open_chain(&top)?;
        let is_same = chain.layers().first().map(Layer::id) == Some(reference.id);
        if is_same && number == 0 && coming.created_at.is_some() {
            // It is the nearest in time.
            return Ok(None);
        }
        if is_same || chain.virtual_size() != disk.virtual_size() {
            continue;
        }
        let (compared, same) = disk::sample(disk, &chain, MOST_SAMPLES)?;
        if same > compared / 2 && best.as_ref().is_none_or(|(most, _)| same > *most) {
            best = Some((same, candidate.source));
        }
    }
    best.map_or(Ok(None), |(_, source)| freeze(store, &source))
}

fn freeze(store: &Store, source: &Source) -> Result<Option<ReferenceState>> {
    store.refuse_read_only()?;
    let box_id = source.box_id();
    let draft = draft_snapshot_clone(store, source)?;
    let mut locked = lock_shared(store, box_id)?;
    let frozen = freeze_source(&mut locked, source, &draft)?;
    let Frozen::Base { path } = frozen.layer else {
        return Ok(None);
    };
    locked.refer_to_chain(&path)?;
    drop(locked);
    let chain = Arc::new(store.exports.disks.open_chain(&path)?);
    flush(&chain)?;
    Ok(Some(ReferenceState {
        box_id: box_id.to_owned(),
        id: FileId::at(&path)?,
        base: path,
        chain,
    }))
}

/// Flushes all layers of a frozen state. BoxLite does not flush the layers that it freezes, and the
/// clusters that a snapshot shares with them exist nowhere else.
///
/// # Errors
/// Those of the flush.
pub fn flush(chain: &Chain) -> Result<()> {
    for layer in chain.layers() {
        let message = || format!("cannot flush {}", layer.path().display());
        layer.file().sync_data().context(message)?;
    }
    Ok(())
}

/// Returns the states of a box that another layer may be put on, nearest in time first. Headers are
/// read only of those that are looked at.
fn candidates<'s>(
    store: &'s Store,
    coming: ComingSnapshot<'_>,
) -> Result<impl Iterator<Item = Candidate> + use<'s>> {
    let catalog = store.home().catalog()?;
    let box_id = coming.box_id;
    let rows = catalog.snapshots_of(box_id).iter();
    let rows = rows.filter(|row| Some(&*row.id) != coming.replaces);
    let snapshots = rows.map(|row| {
        let source = Source::Snapshot {
            box_id: box_id.to_owned(),
            snapshot_id: row.id.clone(),
        };
        (source, row.shown_at)
    });
    let live = Source::Live {
        box_id: box_id.to_owned(),
    };
    let mut all: Vec<(Source, i64)> = snapshots.chain([(live, i64::MAX)]).collect();
    all.sort_by_key(|(_, time)| (distance(*time, coming.created_at), *time));
    let known = all.into_iter().filter_map(|(source, time)| {
        Some(Candidate {
            layers: layers(&store.exports.disks.top_of(&source).ok()?)?,
            source,
            time,
        })
    });
    Ok(known)
}

impl Candidate {
    /// Returns whether a box could start from one layer more.
    fn has_room(&self) -> bool {
        self.layers < MOST_BACKING
    }
}

/// Returns how far in time a state is from a snapshot, in seconds. Without a time it is how old the
/// state is, the present one last: the newest snapshot is the one that was copied last.
fn distance(time: i64, created_at: Option<i64>) -> u64 {
    match created_at {
        Some(created_at) => time.abs_diff(created_at),
        None if time == i64::MAX => u64::MAX,
        None => i64::MAX.abs_diff(time),
    }
}

/// Returns how many files the chain of a qcow2 image has; None if it can't be followed.
fn layers(top: &Path) -> Option<usize> {
    Header::open(top).ok()??;
    Some(disk::chain_paths(top).ok()?.len())
}

/// Chooses the state that is nearest in time. Where its chain is so long already that a box could
/// not start from one layer more, the one with the shortest chain: later snapshots find room on
/// this one. `candidates` come nearest first.
fn choose(
    mut candidates: impl Iterator<Item = Candidate>,
    created_at: Option<i64>,
) -> Option<Source> {
    let nearest = candidates.next()?;
    let chosen = if nearest.has_room() {
        nearest
    } else {
        let shorter = candidates.filter(Candidate::has_room);
        shorter.min_by_key(|it| (it.layers, distance(it.time, created_at), Reverse(it.time)))?
    };
    Some(chosen.source)
}

impl ReferenceState {
    /// Returns whether its layer still is where it was.
    pub fn is_in_place(&self) -> bool {
        FileId::at(&self.base).is_ok_and(|id| id == self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, time: i64, layers: usize) -> Candidate {
        let box_id = "box".to_owned();
        let source = match name {
            "live" => Source::Live { box_id },
            name => Source::Snapshot {
                box_id,
                snapshot_id: name.to_owned(),
            },
        };
        Candidate {
            source,
            time,
            layers,
        }
    }

    fn chosen(mut candidates: Vec<Candidate>, created_at: Option<i64>) -> Option<String> {
        candidates.sort_by_key(|it| (distance(it.time, created_at), it.time));
        choose(candidates.into_iter(), created_at).map(|source| match source {
            Source::Live { .. } => "live".to_owned(),
            Source::Snapshot { snapshot_id, .. } => snapshot_id,
        })
    }

    #[test]
    fn the_nearest_state_is_chosen_and_a_short_chain_when_that_of_the_nearest_is_too_long() {
        let live = || candidate("live", i64::MAX, 1);
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(chosen(vec![], Some(5)), None);
        assert_eq!(chosen(vec![live()], Some(5)), some("live"));
        assert_eq!(chosen(vec![live()], None), some("live"));
        let two = || vec![candidate("a", 10, 2), candidate("b", 20, 3), live()];
        assert_eq!(chosen(two(), Some(11)), some("a"));
        assert_eq!(chosen(two(), Some(30)), some("b"));
        assert_eq!(chosen(two(), None), some("b"));
        let long = || vec![candidate("a", 10, 7), candidate("b", 20, 8), live()];
        assert_eq!(chosen(long(), Some(21)), some("live"));
        assert_eq!(chosen(long(), Some(12)), some("a"));
        assert_eq!(chosen(vec![candidate("b", 20, 8)], Some(12)), None);
    }
}
