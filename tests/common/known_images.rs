//! Results of qemu-img, remembered by the bytes of the image. A test asks about the same image after each
//! change that must leave it alone, and qemu-img takes longer to start than the image takes to read.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// An image of more bytes, chain included, is asked about each time.
const MOST_BYTES: usize = 16 << 20;
/// So is a chain of more images.
const MOST_LAYERS: usize = 32;

/// Results by the hash of an image and its chain: their paths and bytes.
pub struct Results<T>(Mutex<BTreeMap<[u8; 32], T>>);

impl<T: Clone> Results<T> {
    pub const fn new() -> Results<T> {
        Results(Mutex::new(BTreeMap::new()))
    }

    /// Returns the result for the image: a remembered one if its bytes are the same, else that of `ask`.
    pub fn of(&self, image: &Path, ask: impl FnOnce() -> T) -> T {
        let Some(hash) = chain_hash(image) else {
            return ask();
        };
        let known = self.0.lock().expect("the results").get(&hash).cloned();
        known.unwrap_or_else(|| {
            let result = ask();
            let mut results = self.0.lock().expect("the results");
            results.insert(hash, result.clone());
            result
        })
    }
}

/// Hashes the paths and bytes of an image and its backing chain. None for an image that this can't follow.
fn chain_hash(image: &Path) -> Option<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut left = MOST_BYTES;
    let mut path = image.to_owned();
    for _ in 0..MOST_LAYERS {
        left = left.checked_sub(usize::try_from(fs::metadata(&path).ok()?.len()).ok()?)?;
        let bytes = fs::read(&path).ok()?;
        hasher.update(path.as_os_str().as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
        match backing_file(&bytes, &path)? {
            Some(backing) => path = backing,
            None => return Some(hasher.finalize().into()),
        }
    }
    None
}

/// Where an image's header says that it reads from (qcow2 v3: offset and length at byte 8).
fn backing_file(bytes: &[u8], path: &Path) -> Option<Option<PathBuf>> {
    let number = |at: usize, length: usize| {
        let bytes = bytes.get(at..at + length)?;
        let number = bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        usize::try_from(number).ok()
    };
    // An image with a data file of its own, or with what is not known here, says so in these bits.
    if bytes.get(..4)? != b"QFI\xfb" || number(72, 8)? != 0 {
        return None;
    }
    let (at, length) = (number(8, 8)?, number(16, 4)?);
    if at == 0 {
        return Some(None);
    }
    let name = bytes.get(at..at.checked_add(length)?)?;
    Some(Some(path.parent()?.join(OsStr::from_bytes(name))))
}
