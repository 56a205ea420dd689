//! An archive on its way in, from a writer who may write out of order.

use std::collections::BTreeMap;
use std::fs;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::archive::{Allowance, Incoming, MOST_HOLES, Manifest, Progress};
use crate::files::waiting_archive::WaitingArchive;
use crate::files::workspace::discard;
use crate::home::{check_options, normalize_imported, reject_host_access};
use crate::progress::UnderWay;
use crate::store::Store;
use crate::{Context, Error, Result};

/// Bytes fed at once from the spool or for a gap.
const PIECE: usize = 1024 * 1024;

/// What archives may bring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imports {
    /// Most bytes that one of them may have written into the home; None: as many as there is room for.
    pub most: Option<u64>,
    /// Options that reach into the host are refused.
    pub untrusted: bool,
}

/// An archive as it arrives: what comes in order is decoded, hashed and unpacked at once; what
/// comes early waits in a spool. Its disk is removed with it unless it was taken.
pub struct ImportStream {
    incoming: Incoming,
    disk: PathBuf,
    /// Bytes from the start that the decoder has seen.
    fed: u64,
    spool: Option<Spool>,
    /// Length the writer gave the file, where it said so (ftruncate after a hole at the end).
    length: u64,
    wanted: ImportTarget,
    imports: Imports,
    /// The archive is complete, and right for what it is wanted for.
    complete: bool,
    refused: Option<(i32, String)>,
    /// A note says that it waits, and which name a box made of it gets.
    note: Option<String>,
    /// Its disk and its note stay when it is dropped.
    is_left: bool,
    _under_way: UnderWay,
}

/// What an archive is received for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportTarget {
    /// A box: what it says of its configuration is checked and taken.
    Box,
    /// Only its disk, for a box that has its configuration.
    Disk,
}

/// Starts to receive an archive.
///
/// # Errors
/// EROFS, or those of making a file in the workspace.
pub fn receive(store: &Store, wanted: ImportTarget) -> Result<ImportStream> {
    store.refuse_read_only()?;
    let disk = store.workspace().fresh_path("disk")?;
    Ok(ImportStream {
        incoming: Incoming::begin(&disk, store.imports.most)?,
        spool: None,
        disk,
        fed: 0,
        length: 0,
        wanted,
        imports: store.imports,
        complete: false,
        refused: None,
        note: None,
        is_left: false,
        _under_way: store.shared.foreground.begin(),
    })
}

impl ImportStream {
    /// Takes `bytes` at `offset` of the archive. The verdict falls in the write that completes the
    /// archive or shows that it can't become one; it is sticky.
    ///
    /// # Errors
    /// EBADMSG with the check that failed, EPERM naming an option that is not allowed here, EFBIG for
    /// more than may come, ENOSPC, EIO; ESPIPE for bytes that were taken before.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.refused()?;
        let result = self.take(offset, bytes);
        self.remember(result)
    }

    fn take(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if offset < self.fed {
            return Err(Error::new(
                libc::ESPIPE,
                "an archive can't be changed once it is written; copy it again from the start",
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
            if self.wanted == ImportTarget::Box {
                // In the same write as the other verdicts.
                self.box_options()?;
            }
            self.complete = true;
        }
        Ok(())
    }

    /// The box options for a new box's row. Looked at also where the archive came for its disk alone,
    /// as a snapshot of a box being made, and was moved to where it makes a box.
    ///
    /// # Errors
    /// EBADMSG for options that BoxLite could not read, EPERM for those that are not allowed here.
    pub fn box_options(&self) -> Result<Value> {
        let manifest = self.manifest()?;
        let options = match &manifest.options {
            Some(options) => options.clone(),
            None => plain_options(manifest),
        };
        check_options(&options)?;
        // What ports mean depends on the version.
        let options = normalize_imported(options, Some(manifest.version));
        if self.imports.untrusted {
            reject_host_access(&options)?;
        }
        Ok(options)
    }

    /// Describes it as an archive that waits and is to become a box of this name.
    ///
    /// # Errors
    /// EBADMSG while it is incomplete.
    pub fn as_waiting(&self, name: &str) -> Result<WaitingArchive> {
        Ok(WaitingArchive {
            disk: self.disk.clone(),
            name: name.to_owned(),
            options: self.options_of_its_own()?,
        })
    }

    /// The options for a box of its own, where it came for its disk alone: where its options are not
    /// allowed here, those of a box that has only an image.
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

    fn spool(&mut self) -> Result<&mut Spool> {
        if self.spool.is_none() {
            self.spool = Some(Spool::create(
                &self.disk.with_extension("spool"),
                self.imports.most,
            )?);
        }
        self.spool
            .as_mut()
            .ok_or_else(|| Error::damaged("the spool is gone"))
    }

    /// Whether the archive is complete and right so far.
    pub fn is_complete(&self) -> bool {
        self.complete && self.refused.is_none()
    }

    /// Whether nothing was written.
    pub fn is_untouched(&self) -> bool {
        self.fed == 0 && self.spool.is_none() && self.refused.is_none()
    }

    /// The file is at least `length` bytes long; what was not written of it is zeros.
    pub fn set_length(&mut self, length: u64) {
        self.length = self.length.max(length);
    }

    /// A descriptor was closed: holes that were left are zeros, and the archive should be complete.
    /// That it is not is no verdict yet: closing happens for every copy of a descriptor, and the
    /// writer may go on.
    ///
    /// # Errors
    /// As [`ImportStream::write_at`]; EBADMSG while it is incomplete.
    pub fn finish(&mut self) -> Result<()> {
        self.refused()?;
        let result = self.fill_holes();
        self.remember(result)?;
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
            let spooled = self.spool.as_ref().and_then(Spool::next_offset);
            let gap = spooled.unwrap_or(self.length).saturating_sub(self.fed);
            if gap == 0 && spooled.is_none() {
                break;
            }
            let zeros = vec![0; PIECE.min(usize::try_from(gap).unwrap_or(PIECE))];
            self.feed(&zeros)?;
            filled += zeros.len() as u64;
            self.feed_spooled()?;
        }
        // What comes after the end has to be zeros too, and is looked at.
        while let Some(next) = self.spool.as_ref().and_then(Spool::next_offset) {
            self.fed = self.fed.max(next);
            self.feed_spooled()?;
        }
        Ok(())
    }

    /// What the archive says of the box.
    ///
    /// # Errors
    /// EBADMSG while it is incomplete.
    pub fn manifest(&self) -> Result<&Manifest> {
        self.incoming
            .arrived()
            .map(|arrived| &arrived.manifest)
            .ok_or_else(|| Error::bad_archive("the archive is incomplete"))
    }

    /// Virtual size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.incoming
            .arrived()
            .map_or(0, |arrived| arrived.header.virtual_size)
    }

    /// The name in the note that says that it waits; None where there is no note.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// A note says so from now on, with this name.
    pub fn set_note(&mut self, name: &str) {
        self.note = Some(name.to_owned());
    }

    /// Its disk and its note stay from now on, whatever becomes of this.
    pub fn leave(&mut self) {
        self.is_left = true;
    }

    /// Where the unpacked disk is; moving it away is how it is taken.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    fn refused(&self) -> Result<()> {
        match &self.refused {
            Some((errno, message)) => Err(Error::new(*errno, message.clone())),
            None => Ok(()),
        }
    }

    fn remember(&mut self, result: Result<()>) -> Result<()> {
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
            discard(&WaitingArchive::note_of(&self.disk));
        }
        // Not there when it became a box's.
        discard(&self.disk);
    }
}

/// The options of a box of which nothing but its image is known.
fn plain_options(manifest: &Manifest) -> Value {
    json!({"rootfs": {"Image": manifest.image}})
}

/// Pieces that came before their turn, at their offsets in an unlinked file.
struct Spool {
    file: File,
    /// Offset → end of each piece; disjoint.
    pieces: BTreeMap<u64, u64>,
    allowance: Allowance,
}

impl Spool {
    fn create(path: &Path, most: Option<u64>) -> Result<Spool> {
        let message = || format!("cannot make the spool {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .context(message)?;
        fs::remove_file(path).context(message)?;
        Ok(Spool {
            file,
            pieces: BTreeMap::new(),
            allowance: Allowance::of(most),
        })
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = offset
            .checked_add(bytes.len() as u64)
            .ok_or_else(|| Error::new(libc::EFBIG, "the archive is too large"))?;
        let what = "more of the archive came out of order";
        self.allowance.take(bytes.len(), what)?;
        self.file
            .write_all_at(bytes, offset)
            .context(|| "cannot keep a part of the archive that came out of order")?;
        // The later of two overlapping writes has won in the file; the pieces only say where
        // something is.
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

    /// Moves the next bytes at `offset` into `buffer`; false when none are there.
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
            .context(|| "cannot read back a part of the archive")?;
        let rest = offset + length as u64;
        if rest < end {
            self.pieces.insert(rest, end);
        }
        Ok(true)
    }
}
