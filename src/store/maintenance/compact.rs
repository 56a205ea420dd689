//! `boxlitefs compact`: what nothing needs any more is freed, layers that one other alone needs are merged
//! with that, and chains that are too long for a virtual machine become short enough.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::disk::FileId;
use crate::exports::Compression;
use crate::progress::Operation;
use crate::store::Store;
use crate::store::access::home_recovery::free_unneeded;
use crate::store::layers::merge::{Merged, merge_layers};
use crate::store::layers::mergeable::{MergePlan, mergeable};
use crate::store::layers::put_back::keep_spares;
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
    drop(store.home().change()?);
    let before = allocated_in_home(&store)?;
    free_unneeded(&store)?;
    keep_spares(&store)?;
    let result = compact_home(&store, out, meter);
    let freed = before.saturating_sub(allocated_in_home(&store)?);
    let root = store.home().root().display();
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

/// Bytes that all image files of the home take on the disk.
fn allocated_in_home(store: &Store) -> Result<u64> {
    let layers = store.layers.scan()?;
    let mut seen = HashSet::new();
    let files = layers.files().iter().filter(|file| seen.insert(file.id));
    Ok(files.map(|file| file.allocated).sum())
}

/// Merges all that can be merged, then shortens what is still too long.
fn compact_home(store: &Store, out: &mut dyn Write, meter: &dyn Meter) -> Result<()> {
    let begun = Instant::now();
    let mut failure = Ok(());
    let mut settled: HashSet<FileId> = HashSet::new();
    let mut waits: Vec<(MergePlan, Error)> = Vec::new();
    loop {
        let mut work = mergeable(store)?;
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
        match merge_metered(store, &merge, meter) {
            Ok(merged) => say(out, &log_merge(store, &merge, merged))?,
            Err(error) => {
                settled.extend(merge.top_id());
                match error.errno() {
                    // It takes more room as one.
                    libc::ENODATA => {}
                    libc::EBUSY => waits.push((merge, error)),
                    _ => {
                        let failed = format!("{} stays as it is", names_of_readers(store, &merge));
                        store.events().info(&format!("{failed}: {error}"));
                        say(out, &failed)?;
                        failure = failure.and(Err(error));
                    }
                }
            }
        }
    }
    for (merge, error) in waits {
        say(
            out,
            &format!("{}: not now, {error}", names_of_readers(store, &merge)),
        )?;
    }
    failure
}

fn merge_metered(store: &Store, merge: &MergePlan, meter: &dyn Meter) -> Result<Merged> {
    meter.begin(&names_of_readers(store, merge), merge.allocated());
    let merged = merge_layers(store, merge, &mut |bytes| {
        meter.advance(bytes);
        Ok(())
    });
    meter.end();
    merged
}

/// A merge that begins, to be told of.
pub(super) fn merge_operation(store: &Store, merge: &MergePlan) -> Operation {
    let what = format!("merging layers of {}", names_of_readers(store, merge));
    store.operations().begin(what, Some(merge.allocated()))
}

/// Who reads the layers of a merge.
fn names_of_readers(store: &Store, merge: &MergePlan) -> String {
    let mut names = merge
        .boxes()
        .iter()
        .map(|id| store.exports.disks.name_of(id));
    let first = names.next().unwrap_or_default();
    match names.count() {
        0 => format!("box {first}"),
        1 => format!("box {first} and another"),
        more => format!("box {first} and {more} others"),
    }
}

pub(super) fn log_merge(store: &Store, merge: &MergePlan, merged: Merged) -> String {
    let mut message = format!(
        "{}: {} layers became one",
        names_of_readers(store, merge),
        merge.len()
    );
    if let Ok(freed @ 1..) = u64::try_from(merged.freed) {
        let _ = write!(message, ", {} freed", amount(freed));
    } else if let Ok(more @ 1..) = u64::try_from(-merged.freed) {
        let _ = write!(message, ", {} more than before", amount(more));
    }
    store.events().info(&message);
    message
}
