//! Disk states as plain archives. An archive is planned once per state; all its readers share the
//! plan.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

use crate::archive::{About, Export};
use crate::disk::{Chain, LONGEST_TICK};
use crate::exports::disks::{Disks, Source};
use crate::exports::recent::Recent;
use crate::exports::states::{LayerStates, States};
use crate::home::{BoxRecord, Catalog, SizeCache};
use crate::progress::Foreground;
use crate::{Context, Result};

/// Plans kept without readers, of the sources used last. A kept plan holds its layers open. This is
/// more than a file manager shows in one window.
const KEPT_PLANS: usize = 8;

/// The last planned export of each source.
#[derive(Default)]
struct PlanCache {
    planned: HashMap<Source, PlannedExport>,
    /// Sources whose plan is kept.
    recent: Recent<Source, KEPT_PLANS>,
}

/// An export and what it was planned from.
struct PlannedExport {
    inputs: PlanInputs,
    contents: Contents,
    /// When the layers were first seen in this state.
    since: Instant,
    /// [`Export::state_key`].
    key: [u8; 32],
    /// None after eviction, and for a state that is not settled.
    plan: Option<Arc<Export>>,
    /// The sha256 of the disk, if it was known when the plan was evicted.
    digest: Option<[u8; 32]>,
}

impl PlannedExport {
    /// Drops the plan, and keeps what it found out about the disk.
    fn evict(&mut self) {
        if let Some(plan) = self.plan.take() {
            self.digest = plan.digest();
        }
    }

    /// Returns the sha256 of the disk in this state, if it is known.
    fn digest(&self) -> Option<[u8; 32]> {
        self.plan.as_ref().map_or(self.digest, |plan| plan.digest())
    }
}

/// The size in bytes of an export that can't be opened, since its box has no disk or a damaged one.
/// Programs don't open an empty file: they store it as it is, and then some delete it.
pub const UNREADABLE: u64 = 512;

/// Identifies the bytes of an export. A snapshot, a clone or a rebase changes the files of a chain
/// but not this. Every change of the disk's contents changes `state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Length of the archive in bytes.
    pub size: u64,
    /// When the disk last changed.
    pub changed: SystemTime,
    /// Hash of the box's name, configuration and network policy, which the manifest repeats.
    about: u64,
    /// [`States::state_number`] of the disk, or the number of a copy of a running disk. Tells apart
    /// states with the same size and time.
    state: u64,
}

impl Contents {
    /// Identifies an archive of `size` bytes; the other values are those of the fields.
    pub(crate) fn new(size: u64, changed: SystemTime, about: u64, state: u64) -> Contents {
        Contents {
            size,
            changed,
            about,
            state,
        }
    }

    /// Returns the same contents in an archive of `size` bytes, for example a compressed one.
    pub(crate) fn with_size(self, size: u64) -> Contents {
        Contents { size, ..self }
    }
}

/// Everything that the bytes of an export depend on.
#[derive(Clone, Debug)]
struct PlanInputs {
    layers: LayerStates,
    /// Hash of the box's name, configuration and network policy.
    about: u64,
}

impl PlanInputs {
    /// Returns whether the inputs are certain to be unchanged. False for a state that is not
    /// settled.
    fn are_current(&self, record: &BoxRecord, top: &Path) -> bool {
        self.layers.is_settled() && self.about == hash_of(record) && self.layers.are_current(top)
    }
}

/// What an export is planned for.
#[derive(Clone, Copy)]
enum Purpose {
    /// Its bytes. The state must be settled, so planning may wait.
    Read,
    /// Its size and time, without waiting.
    Show,
}

/// Which of a box's two exports is read. Each has its own copy of a running disk, so a new copy for
/// one never waits for readers of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `export.boxlite`.
    Plain,
    /// `export.boxlite.zst`.
    Compressed,
}

/// Returns what an archive's manifest says about a box, and the hash of the box's name and
/// configuration.
///
/// # Errors
/// Those of reading the box's configuration.
pub(crate) fn about_of(record: &BoxRecord, changed_at: SystemTime) -> Result<(About, u64)> {
    let about = About {
        box_name: record.name.clone(),
        image: record.image(),
        options: record.options_for_copy()?,
        changed_at,
    };
    Ok((about, hash_of(record)))
}

fn hash_of(record: &BoxRecord) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&record.name, &record.config).hash(&mut hasher);
    record.outbound_policy().to_string().hash(&mut hasher);
    hasher.finish()
}

/// Plans the plain archive, `export.boxlite`, of disk states, and caches the plans.
pub struct PlainExports {
    disks: Arc<Disks>,
    states: Arc<States>,
    remembered: Arc<SizeCache>,
    foreground: Arc<Foreground>,
    cache: Mutex<PlanCache>,
}

impl PlainExports {
    /// Returns the exports of these disks, with no plans.
    pub(crate) fn new(
        disks: Arc<Disks>,
        states: Arc<States>,
        remembered: Arc<SizeCache>,
        foreground: Arc<Foreground>,
    ) -> PlainExports {
        PlainExports {
            disks,
            states,
            remembered,
            foreground,
            cache: Mutex::default(),
        }
    }

    /// Returns the name of a disk state for messages.
    pub(crate) fn describe(&self, source: &Source) -> String {
        self.disks.describe(source)
    }

    /// Returns the archive of a disk state, for reading. Waits until the state is settled.
    ///
    /// # Errors
    /// ENODATA when the box has no disk yet; EBUSY while it runs, or when its disk does not settle;
    /// ENOENT when the box or snapshot is gone; EIO when a layer is missing or damaged.
    pub fn open(&self, source: &Source) -> Result<(Arc<Export>, Contents)> {
        self.open_now(source)
            .map_err(|error| self.disks.busy_if_moving(source, error))
    }

    fn open_now(&self, source: &Source) -> Result<(Arc<Export>, Contents)> {
        self.foreground.touch();
        let record = self.disks.record_of(source)?;
        if let Source::Live { .. } = source {
            self.disks.refuse_active(&record)?;
        }
        self.disks
            .refuse_written(source, &self.disks.existing_top(source, &record)?)?;
        self.find_or_plan(source, &record, Purpose::Read)
    }

    /// Returns what the archive contains now, regardless of copies of a running disk; None when the
    /// box has no disk yet. Costs one stat per layer unless the state changed, and never waits: an
    /// answer for a state that is not settled is valid for this moment only.
    ///
    /// # Errors
    /// ENOENT when the box or snapshot is gone, EIO when the disk can't be read.
    pub(crate) fn contents_now(&self, source: &Source) -> Result<Option<Contents>> {
        let record = self.disks.record_of(source)?;
        let top = self.disks.top_of(source)?;
        if !top.is_file() {
            return Ok(None);
        }
        let last = {
            let cache = self.cache.lock();
            let planned = cache.planned.get(source);
            planned.map(|planned| (planned.inputs.clone(), planned.contents))
        };
        if let Some((inputs, contents)) = &last
            && inputs.are_current(&record, &top)
        {
            return Ok(Some(*contents));
        }
        if let Source::Live { .. } = source
            && self.disks.refuse_active(&record).is_err()
        {
            // The live disk can't be opened for reading while the box is active: for `ls` any size
            // will do.
            let length = fs::metadata(&top).map_or(0, |meta| meta.len());
            let size = last.map_or(length, |(_, contents)| contents.size);
            return unreadable(&top, &record, size).map(Some);
        }
        match self.find_or_plan(source, &record, Purpose::Show) {
            // An export with a missing or damaged layer can't be opened either. It must still be
            // listed: a tool has to see the name to remove the box, or to restore it.
            Err(error) if error.errno() == libc::EIO => {
                unreadable(&top, &record, UNREADABLE).map(Some)
            }
            planned => planned.map(|(_, contents)| Some(contents)),
        }
    }

    /// Returns the [`Export::state_key`] of the last plan, if it was made for these contents.
    pub(crate) fn planned_key(&self, source: &Source, contents: &Contents) -> Option<[u8; 32]> {
        let cache = self.cache.lock();
        let planned = cache.planned.get(source)?;
        (planned.contents == *contents).then_some(planned.key)
    }

    /// Returns a state whose disk has this sha256 in an archive, of those whose archive was read
    /// lately, and what was read of it.
    pub(crate) fn state_with_digest(&self, digest: &[u8; 32]) -> Option<(Source, Contents)> {
        let cache = self.cache.lock();
        cache.planned.iter().find_map(|(source, planned)| {
            let is_same = planned.digest() == Some(*digest);
            is_same.then(|| (source.clone(), planned.contents))
        })
    }

    /// Returns the plan in the cache if it is current. Otherwise opens the chain and plans it.
    fn find_or_plan(
        &self,
        source: &Source,
        record: &BoxRecord,
        purpose: Purpose,
    ) -> Result<(Arc<Export>, Contents)> {
        let top = self.disks.existing_top(source, record)?;
        {
            let mut cache = self.cache.lock();
            if let Some(planned) = cache.planned.get(source)
                && planned.inputs.are_current(record, &top)
                && let Some(plan) = planned.plan.clone()
            {
                let contents = planned.contents;
                cache.touch(source);
                return Ok((plan, contents));
            }
        }
        // Planning reads the metadata of the whole chain, so it must not hold the lock that `ls`
        // needs.
        let (chain, layers) = match purpose {
            Purpose::Read => self.states.open_settled(&top)?,
            Purpose::Show => self.states.open_now(&top)?,
        };
        let since = self.unchanged_since(source, &layers);
        self.plan(source, record, chain, layers, since)
    }

    /// Returns when these layers were first seen in this state, or now.
    fn unchanged_since(&self, source: &Source, layers: &LayerStates) -> Instant {
        let cache = self.cache.lock();
        let planned = cache.planned.get(source);
        let same = planned.filter(|planned| planned.inputs.layers.is_same(layers));
        same.map_or_else(Instant::now, |planned| planned.since)
    }

    /// Plans an export and puts it into the cache.
    fn plan(
        &self,
        source: &Source,
        record: &BoxRecord,
        chain: Chain,
        mut layers: LayerStates,
        since: Instant,
    ) -> Result<(Arc<Export>, Contents)> {
        if since.elapsed() >= LONGEST_TICK {
            layers.mark_settled();
        }
        let (about, hash) = about_of(record, chain.changed_at())?;
        let (changed, number) = (chain.changed_at(), self.states.state_number(&chain)?);
        let export = Export::plan(Arc::new(chain), about)?;
        let contents = Contents::new(export.len(), changed, hash, number);
        let is_settled = layers.is_settled();
        if is_settled && let Some(digest) = self.remembered.digest(&export.disk_key()) {
            export.set_digest(digest);
        }
        let export = Arc::new(export);
        let planned = PlannedExport {
            inputs: PlanInputs {
                layers,
                about: hash,
            },
            contents,
            since,
            key: export.state_key(),
            plan: is_settled.then(|| export.clone()),
            digest: None,
        };
        let mut cache = self.cache.lock();
        let before = cache.planned.get(source);
        let of_same = before.filter(|before| is_settled && before.contents == contents);
        if let Some(digest) = of_same.and_then(PlannedExport::digest) {
            export.set_digest(digest);
        }
        cache.planned.insert(source.clone(), planned);
        if is_settled {
            cache.touch(source);
        }
        Ok((export, contents))
    }

    /// Drops the plans of disk states that are not in `catalog`. Their layers are closed, so their
    /// space is reclaimed.
    pub fn forget_gone(&self, catalog: &Catalog) {
        let mut cache = self.cache.lock();
        cache.planned.retain(|source, _| source.is_in(catalog));
        cache.recent.retain(|source| source.is_in(catalog));
    }

    /// Drops the plans without readers and closes their layers. Returns how many plans were kept
    /// before.
    pub(crate) fn let_go_of_unread(&self) -> usize {
        let mut cache = self.cache.lock();
        let plans_before = cache.recent.oldest_first().len();
        let PlanCache { planned, recent } = &mut *cache;
        for export in planned.values_mut() {
            if export
                .plan
                .as_ref()
                .is_some_and(|plan| Arc::strong_count(plan) == 1)
            {
                export.evict();
            }
        }
        let has_plan = |export: &PlannedExport| export.plan.is_some();
        recent.retain(|source| planned.get(source).is_some_and(has_plan));
        plans_before
    }

    /// Returns whether an export has a reader.
    pub(crate) fn is_in_use(&self) -> bool {
        let cache = self.cache.lock();
        let mut plans = cache.planned.values().filter_map(|it| it.plan.as_ref());
        plans.any(|plan| Arc::strong_count(plan) > 1)
    }
}

/// Returns what `ls` shows of an export that can't be opened.
fn unreadable(top: &Path, record: &BoxRecord, size: u64) -> Result<Contents> {
    let message = || format!("cannot look at {}", top.display());
    let meta = fs::metadata(top).context(message)?;
    Ok(Contents {
        size,
        changed: meta.modified().context(message)?,
        about: hash_of(record),
        state: 0,
    })
}

impl PlanCache {
    /// Makes the plan of `source` the most recently used one, and drops the plans beyond the limit.
    fn touch(&mut self, source: &Source) {
        self.recent.touch(source);
        while let Some(oldest) = self.recent.evict() {
            if let Some(planned) = self.planned.get_mut(&oldest) {
                planned.evict();
            }
        }
    }
}
