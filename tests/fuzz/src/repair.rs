//! Repairs checksums after a change, where the code stops at a wrong checksum: in the superblock,
//! in a journal and in a GUID partition table. (Checksums of inodes and directories stay wrong:
//! most images have none, and the code behind them is the same as without checksums.)

use crate::patches::Canvas;
use crc::{Algorithm, CRC_32_ISCSI, CRC_32_ISO_HDLC, Crc};

const EXT4: Algorithm<u32> = Algorithm {
    xorout: 0,
    residue: 0,
    ..CRC_32_ISCSI
};
static CRC32C: Crc<u32> = Crc::<u32>::new(&EXT4);
static CRC32: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

fn crc32c(seed: u32, parts: &[&[u8]]) -> u32 {
    let mut digest = CRC32C.digest_with_initial(seed.reverse_bits());
    for part in parts {
        digest.update(part);
    }
    digest.finalize()
}

/// Repairs all checksums that the image has.
pub fn checksums(image: &mut Canvas) {
    superblock(image);
    journal(image);
    for header in [512, image.all().len().saturating_sub(512)] {
        gpt(image, header);
    }
}

fn superblock(image: &mut Canvas) {
    const AT: usize = 1024;
    const MAGIC: [u8; 2] = [0x53, 0xef];
    if image.get(AT + 0x38, 2) == MAGIC {
        let sum = crc32c(!0, &[image.get(AT, 0x3fc)]);
        image.put(AT + 0x3fc, &sum.to_le_bytes());
    }
}

/// Repairs a GPT header. The partition table comes first, because the header contains its checksum.
fn gpt(image: &mut Canvas, at: usize) {
    if image.get(at, 8) != b"EFI PART" {
        return;
    }
    let le32 = |image: &Canvas, place: usize| {
        let bytes = image.get(at + place, 4).try_into();
        bytes.map_or(0, u32::from_le_bytes) as usize
    };
    let len = le32(image, 80).saturating_mul(le32(image, 84));
    let table = image.get(le32(image, 72).saturating_mul(512), len);
    if table.len() == len {
        let sum = CRC32.checksum(table);
        image.put(at + 88, &sum.to_le_bytes());
    }
    let len = le32(image, 12).clamp(20, 512);
    let parts = [image.get(at, 16), &[0; 4], image.get(at + 20, len - 20)];
    let sum = CRC32.checksum(&parts.concat());
    image.put(at + 16, &sum.to_le_bytes());
}

/// Repairs the journal. Finds its blocks by their magic number; the superblock comes first, and
/// each descriptor is followed by the blocks it describes.
fn journal(image: &mut Canvas) {
    const MAGIC: [u8; 4] = 0xc03b_3998_u32.to_be_bytes();
    const BLOCK: usize = 1024;
    let be32 = |image: &Canvas, at: usize| {
        let bytes = image.get(at, 4).try_into();
        bytes.map_or(0, u32::from_be_bytes)
    };
    let found = |image: &Canvas, at: &usize| image.get(*at, 4) == MAGIC;
    let blocks: Vec<usize> = (0..image.all().len())
        .step_by(BLOCK)
        .filter(|at| found(image, at))
        .collect();
    let Some(sb) = blocks.iter().copied().find(|at| be32(image, at + 4) == 4) else {
        return;
    };
    let (v2, v3) = (
        be32(image, sb + 0x28) & 8 != 0,
        be32(image, sb + 0x28) & 16 != 0,
    );
    if !v2 && !v3 {
        return;
    }
    let parts = [
        image.get(sb, 0xfc),
        &[0; 4],
        image.get(sb + 0x100, 1024 - 0x100),
    ];
    let sum = crc32c(!0, &parts);
    image.put(sb + 0xfc, &sum.to_be_bytes());
    let seed = crc32c(!0, &[image.get(sb + 0x30, 16)]);
    for at in blocks {
        match be32(image, at + 4) {
            1 if v3 => tags(image, at, seed),
            2 => {
                let parts = [image.get(at, 16), &[0; 4], image.get(at + 20, BLOCK - 20)];
                let sum = crc32c(seed, &parts);
                image.put(at + 16, &sum.to_be_bytes());
            }
            _ => {}
        }
        if matches!(be32(image, at + 4), 1 | 5) {
            let sum = crc32c(seed, &[image.get(at, BLOCK - 4), &[0; 4]]);
            image.put(at + BLOCK - 4, &sum.to_be_bytes());
        }
    }
}

/// Repairs a descriptor's checksums of the blocks that follow it.
fn tags(image: &mut Canvas, at: usize, seed: u32) {
    const BLOCK: usize = 1024;
    let sequence = image.get(at + 8, 4).to_vec();
    let (mut tag, mut block) = (at + 12, at + BLOCK);
    while tag + 16 <= at + BLOCK - 4 {
        let sum = crc32c(seed, &[&sequence, image.get(block, BLOCK)]);
        image.put(tag + 12, &sum.to_be_bytes());
        let flags = image.get(tag + 7, 1).first().copied().unwrap_or(8);
        if flags & 8 != 0 {
            break;
        }
        tag += if flags & 2 != 0 { 16 } else { 32 };
        block += BLOCK;
    }
}
