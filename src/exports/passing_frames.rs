//! Frames of a compressed archive on their way to a reader: taken from archives that are kept, and
//! kept themselves once all of them have passed.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::archive::{FrameCache, FrameKey};
use crate::exports::compressed_cache::CompressedArchives;
use crate::exports::disks::Source;
use crate::exports::plain::Contents;
use crate::exports::spool::Spool;
use crate::exports::spooling::Spooling;

/// The frames of one archive as they are made.
pub(crate) struct PassingFrames {
    archives: Arc<CompressedArchives>,
    source: Source,
    /// Archives that may have some of the frames. They may be dropped at any time.
    kept: Vec<Weak<Spool>>,
    /// Whether frames can be recognised by where their data lies. If the state of the disk may not
    /// be remembered, other bytes could lie there later.
    is_lasting: bool,
    /// The archive, if it is put into the cache by itself when it is whole.
    becomes: Option<WholeArchive>,
    spooling: Mutex<SpoolProgress>,
}

/// What a whole archive is of.
pub(crate) struct WholeArchive {
    /// Contents of the plain archive.
    pub plain: Contents,
    /// Length in bytes.
    pub size: u64,
}

enum SpoolProgress {
    /// No frame passed yet.
    Waiting,
    Writing(Spooling),
    /// It is whole, or given up.
    Over,
}

impl PassingFrames {
    /// Returns the frames of the archive of `source`. If `becomes` is given, its spool goes into
    /// the cache once it is whole.
    pub fn new(
        archives: &Arc<CompressedArchives>,
        source: &Source,
        kept: Vec<Weak<Spool>>,
        is_lasting: bool,
        becomes: Option<WholeArchive>,
    ) -> PassingFrames {
        PassingFrames {
            archives: archives.clone(),
            source: source.clone(),
            kept: if is_lasting { kept } else { Vec::new() },
            is_lasting,
            becomes,
            spooling: Mutex::new(SpoolProgress::Waiting),
        }
    }

    /// Ends the spool. Returns it if it holds all `total` bytes.
    pub fn finish(&self, total: u64) -> Option<Arc<Spool>> {
        match std::mem::replace(&mut *self.spooling.lock(), SpoolProgress::Over) {
            SpoolProgress::Writing(spooling) => spooling.finish(total),
            SpoolProgress::Waiting | SpoolProgress::Over => None,
        }
    }
}

impl FrameCache for PassingFrames {
    fn has_frames(&self) -> bool {
        self.kept.iter().any(|spool| spool.strong_count() > 0)
    }

    fn find(&self, key: &FrameKey, bytes: &mut Vec<u8>) -> bool {
        let mut kept = self.kept.iter().filter_map(Weak::upgrade);
        kept.any(|spool| spool.find(key, bytes))
    }

    fn offer(&self, start: u64, key: Option<FrameKey>, bytes: &[u8]) {
        let mut progress = self.spooling.lock();
        if matches!(*progress, SpoolProgress::Waiting) {
            *progress = SpoolProgress::Writing(Spooling::begin(&self.archives, &self.source));
        }
        let SpoolProgress::Writing(spooling) = &mut *progress else {
            return;
        };
        spooling.put(start, key.filter(|_| self.is_lasting), bytes);
        let is_whole = |whole: &WholeArchive| spooling.size() >= whole.size;
        let whole = self.becomes.as_ref().filter(|whole| is_whole(whole));
        if whole.is_none() && !spooling.is_given_up() {
            return;
        }
        drop(progress);
        if let Some(whole) = whole
            && let Some(spool) = self.finish(whole.size)
        {
            self.archives.keep(&self.source, whole.plain, spool);
        }
        *self.spooling.lock() = SpoolProgress::Over;
    }
}
