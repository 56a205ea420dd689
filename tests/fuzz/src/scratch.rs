//! Directories for the targets' seed files and scratch files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Returns the path of something that run.sh made, such as `images`.
pub fn made(name: &str) -> PathBuf {
    let all = std::env::var_os("BOXLITEFS_FUZZ_MADE")
        .expect("BOXLITEFS_FUZZ_MADE is not set: use `make fuzz`, or tests/fuzz/run.sh");
    Path::new(&all).join(name)
}

/// Returns a directory of this process. run.sh puts TMPDIR in memory, and removes it.
pub fn directory() -> PathBuf {
    let path = std::env::temp_dir().join(format!("boxlitefs-fuzz-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

/// Returns the owner of a directory.
pub fn owner(path: &Path) -> u32 {
    fs::metadata(path).unwrap().uid()
}
