//! The disk of a box that runs, as it was at one moment: its virtual machine is paused while the top layer is
//! copied, or shared with a copy where the file system can, and what lies below does not change. Exports
//! and clones are made of the copy.
//!
//! The copy is a file without a name. It is kept as long as anybody reads it, and
//! whoever opens the export meanwhile gets the same state, for a file has one size for all who have it open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::adopt::copy_contents;
use super::crash::crash_point;
use super::export::{Form, about_of};
use super::freeze::{Frozen, FrozenDisk, RunningState};
use super::prepare::Prepared;
use super::{Contents, Source, Store, display_name, durable, layers};
use crate::archive::Export;
use crate::disk::{self, Chain, FileId};
use crate::home::{Activity, BoxRecord, Paused, Space, VmProcess, base_id};
use crate::{Context, Error, Result};

/// How long a copy that nobody has read yet is kept: who opened it, and was told its size, opens it once more.
const KEPT: Duration = Duration::from_secs(5);
/// How often somebody who waits is looked at, and whether copies are still read.
const LOOKED_AT: Duration = Duration::from_millis(10);
const SWEPT: Duration = Duration::from_secs(1);

/// Copies that are kept, and the boxes of which one is being made.
#[derive(Default)]
pub(super) struct RunningCache {
    kept: Mutex<HashMap<(String, Form), Kept>>,
    copying: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

struct Kept {
    export: Arc<Export>,
    contents: Contents,
    until: Instant,
}

impl Kept {
    fn is_needed(&self) -> bool {
        Arc::strong_count(&self.export) > 1 || Instant::now() < self.until
    }
}

impl Store {
    /// Whether opening this export pauses a virtual machine first, which takes a while.
    pub fn pauses(&self, source: &Source, form: Form) -> bool {
        let Source::Live { box_id } = source else {
            return false;
        };
        self.kept_running(box_id, form).is_none()
            && self.record_of(source).is_ok_and(|record| {
                VmProcess::of(&self.home, &record).is_some()
                    && self.home.activity(&record) != Activity::Idle
            })
    }

    /// As [`Store::open_export`], also of a box that runs. `go_on` is asked now and then whether anybody still
    /// wants it.
    ///
    /// # Errors
    /// As those; EBUSY when the virtual machine can't be paused, EINTR when nobody wants it any more, ENOSPC.
    pub fn open_any_export(
        self: &Arc<Self>,
        source: &Source,
        form: Form,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(Arc<Export>, Contents)> {
        let Source::Live { box_id } = source else {
            return self.open_export(source);
        };
        if let Some(kept) = self.kept_running(box_id, form) {
            return Ok(kept);
        }
        let record = self.record_of(source)?;
        let Some(shim) = VmProcess::of(&self.home, &record) else {
            return self.open_export(source);
        };
        self.foreground.touch();
        if self.read_only {
            return Err(Error::busy(format!(
                "box {} runs, and a mount that is read-only has no place for a copy of its disk; stop it first, or mount without ro",
                display_name(&record)
            )));
        }
        let turn = self
            .running
            .copying
            .lock()
            .entry(box_id.clone())
            .or_default()
            .clone();
        let _turn = loop {
            if let Some(turn) = turn.try_lock_for(LOOKED_AT) {
                break turn;
            }
            if !go_on() {
                return Err(Error::new(libc::EINTR, "interrupted while waiting"));
            }
        };
        // Somebody else made one meanwhile, or it ended.
        if let Some(kept) = self.kept_running(box_id, form) {
            return Ok(kept);
        }
        if self.home.activity(&record) == Activity::Idle {
            return self.open_export(source);
        }
        let what = |error: Error| {
            let message = format!(
                "box {} runs, and its disk can't be copied: {error}",
                display_name(&record)
            );
            Error::new(error.errno(), message)
        };
        let copy = self
            .copy_running(source, &record, shim, go_on)
            .map_err(what)?;
        let top = self.home.live_disk(box_id);
        let chain = Chain::open_over(copy, &top, &self.scope_of(&top))?;
        let (about, hash) = about_of(&record, chain.changed_at())?;
        let changed = chain.changed_at();
        let export = Arc::new(Export::plan(Arc::new(chain), about)?);
        // A copy is a state of its own, whatever its file has in common with that of another.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let contents = Contents::new(export.len(), changed, hash, number);
        let kept = Kept {
            export: export.clone(),
            contents,
            until: Instant::now() + KEPT,
        };
        self.running
            .kept
            .lock()
            .insert((box_id.clone(), form), kept);
        self.sweep_later();
        self.events.info(&format!(
            "box {} runs: it was paused for a moment, and its disk copied",
            display_name(&record)
        ));
        Ok((export, contents))
    }

    /// Copies the top layer while the virtual machine stands still. The copy has the time of the original.
    fn copy_running(
        &self,
        source: &Source,
        record: &BoxRecord,
        shim: VmProcess,
        go_on: &dyn Fn() -> bool,
    ) -> Result<File> {
        let live = self.existing_top(source, record)?;
        let message = || format!("cannot copy {}", live.display());
        let original = File::open(&live).context(message)?;
        let copy = self.unnamed_file("running")?;
        self.refuse_no_room(&original, &copy)?;
        let paused = shim.pause(&live)?;
        crash_point("running.paused");
        if FileId::of_open(&original, &live)? != FileId::at(&live)? {
            return Err(Error::busy("the disk was replaced just now; try again"));
        }
        let mut still = || refuse_to_go_on(&paused, go_on);
        copy_contents(&original, &copy, &live, &mut still)?;
        paused.still()?;
        let meta = original.metadata().context(message)?;
        drop(paused);
        crash_point("running.copied");
        disk::clear_dirty(&copy, &live)?;
        durable::set_times(&copy, &meta).context(message)?;
        Ok(copy)
    }

    /// ENOSPC before anything is paused, where the copy could not be written. Where the blocks can be
    /// shared it takes none.
    fn refuse_no_room(&self, original: &File, copy: &File) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let wanted = original
            .metadata()
            .context(|| "cannot look at the disk")?
            .blocks()
            * 512;
        let space = Space::of(&self.home)?;
        if space.available_bytes() >= wanted || super::adopt::can_share(original, copy) {
            return Ok(());
        }
        Err(Error::new(
            libc::ENOSPC,
            format!("a copy of it takes {wanted} bytes, more than is free where the home is"),
        ))
    }

    /// The copy that an export of a box is read from, if there is one.
    pub(super) fn kept_running(&self, box_id: &str, form: Form) -> Option<(Arc<Export>, Contents)> {
        let mut kept = self.running.kept.lock();
        let key = (box_id.to_owned(), form);
        let found = kept.get(&key)?;
        if !found.is_needed() {
            kept.remove(&key);
            return None;
        }
        Some((found.export.clone(), found.contents))
    }

    /// What that copy's archive is of.
    pub(super) fn kept_contents(&self, source: &Source, form: Form) -> Option<Contents> {
        let Source::Live { box_id } = source else {
            return None;
        };
        let kept = self.running.kept.lock();
        let found = kept.get(&(box_id.clone(), form))?;
        found.is_needed().then_some(found.contents)
    }

    /// Somebody was told of a copy, and opens it once more.
    pub fn keep_running(&self, source: &Source, form: Form) {
        if let Source::Live { box_id } = source
            && let Some(kept) = self.running.kept.lock().get_mut(&(box_id.clone(), form))
        {
            kept.until = Instant::now() + KEPT;
        }
    }

    /// Somebody has opened the copy, and knew its size: it goes with those who read it.
    pub fn served_running(&self, source: &Source, form: Form) {
        if let Source::Live { box_id } = source
            && let Some(kept) = self.running.kept.lock().get_mut(&(box_id.clone(), form))
        {
            kept.until = Instant::now();
        }
    }

    /// The copy that these contents were read from.
    pub(super) fn running_export(&self, source: &Source, read: &Contents) -> Option<Arc<Export>> {
        let (export, contents) = self.kept_running(source.box_id(), Form::Plain)?;
        let is_live = matches!(source, Source::Live { .. });
        (is_live && contents == *read).then_some(export)
    }

    /// Lets go of copies that nobody reads any more.
    fn sweep_later(self: &Arc<Self>) {
        let store: Weak<Store> = Arc::downgrade(self);
        let sweep = move || {
            loop {
                std::thread::sleep(SWEPT);
                let Some(store) = store.upgrade() else { return };
                let mut kept = store.running.kept.lock();
                kept.retain(|_, kept| kept.is_needed());
                if kept.is_empty() {
                    return;
                }
            }
        };
        let started = std::thread::Builder::new()
            .name("running".into())
            .spawn(sweep);
        if let Err(error) = started {
            // It goes when the next one is asked for.
            log::warn!("copies of running boxes are kept for longer: {error}");
        }
    }
}

fn refuse_to_go_on(paused: &Paused, go_on: &dyn Fn() -> bool) -> Result<()> {
    paused.still()?;
    match go_on() {
        true => Ok(()),
        false => Err(Error::new(libc::EINTR, "interrupted while waiting")),
    }
}

impl Store {
    /// Writes the copy's top layer out as a proper image: what was copied may have been cut off in the middle of
    /// a change of its tables. So many layers as it takes to come to one that is no box's own.
    pub(super) fn write_running(&self, export: &Export) -> Result<RunningState> {
        let chain = export.chain();
        let boxes = self.home.boxes_dir();
        let is_outside = |layer: &disk::Layer| {
            layers::resolve(layer.path()).is_ok_and(|path| !path.starts_with(&boxes))
        };
        let mut upper = 1;
        while chain
            .layers()
            .get(upper)
            .is_some_and(|layer| !is_outside(layer))
        {
            upper += 1;
        }
        // A live disk on top of it has to start.
        let len = chain.layers().len();
        if len - upper + 2 > super::freeze::MOST_BACKING {
            upper = (len + 1)
                .saturating_sub(super::freeze::BACKING_LEFT)
                .max(upper);
        }
        let virtual_size = chain.virtual_size();
        let live = chain.layers().first().map(|layer| layer.path().to_owned());
        let live = live.ok_or_else(|| Error::damaged("the disk has no layers"))?;
        let plan = self.combining_chain(chain.clone(), &live, upper)?;
        Ok(RunningState {
            image: self.combine(plan, &mut |_| Ok(()))?,
            virtual_size,
        })
    }
}

impl Prepared<'_> {
    /// Puts the written state into `bases/`. Order: the row, then the file: without a reader, recovery frees both.
    pub(super) fn freeze_running(&mut self, state: &RunningState) -> Result<FrozenDisk> {
        let base = self.store.home.base_disk(&base_id()?);
        let file = &state.image.file;
        if let Some(below) = state.image.below {
            let layers = self.layers()?;
            let is_there = layers.names_of(below).next().is_some()
                || disk::chain_paths(file)?
                    .get(1)
                    .is_some_and(|path| path.is_file());
            if !is_there {
                return Err(self.replaced_just_now());
            }
        }
        self.record_frozen(&base, file, state.virtual_size, None)?;
        crash_point("flat.recorded");
        self.change.begin_exclusive()?;
        durable::rename(file, &base)?;
        crash_point("flat.installed");
        self.store.keep_spare(&base);
        let opened = File::open(&base).context(|| format!("cannot open {}", base.display()))?;
        Ok(FrozenDisk {
            layer: Frozen::Base { path: base.clone() },
            virtual_size: state.virtual_size,
            top: base,
            file: Arc::new(opened),
        })
    }
}
