//! Numbers in the structures of an image.

/// Bits 9–55 of an L1, L2 or refcount table entry: a host offset (qcow2.rst).
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63 of an L1 or L2 entry: the refcount is exactly 1, so a writer need not copy. BoxLite leaves
/// it unset (qcow2.rst).
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the rest describes compressed data (qcow2.rst).
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: the cluster reads as zeros, whatever lies below (qcow2.rst, version
/// 3).
pub(super) const ZERO: u64 = 1;

/// Returns `len` bytes of `bytes` from `at`, if they exist.
pub(super) fn slice(bytes: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    bytes.get(at..at.checked_add(usize::try_from(len).ok()?)?)
}

/// Reads a big-endian u32 at `at`; bytes past the end are zeros.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |four| u32::from_be_bytes(*four))
}

/// Reads a big-endian u64 at `at`; bytes past the end are zeros.
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |eight| u64::from_be_bytes(*eight))
}
