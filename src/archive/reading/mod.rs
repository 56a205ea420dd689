//! An archive as it arrives: decoded, hashed, unpacked and checked write by write.
//!
//! The verdict falls inside the call that brings the last byte needed for it, so that it reaches
//! whoever wrote that: many tools ignore what `close` says. Three layers, each fed by the one before:
//! [`frames`] undoes zstd, [`members`] reads tar blocks, [`disk_file`] keeps the disk. None of them
//! looks ahead, and none keeps more than a bounded amount in memory. Where that takes long, threads do
//! it while the next bytes are brought: one decodes ([`background_decoder`]), one hashes the disk and one writes
//! it ([`stages`]). A call that may bring the end waits for them.

mod background_decoder;
mod decoder;
mod disk_file;
mod disk_writer;
mod frames;
mod member;
mod members;
mod names;
mod output_bound;
mod pax;
mod refusal;
mod stages;
#[cfg(test)]
mod tests;
mod unpacker;

use std::path::{Path, PathBuf};

use self::background_decoder::BackgroundDecoder;
use self::disk_file::DiskFile;
use self::members::Members;
use super::Manifest;
use crate::disk::Header;
use crate::{Error, Result};

/// Most bytes of holes in an archive, or in the disk in one, that are read as zeros, and most that are
/// read of a member that is not kept: it takes minutes to hash as many.
pub const MOST_HOLES: u64 = 256 << 30;

/// How many bytes may still be written for an archive.
pub(crate) struct Allowance {
    written: u64,
    most: Option<u64>,
}

impl Allowance {
    /// At most `most` in all; None for as many as there is room for.
    pub(crate) fn of(most: Option<u64>) -> Allowance {
        Allowance { written: 0, most }
    }

    /// So many more are about to be written. EFBIG where that is too much, with `what` is.
    pub(crate) fn take(&mut self, bytes: usize, what: &str) -> Result<()> {
        self.written = self.written.saturating_add(bytes as u64);
        match self.most.filter(|most| self.written > *most) {
            Some(most) => Err(over_limit(what, most)),
            None => Ok(()),
        }
    }
}

/// EFBIG: an archive brings more than it may.
fn over_limit(what: &str, most: u64) -> Error {
    Error::new(
        libc::EFBIG,
        format!(
            "{what}, over the {most} that an import may bring here (the mount option max_import)"
        ),
    )
}

/// How far an archive has come.
#[derive(PartialEq, Eq, Debug, Clone, Copy)]
pub enum Progress {
    /// The archive does not end here.
    More,
    /// All of the archive is here, checked and on disk. Padding may follow.
    Complete,
}

/// What a complete archive brought, besides the disk in the file given to [`Incoming::begin`].
#[derive(Debug)]
pub struct Arrived {
    /// The checked manifest.
    pub manifest: Manifest,
    /// The header of the disk, which passed [`inspect_standalone`](crate::disk::inspect_standalone).
    pub header: Header,
}

/// An archive being received: a plain tar or a zstd-compressed one, told apart by zstd's magic.
///
/// Members: `manifest.json` and `disk.qcow2`, in any order; of several by one name the last counts. Other
/// regular members are read and not kept, as BoxLite does (`guest-rootfs.qcow2` of older versions, the `._` files
/// of a Mac).
pub struct Incoming {
    disk: PathBuf,
    decoder: BackgroundDecoder,
    refusal: Option<Refusal>,
    finished: bool,
}

impl Incoming {
    /// Starts receiving. The file `disk` is created for the disk image and removed again when the
    /// `Incoming` is dropped without a successful [`finish`](Self::finish). At most `most` bytes are
    /// written to it.
    ///
    /// # Errors
    ///
    /// EEXIST when `disk` exists; what creating it says otherwise.
    pub fn begin(disk: &Path, most: Option<u64>) -> Result<Incoming> {
        Ok(Incoming {
            disk: disk.to_owned(),
            decoder: BackgroundDecoder::new(Members::new(DiskFile::create(disk, most)?)),
            refusal: None,
            finished: false,
        })
    }

    /// Takes the next bytes, in order. When this returns they are decoded and all that can be told of
    /// them by that was told; some MiB of the disk may still be on their way to the file.
    ///
    /// [`Progress::Complete`] comes from the call that brings the last byte the archive needs: the
    /// second of tar's two zero blocks and, if compressed, the end of that frame. By then all of the
    /// disk is checked, and in the file to stay even if the power goes. Later calls may
    /// bring padding and say `Complete` again: zero bytes, frames of zeros, skippable frames.
    ///
    /// # Errors
    ///
    /// EBADMSG for an archive that can't become a good one, EFBIG when the disk is more than it may be,
    /// ENOSPC when it does not fit, or what writing it said, in this call or a later one, but never after
    /// the one that would complete the archive. An error is final: every later call returns it again.
    pub fn write(&mut self, bytes: &[u8]) -> Result<Progress> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.error());
        }
        match self.decoder.take(bytes) {
            Ok(()) => Ok(match self.decoder.arrived() {
                Some(_) => Progress::Complete,
                None => Progress::More,
            }),
            Err(error) => Err(self.refuse(&error)),
        }
    }

    /// Says that no more bytes come. After success the disk file belongs to the caller.
    ///
    /// An incomplete archive is no final verdict: a writer may go on after another descriptor of the
    /// same file was closed.
    ///
    /// # Errors
    ///
    /// The error a write returned, or EBADMSG naming what the archive ends in the middle of.
    pub fn finish(&mut self) -> Result<&Arrived> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.error());
        }
        // That the disk can't be written is to be known before that the archive is too short.
        let place = match self.decoder.drain() {
            Ok(decoder) => decoder.place(),
            Err(error) => return Err(self.refuse(&error)),
        };
        match self.decoder.arrived() {
            Some(arrived) => {
                self.finished = true;
                Ok(arrived)
            }
            None => Err(Error::bad_archive(format!(
                "the archive ends in the middle of {place}; copy it again"
            ))),
        }
    }

    /// What came, once a write returned [`Progress::Complete`] and none was refused since.
    pub fn arrived(&self) -> Option<&Arrived> {
        match self.refusal {
            None => self.decoder.arrived(),
            Some(_) => None,
        }
    }

    fn refuse(&mut self, error: &Error) -> Error {
        self.refusal.insert(Refusal::of(error)).error()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.disk)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", self.disk.display());
        }
    }
}

/// An error to be returned as often as asked for.
struct Refusal {
    errno: i32,
    message: String,
}

impl Refusal {
    fn of(error: &Error) -> Refusal {
        Refusal {
            errno: error.errno(),
            message: error.to_string(),
        }
    }

    fn error(&self) -> Error {
        Error::new(self.errno, self.message.clone())
    }
}
