//! An archive as it arrives: decoded, hashed, unpacked and checked write by write.
//!
//! Everything happens inside the call that brings the bytes, so that the verdict reaches whoever
//! wrote them: many tools ignore what `close` says. Three layers, each fed by the one before:
//! [`frames`] undoes zstd, [`members`] reads tar blocks, [`disk_file`] keeps the disk. None of them
//! looks ahead or holds back a verdict, and none keeps more than a bounded amount in memory.

mod disk_file;
mod frames;
mod members;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use self::disk_file::DiskFile;
use self::frames::Frames;
use self::members::Members;
use super::Manifest;
use crate::disk::Header;
use crate::{Error, Result};

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
/// Members: one `manifest.json`, one `disk.qcow2`, and perhaps a `guest-rootfs.qcow2` as older
/// BoxLite wrote it, which is not kept; in any order.
pub struct Incoming {
    disk: PathBuf,
    packing: Packing,
    unpacking: Unpacking,
    refusal: Option<Refusal>,
    finished: bool,
}

/// How the tar is packed.
enum Packing {
    /// Fewer bytes than zstd's magic have come, and those there are begin it.
    Unknown(Vec<u8>),
    Plain,
    Zstd(Box<Frames>),
}

impl Incoming {
    /// Starts receiving. The file `disk` is created for the disk image and removed again when the
    /// `Incoming` is dropped without a successful [`finish`](Self::finish).
    ///
    /// # Errors
    ///
    /// EEXIST when `disk` exists; what creating it says otherwise.
    pub fn begin(disk: &Path) -> Result<Incoming> {
        Ok(Incoming {
            disk: disk.to_owned(),
            packing: Packing::Unknown(Vec::new()),
            unpacking: Unpacking {
                members: Members::new(DiskFile::create(disk)?),
                arrived: None,
            },
            refusal: None,
            finished: false,
        })
    }

    /// Takes the next bytes, in order. When this returns they are decoded, hashed and written, but for
    /// less than 4 KiB of the disk that wait for the rest of their block.
    ///
    /// [`Progress::Complete`] comes from the call that brings the last byte the archive needs: the
    /// second of tar's two zero blocks and, if compressed, the end of that frame. Later calls may
    /// bring padding and say `Complete` again: zero bytes, frames of zeros, skippable frames.
    ///
    /// # Errors
    ///
    /// EBADMSG for an archive that can't become a good one, ENOSPC when the disk does not fit, or what
    /// writing it said. An error is final: every later call returns it again.
    pub fn write(&mut self, bytes: &[u8]) -> Result<Progress> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.error());
        }
        match self.decode(bytes) {
            Ok(()) => Ok(match self.unpacking.arrived {
                Some(_) => Progress::Complete,
                None => Progress::More,
            }),
            Err(error) => Err(self.refusal.insert(Refusal::of(&error)).error()),
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
        match &self.unpacking.arrived {
            Some(arrived) => {
                self.finished = true;
                Ok(arrived)
            }
            None => Err(Error::bad_archive(format!(
                "the archive ends in the middle of {}; copy it again",
                self.place()
            ))),
        }
    }

    /// What came, once a write returned [`Progress::Complete`] and none was refused since.
    pub fn arrived(&self) -> Option<&Arrived> {
        match self.refusal {
            None => self.unpacking.arrived.as_ref(),
            Some(_) => None,
        }
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<()> {
        if let Packing::Unknown(magic) = &mut self.packing {
            magic.extend_from_slice(bytes);
            let start = std::mem::take(magic);
            match frames::begins_frame(&start) {
                None => self.packing = Packing::Unknown(start),
                Some(compressed) => {
                    self.packing = match compressed {
                        true => Packing::Zstd(Box::new(Frames::new()?)),
                        false => Packing::Plain,
                    };
                    self.unpack(&start)?;
                }
            }
            return Ok(());
        }
        self.unpack(bytes)
    }

    fn unpack(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.packing {
            Packing::Unknown(_) => Ok(()),
            Packing::Plain => {
                self.unpacking.tar(bytes)?;
                self.unpacking.boundary()
            }
            Packing::Zstd(frames) => frames.push(bytes, &mut self.unpacking),
        }
    }

    /// What the next byte would belong to.
    fn place(&self) -> String {
        let members = &self.unpacking.members;
        match &self.packing {
            Packing::Unknown(_) => "its first header".into(),
            Packing::Zstd(_) if members.ended() => "its last zstd frame".into(),
            _ => members.place(),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.disk) {
            log::warn!("cannot remove {}: {error}", self.disk.display());
        }
    }
}

/// The decoded side: what [`Frames`] and plain tars feed.
struct Unpacking {
    members: Members,
    arrived: Option<Arrived>,
}

impl Unpacking {
    /// Takes bytes of the tar; past its end, only zeros.
    fn tar(&mut self, bytes: &[u8]) -> Result<()> {
        self.members.push(bytes)
    }

    /// The packing could end here: after every byte of a plain tar, at the end of a zstd frame.
    fn boundary(&mut self) -> Result<()> {
        if self.arrived.is_none() && self.members.ended() {
            self.arrived = Some(self.members.complete()?);
        }
        Ok(())
    }

    /// Zero bytes outside any zstd frame: padding, which only a complete archive may have.
    fn padding(&mut self) -> Result<()> {
        match self.arrived {
            Some(_) => Ok(()),
            None => Err(Error::bad_archive(format!(
                "the archive is damaged in {}: there are zeros where a zstd frame must begin",
                self.members.place()
            ))),
        }
    }
}

/// An error to be returned as often as asked for.
struct Refusal {
    errno: i32,
    sentence: String,
}

impl Refusal {
    fn of(error: &Error) -> Refusal {
        Refusal {
            errno: error.errno(),
            sentence: error.to_string(),
        }
    }

    fn error(&self) -> Error {
        Error::new(self.errno, self.sentence.clone())
    }
}
