use super::*;
use crate::disk::judges::{create, run, succeed, text};
use std::os::unix::fs::FileExt;

#[test]
#[ignore = "needs programs"]
fn an_image_whose_features_change_how_it_reads_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let made = |name: &str, arguments: &[&str]| {
        let image = dir.path().join(name);
        let mut all = vec!["create", "-q", "-f", "qcow2"];
        all.extend(arguments);
        all.extend([text(&image), "1M"]);
        succeed("qemu-img", &all);
        let error = Header::open(&image).unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        error.to_string()
    };
    let secret = ["--object", "secret,id=s,data=x", "-o"];
    let encrypted = |format: &str| {
        let option = format!("encrypt.format={format},encrypt.key-secret=s");
        let mut all = secret.to_vec();
        all.push(&option);
        all.iter().map(|s| s.to_string()).collect::<Vec<_>>()
    };
    let luks = encrypted("luks");
    let luks: Vec<&str> = luks.iter().map(String::as_str).collect();
    assert!(made("luks", &luks).contains("LUKS"));
    assert!(made("l2", &["-o", "extended_l2=on"]).contains("extended L2"));
    let data = format!("data_file={}", text(&dir.path().join("data.raw")));
    assert!(made("data", &["-o", &data]).contains("external data file"));
    assert!(made("zstd", &["-o", "compression_type=zstd"]).contains("zstd"));
    // qemu-img makes no AES images any more, and no dirty ones on demand.
    let changed = |name: &str, at: u64, bytes: &[u8]| {
        let image = dir.path().join(name);
        create(&image, "compat=1.1", None, "1M");
        open_image(&image, true)
            .unwrap()
            .write_all_at(bytes, at)
            .unwrap();
        Header::open(&image).unwrap_err().to_string()
    };
    assert!(changed("aes", 32, &1u32.to_be_bytes()).contains("AES"));
    assert!(changed("dirty", 72, &1u64.to_be_bytes()).contains("dirty"));
    assert!(changed("corrupt", 72, &2u64.to_be_bytes()).contains("corrupt"));
    assert!(changed("future", 72, &(1u64 << 40).to_be_bytes()).contains("unknown"));
}

#[test]
#[ignore = "needs programs"]
fn an_insane_header_is_an_error_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good.qcow2");
    create(
        &good,
        "compat=1.1",
        Some((Path::new("/dev/null"), "raw")),
        "1M",
    );
    let bytes = std::fs::read(&good).unwrap();
    let image = dir.path().join("bad.qcow2");
    for at in 0..256 {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] = value;
            std::fs::write(&image, &bad).unwrap();
            // Whatever we accept, imago must open or refuse; nothing may panic.
            if let Ok(Some(_)) = Header::open(&image) {
                let _ = crate::disk::Layer::open(&image, Format::Qcow2)
                    .and_then(|layer| layer.holds_data());
            }
        }
    }
    for len in [4, 71, 72, 103, 104, 200, 65536, 131072] {
        std::fs::write(&image, &bytes[..len]).unwrap();
        assert!(Header::open(&image).is_err(), "cut to {len} bytes");
    }
}

#[test]
#[ignore = "needs programs"]
fn what_has_no_magic_is_raw_and_what_is_no_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    for bytes in [&b""[..], b"QF", b"#!/bin/sh"] {
        std::fs::write(&raw, bytes).unwrap();
        assert_eq!(Header::open(&raw).unwrap(), None);
    }
    assert_eq!(Header::open(dir.path()).unwrap_err().errno(), libc::EINVAL);
    let fifo = dir.path().join("fifo");
    assert!(run("mkfifo", &[text(&fifo)]).status.success());
    assert_eq!(Header::open(&fifo).unwrap_err().errno(), libc::EINVAL);
}
