//! A cache of qemu-img results, keyed by the bytes of the image. Tests ask about the same image
//! after each change that must leave it alone, and starting qemu-img takes longer than reading the
//! image.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The largest image, including its chain, that is cached.
const MOST_BYTES: usize = 16 << 20;
/// The longest chain that is cached.
const MOST_LAYERS: usize = 32;

/// Results keyed by a hash over the paths and bytes of an image and its chain.
pub struct Results<T>(Mutex<BTreeMap<[u8; 32], T>>);

impl<T: Clone> Results<T> {
    pub const fn new() -> Results<T> {
        Results(Mutex::new(BTreeMap::new()))
    }

    /// Returns the cached result for the image, or calls `ask` and caches its result.
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

/// Hashes the paths and bytes of an image and its backing chain. Returns None if it cannot follow
/// the chain.
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

/// Returns the backing file named in an image's header (qcow2 v3: offset at byte 8, length at 16).
fn backing_file(bytes: &[u8], path: &Path) -> Option<Option<PathBuf>> {
    let number = |at: usize, length: usize| {
        let bytes = bytes.get(at..at + length)?;
        let number = bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        usize::try_from(number).ok()
    };
    // Incompatible features: an external data file, or something unknown here.
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
