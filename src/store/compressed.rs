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

use parking_lot::{Condvar, Mutex};

use super::export::Form;
use super::spool::{Spool, Spooling};
use super::{Contents, Source, Store};
use crate::archive::{
    Compressed, Export, FrameKey, FrameSizes, KnownSizes, Stream, compressed_key, measure, produce,
};
use crate::error::not_panicking;
use crate::home::{Catalog, SizeCache};
use crate::{Error, Result};

/// Archives made at a time: each takes all cores and its share of memory.
const MOST_AT_A_TIME: usize = 2;
/// How often those who wait are looked at: a killed one must not wait on.
const LOOKED_AT: Duration = Duration::from_millis(10);
/// How long an unmount waits for what archives taught to be written down.
const WRITTEN_DOWN: Duration = Duration::from_secs(2);
/// Sizes of frames that are kept although nobody reads, for as many archives.
const KEPT_SIZES: usize = 8;
/// Sizes learnt that are written down together.
const LEARNT_TOGETHER: usize = 4096;

/// What a compressed archive opened for reading is read from.
#[derive(Clone)]
pub enum Packed {
    /// The whole of it, in a file.
    Spooled(Arc<Spool>),
    /// Frames made as they are read.
    Streamed(Arc<Stream>),
}

impl Packed {
    /// Length of the archive in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Packed::Spooled(spool) => spool.size(),
            Packed::Streamed(stream) => stream.len(),
        }
    }

    /// Fills `buf` with the archive's bytes from `offset` on, completely unless it ends; returns how
    /// many bytes that are.
    ///
    /// # Errors
    /// EIO when the disk changed meanwhile.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match self {
            Packed::Streamed(stream) => stream.read_at(offset, buf),
            Packed::Spooled(spool) => spool.read_at(offset, buf),
        }
    }
}

/// A compressed archive that was opened, and what it is of.
pub struct OpenedCompressed {
    /// What to read from.
    pub packed: Packed,
    /// With the exact size of the compressed archive.
    pub contents: Contents,
    /// What it is made of; as long as that is kept, so is a copy of a running box's disk.
    pub export: Arc<Export>,
}

/// Somebody who waits for a compressed archive.
pub struct Waiter {
    /// Whether it is about to die, and must not wait on.
    pub is_dying: Box<dyn Fn() -> bool + Send>,
    /// Takes the answer.
    pub answer: Box<dyn FnOnce(Result<OpenedCompressed>) + Send>,
}

/// How compressed archives are made and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// zstd's level, 1 to 19.
    pub level: i32,
    /// Most bytes of finished archives that are kept on disk.
    pub cache: u64,
}

impl Default for Compression {
    /// Level 3, as BoxLite's own exports; 4 GiB.
    fn default() -> Self {
        Compression {
            level: 3,
            cache: 4 << 30,
        }
    }
}

/// What finished archives and what was learnt from them take on disk.
#[derive(Clone, Copy, Debug)]
pub struct CacheUsage {
    /// Finished compressed archives that are kept.
    pub archives: usize,
    /// Bytes that they, and those being written, take.
    pub bytes: u64,
    /// Most bytes that they may take.
    pub limit: u64,
    /// Bytes of `db/boxlitefs.db`.
    pub remembered: u64,
}

/// Compressed archives that were looked at.
#[derive(Default)]
pub(super) struct CompressedCache {
    known: HashMap<Source, Known>,
    /// Sources that were opened, the one opened last at the end.
    used: Vec<Source>,
    /// All archives being made, also those of states that are over.
    productions: Vec<Weak<Production>>,
    /// Bytes that spools being written have room for.
    pub(super) growing: u64,
}

struct Known {
    /// The plain archive it is of.
    plain: Contents,
    /// Exact length of the compressed archive, once known; before, the last known one.
    size: Option<u64>,
    /// Whether it was looked up what is remembered of it.
    is_looked_up: bool,
    sizes: Option<Arc<FrameSizes>>,
    spool: Option<Arc<Spool>>,
    stream: Weak<Stream>,
    /// Whether `sizes` showed to be wrong: known longer than the stream, which goes with its readers.
    wrong: Arc<AtomicBool>,
    production: Option<Arc<Production>>,
}

impl Known {
    fn of(plain: Contents) -> Known {
        Known {
            plain,
            size: None,
            is_looked_up: false,
            sizes: None,
            spool: None,
            stream: Weak::new(),
            wrong: Arc::default(),
            production: None,
        }
    }

    /// Nothing but the last known size is of use for other contents.
    fn become_of(&mut self, plain: Contents) {
        if self.plain != plain {
            let size = self.size;
            *self = Known::of(plain);
            self.size = size;
        }
    }
}

/// An archive being made, and who waits for it. None: it is done, or nobody did.
#[derive(Default)]
struct Production {
    waiters: Mutex<Option<Vec<Waiter>>>,
    closing: AtomicBool,
}

impl Production {
    /// Answers those who are about to die; false if nobody is left.
    fn goes_on(&self) -> bool {
        let mut waiters = self.waiters.lock();
        let Some(all) = waiters.as_mut() else {
            return false;
        };
        let closing = self.closing.load(Ordering::Relaxed);
        for gone in all.extract_if(.., |waiter| closing || (waiter.is_dying)()) {
            (gone.answer)(Err(Error::new(libc::EINTR, "interrupted while waiting")));
        }
        if all.is_empty() {
            *waiters = None;
        }
        waiters.is_some()
    }

    /// Waits along; gives the waiter back when it is over already.
    fn join(&self, waiter: Waiter) -> std::result::Result<(), Waiter> {
        match self.waiters.lock().as_mut() {
            Some(waiters) => {
                waiters.push(waiter);
                Ok(())
            }
            None => Err(waiter),
        }
    }
}

/// At most so many at a time.
#[derive(Default)]
pub(super) struct Turns {
    taken: Mutex<usize>,
    free: Condvar,
}

impl Turns {
    /// Waits for a turn; None once `go_on` says no.
    fn take(&self, go_on: &dyn Fn() -> bool) -> Option<Turn<'_>> {
        let mut taken = self.taken.lock();
        while *taken >= MOST_AT_A_TIME {
            let waited = self.free.wait_for(&mut taken, LOOKED_AT);
            if waited.timed_out() && !go_on() {
                return None;
            }
        }
        *taken += 1;
        Some(Turn(self))
    }
}

struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock() -= 1;
        self.0.free.notify_one();
    }
}

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

impl Store {
    /// What a compressed archive's bytes are of; None when the box has no disk yet. The size is exact
    /// once it is known, else the last known one, else that of the plain archive. Never waits.
    ///
    /// # Errors
    /// As [`Store::export_contents`].
    pub fn compressed_contents(&self, source: &Source) -> Result<Option<Contents>> {
        let plain = match self.kept_contents(source, Form::Compressed) {
            Some(plain) => Some(plain),
            None => self.contents_now(source)?,
        };
        let Some(plain) = plain else {
            return Ok(None);
        };
        let mut cache = self.compressed.lock();
        let known = cache
            .known
            .entry(source.clone())
            .or_insert(Known::of(plain));
        known.become_of(plain);
        if !known.is_looked_up {
            known.is_looked_up = true;
            let key = self.planned_key(source, &plain);
            let size = key.and_then(|key| {
                let key = compressed_key(self.compression.level, &key);
                self.remembered.archive_size(&key)
            });
            known.size = size.or(known.size);
        }
        Ok(Some(plain.with_size(known.size.unwrap_or(plain.size))))
    }

    /// Opens a compressed archive and answers `waiter`, at once or when its exact size is known.
    pub fn open_compressed(self: &Arc<Self>, source: &Source, waiter: Waiter) {
        let go_on = || !(waiter.is_dying)();
        let opened = self.open_any_export(source, Form::Compressed, &go_on);
        let opened = opened.map(|(export, plain)| {
            let live = matches!(source, Source::Live { .. });
            let level = self.compression.level;
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
            let mut cache = self.compressed.lock();
            let known = cache
                .known
                .entry(source.clone())
                .or_insert(Known::of(plain));
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
        known: &mut Known,
        compressed: &Arc<Compressed>,
        plain: Contents,
    ) -> Option<OpenedCompressed> {
        if known.wrong.load(Ordering::Relaxed) {
            self.remembered.forget_archive(&compressed.state_key());
            *known = Known::of(plain);
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
        let store = self.clone();
        let over = production.clone();
        let started = std::thread::Builder::new()
            .name("compress".into())
            .spawn(move || store.run(&source, &compressed, plain, &production));
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
            is_lasting: self.is_lasting(compressed.export().chain()),
            learnt: Mutex::default(),
        };
        let made =
            not_panicking(|| self.make(source, compressed, &sizes, &|| production.goes_on()));
        let (waiters, opened) = {
            let mut cache = self.compressed.lock();
            let waiters = production.waiters.lock().take().unwrap_or_default();
            cache.is_over(source, production);
            let opened = made.and_then(|(frames, spool)| {
                let known = cache
                    .known
                    .entry(source.clone())
                    .or_insert(Known::of(plain));
                let is_current = known.plain == plain;
                // Of a state that is over by now, they are for those who waited, and kept no longer.
                let mut old = Known::of(plain);
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
                if self.is_lasting(compressed.export().chain()) {
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
        let what = format!("compression of {}", self.describe(source));
        let operation = self.operations.begin(what, Some(compressed.export().len()));
        let mut ends = compressed.frame_ends();
        let mut spooling = Spooling::begin(self, source);
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
        let Some(digest) = export.digest().filter(|_| self.is_lasting(export.chain())) else {
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

    /// What finished archives take, and may take.
    pub fn cache_usage(&self) -> CacheUsage {
        let remembered = std::fs::metadata(self.home.size_cache_file());
        let cache = self.compressed.lock();
        let spools = cache.known.values().filter(|known| known.spool.is_some());
        CacheUsage {
            archives: spools.count(),
            bytes: cache.kept_bytes() + cache.growing,
            limit: self.compression.cache,
            remembered: remembered.map_or(0, |meta| meta.len()),
        }
    }

    /// Lets go of compressed archives of states that are gone.
    pub(super) fn forget_gone_compressed(&self, catalog: &Catalog) {
        let mut cache = self.compressed.lock();
        cache
            .known
            .retain(|source, known| known.production.is_some() || source.is_in(catalog));
        cache.used.retain(|source| source.is_in(catalog));
    }

    /// Answers all who wait for a compressed archive, makes none any more, and lets those that are
    /// made already write down what they learnt; that is over in a moment, and waited for no longer
    /// than [`WRITTEN_DOWN`].
    pub fn stop_compressing(&self) {
        let productions = std::mem::take(&mut self.compressed.lock().productions);
        for production in productions.iter().filter_map(Weak::upgrade) {
            production.closing.store(true, Ordering::Relaxed);
        }
        let began = Instant::now();
        while productions.iter().any(|it| it.strong_count() > 0) && began.elapsed() < WRITTEN_DOWN {
            std::thread::sleep(LOOKED_AT);
        }
    }
}

impl CompressedCache {
    pub(super) fn kept_bytes(&self) -> u64 {
        let spools = self.known.values().filter_map(|known| known.spool.as_ref());
        spools.map(|spool| spool.size()).sum()
    }

    /// A production ended, whatever came of it.
    fn is_over(&mut self, source: &Source, production: &Production) {
        if let Some(known) = self.known.get_mut(source) {
            let this = |other: &Arc<Production>| std::ptr::eq(&**other, production);
            known.production.take_if(|other| this(other));
        }
    }

    fn was_used(&mut self, source: &Source) {
        self.used.retain(|used| used != source);
        self.used.push(source.clone());
        let old = self.used.len().saturating_sub(KEPT_SIZES);
        for source in self.used.iter().take(old) {
            if let Some(known) = self.known.get_mut(source) {
                known.sizes = None;
            }
        }
    }

    /// Lets go of a spool that nobody reads. False if there is none.
    pub(super) fn drop_any_spool(&mut self) -> bool {
        let unread = |spool: &Arc<Spool>| Arc::strong_count(spool) == 1;
        let mut known = self.known.values_mut();
        let found = known.find(|known| known.spool.as_ref().is_some_and(unread));
        found.is_some_and(|known| known.spool.take().is_some())
    }

    /// Lets go of the spool that was used least lately and that nobody reads.
    pub(super) fn drop_oldest_spool(&mut self, but: &Source) -> bool {
        for source in self.used.iter().filter(|source| *source != but) {
            if let Some(known) = self.known.get_mut(source)
                && known
                    .spool
                    .as_ref()
                    .is_some_and(|spool| Arc::strong_count(spool) == 1)
            {
                known.spool = None;
                return true;
            }
        }
        false
    }
}
