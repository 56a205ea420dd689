//! A disk state as a compressed archive: whose size is known, those being made, and those kept.
//!
//! The size of a compressed archive is known only after compressing. So whoever opens one waits until
//! it is: remembered, worked out from frames seen before, or made as a whole. What is made as a whole
//! is kept in a spool, a file without a name in the workspace, as long as the state lasts and the
//! cache has room; what is not is made again where it is read.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::archive::{
    Compressed, FrameKey, FrameSizes, KnownSizes, Stream, compressed_key, measure, produce,
};
use crate::error::not_panicking;
use crate::exports::compressed_cache::{CacheUsage, CompressedArchives, KnownArchive};
use crate::exports::disks::Source;
use crate::exports::paused_copy::PausedCopies;
use crate::exports::plain::{Contents, Form, PlainExports};
use crate::exports::production::{LOOKED_AT, OpenedCompressed, Packed, Production, Turns, Waiter};
use crate::exports::spool::Spool;
use crate::exports::spooling::Spooling;
use crate::exports::states::States;
use crate::home::{Catalog, SizeCache};
use crate::progress::Operations;
use crate::{Error, Result};

/// How long an unmount waits for what archives taught to be written down.
const WRITTEN_DOWN: Duration = Duration::from_secs(2);
/// Sizes learnt that are written down together.
const LEARNT_TOGETHER: usize = 4096;

/// Sizes remembered on disk, and those learnt meanwhile.
struct Sizes<'a> {
    remembered: &'a SizeCache,
    /// Whether the state they are of may be remembered.
    is_lasting: bool,
    learnt: Mutex<HashMap<FrameKey, u32>>,
}

impl Sizes<'_> {
    fn write_down(&self, learnt: &mut HashMap<FrameKey, u32>) {
        if !self.is_lasting {
            return;
        }
        let frames: Vec<_> = learnt.drain().collect();
        self.remembered.put_frames(&frames);
    }
}

impl KnownSizes for Sizes<'_> {
    fn size(&self, key: &FrameKey) -> Option<u32> {
        let learnt = self.learnt.lock().get(key).copied();
        learnt.or_else(|| self.remembered.frame(key))
    }

    fn learn(&self, key: FrameKey, size: u32) {
        let mut learnt = self.learnt.lock();
        learnt.insert(key, size);
        if self.is_lasting && learnt.len() >= LEARNT_TOGETHER {
            self.write_down(&mut learnt);
        }
    }
}

impl Drop for Sizes<'_> {
    fn drop(&mut self) {
        let mut learnt = std::mem::take(&mut *self.learnt.lock());
        if !learnt.is_empty() {
            self.write_down(&mut learnt);
        }
    }
}

/// Compressed archives of disk states.
pub struct CompressedExports {
    copies: Arc<PausedCopies>,
    plain: Arc<PlainExports>,
    states: Arc<States>,
    remembered: Arc<SizeCache>,
    operations: Arc<Operations>,
    archives: CompressedArchives,
    turns: Turns,
}

impl CompressedExports {
    pub(crate) fn new(
        copies: Arc<PausedCopies>,
        plain: Arc<PlainExports>,
        states: Arc<States>,
        archives: CompressedArchives,
        remembered: Arc<SizeCache>,
        operations: Arc<Operations>,
    ) -> CompressedExports {
        CompressedExports {
            copies,
            plain,
            states,
            archives,
            remembered,
            operations,
            turns: Turns::default(),
        }
    }

    /// What a compressed archive's bytes are of; None when the box has no disk yet. The size is exact
    /// once it is known, else the last known one, else that of the plain archive. Never waits.
    ///
    /// # Errors
    /// As [`PausedCopies::contents`].
    pub fn contents(&self, source: &Source) -> Result<Option<Contents>> {
        let Some(plain) = self.copies.contents(source, Form::Compressed)? else {
            return Ok(None);
        };
        let mut cache = self.archives.lock();
        let known = cache
            .known
            .entry(source.clone())
            .or_insert(KnownArchive::of(plain));
        known.become_of(plain);
        if !known.is_looked_up {
            known.is_looked_up = true;
            let key = self.plain.planned_key(source, &plain);
            let size = key.and_then(|key| {
                let key = compressed_key(self.archives.level(), &key);
                self.remembered.archive_size(&key)
            });
            known.size = size.or(known.size);
        }
        Ok(Some(plain.with_size(known.size.unwrap_or(plain.size))))
    }

    /// Opens a compressed archive and answers `waiter`, at once or when its exact size is known.
    pub fn open(self: &Arc<Self>, source: &Source, waiter: Waiter) {
        let go_on = || !(waiter.is_dying)();
        let opened = self.copies.open(source, Form::Compressed, &go_on);
        let opened = opened.map(|(export, plain)| {
            let live = matches!(source, Source::Live { .. });
            let level = self.archives.level();
            (Arc::new(Compressed::new(export, level, live)), plain)
        });
        match opened {
            Ok((compressed, plain)) => self.pack(source, compressed, plain, waiter),
            Err(error) => (waiter.answer)(Err(error)),
        }
    }

    fn pack(
        self: &Arc<Self>,
        source: &Source,
        compressed: Arc<Compressed>,
        plain: Contents,
        mut waiter: Waiter,
    ) {
        loop {
            let mut cache = self.archives.lock();
            let known = cache
                .known
                .entry(source.clone())
                .or_insert(KnownArchive::of(plain));
            known.become_of(plain);
            if let Some(opened) = self.opened(known, &compressed, plain) {
                cache.was_used(source);
                drop(cache);
                return (waiter.answer)(Ok(opened));
            }
            if let Some(production) = known.production.clone() {
                match production.join(waiter) {
                    Ok(()) => return,
                    Err(given_back) => waiter = given_back,
                }
                known.production = None;
                continue;
            }
            let production = Arc::new(Production {
                waiters: Mutex::new(Some(vec![waiter])),
                closing: AtomicBool::new(false),
            });
            known.production = Some(production.clone());
            cache.productions.retain(|other| other.strong_count() > 0);
            cache.productions.push(Arc::downgrade(&production));
            drop(cache);
            return self.start(source.clone(), compressed, plain, production);
        }
    }

    /// The archive, if its size is known: kept, being read, or remembered.
    fn opened(
        &self,
        known: &mut KnownArchive,
        compressed: &Arc<Compressed>,
        plain: Contents,
    ) -> Option<OpenedCompressed> {
        if known.wrong.load(Ordering::Relaxed) {
            self.remembered.forget_archive(&compressed.state_key());
            *known = KnownArchive::of(plain);
        }
        let packed = match (&known.spool, known.stream.upgrade()) {
            (Some(spool), _) => Packed::Spooled(spool.clone()),
            (None, Some(stream)) => Packed::Streamed(stream),
            (None, None) => {
                let sizes = known.sizes.clone().or_else(|| {
                    let bytes = self.remembered.archive(&compressed.state_key())?;
                    FrameSizes::from_bytes(compressed, &bytes).map(Arc::new)
                })?;
                let stream = Arc::new(Stream::new(compressed.clone(), sizes.clone()));
                known.stream = Arc::downgrade(&stream);
                known.wrong = stream.is_wrong();
                known.sizes = Some(sizes);
                Packed::Streamed(stream)
            }
        };
        known.size = Some(packed.size());
        Some(OpenedCompressed {
            contents: plain.with_size(packed.size()),
            packed,
            export: compressed.export().clone(),
        })
    }

    fn start(
        self: &Arc<Self>,
        source: Source,
        compressed: Arc<Compressed>,
        plain: Contents,
        production: Arc<Production>,
    ) {
        let exports = self.clone();
        let over = production.clone();
        let started = std::thread::Builder::new()
            .name("compress".into())
            .spawn(move || exports.run(&source, &compressed, plain, &production));
        if let Err(error) = started {
            let waiters = over.waiters.lock().take();
            let error = Error::io("cannot start a thread to compress", error);
            for waiter in waiters.unwrap_or_default() {
                (waiter.answer)(Err(error.again()));
            }
        }
    }

    /// Finds out how large the archive is, and answers those who wait.
    fn run(
        &self,
        source: &Source,
        compressed: &Arc<Compressed>,
        plain: Contents,
        production: &Production,
    ) {
        let sizes = Sizes {
            remembered: &self.remembered,
            is_lasting: self.states.is_lasting(compressed.export().chain()),
            learnt: Mutex::default(),
        };
        let made =
            not_panicking(|| self.make(source, compressed, &sizes, &|| production.goes_on()));
        let (waiters, opened) = {
            let mut cache = self.archives.lock();
            let waiters = production.waiters.lock().take().unwrap_or_default();
            cache.is_over(source, production);
            let opened = made.and_then(|(frames, spool)| {
                let known = cache
                    .known
                    .entry(source.clone())
                    .or_insert(KnownArchive::of(plain));
                let is_current = known.plain == plain;
                // Of a state that is over by now, they are for those who waited, and kept no longer.
                let mut old = KnownArchive::of(plain);
                let known = if is_current { known } else { &mut old };
                known.sizes = Some(frames.clone());
                known.spool = spool;
                let gone = || Error::damaged("the compressed archive is gone");
                let open = |_: &Waiter| self.opened(known, compressed, plain).ok_or_else(gone);
                let opened: Result<Vec<OpenedCompressed>> = waiters.iter().map(open).collect();
                if is_current {
                    cache.was_used(source);
                }
                Ok((frames, opened?))
            });
            (waiters, opened)
        };
        match opened {
            Ok((frames, opened)) => {
                for (waiter, opened) in waiters.into_iter().zip(opened) {
                    (waiter.answer)(Ok(opened));
                }
                // Nobody waits for this.
                if self.states.is_lasting(compressed.export().chain()) {
                    self.remembered.put_archive(
                        &compressed.state_key(),
                        frames.total(),
                        &frames.bytes(),
                    );
                }
                self.note_digest(compressed.export());
            }
            Err(error) => {
                for waiter in waiters {
                    (waiter.answer)(Err(error.again()));
                }
            }
        }
    }

    fn make(
        &self,
        source: &Source,
        compressed: &Compressed,
        sizes: &Sizes<'_>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(Arc<FrameSizes>, Option<Arc<Spool>>)> {
        let gone = || Error::new(libc::EINTR, "interrupted while waiting");
        let _turn = self.turns.take(go_on).ok_or_else(gone)?;
        if let Some(frames) = measure(compressed, sizes, go_on)? {
            return Ok((Arc::new(frames), None));
        }
        let what = format!("compression of {}", self.plain.describe(source));
        let operation = self.operations.begin(what, Some(compressed.export().len()));
        let mut ends = compressed.frame_ends();
        let mut spooling = Spooling::begin(&self.archives, source);
        let frames = produce(compressed, sizes, go_on, &mut |bytes| {
            if let Some(end) = ends.next() {
                operation.reaches(end);
            }
            spooling.put(bytes);
            Ok(())
        })?;
        Ok((Arc::new(frames), spooling.finish()))
    }

    /// Remembers the checksum of an export's disk, if it is known, and the disk in a state that
    /// can't change unseen.
    pub fn note_digest(&self, export: &crate::archive::Export) {
        let Some(digest) = export
            .digest()
            .filter(|_| self.states.is_lasting(export.chain()))
        else {
            return;
        };
        let key = export.disk_key();
        if self.remembered.digest(&key) == Some(digest) {
            return;
        }
        // What it is of has to be on disk first: a loss of power that takes some of a guest's writes, and not
        // the time of the last, would leave a checksum of what is not there any more.
        let mut layers = export.chain().layers().iter();
        if layers.all(|layer| layer.file().sync_data().is_ok()) {
            self.remembered.put_digest(&key, &digest);
        }
    }

    /// Returns what finished archives take, and may take.
    pub fn usage(&self) -> CacheUsage {
        self.archives.usage()
    }

    /// Lets go of archives of states that are gone.
    pub(crate) fn forget_gone(&self, catalog: &Catalog) {
        self.archives.forget_gone(catalog);
    }

    /// Lets go of archives that nobody reads. Returns whether there were any.
    pub(crate) fn drop_unread(&self) -> bool {
        self.archives.drop_unread()
    }

    /// Answers all who wait for a compressed archive, makes none any more, and lets those that are
    /// made already write down what they learnt; that is over in a moment, and waited for no longer
    /// than [`WRITTEN_DOWN`].
    pub fn stop(&self) {
        let productions = std::mem::take(&mut self.archives.lock().productions);
        for production in productions.iter().filter_map(Weak::upgrade) {
            production.closing.store(true, Ordering::Relaxed);
        }
        let began = Instant::now();
        while productions.iter().any(|it| it.strong_count() > 0) && began.elapsed() < WRITTEN_DOWN {
            std::thread::sleep(LOOKED_AT);
        }
    }
}
