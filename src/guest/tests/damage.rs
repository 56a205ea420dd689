//! Images that are damaged at random, or on purpose: nothing panics, nothing goes on for ever.

use super::images::{Image, debugfs, index_directories, mke2fs, noise};
use super::walk::{Limits, look_at};
use super::{Guest, chain, open, resolve};
use crate::disk::judges::{Numbers, succeed, text};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::sync::Arc;

/// A small image that is nearly all structures.
fn small(options: &str) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for n in 0..150 {
        fs::create_dir_all(at(&format!("many/directory {n}"))).unwrap();
        fs::write(at(&format!("many/a file, number {n}")), noise(40, n + 1)).unwrap();
    }
    symlink("target", at("fast")).unwrap();
    symlink("t".repeat(200), at("slow")).unwrap();
    fs::create_dir_all(at("a/b/c")).unwrap();
    for (name, target) in [
        ("absolute", "/many/directory 1"),
        ("high", "../../../../fast"),
        ("back", "../b/../../../a"),
        ("through", "absolute/../../../many"),
        ("loop", "loop/../.."),
    ] {
        symlink(target, at("a/b").join(name)).unwrap();
        symlink(target, at("a").join(name)).unwrap();
    }
    let holes = File::create(at("holes")).unwrap();
    for n in 0..200 {
        holes.write_all_at(&[7; 1024], 2048 * n).unwrap();
    }
    let image = mke2fs("3M", options, Some(dir.path()));
    let commands = [
        "mknod device c 1 3",
        "ea_set fast user.name value",
        "ea_set holes user.x y",
    ];
    debugfs(&image.path, &commands);
    index_directories(&image.path);
    image
}

/// A small image is looked at as a whole.
const LIMITS: Limits = Limits {
    files: 2000,
    names: 20_000,
    searched: u64::MAX,
};

/// Damages an image in `rounds` ways, a few bytes each, and walks through it. `make test` has a
/// slice of them (`EXTENT`, see CONTRIBUTING.md); one that does not end is ended by whoever runs
/// the tests.
fn damage(image: &Image, rounds: u64, seed: u64) {
    let rounds = match std::env::var("EXTENT").as_deref() {
        Err(_) | Ok("" | "slice") => rounds / 5,
        Ok(_) => rounds,
    };
    let good = fs::read(&image.path).unwrap();
    let used: Vec<u64> = (0..good.len() as u64)
        .filter(|at| good[*at as usize] != 0)
        .collect();
    let file = File::options().write(true).open(&image.path).unwrap();
    let mut numbers = Numbers(seed);
    let mut opened = 0;
    for _ in 0..rounds {
        let bytes: Vec<u64> = (0..1 + numbers.below(8))
            .map(|_| match numbers.below(4) {
                // Near to something, for what is zero counts too.
                0 => (used[numbers.below(used.len() as u64) as usize] + numbers.below(64))
                    .min(good.len() as u64 - 1),
                _ => used[numbers.below(used.len() as u64) as usize],
            })
            .collect();
        for at in &bytes {
            let byte = match numbers.below(4) {
                0 => 0xff,
                1 => 0,
                2 => good[*at as usize] ^ (1 << numbers.below(8)),
                _ => numbers.below(256) as u8,
            };
            file.write_all_at(&[byte], *at).unwrap();
        }
        if let Ok(guest) = Guest::open(chain(&image.path), &Arc::default()) {
            opened += 1;
            look_at(&guest, LIMITS);
        }
        for at in &bytes {
            file.write_all_at(&[good[*at as usize]], *at).unwrap();
        }
    }
    assert!(opened > rounds / 20, "hardly any could be opened");
}

#[test]
#[ignore = "needs programs"]
fn damaged_ext2_ends_in_errors() {
    damage(&small("-t ext2 -b 1024"), 1000, 1);
}

#[test]
#[ignore = "needs programs"]
fn damaged_ext4_ends_in_errors() {
    damage(
        &small("-t ext4 -b 1024 -O ^metadata_csum,^has_journal"),
        1000,
        2,
    );
}

#[test]
#[ignore = "needs programs"]
fn damaged_inline_data_ends_in_errors() {
    let options = "-t ext4 -b 1024 -O inline_data,^metadata_csum,^has_journal";
    damage(&small(options), 1000, 3);
}

#[test]
#[ignore = "needs programs"]
fn damage_is_seen_by_checksums() {
    damage(
        &small("-t ext4 -b 1024 -O metadata_csum,^has_journal"),
        300,
        4,
    );
}

#[test]
#[ignore = "needs programs"]
fn a_damaged_journal_ends_in_errors() {
    let image = small("-t ext4 -b 1024 -J size=1 -O ^metadata_csum");
    let block = tempfile::NamedTempFile::new().unwrap();
    fs::write(block.path(), noise(40 * 1024, 7)).unwrap();
    let blocks: Vec<String> = (1000..1040).map(|n| n.to_string()).collect();
    let write = format!(
        "journal_write -b {} {}",
        blocks.join(","),
        text(block.path())
    );
    debugfs(
        &image.path,
        &[
            "journal_open",
            &write,
            "journal_write -r 900,901",
            "journal_close",
        ],
    );
    damage(&image, 600, 5);
}

#[test]
#[ignore = "needs programs"]
fn absurd_superblocks_take_neither_memory_nor_time() {
    let image = small("-t ext4 -b 1024 -O ^metadata_csum,64bit,^has_journal");
    let file = File::options()
        .read(true)
        .write(true)
        .open(&image.path)
        .unwrap();
    let mut good = [0; 1024];
    file.read_exact_at(&mut good, 1024).unwrap();
    for at in (0..0x180).step_by(4) {
        for value in [0, 1, 6, 0xffff, 0x7fff_ffff, 0xffff_ffff_u32] {
            let mut bad = good;
            bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
            file.write_all_at(&bad, 1024).unwrap();
            if let Ok(guest) = Guest::open(chain(&image.path), &Arc::default()) {
                look_at(&guest, LIMITS);
            }
        }
    }
}

/// Where a block of a file is, as debugfs says.
fn block_of(image: &Image, file: &str, number: u32) -> u32 {
    let command = format!("bmap {file} {number}");
    let said = succeed("debugfs", &["-R", &command, text(&image.path)]);
    said.trim().parse().unwrap()
}

#[test]
#[ignore = "needs programs"]
fn a_directory_that_has_one_block_again_and_again_is_refused() {
    let image = small("-t ext2 -b 1024");
    let file = File::options().write(true).open(&image.path).unwrap();
    let first = block_of(&image, "many", 0);
    let mut commands = vec!["sif many size 1073741824".to_owned()];
    commands.extend((0..12).map(|n| format!("sif many block[{n}] {first}")));
    // Three blocks that nothing uses, for the numbers of that block, of those, and of those again.
    let mut number = first;
    for (name, table) in [("IND", 3060u32), ("DIND", 3061), ("TIND", 3062)] {
        let bytes = number.to_le_bytes().repeat(256);
        file.write_all_at(&bytes, 1024 * u64::from(table)).unwrap();
        commands.push(format!("sif many block[{name}] {table}"));
        number = table;
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    debugfs(&image.path, &commands);
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let error = fs.lookup(resolve(fs, "many"), b"no such name").unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    assert!(error.to_string().contains("impossible size"), "{error}");
}

#[test]
#[ignore = "needs programs"]
fn a_journal_that_is_larger_than_its_disk_is_refused() {
    let image = small("-t ext3 -b 1024 -J size=1");
    let commands = ["journal_open", "journal_write -r 900", "journal_close"];
    debugfs(&image.path, &commands);
    assert!(open(&image.path).file_system().is_some());
    let file = File::options().write(true).open(&image.path).unwrap();
    let at = 1024 * u64::from(block_of(&image, "<8>", 0));
    file.write_all_at(&(1u32 << 20).to_be_bytes(), at + 0x10)
        .unwrap();
    let error = Guest::open(chain(&image.path), &Arc::default())
        .err()
        .unwrap();
    assert!(error.to_string().contains("larger than"), "{error}");
}
