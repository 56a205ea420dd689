//! Numbers in the structures of an image.

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
