//! Finds the sizes of frames without compressing what was compressed before.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::super::compressed::Compressed;
use super::super::workers::{FrameNumbers, for_each, given_up};
use super::keys::{FrameKey, Origin};
use super::table::FrameSizes;
use crate::Result;

/// The part of the archive that may be compressed just to find its size, as a divisor: these bytes
/// are compressed again when they are read.
const WORTH_MEASURING: u64 = 8;

/// Known sizes of frames, by key.
pub trait KnownSizes: Sync {
    /// Returns the compressed size of the frame with this key.
    fn size(&self, key: &FrameKey) -> Option<u32>;
    /// Remembers the size of the frame with this key.
    fn learn(&self, key: FrameKey, size: u32);
}

/// Finds the size of each frame, and makes only those that were never seen. None when these are so
/// many that [`produce`](super::super::produce) is better.
///
/// # Errors
/// As [`produce`](super::super::produce).
pub fn measure(
    of: &Compressed,
    known: &dyn KnownSizes,
    go_on: &dyn Fn() -> bool,
) -> Result<Option<FrameSizes>> {
    let found = Mutex::new((FrameSizes::empty(of), Vec::new()));
    let missing = AtomicU64::new(0);
    let worth = of.export().len() / WORTH_MEASURING;
    let too_many = || missing.load(Ordering::Relaxed) > worth;
    for_each(of, &mut FrameNumbers::all(of), go_on, &|frame, raw, _| {
        if too_many() {
            return Err(given_up());
        }
        match recognised(of, frame, raw, known)? {
            Some(size) => found.lock().0.set(frame, size as usize),
            None => {
                missing.fetch_add(raw.len() as u64, Ordering::Relaxed);
                found.lock().1.push(frame);
            }
        }
        Ok(())
    })
    .or_else(|error| if too_many() { Ok(()) } else { Err(error) })?;
    if too_many() {
        return Ok(None);
    }
    let (sizes, unknown) = found.into_inner();
    let sizes = Mutex::new(sizes);
    for_each(
        of,
        &mut FrameNumbers::of(unknown),
        go_on,
        &|frame, raw, encoder| {
            let mut made = Vec::new();
            of.read(frame, raw)?;
            encoder.encode(raw, &mut made)?;
            learn(of.key(&of.origin(frame)?, raw), made.len(), known);
            sizes.lock().set(frame, made.len());
            Ok(())
        },
    )?;
    let mut sizes = sizes.into_inner();
    sizes.place();
    Ok(Some(sizes))
}

/// Returns the size of a frame that was seen before. If it was not, or was at another place, its
/// bytes are in `raw` afterwards.
fn recognised(
    of: &Compressed,
    frame: u64,
    raw: &mut Vec<u8>,
    known: &dyn KnownSizes,
) -> Result<Option<u32>> {
    raw.clear();
    if of.range(frame)?.is_empty() {
        return Ok(Some(0));
    }
    let origin = of.origin(frame)?;
    if let Origin::Frozen(key) = &origin
        && let Some(size) = known.size(key)
    {
        return Ok(Some(size));
    }
    of.read(frame, raw)?;
    let size = known.size(&of.content_key(raw));
    if let (Origin::Frozen(key), Some(size)) = (origin, size) {
        known.learn(key, size);
    }
    Ok(size)
}

/// Remembers the size of the frame with this key.
pub fn learn(key: FrameKey, size: usize, known: &dyn KnownSizes) {
    if let Ok(size) = u32::try_from(size) {
        known.learn(key, size);
    }
}
