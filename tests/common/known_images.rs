//! What qemu-img said of images, by their bytes: tests ask for the same image again after every change that
//! should have left it alone, and a program takes longer to start than to read it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// An image of more bytes, chain included, is asked about each time.
const MOST_BYTES: usize = 16 << 20;
/// So is a chain of more images.
const MOST_LAYERS: usize = 32;

/// What a judge said of an image and its chain, of those bytes under those paths.
pub struct Said<T>(Mutex<Option<HashMap<blake3::Hash, T>>>);

impl<T: Clone> Said<T> {
    pub const fn new() -> Said<T> {
        Said(Mutex::new(None))
    }

    /// What was said before of the same bytes, else what `ask` says now.
    pub fn of(&self, image: &Path, ask: impl FnOnce() -> T) -> T {
        let Some(bytes) = chain_hash(image) else {
            return ask();
        };
        let known = |said: &Option<HashMap<_, T>>| said.as_ref()?.get(&bytes).cloned();
        if let Some(said) = known(&self.0.lock().expect("what was said")) {
            return said;
        }
        let said = ask();
        let mut all = self.0.lock().expect("what was said");
        all.get_or_insert_default().insert(bytes, said.clone());
        said
    }
}

/// Of the paths and bytes of an image and of all that it reads from; None for what this does not follow.
fn chain_hash(image: &Path) -> Option<blake3::Hash> {
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
            None => return Some(hasher.finalize()),
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
