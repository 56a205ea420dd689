//! Adopting layers that BoxLite froze inside a box: they become files of `bases/`, the one place
//! whose paths headers may name, so that removing or renaming a snapshot touches no other file.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom as Sought, seek};
use rustix::io::Errno;

use super::crash::crash_point;
use super::durable;
use super::layers::{ImageFile, Layers, Role};
use super::prepare::Prepared;
use crate::disk::{self, FileId};
use crate::home::{Activity, base_id};
use crate::{Context, Error, Result};

/// More rounds than any chain has layers: a chain that still names a box's layer after as many is
/// a cycle.
const MOST_ROUNDS: usize = 256;

impl Prepared<'_> {
    /// Adopts every layer inside a box that a chain of this box names.
    pub(super) fn adopt_own_chains(&mut self) -> Result<()> {
        let boxes = self.store.home.boxes_dir();
        for _ in 0..MOST_ROUNDS {
            let inside: BTreeSet<PathBuf> = self
                .chains()?
                .into_iter()
                .flat_map(|chain| chain.into_iter().skip(1))
                .filter(|path| path.starts_with(&boxes))
                .collect();
            if inside.is_empty() {
                return Ok(());
            }
            for path in inside {
                self.adopt(&path)?;
            }
        }
        Err(Error::damaged(format!(
            "the chain of box {} does not end",
            self.record.id
        )))
    }

    /// Likewise of a box that runs, but for what lies above them all: the header of its live disk is left as it
    /// is, and goes on naming the layer by the name inside the box.
    pub(super) fn adopt_frozen_chains(&mut self) -> Result<()> {
        let boxes = self.store.home.boxes_dir();
        let chains = self.chains()?.into_iter().flatten();
        let live = self.live();
        let inside: BTreeSet<PathBuf> = chains
            .filter(|path| path.starts_with(&boxes) && Some(path) != live.as_ref())
            .collect();
        for path in inside {
            if self.layers()?.readers_of(&path).next().is_some() {
                self.adopt_with(&path, true)?;
            }
        }
        Ok(())
    }

    /// Makes `path`, a layer inside a box, a base, and has every header that names it name the
    /// base. Order: the row with the references of all readers, then the name in `bases/`, then the
    /// headers. A crash leaves a row without a file, which the next mount drops, or a further name
    /// with a row, which is found and used the next time; a rebase can be repeated. The row comes
    /// first because a name without one can't be told from what a crash in BoxLite's clone leaves,
    /// and would stay for ever.
    pub(super) fn adopt(&mut self, path: &Path) -> Result<PathBuf> {
        let is_running = self.store.home.activity(&self.record) != Activity::Idle;
        self.adopt_with(path, is_running)
    }

    /// `is_running`: the header of this box's live disk stays as it is.
    fn adopt_with(&mut self, path: &Path, is_running: bool) -> Result<PathBuf> {
        let layers = self.layers()?;
        self.refuse_active_readers(&layers, path)?;
        let id = FileId::at(path)?;
        if let Some(live) = layers
            .names_of(id)
            .find(|name| matches!(name.role, Role::Live { .. }))
        {
            return Err(Error::new(
                libc::EPERM,
                format!(
                    "{} is a box's live disk, which its guest writes to; box {} must not read from it. Export what still reads right and import it again",
                    live.path.display(),
                    self.record.id
                ),
            ));
        }
        let known = layers
            .names_of(id)
            .find(|name| matches!(name.role, Role::Base { .. }));
        let base = match known {
            Some(name) => name.path.clone(),
            None => self.store.home.base_disk(&base_id()?),
        };
        self.record_base(&base, path, &layers.boxes_above(path))?;
        crash_point("adopt.recorded");
        self.change.begin_exclusive()?;
        match known {
            None => {
                durable::link(path, &base)?;
                crash_point("adopt.linked");
            }
            // Whoever was killed after he had made the name may not have come to flush it.
            Some(_) => durable::sync_dir(&self.store.home.bases_dir())?,
        }
        if FileId::at(&base)? != id {
            return Err(Error::busy(format!(
                "{} was replaced at this moment; try again",
                path.display()
            )));
        }
        self.store.keep_spare(&base);
        let mut done = BTreeSet::new();
        for reader in layers.readers_of(path) {
            let is_own = matches!(&reader.role, Role::Live { box_id } if *box_id == self.record.id);
            if is_running && is_own {
                continue;
            }
            if done.insert(reader.id) {
                self.rebase(&layers, reader, &base)?;
                crash_point("adopt.rebased");
            }
        }
        Ok(base)
    }

    /// A header of a running box's disk is not touched: its virtual machine has it open.
    fn refuse_active_readers(&self, layers: &Layers, path: &Path) -> Result<()> {
        for reader in layers.readers_of(path) {
            if let Role::Live { box_id } = &reader.role
                && *box_id != self.record.id
                && let Ok(record) = self.change.box_by_id(box_id)
            {
                self.change.watch(&record)?;
                self.store.refuse_active(&record)?;
            }
        }
        Ok(())
    }

    /// The row of a base, if it has none yet, and references of these boxes.
    fn record_base(&mut self, base: &Path, file: &Path, boxes: &BTreeSet<String>) -> Result<()> {
        let row = self.base_at(base)?;
        let new = match &row {
            Some(_) => None,
            None => Some(self.store.new_base(base, file)?),
        };
        let id = match (&row, &new) {
            (Some(row), _) => row.id.clone(),
            (None, Some(new)) => new.id.clone(),
            (None, None) => return Ok(()),
        };
        let with_rows: Vec<String> = self
            .change
            .boxes()?
            .into_iter()
            .map(|record| record.id)
            .filter(|id| boxes.contains(id))
            .collect();
        self.change.transaction(|rows| {
            if let Some(new) = &new {
                rows.insert_base(new)?;
            }
            with_rows
                .iter()
                .try_for_each(|box_id| rows.insert_ref(&id, box_id))
        })
    }

    /// Has `reader` name `base`. A file with more names than the home knows (a backup made of hard
    /// links, say) is copied first, so that the backup keeps the header it has.
    pub(super) fn rebase(&self, layers: &Layers, reader: &ImageFile, base: &Path) -> Result<()> {
        let names: Vec<&ImageFile> = layers.names_of(reader.id).collect();
        if reader.names <= names.len() as u64 {
            return disk::rebase_this(&reader.path, reader.id, base);
        }
        let copy = self.store.scratch("copy")?;
        copy_file(&reader.path, &copy)?;
        self.store.home.give_to_owner(&copy)?;
        disk::rebase(&copy, base)?;
        durable::copy_times(&reader.path, &copy)?;
        durable::sync_file(&copy)?;
        for name in names {
            let link = self.store.scratch("name")?;
            durable::link(&copy, &link)?;
            self.store.replace(&link, &name.path)?;
            if matches!(name.role, Role::Base { .. }) {
                self.store.move_spare(&name.path)?;
            }
        }
        durable::unlink(&copy)
    }
}

/// Copies a file, holes and all, sharing its blocks where the file system can.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let message = || format!("cannot copy {}", from.display());
    let source = File::open(from).context(message)?;
    let target = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(to)
        .context(message)?;
    copy_contents(&source, &target, from, &mut || Ok(()))
}

/// Bytes copied between two looks at whether to go on.
const PIECE: u64 = 16 << 20;

/// Makes `target`, which is empty, a copy of `source`: sharing its blocks where the file system can, else
/// with the same holes. `name` is what the source is called. `go_on` is asked again and again; what it says
/// ends the copy.
pub(super) fn copy_contents(
    source: &File,
    target: &File,
    name: &Path,
    go_on: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let message = || format!("cannot copy {}", name.display());
    if disk::share_contents(source, target) {
        return go_on();
    }
    let length = source.metadata().context(message)?.len();
    target.set_len(length).context(message)?;
    let (mut from, mut to) = (source, target);
    let mut offset = 0;
    while let Some((start, end)) = next_data(source, offset).context(message)? {
        let end = end.min(start + PIECE);
        go_on()?;
        from.seek(SeekFrom::Start(start)).context(message)?;
        to.seek(SeekFrom::Start(start)).context(message)?;
        // std uses copy_file_range here, which shares blocks on btrfs and xfs.
        std::io::copy(&mut from.take(end - start), &mut to).context(message)?;
        offset = end;
    }
    Ok(())
}

/// Whether it could: tried, and taken back.
pub(super) fn can_share(source: &File, target: &File) -> bool {
    disk::share_contents(source, target) && target.set_len(0).is_ok()
}

/// Start and end of the next run of data at or after `offset`; None when only a hole is left.
fn next_data(file: &File, offset: u64) -> std::io::Result<Option<(u64, u64)>> {
    match seek(file, Sought::Data(offset)) {
        Ok(start) => Ok(Some((start, seek(file, Sought::Hole(start))?))),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
