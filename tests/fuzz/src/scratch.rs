//! Where the targets read their seeds, and write what is looked at.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What run.sh had made: `images` and the like.
pub fn made(name: &str) -> PathBuf {
    let all = std::env::var_os("BOXLITEFS_FUZZ_MADE")
        .expect("BOXLITEFS_FUZZ_MADE is not set: use `make fuzz`, or tests/fuzz/run.sh");
    Path::new(&all).join(name)
}

/// A directory of this process's own; run.sh has TMPDIR in memory, and removes it.
pub fn directory() -> PathBuf {
    let path = std::env::temp_dir().join(format!("boxlitefs-fuzz-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

/// The user a directory belongs to.
pub fn owner(path: &Path) -> u32 {
    fs::metadata(path).unwrap().uid()
}
