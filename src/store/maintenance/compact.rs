//! `boxlitefs compact`: frees layers that are no longer needed, merges layers that only one other
//! layer reads, and shortens chains that are too long for a virtual machine.

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
use crate::store::kept::expire::{drop_over, purge};
use crate::store::layers::merge::{Merged, merge_layers};
use crate::store::layers::mergeable::{MergePlan, mergeable};
use crate::store::layers::put_back::keep_spares;
use crate::{Context, Error, Result};

/// How long to wait for layers that are in use. A mount closes layers soon after they were read.
const PATIENCE: Duration = Duration::from_secs(5);

/// Shows progress while layers are written.
pub trait Meter {
    /// Begins an operation that writes at most about `bytes`; `what` says whose layers are merged.
    fn begin(&self, what: &str, bytes: u64);
    /// Adds `bytes` to what was done since `begin`.
    fn advance(&self, bytes: u64);
    /// Ends the operation and clears the line, since output may follow.
    fn end(&self);
}

/// Compacts a home now. Prints a line for each merge, then a summary. With `purge_undo`, first drops
/// all that is kept to be had back. Returns how many bytes were freed.
///
/// # Errors
/// EBUSY while a BoxLite runtime has the home; those of opening it; the first error of a merge
/// other than that its layers are in use.
pub fn run(home: &Path, purge_undo: bool, out: &mut dyn Write, meter: &dyn Meter) -> Result<u64> {
    let store = Store::open(home, false, Compression::default())?;
    // Fails early, with the reason, if the home cannot be changed now.
    drop(store.home().change()?);
    let before = allocated_in_home(&store)?;
    if purge_undo {
        purge(&store)?;
    } else {
        // While nothing was mounted, none went.
        drop_over(&store, true)?;
    }
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
    result.map(|()| freed)
}

fn say(out: &mut dyn Write, line: &str) -> Result<()> {
    writeln!(out, "{line}").context(|| "cannot print the result")
}

/// Formats a number of bytes for people.
pub fn amount(bytes: u64) -> String {
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

/// Returns the bytes on disk of all image files of the home, each counted once.
fn allocated_in_home(store: &Store) -> Result<u64> {
    let layers = store.layers.scan()?;
    let mut seen = HashSet::new();
    let files = layers.files().filter(|file| seen.insert(file.id));
    Ok(files.map(|file| file.allocated).sum())
}

/// Carries out all merges that are possible. Retries those whose layers are in use until
/// [`PATIENCE`] is over.
fn compact_home(store: &Store, out: &mut dyn Write, meter: &dyn Meter) -> Result<()> {
    let begun = Instant::now();
    let mut failure = Ok(());
    let mut tried: HashSet<FileId> = HashSet::new();
    let mut in_use: Vec<(MergePlan, Error)> = Vec::new();
    loop {
        let mut plans = mergeable(store)?;
        plans.retain(|merge| !merge.top_id().is_some_and(|id| tried.contains(&id)));
        let Some(merge) = plans.into_iter().next() else {
            let is_late = begun.elapsed() > PATIENCE;
            if in_use.is_empty() || is_late {
                break;
            }
            // Retry the merges whose layers were in use.
            for (merge, _) in in_use.drain(..) {
                merge.top_id().map(|id| tried.remove(&id));
            }
            std::thread::sleep(Duration::from_millis(500));
            continue;
        };
        match merge_metered(store, &merge, meter) {
            Ok(merged) => say(out, &log_merge(store, &merge, merged))?,
            Err(error) => {
                tried.extend(merge.top_id());
                match error.errno() {
                    // The merged layer would take more space.
                    libc::ENODATA => {}
                    libc::EBUSY => in_use.push((merge, error)),
                    _ => {
                        let failed = format!("{} is not merged", names_of_readers(store, &merge));
                        store.events().info(&format!("{failed}: {error}"));
                        say(out, &failed)?;
                        failure = failure.and(Err(error));
                    }
                }
            }
        }
    }
    for (merge, error) in in_use {
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

/// Begins the operation that shows a merge in the mount's status.
pub(super) fn merge_operation(store: &Store, merge: &MergePlan) -> Operation {
    let what = format!("merging layers of {}", names_of_readers(store, merge));
    store.operations().begin(what, Some(merge.allocated()))
}

/// Names the boxes that read the layers of a merge.
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

/// Logs a merge and returns the message.
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
