//! Compressed archives that were looked at: whose size is known, those being made, and those kept.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};

use crate::archive::{FrameSizes, Stream};
use crate::exports::disks::Source;
use crate::exports::plain::Contents;
use crate::exports::production::Production;
use crate::exports::recent::Recent;
use crate::exports::spool::Spool;
use crate::files::workspace::Workspace;
use crate::home::{Catalog, Home};

/// Sizes of frames that are kept although nobody reads, for as many archives.
const KEPT_SIZES: usize = 8;
/// A spool leaves this part of the file system free (1 / 20): others need it more.
const LEFT_FREE: u64 = 20;

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

/// The archives that are kept, and the room that they have.
pub(crate) struct CompressedArchives {
    home: Arc<Home>,
    workspace: Arc<Workspace>,
    is_read_only: bool,
    compression: Compression,
    cache: Mutex<CompressedCache>,
}

impl CompressedArchives {
    /// Returns an empty cache. Where a home is only looked at, no archive is kept.
    pub fn new(
        home: Arc<Home>,
        workspace: Arc<Workspace>,
        is_read_only: bool,
        compression: Compression,
    ) -> CompressedArchives {
        CompressedArchives {
            home,
            workspace,
            is_read_only,
            compression,
            cache: Mutex::default(),
        }
    }

    /// Returns the level of compression.
    pub fn level(&self) -> i32 {
        self.compression.level
    }

    /// Returns the most bytes that the archives may take.
    pub fn limit(&self) -> u64 {
        self.compression.cache
    }

    /// Locks the cache.
    pub fn lock(&self) -> MutexGuard<'_, CompressedCache> {
        self.cache.lock()
    }

    /// Sets `more` bytes of the cache aside for a spool of `source`, by letting go of archives nobody
    /// reads, those used least lately first. False if that is not enough.
    pub fn make_room(&self, source: &Source, more: u64) -> bool {
        let space = self.home.space();
        if !space.is_ok_and(|space| space.available_bytes() >= more + space.bytes() / LEFT_FREE) {
            return false;
        }
        let mut cache = self.lock();
        while cache.kept_bytes() + cache.growing + more > self.compression.cache {
            if !cache.drop_oldest_spool(source) {
                return false;
            }
        }
        cache.growing += more;
        true
    }

    /// Returns a file without a name for an archive; None where none are kept.
    pub fn spool_file(&self) -> Option<std::fs::File> {
        if self.is_read_only || self.compression.cache == 0 {
            return None;
        }
        self.workspace
            .unnamed_file("compressed")
            .inspect_err(|error| log::info!("compressed archives are not kept: {error}"))
            .ok()
    }

    /// Returns what the archives take, and may take.
    pub fn usage(&self) -> CacheUsage {
        let remembered = std::fs::metadata(self.home.remembered());
        let cache = self.lock();
        let spools = cache.known.values().filter(|known| known.spool.is_some());
        CacheUsage {
            archives: spools.count(),
            bytes: cache.kept_bytes() + cache.growing,
            limit: self.compression.cache,
            remembered: remembered.map_or(0, |meta| meta.len()),
        }
    }

    /// Lets go of compressed archives of states that are gone.
    pub fn forget_gone(&self, catalog: &Catalog) {
        let mut cache = self.lock();
        cache
            .known
            .retain(|source, known| known.production.is_some() || source.is_in(catalog));
        cache.recent.retain(|source| source.is_in(catalog));
    }

    /// Lets go of archives that nobody reads. False if there was none.
    pub fn drop_unread(&self) -> bool {
        let mut cache = self.lock();
        let mut dropped = false;
        while cache.drop_any_spool() {
            dropped = true;
        }
        dropped
    }
}

/// Compressed archives that were looked at.
#[derive(Default)]
pub(crate) struct CompressedCache {
    pub known: HashMap<Source, KnownArchive>,
    /// Sources that were opened.
    pub recent: Recent<Source, KEPT_SIZES>,
    /// All archives being made, also those of states that are over.
    pub productions: Vec<Weak<Production>>,
    /// Bytes that spools being written have room for.
    pub growing: u64,
}

pub(crate) struct KnownArchive {
    /// The plain archive it is of.
    pub plain: Contents,
    /// Exact length of the compressed archive, once known; before, the last known one.
    pub size: Option<u64>,
    /// Whether it was looked up what is remembered of it.
    pub is_looked_up: bool,
    pub sizes: Option<Arc<FrameSizes>>,
    pub spool: Option<Arc<Spool>>,
    pub stream: Weak<Stream>,
    /// Whether `sizes` showed to be wrong: known longer than the stream, which goes with its readers.
    pub wrong: Arc<AtomicBool>,
    pub production: Option<Arc<Production>>,
}

impl KnownArchive {
    pub fn of(plain: Contents) -> KnownArchive {
        KnownArchive {
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
    pub fn become_of(&mut self, plain: Contents) {
        if self.plain != plain {
            let size = self.size;
            *self = KnownArchive::of(plain);
            self.size = size;
        }
    }
}

impl CompressedCache {
    pub fn kept_bytes(&self) -> u64 {
        let spools = self.known.values().filter_map(|known| known.spool.as_ref());
        spools.map(|spool| spool.size()).sum()
    }

    /// A production ended, whatever came of it.
    pub fn is_over(&mut self, source: &Source, production: &Production) {
        if let Some(known) = self.known.get_mut(source) {
            let this = |other: &Arc<Production>| std::ptr::eq(&**other, production);
            known.production.take_if(|other| this(other));
        }
    }

    pub fn was_used(&mut self, source: &Source) {
        self.recent.touch(source);
        for source in self.recent.excess() {
            if let Some(known) = self.known.get_mut(source) {
                known.sizes = None;
            }
        }
    }

    /// Lets go of a spool that nobody reads. False if there is none.
    pub fn drop_any_spool(&mut self) -> bool {
        let unread = |spool: &Arc<Spool>| Arc::strong_count(spool) == 1;
        let mut known = self.known.values_mut();
        let found = known.find(|known| known.spool.as_ref().is_some_and(unread));
        found.is_some_and(|known| known.spool.take().is_some())
    }

    /// Lets go of the spool that was used least lately and that nobody reads.
    pub fn drop_oldest_spool(&mut self, but: &Source) -> bool {
        let oldest_first = self.recent.oldest_first().iter();
        for source in oldest_first.filter(|source| *source != but) {
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
