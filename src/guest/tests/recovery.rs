//! File systems that were not unmounted: what is in the journal counts, as after the kernel
//! replayed it.

use super::images::{Image, debugfs, mke2fs, noise, tree};
use super::kernel::{Mounted, assert_same};
use super::{contents, open, resolve};
use crate::disk::judges::{run, succeed, text};
use std::fs::{self, File};
use std::path::Path;

/// Has the kernel work on a file system and copies the image in the middle of it. None where
/// mounting is not allowed.
fn interrupted(options: &str, mount: &str) -> Option<Image> {
    let tree = tree(1024);
    let image = mke2fs("96M", options, Some(tree.path()));
    let mounted = Mounted::at(&image.path, mount)?;
    let at = |name: &str| mounted.path().join(name);
    // Much work for a small journal: it goes round, and much of it is given up again.
    for round in 0..6 {
        fs::create_dir(at("work")).unwrap();
        for n in 0..600 {
            let bytes = noise(if n % 50 == 0 { 20_000 } else { 10 }, n + round);
            fs::write(at(&format!("work/{n} in the works")), bytes).unwrap();
        }
        run("sync", &["-f", text(mounted.path())]);
        fs::rename(at("work"), at(&format!("done {round}"))).unwrap();
        if round % 2 == 0 {
            fs::remove_dir_all(at(&format!("done {round}"))).unwrap();
            // What were directories become contents.
            fs::write(at(&format!("file {round}")), noise(2 << 20, round)).unwrap();
        }
        File::open(mounted.path()).unwrap().sync_all().unwrap();
    }
    fs::remove_file(at("large")).unwrap();
    File::open(mounted.path()).unwrap().sync_all().unwrap();
    let copy = image.dir.path().join("copy.raw");
    succeed("cp", &["--sparse=always", text(&image.path), text(&copy)]);
    drop(mounted);
    Some(Image {
        path: copy,
        dir: image.dir,
    })
}

/// Whether the superblock says that the journal is to be replayed.
fn is_dirty(image: &Path) -> bool {
    let said = succeed("dumpe2fs", &["-h", text(image)]);
    said.contains("needs_recovery")
}

fn compare(options: &str, mount: &str) {
    let Some(image) = interrupted(options, mount) else {
        return;
    };
    assert!(is_dirty(&image.path));
    let guest = open(&image.path);
    let replayed = image.dir.path().join("replayed.raw");
    succeed(
        "cp",
        &["--sparse=always", text(&image.path), text(&replayed)],
    );
    // Read-only, the loop device would not let the kernel replay anything.
    drop(Mounted::at(&replayed, "rw"));
    assert!(!is_dirty(&replayed));
    let mounted = Mounted::at(&replayed, "ro").unwrap();
    assert_same(guest.file_system().unwrap(), &mounted);
}

#[test]
#[ignore = "needs programs"]
fn a_journal_with_checksums_counts() {
    compare("-t ext4 -b 1024 -J size=4 -O metadata_csum,64bit", "rw");
}

#[test]
#[ignore = "needs programs"]
fn a_journal_without_checksums_counts() {
    compare("-t ext4 -b 1024 -J size=4 -O ^metadata_csum,^64bit", "rw");
}

#[test]
#[ignore = "needs programs"]
fn a_journal_of_ext3_with_contents_in_it_counts() {
    compare("-t ext3 -b 1024 -J size=8", "rw,data=journal");
}

#[test]
#[ignore = "needs programs"]
fn a_transaction_that_is_not_complete_does_not_count() {
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("file"), vec![b'a'; 1024]).unwrap();
    let image = mke2fs("16M", "-t ext4 -b 1024", Some(tree.path()));
    let block = succeed("debugfs", &["-R", "bmap file 0", text(&image.path)]);
    let block = block.trim();
    let new = tree.path().join("new");
    let write = |byte: u8, commit: &str| {
        let mut bytes = vec![byte; 1024];
        // The journal's own magic can't be at the beginning of a block in it.
        bytes[..4].copy_from_slice(&[0xc0, 0x3b, 0x39, 0x98]);
        fs::write(&new, bytes).unwrap();
        let write = format!("journal_write -b {block} {commit} {}", text(&new));
        debugfs(&image.path, &["journal_open -c", &write, "journal_close"]);
    };
    let read = || {
        let guest = open(&image.path);
        let fs = guest.file_system().unwrap();
        contents(fs, resolve(fs, "file"))
    };
    assert!(read() == [b'a'; 1024]);
    write(b'b', "");
    let first = read();
    assert_eq!(first[..5], [0xc0, 0x3b, 0x39, 0x98, b'b']);
    write(b'c', "-c");
    assert!(read() == first, "without a commit it is not complete");
}

#[test]
#[ignore = "needs programs"]
fn a_block_that_was_given_up_is_not_replaced() {
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("file"), vec![b'a'; 1024]).unwrap();
    let image = mke2fs(
        "16M",
        "-t ext4 -b 1024 -O ^metadata_csum",
        Some(tree.path()),
    );
    let block = succeed("debugfs", &["-R", "bmap file 0", text(&image.path)]);
    let new = tree.path().join("new");
    fs::write(&new, vec![b'b'; 1024]).unwrap();
    let write = format!("journal_write -b {} {}", block.trim(), text(&new));
    let revoke = format!("journal_write -r {}", block.trim());
    debugfs(&image.path, &["journal_open", &write, "journal_close"]);
    let read = || {
        let guest = open(&image.path);
        let fs = guest.file_system().unwrap();
        contents(fs, resolve(fs, "file"))
    };
    assert!(read() == [b'b'; 1024]);
    debugfs(&image.path, &["journal_open", &revoke, "journal_close"]);
    assert!(read() == [b'a'; 1024]);
}
