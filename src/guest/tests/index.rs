//! Names found by the indexes of directories, judged by listings and the kernel.

use super::images::{Image, debugfs, mke2fs};
use super::{Entry, FileSystem, list, open, resolve};
use crate::disk::judges::{run, succeed, text};
use crate::guest::block_map::BlockMap;
use crate::guest::directory_blocks::DirectoryBlocks;
use crate::guest::hash_index::{ByIndex, HashIndex};
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// An image whose directory `many` has `count` names, some of them not ASCII, and an index that
/// e2fsck made after `change`.
fn indexed(options: &str, count: usize, change: impl FnOnce(&Path)) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let many = dir.path().join("many");
    fs::create_dir(&many).unwrap();
    let files: Vec<_> = (0..count.div_ceil(60_000))
        .map(|number| many.join(format!("file {number}")))
        .collect();
    for file in &files {
        fs::write(file, "x").unwrap();
    }
    for number in files.len()..count {
        let name = match number % 3 {
            0 => format!("{number:x}").into_bytes(),
            1 => format!("größe ÿ {number}").into_bytes(),
            _ => [
                &b"\xff\x80 a name of some length, as there are many "[..],
                &[b'a'; 9],
            ]
            .concat()
            .into_iter()
            .chain(number.to_string().into_bytes())
            .collect(),
        };
        let name = many.join(std::ffi::OsStr::from_bytes(&name));
        fs::hard_link(&files[number % files.len()], name).unwrap();
    }
    let image = mke2fs("64M", options, Some(dir.path()));
    change(&image.path);
    let output = run("e2fsck", &["-fyD", text(&image.path)]);
    assert!(output.status.code().is_some_and(|code| code <= 1));
    image
}

/// What the index of a directory says of a name.
fn find_by_index(fs: &FileSystem, directory: u32, name: &[u8]) -> ByIndex {
    let inode = &fs.blocks.inode(directory).unwrap();
    let blocks = &fs.blocks;
    HashIndex::of(DirectoryBlocks { blocks, inode }).find(name)
}

/// Where the first block of a file is on disk.
fn first_block(fs: &FileSystem, inode: u32) -> u64 {
    let inode = fs.blocks.inode(inode).unwrap();
    let run = BlockMap::of(&fs.blocks, &inode).run_at(0).unwrap();
    run.block.unwrap()
}

/// How many names the index finds, and how many there are.
fn found_by_index(fs: &FileSystem, directory: &str) -> (usize, usize) {
    let inode = resolve(fs, directory);
    let names = list(fs, inode, 1000).unwrap();
    let found = |(name, (inode_of, _)): &(&Vec<u8>, &(u32, _))| {
        find_by_index(fs, inode, name) == ByIndex::Found(*inode_of)
    };
    (names.iter().filter(found).count(), names.len())
}

#[test]
#[ignore = "needs programs"]
fn every_name_is_found_by_the_index_whatever_it_is_sorted_by() {
    for options in [
        "-t ext4 -b 1024 -O metadata_csum",
        "-t ext3 -b 1024",
        "-t ext4 -b 4096 -O ^metadata_csum,large_dir",
    ] {
        for (alg, flags) in [
            ("half_md4", 1),
            ("half_md4", 2),
            ("tea", 1),
            ("tea", 2),
            ("legacy", 2),
        ] {
            let image = indexed(options, 4000, |image| {
                succeed("tune2fs", &["-E", &format!("hash_alg={alg}"), text(image)]);
                debugfs(image, &[&format!("ssv flags {flags}")]);
            });
            let guest = open(&image.path);
            let fs = guest.file_system().unwrap();
            assert_eq!(
                found_by_index(fs, "many"),
                (4000, 4000),
                "{options} {alg} {flags}"
            );
            let inode = resolve(fs, "many");
            for name in [&b"none"[..], b"\xff none", &[b'x'; 255], b""] {
                assert_eq!(find_by_index(fs, inode, name), ByIndex::Missing);
                assert_eq!(fs.lookup(inode, name).unwrap(), None);
            }
        }
    }
}

#[test]
#[ignore = "needs programs"]
fn an_index_of_several_levels_finds_every_name() {
    // Some five times what an index of one level has room for.
    const COUNT: usize = 9000;
    let image = indexed("-t ext4 -b 1024 -O ^metadata_csum", COUNT, |_| ());
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let root = resolve(fs, "many");
    let block = first_block(fs, root);
    assert_eq!(
        fs.blocks.metadata_block(block).unwrap()[24 + 6],
        1,
        "levels"
    );
    assert_eq!(found_by_index(fs, "many"), (COUNT, COUNT));
}

#[test]
#[ignore = "needs programs"]
fn a_directory_without_an_index_that_can_be_used_is_looked_through() {
    let usable = |image: &Image| {
        let guest = open(&image.path);
        let fs = guest.file_system().unwrap();
        let (found, all) = found_by_index(fs, "many");
        let many = resolve(fs, "many");
        for name in list(fs, many, 1000).unwrap().keys() {
            assert!(fs.lookup(many, name).unwrap().is_some());
        }
        assert_eq!(fs.lookup(many, b"none").unwrap(), None);
        found == all
    };
    let options = "-t ext4 -b 1024 -O ^metadata_csum";
    assert!(usable(&indexed(options, 4000, |_| ())));
    // The superblock does not say how bytes count.
    let image = indexed(options, 4000, |_| ());
    debugfs(&image.path, &["ssv flags 0"]);
    assert!(!usable(&image));
    let image = indexed(options, 4000, |_| ());
    debugfs(&image.path, &["feature -dir_index"]);
    assert!(!usable(&image));
    // The root is damaged, in each of its fields.
    let block = {
        let guest = open(&image.path);
        let fs = guest.file_system().unwrap();
        let many = resolve(fs, "many");
        first_block(fs, many)
    };
    debugfs(&image.path, &["feature dir_index"]);
    let file = File::options()
        .write(true)
        .read(true)
        .open(&image.path)
        .unwrap();
    for (at, bytes) in [
        (24, &[1][..]),
        (28, &[6]),
        (29, &[9]),
        (30, &[3]),
        (31, &[1]),
        (32, &[0xff, 0xff]),
        (34, &[0, 0]),
        (34, &[0xff, 0xff]),
        (36, &[0xff, 0xff, 0xff]),
    ] {
        let mut before = vec![0; bytes.len()];
        let at = block * 1024 + at;
        file.read_exact_at(&mut before, at).unwrap();
        file.write_all_at(bytes, at).unwrap();
        assert!(!usable(&image), "{at} {bytes:?}");
        file.write_all_at(&before, at).unwrap();
    }
    assert!(usable(&image));
}

#[test]
#[ignore = "needs programs"]
fn checksums_of_an_index_are_heeded() {
    let image = indexed("-t ext4 -b 1024 -O metadata_csum", 4000, |_| ());
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let many = resolve(fs, "many");
    let block = first_block(fs, many);
    // The hash from which the second entry counts is another.
    let file = File::options()
        .write(true)
        .read(true)
        .open(&image.path)
        .unwrap();
    let (mut byte, at) = ([0], block * 1024 + 32 + 8);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 2], at).unwrap();
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    assert_eq!(find_by_index(fs, many, b"none"), ByIndex::Unusable);
    let name = b"file 0";
    assert!(fs.lookup(many, name).unwrap().is_some());
}

#[test]
#[ignore = "needs programs"]
fn a_listing_goes_on_where_it_was_without_reading_what_is_before() {
    const COUNT: usize = 9000;
    let image = indexed("-t ext4 -b 1024", COUNT, |_| ());
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let many = resolve(fs, "many");
    let (mut names, mut from, mut count) = (Vec::new(), 0, 0);
    loop {
        let before = count;
        fs.list(many, from, &mut |Entry { name, next, .. }| {
            names.push(name.to_vec());
            (from, count) = (next, count + 1);
            ControlFlow::Break(())
        })
        .unwrap();
        if count == before {
            break;
        }
    }
    names.sort();
    names.dedup();
    assert_eq!((count, names.len()), (COUNT, COUNT));
}
