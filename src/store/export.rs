//! A disk state as an archive: planned once per state, then shared by all who read it.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::running::Form;
use super::{Source, Store, called};
use crate::archive::{About, Export};
use crate::disk::{Chain, FileId};
use crate::home::{BoxRecord, Catalog};
use crate::{Context, Error, Result};

/// Plans kept although nobody reads them: their layers stay open. More than a file manager looks
/// at in one window.
const KEPT_PLANS: usize = 8;

/// Exports planned before, each with what it depends on.
#[derive(Default)]
pub(super) struct ExportCache {
    known: HashMap<Source, Known>,
    /// Sources with a plan, the one used last at the end.
    kept: Vec<Source>,
}

struct Known {
    state: State,
    contents: Contents,
    /// [`Export::state_key`].
    key: [u8; 32],
    plan: Option<Arc<Export>>,
}

/// What the bytes of an export are of. A snapshot, a clone or a rebase changes the files of a chain
/// and none of this; whatever changes the disk's contents changes its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Length of the archive in bytes.
    pub size: u64,
    /// When the disk changed last.
    pub changed: SystemTime,
    /// Hash of what the manifest says of the box.
    about: u64,
}

impl Contents {
    pub(super) fn new(size: u64, changed: SystemTime, about: u64) -> Contents {
        Contents {
            size,
            changed,
            about,
        }
    }

    /// The same in another form, of another length.
    pub(super) fn with_size(self, size: u64) -> Contents {
        Contents { size, ..self }
    }
}

/// The files of a chain as they were when it was opened: as long as they are the same, so are the disk's
/// bytes. A rebase changes neither length nor modification time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LayerStates(Vec<(PathBuf, FileId, u64, SystemTime)>);

impl LayerStates {
    /// Those of a chain.
    pub(super) fn of(chain: &Chain) -> Result<LayerStates> {
        let mut layers = Vec::new();
        for layer in chain.layers() {
            let sentence = || format!("cannot look at {}", layer.path().display());
            let meta = layer.file().metadata().context(sentence)?;
            layers.push((
                layer.path().to_path_buf(),
                layer.id(),
                meta.len(),
                meta.modified().context(sentence)?,
            ));
        }
        Ok(LayerStates(layers))
    }

    /// Whether a chain opened at `top` now would have the same: a stat for each layer, no file opened.
    pub(super) fn hold(&self, top: &std::path::Path) -> bool {
        self.0.first().is_some_and(|layer| layer.0 == top)
            && self.0.iter().all(|(path, id, size, changed)| {
                fs::metadata(path).is_ok_and(|meta| {
                    FileId::of(&meta) == *id
                        && meta.len() == *size
                        && meta.modified().is_ok_and(|time| time == *changed)
                })
            })
    }

    fn changed(&self) -> SystemTime {
        self.0.first().map_or(UNIX_EPOCH, |layer| layer.3)
    }
}

/// What an export is made of: as long as this is the same, so are its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    layers: LayerStates,
    /// Hash of the box's name and configuration.
    about: u64,
}

impl State {
    /// Whether nothing it depends on changed.
    fn holds(&self, record: &BoxRecord, top: &std::path::Path) -> bool {
        self.about == hash_of(record) && self.layers.hold(top)
    }
}

/// What an archive says of a box, and the hash of that.
pub(super) fn about_of(record: &BoxRecord, changed_at: SystemTime) -> Result<(About, u64)> {
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

impl Store {
    /// The archive of a disk state, for reading.
    ///
    /// # Errors
    /// ENODATA when the box has no disk yet, EBUSY while it runs, ENOENT, EIO.
    pub fn open_export(&self, source: &Source) -> Result<(Arc<Export>, Contents)> {
        self.foreground.touch();
        let record = self.record_of(source)?;
        if let Source::Live { .. } = source {
            self.refuse_active(&record)?;
        }
        self.planned(source, &record)
    }

    /// What the archive's bytes are of; None when the box has no disk yet. Costs a few stats unless
    /// the state changed.
    ///
    /// # Errors
    /// ENOENT, EIO.
    pub fn export_contents(&self, source: &Source) -> Result<Option<Contents>> {
        if let Some(contents) = self.kept_contents(source, Form::Plain) {
            return Ok(Some(contents));
        }
        self.contents_now(source)
    }

    /// Likewise, whatever copies of a running box are being read.
    pub(super) fn contents_now(&self, source: &Source) -> Result<Option<Contents>> {
        let record = self.record_of(source)?;
        let top = self.top_of(source)?;
        if !top.is_file() {
            return Ok(None);
        }
        let known = {
            let exports = self.exports.lock();
            let known = exports.known.get(source);
            known.map(|known| (known.state.clone(), known.contents))
        };
        if let Some((state, contents)) = &known
            && state.holds(&record, &top)
        {
            return Ok(Some(*contents));
        }
        if let Source::Live { .. } = source
            && self.refuse_active(&record).is_err()
        {
            // Nobody can open it while its disk changes under the plan: any size does for `ls`.
            let length = fs::metadata(&top).map_or(0, |meta| meta.len());
            let size = known.map_or(length, |(_, contents)| contents.size);
            return unreadable(&top, &record, size).map(Some);
        }
        match self.planned(source, &record) {
            // Likewise, while a layer is missing or damaged; and the name has to be there for who removes
            // the box, or restores it.
            Err(error) if error.errno() == libc::EIO => unreadable(&top, &record, 0).map(Some),
            planned => planned.map(|(_, contents)| Some(contents)),
        }
    }

    /// [`Export::state_key`] of the state that was planned last and has these contents.
    pub(super) fn planned_key(&self, source: &Source, contents: &Contents) -> Option<[u8; 32]> {
        let exports = self.exports.lock();
        let known = exports.known.get(source)?;
        (known.contents == *contents).then_some(known.key)
    }

    /// Whether there is a disk to export.
    pub fn has_disk(&self, source: &Source) -> bool {
        self.top_of(source).is_ok_and(|top| top.is_file())
    }

    /// When the disk state last changed.
    pub fn changed_at(&self, source: &Source) -> Option<SystemTime> {
        let top = self.top_of(source).ok()?;
        fs::metadata(top).and_then(|meta| meta.modified()).ok()
    }

    pub(super) fn record_of(&self, source: &Source) -> Result<BoxRecord> {
        self.home
            .catalog()?
            .box_by_id(source.box_id())
            .cloned()
            .ok_or_else(|| Error::new(libc::ENOENT, "the box is gone"))
    }

    /// The file on top of a chain that is there.
    pub(super) fn existing_top(&self, source: &Source, record: &BoxRecord) -> Result<PathBuf> {
        let top = self.top_of(source)?;
        if top.is_file() {
            return Ok(top);
        }
        Err(Error::new(
            libc::ENODATA,
            format!(
                "box {} has no disk yet; start it once with BoxLite",
                called(record)
            ),
        ))
    }

    fn planned(&self, source: &Source, record: &BoxRecord) -> Result<(Arc<Export>, Contents)> {
        let top = self.existing_top(source, record)?;
        {
            let mut exports = self.exports.lock();
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
        let (state, export) = self.plan(record, &top)?;
        if let Some(digest) = self.remembered.digest(&export.disk_key()) {
            export.set_digest(digest);
        }
        let export = Arc::new(export);
        let contents = Contents {
            size: export.len(),
            changed: state.layers.changed(),
            about: state.about,
        };
        let mut exports = self.exports.lock();
        exports.known.insert(
            source.clone(),
            Known {
                state,
                contents,
                key: export.state_key(),
                plan: Some(export.clone()),
            },
        );
        exports.used(source);
        Ok((export, contents))
    }

    fn plan(&self, record: &BoxRecord, top: &std::path::Path) -> Result<(State, Export)> {
        let chain = self.open_chain(top)?;
        let layers = LayerStates::of(&chain)?;
        let (about, hash) = about_of(record, chain.changed_at())?;
        let state = State {
            layers,
            about: hash,
        };
        Ok((state, Export::plan(Arc::new(chain), about)?))
    }

    /// Opens a chain. A change of ours may move a layer's name between reading a header and opening
    /// what it names; then the header has the new name already.
    pub(super) fn open_chain(&self, top: &std::path::Path) -> Result<Chain> {
        let scope = self.scope_of(top);
        let open = || Chain::open_in(top, &scope);
        match open() {
            Err(error) if error.errno() == libc::ENOENT => open().map_err(|error| {
                // Its name is there: that it can't be read is no ENOENT, which is taken for gone.
                match error.errno() == libc::ENOENT && top.exists() {
                    true => Error::damaged(error.to_string()),
                    false => error,
                }
            }),
            result => result,
        }
    }
}

impl Store {
    /// Lets go of the plans, and with them of the open layers, of states that are gone: their space
    /// comes back.
    pub fn forget_gone_exports(&self, catalog: &Catalog) {
        let mut exports = self.exports.lock();
        exports.known.retain(|source, _| source.is_in(catalog));
        exports.kept.retain(|source| source.is_in(catalog));
        drop(exports);
        self.forget_gone_compressed(catalog);
        self.forget_gone_insides(catalog);
    }
}

impl Store {
    /// Lets go of the plans that nobody reads, and with them of the open layers. Returns how many there
    /// were, and are.
    pub(super) fn let_go_of_unread_exports(&self) -> usize {
        let mut exports = self.exports.lock();
        let kept_before = exports.kept.len();
        for known in exports.known.values_mut() {
            if known
                .plan
                .as_ref()
                .is_some_and(|plan| Arc::strong_count(plan) == 1)
            {
                known.plan = None;
            }
        }
        let ExportCache { known, kept } = &mut *exports;
        kept.retain(|source| known.get(source).is_some_and(|known| known.plan.is_some()));
        kept_before
    }

    /// Whether anybody reads an export.
    pub(super) fn is_read(&self) -> bool {
        let exports = self.exports.lock();
        let mut plans = exports
            .known
            .values()
            .filter_map(|known| known.plan.as_ref());
        plans.any(|plan| Arc::strong_count(plan) > 1)
    }
}

/// What is shown of an export that can't be opened.
fn unreadable(top: &std::path::Path, record: &BoxRecord, size: u64) -> Result<Contents> {
    let sentence = || format!("cannot look at {}", top.display());
    let meta = fs::metadata(top).context(sentence)?;
    Ok(Contents {
        size,
        changed: meta.modified().context(sentence)?,
        about: hash_of(record),
    })
}

impl ExportCache {
    /// Notes that a plan was used, and lets go of those not used for long.
    fn used(&mut self, source: &Source) {
        self.kept.retain(|kept| kept != source);
        self.kept.push(source.clone());
        while self.kept.len() > KEPT_PLANS {
            let oldest = self.kept.remove(0);
            if let Some(known) = self.known.get_mut(&oldest) {
                known.plan = None;
            }
        }
    }
}
