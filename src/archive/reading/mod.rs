//! Reads an archive as it arrives: decodes, hashes, unpacks and checks it write by write.
//!
//! The call that brings the last byte needed returns the verdict, so that it reaches the writer:
//! many tools ignore the result of `close`. There are three layers, each fed by the one before:
//! [`frames`] decodes zstd, [`members`] reads tar blocks, [`disk_file`] keeps the disk. None of
//! them looks ahead, and each keeps a bounded amount in memory. Threads do the slow work while the
//! next bytes are brought: one decodes ([`background_decoder`]), one hashes the disk and one writes
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
mod tar_header;
#[cfg(test)]
mod tests;
mod unpacker;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::background_decoder::BackgroundDecoder;
use self::disk_file::DiskFile;
pub use self::disk_writer::MakeRoom;
use self::members::Members;
use super::Manifest;
use crate::disk::{Chain, Header, LeftOut};
use crate::{Error, Result};

/// The most bytes of holes, in an archive or in the disk in one, that are read as zeros, and the
/// most bytes that are read of a member that is not kept: hashing as many takes minutes.
pub const MOST_HOLES: u64 = 256 << 30;

/// The number of bytes that may still be written for an archive.
pub(crate) struct Allowance {
    written: u64,
    most: Option<u64>,
}

impl Allowance {
    /// At most `most` bytes in all; None for as many as there is room for.
    pub(crate) fn of(most: Option<u64>) -> Allowance {
        Allowance { written: 0, most }
    }

    /// Takes this many bytes of the allowance. EFBIG when that is too much; the message begins with
    /// `what`.
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

/// The contents of a complete archive, besides the disk in the file given to [`Incoming::begin`].
#[derive(Debug)]
pub struct Arrived {
    /// The checked manifest.
    pub manifest: Manifest,
    /// The header of the disk, which passed
    /// [`inspect_standalone`](crate::disk::inspect_standalone).
    pub header: Header,
    /// The clusters that are missing in the file, because the disk that it was compared with has
    /// them.
    pub left_out: Option<Arc<LeftOut>>,
}

/// An archive being received: a plain tar or a zstd-compressed one, told apart by zstd's magic.
///
/// Members are `manifest.json` and `disk.qcow2`, in any order; the last one of a name counts. Other
/// regular members are read and not kept, as BoxLite does (`guest-rootfs.qcow2` of older versions,
/// the `._` files of a Mac).
pub struct Incoming {
    disk: PathBuf,
    decoder: BackgroundDecoder,
    refusal: Option<Refusal>,
    finished: bool,
}

impl Incoming {
    /// Starts receiving. Creates the file `disk` for the disk image, and removes it when the
    /// `Incoming` is dropped without a successful [`finish`](Self::finish). At most `most` bytes
    /// are written to it. Clusters that `other` has as well are left out of it; they are hashed and
    /// checked all the same.
    ///
    /// # Errors
    ///
    /// EEXIST when `disk` exists; what creating it says otherwise.
    pub fn begin(disk: &Path, most: Option<u64>, other: Option<Arc<Chain>>) -> Result<Incoming> {
        Incoming::begin_with_room(disk, most, other, Arc::new(|| false))
    }

    /// Begins as [`Incoming::begin`] does. While the disk does not fit, `make_room` is called.
    ///
    /// # Errors
    /// Those of [`Incoming::begin`].
    pub fn begin_with_room(
        disk: &Path,
        most: Option<u64>,
        other: Option<Arc<Chain>>,
        make_room: MakeRoom,
    ) -> Result<Incoming> {
        let file = DiskFile::create(disk, most, other, make_room)?;
        Ok(Incoming {
            disk: disk.to_owned(),
            decoder: BackgroundDecoder::new(Members::new(file)),
            refusal: None,
            finished: false,
        })
    }

    /// Takes the next bytes, in order. When this returns they are decoded, and every verdict that
    /// follows from them was returned. Some MiB of the disk may still be in transit to the file.
    ///
    /// [`Progress::Complete`] comes from the call that brings the last byte the archive needs: the
    /// second of tar's two zero blocks and, if compressed, the end of that frame. By then the whole
    /// disk is checked, and durable in the file. Later calls may bring padding and return
    /// `Complete` again: zero bytes, frames of zeros, skippable frames.
    ///
    /// # Errors
    ///
    /// EBADMSG for an archive that can't become a valid one, EFBIG when the disk is larger than
    /// allowed, ENOSPC when it does not fit, or those of writing it. They come from this call or a
    /// later one, but never after the call that would complete the archive. An error is final:
    /// every later call returns it again.
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

    /// Ends the archive: no more bytes come. After success the disk file belongs to the caller.
    ///
    /// An incomplete archive is no final error: a writer may continue after another descriptor of
    /// the same file was closed.
    ///
    /// # Errors
    ///
    /// The error of a write, or EBADMSG naming what the archive ends in the middle of.
    pub fn finish(&mut self) -> Result<&Arrived> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.error());
        }
        // An error of writing the disk comes before that of a short archive.
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

    /// Returns the contents, once a write returned [`Progress::Complete`] and none failed since.
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

/// An error that is returned again and again.
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
