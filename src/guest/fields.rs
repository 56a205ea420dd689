//! Numbers in structures read from disk.

/// The bytes of a structure. What lies past their end reads as zero: formats grew at their ends,
/// and zero is what a field means where it is not there yet.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The `N` bytes at `at`.
    pub fn array<const N: usize>(self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        let end = at.saturating_add(N).min(self.0.len());
        if let Some(there) = self.0.get(at..end) {
            for (byte, value) in bytes.iter_mut().zip(there) {
                *byte = *value;
            }
        }
        bytes
    }

    /// The `len` bytes at `at`, as far as they are there.
    pub fn bytes(self, at: usize, len: usize) -> &'a [u8] {
        let end = at.saturating_add(len).min(self.0.len());
        self.0.get(at..end).unwrap_or_default()
    }

    /// The byte at `at`.
    pub fn u8(self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// Two bytes, the low one first.
    pub fn le16(self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    /// Four bytes, the lowest first.
    pub fn le32(self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// Eight bytes, the lowest first.
    pub fn le64(self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    /// Two bytes, the high one first: the journal is the other way round than the rest.
    pub fn be16(self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    /// Four bytes, the highest first.
    pub fn be32(self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    /// Eight bytes, the highest first.
    pub fn be64(self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    /// A number kept in two places, since it outgrew the first.
    pub fn le32_and(self, low: usize, high: u32) -> u64 {
        u64::from(high) << 32 | u64::from(self.le32(low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_zero() {
        let fields = Fields(&[1, 2, 3]);
        assert_eq!(fields.le16(0), 0x0201);
        assert_eq!(fields.le32(1), 0x0302);
        assert_eq!(fields.be32(2), 0x0300_0000);
        assert_eq!(fields.le64(usize::MAX), 0);
        assert_eq!(fields.u8(3), 0);
        assert_eq!(fields.bytes(2, 9), [3]);
        assert!(fields.bytes(9, 9).is_empty());
    }
}
