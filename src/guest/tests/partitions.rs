//! Disks with partitions, as sfdisk and the kernel see them.

use super::images::{mke2fs, noise};
use super::{FileSystem, Guest, chain, contents, open, resolve};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// A disk of 64 MiB with the table that sfdisk makes of a script.
fn partitioned(script: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(64 * MIB).unwrap();
    partition(&path, &[], script);
    (dir, path)
}

/// Writes the table that sfdisk makes of a script to a disk.
fn partition(disk: &Path, options: &[&str], script: &str) {
    let mut sfdisk = Command::new("sfdisk")
        .args(["-q", "--wipe=never", "--no-tell-kernel"])
        .args(options)
        .arg(disk)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = sfdisk.stdin.take().unwrap();
    input.write_all(script.as_bytes()).unwrap();
    drop(input);
    assert!(sfdisk.wait().unwrap().success());
}

/// Writes a file system with one file into a disk.
fn put_file_system(disk: &Path, at: u64, said: &str) {
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("who"), said).unwrap();
    let image = mke2fs("4M", "-t ext4 -b 1024", Some(tree.path()));
    let disk = File::options().write(true).open(disk).unwrap();
    disk.write_all_at(&fs::read(&image.path).unwrap(), at)
        .unwrap();
}

fn who(fs: &FileSystem) -> String {
    String::from_utf8(contents(fs, resolve(fs, "who"))).unwrap()
}

/// Where the partitions of a disk are, as sfdisk lists them: number, first sector, sectors.
fn as_sfdisk_says(disk: &Path) -> Vec<(u32, u64, u64)> {
    let all = ["-J", disk.to_str().unwrap()];
    let said = crate::disk::judges::succeed("sfdisk", &all);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let partitions = said["partitiontable"]["partitions"].as_array().unwrap();
    let one = |partition: &serde_json::Value| {
        let node = partition["node"].as_str().unwrap();
        let digits = node.rfind(|c: char| !c.is_ascii_digit()).unwrap() + 1;
        let number = node[digits..].parse().unwrap();
        let sectors = |of: &str| partition[of].as_u64().unwrap();
        (number, sectors("start"), sectors("size"))
    };
    partitions.iter().map(one).collect()
}

fn assert_places(guest: &Guest, disk: &Path) {
    let said: Vec<_> = guest
        .partitions()
        .iter()
        .map(|p| (p.number(), p.span.start / 512, p.span.len / 512))
        .collect();
    let expected: Vec<_> = as_sfdisk_says(disk)
        .into_iter()
        .filter(|(number, _, _)| guest.partition(*number).is_some())
        .collect();
    assert_eq!(said, expected);
}

#[test]
#[ignore = "needs programs"]
fn partitions_of_a_gpt_have_the_numbers_linux_gives_them() {
    let script = "label: gpt\n1: start=2048, size=16384\n3: start=20480, size=16384\n\
                  4: start=40960, size=8192\n";
    let (_dir, disk) = partitioned(script);
    put_file_system(&disk, 2048 * 512, "first");
    put_file_system(&disk, 20480 * 512, "third");
    let guest = open(&disk);
    assert!(guest.file_system().is_none());
    assert_places(&guest, &disk);
    let fs = |number| guest.partition(number).unwrap().file_system();
    assert_eq!(who(fs(1).unwrap()), "first");
    assert_eq!(who(fs(3).unwrap()), "third");
    assert_eq!(guest.partitions().len(), 3);
    assert!(guest.partition(2).is_none());
    let error = fs(4).err().unwrap();
    assert_eq!(error.errno(), libc::EIO);
    assert!(error.to_string().contains("p4"), "{error}");
    // The header is lost, its copy at the end is not.
    let file = File::options().write(true).open(&disk).unwrap();
    file.write_all_at(&[0; 512], 512).unwrap();
    assert_eq!(open(&disk).partitions().len(), 3);
}

#[test]
#[ignore = "needs programs"]
fn a_gpt_for_sectors_of_4096_bytes_is_read_as_one() {
    let (_dir, disk) = partitioned("label: dos\n");
    File::create(&disk).unwrap().set_len(64 * MIB).unwrap();
    // This sfdisk may not know other sectors than a file's, so the table is moved.
    let sector = 4096;
    let script = "label: gpt\nfirst-lba: 34\n1: start=256, size=2048\n2: start=2304, size=2048\n";
    let small = disk.with_extension("small");
    File::create(&small).unwrap().set_len(64 * MIB / 8).unwrap();
    partition(&small, &[], script);
    let small = fs::read(small).unwrap();
    let file = File::options().write(true).open(&disk).unwrap();
    let (sectors, last) = (small.len() / 512, small.len() / 512 - 1);
    let part = |number: usize| &small[number * 512..number * 512 + 512];
    file.write_all_at(part(0), 0).unwrap();
    file.write_all_at(part(1), sector).unwrap();
    file.write_all_at(part(last), sector * last as u64).unwrap();
    // The entries take 32 sectors of 512 bytes, and begin where the headers say.
    for first in [2, sectors - 33] {
        let entries = &small[first * 512..(first + 32) * 512];
        file.write_all_at(entries, sector * first as u64).unwrap();
    }
    put_file_system(&disk, 256 * sector, "first");
    put_file_system(&disk, 2304 * sector, "second");
    for lost in [None, Some(sector)] {
        if let Some(at) = lost {
            file.write_all_at(&[0; 512], at).unwrap();
        }
        let guest = open(&disk);
        let fs = |number| guest.partition(number).unwrap().file_system().unwrap();
        assert_eq!((who(fs(1)), who(fs(2))), ("first".into(), "second".into()));
        assert_eq!(guest.partitions().len(), 2);
    }
}

#[test]
#[ignore = "needs programs"]
fn partitions_hide_the_file_system_that_was_there_before() {
    let dir = tempfile::tempdir().unwrap();
    for (script, number) in [
        ("label: dos\n1: start=2048, size=16384, type=83\n", 1),
        ("label: gpt\n3: start=2048, size=16384\n", 3),
    ] {
        // Once it can still be read, once what its root had is overwritten.
        for is_whole in [true, false] {
            let tree = dir.path().join("tree");
            fs::create_dir_all(&tree).unwrap();
            fs::write(tree.join("who"), "before").unwrap();
            let image = mke2fs("64M", "-t ext4 -b 4096", Some(&tree));
            let old = open(&image.path);
            assert_eq!(who(old.file_system().unwrap()), "before");
            partition(&image.path, &[], script);
            if !is_whole {
                let file = File::options().write(true).open(&image.path).unwrap();
                file.write_all_at(&noise(512 << 10, 1), 4096 * 2).unwrap();
            }
            put_file_system(&image.path, 2048 * 512, "now");
            let guest = open(&image.path);
            assert!(guest.file_system().is_none(), "{script}");
            let partition = guest.partition(number).unwrap();
            assert_eq!(who(partition.file_system().unwrap()), "now");
        }
    }
}

#[test]
#[ignore = "needs programs"]
fn a_table_without_file_systems_hides_nothing() {
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("who"), "whole").unwrap();
    for script in [
        "label: dos\n",
        "label: dos\n1: start=40960, size=2048, type=83\n",
    ] {
        let image = mke2fs("64M", "-t ext4 -b 4096", Some(tree.path()));
        partition(&image.path, &[], script);
        assert_eq!(who(open(&image.path).file_system().unwrap()), "whole");
    }
}

#[test]
#[ignore = "needs programs"]
fn logical_partitions_of_an_mbr_count_from_five() {
    let script = "label: dos\n1: start=2048, size=16384, type=83\n\
                  2: start=20480, size=81920, type=5\n\
                  5: start=22528, size=16384, type=83\n6: start=40960, size=16384, type=83\n";
    let (_dir, disk) = partitioned(script);
    put_file_system(&disk, 2048 * 512, "first");
    put_file_system(&disk, 22528 * 512, "fifth");
    put_file_system(&disk, 40960 * 512, "sixth");
    let guest = open(&disk);
    assert_places(&guest, &disk);
    let numbers: Vec<_> = guest.partitions().iter().map(|p| p.number()).collect();
    assert_eq!(numbers, [1, 5, 6]);
    for (number, said) in [(1, "first"), (5, "fifth"), (6, "sixth")] {
        assert_eq!(
            who(guest.partition(number).unwrap().file_system().unwrap()),
            said
        );
    }
}

#[test]
#[ignore = "needs programs"]
fn a_chain_of_logical_partitions_that_goes_round_ends() {
    let script = "label: dos\n1: start=2048, size=81920, type=5\n5: start=4096, size=2048\n";
    let (_dir, disk) = partitioned(script);
    let file = File::options().write(true).open(&disk).unwrap();
    // The second entry before p5 leads to itself.
    let entry = [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0];
    file.write_all_at(&entry, 2048 * 512 + 462).unwrap();
    assert!(open(&disk).partitions().len() <= 256);
}

#[test]
#[ignore = "needs programs"]
fn a_disk_with_nothing_known_says_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    let errno = |bytes: &[u8]| {
        fs::write(&disk, bytes).unwrap();
        let error = Guest::open(chain(&disk), &Arc::default()).err().unwrap();
        (error.errno(), error.to_string())
    };
    let mut bytes = vec![0; 1 << 20];
    assert_eq!(errno(&bytes).0, libc::EIO);
    assert_eq!(errno(&[]).0, libc::EIO);
    bytes[..4].copy_from_slice(b"XFSB");
    assert!(errno(&bytes).1.contains("XFS"));
    assert_eq!(errno(&noise(1 << 16, 1)).0, libc::EIO);
}
