//! Merging: a layer that nothing but the layer above it needs becomes one with that, and the space of
//! what was written twice comes back. Likewise a live disk takes in so many of the layers below it that
//! a virtual machine can start from it again.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::combine::{Combined, Pace};
use super::crash::crash_point;
use super::freeze::{BACKING_LEFT, MOST_BACKING};
use super::layers::{Directories, ImageFile, Layers, Role, Stamp, resolve, stamp};
use super::prepare::Prepared;
use super::workspace::Scratch;
use super::{Store, durable};
use crate::disk::{FileId, Format, Header, Layer, Stamped};
use crate::home::{BaseRecord, BoxRecord, Space, is_open, is_open_for_writing};
use crate::{Context, Error, Result};

/// Layers that can become one. Comparable: it is the same as long as none of them changed, nor who
/// reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Merge {
    /// Every name of the layer on top, which is replaced.
    names: Vec<PathBuf>,
    is_live: bool,
    /// The layers, top first: at least two.
    layers: Vec<Part>,
    /// The boxes that read through the top.
    boxes: BTreeSet<String>,
    /// Whether all below the top go: else others read them, and stay.
    frees: bool,
}

/// One of the layers of a [`Merge`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    path: PathBuf,
    id: FileId,
    stamp: Stamp,
    allocated: u64,
}

/// How a merge is done.
enum Way {
    /// The layers below the top hold nothing: the header of the top names the layer below them.
    Rebase(PathBuf),
    /// The top is a live disk that holds nothing: the layer below takes its place.
    Promote,
    /// All are written out as one.
    Copy(Combined),
}

/// What a merge did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Merged {
    /// Bytes of the disk that came back; negative for a live disk that got a copy of what others keep.
    pub freed: i64,
}

impl Merge {
    /// Bytes that its layers take on the disk.
    pub fn allocated(&self) -> u64 {
        self.layers.iter().map(|part| part.allocated).sum()
    }

    /// Its layers, each with the time it changed last.
    fn stamped(&self) -> Vec<Stamped> {
        let parts = self.layers.iter();
        let stamped = parts.map(|part| Stamped {
            path: part.path.clone(),
            dev: part.id.dev,
            time: part.stamp.1.max(part.stamp.2),
        });
        stamped.collect()
    }

    /// The path the layer on top is read by.
    pub fn top(&self) -> &Path {
        self.names.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// The file on top.
    pub fn top_id(&self) -> Option<FileId> {
        self.layers.first().map(|part| part.id)
    }

    /// How many layers become one.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether all layers below the top go.
    pub fn frees(&self) -> bool {
        self.frees
    }

    /// Whether the layer on top is in this chain.
    pub fn is_in(&self, chain: &[PathBuf]) -> bool {
        self.names.iter().any(|name| chain.contains(name))
    }

    /// The boxes that read through it, by their ids.
    pub fn boxes(&self) -> &BTreeSet<String> {
        &self.boxes
    }

    /// The same without layers at its end that are far larger than all above them: to write those again
    /// would cost far more than it gives. None if fewer than two are left.
    pub fn worthwhile(mut self) -> Option<Merge> {
        /// What lies over a layer has to be this part of it.
        const PART: u64 = 8;
        while self.layers.len() > 1 {
            let last = self.layers.last().map_or(0, |part| part.allocated);
            let above = self.allocated() - last;
            if above.saturating_mul(PART) >= last {
                return Some(self);
            }
            self.layers.pop();
        }
        None
    }

    fn starts_with(&self, other: &Merge) -> bool {
        self.layers.get(..other.layers.len()) == Some(&other.layers)
            && (&self.names, &self.boxes, self.frees) == (&other.names, &other.boxes, other.frees)
    }
}

/// What rows say of the layers.
pub(super) struct Rows<'r> {
    boxes: HashSet<&'r str>,
    bases: HashMap<PathBuf, &'r BaseRecord>,
    named: &'r BTreeSet<PathBuf>,
}

impl<'r> Rows<'r> {
    /// Of all boxes and bases, and every path that a snapshot's row names.
    pub fn new(
        boxes: &'r [BoxRecord],
        bases: &'r [BaseRecord],
        named: &'r BTreeSet<PathBuf>,
    ) -> Rows<'r> {
        let mut directories = Directories::default();
        let mut at = |row: &BaseRecord| directories.resolve(PathBuf::from(&row.base_path));
        Rows {
            boxes: boxes.iter().map(|record| record.id.as_str()).collect(),
            bases: bases.iter().map(|row| (at(row), row)).collect(),
            named,
        }
    }

    /// Whether a file is a base with a row and no other name, that no header and no snapshot's row names.
    pub fn is_unneeded(&self, file: &ImageFile, layers: &Layers) -> bool {
        let row = self.bases.get(&file.path);
        matches!(file.role, Role::Base { .. })
            && file.names == 1
            && row.is_some_and(|row| row.kind != "rootfs")
            && layers.readers_of(&file.path).next().is_none()
            && !self.named.contains(&file.path)
    }

    /// Whether a name of a file is one that rows know.
    fn know(&self, file: &ImageFile) -> bool {
        match &file.role {
            Role::Live { box_id } => self.boxes.contains(box_id.as_str()),
            Role::Snapshot { .. } => self.named.contains(&file.path),
            Role::Base { .. } => self.bases.contains_key(&file.path),
        }
    }
}

/// The layers that one layer alone needs, each run of them with that.
pub(super) fn merges(layers: &Layers, rows: &Rows<'_>) -> Vec<Merge> {
    let removable: HashSet<&Path> = layers
        .files()
        .iter()
        .filter(|file| is_removable(file, layers, rows))
        .map(|file| file.path.as_path())
        .collect();
    let mut tops = BTreeSet::new();
    for path in &removable {
        for reader in layers.readers_of(path) {
            let mut names = layers.names_of(reader.id);
            if names.all(|name| !removable.contains(name.path.as_path())) {
                tops.insert(reader.id);
            }
        }
    }
    let merge = |id: FileId| {
        let top = layers.names_of(id).next()?;
        let below = layers.chain(&top.path).into_iter().skip(1);
        let run = below.take_while(|path| removable.contains(path));
        merge_of(layers, rows, top, run.collect(), true)
    };
    tops.into_iter().filter_map(merge).collect()
}

/// A live disk whose chain is too long, with so many of the layers below it that it is not.
pub(super) fn shortening(layers: &Layers, rows: &Rows<'_>, live: &Path) -> Option<Merge> {
    let top = layers.at(live)?;
    let chain = layers.chain(live);
    if chain.len() - 1 <= MOST_BACKING {
        return None;
    }
    let below = chain.get(1..chain.len() - BACKING_LEFT)?.to_vec();
    merge_of(layers, rows, top, below, false)
}

/// A base with a row and no other name, that no snapshot's row names and one file alone reads.
fn is_removable(file: &ImageFile, layers: &Layers, rows: &Rows<'_>) -> bool {
    let mut readers = layers.readers_of(&file.path).map(|reader| reader.id);
    let Some(reader) = readers.next() else {
        return false;
    };
    matches!(file.role, Role::Base { .. })
        && file.names == 1
        && file.damaged.is_none()
        && readers.all(|other| other == reader)
        && !rows.named.contains(&file.path)
        && rows
            .bases
            .get(&file.path)
            .is_some_and(|row| row.kind != "rootfs")
}

/// The merge of a layer with some below it. None if it has a name nobody knows (a backup made of hard
/// links would be left without what lies below it), or nobody reads it.
fn merge_of(
    layers: &Layers,
    rows: &Rows<'_>,
    top: &ImageFile,
    below: Vec<&Path>,
    frees: bool,
) -> Option<Merge> {
    let names: Vec<&ImageFile> = layers.names_of(top.id).collect();
    let is_live = |name: &&ImageFile| matches!(name.role, Role::Live { .. });
    let lives = names.iter().filter(|name| is_live(name)).count();
    let is_ours = names.len() as u64 == top.names
        && (lives == 0 || names.len() == 1)
        && names
            .iter()
            .all(|name| name.damaged.is_none() && rows.know(name));
    let boxes: BTreeSet<String> = names
        .iter()
        .flat_map(|name| layers.boxes_above(&name.path))
        .collect();
    let all_known = boxes.iter().all(|id| rows.boxes.contains(id.as_str()));
    if !is_ours || boxes.is_empty() || !all_known || below.is_empty() {
        return None;
    }
    let mut parts = vec![Part::of(top)];
    for path in below {
        parts.push(Part::of(layers.at(path)?));
    }
    // Snapshots' names first: until its own name is replaced, a base is read by the others.
    let mut names: Vec<PathBuf> = names.iter().map(|name| name.path.clone()).collect();
    names.sort_by_key(|path| layers.readers_of(path).next().is_some());
    Some(Merge {
        names,
        is_live: lives > 0,
        layers: parts,
        boxes,
        frees,
    })
}

impl Part {
    fn of(file: &ImageFile) -> Part {
        Part {
            path: file.path.clone(),
            id: file.id,
            stamp: file.stamp,
            allocated: file.allocated,
        }
    }
}

impl Store {
    /// Makes layers one. Whatever can't be merged now, for a box runs or somebody reads, is an error that
    /// says why; nothing is changed then.
    ///
    /// Order: the box's chains are made ready; what the layers have together is written into the
    /// workspace, unlocked; ready again, and seen to be as before; each name of the top is moved over
    /// by a name of the new file; the bases that nothing reads any more go, as any other. A crash leaves
    /// each name with the old file or the new one, which say the same, and bases of ours that nothing
    /// reads, which recovery frees.
    ///
    /// # Errors
    /// EBUSY, ENOSPC, EIO, what `pace` says; ENODATA if it would give no space back.
    pub(super) fn merge(&self, wanted: &Merge, pace: &mut Pace<'_>) -> Result<Merged> {
        let wanted = {
            let prepared = self.ready_all(&wanted.boxes)?;
            prepared
                .merge_again(wanted)?
                .ok_or_else(|| changed(wanted))?
        };
        // Whatever changes them from here on shows when they are looked at again.
        self.wait_for_clock(&wanted.stamped());
        let way = self.way(&wanted, pace)?;
        crash_point("merge.prepared");
        self.let_go_of_unread_exports();
        self.let_go_of_unused_insides();
        let mut prepared = self.ready_all(&wanted.boxes)?;
        let now = prepared.merge_again(&wanted)?;
        if !now.is_some_and(|now| now.starts_with(&wanted)) {
            return Err(changed(&wanted));
        }
        prepared.refuse_open(&wanted)?;
        // What goes is given back after the lock: to free large files takes its time.
        let parts = wanted.layers.iter();
        let kept: Vec<File> = parts
            .filter_map(|part| File::open(&part.path).ok())
            .collect();
        let old = match way {
            Way::Rebase(_) => None,
            Way::Promote | Way::Copy(_) => prepared.keep_live(&wanted)?,
        };
        let merged = match way {
            Way::Rebase(below) => prepared.rebase_over(&wanted, &below),
            Way::Promote => prepared.promote(&wanted),
            Way::Copy(combined) => prepared.replace(&wanted, combined),
        };
        if let Err(error) = merged {
            // A guest must not go on writing to a file that a loss of power takes away.
            if let Some(old) = &old {
                let _ = prepared.bring_back(&wanted, old);
            }
            return Err(error);
        }
        if let Some(old) = &old {
            prepared.refuse_written(&wanted, old)?;
        }
        let gone = prepared.drop_merged(&wanted)?;
        drop(prepared);
        drop((kept, old));
        let before = wanted.layers.first().map_or(0, |part| part.allocated) + gone;
        let after = allocated(wanted.top());
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        Ok(Merged {
            freed: signed(before) - signed(after),
        })
    }

    /// The lock, and all of these boxes ready for a change.
    fn ready_all(&self, boxes: &BTreeSet<String>) -> Result<Prepared<'_>> {
        let mut boxes = boxes.iter();
        let Some(first) = boxes.next() else {
            return Err(Error::damaged("no box reads these layers"));
        };
        let mut prepared = self.prepare(first)?;
        boxes.try_for_each(|id| prepared.turn_to(id))?;
        Ok(prepared)
    }

    /// How to merge; what has to be written is.
    fn way(&self, wanted: &Merge, pace: &mut Pace<'_>) -> Result<Way> {
        if wanted.frees
            && let Some(below) = skipped(wanted)?
        {
            return Ok(Way::Rebase(below));
        }
        if is_promotable(wanted)? {
            return Ok(Way::Promote);
        }
        let plan = self.combining(wanted.top(), wanted.layers.len())?;
        let lengths: u64 = wanted.layers.iter().map(|part| part.stamp.0).sum();
        if wanted.frees && plan.len() > lengths {
            return Err(no_gain(wanted));
        }
        self.refuse_full(plan.len())?;
        let combined = self.combine(plan, pace)?;
        if wanted.frees && allocated(&combined.file) > wanted.allocated() {
            return Err(no_gain(wanted));
        }
        Ok(Way::Copy(combined))
    }

    /// ENOSPC unless there is room for that many bytes and some more.
    fn refuse_full(&self, bytes: u64) -> Result<()> {
        let space = Space::of(&self.home)?;
        let left = space.available_bytes().saturating_sub(bytes);
        // What guests and others write meanwhile.
        if left >= (space.bytes() / 100).min(1 << 30) {
            return Ok(());
        }
        Err(Error::new(
            libc::ENOSPC,
            format!(
                "layers are merged by writing {bytes} bytes first, and there is no room for them"
            ),
        ))
    }
}

fn no_gain(wanted: &Merge) -> Error {
    Error::new(
        libc::ENODATA,
        format!(
            "{} and what lies below it take less room as they are",
            wanted.top().display()
        ),
    )
}

/// Bytes that a file takes on the disk.
fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

fn changed(wanted: &Merge) -> Error {
    Error::busy(format!(
        "{} or what it lies on was changed just now; try again",
        wanted.top().display()
    ))
}

/// The layer that the top reads the same from without those between, which hold nothing.
fn skipped(wanted: &Merge) -> Result<Option<PathBuf>> {
    let Some((top, below)) = wanted.layers.split_first() else {
        return Ok(None);
    };
    let Some(last) = below.last() else {
        return Ok(None);
    };
    let header = qcow2_header(&last.path)?;
    let Some(base) = header.backing_path(&last.path) else {
        return Ok(None);
    };
    let base = resolve(&base)?;
    // A header that says qcow2 can't name a raw image.
    let Some(base_header) = Header::open(&base)? else {
        return Ok(None);
    };
    let seen = qcow2_header(&top.path)?
        .virtual_size
        .min(base_header.virtual_size);
    for part in below {
        let layer = Layer::open(&part.path, Format::Qcow2)?;
        // Beyond its end a layer reads as zeros, whatever lies below.
        if layer.virtual_size() < seen || layer.holds_data()? {
            return Ok(None);
        }
    }
    Ok(Some(base))
}

/// Whether the layer below can be the live disk itself.
fn is_promotable(wanted: &Merge) -> Result<bool> {
    let [top, below, ..] = wanted.layers.as_slice() else {
        return Ok(false);
    };
    if !wanted.is_live || !wanted.frees {
        return Ok(false);
    }
    let same_size =
        qcow2_header(&top.path)?.virtual_size == qcow2_header(&below.path)?.virtual_size;
    Ok(same_size && !Layer::open(&top.path, Format::Qcow2)?.holds_data()?)
}

fn qcow2_header(path: &Path) -> Result<Header> {
    Header::open(path)?
        .ok_or_else(|| Error::damaged(format!("{} is not a qcow2 image", path.display())))
}

impl Prepared<'_> {
    /// The same merge, as things are now.
    fn merge_again(&self, wanted: &Merge) -> Result<Option<Merge>> {
        let layers = self.layers()?;
        let Some(named) = self.store.named_by_rows(&self.change, &layers)? else {
            return Err(Error::busy(
                "nothing is merged while it can't be told who reads what; boxlitefs check says why",
            ));
        };
        let (boxes, bases) = (self.change.boxes()?, self.change.bases()?);
        let rows = Rows::new(&boxes, &bases, &named);
        let found = match wanted.frees {
            true => merges(&layers, &rows)
                .into_iter()
                .find(|merge| merge.top_id() == wanted.top_id()),
            false => shortening(&layers, &rows, wanted.top()),
        };
        let Some(mut found) = found else {
            return Ok(None);
        };
        for name in &found.names {
            if let Some(row) = rows.bases.get(name)
                && self.change.has_digest(&row.id)?
            {
                return Ok(None);
            }
        }
        found.layers.truncate(wanted.layers.len());
        Ok((found.layers.len() > 1).then_some(found))
    }

    /// EBUSY while anybody has one of the layers open.
    fn refuse_open(&self, wanted: &Merge) -> Result<()> {
        match wanted.layers.iter().find(|part| is_open(&part.path)) {
            None => Ok(()),
            Some(part) => Err(Error::busy(format!(
                "{} is being read",
                part.path.display()
            ))),
        }
    }

    /// Another name for a live disk that is about to be replaced.
    fn keep_live(&self, wanted: &Merge) -> Result<Option<Scratch>> {
        if !wanted.is_live {
            return Ok(None);
        }
        let kept = self.store.scratch("old")?;
        durable::link(wanted.top(), &kept)?;
        Ok(Some(kept))
    }

    /// EBUSY, and the live disk is the one it was, if that was written to while it was replaced. A guest
    /// is not started while we hold the lock; but somebody may just then have used a program like
    /// qemu-io on the disk, which knows no locks of BoxLite's.
    fn refuse_written(&self, wanted: &Merge, old: &Path) -> Result<()> {
        let Some(top) = wanted.layers.first() else {
            return Ok(());
        };
        let message = || format!("cannot look at {}", old.display());
        let meta = std::fs::symlink_metadata(old).context(message)?;
        let (length, modified, _) = stamp(&meta);
        let is_same = (length, modified) == (top.stamp.0, top.stamp.1);
        if is_same && !is_open_for_writing(old) {
            return Ok(());
        }
        self.bring_back(wanted, old)?;
        Err(Error::busy(format!(
            "{} was written to just now",
            wanted.top().display()
        )))
    }

    /// Makes the live disk the one it was.
    fn bring_back(&self, wanted: &Merge, old: &Path) -> Result<()> {
        if let Some(below) = wanted.layers.get(1)
            && FileId::at(wanted.top())? == below.id
        {
            // The base that was moved over it gets its name back first.
            durable::link(wanted.top(), &below.path)?;
        }
        durable::rename(old, wanted.top())
    }

    /// Has the top name the layer below those that hold nothing. A crash leaves the old or the new name.
    fn rebase_over(&mut self, wanted: &Merge, below: &Path) -> Result<()> {
        let layers = self.layers()?;
        if let Some(top) = layers.at(wanted.top()) {
            self.rebase(&layers, top, below)?;
        }
        crash_point("merge.rebased");
        Ok(())
    }

    /// Moves the layer below over a live disk that holds nothing. A crash before leaves a base that is
    /// ours; after it a row of ours without a file.
    fn promote(&mut self, wanted: &Merge) -> Result<()> {
        let [top, below, ..] = wanted.layers.as_slice() else {
            return Ok(());
        };
        self.claim(&below.path)?;
        crash_point("merge.claimed");
        // A live disk is written to, and no spare name may stand for it.
        self.store.drop_spare(&below.path)?;
        // The state is as old as it was.
        durable::copy_times(&top.path, &below.path)?;
        durable::sync_file(&below.path)?;
        durable::rename(&below.path, &top.path)?;
        durable::sync_dir(&self.store.home.bases_dir())?;
        crash_point("merge.promoted");
        Ok(())
    }

    /// Moves a name of the new file over each name of the top. All names are made first, so that the
    /// moves are one after the other.
    fn replace(&mut self, wanted: &Merge, combined: Combined) -> Result<()> {
        if !combined.lies_on_chain_of(wanted.top())? {
            return Err(changed(wanted));
        }
        let length = std::fs::metadata(&combined.file).map_or(0, |meta| meta.len());
        let mut moves = Vec::new();
        for name in &wanted.names {
            let link = self.store.scratch("name")?;
            durable::link(&combined.file, &link)?;
            moves.push((link, name));
        }
        // Its own name was one too many.
        drop(combined);
        crash_point("merge.written");
        for (new, name) in moves {
            self.store.replace(&new, name)?;
            crash_point("merge.renamed");
            // Before what the old file read from is freed.
            self.store.move_spare(name)?;
        }
        self.change.transaction(|rows| {
            let mut names = wanted.names.iter();
            names.try_for_each(|name| rows.resize_layer(&name.display().to_string(), length))
        })
    }

    /// Makes a base ours, if it is not.
    fn claim(&mut self, path: &Path) -> Result<()> {
        match self.base_at(path)?.filter(|row| !row.is_ours()) {
            None => Ok(()),
            Some(row) => self.change.transaction(|rows| rows.claim_base(&row.id)),
        }
    }

    /// Removes the bases below the top that nothing reads any more, and what refers to them. Returns how
    /// many bytes they had.
    fn drop_merged(&mut self, wanted: &Merge) -> Result<u64> {
        if !wanted.frees {
            self.free_surplus()?;
            return Ok(0);
        }
        let mut layers = self.layers()?;
        let mut gone = 0;
        for part in wanted.layers.iter().skip(1) {
            let path = &part.path;
            let is_needed = layers.readers_of(path).next().is_some()
                || layers.at(path).is_some_and(|file| file.names != 1);
            let Some(row) = self.base_at(path)?.filter(|_| !is_needed) else {
                break;
            };
            self.store.drop_base(&mut self.change, &row, path)?;
            layers = layers.without(std::slice::from_ref(path));
            gone += part.allocated;
        }
        Ok(gone)
    }
}
