//! `boxlitefs prune`: deletes the snapshots of boxes that no rule keeps.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::arguments::PruneArguments;
use super::output::print;
use super::place::{home_of, mount_of, mounted_home};
use crate::exports::Compression;
use crate::home::rfc3339;
use crate::store::summary::{self, BoxSnapshots, SnapshotSummary};
use crate::store::{Retention, Store, remove_snapshot};
use crate::tree::Undo;
use crate::{Context, Error, Result};

/// A box whose snapshots are pruned.
struct Target {
    home: PathBuf,
    /// Its directory in a mount; None if it is named, and not mounted.
    directory: Option<PathBuf>,
    of: BoxSnapshots,
}

/// Deletes what no rule keeps, and prints what is deleted and what stays.
///
/// # Errors
/// EINVAL where no rule keeps anything, ENOENT for a box that is not there; the first error of a
/// deletion, after all have been tried.
pub(super) fn run(arguments: &PruneArguments) -> Result<()> {
    let retention = Retention {
        last: arguments.keep_last,
        hourly: arguments.keep_hourly,
        daily: arguments.keep_daily,
        weekly: arguments.keep_weekly,
        monthly: arguments.keep_monthly,
    };
    if retention.is_empty() {
        return Err(Error::new(
            libc::EINVAL,
            "no rule keeps anything: give --keep-last, --keep-hourly, --keep-daily, --keep-weekly or \
             --keep-monthly",
        ));
    }
    // All are found before the first is changed.
    let targets = arguments.boxes.iter();
    let targets: Vec<Target> = targets
        .map(|named| find(arguments.home.as_deref(), named))
        .collect::<Result<_>>()?;
    let mut failure = None;
    let mut values = Vec::new();
    for target in &targets {
        let pruned = prune(target, retention, arguments, &mut failure)?;
        values.push(pruned);
    }
    if arguments.json {
        print(&format!("{:#}\n", Value::from(values)))?;
    }
    failure.map_or(Ok(()), Err)
}

/// Finds a box by its directory in a mount, or by its name.
fn find(home: Option<&Path>, named: &Path) -> Result<Target> {
    let absolute = std::path::absolute(named).context(|| "cannot tell the working directory")?;
    if let (None, Some(parent), Some(name)) = (home, absolute.parent(), absolute.file_name())
        && let Some(home) = mounted_home(parent)?
    {
        let of = box_of(&home, &name.to_string_lossy())?;
        return Ok(Target {
            home,
            directory: Some(absolute),
            of,
        });
    }
    if home.is_none()
        && let Ok(mountpoint) = mount_of(named)
    {
        return Err(Error::new(
            libc::EINVAL,
            format!(
                "{} is not the directory of a box: name a directory in {}",
                named.display(),
                mountpoint.display()
            ),
        ));
    }
    let home = home_of(home.map(Path::to_owned))?;
    let of = box_of(&home, &named.to_string_lossy())?;
    Ok(Target {
        home,
        directory: None,
        of,
    })
}

/// Returns the box that has this name or id, also as a mount shows it.
fn box_of(home: &Path, name: &str) -> Result<BoxSnapshots> {
    let shown = |it: &BoxSnapshots| it.name.replace('%', "%25").replace('/', "%2F");
    let mut boxes = summary::snapshots(home)?.into_iter();
    boxes
        .find(|it| it.name == name || it.id == name || shown(it) == name)
        .ok_or_else(|| {
            let home = home.display();
            Error::new(
                libc::ENOENT,
                format!("there is no box {name} in {home}: `boxlitefs ls` lists its boxes"),
            )
        })
}

/// Prunes one box. Returns what was done as JSON.
fn prune(
    target: &Target,
    retention: Retention,
    arguments: &PruneArguments,
    failure: &mut Option<Error>,
) -> Result<Value> {
    let name = &target.of.name;
    let snapshots = target.of.snapshots.iter();
    let snapshots: Vec<&SnapshotSummary> = snapshots
        .filter(|snapshot| snapshot.name.starts_with(&arguments.prefix))
        .collect();
    let times: Vec<i64> = snapshots.iter().map(|it| it.created_at).collect();
    let reasons = retention.reasons(&times);
    let mut lines = String::new();
    let (mut kept, mut removed) = (Vec::new(), Vec::new());
    for (snapshot, reasons) in snapshots.iter().zip(&reasons) {
        let at = rfc3339(snapshot.created_at);
        let shown = snapshot.name.escape_debug();
        if !reasons.is_empty() {
            lines += &format!("{name}: keeps {shown} of {at}: {}\n", reasons.join(", "));
            kept.push(json!({"name": snapshot.name, "created_at": at, "reasons": reasons}));
            continue;
        }
        if !arguments.dry_run
            && let Err(error) = remove(target, snapshot, arguments.undo)
        {
            eprintln!("boxlitefs: {name}: {shown} stays: {error}");
            kept.push(json!({"name": snapshot.name, "created_at": at, "error": error.to_string()}));
            failure.get_or_insert(error);
            continue;
        }
        let verb = if arguments.dry_run {
            "would delete"
        } else {
            "deleted"
        };
        lines += &format!("{name}: {verb} {shown} of {at}\n");
        removed.push(json!({"name": snapshot.name, "created_at": at}));
    }
    if !arguments.json {
        print(&lines)?;
    }
    Ok(json!({"box": name, "kept": kept, "removed": removed, "dry_run": arguments.dry_run}))
}

/// Deletes a snapshot: by the mount where there is one, which goes on freeing its space, and else as
/// a mount with this `undo` does.
fn remove(target: &Target, snapshot: &SnapshotSummary, undo: Undo) -> Result<()> {
    if let Some(directory) = &target.directory {
        let place = directory.join("snapshots").join(&snapshot.name);
        return fs::remove_dir(&place).context(|| {
            let log = directory.with_file_name(".boxlite/log");
            format!("cannot delete it ({} says why)", log.display())
        });
    }
    let store = Store::open_for_mount(&target.home, false, true, Compression::default())?;
    let store = store.with_undo(undo.keep_for);
    remove_snapshot(&store, &target.of.id, &snapshot.id)
}
