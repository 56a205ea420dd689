//! Opens and walks a hostile guest: file systems and partition tables with a few changed bytes.
//!
//! The first byte of an input selects the image, the rest says how to change it
//! ([`Canvas::change`]). `BOXLITEFS_FUZZ_KEEP=FILE` saves the changed image, to examine it with
//! other programs.

#![no_main]

use boxlitefs::disk::Chain;
use boxlitefs::guest::{FileKind, FileSystem, Guest};
use boxlitefs_fuzz::patches::Canvas;
use boxlitefs_fuzz::scratch;
use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};

/// The walk of the unit tests.
#[path = "../../../src/guest/tests/walk.rs"]
mod walk;

/// A larger walk would only repeat the same code.
const LIMITS: walk::Limits = walk::Limits {
    files: 150,
    names: 400,
    searched: 1 << 20,
};

struct Images {
    directory: PathBuf,
    all: Vec<Canvas>,
}

static IMAGES: LazyLock<Mutex<Images>> = LazyLock::new(|| {
    let directory = scratch::directory();
    let found = std::fs::read_dir(scratch::made("images")).unwrap();
    let mut paths: Vec<PathBuf> = found.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let canvas = |path: PathBuf| Canvas::of(&path, directory.join(path.file_name().unwrap()));
    let all = paths.into_iter().map(canvas).collect();
    Mutex::new(Images { directory, all })
});

fuzz_target!(|input: &[u8]| {
    let Some((which, changes)) = input.split_first() else {
        return;
    };
    let mut images = IMAGES.lock().unwrap();
    let Images { directory, all } = &mut *images;
    let which = usize::from(*which) % all.len();
    let image = &mut all[which];
    image.change(changes);
    if let Some(path) = std::env::var_os("BOXLITEFS_FUZZ_KEEP") {
        std::fs::write(path, image.all()).unwrap();
    }
    let owner = scratch::owner(directory);
    let chain = Arc::new(Chain::open(image.path(), directory, owner).unwrap());
    if let Ok(guest) = Guest::open(chain, &std::sync::Arc::default()) {
        walk::look_at(&guest, LIMITS);
    }
    image.restore();
});
