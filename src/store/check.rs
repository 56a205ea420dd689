//! `boxlitefs check`: every row has its files, every file its row, every chain resolves, every
//! qcow2 header is sane, leftovers are named. Looks only; changes nothing and takes no lock.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::layers::{Layers, Role, names_in, resolve};
use super::{Journal, Store, called, workspace};
use crate::disk::{Chain, FileId};
use crate::home::{BaseRecord, BoxRecord, Catalog, Home};
use crate::{Context, Result};

/// Checks a home and prints a line for each finding, then a summary. True when there is none.
///
/// # Errors
/// When the check could not be made: no home, a damaged database, or `out` can't be written.
pub fn run(home: &Path, out: &mut dyn Write) -> Result<bool> {
    let home = Home::open(home)?;
    let journal = Journal::open(&home, true);
    let store = Store::to_look(home, journal);
    let mut check = Check {
        catalog: store.home.catalog()?,
        layers: store.scan_layers()?,
        bases: store.home.bases()?,
        store: &store,
        findings: Vec::new(),
    };
    check.schema();
    check.headers();
    check.boxes();
    check.bases();
    check.leftovers()?;
    let findings = check.findings;
    let boxes = store.home.catalog()?.boxes().len();
    let print = |out: &mut dyn Write| -> std::io::Result<()> {
        for finding in &findings {
            writeln!(out, "{finding}")?;
        }
        let state = match findings.len() {
            0 => "clean".to_owned(),
            1 => "1 finding".to_owned(),
            many => format!("{many} findings"),
        };
        writeln!(
            out,
            "{}: {boxes} boxes, {state}",
            store.home.root().display()
        )
    };
    print(out).context(|| "cannot print what was found")?;
    Ok(findings.is_empty())
}

struct Check<'s> {
    store: &'s Store,
    catalog: std::sync::Arc<Catalog>,
    layers: Layers,
    bases: Vec<BaseRecord>,
    findings: Vec<String>,
}

impl Check<'_> {
    fn found(&mut self, what: impl Display) {
        self.findings.push(what.to_string());
    }

    fn schema(&mut self) {
        if let Some(why) = self.catalog.schema().read_only.clone() {
            self.found(why);
        }
    }

    /// Every image file's header.
    fn headers(&mut self) {
        let damaged: Vec<String> = self
            .layers
            .files()
            .iter()
            .filter_map(|file| file.damaged.clone())
            .collect();
        self.findings.extend(damaged);
    }

    fn boxes(&mut self) {
        let catalog = self.catalog.clone();
        for record in catalog.boxes() {
            self.configuration(record);
            let live = self.store.home.live_disk(&record.id);
            if live.exists() {
                self.chain(&format!("box {}", called(record)), &live);
                self.one_name(record, &live);
            } else if !catalog.snapshots_of(&record.id).is_empty() {
                self.found(format!(
                    "box {} has snapshots but no disk at {}",
                    called(record),
                    live.display()
                ));
            }
            for snapshot in catalog.snapshots_of(&record.id) {
                let what = format!("snapshot {} of box {}", snapshot.name, called(record));
                let path = self.store.snapshot_layer(snapshot);
                if path.is_file() {
                    self.chain(&what, &path);
                } else {
                    self.found(format!("{what} has no file {}", path.display()));
                }
            }
        }
    }

    fn configuration(&mut self, record: &BoxRecord) {
        let name = called(record);
        match record.config() {
            Ok(config) => {
                let box_home = config["box_home"].as_str().unwrap_or_default().to_owned();
                let here = self.store.home.box_dir(&record.id);
                if !here.is_dir() {
                    self.found(format!("box {name} has no directory {}", here.display()));
                } else if FileId::at(Path::new(&box_home)).ok() != FileId::at(&here).ok() {
                    self.found(format!(
                        "box {name} says it lives in {box_home}, not in {}: this home is a copy, changes are refused",
                        here.display()
                    ));
                }
            }
            Err(error) => self.found(error),
        }
        if let Err(error) = record.state() {
            self.found(error);
        }
    }

    /// Every layer of a chain opens, and none lies outside the home.
    fn chain(&mut self, what: &str, top: &Path) {
        let home = &self.store.home;
        match Chain::open(top, home.root(), home.owner().uid) {
            Ok(chain) => {
                let outside: Vec<PathBuf> = chain
                    .layers()
                    .iter()
                    .filter_map(|layer| resolve(layer.path()).ok())
                    .filter(|path| !path.starts_with(home.root()))
                    .collect();
                for path in outside {
                    self.found(format!(
                        "{what} reads from {}, outside this home; changes are refused",
                        path.display()
                    ));
                }
            }
            Err(error) => self.found(format!("{what}: {error}")),
        }
    }

    /// A live disk with a name in `bases/` is a change that did not come to its end.
    fn one_name(&mut self, record: &BoxRecord, live: &Path) {
        let Ok(id) = FileId::at(live) else { return };
        let names: Vec<String> = self
            .layers
            .names_of(id)
            .filter(|name| name.path != live)
            .map(|name| name.path.display().to_string())
            .collect();
        for name in names {
            self.found(format!(
                "{name} is also the live disk of box {}: a change was cut off; mounting the home undoes it",
                called(record)
            ));
        }
    }

    /// Rows of bases and their files.
    fn bases(&mut self) {
        let rows = std::mem::take(&mut self.bases);
        let mut with_rows = BTreeSet::new();
        for row in &rows {
            let path = PathBuf::from(&row.base_path);
            if !path.exists() {
                let why = match self.layers.readers_of(&path).next() {
                    Some(reader) => format!("and {} reads from it", reader.path.display()),
                    None => "nothing reads from it".to_owned(),
                };
                self.found(format!(
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
            .iter()
            .filter(|file| matches!(file.role, Role::Base { .. }) && !with_rows.contains(&file.path))
            .map(|file| {
                let read = match self.layers.readers_of(&file.path).next() {
                    Some(_) => "it is read from, so it stays",
                    None => "nothing reads from it; it is kept, for it can be what a crash left of a box's disk",
                };
                format!("{} has no row in the database; {read}", file.path.display())
            })
            .collect();
        self.findings.extend(without);
        let unread: Vec<String> = rows
            .iter()
            .filter(|row| row.is_ours())
            .filter_map(|row| self.layers.at(&resolve(Path::new(&row.base_path)).ok()?))
            .filter(|file| {
                file.names == 1 && self.layers.readers_of(&file.path).next().is_none()
            })
            .map(|file| {
                format!(
                    "{} is a leftover, nothing reads from it ({} bytes); mounting the home frees it",
                    file.path.display(),
                    allocated(&file.path)
                )
            })
            .collect();
        self.findings.extend(unread);
    }

    /// Files and directories that no row speaks of.
    fn leftovers(&mut self) -> Result<()> {
        let home = &self.store.home;
        let mut found = Vec::new();
        for id in names_in(&home.boxes_dir())? {
            let dir = home.box_dir(&id);
            let Some(record) = self.catalog.box_by_id(&id) else {
                found.push(format!(
                    "{} belongs to no box; BoxLite removes it at its next start",
                    dir.display()
                ));
                continue;
            };
            if home.pending_marker(&id).exists() {
                found.push(format!(
                    "box {} was left by BoxLite in the middle of a snapshot",
                    called(record)
                ));
            }
            for name in names_in(&home.snapshots_dir(&id))? {
                if self.catalog.snapshot_by_name(&id, &name).is_none() {
                    found.push(format!(
                        "{} belongs to no snapshot of box {}",
                        home.snapshots_dir(&id).join(name).display(),
                        called(record)
                    ));
                }
            }
        }
        for dir in workspace::abandoned(home) {
            found.push(format!(
                "{} was left by a boxlitefs that was killed; mounting the home removes it",
                dir.display()
            ));
        }
        self.findings.extend(found);
        Ok(())
    }
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}
