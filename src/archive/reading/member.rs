//! One member of the tar: what it is for, and which pieces of it are stored.

use tar::GnuSparseHeader;

use super::refusal::{damaged, refused};
use crate::Result;

/// A tar block, in bytes.
pub(super) const BLOCK_BYTES: u64 = 512;
/// The most pieces of a sparse member: 32 MiB of map.
const MAX_PIECES: usize = 2 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum MemberKind {
    LongName,
    LongLink,
    Pax,
    Manifest,
    Disk,
    /// Anything else, such as `guest-rootfs.qcow2` of older archives or files that another system
    /// adds: read, not kept.
    Other,
}

impl MemberKind {
    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            MemberKind::LongName | MemberKind::LongLink | MemberKind::Pax => "an extension header",
            MemberKind::Manifest => "manifest.json",
            MemberKind::Disk => "disk.qcow2",
            MemberKind::Other => "a member that is ignored",
        }
    }
}

/// A member being read.
pub(super) struct Member {
    pub kind: MemberKind,
    /// Bytes in the archive, without padding.
    pub stored: u64,
    /// Bytes once holes are filled in.
    pub expanded: u64,
    /// Pieces of data in order: where they belong and how long they are.
    pub pieces: Vec<SparsePiece>,
    /// The piece being read, and bytes of it that came.
    pub piece: usize,
    pub within: u64,
    /// Bytes that came, and where the next one belongs.
    pub came: u64,
    pub at: u64,
    /// Contents of what is kept in memory.
    pub bytes: Vec<u8>,
}

pub(super) struct SparsePiece {
    pub offset: u64,
    pub length: u64,
}

impl Member {
    /// A member without holes.
    pub fn whole(kind: MemberKind, size: u64) -> Member {
        Member {
            kind,
            stored: size,
            expanded: size,
            pieces: vec![SparsePiece {
                offset: 0,
                length: size,
            }],
            piece: 0,
            within: 0,
            came: 0,
            at: 0,
            bytes: Vec::new(),
        }
    }

    pub fn piece_left(&self) -> u64 {
        self.pieces
            .get(self.piece)
            .map_or(0, |piece| piece.length.saturating_sub(self.within))
    }

    /// Adds the pieces that a header or a map block lists.
    pub fn add_pieces(&mut self, listed: &[GnuSparseHeader]) -> Result<()> {
        for piece in listed.iter().filter(|piece| !piece.is_empty()) {
            if self.pieces.len() >= MAX_PIECES {
                return Err(refused(format!(
                    "{} is sparse with over {MAX_PIECES} pieces; pack it without --sparse",
                    self.kind.name()
                )));
            }
            let number = |e| {
                damaged(format!(
                    "the sparse map of {} has no number",
                    self.kind.name()
                ))
                .caused_by(e)
            };
            let (offset, length) = (
                piece.offset().map_err(number)?,
                piece.length().map_err(number)?,
            );
            self.pieces.push(SparsePiece { offset, length });
        }
        Ok(())
    }

    /// Verifies the map: pieces must be in order, aligned in the archive, and add up. These are
    /// tar-rs's checks.
    pub fn check_map(&self) -> Result<()> {
        let wrong = |why: &str| damaged(format!("the sparse map of {} {why}", self.kind.name()));
        let (mut stored, mut at) = (0u64, 0u64);
        for piece in &self.pieces {
            if piece.length != 0 && stored % BLOCK_BYTES != 0 {
                return Err(wrong("has a piece that does not begin at a block"));
            }
            if piece.offset < at {
                return Err(wrong("is out of order"));
            }
            at = piece
                .offset
                .checked_add(piece.length)
                .filter(|end| *end <= self.expanded)
                .ok_or_else(|| wrong("reaches beyond its size"))?;
            stored = stored.saturating_add(piece.length);
        }
        if at != self.expanded || stored != self.stored {
            return Err(wrong("does not add up to its size"));
        }
        Ok(())
    }
}
