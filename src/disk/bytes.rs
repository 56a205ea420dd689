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

/// Cuts a range of bytes at the ends of clusters. Returns the offset and the length of each piece.
pub(super) fn pieces(offset: u64, length: u64, cluster: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut at, end) = (offset, offset.saturating_add(length));
    std::iter::from_fn(move || {
        let len = (cluster - at % cluster).min(end - at);
        let piece = (at, len);
        at += len;
        (len > 0).then_some(piece)
    })
}

/// Reads the entries of a table: big-endian numbers, one after the other.
pub(super) fn entries_of(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect()
}

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
