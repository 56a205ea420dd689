//! A small file system of its own for a home: to fill it up, or because of what it can do.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{TestHome, run, succeed, text};

/// A kind of file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileSystem {
    /// The one most have.
    Ext4,
    /// Shares blocks among files.
    Xfs,
    /// Likewise, and writes nothing in place.
    Btrfs,
    /// Keeps whole seconds only, and does not say when a file was made.
    SmallInodes,
    /// Its clock has the kernel's ticks, some milliseconds.
    Ext2,
}

impl FileSystem {
    /// Its type, as mount(8) wants it.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 | FileSystem::SmallInodes => "ext4",
            FileSystem::Ext2 => "ext2",
            FileSystem::Xfs => "xfs",
            FileSystem::Btrfs => "btrfs",
        }
    }

    /// How to make one.
    fn make(self) -> &'static [&'static str] {
        match self {
            FileSystem::Ext4 => &["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096"],
            FileSystem::Xfs => &["mkfs.xfs", "-q", "-f"],
            // Data and metadata together, as it is best for a small one.
            FileSystem::Btrfs => &["mkfs.btrfs", "-q", "-f", "--mixed"],
            FileSystem::SmallInodes => &["mkfs.ext4", "-q", "-F", "-m", "0", "-I", "128"],
            FileSystem::Ext2 => &["mkfs.ext2", "-q", "-F", "-m", "0"],
        }
    }

    /// A size that it can be made with.
    pub fn smallest(self) -> &'static str {
        match self {
            FileSystem::Ext4 | FileSystem::SmallInodes | FileSystem::Ext2 => "64M",
            FileSystem::Xfs => "320M",
            FileSystem::Btrfs => "128M",
        }
    }
}

/// A file system in a file, mounted at the root of a home until it is dropped. Where the kernel can't
/// mount one, the test fails and says so.
pub struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// Moves the home onto a new one of that size.
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

    /// Makes the home what it was when it was put aside under this name.
    pub fn put_back(&self, home: &TestHome, name: &str) {
        for entry in fs::read_dir(&self.at).unwrap() {
            succeed(&["rm", "-rf", text(&entry.unwrap().path())]);
        }
        let contents = home.beside(name).join(".");
        succeed(&["cp", "-a", text(&contents), text(&self.at)]);
    }

    /// Bytes that are free, once all is written.
    pub fn free(&self) -> u64 {
        succeed(&["sync", "-f", text(&self.at)]);
        let said = succeed(&["stat", "-f", "-c", "%a %S", text(&self.at)]);
        let mut numbers = said.split_whitespace().map(|it| it.parse::<u64>().unwrap());
        numbers.next().unwrap() * numbers.next().unwrap()
    }

    /// Takes all but about so many bytes.
    pub fn fill(&self, left: u64) {
        let filler = self.filler();
        let mut length = self.free().saturating_sub(left);
        // The file system may need some of it for itself.
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

    /// Gives back what [`SmallDisk::fill`] took.
    pub fn empty(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }

    /// Where it is mounted.
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
