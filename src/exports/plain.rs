//! A disk state as an archive: planned once per state, then shared by all who read it.

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
use crate::home::{BoxRecord, Catalog, Remembered};
use crate::progress::Foreground;
use crate::{Context, Result};

/// Plans kept although nobody reads them: their layers stay open. More than a file manager looks
/// at in one window.
const KEPT_PLANS: usize = 8;

/// Exports planned before, each with what it depends on.
#[derive(Default)]
struct PlanCache {
    known: HashMap<Source, PlannedExport>,
    /// Sources with a plan.
    recent: Recent<Source, KEPT_PLANS>,
}

struct PlannedExport {
    state: State,
    contents: Contents,
    /// Since when it is known to be in this state.
    since: Instant,
    /// [`Export::state_key`].
    key: [u8; 32],
    /// None also while the state can change unseen.
    plan: Option<Arc<Export>>,
}

/// What the bytes of an export are of. A snapshot, a clone or a rebase changes the files of a chain
/// and none of this; whatever changes the disk's contents changes its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Length of the archive in bytes.
    pub size: u64,
    /// When the disk changed last.
    pub changed: SystemTime,
    /// Hash of what the manifest says of the box.
    about: u64,
    /// Which state the disk is in: see [`Store::state_number`]. Two may have one time, and one
    /// size.
    state: u64,
}

impl Contents {
    pub(crate) fn new(size: u64, changed: SystemTime, about: u64, state: u64) -> Contents {
        Contents {
            size,
            changed,
            about,
            state,
        }
    }

    /// The same in another form, of another length.
    pub(crate) fn with_size(self, size: u64) -> Contents {
        Contents { size, ..self }
    }
}

/// What an export is made of: as long as this is the same, so are its bytes.
#[derive(Clone, Debug)]
struct State {
    layers: LayerStates,
    /// Hash of the box's name and configuration.
    about: u64,
}

impl State {
    /// Whether nothing it depends on changed, which can be told.
    fn holds(&self, record: &BoxRecord, top: &Path) -> bool {
        self.layers.is_settled() && self.about == hash_of(record) && self.layers.hold(top)
    }
}

/// Why an export is looked at.
#[derive(Clone, Copy)]
enum Look {
    /// For its bytes: in a state that can't change unseen, which may have to be waited for.
    ToRead,
    /// For its size and its time, at once.
    ToShow,
}

/// Which file of a box is read. Each has a copy of its own: a state of one need not wait for readers of the
/// other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `export.boxlite`.
    Plain,
    /// `export.boxlite.zst`.
    Compressed,
}

/// What an archive says of a box, and the hash of that.
pub(crate) fn about_of(record: &BoxRecord, changed_at: SystemTime) -> Result<(About, u64)> {
    let config = record.config()?;
    let about = About {
        box_name: record.name.clone(),
        image: record.image(),
        options: config["options"].clone(),
        changed_at,
    };
    Ok((about, hash_of(record)))
}

fn hash_of(record: &BoxRecord) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&record.name, &record.config).hash(&mut hasher);
    hasher.finish()
}

/// The archives of disk states as plain `export.boxlite` files.
pub struct PlainExports {
    disks: Arc<Disks>,
    states: Arc<States>,
    remembered: Arc<Remembered>,
    foreground: Arc<Foreground>,
    cache: Mutex<PlanCache>,
}

impl PlainExports {
    pub(crate) fn new(
        disks: Arc<Disks>,
        states: Arc<States>,
        remembered: Arc<Remembered>,
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

    /// Returns what a disk state is called in messages.
    pub(crate) fn describe(&self, source: &Source) -> String {
        self.disks.describe(source)
    }

    /// The archive of a disk state, for reading. Waits until the state can't change unseen.
    ///
    /// # Errors
    /// ENODATA when the box has no disk yet, EBUSY while it runs, ENOENT, EIO.
    pub fn open(&self, source: &Source) -> Result<(Arc<Export>, Contents)> {
        self.foreground.touch();
        let record = self.disks.record_of(source)?;
        if let Source::Live { .. } = source {
            self.disks.refuse_active(&record)?;
        }
        self.planned(source, &record, Look::ToRead)
    }

    /// What the archive's bytes are of, whatever copies of a running box are being read; None when the box
    /// has no disk yet. Costs a few stats unless the state changed, and never waits: if the state can
    /// change unseen, it is of this moment only.
    ///
    /// # Errors
    /// ENOENT, EIO.
    pub(crate) fn contents_now(&self, source: &Source) -> Result<Option<Contents>> {
        let record = self.disks.record_of(source)?;
        let top = self.disks.top_of(source)?;
        if !top.is_file() {
            return Ok(None);
        }
        let known = {
            let exports = self.cache.lock();
            let known = exports.known.get(source);
            known.map(|known| (known.state.clone(), known.contents))
        };
        if let Some((state, contents)) = &known
            && state.holds(&record, &top)
        {
            return Ok(Some(*contents));
        }
        if let Source::Live { .. } = source
            && self.disks.refuse_active(&record).is_err()
        {
            // Nobody can open it while its disk changes under the plan: any size does for `ls`.
            let length = fs::metadata(&top).map_or(0, |meta| meta.len());
            let size = known.map_or(length, |(_, contents)| contents.size);
            return unreadable(&top, &record, size).map(Some);
        }
        match self.planned(source, &record, Look::ToShow) {
            // Likewise, while a layer is missing or damaged; and the name has to be there for who removes
            // the box, or restores it.
            Err(error) if error.errno() == libc::EIO => unreadable(&top, &record, 0).map(Some),
            planned => planned.map(|(_, contents)| Some(contents)),
        }
    }

    /// [`Export::state_key`] of the state that was planned last and has these contents.
    pub(crate) fn planned_key(&self, source: &Source, contents: &Contents) -> Option<[u8; 32]> {
        let exports = self.cache.lock();
        let known = exports.known.get(source)?;
        (known.contents == *contents).then_some(known.key)
    }

    fn planned(
        &self,
        source: &Source,
        record: &BoxRecord,
        look: Look,
    ) -> Result<(Arc<Export>, Contents)> {
        let top = self.disks.existing_top(source, record)?;
        {
            let mut exports = self.cache.lock();
            if let Some(known) = exports.known.get(source)
                && known.state.holds(record, &top)
                && let Some(plan) = known.plan.clone()
            {
                let contents = known.contents;
                exports.used(source);
                return Ok((plan, contents));
            }
        }
        // Planning reads metadata of the whole chain: not under a lock that `ls` needs.
        let (chain, layers) = match look {
            Look::ToRead => self.states.open_settled(&top)?,
            Look::ToShow => self.states.open_now(&top)?,
        };
        let since = self.known_since(source, &layers);
        self.plan(source, record, chain, layers, since)
    }

    /// Since when a disk state is known to have these layers.
    fn known_since(&self, source: &Source, layers: &LayerStates) -> Instant {
        let exports = self.cache.lock();
        let known = exports.known.get(source);
        let same = known.filter(|known| known.state.layers.is_same(layers));
        same.map_or_else(Instant::now, |known| known.since)
    }

    fn plan(
        &self,
        source: &Source,
        record: &BoxRecord,
        chain: Chain,
        mut layers: LayerStates,
        since: Instant,
    ) -> Result<(Arc<Export>, Contents)> {
        if since.elapsed() >= LONGEST_TICK {
            layers.was_watched();
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
        let known = PlannedExport {
            state: State {
                layers,
                about: hash,
            },
            contents,
            since,
            key: export.state_key(),
            plan: is_settled.then(|| export.clone()),
        };
        let mut exports = self.cache.lock();
        exports.known.insert(source.clone(), known);
        if is_settled {
            exports.used(source);
        }
        Ok((export, contents))
    }

    /// Lets go of the plans, and with them of the open layers, of states that are gone: their space
    /// comes back.
    pub fn forget_gone(&self, catalog: &Catalog) {
        let mut exports = self.cache.lock();
        exports.known.retain(|source, _| source.is_in(catalog));
        exports.recent.retain(|source| source.is_in(catalog));
    }

    /// Lets go of the plans that nobody reads, and with them of the open layers. Returns how many there
    /// were, and are.
    pub(crate) fn let_go_of_unread(&self) -> usize {
        let mut exports = self.cache.lock();
        let plans_before = exports.recent.oldest_first().len();
        for known in exports.known.values_mut() {
            if known
                .plan
                .as_ref()
                .is_some_and(|plan| Arc::strong_count(plan) == 1)
            {
                known.plan = None;
            }
        }
        let PlanCache { known, recent } = &mut *exports;
        recent.retain(|source| known.get(source).is_some_and(|known| known.plan.is_some()));
        plans_before
    }

    /// Whether anybody reads an export.
    pub(crate) fn is_read(&self) -> bool {
        let exports = self.cache.lock();
        let mut plans = exports
            .known
            .values()
            .filter_map(|known| known.plan.as_ref());
        plans.any(|plan| Arc::strong_count(plan) > 1)
    }
}

/// What is shown of an export that can't be opened.
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
    /// Notes that a plan was used, and lets go of those not used for long.
    fn used(&mut self, source: &Source) {
        self.recent.touch(source);
        while let Some(oldest) = self.recent.evict() {
            if let Some(known) = self.known.get_mut(&oldest) {
                known.plan = None;
            }
        }
    }
}
