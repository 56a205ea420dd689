//! Shared code of the fuzz targets.
//!
//! A target turns the fuzzer's bytes into untrusted input and passes it through all of the code
//! that reads such input. These are failures: a panic, a call that takes ten seconds, memory beyond
//! a constant, and two answers that contradict each other.

pub mod memory;
pub mod patches;
pub mod repair;
pub mod scratch;

/// Returns whether all of `bytes` are zeros. It compares blocks, because the fuzzer instruments
/// each comparison of single bytes.
pub fn are_zeros(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(4096).all(|some| *some == ZEROS[..some.len()])
}
