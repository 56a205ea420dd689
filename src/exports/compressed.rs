//! Disk states as compressed archives.
//!
//! The size of a compressed archive is known only after compressing, so opening one waits for it.
//! The size is remembered from before, or computed from the sizes of frames seen before, or the
//! whole archive is made. A whole archive is kept in a spool, an unnamed file in the workspace,
//! while the state lasts and the cache has room. Without a spool, frames are made as they are read;
//! what was read from beginning to end is kept, too. Frames that a kept archive has are taken from
//! it, also from that of an earlier state or of another source.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::archive::{Compressed, FrameSizes, Stream, compressed_key, measure, produce};
use crate::error::not_panicking;
use crate::exports::compressed_cache::{CacheUsage, CompressedArchives, KnownArchive};
use crate::exports::disks::Source;
use crate::exports::passing_frames::{PassingFrames, WholeArchive};
use crate::exports::paused_copy::PausedCopies;
use crate::exports::plain::{Contents, Form, PlainExports};
use crate::exports::production::{
    OpenedCompressed, POLL_INTERVAL, Packed, Production, Turns, Waiter, interrupted,
};
use crate::exports::production_frames::{ProductionSizes, ShownFrames};
use crate::exports::spool::Spool;
use crate::exports::states::States;
use crate::home::{Catalog, SizeCache};
use crate::progress::Operations;
use crate::{Error, Result};

/// How long an unmount waits for productions to write the sizes they found to disk.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Opens disk states as compressed archives, and makes and caches these.
pub struct CompressedExports {
    copies: Arc<PausedCopies>,
    plain: Arc<PlainExports>,
    states: Arc<States>,
    remembered: Arc<SizeCache>,
    operations: Arc<Operations>,
    archives: Arc<CompressedArchives>,
    turns: Turns,
}

/// An archive that is being opened.
#[derive(Clone, Copy)]
struct Opening<'a> {
    source: &'a Source,
    compressed: &'a Arc<Compressed>,
    plain: Contents,
    /// Whether the disk's state may be remembered.
    is_lasting: bool,
}

impl CompressedExports {
    /// Returns the compressed form of these exports. The finished archives go into `archives`.
    pub(crate) fn new(
        copies: Arc<PausedCopies>,
        plain: Arc<PlainExports>,
        states: Arc<States>,
        archives: Arc<CompressedArchives>,
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

    /// Returns what a compressed archive contains; None when the box has no disk yet. The size is
    /// the exact one if known, else that of the last state, else that of the plain archive. Never
    /// waits.
    ///
    /// # Errors
    /// As [`PausedCopies::contents`].
    pub fn contents(&self, source: &Source) -> Result<Option<Contents>> {
        let Some(plain) = self.copies.contents(source, Form::Compressed)? else {
            return Ok(None);
        };
        let mut cache = self.archives.lock();
        let archive = cache.entry(source, plain);
        if !archive.is_looked_up {
            archive.is_looked_up = true;
            let key = self.plain.planned_key(source, &plain);
            let size = key.and_then(|key| {
                let key = compressed_key(self.archives.level(), &key);
                self.remembered.archive_size(&key)
            });
            archive.size = size.or(archive.size);
        }
        Ok(Some(plain.with_size(archive.size.unwrap_or(plain.size))))
    }

    /// Opens a compressed archive. Answers `waiter` at once, or as soon as the exact size is known.
    ///
    /// # Errors
    /// The answer fails as [`PausedCopies::open`] does; with EINTR when the waiter dies or the
    /// mount ends; and with EIO when the disk changes meanwhile.
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

    /// Answers `waiter` if the size is known. Otherwise joins the production under way, or starts
    /// one.
    fn pack(
        self: &Arc<Self>,
        source: &Source,
        compressed: Arc<Compressed>,
        plain: Contents,
        mut waiter: Waiter,
    ) {
        let opening = Opening {
            source,
            compressed: &compressed,
            plain,
            is_lasting: self.states.is_lasting(compressed.export().chain()),
        };
        loop {
            let mut cache = self.archives.lock();
            // Frames may also come from the spool of an earlier state.
            cache.entry(source, plain);
            let kept = cache.spools_for(source);
            let archive = cache.entry(source, plain);
            if let Some(opened) = self.open_known(archive, opening, &kept) {
                cache.touch(source);
                drop(cache);
                return (waiter.answer)(Ok(opened));
            }
            if let Some(production) = archive.production.clone() {
                match production.join(waiter) {
                    Ok(()) => return,
                    Err(returned) => waiter = returned,
                }
                archive.production = None;
                continue;
            }
            let production = Arc::new(Production {
                waiters: Mutex::new(Some(vec![waiter])),
                closing: AtomicBool::new(false),
            });
            archive.production = Some(production.clone());
            cache.productions.retain(|other| other.strong_count() > 0);
            cache.productions.push(Arc::downgrade(&production));
            drop(cache);
            return self.start(source.clone(), compressed, plain, production);
        }
    }

    /// Opens an archive of known size: from its spool, the stream that others read, or remembered
    /// frame sizes. Its frames are looked for in the archives `kept` first. None if the size is not
    /// known.
    fn open_known(
        &self,
        archive: &mut KnownArchive,
        opening: Opening<'_>,
        kept: &[Weak<Spool>],
    ) -> Option<OpenedCompressed> {
        let Opening {
            compressed, plain, ..
        } = opening;
        if archive.wrong.load(Ordering::Relaxed) {
            self.remembered.forget_archive(&compressed.state_key());
            *archive = KnownArchive::of(plain);
        }
        let packed = match (&archive.spool, archive.stream.upgrade()) {
            (Some(spool), _) => Packed::Spooled(spool.clone()),
            (None, Some(stream)) => Packed::Streamed(stream),
            (None, None) => {
                let sizes = archive.sizes.clone().or_else(|| {
                    let bytes = self.remembered.archive(&compressed.state_key())?;
                    FrameSizes::from_bytes(compressed, &bytes).map(Arc::new)
                })?;
                let whole = WholeArchive {
                    plain,
                    size: sizes.total(),
                };
                let frames = self.passing_frames(opening, kept.to_vec(), Some(whole));
                let stream = Stream::new(compressed.clone(), sizes.clone(), Arc::new(frames));
                let stream = Arc::new(stream);
                archive.stream = Arc::downgrade(&stream);
                archive.wrong = stream.is_wrong();
                archive.sizes = Some(sizes);
                Packed::Streamed(stream)
            }
        };
        archive.size = Some(packed.size());
        Some(OpenedCompressed {
            contents: plain.with_size(packed.size()),
            packed,
            export: compressed.export().clone(),
        })
    }

    fn passing_frames(
        &self,
        opening: Opening<'_>,
        kept: Vec<Weak<Spool>>,
        becomes: Option<WholeArchive>,
    ) -> PassingFrames {
        let Opening {
            source, is_lasting, ..
        } = opening;
        PassingFrames::new(&self.archives, source, kept, is_lasting, becomes)
    }

    /// Runs a production in a thread of its own. Answers its waiters with an error if that can't
    /// start.
    fn start(
        self: &Arc<Self>,
        source: Source,
        compressed: Arc<Compressed>,
        plain: Contents,
        production: Arc<Production>,
    ) {
        let exports = self.clone();
        let not_started = production.clone();
        let started = std::thread::Builder::new()
            .name("compress".into())
            .spawn(move || exports.run(&source, &compressed, plain, &production));
        if let Err(error) = started {
            let waiters = not_started.waiters.lock().take();
            let error = Error::io("cannot start a thread to compress", error);
            for waiter in waiters.unwrap_or_default() {
                (waiter.answer)(Err(error.again()));
            }
        }
    }

    /// Finds the size of an archive and answers the waiters of its production.
    fn run(
        &self,
        source: &Source,
        compressed: &Arc<Compressed>,
        plain: Contents,
        production: &Production,
    ) {
        let opening = Opening {
            source,
            compressed,
            plain,
            is_lasting: self.states.is_lasting(compressed.export().chain()),
        };
        let sizes = ProductionSizes::of(&self.remembered, opening.is_lasting);
        let made = not_panicking(|| self.make(opening, &sizes, &|| production.goes_on()));
        let (waiters, opened) = {
            let mut cache = self.archives.lock();
            let waiters = production.waiters.lock().take().unwrap_or_default();
            cache.remove_production(source, production);
            let opened = made.and_then(|(frames, spool)| {
                let kept = cache.spools_for(source);
                let archive = cache
                    .archives
                    .entry(source.clone())
                    .or_insert(KnownArchive::of(plain));
                let is_current = archive.plain == plain;
                // An archive of a past state goes to the waiters, and is not kept.
                let mut past = KnownArchive::of(plain);
                let archive = if is_current { archive } else { &mut past };
                archive.sizes = Some(frames.clone());
                if let Some(spool) = spool {
                    archive.set_spool(spool);
                }
                let wrong_sizes = || {
                    Error::damaged(
                        "the frame sizes of the compressed archive proved wrong; open it again",
                    )
                };
                let open = |_: &Waiter| {
                    self.open_known(archive, opening, &kept)
                        .ok_or_else(wrong_sizes)
                };
                let opened: Result<Vec<OpenedCompressed>> = waiters.iter().map(open).collect();
                if is_current {
                    cache.touch(source);
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
                // After the answers, so that no waiter is delayed by it.
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

    /// Returns the frame sizes of an archive and, if the whole archive had to be made and could be
    /// kept, its spool.
    fn make(
        &self,
        opening: Opening<'_>,
        sizes: &ProductionSizes<'_>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(Arc<FrameSizes>, Option<Arc<Spool>>)> {
        let Opening {
            source, compressed, ..
        } = opening;
        let _turn = self.turns.take(go_on).ok_or_else(interrupted)?;
        if let Some(frames) = measure(compressed, sizes, go_on)? {
            return Ok((Arc::new(frames), None));
        }
        let name = format!("compression of {}", self.plain.describe(source));
        let operation = self.operations.begin(name, Some(compressed.export().len()));
        let kept = self.archives.lock().spools_for(source);
        let frames = ShownFrames {
            passing: self.passing_frames(opening, kept, None),
            ends: Mutex::new(compressed.frame_ends()),
            operation,
        };
        let sizes = produce(compressed, sizes, &frames, go_on)?;
        let spool = frames.passing.finish(sizes.total());
        Ok((Arc::new(sizes), spool))
    }

    /// Remembers the checksum of an export's disk, if it is known and the disk's state may be
    /// remembered.
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
        // Flush the layers first. A power loss could drop some of the guest's writes but keep the
        // time of the last one: then the remembered checksum would not match the disk.
        let mut layers = export.chain().layers().iter();
        if layers.all(|layer| layer.file().sync_data().is_ok()) {
            self.remembered.put_digest(&key, &digest);
        }
    }

    /// Returns how much disk space finished archives take, and may take.
    pub fn usage(&self) -> CacheUsage {
        self.archives.usage()
    }

    /// Drops the archives of disk states that are not in `catalog`.
    pub(crate) fn forget_gone(&self, catalog: &Catalog) {
        self.archives.forget_gone(catalog);
    }

    /// Drops the spools without readers. Returns whether there were any.
    pub(crate) fn drop_unread(&self) -> bool {
        self.archives.drop_unread()
    }

    /// Ends all productions and answers their waiters with EINTR. Returns when the productions have
    /// written the sizes they found to disk, which is quick, or after [`FLUSH_TIMEOUT`].
    pub fn stop(&self) {
        let productions = std::mem::take(&mut self.archives.lock().productions);
        for production in productions.iter().filter_map(Weak::upgrade) {
            production.closing.store(true, Ordering::Relaxed);
        }
        let began = Instant::now();
        let is_running = |production: &Weak<Production>| production.strong_count() > 0;
        while productions.iter().any(is_running) && began.elapsed() < FLUSH_TIMEOUT {
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}
