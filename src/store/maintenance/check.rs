//! `boxlitefs check`: every row has its files, every file has its row, every chain resolves, every
//! qcow2 header is sane, and leftovers are named. It changes nothing and takes no lock.
//!
//! `boxlitefs check --repair` then removes or adopts what it can, under the lock.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Display;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::disk::{Chain, FileId};
use crate::event_log::EventLog;
use crate::exports::{Compression, display_name};
use crate::files::listing::{names_in, resolve};
use crate::files::markers::UNRECORDED;
use crate::files::waiting_archive::waiting_in;
use crate::files::workspace;
use crate::home::{
    Activity, BaseRecord, BoxRecord, Catalog, Home, SnapshotRecord, is_snapshot_name,
};
use crate::store::Store;
use crate::store::access::home_recovery::free_unneeded;
use crate::store::access::lock::lock_box;
use crate::store::access::locked_box::LockedBox;
use crate::store::access::path_spelling::misspelled_now;
use crate::store::layers::catalog_index::CatalogIndex;
use crate::store::layers::collect::named_in;
use crate::store::layers::graph::{ImageFile, LayerGraph, Role, is_row_of};
use crate::store::layers::put_back::keep_spares;
use crate::store::layers::snapshot_place::{NewSnapshotIdentity, record_snapshot};
use crate::store::maintenance::compact::amount;
use crate::{Context, Result};

/// Checks a home. Prints a line for each finding, then a summary. Returns whether there is no
/// finding. With `repair`, first repairs what it can; the result counts the remaining findings.
///
/// # Errors
/// Those of [`examine`] and of writing to `out`.
pub fn run(home: &Path, repair: bool, out: &mut dyn Write) -> Result<bool> {
    let report = examine(home, repair)?;
    for repaired in &report.repaired {
        say(out, &format!("repaired: {repaired}"))?;
    }
    for finding in &report.findings {
        say(out, finding)?;
    }
    for note in &report.notes {
        say(out, &format!("note: {note}"))?;
    }
    if let Some(unread) = &report.unread {
        say(out, &format!("note: {unread}"))?;
    }
    let state = match report.findings.len() {
        0 => "clean".to_owned(),
        1 => "1 finding".to_owned(),
        many => format!("{many} findings"),
    };
    say(
        out,
        &format!("{}: {} boxes, {state}", report.root.display(), report.boxes),
    )?;
    Ok(report.findings.is_empty())
}

/// Checks a home, and with `repair` first repairs what it can.
///
/// # Errors
/// Those of opening the home (none there, a damaged database). EBUSY when a repair is needed while a
/// BoxLite runtime has the home.
pub fn examine(home: &Path, repair: bool) -> Result<Report> {
    let mut report = inspect_again(home)?;
    if repair && !(report.findings.is_empty() && report.notes.is_empty()) {
        let store = Store::open(home, false, Compression::default())?;
        repair_home(&store)?;
        drop(store);
        let before = std::mem::replace(&mut report, inspect(home)?);
        let remaining: HashSet<&String> = report.findings.iter().chain(&report.notes).collect();
        let findings = before.findings.iter().chain(&before.notes);
        let repaired = findings.filter(|finding| !remaining.contains(finding));
        report.repaired = repaired.cloned().collect();
    }
    Ok(report)
}

fn say(out: &mut dyn Write, line: &str) -> Result<()> {
    writeln!(out, "{line}").context(|| "cannot print the findings")
}

/// How often a home is inspected again where something was found, and after which pause: a change
/// takes milliseconds.
const FURTHER_LOOKS: u32 = 2;
const LOOK_PAUSE: Duration = Duration::from_millis(150);

/// The result of a check.
pub struct Report {
    /// The home.
    pub root: PathBuf,
    /// Number of boxes.
    pub boxes: usize,
    /// What was repaired, of what was found before.
    pub repaired: Vec<String>,
    /// Damage and leftovers, a sentence each.
    pub findings: Vec<String>,
    /// What takes space or needs attention but is not damage.
    pub notes: Vec<String>,
    /// The sum of our layers that are no longer read, each of which is a finding.
    pub unread: Option<String>,
}

/// Inspects a home, and again where something was found: a mount or BoxLite may be in the middle of
/// a change. Only what is found each time counts.
fn inspect_again(home: &Path) -> Result<Report> {
    let mut report = inspect(home)?;
    for _ in 0..FURTHER_LOOKS {
        if report.findings.is_empty() {
            break;
        }
        std::thread::sleep(LOOK_PAUSE);
        let before = std::mem::replace(&mut report, inspect(home)?);
        report
            .findings
            .retain(|finding| before.findings.contains(finding));
    }
    Ok(report)
}

fn inspect(home: &Path) -> Result<Report> {
    let home = Home::open(home)?;
    home.refuse_hidden()?;
    let events = EventLog::open(&home, true);
    let store = Store::without_recovery(home, events);
    let mut check = Check {
        catalog: store.home().catalog()?,
        layers: store.layers.scan()?,
        bases: store.home().bases()?,
        store: &store,
        findings: Vec::new(),
        notes: Vec::new(),
        unread: None,
    };
    check.schema();
    check.paths()?;
    check.headers();
    check.boxes();
    check.unneeded_of_boxlite();
    check.bases();
    check.kept()?;
    check.leftovers()?;
    Ok(Report {
        root: store.home().root().to_owned(),
        boxes: check.catalog.boxes().len(),
        repaired: Vec::new(),
        findings: check.findings,
        notes: check.notes,
        unread: check.unread,
    })
}

/// Removes leftovers of a crash that are not needed, gives rows to bases that are read, and makes
/// snapshots of layers that lie in a snapshot's place without a row. Skips running boxes.
fn repair_home(store: &Store) -> Result<()> {
    // Fails early, with the reason, if the home cannot be changed now.
    drop(store.home().change()?);
    let catalog = store.home().catalog()?;
    for record in catalog.boxes() {
        if store.home().activity(record) != Activity::Idle {
            continue;
        }
        let repaired =
            lock_box(store, &record.id).and_then(|mut locked| record_orphans(&mut locked));
        if let Err(error) = repaired {
            store.events().info(&format!("repair: {error}"));
        }
    }
    free_unneeded(store)?;
    keep_spares(store)
}

/// Makes snapshots of layers that lie in a snapshot's place without a row and whose chain can be
/// read. Recovery leaves them because they may be the only copy of a state. As snapshots, the user
/// can inspect and delete them.
fn record_orphans(locked: &mut LockedBox<'_>) -> Result<()> {
    let home = locked.store.home();
    let rows = locked.snapshots()?;
    for name in names_in(&home.snapshots_dir(&locked.record.id))? {
        let path = home.snapshot_disk(&locked.record.id, &name);
        let has_row = rows.iter().any(|row| row.name == name);
        if has_row || !is_snapshot_name(&name) || !path.is_file() {
            continue;
        }
        let Ok(chain) = Chain::open_in(&path, &locked.store.exports.disks.scope_of(&path)) else {
            continue;
        };
        let made = chain.changed_at().duration_since(std::time::UNIX_EPOCH);
        let made = made.map_or(0, |age| i64::try_from(age.as_secs()).unwrap_or(0));
        let size = chain.virtual_size();
        drop(chain);
        let new = NewSnapshotIdentity {
            created_at: Some(made),
            ..NewSnapshotIdentity::taken_now(&name)?
        };
        record_snapshot(locked, &new, &path, size)?;
        locked.store.events().info(&format!(
            "box {}: recorded snapshot {name}, whose layer had no row",
            display_name(&locked.record)
        ));
    }
    Ok(())
}

/// What to do where a state of a box can't be read any more.
const LOST: &str = "what is lost is only in a backup: import it from there";

/// A check under way: what it reads, and what it has found so far.
struct Check<'s> {
    store: &'s Store,
    catalog: std::sync::Arc<Catalog>,
    layers: LayerGraph,
    bases: Vec<BaseRecord>,
    findings: Vec<String>,
    notes: Vec<String>,
    unread: Option<String>,
}

impl Check<'_> {
    fn report(&mut self, finding: impl Display) {
        self.findings.push(finding.to_string());
    }

    /// Finds a database schema that we may not change.
    fn schema(&mut self) {
        if let Some(why) = self.catalog.schema().read_only.clone() {
            self.report(why);
        }
    }

    /// Finds rows and headers that name files of this home by other paths. BoxLite compares the
    /// paths of bases as text and deletes a base that it does not find named.
    fn paths(&mut self) -> Result<()> {
        let misspelled = match misspelled_now(self.store, Some(&self.layers)) {
            Ok(misspelled) => misspelled,
            Err(error) if error.errno() == libc::EPERM => {
                self.report(error);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for path in misspelled {
            if path.is_dangerous() {
                self.report(format!(
                    "{path}; BoxLite may delete that file at its next start; mounting the home, or check --repair, corrects it"
                ));
            } else {
                self.notes.push(format!(
                    "{path}; mounting the home, or check --repair, corrects it"
                ));
            }
        }
        Ok(())
    }

    /// Finds image files whose header is damaged.
    fn headers(&mut self) {
        let damaged = self.layers.files().filter_map(|file| file.damaged.clone());
        // A file may have several names, and each is found.
        let damaged: BTreeSet<String> = damaged.collect();
        self.findings.extend(damaged);
    }

    /// Checks the rows, disks and snapshots of every box.
    fn boxes(&mut self) {
        let catalog = self.catalog.clone();
        for record in catalog.boxes() {
            self.configuration(record);
            let live = self.store.home().live_disk(&record.id);
            if live.exists() {
                self.chain(&format!("box {}", display_name(record)), &live);
                self.one_name(record, &live);
            } else if !catalog.snapshots_of(&record.id).is_empty() {
                self.report(format!(
                    "box {} has snapshots but no disk at {}; `cp -r` of a snapshot in a mount makes a box of it",
                    display_name(record),
                    live.display()
                ));
            }
            for snapshot in catalog.snapshots_of(&record.id) {
                let subject = format!("snapshot {} of box {}", snapshot.name, display_name(record));
                let path = self.store.exports.disks.snapshot_layer(snapshot);
                if path.is_file() {
                    self.chain(&subject, &path);
                } else {
                    self.report(format!(
                        "{subject} has no file {}; {LOST}, or delete the snapshot",
                        path.display()
                    ));
                }
            }
        }
    }

    /// Checks that the row of a box can be read and that its directory is the one of this home.
    fn configuration(&mut self, record: &BoxRecord) {
        let name = display_name(record);
        match record.config() {
            Ok(config) => {
                let box_home = config["box_home"].as_str().unwrap_or_default().to_owned();
                let here = self.store.home().box_dir(&record.id);
                if !here.is_dir() {
                    self.report(format!(
                        "box {name} has no directory {}; {LOST}",
                        here.display()
                    ));
                } else if FileId::at(Path::new(&box_home)).ok() != FileId::at(&here).ok() {
                    self.report(format!(
                        "box {name} says it lives in {box_home}, not in {}: this home is a copy, changes are refused",
                        here.display()
                    ));
                }
            }
            Err(error) => self.report(error),
        }
        if let Err(error) = record.state() {
            self.report(error);
        }
    }

    /// Checks that every layer of a chain opens and that none lies outside the home.
    fn chain(&mut self, subject: &str, top: &Path) {
        let home = self.store.home();
        match Chain::open_in(top, &self.store.exports.disks.scope_of(top)) {
            Ok(chain) => {
                let outside: Vec<PathBuf> = chain
                    .layers()
                    .iter()
                    .filter_map(|layer| resolve(layer.path()).ok())
                    .filter(|path| !home.contains(path))
                    .collect();
                for path in outside {
                    self.report(format!(
                        "{subject} reads from {}, outside this home; changes are refused",
                        path.display()
                    ));
                }
            }
            Err(error) if matches!(error.errno(), libc::EIO | libc::ENOENT | libc::EINVAL) => {
                self.report(format!("{subject}: {error}; {LOST}"));
            }
            Err(error) => self.report(format!("{subject}: {error}")),
        }
    }

    /// Finds further names of a live disk: they come from a change that was cut off.
    fn one_name(&mut self, record: &BoxRecord, live: &Path) {
        let Ok(id) = FileId::at(live) else { return };
        let names: Vec<String> = self
            .layers
            .names_of(id)
            .filter(|name| name.path != live)
            .map(|name| name.path.display().to_string())
            .collect();
        for name in names {
            self.report(format!(
                "{name} is also the live disk of box {}: a change was cut off; mounting the home undoes it",
                display_name(record)
            ));
        }
    }

    /// Notes bases that BoxLite made and that are no longer read. BoxLite frees them with their
    /// box.
    fn unneeded_of_boxlite(&mut self) {
        let named = named_in(self.store, &self.catalog);
        let bases: Vec<BaseRecord> = self
            .bases
            .iter()
            .filter(|row| !row.is_ours())
            .cloned()
            .collect();
        let rows = CatalogIndex::new(self.catalog.boxes(), &bases, &named);
        let files = self.layers.files();
        let unneeded = files.filter(|file| rows.is_unneeded(file, &self.layers));
        let notes = unneeded.map(|file| {
            format!(
                "nothing reads from BoxLite's {} any more ({}); boxlitefs compact frees it",
                file.path.display(),
                amount(file.allocated)
            )
        });
        self.notes.extend(notes);
    }

    /// Finds rows of bases without files, and files in `bases/` without rows.
    fn bases(&mut self) {
        let rows = std::mem::take(&mut self.bases);
        let mut with_rows = BTreeSet::new();
        for row in &rows {
            let path = PathBuf::from(&row.base_path);
            let right = self
                .store
                .layers
                .path_of_base(row)
                .unwrap_or_else(|_| path.clone());
            if !path.exists() {
                let mut why = match self.layers.readers_of(&right).next() {
                    Some(reader) => format!("and {} reads from it", reader.path.display()),
                    None => "nothing reads from it".to_owned(),
                };
                if let Some(spare) = self.layers.spares().of_base(&right) {
                    why = format!(
                        "{why}; its layer is still there as {}: mounting the home, or check --repair, restores the file",
                        spare.path.display()
                    );
                }
                self.report(format!(
                    "base {} has no file {}; {why}",
                    row.id,
                    path.display()
                ));
            } else if let Ok(path) = resolve(&path) {
                with_rows.insert(path);
            }
        }
        let without: Vec<String> = self
            .layers
            .files()
            .filter(|file| matches!(file.role, Role::Base { .. }) && !with_rows.contains(&file.path))
            .map(|file| {
                let why = match self.layers.readers_of(&file.path).next() {
                    Some(_) => "a layer reads from it, so it is kept",
                    None => "nothing reads from it; it is kept, because a crash can leave a box's disk like this",
                };
                format!(
                    "{} ({}) has no row in the database; {why}",
                    file.path.display(),
                    amount(file.allocated)
                )
            })
            .collect();
        self.findings.extend(without);
        self.unread(&rows);
        self.spares(&rows);
    }

    /// Finds our own bases that are no longer read: BoxLite removed their last reader, or a change
    /// was cut off.
    fn unread(&mut self, rows: &[BaseRecord]) {
        let unread: Vec<&ImageFile> = rows
            .iter()
            .filter(|row| row.is_ours())
            .filter_map(|row| self.layers.at(&resolve(Path::new(&row.base_path)).ok()?))
            .filter(|file| file.names == 1 && self.layers.readers_of(&file.path).next().is_none())
            .collect();
        let bytes: u64 = unread.iter().map(|file| file.allocated).sum();
        let messages: Vec<String> = unread
            .iter()
            .map(|file| {
                format!(
                    "{} is a leftover, nothing reads from it ({}); mounting the home frees it",
                    file.path.display(),
                    amount(file.allocated)
                )
            })
            .collect();
        if messages.is_empty() {
            return;
        }
        self.unread = Some(format!(
            "layers of boxlitefs whose last reader BoxLite removed: {} ({}); boxlitefs compact frees them",
            messages.len(),
            amount(bytes)
        ));
        self.findings.extend(messages);
    }

    /// Finds spare names whose base has neither file nor row. A base with a row is found by
    /// [`Self::bases`].
    fn spares(&mut self, rows: &[BaseRecord]) {
        let has_row = |base: &Path| rows.iter().any(|row| is_row_of(row, base));
        let spares = self.layers.spares().all().iter();
        let orphans = spares.filter(|spare| self.layers.at(&spare.base).is_none());
        let findings: Vec<String> = orphans
            .filter_map(|spare| {
                let (path, base) = (spare.path.display(), spare.base.display());
                let size = amount(spare.allocated);
                if let Some(reader) = self.layers.readers_of(&spare.base).next() {
                    let reader = reader.path.display();
                    return (!has_row(&spare.base)).then(|| format!(
                        "{reader} reads from {base}, which is gone; its layer is still there as {path}: mounting the home, or check --repair, restores the file"
                    ));
                }
                (!has_row(&spare.base)).then(|| format!(
                    "{path} is a leftover, nothing reads from it ({size}); mounting the home frees it"
                ))
            })
            .collect();
        self.findings.extend(findings);
    }

    /// Checks what is kept to be had back: its rows and its disks. Nothing of it may still be there.
    fn kept(&mut self) -> Result<()> {
        let catalog = self.catalog.clone();
        for id in self.store.home().kept_ids()? {
            let dir = self.store.home().box_dir(&id);
            let shown = dir.display().to_string();
            let Some(entry) = catalog.kept_by_id(&id) else {
                let why = match self.store.home().read_kept(&id) {
                    Err(error) if error.errno() != libc::ENOENT => {
                        format!("{error}; boxlitefs compact --purge-undo frees it")
                    }
                    _ => format!(
                        "{shown} is left of what was kept ({}); mounting the home removes it",
                        amount(allocated_below(&dir))
                    ),
                };
                self.report(why);
                continue;
            };
            if !self.store.home().is_gone(entry, &catalog) {
                self.report(format!(
                    "{shown} keeps something that is there: the {} was cut off, or undone; mounting the home removes it",
                    entry.rows.what
                ));
                continue;
            }
            let subject = format!("what is kept in {shown}");
            let rows = catalog.snapshots_of(&id).iter();
            let layers = rows.map(|row| self.store.exports.disks.snapshot_layer(row));
            let live = Some(self.store.home().live_disk(&id));
            let live = live.filter(|live| live.exists());
            for disk in live.into_iter().chain(layers).collect::<Vec<_>>() {
                self.chain(&subject, &disk);
                let file = self.layers.at(&disk);
                let has_base = file.is_some_and(|file| self.layers.base_of(file.id).is_some());
                if !has_base {
                    self.report(format!(
                        "{} has no name in bases/; mounting the home gives it one",
                        disk.display()
                    ));
                }
            }
        }
        Ok(())
    }

    /// Finds files and directories that belong to no row, and workspaces of killed mounts.
    fn leftovers(&mut self) -> Result<()> {
        let home = self.store.home();
        let mut findings = Vec::new();
        let mut notes = Vec::new();
        for id in names_in(&home.boxes_dir())? {
            let dir = home.box_dir(&id);
            let Some(record) = self.catalog.box_by_id(&id) else {
                findings.push(format!(
                    "{} belongs to no box ({}); BoxLite removes it at its next start",
                    dir.display(),
                    amount(allocated_below(&dir))
                ));
                continue;
            };
            if home.pending_marker(&id).exists() {
                findings.push(format!(
                    "box {} was left by BoxLite in the middle of a snapshot; start BoxLite once to recover the box",
                    display_name(record)
                ));
            }
            for name in names_in(&home.snapshots_dir(&id))? {
                let dir = home.snapshots_dir(&id).join(&name);
                let mut rows = self.catalog.snapshots_of(&id).iter();
                let is_of = |row: &SnapshotRecord| {
                    row.name == name
                        || self.store.exports.disks.snapshot_layer(row).parent() == Some(&dir)
                };
                if rows.any(is_of) {
                    continue;
                }
                if dir.join(UNRECORDED).exists() {
                    notes.push(format!(
                        "{} is left of a deleted snapshot of box {} ({}); the mount frees it when BoxLite can no longer need it",
                        dir.display(),
                        display_name(record),
                        amount(allocated_below(&dir))
                    ));
                } else {
                    findings.push(format!(
                        "{} belongs to no snapshot of box {} ({}); boxlitefs check --repair makes a snapshot of it, or removes it where nothing is lost",
                        dir.display(),
                        display_name(record),
                        amount(allocated_below(&dir))
                    ));
                }
            }
        }
        for dir in workspace::abandoned(&home.staging_dir()) {
            for archive in waiting_in(&dir) {
                findings.push(format!(
                    "the archive {} in {} waited for its box when boxlitefs was killed; mounting the home makes a box of it",
                    archive.name,
                    dir.display()
                ));
            }
            findings.push(format!(
                "{} was left by a boxlitefs that was killed ({}); mounting the home removes it",
                dir.display(),
                amount(allocated_below(&dir))
            ));
        }
        self.findings.extend(findings);
        self.notes.extend(notes);
        Ok(())
    }
}

/// Returns the bytes on disk of all files below a directory. A file with several names counts once
/// for each.
fn allocated_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let of_entry = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated_below(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    entries.filter_map(|entry| entry.ok()).map(of_entry).sum()
}
