//! Reads the tar in an archive, block by block, and checks each member.
//!
//! It accepts what tar-rs accepts, with tar-rs's header types, but is fed by the writer. tar-rs
//! reads header extensions and sparse maps of any length into memory, and takes time quadratic in
//! the pieces of a sparse member. Here both are bounded, and the end of the archive is known to the
//! byte.

use std::sync::Arc;

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::disk_file::DiskFile;
use super::disk_writer::all_zero;
use super::member::{BLOCK_BYTES, Member, MemberKind, SparsePiece};
use super::names::{Meaning, Names};
use super::pax::{PaxRecords, parse_pax};
use super::refusal::{damaged, refused};
use super::tar_header::{BLOCK, checksum, size_of, wrong_type};
use super::{Arrived, MOST_HOLES};
use crate::archive::Manifest;
use crate::{Result, disk};

/// Largest manifest.
const MAX_MANIFEST: u64 = 1 << 20;
/// Largest extension member (a name, pax records).
const MAX_EXTENSION: u64 = 1 << 20;

/// Reads a tar, and keeps what it brings.
pub(super) struct Members {
    disk: DiskFile,
    expect: Expect,
    /// The block being collected, and how much of it is there.
    block: [u8; BLOCK],
    gathered: usize,
    /// The extension headers for the next member.
    pending: Pending,
    /// The member that came last, for messages.
    last: Option<&'static str>,
    manifest: Option<Manifest>,
    digest: Option<[u8; 32]>,
    header: Option<disk::Header>,
    names: Names,
}

/// What the next byte belongs to.
enum Expect {
    Header,
    /// A further block of a member's sparse map.
    Map(Member),
    Body(Member),
    /// Bytes left up to the next block.
    Padding(u64),
    /// The second zero block.
    EndMark,
    /// Zeros only.
    Nothing,
}

/// Extension members seen since the last member.
#[derive(Default)]
struct Pending {
    long_name: Option<Vec<u8>>,
    long_link: bool,
    pax: Option<PaxRecords>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.long_name.is_none() && !self.long_link && self.pax.is_none()
    }
}

impl Members {
    pub(super) fn new(disk: DiskFile) -> Members {
        Members {
            disk,
            expect: Expect::Header,
            block: [0; BLOCK],
            gathered: 0,
            pending: Pending::default(),
            last: None,
            manifest: None,
            digest: None,
            header: None,
            names: Names::default(),
        }
    }

    /// Returns whether both zero blocks came.
    pub(super) fn ended(&self) -> bool {
        matches!(self.expect, Expect::Nothing)
    }

    /// Makes the disk durable and returns what came. Call it once, after the end.
    pub(super) fn complete(&mut self) -> Result<Arrived> {
        self.disk.sync()?;
        match (self.manifest.take(), self.header.take()) {
            (Some(manifest), Some(header)) => Ok(Arrived {
                manifest,
                header,
                left_out: self.disk.take_left_out().map(Arc::new),
            }),
            _ => Err(refused("it is not complete")),
        }
    }

    /// Waits until the disk is hashed and written so far, except for less than 1 MiB. Returns what
    /// failed there.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.disk.drain()
    }

    /// Returns a lower bound of the bytes of the tar that are still to come. It is precise only
    /// inside a member.
    pub(super) fn missing(&self) -> u64 {
        match &self.expect {
            Expect::Body(member) => {
                let left = member.stored.saturating_sub(member.came);
                left.saturating_add(2 * BLOCK_BYTES)
            }
            _ => 0,
        }
    }

    /// Returns what the next byte belongs to, for messages.
    pub(super) fn place(&self) -> String {
        match &self.expect {
            Expect::Map(member) => format!("the sparse map of {}", member.kind.name()),
            Expect::Body(member) => format!(
                "{}, after {} of {} bytes",
                member.kind.name(),
                member.came,
                member.stored
            ),
            Expect::Padding(_) => format!("the padding after {}", self.last.unwrap_or("a header")),
            Expect::EndMark => "its end mark of two zero blocks".into(),
            Expect::Nothing => "what follows its end".into(),
            Expect::Header => match self.last {
                Some(name) => format!("the header or end mark after {name}"),
                None => "its first header".into(),
            },
        }
    }

    /// Takes the next bytes of the tar.
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            bytes = match std::mem::replace(&mut self.expect, Expect::Nothing) {
                Expect::Nothing if all_zero(bytes) => &[],
                Expect::Nothing => {
                    return Err(refused(
                        "after its end (two zero blocks) come bytes that are not zeros",
                    ));
                }
                Expect::Body(member) => self.body(member, bytes)?,
                Expect::Padding(left) => self.padding(left, bytes),
                gathering => self.gather(gathering, bytes)?,
            };
        }
        Ok(())
    }

    fn padding<'b>(&mut self, left: u64, bytes: &'b [u8]) -> &'b [u8] {
        let (padding, rest) = bytes.split_at(at_most(bytes.len(), left));
        self.expect = match left.saturating_sub(padding.len() as u64) {
            0 => Expect::Header,
            left => Expect::Padding(left),
        };
        rest
    }

    /// Collects a block and, when it is complete, takes it for what was expected.
    fn gather<'b>(&mut self, expected: Expect, bytes: &'b [u8]) -> Result<&'b [u8]> {
        let space = self.block.get_mut(self.gathered..).unwrap_or_default();
        let (some, rest) = bytes.split_at(bytes.len().min(space.len()));
        for (to, from) in space.iter_mut().zip(some) {
            *to = *from;
        }
        self.gathered = self.gathered.saturating_add(some.len());
        if self.gathered < BLOCK {
            self.expect = expected;
            return Ok(rest);
        }
        self.gathered = 0;
        self.expect = match expected {
            Expect::Map(member) => self.map(member)?,
            Expect::EndMark if all_zero(&self.block) => Expect::Nothing,
            Expect::EndMark => {
                return Err(damaged("its end mark is one zero block instead of two"));
            }
            _ if all_zero(&self.block) => self.first_zero_block()?,
            _ => self.header()?,
        };
        Ok(rest)
    }

    /// Takes the first zero block: what is missing now stays missing.
    fn first_zero_block(&mut self) -> Result<Expect> {
        if !self.pending.is_empty() {
            return Err(damaged(
                "it ends with an extension header that describes no member",
            ));
        }
        if self.manifest.is_none() {
            return Err(refused("it has no manifest.json"));
        }
        if self.digest.is_none() {
            return Err(refused("it has no disk.qcow2"));
        }
        self.check_disk()?;
        Ok(Expect::EndMark)
    }

    fn header(&mut self) -> Result<Expect> {
        let mut header = Header::new_old();
        *header.as_mut_bytes() = self.block;
        if header.cksum().ok() != Some(checksum(&self.block)) {
            return Err(match self.last {
                Some(name) => damaged(format!(
                    "the checksum of the tar header after {name} does not match"
                )),
                None => refused(
                    "it begins neither like a tar nor like a zstd file; is this a .boxlite archive?",
                ),
            });
        }
        // tar-rs takes extension types only in headers of the formats that define them.
        let extends = header.as_gnu().is_some() || header.as_ustar().is_some();
        match header.entry_type() {
            EntryType::GNULongName if extends => self.extension(MemberKind::LongName, &header),
            EntryType::GNULongLink if extends => self.extension(MemberKind::LongLink, &header),
            EntryType::XHeader if extends => self.extension(MemberKind::Pax, &header),
            _ => self.member(&header),
        }
    }

    fn extension(&mut self, kind: MemberKind, header: &Header) -> Result<Expect> {
        let twice = match kind {
            MemberKind::LongName => self.pending.long_name.is_some(),
            MemberKind::LongLink => self.pending.long_link,
            _ => self.pending.pax.is_some(),
        };
        if twice {
            return Err(damaged(
                "two extension headers of one type describe the same member",
            ));
        }
        let size = size_of(header)?;
        if size > MAX_EXTENSION {
            return Err(refused(format!(
                "an extension header of {size} bytes is over 1 MiB"
            )));
        }
        self.start(Member::whole(kind, size))
    }

    /// The header of a member proper.
    fn member(&mut self, header: &Header) -> Result<Expect> {
        let Pending { long_name, pax, .. } = std::mem::take(&mut self.pending);
        let PaxRecords { path, size } = pax.unwrap_or_default();
        let name = long_name
            .or(path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let sparse = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => false,
            EntryType::GNUSparse => true,
            other => return Err(wrong_type(&name, other)),
        };
        let kind = match self.names.meaning(&name)? {
            Meaning::Manifest => MemberKind::Manifest,
            Meaning::Disk => MemberKind::Disk,
            Meaning::Other => MemberKind::Other,
        };
        let stored = match size {
            Some(size) => size,
            None => size_of(header)?,
        };
        if stored > i64::MAX as u64 {
            return Err(damaged(format!(
                "the size of {} is impossible",
                kind.name()
            )));
        }
        if sparse {
            self.sparse(kind, stored, header)
        } else {
            self.start(Member::whole(kind, stored))
        }
    }

    fn sparse(&mut self, kind: MemberKind, stored: u64, header: &Header) -> Result<Expect> {
        let Some(gnu) = header.as_gnu() else {
            return Err(damaged(format!(
                "{} is sparse without a GNU header",
                kind.name()
            )));
        };
        let mut member = Member::whole(kind, stored);
        member.expanded = gnu.real_size().map_err(|e| {
            damaged(format!("the real size of {} is no number", kind.name())).caused_by(e)
        })?;
        member.pieces.clear();
        member.add_pieces(&gnu.sparse)?;
        if gnu.is_extended() {
            Ok(Expect::Map(member))
        } else {
            self.start_sparse(member)
        }
    }

    /// A further block of a sparse map.
    fn map(&mut self, mut member: Member) -> Result<Expect> {
        let mut block = GnuExtSparseHeader::new();
        *block.as_mut_bytes() = self.block;
        member.add_pieces(block.sparse())?;
        if block.is_extended() {
            Ok(Expect::Map(member))
        } else {
            self.start_sparse(member)
        }
    }

    fn start_sparse(&mut self, member: Member) -> Result<Expect> {
        member.check_map()?;
        self.start(member)
    }

    /// Begins a member: everything about it is known except for its contents.
    fn start(&mut self, member: Member) -> Result<Expect> {
        match member.kind {
            MemberKind::Disk => {
                // The last member of a name counts, as for programs that unpack by name.
                if self.digest.take().is_some() {
                    self.disk.begin_anew()?;
                }
                self.disk.check_room(member.stored, member.expanded)?;
            }
            MemberKind::Manifest if member.expanded > MAX_MANIFEST => {
                return Err(refused(format!(
                    "its manifest.json of {} bytes is over 1 MiB",
                    member.expanded
                )));
            }
            MemberKind::Other if member.stored > MOST_HOLES => {
                return Err(refused(format!(
                    "a member that is not kept, of {} bytes, is over {} GiB",
                    member.stored,
                    MOST_HOLES >> 30
                )));
            }
            _ => {}
        }
        self.next_piece(member)
    }

    /// Contents of the piece being read.
    fn body<'b>(&mut self, mut member: Member, bytes: &'b [u8]) -> Result<&'b [u8]> {
        let left = member.piece_left();
        let (some, rest) = bytes.split_at(at_most(bytes.len(), left));
        match member.kind {
            MemberKind::Disk => self.disk.data(some)?,
            MemberKind::Other => {}
            _ => member.bytes.extend_from_slice(some),
        }
        let count = some.len() as u64;
        member.within = member.within.saturating_add(count);
        member.came = member.came.saturating_add(count);
        member.at = member.at.saturating_add(count);
        self.expect = self.next_piece(member)?;
        Ok(rest)
    }

    /// Continues with the next piece that has data, through the holes before it, or with the end.
    fn next_piece(&mut self, mut member: Member) -> Result<Expect> {
        while let Some(&SparsePiece { offset, length }) = member.pieces.get(member.piece) {
            if member.within == 0 {
                self.hole_before(&mut member, offset)?;
            }
            if member.within < length {
                return Ok(Expect::Body(member));
            }
            member.piece = member.piece.saturating_add(1);
            member.within = 0;
        }
        self.end(member)
    }

    fn hole_before(&mut self, member: &mut Member, offset: u64) -> Result<()> {
        let zeros = offset.saturating_sub(member.at);
        match member.kind {
            MemberKind::Disk => self.disk.zeros(zeros)?,
            MemberKind::Other => {}
            // Bounded: `start` has looked at the expanded size.
            _ => member.bytes.resize(at_most(usize::MAX, offset), 0),
        }
        member.at = offset;
        Ok(())
    }

    /// Takes a member whose contents are complete.
    fn end(&mut self, member: Member) -> Result<Expect> {
        match member.kind {
            MemberKind::LongName => self.pending.long_name = Some(without_nul(member.bytes)),
            MemberKind::LongLink => self.pending.long_link = true,
            MemberKind::Pax => self.pending.pax = Some(parse_pax(&member.bytes)?),
            MemberKind::Manifest => self.manifest = Some(Manifest::parse(&member.bytes)?),
            MemberKind::Disk => self.digest = Some(self.disk.end()?),
            MemberKind::Other => {}
        }
        self.last = Some(member.kind.name());
        Ok(
            match (BLOCK_BYTES - member.stored % BLOCK_BYTES) % BLOCK_BYTES {
                0 => Expect::Header,
                padding => Expect::Padding(padding),
            },
        )
    }

    /// Checks, at the end of the archive, that the disk is the one in the manifest, and that it can
    /// be used. Not earlier, because the last member of a name counts.
    fn check_disk(&mut self) -> Result<()> {
        let (Some(manifest), Some(digest)) = (&self.manifest, &self.digest) else {
            return Ok(());
        };
        if manifest.disk_digest.is_some_and(|said| said != *digest) {
            return Err(damaged(
                "the sha256 of disk.qcow2 is not the one manifest.json says",
            ));
        }
        self.header = Some(disk::inspect_standalone(self.disk.path())?);
        Ok(())
    }
}

/// A GNU long name ends with a NUL.
fn without_nul(mut name: Vec<u8>) -> Vec<u8> {
    if name.last() == Some(&0) {
        name.pop();
    }
    name
}

fn at_most(len: usize, limit: u64) -> usize {
    usize::try_from(limit).map_or(len, |limit| len.min(limit))
}
