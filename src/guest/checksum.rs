//! The checksums of file systems and partition tables.

use crc::{Algorithm, CRC_32_ISCSI, CRC_32_ISO_HDLC, Crc, Table};

/// CRC-32C as ext4 uses it: nothing is inverted, the caller brings the value to begin with.
const EXT4: Algorithm<u32> = Algorithm {
    xorout: 0,
    residue: 0,
    ..CRC_32_ISCSI
};
static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&EXT4);
static CRC32: Crc<u32, Table<1>> = Crc::<u32, Table<1>>::new(&CRC_32_ISO_HDLC);

/// CRC-32C of `parts` one after another, going on from `seed` (`!0` at a beginning).
pub(super) fn crc32c(seed: u32, parts: &[&[u8]]) -> u32 {
    // The crate takes the first value the other way round than it gives the last.
    let mut digest = CRC32C.digest_with_initial(seed.reverse_bits());
    for part in parts {
        digest.update(part);
    }
    digest.finalize()
}

/// The CRC-32 of zip and of GUID partition tables.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    CRC32.checksum(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_known_ones_in_pieces_too() {
        assert_eq!(!crc32c(!0, &[b"123456789"]), 0xe306_9283);
        let first = crc32c(!0, &[b"1234"]);
        assert_eq!(!crc32c(first, &[b"56", b"", b"789"]), 0xe306_9283);
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
