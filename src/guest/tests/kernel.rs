//! What the kernel says of the same image.

use super::images::{Image, ODD, debugfs, index_directories, mke2fs, noise, tree};
use super::{Attributes, FileKind, FileSystem, contents, list, open, resolve};
use crate::disk::judges::{run, succeed, text};
use rustix::fs::SeekFrom;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// An image mounted by the kernel, until dropped.
pub struct Mounted(TempDir);

impl Mounted {
    /// None where mounting is not allowed; the reason is printed.
    pub fn at(image: &Path, options: &str) -> Option<Mounted> {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("loop,noatime,{options}");
        let output = run("mount", &["-o", &options, text(image), text(dir.path())]);
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            eprintln!("not compared with the kernel: {why}");
            return None;
        }
        Some(Mounted(dir))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[text(self.0.path())]);
    }
}

/// Everything the kernel and the reader say of a tree is the same.
pub fn assert_same(fs: &FileSystem, mounted: &Mounted) {
    let mut left = vec![(FileSystem::ROOT, mounted.path().to_owned())];
    let mut seen = BTreeSet::new();
    while let Some((inode, path)) = left.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let said = fs.attributes(inode).unwrap();
        assert_eq!(u64::from(inode), meta.ino(), "{path:?}");
        assert_attributes(&said, &meta, &path);
        assert_eq!(xattrs(fs, inode), kernel_xattrs(&path), "{path:?}");
        match said.kind {
            FileKind::Directory => left.extend(same_names(fs, inode, &path)),
            FileKind::Symlink => {
                let target = fs::read_link(&path).unwrap();
                assert_eq!(fs.read_link(inode).unwrap(), target.as_os_str().as_bytes());
            }
            FileKind::Regular if seen.insert(inode) => assert_contents(fs, inode, &path),
            _ => {}
        }
    }
}

/// The names in a directory are the same; what is to be looked at next.
fn same_names(fs: &FileSystem, inode: u32, path: &Path) -> Vec<(u32, PathBuf)> {
    let names = list(fs, inode, 77).unwrap();
    let kernel: BTreeSet<Vec<u8>> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
        .collect();
    assert_eq!(
        names.keys().cloned().collect::<BTreeSet<_>>(),
        kernel,
        "{path:?}"
    );
    for (name, (inode_of, kind)) in &names {
        assert_eq!(fs.lookup(inode, name).unwrap(), Some(*inode_of));
        let is = fs.attributes(*inode_of).unwrap().kind;
        assert!(kind.is_none_or(|kind| kind == is), "{name:?}");
    }
    assert_eq!(fs.lookup(inode, b"no such name").unwrap(), None);
    let below =
        |(name, (inode, _)): (Vec<u8>, _)| (inode, path.join(std::ffi::OsStr::from_bytes(&name)));
    names.into_iter().map(below).collect()
}

fn assert_attributes(said: &Attributes, meta: &Metadata, path: &Path) {
    let kind = match meta.file_type() {
        t if t.is_file() => FileKind::Regular,
        t if t.is_dir() => FileKind::Directory,
        t if t.is_symlink() => FileKind::Symlink,
        t if t.is_char_device() => FileKind::CharDevice,
        t if t.is_block_device() => FileKind::BlockDevice,
        t if t.is_fifo() => FileKind::Fifo,
        _ => FileKind::Socket,
    };
    let time = |time: super::Time| (time.seconds, i64::from(time.nanoseconds));
    assert_eq!(said.kind, kind, "{path:?}");
    assert_eq!(
        u32::from(said.permissions),
        meta.mode() & 0o7777,
        "{path:?}"
    );
    assert_eq!(u64::from(said.links), meta.nlink(), "{path:?}");
    assert_eq!((said.uid, said.gid), (meta.uid(), meta.gid()), "{path:?}");
    assert_eq!(
        (said.size, said.blocks),
        (meta.size(), meta.blocks()),
        "{path:?}"
    );
    assert_eq!(said.device, meta.rdev(), "{path:?}");
    assert_eq!(
        time(said.accessed),
        (meta.atime(), meta.atime_nsec()),
        "{path:?}"
    );
    assert_eq!(
        time(said.modified),
        (meta.mtime(), meta.mtime_nsec()),
        "{path:?}"
    );
    assert_eq!(
        time(said.changed),
        (meta.ctime(), meta.ctime_nsec()),
        "{path:?}"
    );
    let created = meta.created().ok().map(|time| {
        let since = time
            .duration_since(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        (since.as_secs() as i64, i64::from(since.subsec_nanos()))
    });
    assert_eq!(said.created.map(time), created, "{path:?}");
}

/// Contents and holes, read in several ways.
fn assert_contents(fs: &FileSystem, inode: u32, path: &Path) {
    // First the holes: what was set aside counts as data once the kernel has pages of it.
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    for is_data in [true, false] {
        for at in (0..len + 2).step_by(511.max(len as usize / 300)) {
            let said = if is_data {
                fs.next_data(inode, at).unwrap()
            } else {
                fs.next_hole(inode, at).unwrap()
            };
            assert_eq!(
                said,
                seek(&file, at, is_data),
                "{path:?} at {at}, {is_data}"
            );
        }
    }
    let expected = fs::read(path).unwrap();
    assert!(contents(fs, inode) == expected, "{path:?}");
    for (at, len) in [
        (0, 1),
        (4095, 2),
        (1_000_000, 100_000),
        (expected.len() - expected.len().min(3), 9),
    ] {
        let mut buf = vec![0xaa; len];
        let read = fs.read_at(inode, at as u64, &mut buf).unwrap();
        let end = expected.len().min(at + len);
        assert!(
            buf[..read] == expected[at.min(end)..end],
            "{path:?} at {at}"
        );
    }
}

fn seek(file: &File, at: u64, is_data: bool) -> Option<u64> {
    let from = if is_data {
        SeekFrom::Data(at)
    } else {
        SeekFrom::Hole(at)
    };
    rustix::fs::seek(file, from).ok()
}

fn xattrs(fs: &FileSystem, inode: u32) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let names = fs.xattr_names(inode).unwrap();
    let value = |name: Vec<u8>| {
        let value = fs.xattr(inode, &name).unwrap().unwrap();
        (name, value)
    };
    assert_eq!(fs.xattr(inode, b"user.none").unwrap(), None);
    names.into_iter().map(value).collect()
}

fn kernel_xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut buf = vec![0; 1 << 17];
    let len = rustix::fs::llistxattr(path, &mut buf[..]).unwrap_or(0);
    let names = buf[..len].split(|byte| *byte == 0);
    let value = |name: &[u8]| {
        let mut value = vec![0; 1 << 17];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap_or(0);
        value.truncate(len);
        (name.to_vec(), value)
    };
    names.filter(|name| !name.is_empty()).map(value).collect()
}

/// Makes an image with every kind of file, and compares.
fn compare(options: &str, block: usize) {
    let tree = tree(block);
    let image = mke2fs("96M", options, Some(tree.path()));
    debugfs(&image.path, ODD);
    compare_image(&image);
    index_directories(&image.path);
    compare_image(&image);
}

fn compare_image(image: &Image) {
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    if let Some(mounted) = Mounted::at(&image.path, "ro") {
        assert_same(fs, &mounted);
    }
}

#[test]
#[ignore = "needs programs"]
fn ext2_with_blocks_of_1k_is_as_the_kernel_says() {
    compare("-t ext2 -b 1024", 1024);
}

#[test]
#[ignore = "needs programs"]
fn ext3_with_short_inodes_is_as_the_kernel_says() {
    compare("-t ext3 -b 4096 -I 128", 4096);
}

#[test]
#[ignore = "needs programs"]
fn ext4_as_it_is_made_today_is_as_the_kernel_says() {
    compare("-t ext4 -b 4096", 4096);
}

#[test]
#[ignore = "needs programs"]
fn ext4_with_blocks_of_1k_and_no_checksums_is_as_the_kernel_says() {
    compare("-t ext4 -b 1024 -O ^metadata_csum,^64bit", 1024);
}

#[test]
#[ignore = "needs programs"]
fn ext4_with_data_in_inodes_is_as_the_kernel_says() {
    compare("-t ext4 -b 1024 -O inline_data,metadata_csum,64bit", 1024);
}

#[test]
#[ignore = "needs programs"]
fn ext4_with_descriptors_here_and_there_is_as_the_kernel_says() {
    compare(
        "-t ext4 -b 1024 -g 1024 -O meta_bg,^resize_inode,^flex_bg",
        1024,
    );
}

#[test]
#[ignore = "needs programs"]
fn ext4_with_clusters_is_as_the_kernel_says() {
    compare("-t ext4 -b 4096 -O bigalloc -C 16384", 4096);
}

#[test]
#[ignore = "needs programs"]
fn a_short_link_with_an_attribute_block_is_as_the_kernel_says() {
    // Short inodes have no room for attributes: the link, whose target is in its inode, has a
    // block.
    for options in [
        "-t ext4 -b 4096 -I 128 -O bigalloc,^has_journal -C 65536",
        "-t ext4 -b 1024 -I 128 -O bigalloc,^has_journal -C 16384",
        "-t ext4 -b 4096 -I 128 -O ^has_journal",
        "-t ext2 -b 1024 -I 128",
    ] {
        let image = mke2fs("64M", options, None);
        let Some(mounted) = Mounted::at(&image.path, "rw") else {
            return;
        };
        let link = mounted.path().join("link");
        std::os::unix::fs::symlink("target", &link).unwrap();
        succeed(
            "setfattr",
            &["-h", "-n", "trusted.name", "-v", "value", text(&link)],
        );
        drop(mounted);
        let guest = open(&image.path);
        let fs = guest.file_system().unwrap();
        let link = resolve(fs, "link");
        assert_eq!(fs.read_link(link).unwrap(), b"target", "{options}");
        assert_eq!(fs.xattr_names(link).unwrap(), [b"trusted.name"]);
        compare_image(&image);
    }
}

#[test]
#[ignore = "needs programs"]
fn ext2_whose_directories_tell_no_kinds_is_as_the_kernel_says() {
    compare("-t ext2 -b 1024 -O ^filetype", 1024);
}

#[test]
#[ignore = "needs programs"]
fn files_the_kernel_wrote_are_as_it_says() {
    let image = mke2fs("128M", "-t ext4 -b 1024 -O ea_inode,metadata_csum", None);
    let Some(mounted) = Mounted::at(&image.path, "rw") else {
        return;
    };
    let at = |name: &str| mounted.path().join(name);
    let set = |name: &str, value: &str, path: &Path| {
        succeed("setfattr", &["-n", name, "-v", value, text(path)]);
    };
    fs::create_dir(at("indexed")).unwrap();
    for n in 0..20_000 {
        File::create(at(&format!("indexed/{n} of twenty thousand"))).unwrap();
    }
    fs::write(at("file"), noise(100_000, 3)).unwrap();
    set("user.short", "value", &at("file"));
    set("user.long", &"v".repeat(500), &at("file"));
    set("user.longer", &"w".repeat(20_000), &at("file"));
    succeed("fallocate", &["-l", "3M", text(&at("set aside"))]);
    let file = File::options().write(true).open(at("set aside")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(5000, 4), 1 << 20).unwrap();
    succeed("setfacl", &["-m", "u:1234:rw,g:99:r", text(&at("file"))]);
    succeed("setfacl", &["-dm", "u:1234:rwx", text(&at("indexed"))]);
    drop(file);
    drop(mounted);
    compare_image(&image);
}

#[test]
#[ignore = "needs programs"]
fn what_was_set_aside_and_never_written_is_zeros_and_a_hole() {
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("secret"), noise(1 << 20, 9)).unwrap();
    let image = mke2fs("8M", "-t ext4 -b 1024", Some(tree.path()));
    fs::write(tree.path().join("file"), "").unwrap();
    debugfs(
        &image.path,
        &[
            "rm secret",
            &format!("write {} file", text(&tree.path().join("file"))),
            "fallocate file 0 1023",
            "sif file size 1048576",
        ],
    );
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let inode = resolve(fs, "file");
    assert!(fs.attributes(inode).unwrap().blocks >= 2048);
    assert!(contents(fs, inode).iter().all(|byte| *byte == 0));
    assert_eq!(fs.next_data(inode, 0).unwrap(), None);
    assert_eq!(fs.next_hole(inode, 5).unwrap(), Some(5));
}
