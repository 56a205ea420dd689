//! The disk of a running box, as it was at one moment. Exports and clones are made of a copy.
//!
//! [`RunningDisks`] copies the layer that the virtual machine writes. The layers below do not
//! change.
//!
//! The copy is an unnamed file, kept as long as it has readers. Opening the export meanwhile opens
//! the same copy, because a file has one size for all its readers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{ArcMutexGuard, Mutex, RawMutex};

use crate::archive::Export;
use crate::disk::Chain;
use crate::event_log::EventLog;
use crate::exports::disks::{Disks, Source, display_name};
use crate::exports::open_home::OpenHome;
use crate::exports::plain::{Contents, Form, PlainExports, about_of};
use crate::exports::production::{POLL_INTERVAL, interrupted};
use crate::exports::running_disk::RunningDisks;
use crate::exports::states::{LayerStates, States};
use crate::home::{Activity, BoxRecord, Home, VmProcess};
use crate::progress::Foreground;
use crate::{Error, Result};

/// How long a copy waits for its first reader: an open that finds out the size fails with ESTALE,
/// and the kernel opens the export once more.
const GRACE_PERIOD: Duration = Duration::from_secs(5);
/// How often to drop copies without readers.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Opens the exports of any box. Those of a running box are read from a copy of its disk.
pub struct PausedCopies {
    home: Arc<Home>,
    disks: Arc<Disks>,
    plain: Arc<PlainExports>,
    running: RunningDisks,
    events: Arc<EventLog>,
    foreground: Arc<Foreground>,
    is_read_only: bool,
    /// The copies in use.
    kept: Arc<Mutex<KeptCopies>>,
    /// A lock for each box, held while its disk is copied.
    copying: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

type KeptCopies = HashMap<(String, Form), PausedCopy>;

/// An export of a copied disk.
struct PausedCopy {
    export: Arc<Export>,
    contents: Contents,
    /// Until when it is kept without readers.
    until: Instant,
}

impl PausedCopy {
    /// Returns whether the copy has a reader, or may still get its first one.
    fn is_needed(&self) -> bool {
        Arc::strong_count(&self.export) > 1 || Instant::now() < self.until
    }
}

impl PausedCopies {
    /// Returns the exports of any box in a home, with no copies.
    pub(crate) fn new(
        opened: &OpenHome,
        disks: Arc<Disks>,
        states: Arc<States>,
        plain: Arc<PlainExports>,
    ) -> PausedCopies {
        let home = opened.home.clone();
        let workspace = opened.workspace.clone();
        PausedCopies {
            running: RunningDisks::new(home, disks.clone(), states, workspace),
            home: opened.home.clone(),
            disks,
            plain,
            events: opened.events.clone(),
            foreground: opened.foreground.clone(),
            is_read_only: opened.is_read_only,
            kept: Arc::default(),
            copying: Mutex::default(),
        }
    }

    /// Returns whether opening this export pauses a virtual machine first, which takes a while.
    pub fn pauses(&self, source: &Source, form: Form) -> bool {
        let Source::Live { box_id } = source else {
            return false;
        };
        self.kept_copy(box_id, form).is_none() && self.is_running(source)
    }

    /// Returns whether the box has a virtual machine that can be paused.
    pub(crate) fn is_running(&self, source: &Source) -> bool {
        self.disks.record_of(source).is_ok_and(|record| {
            VmProcess::of(&self.home, &record).is_some()
                && self.home.activity(&record) != Activity::Idle
        })
    }

    /// Opens the archive of a disk state as [`PlainExports::open`] does, also while the box runs.
    /// Polls `go_on` and gives up once that returns false.
    ///
    /// # Errors
    /// As [`PlainExports::open`]. For a running box: EBUSY when its virtual machine can't be paused
    /// or the mount is read-only, EINTR once `go_on` returns false, ENOSPC when the copy does not
    /// fit.
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
        let Some(shim) = VmProcess::of(&self.home, &record) else {
            return self.plain.open(source);
        };
        self.foreground.touch();
        if self.is_read_only {
            return Err(Error::busy(format!(
                "box {} runs, and a read-only mount has no place for the copy of its disk that an export is read from; stop the box first, or mount without ro",
                display_name(&record)
            )));
        }
        let _turn = self.turn_of(box_id, go_on)?;
        // Meanwhile another caller may have made a copy, or the box may have stopped.
        if let Some(kept) = self.kept_copy(box_id, form) {
            return Ok(kept);
        }
        if self.home.activity(&record) == Activity::Idle {
            return self.plain.open(source);
        }
        let (export, changed, hash) = self.copy_running(source, &record, shim, go_on)?;
        // Each copy is a state of its own, even where its file looks like that of another copy.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let contents = Contents::new(export.len(), changed, hash, number);
        let copy = PausedCopy {
            export: export.clone(),
            contents,
            until: Instant::now() + GRACE_PERIOD,
        };
        self.kept.lock().insert((box_id.clone(), form), copy);
        self.start_sweeper();
        Ok((export, contents))
    }

    /// Returns the state of a box's disk at one moment after the call, if the box runs. Unlike
    /// [`PausedCopies::open`], this never returns an older copy. None for an idle box.
    ///
    /// # Errors
    /// Those of [`PausedCopies::open`] for a running box.
    pub(crate) fn copy_now(
        &self,
        source: &Source,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Arc<Export>>> {
        let record = self.disks.record_of(source)?;
        let Some(vm) = VmProcess::of(&self.home, &record) else {
            return Ok(None);
        };
        let _turn = self.turn_of(source.box_id(), go_on)?;
        if self.home.activity(&record) == Activity::Idle {
            return Ok(None);
        }
        Ok(Some(self.copy_running(source, &record, vm, go_on)?.0))
    }

    /// Returns the disk of a running box as it is at one moment after the call, and its layers from
    /// before it was copied. None for an idle box. Copies at most `largest` bytes where the file
    /// system can't share blocks.
    ///
    /// # Errors
    /// EBUSY when the disk is larger, and those of [`PausedCopies::open`] for a running box.
    pub(crate) fn look(
        &self,
        source: &Source,
        largest: u64,
    ) -> Result<Option<(Chain, Option<LayerStates>)>> {
        let record = self.disks.record_of(source)?;
        let Some(vm) = VmProcess::of(&self.home, &record) else {
            return Ok(None);
        };
        let name = display_name(&record);
        if self.is_read_only {
            return Err(Error::busy(format!(
                "box {name} runs, and a read-only mount has no place for a copy of its disk; stop the box first, or mount without ro"
            )));
        }
        let go_on = || true;
        let _turn = self.turn_of(source.box_id(), &go_on)?;
        if self.home.activity(&record) == Activity::Idle {
            return Ok(None);
        }
        let (chain, before, pause) = self.copy_chain(source, &record, (vm, largest), &go_on)?;
        log::debug!(
            "box {name} was paused for {} ms, for a look",
            pause.as_millis()
        );
        Ok(Some((chain, before)))
    }

    /// Waits until no other thread copies the disk of this box.
    fn turn_of(
        &self,
        box_id: &str,
        go_on: &dyn Fn() -> bool,
    ) -> Result<ArcMutexGuard<RawMutex, ()>> {
        let turn = self
            .copying
            .lock()
            .entry(box_id.to_owned())
            .or_default()
            .clone();
        loop {
            if let Some(turn) = turn.try_lock_arc_for(POLL_INTERVAL) {
                return Ok(turn);
            }
            if !go_on() {
                return Err(interrupted());
            }
        }
    }

    /// Copies the disk of a running box, and plans its export. The hash is of what its manifest
    /// says of the box.
    fn copy_running(
        &self,
        source: &Source,
        record: &BoxRecord,
        vm: VmProcess,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(Arc<Export>, SystemTime, u64)> {
        let (chain, _, pause) = self.copy_chain(source, record, (vm, u64::MAX), go_on)?;
        let changed = chain.changed_at();
        let (about, hash) = about_of(record, changed)?;
        let export = Arc::new(Export::plan(Arc::new(chain), about)?);
        self.events.info(&format!(
            "box {} runs: it was paused for {} ms, and its disk copied",
            display_name(record),
            pause.as_millis()
        ));
        Ok((export, changed, hash))
    }

    /// Copies the disk of a running box, at most `largest` bytes where the file system can't share
    /// blocks. Returns the chain with the copy on top, the layers from before the copy began, and how
    /// long the virtual machine was paused.
    fn copy_chain(
        &self,
        source: &Source,
        record: &BoxRecord,
        (vm, largest): (VmProcess, u64),
        go_on: &dyn Fn() -> bool,
    ) -> Result<(Chain, Option<LayerStates>, Duration)> {
        let copy = self.running.copy(source, record, vm, largest, go_on);
        let copy = copy.map_err(|error| {
            let message = format!(
                "box {} runs, and its disk can't be copied: {error}",
                display_name(record)
            );
            Error::new(error.errno(), message)
        })?;
        let chain = Chain::open_over(copy.file, &copy.top, &self.disks.scope_of(&copy.top))?;
        Ok((chain, copy.before, copy.pause))
    }

    /// Returns the copy that an export of a box is read from, if there is one.
    pub(crate) fn kept_copy(&self, box_id: &str, form: Form) -> Option<(Arc<Export>, Contents)> {
        let mut kept = self.kept.lock();
        let key = (box_id.to_owned(), form);
        let copy = kept.get(&key)?;
        if !copy.is_needed() {
            kept.remove(&key);
            return None;
        }
        Some((copy.export.clone(), copy.contents))
    }

    /// Returns what the archive of that copy contains, if there is one.
    fn kept_contents(&self, source: &Source, form: Form) -> Option<Contents> {
        let Source::Live { box_id } = source else {
            return None;
        };
        let kept = self.kept.lock();
        let copy = kept.get(&(box_id.clone(), form))?;
        copy.is_needed().then_some(copy.contents)
    }

    /// Returns what the archive contains; None when the box has no disk yet. Costs one stat per
    /// layer unless the state changed, and never waits: an answer for a state that is not settled
    /// is valid for this moment only.
    ///
    /// # Errors
    /// ENOENT when the box or snapshot is gone, EIO when the disk can't be read.
    pub fn contents(&self, source: &Source, form: Form) -> Result<Option<Contents>> {
        if let Some(contents) = self.kept_contents(source, form) {
            return Ok(Some(contents));
        }
        self.plain.contents_now(source)
    }

    /// Keeps a copy for some seconds without readers: its size was just found out, and the caller
    /// opens it once more.
    pub fn keep(&self, source: &Source, form: Form) {
        self.keep_for(source, form, GRACE_PERIOD);
    }

    /// Keeps a copy only as long as it has readers: a caller that knew its size has opened it.
    pub fn was_served(&self, source: &Source, form: Form) {
        self.keep_for(source, form, Duration::ZERO);
    }

    fn keep_for(&self, source: &Source, form: Form, grace: Duration) {
        if let Source::Live { box_id } = source
            && let Some(copy) = self.kept.lock().get_mut(&(box_id.clone(), form))
        {
            copy.until = Instant::now() + grace;
        }
    }

    /// Returns the copy that bytes with these contents were read from, if it is still kept.
    pub(crate) fn copy_read_as(&self, source: &Source, read: &Contents) -> Option<Arc<Export>> {
        let (export, contents) = self.kept_copy(source.box_id(), Form::Plain)?;
        let is_live = matches!(source, Source::Live { .. });
        (is_live && contents == *read).then_some(export)
    }

    /// Starts a thread that drops copies without readers, and ends when no copy is left.
    fn start_sweeper(&self) {
        let kept = Arc::downgrade(&self.kept);
        let sweep = move || {
            loop {
                std::thread::sleep(SWEEP_INTERVAL);
                let Some(kept) = kept.upgrade() else { return };
                let mut kept = kept.lock();
                kept.retain(|_, copy| copy.is_needed());
                if kept.is_empty() {
                    return;
                }
            }
        };
        let started = std::thread::Builder::new()
            .name("running".into())
            .spawn(sweep);
        if let Err(error) = started {
            // The copy is dropped when the next one is asked for.
            log::warn!(
                "the copy of a running box's disk is kept until its export is opened again, since no thread can be started: {error}"
            );
        }
    }
}
