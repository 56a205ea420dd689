//! Images with every kind of file.

use crate::disk::judges::{Numbers, run, succeed, text};
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// An image, and a place for more.
pub struct Image {
    pub dir: TempDir,
    pub path: PathBuf,
}

/// Makes a file system with what is in `tree`. Options are split at spaces.
pub fn mke2fs(size: &str, options: &str, tree: Option<&Path>) -> Image {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let mut all = vec!["-q", "-F"];
    all.extend(options.split(' '));
    if let Some(tree) = tree {
        all.extend(["-d", text(tree)]);
    }
    all.extend([text(&path), size]);
    succeed("mke2fs", &all);
    Image { dir, path }
}

/// Carries out debugfs commands on an image.
pub fn debugfs(image: &Path, commands: &[&str]) {
    let script = tempfile::NamedTempFile::new().unwrap();
    fs::write(script.path(), commands.join("\n")).unwrap();
    let output = run("debugfs", &["-w", "-f", text(script.path()), text(image)]);
    let said = String::from_utf8_lossy(&output.stderr);
    // The first line tells the version; what fails is told after it.
    let failed: Vec<_> = said.lines().skip(1).collect();
    assert!(
        output.status.success() && failed.is_empty(),
        "{commands:?}: {said}"
    );
}

/// Gives directories their indexes.
pub fn index_directories(image: &Path) {
    let output = run("e2fsck", &["-fyD", text(image)]);
    assert!(output.status.code().is_some_and(|code| code <= 1));
}

/// Bytes that look random.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..len).map(|_| numbers.below(256) as u8).collect()
}

/// A tree with all that mke2fs copies, for blocks of `block` bytes.
pub fn tree(block: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b/c/d/e")).unwrap();
    fs::write(at("empty"), "").unwrap();
    fs::write(at("short"), "x").unwrap();
    fs::write(at("a/b/c/d/e/deep"), noise(5000, 1)).unwrap();
    fs::write(at("large"), noise(3 << 20, 2)).unwrap();
    fs::hard_link(at("large"), at("a/further name")).unwrap();
    let name = std::ffi::OsStr::from_bytes(b"\xff\n\\\x01 not text");
    fs::write(dir.path().join(name), "odd").unwrap();
    fs::write(at(&"n".repeat(255)), "long").unwrap();
    sparse(
        &at("sparse"),
        20 << 20,
        [1 << 20, 5 << 20, (5 << 20) + 4096],
    );
    sparse(&at("hole at the end"), (1 << 20) + 77, [0]);
    // Every other block: as many extents as blocks.
    let holes = File::create(at("holes")).unwrap();
    for n in 0..1500 {
        holes
            .write_all_at(&noise(block, n + 5), 2 * n * block as u64)
            .unwrap();
    }
    for len in [1, 58, 59, 60, 61, 300, 1000] {
        symlink("t".repeat(len), at(&format!("link of {len}"))).unwrap();
    }
    for (name, mode) in [
        ("suid", 0o4755),
        ("sgid", 0o2711),
        ("sticky", 0o1777),
        ("none", 0),
    ] {
        fs::write(at(name), name).unwrap();
        fs::set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
    }
    let time = |seconds: i64| match seconds {
        0.. => SystemTime::UNIX_EPOCH + Duration::new(seconds as u64, 123_456_789),
        _ => SystemTime::UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()),
    };
    for (name, seconds) in [("1970", 1), ("2021", 1_612_345_678), ("1950", -600_000_000)] {
        let file = File::create(at(name)).unwrap();
        file.set_modified(time(seconds)).unwrap();
    }
    fs::create_dir(at("many")).unwrap();
    for n in 0..3000 {
        fs::write(at(&format!("many/a file of the many, number {n}")), "").unwrap();
    }
    succeed("mkfifo", &[text(&at("pipe"))]);
    dir
}

fn sparse<const N: usize>(path: &Path, len: u64, data: [u64; N]) {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    for at in data {
        file.write_all_at(&noise(3000, at + 1), at).unwrap();
    }
}

/// What only debugfs makes.
pub const ODD: &[&str] = &[
    "mknod console c 5 1",
    "mknod disk b 259 60000",
    "sif large uid 70000",
    "sif large gid 80001",
    "sif short mtime 1500000000",
    "set_inode_field short ctime 1600000000",
    "ea_set short user.small value",
    "ea_set short security.note 0123456789",
    "ea_set large trusted.note another",
    "ea_set a user.of_a_directory yes",
];
