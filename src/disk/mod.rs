//! One qcow2 layer, and chains of them: the only room that knows qcow2.
//!
//! * `header`: what the first cluster of an image says, and the one way it is ever changed (rebase).
//! * `overlay`: a new, empty layer on top of another.
//! * `holes`: where a raw image has data.
//! * `layer`: one open image file, looked at without what lies below it.
//! * `chain`: layers above one another, top first, as the guest sees them.
//! * `flatten`: a chain, or the upper part of one, as one image, computed and not stored.
//! * `write`: such an image as a file.
//! * `direct`: writing past the page cache.
//! * `inspect`: whether an image that came from outside may be used.
//! * `state`: states of files, and the clocks that tell whether one can change unseen.
//!
//! Knows nothing of boxes, rows or archives. Format rules are those of qemu's `docs/interop/qcow2.rst`,
//! the limits are qemu's and imago's where they are tighter than the format's.

mod chain;
mod direct;
mod flatten;
mod header;
mod holes;
mod inspect;
mod layer;
mod overlay;
mod state;
mod write;

pub use chain::{Chain, Extent, Scope, Source, chain_paths};
pub use direct::{Aligned, BLOCK, Direct};
pub use flatten::{Flattened, WINDOW};
pub use header::{Backing, Header, forget_dirty, rebase, rebase_this, settle_headers};
pub use inspect::inspect_standalone;
pub use layer::Layer;
pub use overlay::create_overlay;
pub use state::{FileClock, FileState, LONGEST_TICK, Moment, Stamped};
pub use write::{begin_write_back, share_contents};

use crate::{Context, Result};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Which file it is, whatever its names: `(st_dev, st_ino)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct FileId {
    /// `st_dev`: the filesystem.
    pub dev: u64,
    /// `st_ino`: the inode in it.
    pub ino: u64,
}

impl FileId {
    /// The file that `meta` describes.
    pub fn of(meta: &Metadata) -> FileId {
        FileId {
            dev: meta.dev(),
            ino: meta.ino(),
        }
    }

    /// The file that is open; `path` is what it is called. Errors: those of fstat.
    pub fn of_open(file: &File, path: &Path) -> Result<FileId> {
        let meta = file.metadata();
        let meta = meta.context(|| format!("cannot look at {}", path.display()))?;
        Ok(FileId::of(&meta))
    }

    /// The file at `path` itself; a symlink is not followed. Errors: those of lstat.
    pub fn at(path: &Path) -> Result<FileId> {
        let meta = std::fs::symlink_metadata(path)
            .context(|| format!("cannot look at {}", path.display()))?;
        Ok(FileId::of(&meta))
    }
}

/// How the bytes of an image file make a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// qemu's qcow2, version 2 or 3.
    Qcow2,
    /// The disk's bytes as they are.
    Raw,
}

impl Format {
    /// The name as it stands in a backing format extension: `qcow2` or `raw`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }
}

/// Fills `buf` from `offset` of `file`; what lies past the end of the file is zeros (qemu leaves the
/// last cluster of an image short).
pub(crate) fn read_zero_padded(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => {
                buf.fill(0);
                break;
            }
            Ok(n) => {
                buf = buf.get_mut(n..).unwrap_or_default();
                offset = offset.saturating_add(n as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The judges of the tests: qemu's own tools, and images made with them.
#[cfg(test)]
pub(crate) mod judges {
    use std::path::Path;
    use std::process::{Command, Output};

    /// Runs a program.
    pub fn run(program: &str, arguments: &[&str]) -> Output {
        Command::new(program)
            .args(arguments)
            .output()
            .unwrap_or_else(|e| panic!("{program} does not run: {e}"))
    }

    /// Runs a program that must succeed; its standard output.
    pub fn succeed(program: &str, arguments: &[&str]) -> String {
        let output = run(program, arguments);
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A path as an argument.
    pub fn text(path: &Path) -> &str {
        path.to_str().unwrap()
    }

    /// `qemu-img` with the arguments in one string, split at spaces, and an image after them.
    pub fn qemu_img(arguments: &str, image: &Path) -> String {
        let mut all: Vec<&str> = arguments.split(' ').collect();
        all.push(text(image));
        succeed("qemu-img", &all)
    }

    /// `qemu-io` on a qcow2 image, a command each.
    pub fn qemu_io(image: &Path, commands: &[&str]) {
        let mut all = vec!["-f", "qcow2"];
        for command in commands {
            all.extend(["-c", command]);
        }
        all.push(text(image));
        let said = succeed("qemu-io", &all);
        assert!(!said.contains("failed"), "{said}");
    }

    /// `qemu-img create` of a qcow2 with options, a size and, with `backing`, a layer below.
    pub fn create(image: &Path, options: &str, backing: Option<(&Path, &str)>, size: &str) {
        let mut all = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if let Some((path, format)) = backing {
            all.extend(["-b", text(path), "-F", format]);
        }
        all.extend([text(image), size]);
        succeed("qemu-img", &all);
    }

    /// The bytes of the disk as qemu reads them.
    pub fn guest_bytes(image: &Path) -> Vec<u8> {
        let raw = tempfile::NamedTempFile::new().unwrap();
        let all = ["convert", "-O", "raw", text(image), text(raw.path())];
        succeed("qemu-img", &all);
        std::fs::read(raw.path()).unwrap()
    }

    /// Fails unless `qemu-img check` finds nothing at all.
    pub fn check_clean(image: &Path) {
        let said = qemu_img("check -f qcow2 --output=json", image);
        let report: serde_json::Value = serde_json::from_str(&said).unwrap();
        for count in ["corruptions", "leaks", "check-errors"] {
            assert!(
                report[count].as_u64().unwrap_or(0) == 0,
                "{count} in {}: {said}",
                image.display()
            );
        }
    }

    /// What `qemu-img info` says of the image alone.
    pub fn info(image: &Path) -> serde_json::Value {
        serde_json::from_str(&qemu_img("info -f qcow2 --output=json", image)).unwrap()
    }

    /// Numbers that look random and are the same in every run.
    pub struct Numbers(pub u64);

    impl Numbers {
        /// The next number below `limit`.
        pub fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }
    }
}
