//! Keeps the entries as they are now, and the catalog with them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::catalog::Catalog;
use super::kept::{KeptBox, KeptBoxes, WHY, is_entry_name};

/// A directory that changed less than this ago may change again without a new time, where the file
/// system's times are finer than seconds, and where they are not.
const SETTLED: Duration = Duration::from_millis(50);
const SETTLED_IN_SECONDS: Duration = Duration::from_secs(2);

/// Identifies the state of the directory of the entries: inode, change time.
type DirectoryStamp = (u64, i64, i64);

/// The catalog and the entries, as they were at the last look.
#[derive(Default)]
pub(super) struct KeptReader {
    seen: Option<DirectoryStamp>,
    entries: Arc<KeptBoxes>,
    /// The catalog without the entries, and with them.
    combined: Option<(Arc<Catalog>, Arc<Catalog>)>,
}

impl KeptReader {
    /// Returns the catalog with the entries that there are now in `dir`, and that `owner` made.
    pub fn combine(&mut self, dir: &Path, owner: u32, rows: Arc<Catalog>) -> Arc<Catalog> {
        let before = self.entries.clone();
        self.read(dir, owner);
        if self.entries.all.is_empty() {
            self.combined = None;
            return rows;
        }
        if Arc::ptr_eq(&before, &self.entries)
            && let Some((of, combined)) = &self.combined
            && Arc::ptr_eq(of, &rows)
        {
            return combined.clone();
        }
        let combined = Arc::new(rows.with_kept(self.entries.clone()));
        self.combined = Some((rows, combined.clone()));
        combined
    }

    /// Reads the directory if it may have changed. An entry never changes.
    fn read(&mut self, dir: &Path, owner: u32) {
        let meta = fs::symlink_metadata(dir).ok();
        let Some(meta) = meta.filter(fs::Metadata::is_dir) else {
            if !self.entries.all.is_empty() {
                self.entries = Arc::default();
            }
            self.seen = None;
            return;
        };
        let stamp = (meta.ino(), meta.ctime(), meta.ctime_nsec());
        if self.seen == Some(stamp) {
            return;
        }
        let age = meta.modified().ok().and_then(|time| time.elapsed().ok());
        let tick = match meta.ctime_nsec() {
            0 => SETTLED_IN_SECONDS,
            _ => SETTLED,
        };
        let is_settled = age.is_some_and(|age| age > tick);
        let Ok(names) = fs::read_dir(dir) else { return };
        self.seen = is_settled.then_some(stamp);
        let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut ids: Vec<String> = names.filter(|name| is_entry_name(name)).collect();
        let known = &self.entries.by_id;
        // An entry that is being removed loses its rows first. One that is known goes with its
        // directory, a moment later.
        ids.retain(|id| known.contains_key(id) || dir.join(id).join(WHY).exists());
        if ids.len() == known.len() && ids.iter().all(|id| known.contains_key(id)) {
            return;
        }
        let entry = |id: &String| match known.get(id) {
            Some(entry) => Some(entry.clone()),
            None => KeptBox::read(dir, id, owner).ok().map(Arc::new),
        };
        let mut all: Vec<Arc<KeptBox>> = ids.iter().filter_map(entry).collect();
        all.sort_by(|one, other| (one.rows.at, one.id()).cmp(&(other.rows.at, other.id())));
        let by_id = all
            .iter()
            .map(|entry| (entry.id().to_owned(), entry.clone()));
        self.entries = Arc::new(KeptBoxes {
            by_id: by_id.collect(),
            all,
        });
    }
}
