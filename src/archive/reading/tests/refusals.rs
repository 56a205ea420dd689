//! Archives that are refused, each by the right check.

use super::sparse::sparse_header;
use super::*;

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
        let mut incoming = Incoming::begin(&to, Some(most), None).unwrap();
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
    let mut incoming = Incoming::begin(&to, None, None).unwrap();
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
    refused("not a qcow2 image");
    let mut dirty = fs::read(b.path().join(base)).unwrap();
    dirty[79] |= 1;
    fs::write(b.path().join("disk.qcow2"), dirty).unwrap();
    refused("dirty");
    fs::write(b.path().join("disk.qcow2"), "").unwrap();
    refused("not a qcow2 image");
}
