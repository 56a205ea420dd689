//! A small file system for a home, for tests of full disks and of file system features.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{TestHome, run, succeed, text};

/// A kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileSystem {
    /// The most common file system.
    Ext4,
    /// Shares blocks among files.
    Xfs,
    /// Shares blocks among files and writes nothing in place.
    Btrfs,
    /// Ext4 with 128-byte inodes: timestamps in whole seconds, no birth time.
    SmallInodes,
    /// Its timestamps have the granularity of the kernel's clock tick, some milliseconds.
    Ext2,
}

impl FileSystem {
    /// Returns the type for mount(8).
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 | FileSystem::SmallInodes => "ext4",
            FileSystem::Ext2 => "ext2",
            FileSystem::Xfs => "xfs",
            FileSystem::Btrfs => "btrfs",
        }
    }

    /// Returns the mkfs command without the image.
    fn make(self) -> &'static [&'static str] {
        match self {
            FileSystem::Ext4 => &["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096"],
            FileSystem::Xfs => &["mkfs.xfs", "-q", "-f"],
            // Small file systems should mix data and metadata.
            FileSystem::Btrfs => &["mkfs.btrfs", "-q", "-f", "--mixed"],
            FileSystem::SmallInodes => &["mkfs.ext4", "-q", "-F", "-m", "0", "-I", "128"],
            FileSystem::Ext2 => &["mkfs.ext2", "-q", "-F", "-m", "0"],
        }
    }

    /// Returns the smallest size that the tests use.
    pub fn smallest(self) -> &'static str {
        match self {
            FileSystem::Ext4 | FileSystem::SmallInodes | FileSystem::Ext2 => "64M",
            FileSystem::Xfs => "320M",
            FileSystem::Btrfs => "128M",
        }
    }
}

/// A file system in an image file, mounted at the root of a home until it is dropped. If the
/// kernel cannot mount it, the test fails and says so.
pub struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// Moves the home onto a new file system of that size.
    pub fn under(home: &TestHome, kind: FileSystem, size: &str) -> SmallDisk {
        let image = home.beside("small.img");
        let at = home.root().to_owned();
        home.put_aside("aside");
        succeed(&["truncate", "-s", size, text(&image)]);
        let mut make = kind.make().to_vec();
        make.push(text(&image));
        succeed(&make);
        let mut mount = vec!["mount", "-t", kind.name(), "-o", "loop"];
        mount.extend([text(&image), text(&at)]);
        succeed(&mount);
        let disk = SmallDisk { at };
        disk.put_back(home, "aside");
        disk
    }

    /// Replaces the home's files with the copy that [`TestHome::put_aside`] saved under `name`.
    pub fn put_back(&self, home: &TestHome, name: &str) {
        for entry in fs::read_dir(&self.at).unwrap() {
            succeed(&["rm", "-rf", text(&entry.unwrap().path())]);
        }
        let contents = home.beside(name).join(".");
        succeed(&["cp", "-a", text(&contents), text(&self.at)]);
    }

    /// Writes everything back and returns the number of free bytes.
    pub fn free(&self) -> u64 {
        succeed(&["sync", "-f", text(&self.at)]);
        let said = succeed(&["stat", "-f", "-c", "%a %S", text(&self.at)]);
        let mut numbers = said.split_whitespace().map(|it| it.parse::<u64>().unwrap());
        numbers.next().unwrap() * numbers.next().unwrap()
    }

    /// Fills the disk until about `left` bytes are free.
    pub fn fill(&self, left: u64) {
        let filler = self.filler();
        let mut length = self.free().saturating_sub(left);
        // The file system may need some of the space itself.
        while !run(&["fallocate", "-l", &length.to_string(), text(&filler)])
            .status
            .success()
        {
            let _ = fs::remove_file(&filler);
            length = length.checked_sub(64 << 10).expect("room for a file");
        }
        if left == 0 {
            let mut file = File::options().append(true).open(&filler).unwrap();
            while file.write_all(&[0xaa; 4096]).is_ok() {}
            let _ = file.sync_all();
        }
    }

    /// Frees the space that [`SmallDisk::fill`] took.
    pub fn empty(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }

    /// Returns the mountpoint.
    pub fn root(&self) -> &Path {
        &self.at
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if !run(&["umount", text(&self.at)]).status.success() {
            run(&["umount", "-l", text(&self.at)]);
        }
    }
}
