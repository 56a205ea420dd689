//! Archives made by GNU tar, python, zstd and qemu-img, in pieces as writers bring them.

mod large;
mod refusals;
mod sparse;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::*;

const PIECES: [usize; 4] = [1, 512, 1000, 1 << 20];

/// Runs a program that must succeed, in `dir`, and returns what it says.
fn run(dir: &Path, program: &str, args: &[&str]) -> Vec<u8> {
    run_with(dir, program, args, &[])
}

fn run_with(dir: &Path, program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A program that refuses its input closes it early.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().unwrap()
    });
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {stderr}");
    output.stdout
}

/// A directory with the members of a good archive.
struct Packer {
    dir: TempDir,
}

impl Packer {
    fn new() -> Packer {
        let dir = tempfile::tempdir().unwrap();
        let mut raw = vec![0; 256 << 10];
        for (at, byte) in raw.iter_mut().enumerate().skip(70_000).take(40_000) {
            *byte = (at * at / 7 + at / 256) as u8;
        }
        fs::write(dir.path().join("raw"), raw).unwrap();
        let b = Packer { dir };
        b.run(
            "qemu-img",
            &[
                "convert",
                "-O",
                "qcow2",
                "-o",
                "cluster_size=4k",
                "raw",
                "disk.qcow2",
            ],
        );
        b.run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "guest-rootfs.qcow2", "1M"],
        );
        b.manifest("3", &b.digest());
        b
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn run(&self, program: &str, args: &[&str]) -> Vec<u8> {
        run(self.path(), program, args)
    }

    fn disk(&self) -> Vec<u8> {
        fs::read(self.path().join("disk.qcow2")).unwrap()
    }

    fn digest(&self) -> String {
        let said = self.run("sha256sum", &["disk.qcow2"]);
        format!("sha256:{}", String::from_utf8_lossy(&said[..64]))
    }

    /// `version` as it stands in the JSON.
    fn manifest(&self, version: &str, digest: &str) {
        let json = format!(
            r#"{{"version": {version}, "box_name": "web", "image": "alpine:latest",
            "box_options": {{"rootfs": {{"Image": "alpine:latest"}}}}, "guest_disk_checksum": "",
            "container_disk_checksum": "{digest}", "exported_at": "2026-01-02T03:04:05Z"}}"#
        );
        fs::write(self.path().join("manifest.json"), json).unwrap();
    }

    fn tar(&self, args: &[&str]) -> Vec<u8> {
        let mut all = vec!["-c", "-f", "-"];
        all.extend(args);
        self.run("tar", &all)
    }

    fn plain(&self) -> Vec<u8> {
        self.tar(&["manifest.json", "disk.qcow2"])
    }

    /// What a python program puts into `t`, a tarfile; in GNU format if it begins with `# gnu`.
    fn python(&self, program: &str) -> Vec<u8> {
        let format = if program.starts_with("# gnu") {
            "GNU_FORMAT"
        } else {
            "PAX_FORMAT"
        };
        let program = format!(
            "import tarfile, sys, io\n\
             t = tarfile.open(fileobj=sys.stdout.buffer, mode='w|', format=tarfile.{format})\n\
             {program}\nt.close()"
        );
        self.run("python3", &["-c", &program])
    }

    fn zstd(&self, args: &[&str], tar: &[u8]) -> Vec<u8> {
        let mut all = vec!["-c", "-q"];
        all.extend(args);
        run_with(self.path(), "zstd", &all, tar)
    }

    fn begin(&self) -> (Incoming, PathBuf) {
        let to = self.path().join("incoming.qcow2");
        (Incoming::begin(&to, None, None).unwrap(), to)
    }

    /// How many bytes of a tar matter, as python reads it: up to the second zero block.
    fn tar_end(&self, tar: &[u8]) -> usize {
        let program = "import tarfile, sys, io\n\
            t = tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read()))\n\
            t.getmembers()\n\
            print(t.offset + 1024)";
        let said = run_with(self.path(), "python3", &["-c", program], tar);
        String::from_utf8(said).unwrap().trim().parse().unwrap()
    }

    /// The archive must complete in the write that brings byte `end`, and bring the disk.
    fn must_arrive(&self, archive: &[u8], end: usize, piece: usize) {
        let (mut incoming, to) = self.begin();
        let mut sent = 0;
        for bytes in archive.chunks(piece) {
            sent += bytes.len();
            let expected = if sent >= end {
                Progress::Complete
            } else {
                Progress::More
            };
            let progress = incoming
                .write(bytes)
                .unwrap_or_else(|e| panic!("refused at {sent} of {}: {e}", archive.len()));
            assert_eq!(
                progress,
                expected,
                "at {sent} of {}, end {end}",
                archive.len()
            );
            assert_eq!(incoming.arrived().is_some(), expected == Progress::Complete);
        }
        assert_eq!(incoming.finish().unwrap().manifest.image, "alpine:latest");
        drop(incoming);
        assert!(
            fs::read(&to).unwrap() == self.disk(),
            "another disk arrived"
        );
        self.run("qemu-img", &["check", "-q", "incoming.qcow2"]);
        fs::remove_file(to).unwrap();
    }

    /// The archive must be refused with a message that has `why`; which write said so.
    fn must_refuse(&self, archive: &[u8], errno: i32, why: &str) -> usize {
        let mut at = 0;
        for piece in [1 << 20, 1000] {
            let (mut incoming, to) = self.begin();
            at = 0;
            let error = archive
                .chunks(piece)
                .find_map(|bytes| {
                    at += bytes.len();
                    incoming.write(bytes).err()
                })
                .unwrap_or_else(|| panic!("accepted, or waits for more; wanted: {why}"));
            assert!(error.to_string().contains(why), "{error}; wanted: {why}");
            assert_eq!(error.errno(), errno, "{error}");
            let again = incoming.write(b"more").unwrap_err();
            assert_eq!(
                (again.errno(), again.to_string()),
                (errno, error.to_string())
            );
            let finish = incoming.finish().unwrap_err();
            assert_eq!(
                (finish.errno(), finish.to_string()),
                (errno, error.to_string())
            );
            assert!(incoming.arrived().is_none());
            drop(incoming);
            assert!(!to.exists());
        }
        at
    }

    /// The archive must be taken, and bring the disk.
    fn must_be_good(&self, archive: &[u8]) {
        self.must_arrive(archive, self.tar_end(archive), 1 << 20);
    }

    fn must_be_bad(&self, archive: &[u8], why: &str) -> usize {
        self.must_refuse(archive, libc::EBADMSG, why)
    }
}

/// A skippable frame (RFC 8878) with `len` bytes.
fn skippable(len: u32) -> Vec<u8> {
    let mut frame = vec![0x53, 0x2a, 0x4d, 0x18];
    frame.extend(len.to_le_bytes());
    frame.resize(frame.len() + len as usize, 0xaa);
    frame
}

#[test]
#[ignore = "needs programs"]
fn a_good_archive_arrives_whatever_its_order_and_pieces() {
    let b = Packer::new();
    for order in [
        ["manifest.json", "disk.qcow2", "guest-rootfs.qcow2"].as_slice(),
        &["disk.qcow2", "manifest.json"],
        &["guest-rootfs.qcow2", "disk.qcow2", "manifest.json"],
        &["disk.qcow2", "guest-rootfs.qcow2", "manifest.json"],
        &["./manifest.json", "./disk.qcow2"],
    ] {
        let tar = b.tar(order);
        let end = b.tar_end(&tar);
        let checked = b.zstd(&["-3", "--check"], &tar);
        let unchecked = b.zstd(&["-19", "--no-check"], &tar);
        for piece in PIECES {
            b.must_arrive(&tar, end, piece);
            b.must_arrive(&checked, checked.len(), piece);
            b.must_arrive(&unchecked, unchecked.len(), piece);
        }
        b.must_arrive(&tar[..end], end, 1000);
    }
}

#[test]
#[ignore = "needs programs"]
fn every_tar_format_is_read() {
    let b = Packer::new();
    for format in ["v7", "oldgnu", "gnu", "ustar", "posix"] {
        let tar = b.tar(&["--format", format, "disk.qcow2", "manifest.json"]);
        b.must_arrive(&tar, b.tar_end(&tar), 1000);
    }
    let tar = b.tar(&[
        "--format=posix",
        "--pax-option=comment:=a\nb",
        "disk.qcow2",
        "manifest.json",
    ]);
    b.must_arrive(&tar, b.tar_end(&tar), 1);
    let cont = b.python("# gnu\nfor n in ('disk.qcow2', 'manifest.json'):\n i = t.gettarinfo(n); i.type = tarfile.CONTTYPE; t.addfile(i, open(n, 'rb'))");
    b.must_arrive(&cont, b.tar_end(&cont), 1000);
}

#[test]
#[ignore = "needs programs"]
fn a_name_and_a_size_may_stand_in_extension_headers() {
    let b = Packer::new();
    let pax = b.python(
        "for n in ('disk.qcow2', 'manifest.json'):\n i = t.gettarinfo(n); i.name = 'x'; i.pax_headers = {'path': './' + n, 'size': str(i.size), 'comment': 'two\\nlines'}; t.addfile(i, open(n, 'rb'))",
    );
    b.must_arrive(&pax, b.tar_end(&pax), 1);
    let long = b.python(
        "# gnu\nfor n in ('disk.qcow2', 'manifest.json'):\n i = t.gettarinfo(n); i.name = 'x'\n d = n.encode() + b'\\0'\n l = tarfile.TarInfo('././@LongLink'); l.type = tarfile.GNUTYPE_LONGNAME; l.size = len(d); t.addfile(l, io.BytesIO(d)); t.addfile(i, open(n, 'rb'))",
    );
    b.must_arrive(&long, b.tar_end(&long), 1);
}

#[test]
#[ignore = "needs programs"]
fn several_frames_are_one_archive() {
    let b = Packer::new();
    let tar = b.tar(&["disk.qcow2", "manifest.json"]);
    let end = b.tar_end(&tar);
    let frames = |cuts: &[usize]| {
        let mut from = 0;
        cuts.iter()
            .chain([&tar.len()])
            .map(|cut| {
                let frame = b.zstd(&["--check"], &tar[from..*cut]);
                from = *cut;
                frame
            })
            .collect::<Vec<_>>()
    };
    // Cut anywhere; the last frame has the end.
    let parts = frames(&[1000, 50_000, 50_001]);
    let all = parts.concat();
    // One frame for each member, one for the end, one for the padding after it.
    let disk_end = 512 + b.disk().len().next_multiple_of(512);
    let per_member = frames(&[disk_end, end - 1024, end]);
    let (first, last) = (per_member[..3].concat(), per_member.concat());
    // As pzstd and seekable zstd have it: skippable frames anywhere.
    let mut skipping = skippable(0);
    skipping.extend(&parts[0]);
    skipping.extend(skippable(70_000));
    skipping.extend(parts[1..].concat());
    let skipping_end = skipping.len();
    skipping.extend(skippable(9));
    // The end marker's two blocks in two frames.
    let split = frames(&[end - 512, end]);
    for piece in PIECES {
        b.must_arrive(&all, all.len(), piece);
        b.must_arrive(&last, first.len(), piece);
        b.must_arrive(&skipping, skipping_end, piece);
        b.must_arrive(&split.concat(), split[..2].concat().len(), piece);
    }
}

#[test]
#[ignore = "needs programs"]
fn padding_may_follow_and_nothing_else() {
    let b = Packer::new();
    let tar = b.plain();
    let end = b.tar_end(&tar);
    let frame = b.zstd(&[], &tar);
    let with = |archive: &[u8], tail: &[u8]| [archive, tail].concat();
    for tail in [vec![0; 100], vec![0; 1 << 20]] {
        b.must_arrive(&with(&tar[..end], &tail), end, 1000);
        b.must_arrive(&with(&frame, &tail), frame.len(), 1000);
        b.must_arrive(&with(&frame, &b.zstd(&[], &tail)), frame.len(), 1000);
    }
    b.must_bad_tails(&tar[..end], &[b"x", b"\0\0\0x", &tar]);
    b.must_bad_tails(
        &frame,
        &[b"x", b"\x28\xb5x", &b.zstd(&[], b"\0\0x"), &frame, &tar],
    );
    // A frame of zstd 0.7, which the library would read.
    b.must_bad_tails(&frame, &[&[0x27, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0, 0]]);
    b.must_be_bad(&with(b"\0", &frame), "neither like a tar");
}

impl Packer {
    /// Each tail is refused in the write that brings it, also after the archive was complete.
    fn must_bad_tails(&self, archive: &[u8], tails: &[&[u8]]) {
        for tail in tails {
            let whole = [archive, tail].concat();
            self.must_be_bad(&whole, "after its end");
            let (mut incoming, to) = self.begin();
            assert_eq!(incoming.write(archive).unwrap(), Progress::Complete);
            assert_eq!(incoming.write(b"").unwrap(), Progress::Complete);
            assert_eq!(incoming.write(tail).unwrap_err().errno(), libc::EBADMSG);
            assert!(incoming.arrived().is_none());
            drop(incoming);
            assert!(!to.exists());
        }
    }
}

#[test]
#[ignore = "needs programs"]
fn a_truncated_archive_is_never_complete() {
    let b = Packer::new();
    let tar = b.tar(&["disk.qcow2", "manifest.json"]);
    let tar = &tar[..b.tar_end(&tar)];
    let (checked, unchecked) = (b.zstd(&["--check"], tar), b.zstd(&["--no-check"], tar));
    for archive in [tar, &checked, &unchecked] {
        let step = (archive.len() / 97).max(1);
        let cuts = (0..archive.len()).step_by(step);
        let near_end = (1..40)
            .chain([511, 512, 513, 1023, 1024, 1025, 1536])
            .map(|n| archive.len() - n);
        for cut in cuts.chain(near_end).chain([1, 2, 3, 4, 5, 511, 512, 513]) {
            let (mut incoming, to) = b.begin();
            assert_eq!(
                incoming.write(&archive[..cut]).unwrap(),
                Progress::More,
                "{cut}"
            );
            for _ in 0..2 {
                let error = incoming.finish().unwrap_err();
                assert_eq!(error.errno(), libc::EBADMSG);
                assert!(
                    error.to_string().contains("ends in the middle of"),
                    "{error}"
                );
            }
            if cut % 2 == 0 {
                // Another descriptor was closed; the writer goes on.
                assert_eq!(incoming.write(&archive[cut..]).unwrap(), Progress::Complete);
            }
            drop(incoming);
            assert!(!to.exists());
        }
    }
    let (mut incoming, _) = b.begin();
    incoming.write(&tar[..10_000]).unwrap();
    let message = incoming.finish().unwrap_err().to_string();
    assert!(message.contains("disk.qcow2, after 9488 of"), "{message}");
}

#[test]
#[ignore = "needs programs"]
fn a_flipped_bit_never_brings_another_disk() {
    let b = Packer::new();
    let tar = b.tar(&["disk.qcow2", "manifest.json"]);
    let tar = &tar[..b.tar_end(&tar)];
    let packed = b.zstd(&["--check"], tar);
    for archive in [tar, &packed] {
        for n in 0..400 {
            let at = n * 7919 * 13 % archive.len();
            let mut flipped = archive.to_vec();
            flipped[at] ^= 1 << (n % 8);
            let (mut incoming, to) = b.begin();
            let complete = flipped
                .chunks(1000)
                .map(|bytes| incoming.write(bytes))
                .collect::<Result<Vec<_>>>()
                .is_ok_and(|all| all.contains(&Progress::Complete));
            if complete {
                assert!(fs::read(&to).unwrap() == b.disk(), "bit {n} at {at}");
            } else {
                assert_eq!(incoming.finish().unwrap_err().errno(), libc::EBADMSG);
            }
        }
    }
    // In the disk's data, in a header, in a frame: what is found is named.
    let mut flipped = tar.to_vec();
    flipped[30_000] ^= 1;
    b.must_be_bad(&flipped, "sha256 of disk.qcow2");
    let mut flipped = tar.to_vec();
    flipped[tar.len() - 2048 + 3] ^= 1;
    b.must_be_bad(&flipped, "tar header after disk.qcow2");
    let mut flipped = packed.clone();
    *flipped.last_mut().unwrap() ^= 1;
    b.must_be_bad(&flipped, "checksum");
    assert!(b.must_be_bad(&[0x55; 5000], "is this a .boxlite archive") <= 1000);
}

#[test]
#[ignore = "needs programs"]
fn nothing_written_is_no_archive_and_leaves_nothing() {
    let b = Packer::new();
    let (mut incoming, to) = b.begin();
    assert!(to.exists());
    assert_eq!(
        Incoming::begin(&to, None, None).err().map(|e| e.errno()),
        Some(libc::EEXIST)
    );
    assert!(to.exists(), "a file of somebody else was removed");
    assert_eq!(incoming.write(b"").unwrap(), Progress::More);
    assert_eq!(incoming.finish().unwrap_err().errno(), libc::EBADMSG);
    drop(incoming);
    assert!(!to.exists());
}

#[test]
#[ignore = "needs programs"]
fn a_complete_archive_without_a_finish_leaves_nothing() {
    let b = Packer::new();
    let (mut incoming, to) = b.begin();
    assert_eq!(incoming.write(&b.plain()).unwrap(), Progress::Complete);
    drop(incoming);
    assert!(!to.exists());
}

#[test]
fn an_incoming_archive_may_move_between_threads() {
    fn sendable<T: Send>() {}
    sendable::<Incoming>();
}
