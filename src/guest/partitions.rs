//! Partition tables: MBR with logical partitions, and GPT.

use super::checksum::crc32;
use super::disk::{Disk, Volume};
use super::fields::Fields;
use super::superblock;
use crate::Result;
use std::sync::Arc;

/// The unit of an MBR in bytes, and the sector size of most disks.
const SECTOR: u64 = 512;
/// The sector sizes that a GPT may be made for, the usual one first.
const GPT_SECTORS: [u64; 2] = [SECTOR, 4096];
/// The table's place in an MBR, and bytes of each of its four entries.
const TABLE_AT: usize = 446;
const ENTRY: usize = 16;
/// The partition type in an MBR that stands for a GPT.
const PROTECTIVE: u8 = 0xee;
/// As many as the kernel shows of one disk. A chain of logical partitions could be endless.
const MAX_PARTITIONS: usize = 256;

/// Where a partition is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PartitionSpan {
    /// Its number, as Linux counts: logical partitions of an MBR from 5 on.
    pub number: u32,
    /// Its first byte.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Returns the partitions of a disk, by number; None if it has no table.
pub(super) fn find(disk: &Arc<Disk>) -> Result<Option<Vec<PartitionSpan>>> {
    let volume = Volume::new(disk.clone(), 0, disk.len(), "the disk".into());
    let mut sector = [0; SECTOR as usize];
    volume.peek(0, &mut sector)?;
    let Some(table) = MbrTable::parse(&sector) else {
        return Ok(None);
    };
    if table.0.iter().any(|entry| entry.kind == PROTECTIVE)
        && let Some(spans) = gpt(&volume, disk.len())?
    {
        return Ok(Some(spans));
    }
    mbr(&volume, &table).map(Some)
}

/// Returns whether partitions are possible: each begins on the disk, and after its first sector.
pub(super) fn can_be(disk: &Disk, spans: &[PartitionSpan]) -> bool {
    let can_be = |span: &PartitionSpan| (SECTOR..disk.len()).contains(&span.start);
    !spans.is_empty() && spans.iter().all(can_be)
}

/// Returns whether a disk has partitions, even if it looks as if one file system takes all of it.
///
/// Making a file system on a whole disk overwrites the first sector, and a table there with it. So
/// the table is newer, and the superblock is a remainder, if the partitions are possible and one of
/// them has a known file system.
pub(super) fn hide_a_file_system(disk: &Arc<Disk>, spans: &[PartitionSpan]) -> Result<bool> {
    if !can_be(disk, spans) {
        return Ok(false);
    }
    for PartitionSpan { start, len, .. } in spans {
        let volume = Volume::new(disk.clone(), *start, *len, "a partition".into());
        if superblock::is_known(&volume)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// One of four entries.
struct MbrEntry {
    kind: u8,
    first: u64,
    sectors: u64,
}

impl MbrEntry {
    /// Returns whether it is a partition that has others in it.
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn is_used(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn place(&self, number: u32, base: u64) -> PartitionSpan {
        PartitionSpan {
            number,
            start: base.saturating_add(self.first).saturating_mul(SECTOR),
            len: self.sectors.saturating_mul(SECTOR),
        }
    }
}

/// The table in an MBR, or in the sector before a logical partition.
struct MbrTable([MbrEntry; 4]);

impl MbrTable {
    /// None if the sector has no table. The first sector of a FAT file system ends with the same
    /// signature, so the entries must make sense too.
    fn parse(sector: &[u8]) -> Option<MbrTable> {
        let fields = Fields(sector);
        if fields.le16(510) != 0xaa55 {
            return None;
        }
        let at = |index: usize| TABLE_AT + index * ENTRY;
        if (0..4).any(|index| fields.u8(at(index)) & 0x7f != 0) {
            return None;
        }
        Some(MbrTable([0, 1, 2, 3].map(|index| MbrEntry {
            kind: fields.u8(at(index) + 4),
            first: u64::from(fields.le32(at(index) + 8)),
            sectors: u64::from(fields.le32(at(index) + 12)),
        })))
    }
}

/// Returns the partitions of an MBR.
fn mbr(volume: &Volume, table: &MbrTable) -> Result<Vec<PartitionSpan>> {
    let mut spans = Vec::new();
    for (number, entry) in (1..).zip(&table.0) {
        if entry.is_used() && !entry.is_extended() {
            spans.push(entry.place(number, 0));
        }
    }
    for entry in table
        .0
        .iter()
        .filter(|entry| entry.is_used() && entry.is_extended())
    {
        logical(volume, entry.first, &mut spans)?;
    }
    Ok(spans)
}

/// Adds the logical partitions of the extended one that begins at sector `extended`: each has a
/// table before it, which says where the next one is.
fn logical(volume: &Volume, extended: u64, spans: &mut Vec<PartitionSpan>) -> Result<()> {
    let mut at = extended;
    for _ in 0..MAX_PARTITIONS {
        let mut sector = [0; SECTOR as usize];
        volume.peek(at.saturating_mul(SECTOR), &mut sector)?;
        let Some(MbrTable(entries)) = MbrTable::parse(&sector) else {
            return Ok(());
        };
        let mut next = None;
        for entry in entries.iter().filter(|entry| entry.is_used()) {
            if entry.is_extended() {
                next = next.or(Some(entry.first));
            } else if spans.len() < MAX_PARTITIONS {
                let number = spans
                    .iter()
                    .map(|span| span.number)
                    .max()
                    .unwrap_or(0)
                    .max(4)
                    + 1;
                spans.push(entry.place(number, at));
            }
        }
        match next {
            Some(next) => at = extended.saturating_add(next),
            None => return Ok(()),
        }
    }
    Ok(())
}

/// Returns the partitions of a GPT, by its header in the second sector or the copy in the last;
/// None if there is neither. The size of a sector follows from where the header is.
fn gpt(volume: &Volume, len: u64) -> Result<Option<Vec<PartitionSpan>>> {
    for sector in GPT_SECTORS {
        for header in [1, (len / sector).saturating_sub(1)] {
            if let Some(spans) = gpt_at(volume, sector, header)? {
                return Ok(Some(spans));
            }
        }
    }
    Ok(None)
}

/// Returns the partitions of the GPT whose header is in this sector.
fn gpt_at(volume: &Volume, sector: u64, header: u64) -> Result<Option<Vec<PartitionSpan>>> {
    const MAX_TABLE: usize = 1 << 20;
    let mut bytes = [0; SECTOR as usize];
    volume.peek(header.saturating_mul(sector), &mut bytes)?;
    let fields = Fields(&bytes);
    let len = fields.le32(12) as usize;
    let parts = [
        fields.bytes(0, 16),
        &[0; 4],
        fields.bytes(20, len.saturating_sub(20)),
    ];
    let is_one = fields.bytes(0, 8) == b"EFI PART"
        && (92..=SECTOR as usize).contains(&len)
        && crc32(&parts.concat()) == fields.le32(16)
        && fields.le64(24) == header;
    let (count, size) = (fields.le32(80) as usize, fields.le32(84) as usize);
    if !is_one || size < 128 || count.saturating_mul(size) > MAX_TABLE {
        return Ok(None);
    }
    let mut table = vec![0; count * size];
    let at = fields.le64(72).saturating_mul(sector);
    volume.peek(at, &mut table)?;
    if crc32(&table) != fields.le32(88) {
        return Ok(None);
    }
    let spans = (1..)
        .zip(table.chunks_exact(size))
        .filter_map(|(number, entry)| {
            let entry = Fields(entry);
            let (first, last) = (entry.le64(32), entry.le64(40));
            let used = entry.bytes(0, 16) != [0; 16] && first <= last;
            used.then(|| PartitionSpan {
                number,
                start: first.saturating_mul(sector),
                len: (last - first).saturating_add(1).saturating_mul(sector),
            })
        });
    Ok(Some(spans.take(MAX_PARTITIONS).collect()))
}
