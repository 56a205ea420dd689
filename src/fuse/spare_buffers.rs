//! Buffers that are used again.

use parking_lot::Mutex;

/// The most buffers that are kept. A program that writes a file has one on the way, mostly.
const MOST_KEPT: usize = 4;

/// Buffers for the bytes of writes. Each is as large as a write: a new one would be a mapping of
/// its own, which is faulted in page by page and removed again.
#[derive(Default)]
pub(super) struct SpareBuffers(Mutex<Vec<Vec<u8>>>);

impl SpareBuffers {
    /// Returns a buffer with a copy of these bytes.
    pub fn copy_of(&self, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = self.0.lock().pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Takes a buffer back.
    pub fn put(&self, buffer: Vec<u8>) {
        let mut kept = self.0.lock();
        if kept.len() < MOST_KEPT {
            kept.push(buffer);
        }
    }
}
