//! `boxlitefs compact`: what nothing needs any more is freed, layers that one other alone needs are merged
//! with that, and chains that are too long for a virtual machine become short enough.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::merge::{Merge, Merged, Rows, merges, shortening};
use super::{Compression, Store};
use crate::disk::FileId;
use crate::home::Catalog;
use crate::progress::Operation;
use crate::{Context, Error, Result};

/// How long whoever has a layer open is waited for: a mount lets go of what nobody reads.
const PATIENCE: Duration = Duration::from_secs(5);

/// Shown while layers are written.
pub trait Meter {
    /// Something begins that may take this many bytes.
    fn begin(&self, what: &str, bytes: u64);
    /// So many more bytes are done.
    fn advance(&self, bytes: u64);
    /// It is over; what is printed next is not in its way.
    fn end(&self);
}

/// Compacts a home now and prints what came of it, a line each, then a summary.
///
/// # Errors
/// EBUSY while a BoxLite runtime has the home; those of opening it; what made a merge fail other than
/// somebody's using the layers.
pub fn run(home: &Path, out: &mut dyn Write, meter: &dyn Meter) -> Result<()> {
    let store = Store::open(home, false, Compression::default())?;
    // Says why, where nothing can be changed now.
    drop(store.home.change()?);
    let before = store.allocated()?;
    store.free_unneeded()?;
    store.keep_spares()?;
    let result = store.compact(out, meter);
    let freed = before.saturating_sub(store.allocated()?);
    let root = store.home.root().display();
    let summary = match freed {
        0 => format!("{root}: nothing more to free"),
        _ => format!("{root}: {} freed", amount(freed)),
    };
    say(out, &summary)?;
    result
}

fn say(out: &mut dyn Write, line: &str) -> Result<()> {
    writeln!(out, "{line}").context(|| "cannot print what was done")
}

/// Bytes as people read them.
pub(super) fn amount(bytes: u64) -> String {
    let mut amount = bytes as f64;
    let mut unit = "bytes";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if amount < 1024.0 {
            break;
        }
        amount /= 1024.0;
        unit = next;
    }
    match unit {
        "bytes" => format!("{bytes} bytes"),
        _ => format!("{amount:.1} {unit}"),
    }
}

impl Store {
    /// Bytes that all image files of the home take on the disk.
    fn allocated(&self) -> Result<u64> {
        let layers = self.scan_layers()?;
        let mut seen = HashSet::new();
        let files = layers.files().iter().filter(|file| seen.insert(file.id));
        Ok(files.map(|file| file.allocated).sum())
    }

    /// Merges all that can be merged, then shortens what is still too long.
    fn compact(&self, out: &mut dyn Write, meter: &dyn Meter) -> Result<()> {
        let begun = Instant::now();
        let mut failure = Ok(());
        let mut settled: HashSet<FileId> = HashSet::new();
        let mut waits: Vec<(Merge, Error)> = Vec::new();
        loop {
            let mut work = self.mergeable()?;
            work.retain(|merge| !merge.top_id().is_some_and(|id| settled.contains(&id)));
            let Some(merge) = work.into_iter().next() else {
                let is_late = begun.elapsed() > PATIENCE;
                if waits.is_empty() || is_late {
                    break;
                }
                // Once more, those that somebody was reading.
                for (merge, _) in waits.drain(..) {
                    merge.top_id().map(|id| settled.remove(&id));
                }
                std::thread::sleep(Duration::from_millis(500));
                continue;
            };
            match self.merge_metered(&merge, meter) {
                Ok(merged) => say(out, &self.message(&merge, merged))?,
                Err(error) => {
                    settled.extend(merge.top_id());
                    match error.errno() {
                        // It takes more room as one.
                        libc::ENODATA => {}
                        libc::EBUSY => waits.push((merge, error)),
                        _ => {
                            let failed = format!("{} stays as it is", self.readers(&merge));
                            self.events.info(&format!("{failed}: {error}"));
                            say(out, &failed)?;
                            failure = failure.and(Err(error));
                        }
                    }
                }
            }
        }
        for (merge, error) in waits {
            say(out, &format!("{}: not now, {error}", self.readers(&merge)))?;
        }
        failure
    }

    fn merge_metered(&self, merge: &Merge, meter: &dyn Meter) -> Result<Merged> {
        meter.begin(&self.readers(merge), merge.allocated());
        let merged = self.merge(merge, &mut |bytes| {
            meter.advance(bytes);
            Ok(())
        });
        meter.end();
        merged
    }

    /// A merge that begins, to be told of.
    pub(super) fn merge_operation(&self, merge: &Merge) -> Operation {
        let what = format!("merging layers of {}", self.readers(merge));
        self.operations.begin(what, Some(merge.allocated()))
    }

    /// What could be merged as things are, the cheapest first, and after that the live disks that would
    /// still be too long. Looks without the lock: a merge looks again.
    pub(super) fn mergeable(&self) -> Result<Vec<Merge>> {
        let layers = self.scan_layers()?;
        let catalog = self.home.catalog()?;
        let bases = self.home.bases()?;
        let named = self.named_in(&catalog);
        let rows = Rows::new(catalog.boxes(), &bases, &named);
        let mut found = merges(&layers, &rows);
        found.sort_by_key(Merge::allocated);
        let is_open: HashSet<FileId> = found.iter().filter_map(Merge::top_id).collect();
        for record in catalog.boxes() {
            let live = self.home.live_disk(&record.id);
            let long = shortening(&layers, &rows, &live);
            found.extend(
                long.filter(|merge| merge.top_id().is_some_and(|id| !is_open.contains(&id))),
            );
        }
        Ok(found)
    }

    /// Whether there is a base with a row that nothing seems to need. Looks without the lock.
    pub(super) fn has_unneeded(&self, catalog: &Catalog) -> Result<bool> {
        let layers = self.scan_layers()?;
        let named = self.named_in(catalog);
        let bases = self.home.bases()?;
        let rows = Rows::new(catalog.boxes(), &bases, &named);
        let mut files = layers.files().iter();
        Ok(files.any(|file| rows.is_unneeded(file, &layers)))
    }

    /// Every path that a snapshot's row names.
    pub(super) fn named_in(&self, catalog: &Catalog) -> BTreeSet<PathBuf> {
        let boxes = catalog.boxes().iter();
        let snapshots = boxes.flat_map(|record| catalog.snapshots_of(&record.id));
        snapshots
            .flat_map(|snapshot| self.named_by(snapshot))
            .collect()
    }

    /// Who reads the layers of a merge.
    fn readers(&self, merge: &Merge) -> String {
        let mut names = merge.boxes().iter().map(|id| self.name_of(id));
        let first = names.next().unwrap_or_default();
        match names.count() {
            0 => format!("box {first}"),
            1 => format!("box {first} and another"),
            more => format!("box {first} and {more} others"),
        }
    }

    pub(super) fn message(&self, merge: &Merge, merged: Merged) -> String {
        let mut message = format!("{}: {} layers became one", self.readers(merge), merge.len());
        if let Ok(freed @ 1..) = u64::try_from(merged.freed) {
            let _ = write!(message, ", {} freed", amount(freed));
        } else if let Ok(more @ 1..) = u64::try_from(-merged.freed) {
            let _ = write!(message, ", {} more than before", amount(more));
        }
        self.events.info(&message);
        message
    }
}
