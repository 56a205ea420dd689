//! The disk of a box that runs, as it was at one moment: its virtual machine is paused while the top layer is
//! copied, or shared with a copy where the file system can, and what lies below does not change. Exports
//! and clones are made of the copy.
//!
//! The copy is a file without a name. It is kept as long as anybody reads it, and
//! whoever opens the export meanwhile gets the same state, for a file has one size for all who have it open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::archive::Export;
use crate::disk::{self, Chain, FileId};
use crate::event_log::EventLog;
use crate::exports::disks::{Disks, Source, display_name};
use crate::exports::plain::{Contents, Form, PlainExports, about_of};
use crate::exports::shared::Shared;
use crate::files::copies::{can_share, copy_contents};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::workspace::Workspace;
use crate::home::{Activity, BoxRecord, Home, Paused};
use crate::progress::Foreground;
use crate::{Context, Error, Result};

/// How long a copy that nobody has read yet is kept: who opened it, and was told its size, opens it once more.
const KEPT: Duration = Duration::from_secs(5);
/// How often somebody who waits is looked at, and whether copies are still read.
const LOOKED_AT: Duration = Duration::from_millis(10);
const SWEPT: Duration = Duration::from_secs(1);

/// Exports of any box: of one that runs, they are read from a copy of its disk.
pub struct PausedCopies {
    home: Arc<Home>,
    disks: Arc<Disks>,
    plain: Arc<PlainExports>,
    workspace: Arc<Workspace>,
    events: Arc<EventLog>,
    foreground: Arc<Foreground>,
    is_read_only: bool,
    /// Copies that are kept.
    kept: Arc<Mutex<KeptCopies>>,
    /// The boxes of which one is being made.
    copying: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

type KeptCopies = HashMap<(String, Form), PausedCopy>;

struct PausedCopy {
    export: Arc<Export>,
    contents: Contents,
    until: Instant,
}

impl PausedCopy {
    fn is_needed(&self) -> bool {
        Arc::strong_count(&self.export) > 1 || Instant::now() < self.until
    }
}

impl PausedCopies {
    pub(crate) fn new(
        shared: &Shared,
        disks: Arc<Disks>,
        plain: Arc<PlainExports>,
    ) -> PausedCopies {
        PausedCopies {
            home: shared.home.clone(),
            disks,
            plain,
            workspace: shared.workspace.clone(),
            events: shared.events.clone(),
            foreground: shared.foreground.clone(),
            is_read_only: shared.is_read_only,
            kept: Arc::default(),
            copying: Mutex::default(),
        }
    }

    /// Whether opening this export pauses a virtual machine first, which takes a while.
    pub fn pauses(&self, source: &Source, form: Form) -> bool {
        let Source::Live { box_id } = source else {
            return false;
        };
        self.kept_copy(box_id, form).is_none()
            && self.disks.record_of(source).is_ok_and(|record| {
                self.home.vm_process(&record).is_some()
                    && self.home.activity(&record) != Activity::Idle
            })
    }

    /// As [`PlainExports::open`], also of a box that runs. `go_on` is asked now and then whether anybody still
    /// wants it.
    ///
    /// # Errors
    /// As those; EBUSY when the virtual machine can't be paused, EINTR when nobody wants it any more, ENOSPC.
    pub fn open(
        &self,
        source: &Source,
        form: Form,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(Arc<Export>, Contents)> {
        let Source::Live { box_id } = source else {
            return self.plain.open(source);
        };
        if let Some(kept) = self.kept_copy(box_id, form) {
            return Ok(kept);
        }
        let record = self.disks.record_of(source)?;
        let Some(shim) = self.home.vm_process(&record) else {
            return self.plain.open(source);
        };
        self.foreground.touch();
        if self.is_read_only {
            return Err(Error::busy(format!(
                "box {} runs, and a mount that is read-only has no place for a copy of its disk; stop it first, or mount without ro",
                display_name(&record)
            )));
        }
        let turn = self
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
        if let Some(kept) = self.kept_copy(box_id, form) {
            return Ok(kept);
        }
        if self.home.activity(&record) == Activity::Idle {
            return self.plain.open(source);
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
        let chain = Chain::open_over(copy, &top, &self.disks.scope_of(&top))?;
        let (about, hash) = about_of(&record, chain.changed_at())?;
        let changed = chain.changed_at();
        let export = Arc::new(Export::plan(Arc::new(chain), about)?);
        // A copy is a state of its own, whatever its file has in common with that of another.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let contents = Contents::new(export.len(), changed, hash, number);
        let kept = PausedCopy {
            export: export.clone(),
            contents,
            until: Instant::now() + KEPT,
        };
        self.kept.lock().insert((box_id.clone(), form), kept);
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
        shim: crate::home::VmProcess,
        go_on: &dyn Fn() -> bool,
    ) -> Result<File> {
        let live = self.disks.existing_top(source, record)?;
        let message = || format!("cannot copy {}", live.display());
        let original = File::open(&live).context(message)?;
        let copy = self.workspace.unnamed_file("running")?;
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
        disk::forget_dirty(&copy, &live)?;
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
        let space = self.home.space()?;
        if space.available_bytes() >= wanted || can_share(original, copy) {
            return Ok(());
        }
        Err(Error::new(
            libc::ENOSPC,
            format!("a copy of it takes {wanted} bytes, more than is free where the home is"),
        ))
    }

    /// The copy that an export of a box is read from, if there is one.
    pub(crate) fn kept_copy(&self, box_id: &str, form: Form) -> Option<(Arc<Export>, Contents)> {
        let mut kept = self.kept.lock();
        let key = (box_id.to_owned(), form);
        let found = kept.get(&key)?;
        if !found.is_needed() {
            kept.remove(&key);
            return None;
        }
        Some((found.export.clone(), found.contents))
    }

    /// What that copy's archive is of.
    pub(crate) fn kept_contents(&self, source: &Source, form: Form) -> Option<Contents> {
        let Source::Live { box_id } = source else {
            return None;
        };
        let kept = self.kept.lock();
        let found = kept.get(&(box_id.clone(), form))?;
        found.is_needed().then_some(found.contents)
    }

    /// What the archive's bytes are of; None when the box has no disk yet. Costs a few stats unless
    /// the state changed, and never waits: if the state can change unseen, it is of this moment
    /// only.
    ///
    /// # Errors
    /// ENOENT, EIO.
    pub fn contents(&self, source: &Source, form: Form) -> Result<Option<Contents>> {
        if let Some(contents) = self.kept_contents(source, form) {
            return Ok(Some(contents));
        }
        self.plain.contents_now(source)
    }

    /// Somebody was told of a copy, and opens it once more.
    pub fn keep(&self, source: &Source, form: Form) {
        if let Source::Live { box_id } = source
            && let Some(kept) = self.kept.lock().get_mut(&(box_id.clone(), form))
        {
            kept.until = Instant::now() + KEPT;
        }
    }

    /// Somebody has opened the copy, and knew its size: it goes with those who read it.
    pub fn was_served(&self, source: &Source, form: Form) {
        if let Source::Live { box_id } = source
            && let Some(kept) = self.kept.lock().get_mut(&(box_id.clone(), form))
        {
            kept.until = Instant::now();
        }
    }

    /// The copy that these contents were read from.
    pub(crate) fn copy_read_as(&self, source: &Source, read: &Contents) -> Option<Arc<Export>> {
        let (export, contents) = self.kept_copy(source.box_id(), Form::Plain)?;
        let is_live = matches!(source, Source::Live { .. });
        (is_live && contents == *read).then_some(export)
    }

    /// Lets go of copies that nobody reads any more.
    fn sweep_later(&self) {
        let kept = Arc::downgrade(&self.kept);
        let sweep = move || {
            loop {
                std::thread::sleep(SWEPT);
                let Some(kept) = kept.upgrade() else { return };
                let mut kept = kept.lock();
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
