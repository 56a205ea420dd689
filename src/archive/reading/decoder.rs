//! Decodes an archive, plain or compressed, into its members.

use super::Arrived;
use super::frames::{self, Frames};
use super::members::Members;
use super::unpacker::Unpacker;
use crate::Result;

/// Decodes the bytes of an archive into its manifest and disk.
pub(super) struct Decoder {
    packing: Packing,
    unpacker: Unpacker,
}

/// How the tar is packed.
enum Packing {
    /// The first bytes; they may still become zstd's magic.
    Unknown(Vec<u8>),
    Plain,
    Zstd(Box<Frames>),
}

impl Decoder {
    /// A decoder that passes what it decodes to `members`.
    pub(super) fn new(members: Members) -> Decoder {
        Decoder {
            packing: Packing::Unknown(Vec::new()),
            unpacker: Unpacker::of(members),
        }
    }

    /// Waits until everything decoded is hashed and written.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.unpacker.members.drain()
    }

    /// Returns a lower bound of the bytes of the tar that are still to come.
    pub(super) fn missing(&self) -> u64 {
        self.unpacker.members.missing()
    }

    /// What came, once the archive is complete.
    pub(super) fn arrived(&self) -> Option<&Arrived> {
        self.unpacker.arrived.as_ref()
    }

    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<()> {
        if let Packing::Unknown(magic) = &mut self.packing {
            magic.extend_from_slice(bytes);
            let start = std::mem::take(magic);
            match frames::begins_frame(&start) {
                None => self.packing = Packing::Unknown(start),
                Some(compressed) => {
                    self.packing = if compressed {
                        Packing::Zstd(Box::new(Frames::new()?))
                    } else {
                        Packing::Plain
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
                self.unpacker.tar(bytes)?;
                self.unpacker.boundary()
            }
            Packing::Zstd(frames) => frames.push(bytes, &mut self.unpacker),
        }
    }

    /// Returns what the next byte belongs to, for messages.
    pub(super) fn place(&self) -> String {
        let members = &self.unpacker.members;
        match &self.packing {
            Packing::Unknown(_) => "its first header".into(),
            Packing::Zstd(_) if members.ended() => "its last zstd frame".into(),
            _ => members.place(),
        }
    }
}
