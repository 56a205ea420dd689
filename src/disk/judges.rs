//! The judges of the tests: qemu's own tools, and images made with them.

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
