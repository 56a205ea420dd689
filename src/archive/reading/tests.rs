//! Archives made by GNU tar, python, zstd and qemu-img, in pieces as writers bring them.

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
        (Incoming::begin(&to, None).unwrap(), to)
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
fn holes_of_a_gnu_sparse_member_stay_holes() {
    let b = Packer::new();
    // A qcow2 with much unused space inside: more pieces than fit into the first header.
    let raw = b.path().join("raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(64 << 20).unwrap();
    for at in 0..60u64 {
        use std::os::unix::fs::FileExt;
        file.write_all_at(&[at as u8 + 1; 5000], at << 20).unwrap();
    }
    b.run(
        "qemu-img",
        &[
            "convert",
            "-O",
            "qcow2",
            "-o",
            "preallocation=metadata",
            "raw",
            "dense",
        ],
    );
    b.run("cp", &["--sparse=always", "dense", "disk.qcow2"]);
    b.manifest("3", &b.digest());
    for members in [
        ["manifest.json", "disk.qcow2"],
        ["disk.qcow2", "manifest.json"],
    ] {
        for format in ["gnu", "oldgnu"] {
            let tar = b.tar(&["-S", "--format", format, members[0], members[1]]);
            assert!(tar.len() < 8 << 20, "GNU tar saw no holes");
            let end = b.tar_end(&tar);
            for piece in [1000, 1 << 20] {
                b.must_arrive(&tar, end, piece);
            }
            let packed = b.zstd(&[], &tar);
            let (mut incoming, to) = b.begin();
            assert_eq!(incoming.write(&packed).unwrap(), Progress::Complete);
            let meta = fs::metadata(&to).unwrap();
            assert!(meta.blocks() * 512 < meta.len() / 4, "holes were filled");
        }
    }
    // As tar-rs, and so BoxLite, packs it.
    let mut builder = tar::Builder::new(Vec::new());
    builder.sparse(true);
    for name in ["disk.qcow2", "manifest.json"] {
        builder
            .append_path_with_name(b.path().join(name), name)
            .unwrap();
    }
    let tar = builder.into_inner().unwrap();
    assert!(tar.len() < 8 << 20, "tar-rs saw no holes");
    b.must_arrive(&tar, tar.len(), 1000);

    let tar = b.tar(&["-S", "--format=posix", "disk.qcow2", "manifest.json"]);
    b.must_be_bad(&tar, "pax format");
}

#[test]
#[ignore = "needs programs"]
fn zeros_of_a_plain_member_become_holes() {
    let b = Packer::new();
    fs::File::create(b.path().join("raw"))
        .unwrap()
        .set_len(16 << 20)
        .unwrap();
    b.run(
        "qemu-img",
        &["convert", "-O", "qcow2", "-S", "0", "raw", "disk.qcow2"],
    );
    b.manifest("3", &b.digest());
    let tar = b.plain();
    for piece in [1000, 1 << 20] {
        let (mut incoming, to) = b.begin();
        for bytes in tar.chunks(piece) {
            incoming.write(bytes).unwrap();
        }
        let meta = fs::metadata(&to).unwrap();
        assert!(meta.len() > 16 << 20);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    }
    b.must_arrive(&tar, b.tar_end(&tar), 4095);
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
fn a_lone_zero_block_is_no_end() {
    let b = Packer::new();
    let mut tar = b.plain();
    let end = b.tar_end(&tar);
    tar[end - 1] = 1;
    b.must_be_bad(&tar, "one zero block");
}

#[test]
#[ignore = "needs programs"]
fn a_disk_other_than_the_manifest_says_is_refused() {
    let b = Packer::new();
    b.manifest("3", &format!("sha256:{}", "0".repeat(64)));
    b.must_be_bad(&b.plain(), "sha256 of disk.qcow2");
    b.must_be_bad(
        &b.tar(&["disk.qcow2", "manifest.json"]),
        "sha256 of disk.qcow2",
    );
    // Version 1 has no checksum.
    b.manifest("1", "");
    let tar = b.plain();
    b.must_arrive(&tar, b.tar_end(&tar), 1000);
}

#[test]
#[ignore = "needs programs"]
fn a_manifest_of_an_unknown_version_is_refused() {
    let b = Packer::new();
    for version in ["0", "6", "4294967296", "\"3\""] {
        b.manifest(version, &b.digest());
        b.must_be_bad(&b.plain(), "version");
    }
    for version in ["2", "4", "5"] {
        b.manifest(version, &b.digest());
        let tar = b.plain();
        b.must_arrive(&tar, b.tar_end(&tar), 1 << 20);
    }
    fs::write(b.path().join("manifest.json"), vec![b' '; (1 << 20) + 1]).unwrap();
    b.must_be_bad(&b.plain(), "over 1 MiB");
    fs::write(b.path().join("manifest.json"), "").unwrap();
    b.must_be_bad(&b.plain(), "manifest.json");
}

#[test]
#[ignore = "needs programs"]
fn members_by_other_names_are_ignored_and_of_one_name_the_last_counts() {
    let b = Packer::new();
    let both = ["manifest.json", "disk.qcow2"];
    let with = |extra: &[&str]| b.tar(&[&both[..], extra].concat());
    fs::write(b.path().join("._disk.qcow2"), "x").unwrap();
    fs::create_dir(b.path().join("d")).unwrap();
    fs::write(b.path().join("d/disk.qcow2"), "x").unwrap();
    fs::write(b.path().join("d/x"), "x").unwrap();
    for extra in [
        &["._disk.qcow2"][..],
        &["d/disk.qcow2", "d/x", "d/x", "--hard-dereference"],
        &["--hard-dereference", "disk.qcow2"],
        &["--hard-dereference", "manifest.json"],
        &[
            "--hard-dereference",
            "guest-rootfs.qcow2",
            "guest-rootfs.qcow2",
        ],
    ] {
        b.must_be_good(&with(extra));
    }
    b.must_be_good(&b.tar(&[
        "-P",
        "--transform=s,disk,/disk,",
        "manifest.json",
        "disk.qcow2",
    ]));
    // A first disk that is another, and a last one that is.
    let other = ["--transform=s,d/x,disk.qcow2,"];
    b.must_be_good(&b.tar(&[&other[..], &["manifest.json", "d/x", "disk.qcow2"]].concat()));
    b.must_be_bad(
        &b.tar(&[&other[..], &["manifest.json", "disk.qcow2", "d/x"]].concat()),
        "sha256",
    );
}

#[test]
#[ignore = "needs programs"]
fn what_could_not_be_unpacked_by_name_is_refused() {
    let b = Packer::new();
    fs::write(b.path().join("x"), "x").unwrap();
    for (transform, why) in [
        ("s,^x$,disk.qcow2/x,", "makes \"disk.qcow2\" a directory"),
        (
            "s,^x$,manifest.json/x,",
            "makes \"manifest.json\" a directory",
        ),
    ] {
        let transform = format!("--transform={transform}");
        let rest = ["x", "manifest.json", "disk.qcow2"];
        b.must_be_bad(&b.tar(&[&[transform.as_str()][..], &rest].concat()), why);
    }
    let long = format!("--transform=s,^x$,{},", "y".repeat(256));
    b.must_be_bad(
        &b.tar(&[&long, "x", "manifest.json", "disk.qcow2"]),
        "too long",
    );
}

#[test]
#[ignore = "needs programs"]
fn only_regular_members_are_accepted() {
    let b = Packer::new();
    let both = ["manifest.json", "disk.qcow2"];
    let with = |extra: &[&str]| b.tar(&[&both[..], extra].concat());
    fs::create_dir(b.path().join("d")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", b.path().join("guest-rootfs.link")).unwrap();
    b.run("mkfifo", &["fifo"]);
    fs::hard_link(b.path().join("disk.qcow2"), b.path().join("hard")).unwrap();

    b.must_be_bad(&with(&["d"]), "a directory");
    b.must_be_bad(
        &b.tar(&["--no-recursion", "./", "manifest.json", "disk.qcow2"]),
        "a directory",
    );
    b.must_be_bad(&with(&["guest-rootfs.link"]), "a symlink");
    b.must_be_bad(&with(&["fifo"]), "a fifo");
    b.must_be_bad(&with(&["hard"]), "a hard link");
    b.must_be_bad(
        &b.tar(&[
            "-P",
            "--transform=s,disk,../disk,",
            "manifest.json",
            "disk.qcow2",
        ]),
        "no disk.qcow2",
    );
    b.must_be_bad(&b.tar(&["manifest.json"]), "no disk.qcow2");
    b.must_be_bad(&b.tar(&["disk.qcow2"]), "no manifest.json");
    b.must_be_bad(&b.tar(&["-T", "/dev/null"]), "no manifest.json");
    // Links under a good name, and names that pax records bring.
    for kind in [
        "SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "DIRTYPE",
    ] {
        let tar = b.python(&format!(
            "# gnu\ni = tarfile.TarInfo('disk.qcow2'); i.type = tarfile.{kind}; i.linkname = 'x'; t.addfile(i)"
        ));
        b.must_be_bad(&tar, "only regular files");
    }
    let tar = b.python(
        "i = tarfile.TarInfo('disk.qcow2'); i.pax_headers = {'path': '../../x'}; t.addfile(i)",
    );
    b.must_be_bad(&tar, "no manifest.json");
}

#[test]
#[ignore = "needs programs"]
fn extension_headers_are_bounded() {
    let b = Packer::new();
    for kind in ["GNUTYPE_LONGNAME", "GNUTYPE_LONGLINK", "XHDTYPE"] {
        let header = |size: u64| {
            format!("l = tarfile.TarInfo('x'); l.type = tarfile.{kind}; l.size = {size}; ")
        };
        let tar = b.python(&format!("# gnu\n{}t.addfile(l)", header(1 << 40)));
        b.must_be_bad(&tar, "over 1 MiB");
        let empty = format!("{}t.addfile(l)", header(0));
        b.must_be_bad(
            &b.python(&format!("# gnu\n{empty}\n{empty}")),
            "same member",
        );
        b.must_be_bad(&b.python(&format!("# gnu\n{empty}")), "describes no member");
    }
    for records in [
        "x",
        "5 a=b\\n",
        "99999999999999999999 a=b\\n",
        "3 \\n",
        "9 size=x\\n",
    ] {
        let tar = b.python(&format!(
            "# gnu\nd = b'{records}'; l = tarfile.TarInfo('x'); l.type = tarfile.XHDTYPE; l.size = len(d); t.addfile(l, io.BytesIO(d))"
        ));
        b.must_be_bad(&tar, "pax header");
    }
}

/// A GNU sparse header as the format has it (GNU tar manual, "Sparse Formats"), of `name`.
fn sparse_header(name: &str, stored: u64, real: u64, pieces: &[(u64, u64)]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_entry_type(tar::EntryType::GNUSparse);
    header.set_size(stored);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.set_real_size(real);
    for (to, (offset, length)) in gnu.sparse.iter_mut().zip(pieces) {
        to.set_offset(*offset);
        to.set_length(*length);
    }
    header.set_cksum();
    header.as_bytes().to_vec()
}

#[test]
#[ignore = "needs programs"]
fn a_sparse_map_must_add_up() {
    let b = Packer::new();
    for (stored, real, pieces) in [
        (512, 1024, [(512, 512)].as_slice()),
        (1024, 2048, &[(1024, 512), (0, 512), (2048, 0)]),
        (512, 4096, &[(0, 512)]),
        (512, 512, &[(0, 100), (100, 412)]),
        (512, 512, &[(0, 1024)]),
        (512, 1024, &[(512, u64::MAX)]),
        (0, 1024, &[(512, 512)]),
        (512, 1024, &[(1024, 0)]),
    ] {
        let mut tar = sparse_header("disk.qcow2", stored, real, pieces);
        tar.extend([1; 512]);
        let ok = (stored, real, pieces) == (512, 1024, &[(512, 512)]);
        if ok {
            let (mut incoming, _) = b.begin();
            assert_eq!(incoming.write(&tar).unwrap(), Progress::More);
        } else {
            b.must_be_bad(&tar, "sparse map of disk.qcow2");
        }
    }
    b.must_be_bad(
        &sparse_header("manifest.json", 0, 1 << 40, &[(1 << 40, 0)]),
        "over 1 MiB",
    );
    b.must_be_bad(
        &sparse_header("disk.qcow2", 0, 1 << 62, &[(1 << 62, 0)]),
        "over 64 TiB",
    );
}

#[test]
#[ignore = "needs programs"]
fn a_sparse_manifest_is_read() {
    let b = Packer::new();
    let json = fs::read(b.path().join("manifest.json")).unwrap();
    // JSON ends with blanks, not NULs: a hole inside makes it no JSON, one of length 0 does
    // nothing.
    let len = json.len() as u64;
    let mut tar = sparse_header("manifest.json", len, len, &[(0, len), (len, 0)]);
    tar.extend(&json);
    tar.resize(tar.len().next_multiple_of(512), 0);
    tar.extend(b.tar(&["disk.qcow2"]));
    b.must_arrive(&tar, b.tar_end(&tar), 1000);
    let mut tar = sparse_header("manifest.json", len, len + 9, &[(9, len)]);
    tar.extend(&json);
    b.must_be_bad(&tar, "manifest.json");
}

#[test]
#[ignore = "needs programs"]
fn a_disk_that_cannot_fit_is_refused_before_it_is_written() {
    let b = Packer::new();
    let mut header = tar::Header::new_gnu();
    header.set_path("disk.qcow2").unwrap();
    header.set_size(1 << 45);
    header.set_cksum();
    b.must_refuse(header.as_bytes(), libc::ENOSPC, "are free");
    header.set_size(1 << 50);
    header.set_cksum();
    b.must_be_bad(header.as_bytes(), "over 64 TiB");
    header.set_size(u64::MAX);
    header.set_cksum();
    b.must_be_bad(header.as_bytes(), "impossible");
}

#[test]
#[ignore = "needs programs"]
fn a_disk_is_no_larger_than_it_may_be() {
    let b = Packer::new();
    let archive = b.plain();
    let size = b.disk().len() as u64;
    let receive = |archive: &[u8], most: u64| {
        let to = b.path().join("incoming.qcow2");
        let mut incoming = Incoming::begin(&to, Some(most)).unwrap();
        let received = incoming.write(archive);
        drop(incoming);
        assert!(!to.exists());
        received
    };
    assert_eq!(receive(&archive, size).unwrap(), Progress::Complete);
    // Told by its header: the manifest before it takes two blocks, or three.
    let head = archive.len().min(2048 + 512);
    let error = receive(&archive[..head], size - 1).unwrap_err();
    assert_eq!(error.errno(), libc::EFBIG);
    assert!(error.to_string().contains("max_import"), "{error}");
    // 64 KiB in pieces of a block of the tar, of which each takes a block of the disk.
    let pieces: Vec<(u64, u64)> = (0..4).map(|at| (at * 65536, 512)).collect();
    let mut sparse = sparse_header("disk.qcow2", 2048, 3 * 65536 + 512, &pieces);
    sparse.extend([7; 2048]);
    sparse.extend([0; 1024]);
    let error = receive(&sparse, 2048).unwrap_err();
    assert_eq!(error.errno(), libc::EFBIG, "{error}");
    assert!(error.to_string().contains("takes more"), "{error}");
    assert_eq!(
        receive(&sparse, 4 * 4096).unwrap_err().errno(),
        libc::EBADMSG
    );
}

#[test]
#[ignore = "needs programs"]
fn holes_that_would_take_minutes_are_refused_before_they_are_hashed() {
    let b = Packer::new();
    let most = MOST_HOLES;
    let tar = sparse_header(
        "disk.qcow2",
        512,
        most + 1024,
        &[(0, 512), (most + 1024, 0)],
    );
    b.must_be_bad(&tar, "has holes of");
    let mut header = tar::Header::new_gnu();
    header.set_path("guest-rootfs.qcow2").unwrap();
    header.set_size(most + 1);
    header.set_cksum();
    b.must_be_bad(header.as_bytes(), "is over 256 GiB");
}

#[test]
#[ignore = "needs programs"]
fn a_full_file_system_is_said_so() {
    let b = Packer::new();
    let small = b.path().join("small");
    fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=512k", "tmpfs"])
        .arg(&small)
        .output()
        .is_ok_and(|output| output.status.success());
    if !mounted {
        eprintln!("no right to mount a small file system; not tried");
        return;
    }
    let tar = b.plain();
    let to = small.join("incoming.qcow2");
    let mut incoming = Incoming::begin(&to, None).unwrap();
    incoming.write(&tar[..40_000]).unwrap();
    let _ = fs::write(small.join("filler"), vec![1; 512 << 10]);
    let error = tar[40_000..]
        .chunks(1000)
        .find_map(|bytes| incoming.write(bytes).err());
    let again = incoming.finish().err();
    drop(incoming);
    let left = to.exists();
    run(b.path(), "umount", &["small"]);
    let error = error.unwrap();
    assert_eq!(error.errno(), libc::ENOSPC, "{error}");
    assert_eq!(again.unwrap().to_string(), error.to_string());
    assert!(!left);
}

#[test]
#[ignore = "needs programs"]
fn a_window_over_128_mib_is_refused() {
    let b = Packer::new();
    let tar = b.plain();
    let fits = b.zstd(&["--long=27"], &tar);
    b.must_arrive(&fits, fits.len(), 1000);
    b.must_be_bad(&b.zstd(&["--long=28"], &tar), "128 MiB");
}

#[test]
#[ignore = "needs programs"]
fn a_disk_that_cannot_stand_alone_is_refused() {
    let b = Packer::new();
    let refused = |why: &str| {
        b.manifest("3", &b.digest());
        b.must_be_bad(&b.plain(), why);
        b.must_be_bad(&b.tar(&["disk.qcow2", "manifest.json"]), why);
    };
    fs::rename(b.path().join("disk.qcow2"), b.path().join("base.qcow2")).unwrap();
    let base = "base.qcow2";
    b.run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            base,
            "-F",
            "qcow2",
            "disk.qcow2",
        ],
    );
    refused("backing file");
    b.run(
        "qemu-img",
        &[
            "convert",
            "-O",
            "qcow2",
            "-o",
            "data_file=data",
            base,
            "disk.qcow2",
        ],
    );
    refused("external data file");
    b.run(
        "qemu-img",
        &[
            "convert",
            "-O",
            "qcow2",
            "--object",
            "secret,id=s,data=x",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            base,
            "disk.qcow2",
        ],
    );
    refused("encrypted");
    b.run("qemu-img", &["convert", "-O", "qcow2", base, "disk.qcow2"]);
    b.run("qemu-img", &["snapshot", "-c", "s", "disk.qcow2"]);
    refused("internal snapshots");
    b.run("qemu-img", &["convert", "-O", "raw", base, "disk.qcow2"]);
    refused("no qcow2 image");
    let mut dirty = fs::read(b.path().join(base)).unwrap();
    dirty[79] |= 1;
    fs::write(b.path().join("disk.qcow2"), dirty).unwrap();
    refused("dirty");
    fs::write(b.path().join("disk.qcow2"), "").unwrap();
    refused("no qcow2 image");
}

#[test]
#[ignore = "needs programs"]
fn nothing_written_is_no_archive_and_leaves_nothing() {
    let b = Packer::new();
    let (mut incoming, to) = b.begin();
    assert!(to.exists());
    assert_eq!(
        Incoming::begin(&to, None).err().map(|e| e.errno()),
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
        let mut incoming = Incoming::begin(&to, None).unwrap();
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
        .args(["--exact", &format!("archive::reading::tests::{name}")])
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
            assert!(settles_at(before), "the last write does not end all")
        } else {
            assert!(settles_at(before + 3), "each stage has its thread")
        }
        drop(incoming);
        assert!(settles_at(before), "a thread is left");
        assert!(!to.exists());
    }
    let took = status("VmHWM").saturating_sub(idle);
    assert!(took < 24 << 10, "{took} KiB");
}
