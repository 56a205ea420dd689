//! What the fuzz targets have in common.
//!
//! A target gets bytes of the fuzzer's, makes of them what could come from outside, and asks the code
//! for all there is. What must not happen: a panic, a call that takes ten seconds, more memory than a
//! constant, and an answer that another one contradicts.

pub mod memory;
pub mod patches;
pub mod repair;
pub mod scratch;

/// Whether all of `bytes` are zeros. Compared at once: byte by byte, each would be told to the fuzzer.
pub fn are_zeros(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(4096).all(|some| *some == ZEROS[..some.len()])
}
