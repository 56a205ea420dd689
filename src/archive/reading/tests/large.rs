//! Archives so large that decoding, hashing and writing have their threads.

use super::*;

/// A disk so large that decoding, hashing and writing have their threads: noise, text and zeros, in
/// clusters of 64 KiB.
const LARGE: usize = 48 << 20;

impl Packer {
    fn large() -> Packer {
        let b = Packer::new();
        let mut raw = Vec::with_capacity(LARGE);
        let mut noise = 1u32;
        for cluster in 0..LARGE >> 16 {
            for _ in 0..1 << 14 {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let word = match cluster % 4 {
                    0 => 0,
                    1 => noise >> 8,
                    _ => 0x2020_2020 | noise >> 30,
                };
                raw.extend(word.to_le_bytes());
            }
        }
        fs::write(b.path().join("raw"), raw).unwrap();
        // Zeros too have their clusters.
        b.run(
            "qemu-img",
            &["convert", "-O", "qcow2", "-S", "0", "raw", "disk.qcow2"],
        );
        b.manifest("3", &b.digest());
        b
    }

    /// The disk first, as exports have it.
    fn disk_first(&self) -> Vec<u8> {
        let tar = self.tar(&["disk.qcow2", "manifest.json"]);
        let end = self.tar_end(&tar);
        tar[..end].to_vec()
    }

    /// Frames of `size` bytes of the tar each.
    fn frames(&self, tar: &[u8], size: usize) -> Vec<Vec<u8>> {
        tar.chunks(size).map(|some| self.zstd(&[], some)).collect()
    }
}

#[test]
#[ignore = "needs programs"]
fn a_large_archive_completes_in_the_write_that_brings_its_end() {
    let b = Packer::large();
    let tar = b.disk_first();
    let checked = b.zstd(&["--check"], &tar);
    let small_blocks = b.zstd(&["-12", "--zstd=wlog=17"], &tar);
    let frames = b.frames(&tar, 2 << 20).concat();
    for archive in [&tar, &checked, &small_blocks, &frames] {
        for piece in [4096, 128 << 10, 1 << 20, archive.len()] {
            b.must_arrive(archive, archive.len(), piece);
        }
        let padded = [archive.as_slice(), &[0; 5000]].concat();
        b.must_arrive(&padded, archive.len(), 100_000);
    }
    // What is left of it when the disk is over may be large too.
    b.run(
        "qemu-img",
        &["convert", "-O", "qcow2", "disk.qcow2", "guest-rootfs.qcow2"],
    );
    let tar = b.tar(&["manifest.json", "disk.qcow2", "guest-rootfs.qcow2"]);
    let packed = b.zstd(&[], &tar[..b.tar_end(&tar)]);
    b.must_arrive(&packed, packed.len(), 128 << 10);
}

#[test]
#[ignore = "needs programs"]
fn the_holes_of_a_large_disk_take_no_room() {
    let b = Packer::large();
    let (mut incoming, to) = b.begin();
    let packed = b.zstd(&[], &b.disk_first());
    for bytes in packed.chunks(128 << 10) {
        incoming.write(bytes).unwrap();
    }
    let disk = b.disk();
    let data = disk
        .chunks(4096)
        .filter(|block| block.iter().any(|byte| *byte != 0));
    let meta = fs::metadata(&to).unwrap();
    let (stored, data) = (meta.blocks() * 512, data.count() as u64 * 4096);
    assert!(stored <= data + (64 << 10), "{stored} for {data} of data");
    assert!(data < disk.len() as u64 * 4 / 5);
}

#[test]
#[ignore = "needs programs"]
fn a_large_archive_that_ends_early_is_told_where() {
    let b = Packer::large();
    let frames = b.frames(&b.disk_first(), 2 << 20);
    let (mut incoming, to) = b.begin();
    for frame in &frames[..9] {
        assert_eq!(incoming.write(frame).unwrap(), Progress::More);
    }
    for _ in 0..2 {
        let error = incoming.finish().unwrap_err();
        let came = 9 * (2 << 20) - 512;
        let wanted = format!("ends in the middle of disk.qcow2, after {came} of");
        assert!(error.to_string().contains(&wanted), "{error}");
    }
    // Another descriptor was closed; the writer goes on.
    let rest = frames[9..].concat();
    let (last, rest) = rest.split_last().unwrap();
    assert_eq!(incoming.write(rest).unwrap(), Progress::More);
    assert_eq!(incoming.write(&[*last]).unwrap(), Progress::Complete);
    incoming.finish().unwrap();
    drop(incoming);
    assert!(fs::read(to).unwrap() == b.disk());
}

#[test]
#[ignore = "needs programs"]
fn damage_in_a_large_archive_is_told_before_its_end() {
    let b = Packer::large();
    let tar = b.disk_first();
    let packed = b.zstd(&["--check"], &tar);
    // In the midst of it: some write after that says so, and leaves no more than it must.
    let mut torn = packed.clone();
    let middle = packed.len() / 2;
    torn[middle..middle + 200_000].fill(0xff);
    let at = b.must_be_bad(&torn, "zstd data is damaged");
    assert!(at > middle && at < packed.len(), "{at} of {}", packed.len());
    // In the data, found by the digest: the write with the end says so.
    let mut flipped = tar.clone();
    flipped[LARGE / 2] ^= 1;
    let at = b.must_be_bad(&b.zstd(&[], &flipped), "sha256 of disk.qcow2");
    assert!(at > packed.len() - 300_000);
    b.must_be_bad(&flipped, "sha256 of disk.qcow2");
}

#[test]
#[ignore = "needs programs"]
fn a_file_system_that_fills_up_behind_is_said_so() {
    let b = Packer::large();
    let small = b.path().join("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=60m", "tmpfs"])
        .arg(&small)
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        eprintln!("no right to mount a small file system; not tried");
        return;
    }
    let tar = b.disk_first();
    let packed = b.zstd(&[], &tar);
    let mut said = Vec::new();
    for archive in [&tar, &packed] {
        let to = small.join("incoming.qcow2");
        let mut incoming = Incoming::begin(&to, None, None).unwrap();
        let (start, rest) = archive.split_at(archive.len() / 8);
        incoming.write(start).unwrap();
        let filler = small.join("filler");
        let _ = fs::write(&filler, vec![1; 60 << 20]);
        let error = rest
            .chunks(128 << 10)
            .find_map(|bytes| incoming.write(bytes).err());
        let again = [incoming.write(b"").err(), incoming.finish().err()];
        drop(incoming);
        said.push((error, again, to.exists()));
        let _ = fs::remove_file(filler);
    }
    run(b.path(), "umount", &["small"]);
    for (error, again, left) in said {
        let error = error.unwrap();
        assert_eq!(error.errno(), libc::ENOSPC, "{error}");
        assert!(error.to_string().contains("cannot write"), "{error}");
        for again in again {
            assert_eq!(again.unwrap().to_string(), error.to_string());
        }
        assert!(!left);
    }
}

/// Whether this process runs the one test `name`; if not, one that does is started and must
/// succeed.
fn is_alone(name: &str) -> bool {
    const ALONE: &str = "BOXLITEFS_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("archive::reading::tests::large::{name}"),
        ])
        .args(["--nocapture", "--include-ignored"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{stderr}");
    assert!(said.contains("1 passed"), "{said}");
    false
}

/// A number of KiB in /proc/self/status.
fn status(field: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs programs"]
fn a_large_archive_takes_little_memory_and_leaves_no_thread() {
    if !is_alone("a_large_archive_takes_little_memory_and_leaves_no_thread") {
        return;
    }
    let b = Packer::large();
    let packed = b.zstd(&[], &b.disk_first());
    let threads = || fs::read_dir("/proc/self/task").unwrap().count();
    // One that was joined is listed for a moment longer.
    let settles_at = |wanted: usize| {
        (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            threads() == wanted
        })
    };
    let (before, idle) = (threads(), status("VmRSS"));
    fs::write("/proc/self/clear_refs", "5").unwrap();
    for part in [packed.len() / 2, packed.len()] {
        let (mut incoming, to) = b.begin();
        for bytes in packed[..part].chunks(128 << 10) {
            incoming.write(bytes).unwrap();
        }
        if part == packed.len() {
            assert!(settles_at(before), "the last write does not end all");
        } else {
            assert!(settles_at(before + 3), "each stage has its thread");
        }
        drop(incoming);
        assert!(settles_at(before), "a thread is left");
        assert!(!to.exists());
    }
    let took = status("VmHWM").saturating_sub(idle);
    assert!(took < 24 << 10, "{took} KiB");
}
