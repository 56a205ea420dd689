//! The cache of compressed archives: their sizes, the productions under way, and finished archives.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};

use crate::archive::{FrameSizes, Stream};
use crate::exports::disks::Source;
use crate::exports::plain::Contents;
use crate::exports::production::Production;
use crate::exports::recent::Recent;
use crate::exports::spool::Spool;
use crate::files::workspace::Workspace;
use crate::home::{Catalog, Home, Space};

/// Archives whose frame sizes are kept in memory without readers.
const KEPT_SIZES: usize = 8;
/// The most kept archives in which the frames of another are looked for.
const MOST_ASKED: usize = 16;
/// A spool leaves one part in this many of the file system free, for uses that matter more than a
/// cache.
const LEFT_FREE: u64 = 20;

/// How compressed archives are made and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// zstd's level, 1 to 19.
    pub level: i32,
    /// Most bytes of finished archives to keep on disk; 0 keeps none.
    pub cache: u64,
}

impl Default for Compression {
    /// Returns level 3, which BoxLite's own exports use, and a cache of 4 GiB.
    fn default() -> Self {
        Compression {
            level: 3,
            cache: 4 << 30,
        }
    }
}

/// Disk space that finished archives, and the cache of sizes and checksums, take.
#[derive(Clone, Copy, Debug)]
pub struct CacheUsage {
    /// Finished compressed archives that are kept.
    pub archives: usize,
    /// Bytes they take, including those set aside for archives being written.
    pub bytes: u64,
    /// Most bytes they may take.
    pub limit: u64,
    /// Size of `db/boxlitefs.db` in bytes.
    pub remembered: u64,
}

/// The cache of compressed archives, and the disk space it may use.
pub(crate) struct CompressedArchives {
    home: Arc<Home>,
    workspace: Arc<Workspace>,
    is_read_only: bool,
    compression: Compression,
    cache: Mutex<CompressedCache>,
    /// Bytes set aside for spools being written. A spool may be dropped while the cache is locked.
    growing: AtomicU64,
}

impl CompressedArchives {
    /// Returns an empty cache. If `is_read_only`, it never keeps an archive on disk.
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
            growing: AtomicU64::new(0),
        }
    }

    /// Returns zstd's compression level, 1 to 19.
    pub fn level(&self) -> i32 {
        self.compression.level
    }

    /// Returns how many bytes finished archives may take.
    pub fn limit(&self) -> u64 {
        self.compression.cache
    }

    /// Locks the cache and returns its entries.
    pub fn lock(&self) -> MutexGuard<'_, CompressedCache> {
        self.cache.lock()
    }

    /// Sets `more` bytes of the cache aside for a spool of `source`. Drops spools without readers
    /// if needed, the least recently used first. Returns false if there is not enough space.
    pub fn make_room(&self, source: &Source, more: u64) -> bool {
        let space = Space::of(&self.home);
        if !space.is_ok_and(|space| space.available_bytes() >= more + space.bytes() / LEFT_FREE) {
            return false;
        }
        let mut cache = self.lock();
        let growing = || self.growing.load(Ordering::Relaxed);
        while cache.kept_bytes() + growing() + more > self.compression.cache {
            if !cache.drop_oldest_spool(source) {
                return false;
            }
        }
        self.growing.fetch_add(more, Ordering::Relaxed);
        true
    }

    /// Gives bytes back that [`make_room`](CompressedArchives::make_room) set aside.
    pub fn give_back(&self, room: u64) {
        self.growing.fetch_sub(room, Ordering::Relaxed);
    }

    /// Keeps a whole archive of `source`, whose plain archive has these contents, unless they
    /// changed meanwhile.
    pub fn keep(&self, source: &Source, plain: Contents, spool: Arc<Spool>) {
        let mut cache = self.lock();
        let Some(archive) = cache.archives.get_mut(source) else {
            return;
        };
        if archive.plain == plain && !archive.wrong.load(Ordering::Relaxed) {
            archive.set_spool(spool);
            cache.touch(source);
        }
    }

    /// Returns an unnamed file for a spool. None if this cache keeps no archives, or the file can't
    /// be made.
    pub fn spool_file(&self) -> Option<std::fs::File> {
        if self.is_read_only || self.compression.cache == 0 {
            return None;
        }
        self.workspace
            .unnamed_file("compressed")
            .inspect_err(|error| {
                log::info!(
                    "this compressed archive is not kept, since its file can't be made: {error}"
                );
            })
            .ok()
    }

    /// Returns how much disk space the archives take, and may take.
    pub fn usage(&self) -> CacheUsage {
        let remembered = std::fs::metadata(self.home.size_cache_file());
        let cache = self.lock();
        let archives = cache.archives.values();
        CacheUsage {
            archives: archives.flat_map(KnownArchive::spools).count(),
            bytes: cache.kept_bytes() + self.growing.load(Ordering::Relaxed),
            limit: self.compression.cache,
            remembered: remembered.map_or(0, |meta| meta.len()),
        }
    }

    /// Drops the archives of disk states that are not in `catalog`, except those being made.
    pub fn forget_gone(&self, catalog: &Catalog) {
        let mut cache = self.lock();
        cache
            .archives
            .retain(|source, archive| archive.production.is_some() || source.is_in(catalog));
        cache.recent.retain(|source| source.is_in(catalog));
    }

    /// Drops the spools without readers. Returns whether there were any.
    pub fn drop_unread(&self) -> bool {
        let mut cache = self.lock();
        let mut dropped = false;
        while cache.drop_unread_spool() {
            dropped = true;
        }
        dropped
    }
}

/// The last compressed archive of each source.
#[derive(Default)]
pub(crate) struct CompressedCache {
    pub archives: HashMap<Source, KnownArchive>,
    /// Sources whose archive was opened.
    pub recent: Recent<Source, KEPT_SIZES>,
    /// All productions under way, also those of past states.
    pub productions: Vec<Weak<Production>>,
}

/// What is known about one compressed archive.
pub(crate) struct KnownArchive {
    /// Contents of the plain archive that it compresses.
    pub plain: Contents,
    /// Length in bytes. Exact once the frame sizes are known; until then that of the last state.
    pub size: Option<u64>,
    /// Whether `size` was looked up in the cache on disk.
    pub is_looked_up: bool,
    /// The size of each frame, once known.
    pub sizes: Option<Arc<FrameSizes>>,
    /// The whole archive, if it is kept.
    pub spool: Option<Arc<Spool>>,
    /// The archive of an earlier state, for the frames that are the same, until there is another.
    previous: Option<Arc<Spool>>,
    /// Makes frames as they are read; lives as long as its readers.
    pub stream: Weak<Stream>,
    /// Set by the stream when `sizes` proved wrong. It outlives the stream.
    pub wrong: Arc<AtomicBool>,
    /// The production under way.
    pub production: Option<Arc<Production>>,
}

impl KnownArchive {
    /// Returns an archive of these contents, about which nothing else is known.
    pub fn of(plain: Contents) -> KnownArchive {
        KnownArchive {
            plain,
            size: None,
            is_looked_up: false,
            sizes: None,
            spool: None,
            previous: None,
            stream: Weak::new(),
            wrong: Arc::default(),
            production: None,
        }
    }

    /// Keeps the whole archive. That of an earlier state is not needed any more.
    pub fn set_spool(&mut self, spool: Arc<Spool>) {
        self.spool = Some(spool);
        self.previous = None;
    }

    /// Returns the archives that are kept.
    fn spools(&self) -> impl Iterator<Item = &Arc<Spool>> {
        self.previous.iter().chain(&self.spool)
    }

    /// Drops the spool if it has no reader. Returns whether it did.
    fn drop_spool_if_unread(&mut self) -> bool {
        self.spool.take_if(|spool| is_unread(spool)).is_some()
    }

    /// Drops the archive of an earlier state if nothing is taken from it at the moment. Returns
    /// whether it did.
    fn drop_previous_if_unread(&mut self) -> bool {
        self.previous.take_if(|spool| is_unread(spool)).is_some()
    }
}

fn is_unread(spool: &Arc<Spool>) -> bool {
    Arc::strong_count(spool) == 1
}

impl CompressedCache {
    /// Returns the archive of a source whose plain archive has these contents. If they changed,
    /// only the last size is kept, as an estimate, and the spool, for the frames in it.
    pub fn entry(&mut self, source: &Source, plain: Contents) -> &mut KnownArchive {
        let archive = self
            .archives
            .entry(source.clone())
            .or_insert(KnownArchive::of(plain));
        if archive.plain != plain {
            let past = std::mem::replace(archive, KnownArchive::of(plain));
            archive.size = past.size;
            archive.previous = past.spool.or(past.previous);
        }
        archive
    }

    /// Returns how many bytes all spools take.
    pub fn kept_bytes(&self) -> u64 {
        let spools = self.archives.values().flat_map(KnownArchive::spools);
        spools.map(|spool| spool.size()).sum()
    }

    /// Returns the archives that may have frames of that of `source`, the likeliest first.
    pub fn spools_for(&self, source: &Source) -> Vec<Weak<Spool>> {
        let others = self.recent.oldest_first().iter().rev();
        let sources = std::iter::once(source).chain(others.filter(|other| *other != source));
        let archives = sources.filter_map(|source| self.archives.get(source));
        let spools = archives.flat_map(KnownArchive::spools);
        spools.take(MOST_ASKED).map(Arc::downgrade).collect()
    }

    /// Removes a production that ended, with or without success. A newer one of the same source
    /// stays.
    pub fn remove_production(&mut self, source: &Source, production: &Production) {
        if let Some(archive) = self.archives.get_mut(source) {
            let is_same = |other: &Arc<Production>| std::ptr::eq(&**other, production);
            archive.production.take_if(|other| is_same(other));
        }
    }

    /// Makes the archive of `source` the most recently used one, and drops the frame sizes of
    /// archives beyond the limit.
    pub fn touch(&mut self, source: &Source) {
        self.recent.touch(source);
        for source in self.recent.excess() {
            if let Some(archive) = self.archives.get_mut(source) {
                archive.sizes = None;
            }
        }
    }

    /// Drops one spool without readers. Returns false if there is none.
    pub fn drop_unread_spool(&mut self) -> bool {
        let mut archives = self.archives.values_mut();
        archives.any(|it| it.drop_previous_if_unread() || it.drop_spool_if_unread())
    }

    /// Drops a spool without readers, the least recently used first: of an earlier state of another
    /// source than `of`, else of another source, else of an earlier state of `of`. Returns false if
    /// there is none.
    pub fn drop_oldest_spool(&mut self, of: &Source) -> bool {
        let archives = &mut self.archives;
        let sources = self.recent.oldest_first().iter();
        let mut drop_of_another = |drop: fn(&mut KnownArchive) -> bool| {
            let mut others = sources.clone().filter(|source| *source != of);
            others.any(|source| archives.get_mut(source).is_some_and(drop))
        };
        drop_of_another(KnownArchive::drop_previous_if_unread)
            || drop_of_another(KnownArchive::drop_spool_if_unread)
            || archives
                .get_mut(of)
                .is_some_and(KnownArchive::drop_previous_if_unread)
    }
}
