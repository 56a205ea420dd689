//! Reads a hostile qcow2 image: alone, on top of a good image, or below one. The target inspects it
//! like an imported image, opens it as a chain, reads, exports and rebases it.
//!
//! The first byte of an input contains options, the rest is the image. Its backing file may be
//! `base.raw` or `base.qcow2`, which have the same contents.

#![no_main]

use boxlitefs::disk::{
    Chain, DataSource, Extent, Flattened, Header, chain_paths, inspect_standalone, rebase,
};
use boxlitefs_fuzz::{are_zeros, scratch};
use libfuzzer_sys::fuzz_target;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

/// Lengths of a hole after the image, so that its tables can point far beyond its data.
const TAILS: [u64; 4] = [0, 64 << 10, 1 << 20, 256 << 20];
/// Bytes of one guest read.
const READ: u64 = 128 << 10;
/// The largest disk that is exported; an export reads all of the tables.
const EXPORTED: u64 = 1 << 30;
/// The largest export that is read.
const COMPARED: u64 = 512 << 10;

static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let directory = scratch::directory();
    for name in ["base.raw", "base.qcow2", "above.qcow2"] {
        fs::copy(scratch::made("chain").join(name), directory.join(name)).unwrap();
    }
    directory
});

fuzz_target!(|input: &[u8]| {
    let Some((how, image)) = input.split_first() else {
        return;
    };
    let top = DIRECTORY.join("top.qcow2");
    let file = File::create(&top).unwrap();
    file.write_all_at(image, 0).unwrap();
    let len = image.len() as u64 + TAILS[usize::from(how & 3)];
    file.set_len(len).unwrap();

    let accepted = inspect_standalone(&top).is_ok();
    let above = how & 4 != 0;
    let path = match above {
        true => DIRECTORY.join("above.qcow2"),
        false => top.clone(),
    };
    let _ = chain_paths(&path);
    let chain = open(&path);
    if accepted {
        assert!(chain.is_some(), "cannot open an accepted image");
    }
    let Some(chain) = chain else {
        return;
    };
    let size = chain.virtual_size();
    let begin = 0..size.min(READ);
    for range in [begin.clone(), size / 2..size / 2 + READ, tail(size)] {
        let extents = extents(&chain, range);
        assert!(
            !accepted || extents.is_some(),
            "cannot read an accepted image"
        );
    }
    for layer in chain.layers() {
        let _ = layer.holds_data();
    }
    if size <= EXPORTED {
        export(&chain);
    }
    chain.unchanged().unwrap();
    if how & 8 != 0 {
        rebased(&top, &chain, begin, above);
    }
});

fn open(path: &Path) -> Option<Arc<Chain>> {
    let owner = scratch::owner(&DIRECTORY);
    Chain::open(path, &DIRECTORY, owner).ok().map(Arc::new)
}

/// Returns a range around the end of a disk.
fn tail(size: u64) -> Range<u64> {
    let start = size.saturating_sub(READ / 2);
    start..start.saturating_add(READ)
}

/// Returns the extents of a range. Fails if they leave gaps or contradict the data.
fn extents(chain: &Chain, range: Range<u64>) -> Option<Vec<Extent>> {
    let extents = chain.extents(range.clone()).ok()?;
    let mut at = range.start;
    for extent in &extents {
        assert!(extent.guest == at && extent.len > 0);
        at += extent.len;
    }
    assert_eq!(at, range.end);
    let mut whole = vec![0x55; (range.end - range.start) as usize];
    if chain.read_at(range.start, &mut whole).is_err() {
        // Compressed clusters may be invalid.
        return Some(extents);
    }
    for extent in extents.iter().take(100) {
        let at = (extent.guest - range.start) as usize;
        let there = &whole[at..at + extent.len as usize];
        let mut again = vec![0xaa; there.len()];
        chain.read_at(extent.guest, &mut again).unwrap();
        assert!(there == again, "two reads differ");
        if extent.source == DataSource::Zero {
            assert!(are_zeros(there), "data in an extent of zeros");
        }
    }
    Some(extents)
}

/// Flattens the chain, and compares one read of the whole export with reads of its parts.
fn export(chain: &Arc<Chain>) {
    let Ok(image) = Flattened::plan(chain.clone()) else {
        return;
    };
    if image.len() > COMPARED {
        return;
    }
    let mut whole = vec![0x55; image.len() as usize];
    if image.read_at(0, &mut whole).is_err() {
        return;
    }
    assert!(whole.starts_with(b"QFI\xfb"));
    let mut some = vec![0xaa; 70_000];
    for (at, part) in (0..).step_by(some.len()).zip(whole.chunks(some.len())) {
        image.read_at(at, &mut some).unwrap();
        assert!(some[..part.len()] == *part, "two reads of an export differ");
    }
}

/// Rebases the image onto a base with the same contents; the disk must not change. If `above`, the
/// chain has another image on top of it, and the disks are not compared.
fn rebased(top: &Path, chain: &Chain, begin: Range<u64>, above: bool) {
    let on_a_base = |header: &Header| {
        let path = header
            .backing
            .as_ref()
            .map(|backing| backing.path.as_path());
        path == Some(Path::new("base.raw")) || path == Some(Path::new("base.qcow2"))
    };
    let found = Header::open(top).ok().flatten();
    let same = found.is_some_and(|header| on_a_base(&header));
    let mut before = vec![0; begin.end as usize];
    let read = chain.read_at(0, &mut before).is_ok();
    for name in ["base.qcow2", "./base.qcow2", "base.raw"] {
        if rebase(top, Path::new(name)).is_err() {
            continue;
        }
        let header = Header::open(top).unwrap().unwrap();
        assert_eq!(header.backing.unwrap().path, Path::new(name));
        if above || !same || !read {
            continue;
        }
        let mut after = vec![0; before.len()];
        open(top).unwrap().read_at(0, &mut after).unwrap();
        assert!(before == after, "a rebase changed the disk");
    }
}
