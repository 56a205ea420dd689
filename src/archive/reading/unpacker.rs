//! The decoded side of an archive, fed by zstd frames and plain tars.

use super::Arrived;
use super::members::Members;
use crate::{Error, Result};

/// The members of an archive as its tar arrives, and its contents once it is complete.
pub(super) struct Unpacker {
    pub(super) members: Members,
    pub(super) arrived: Option<Arrived>,
}

impl Unpacker {
    pub(super) fn of(members: Members) -> Unpacker {
        Unpacker {
            members,
            arrived: None,
        }
    }

    /// Takes bytes of the tar; past its end, only zeros.
    pub(super) fn tar(&mut self, bytes: &[u8]) -> Result<()> {
        self.members.push(bytes)
    }

    /// Reports that the archive could end here: after every byte of a plain tar, at the end of a
    /// zstd frame.
    pub(super) fn boundary(&mut self) -> Result<()> {
        if self.arrived.is_none() && self.members.ended() {
            self.arrived = Some(self.members.complete()?);
        }
        Ok(())
    }

    /// Takes zero bytes outside of zstd frames: padding, which only a complete archive may have.
    pub(super) fn padding(&mut self) -> Result<()> {
        match self.arrived {
            Some(_) => Ok(()),
            None => Err(Error::bad_archive(format!(
                "the archive is damaged in {}: there are zeros where a zstd frame must begin",
                self.members.place()
            ))),
        }
    }
}
