//! Receives an archive that a program writes into the mount, possibly out of order.

use std::collections::BTreeMap;
use std::fs;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::archive::{Allowance, Incoming, MOST_HOLES, MakeRoom, Manifest, Progress};
use crate::exports::{Contents, Source};
use crate::files::waiting_archive::WaitingArchive;
use crate::files::workspace::discard;
use crate::home::{check_options, described_options, normalize_imported, reject_host_access};
use crate::progress::UnderWay;
use crate::store::Store;
use crate::store::kept::expire::{drop_oldest, with_room};
use crate::store::layers::flatten::{FlattenPlan, plan_received};
use crate::store::layers::reference_state::ReferenceState;
use crate::{Context, Error, Result};

/// Bytes that are fed to the decoder at once, from the spool or for a hole.
const PIECE: usize = 1024 * 1024;

/// Limits on imported archives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportLimits {
    /// The most bytes that one archive may write into the home; None for no limit but free space.
    pub most: Option<u64>,
    /// Options that reach into the host are refused.
    pub untrusted: bool,
}

/// An archive that is being received. Bytes in order are decoded, hashed and unpacked at once;
/// early bytes wait in a spool. Dropping the stream removes its disk, unless the disk was moved
/// away.
pub struct ImportStream {
    incoming: Incoming,
    disk: PathBuf,
    /// Bytes from the start that the decoder has seen.
    fed: u64,
    spool: Option<PieceSpool>,
    /// The length that the writer gave the file, if any (ftruncate after a hole at the end).
    length: u64,
    target: ImportTarget,
    imports: ImportLimits,
    /// The archive is complete and fit for its target.
    complete: bool,
    /// The error that refused the archive: errno and message.
    refused: Option<(i32, String)>,
    /// The name in the note that says that the archive waits; a box made from it gets that name.
    note: Option<String>,
    /// The disk and the note stay when the stream is dropped.
    is_left: bool,
    /// The state that the disk is compared with, if any.
    reference: Option<Arc<ReferenceState>>,
    /// The clusters that were left out have been written after all: the disk stands alone.
    is_filled: AtomicBool,
    _under_way: UnderWay,
}

/// What an archive is received for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportTarget {
    /// A new box: the archive's configuration is checked and used.
    Box,
    /// A box that has a configuration: only the archive's disk is used.
    Disk,
}

/// Begins to receive an archive. Its disk is compared with `reference`, if given.
///
/// # Errors
/// EROFS; those of making a file in the workspace.
pub fn receive(
    store: &Arc<Store>,
    target: ImportTarget,
    reference: Option<ReferenceState>,
) -> Result<ImportStream> {
    store.refuse_read_only()?;
    let other = reference.as_ref().map(|state| state.chain.clone());
    let of = store.clone();
    let make_room: MakeRoom = Arc::new(move || drop_oldest(&of, None));
    let (disk, incoming) = with_room(store, None, &|| {
        let disk = store.workspace().fresh_path("disk")?;
        let (most, other) = (store.imports.most, other.clone());
        let incoming = Incoming::begin_with_room(&disk, most, other, make_room.clone())?;
        Ok((disk, incoming))
    })?;
    Ok(ImportStream {
        incoming,
        reference: reference.map(Arc::new),
        is_filled: AtomicBool::new(false),
        spool: None,
        disk,
        fed: 0,
        length: 0,
        target,
        imports: store.imports,
        complete: false,
        refused: None,
        note: None,
        is_left: false,
        _under_way: store.opened.foreground.begin(),
    })
}

impl ImportStream {
    /// Accepts `bytes` at `offset` of the archive. The write that completes the archive, or that
    /// makes it invalid, returns the verdict. An error is final: every later call returns it again.
    ///
    /// # Errors
    /// EBADMSG with the check that failed, EPERM naming an option that is not allowed here, EFBIG
    /// above the limit, ENOSPC, EIO; ESPIPE for bytes that were already decoded.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_refused()?;
        let result = self.accept(offset, bytes);
        self.keep_refusal(result)
    }

    fn accept(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if offset < self.fed {
            return Err(Error::new(
                libc::ESPIPE,
                "bytes of an archive can't be changed after they were written; copy the archive again from the start",
            ));
        }
        if offset > self.fed {
            return self.spool()?.put(offset, bytes);
        }
        self.feed(bytes)?;
        self.feed_spooled()
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        let progress = self.incoming.write(bytes)?;
        self.fed += bytes.len() as u64;
        if progress == Progress::Complete && !self.complete {
            self.incoming.finish()?;
            if self.target == ImportTarget::Box {
                // Checked here so that the same write returns every verdict.
                self.box_options()?;
            }
            self.complete = true;
        }
        Ok(())
    }

    /// Returns the checked options for the row of a new box. Works for an archive that was received
    /// for its disk alone, too: a file can be moved from where it makes a snapshot to where it
    /// makes a box.
    ///
    /// # Errors
    /// EBADMSG for options that BoxLite could not read, EPERM for options that are not allowed
    /// here.
    pub fn box_options(&self) -> Result<Value> {
        let manifest = self.manifest()?;
        let options = self.original_options()?;
        check_options(&options)?;
        // The meaning of ports depends on the version of the archive.
        let options = normalize_imported(options, Some(manifest.version));
        if self.imports.untrusted {
            reject_host_access(&options)?;
        }
        Ok(options)
    }

    /// Returns the same with what was edited in the box.json that came with the archive.
    ///
    /// # Errors
    /// Those of [`ImportStream::box_options`]; EINVAL for an edit of what can't be changed.
    pub fn described_options(&self, description: Option<&Value>) -> Result<Value> {
        let options = self.box_options()?;
        let Some(description) = description else {
            return Ok(options);
        };
        let version = Some(self.manifest()?.version);
        let original = self.original_options()?;
        let edit = described_options(&original, version, description, self.imports.untrusted)?;
        Ok(edit.options)
    }

    /// Returns the options that the archive came with, and its version.
    ///
    /// # Errors
    /// EBADMSG while it is incomplete.
    pub fn came_with(&self) -> Result<(Value, u64)> {
        Ok((self.original_options()?, self.manifest()?.version))
    }

    fn original_options(&self) -> Result<Value> {
        let manifest = self.manifest()?;
        Ok(match &manifest.options {
            Some(options) => options.clone(),
            None => plain_options(manifest),
        })
    }

    /// Describes the archive as one that waits and becomes a box of this name. Its disk stands alone.
    ///
    /// # Errors
    /// EBADMSG while it is incomplete; those of [`ImportStream::disk`].
    pub fn as_waiting(&self, name: &str) -> Result<WaitingArchive> {
        Ok(WaitingArchive {
            disk: self.disk()?.to_owned(),
            name: name.to_owned(),
            options: self.options_of_its_own()?,
            becomes: None,
        })
    }

    /// Returns the options for a box that is made from this archive alone. If its own options are
    /// refused, these are the options of a box that has only an image.
    ///
    /// # Errors
    /// EBADMSG while it is incomplete.
    fn options_of_its_own(&self) -> Result<Value> {
        let manifest = self.manifest()?;
        let plain = || normalize_imported(plain_options(manifest), None);
        Ok(self.box_options().unwrap_or_else(|_| plain()))
    }

    fn feed_spooled(&mut self) -> Result<()> {
        let mut buffer = Vec::new();
        while let Some(spool) = &mut self.spool {
            if !spool.take_at(self.fed, &mut buffer)? {
                break;
            }
            self.feed(&buffer)?;
        }
        Ok(())
    }

    fn spool(&mut self) -> Result<&mut PieceSpool> {
        if self.spool.is_none() {
            self.spool = Some(PieceSpool::create(
                &self.disk.with_extension("spool"),
                self.imports.most,
            )?);
        }
        self.spool
            .as_mut()
            .ok_or_else(|| Error::damaged("the spool is missing"))
    }

    /// Returns whether the archive is complete and was not refused.
    pub fn is_complete(&self) -> bool {
        self.complete && self.refused.is_none()
    }

    /// Returns whether nothing was written yet.
    pub fn is_untouched(&self) -> bool {
        self.fed == 0 && self.spool.is_none() && self.refused.is_none()
    }

    /// Makes the file at least `length` bytes long. Bytes that were not written are zeros.
    pub fn set_length(&mut self, length: u64) {
        self.length = self.length.max(length);
    }

    /// Fills remaining holes with zeros, since a descriptor was closed, and checks that the archive
    /// is complete. An incomplete archive is an error but not refused: every copy of a descriptor
    /// is closed, and the writer may go on with another.
    ///
    /// # Errors
    /// Those of [`ImportStream::write_at`]; EBADMSG while the archive is incomplete.
    pub fn finish(&mut self) -> Result<()> {
        self.check_refused()?;
        let result = self.fill_holes();
        self.keep_refusal(result)?;
        if !self.complete {
            self.incoming.finish()?;
        }
        Ok(())
    }

    fn fill_holes(&mut self) -> Result<()> {
        let mut filled = 0;
        while !self.complete {
            if filled > MOST_HOLES {
                return Err(Error::bad_archive(format!(
                    "the archive has a hole of more than {MOST_HOLES} bytes after byte {}",
                    self.fed - filled
                )));
            }
            let spooled = self.spool.as_ref().and_then(PieceSpool::next_offset);
            let gap = spooled.unwrap_or(self.length).saturating_sub(self.fed);
            if gap == 0 && spooled.is_none() {
                break;
            }
            let zeros = vec![0; PIECE.min(usize::try_from(gap).unwrap_or(PIECE))];
            self.feed(&zeros)?;
            filled += zeros.len() as u64;
            self.feed_spooled()?;
        }
        // Bytes after the end of the archive must be zeros: feed them, too.
        while let Some(next) = self.spool.as_ref().and_then(PieceSpool::next_offset) {
            self.fed = self.fed.max(next);
            self.feed_spooled()?;
        }
        Ok(())
    }

    /// Returns the archive's manifest.
    ///
    /// # Errors
    /// EBADMSG while it is incomplete.
    pub fn manifest(&self) -> Result<&Manifest> {
        self.incoming
            .arrived()
            .map(|arrived| &arrived.manifest)
            .ok_or_else(|| Error::bad_archive("the archive is incomplete"))
    }

    /// Returns the virtual size of the disk in bytes; 0 while the archive is incomplete.
    pub fn virtual_size(&self) -> u64 {
        self.incoming
            .arrived()
            .map_or(0, |arrived| arrived.header.virtual_size)
    }

    /// Returns the name in the note that says that the archive waits; None if there is no note.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Records that a note with this name was written.
    pub fn set_note(&mut self, name: &str) {
        self.note = Some(name.to_owned());
    }

    /// Keeps the disk and the note when the stream is dropped.
    pub fn leave(&mut self) {
        self.is_left = true;
    }

    /// Returns the path of the unpacked disk, which stands alone. To take the disk, move it away.
    ///
    /// # Errors
    /// ENOSPC and EIO when the clusters that were left out can't be written.
    pub fn disk(&self) -> Result<&Path> {
        let left_out = self.incoming.arrived().and_then(|it| it.left_out.as_ref());
        if let Some(left_out) = left_out
            && !self.is_filled.load(Ordering::Acquire)
        {
            let message = || format!("cannot write the archive's disk {}", self.disk.display());
            let file = OpenOptions::new().write(true).open(&self.disk);
            let file = file.context(message)?;
            left_out.fill(&file, &self.disk)?;
            file.sync_data().context(message)?;
            self.is_filled.store(true, Ordering::Release);
        }
        Ok(&self.disk)
    }

    /// Records in the note of an archive that waited that it becomes the snapshot with this id, in
    /// another image than its disk. Does nothing for an archive that did not wait.
    ///
    /// # Errors
    /// ENOSPC, EIO.
    pub fn note_becoming(&self, snapshot_id: &str) -> Result<()> {
        let Some(name) = self.note() else {
            return Ok(());
        };
        let mut archive = self.as_waiting(name)?;
        archive.becomes = Some(snapshot_id.to_owned());
        archive.write_note()
    }

    /// Returns a state of the home that has the archive's disk, and what was read of it, if it was
    /// read lately: then the archive is probably a copy of that one's. All of it is read once more,
    /// since a checksum from before proves nothing of what the file has now. None for an archive that
    /// waited, whose time must stay as it was shown.
    pub fn same_state(&self, store: &Store) -> Option<(Source, Contents)> {
        self.note.is_none().then_some(())?;
        let digest = self.incoming.arrived()?.manifest.disk_digest?;
        let (source, read) = store.exports.plain.state_with_digest(&digest)?;
        let (export, contents) = store.exports.plain.open(&source).ok()?;
        let is_same = contents == read && export.read_digest().is_ok_and(|now| now == digest);
        is_same.then_some((source, read))
    }

    /// Returns the state that the disk is compared with, if any.
    pub fn reference(&self) -> Option<&Arc<ReferenceState>> {
        self.reference.as_ref()
    }

    /// Returns an image of what differs from the state that the disk was compared with, planned on
    /// top of that state. None if nothing was left out of the disk.
    ///
    /// # Errors
    /// EIO when the disk or the state can't be read.
    pub fn difference(&self) -> Result<Option<FlattenPlan>> {
        let left_out = self.incoming.arrived().and_then(|it| it.left_out.as_ref());
        let (Some(left_out), Some(reference)) = (left_out, &self.reference) else {
            return Ok(None);
        };
        let base = (&*reference.base, reference.id);
        plan_received(&self.disk, left_out.clone(), base).map(Some)
    }

    /// Returns where the disk is being unpacked, for removing it.
    pub fn place(&self) -> &Path {
        &self.disk
    }

    fn check_refused(&self) -> Result<()> {
        match &self.refused {
            Some((errno, message)) => Err(Error::new(*errno, message.clone())),
            None => Ok(()),
        }
    }

    fn keep_refusal(&mut self, result: Result<()>) -> Result<()> {
        if let Err(error) = &result {
            self.refused = Some((error.errno(), error.to_string()));
        }
        result
    }
}

impl Drop for ImportStream {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        if self.note.is_some() {
            discard(&WaitingArchive::note_of(self.place()));
        }
        // Does nothing if the disk was moved away.
        discard(self.place());
    }
}

/// Returns the options of a box that has only an image.
fn plain_options(manifest: &Manifest) -> Value {
    json!({"rootfs": {"Image": manifest.image}})
}

/// The early bytes of an archive, at their offsets in an unlinked file.
struct PieceSpool {
    file: File,
    /// Offset → end of each piece; disjoint.
    pieces: BTreeMap<u64, u64>,
    allowance: Allowance,
}

impl PieceSpool {
    fn create(path: &Path, most: Option<u64>) -> Result<PieceSpool> {
        let message = || format!("cannot make the spool {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .context(message)?;
        fs::remove_file(path).context(message)?;
        Ok(PieceSpool {
            file,
            pieces: BTreeMap::new(),
            allowance: Allowance::of(most),
        })
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = offset
            .checked_add(bytes.len() as u64)
            .ok_or_else(|| Error::new(libc::EFBIG, "the archive is too large"))?;
        let source = "more of the archive came out of order";
        self.allowance.take(bytes.len(), source)?;
        self.file
            .write_all_at(bytes, offset)
            .context(|| "cannot spool a part of the archive that came out of order")?;
        // Where two writes overlap, the file has the bytes of the later one. Merge the ranges.
        let mut start = offset;
        let mut stop = end;
        let touching: Vec<u64> = self
            .pieces
            .range(..=end)
            .filter(|(_, piece_end)| **piece_end >= offset)
            .map(|(piece, _)| *piece)
            .collect();
        for piece in touching {
            if let Some(piece_end) = self.pieces.remove(&piece) {
                start = start.min(piece);
                stop = stop.max(piece_end);
            }
        }
        self.pieces.insert(start, stop);
        Ok(())
    }

    fn next_offset(&self) -> Option<u64> {
        self.pieces.keys().next().copied()
    }

    /// Moves the next bytes at `offset` into `buffer`. Returns false if there are none.
    fn take_at(&mut self, offset: u64, buffer: &mut Vec<u8>) -> Result<bool> {
        let Some((start, end)) = self.pieces.iter().next().map(|(s, e)| (*s, *e)) else {
            return Ok(false);
        };
        if start > offset {
            return Ok(false);
        }
        self.pieces.remove(&start);
        if end <= offset {
            return Ok(true).inspect(|_| buffer.clear());
        }
        let length = usize::try_from(end - offset).unwrap_or(PIECE).min(PIECE);
        buffer.resize(length, 0);
        self.file
            .read_exact_at(buffer, offset)
            .context(|| "cannot read a spooled part of the archive")?;
        let rest = offset + length as u64;
        if rest < end {
            self.pieces.insert(rest, end);
        }
        Ok(true)
    }
}
