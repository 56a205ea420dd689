//! Sparse members, and zeros.

use super::*;

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

/// A GNU sparse header as the format has it (GNU tar manual, "Sparse Formats"), of `name`.
pub(super) fn sparse_header(name: &str, stored: u64, real: u64, pieces: &[(u64, u64)]) -> Vec<u8> {
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
