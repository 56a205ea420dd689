use super::*;
use crate::disk::create_overlay;
use crate::disk::judges::{check_clean, create, guest_bytes, info, qemu_io, succeed, text};
use std::os::unix::fs::MetadataExt;

/// A base of 4 MiB and, under a second name, the same inode.
fn base_with_two_names(dir: &Path) -> (PathBuf, PathBuf) {
    let base = dir.join("base.qcow2");
    create(&base, "compat=1.1", None, "4M");
    qemu_io(&base, &["write -P 1 0 4M"]);
    let other = dir.join("the-other-name-of-the-base.qcow2");
    std::fs::hard_link(&base, &other).unwrap();
    (base, other)
}

fn times(path: &Path) -> (i64, i64, i64, i64) {
    let meta = std::fs::metadata(path).unwrap();
    (
        meta.mtime(),
        meta.mtime_nsec(),
        meta.atime(),
        meta.atime_nsec(),
    )
}

#[test]
#[ignore = "needs programs"]
fn a_rebased_image_reads_the_same_through_the_other_name() {
    let dir = tempfile::tempdir().unwrap();
    let (base, other) = base_with_two_names(dir.path());
    for compat in ["0.10", "1.1"] {
        for cluster in [512, 1024, 4096, 65536, 2 << 20] {
            let image = dir.path().join(format!("{compat}-{cluster}.qcow2"));
            let options = format!("compat={compat},cluster_size={cluster}");
            create(&image, &options, Some((&base, "qcow2")), "4M");
            qemu_io(&image, &["write -P 2 1M 64k"]);
            let (bytes, before) = (guest_bytes(&image), times(&image));
            for path in [&other, &base, &other, &base] {
                rebase(&image, path).unwrap();
                let said = info(&image);
                assert_eq!(said["backing-filename"], text(path), "{compat} {cluster}");
                assert_eq!(said["backing-filename-format"], "qcow2");
                check_clean(&image);
                assert!(guest_bytes(&image) == bytes, "{compat} {cluster}");
            }
            let after = times(&image);
            assert_eq!((before.0, before.1), (after.0, after.1));
        }
    }
}

#[test]
#[ignore = "needs programs"]
fn an_overlay_of_ours_is_rebased_to_longer_and_shorter_paths() {
    let dir = tempfile::tempdir().unwrap();
    let (base, other) = base_with_two_names(dir.path());
    let image = dir.path().join("overlay.qcow2");
    create_overlay(&image, &base, Format::Qcow2, 4 << 20).unwrap();
    // A path as long as a header can hold, relative so that the filesystem takes it too.
    let up = "./".repeat((MAX_BACKING_NAME - text(&other).len()) / 2);
    let longest = dir.path().join(up).join("the-other-name-of-the-base.qcow2");
    for path in [&longest, &base, &longest, &other] {
        rebase(&image, path).unwrap();
        let header = Header::open(&image).unwrap().unwrap();
        assert_eq!(header.backing.unwrap().path.as_os_str(), path.as_os_str());
        check_clean(&image);
        succeed("qemu-img", &["compare", text(&image), text(&base)]);
    }
}

#[test]
#[ignore = "needs programs"]
fn a_rebase_interrupted_after_the_name_is_repeatable() {
    let dir = tempfile::tempdir().unwrap();
    let (base, other) = base_with_two_names(dir.path());
    let image = dir.path().join("overlay.qcow2");
    create(&image, "compat=1.1", Some((&base, "qcow2")), "4M");
    let header = Header::open(&image).unwrap().unwrap();
    let name = text(&other).as_bytes();
    let place = unused_span(&header, name.len() as u64).unwrap();
    open_image(&image, true)
        .unwrap()
        .write_all_at(name, place.offset)
        .unwrap();
    assert_eq!(Header::open(&image).unwrap(), Some(header));
    assert_eq!(info(&image)["backing-filename"], text(&base));
    rebase(&image, &other).unwrap();
    assert_eq!(info(&image)["backing-filename"], text(&other));
    check_clean(&image);
}

#[test]
#[ignore = "needs programs"]
fn a_rebase_that_is_refused_leaves_the_file_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let (base, other) = base_with_two_names(dir.path());
    let raw = dir.path().join("base.raw");
    std::fs::write(&raw, [0u8; 4096]).unwrap();
    let refused = |image: &Path, to: &Path| {
        let before = (
            std::fs::read(image).unwrap(),
            times(image).0,
            times(image).1,
        );
        let error = rebase(image, to).unwrap_err();
        assert_eq!(error.errno(), libc::EOPNOTSUPP, "{error}");
        let after = (
            std::fs::read(image).unwrap(),
            times(image).0,
            times(image).1,
        );
        assert!(before == after);
        error.to_string()
    };
    assert!(refused(&raw, &other).contains("raw"));
    assert!(refused(&base, &other).contains("no backing file"));
    let image = dir.path().join("overlay.qcow2");
    create(
        &image,
        "compat=1.1,cluster_size=1k",
        Some((&base, "qcow2")),
        "4M",
    );
    assert!(refused(&image, &raw).contains("base.raw is raw"));
    let long = PathBuf::from(format!("/{}", "x".repeat(1023)));
    assert!(refused(&image, &long).contains("1023"));
    let no_room = PathBuf::from(format!("/{}", "x".repeat(200)).repeat(5));
    assert!(refused(&image, &no_room).contains("no room"));
    // The name directly after the header: old version 2 images without extensions.
    let old = dir.path().join("old.qcow2");
    create(&old, "compat=0.10", Some((&base, "qcow2")), "4M");
    let file = open_image(&old, true).unwrap();
    file.write_all_at(text(&base).as_bytes(), 72).unwrap();
    file.write_all_at(&72u64.to_be_bytes(), 8).unwrap();
    assert!(refused(&old, &other).contains("end marker"));
}

#[test]
#[ignore = "needs programs"]
fn a_rebase_to_the_same_path_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (base, _) = base_with_two_names(dir.path());
    let image = dir.path().join("overlay.qcow2");
    create_overlay(&image, &base, Format::Qcow2, 4 << 20).unwrap();
    let before = (
        std::fs::read(&image).unwrap(),
        std::fs::metadata(&image).unwrap().ctime_nsec(),
    );
    rebase(&image, &base).unwrap();
    let after = (
        std::fs::read(&image).unwrap(),
        std::fs::metadata(&image).unwrap().ctime_nsec(),
    );
    assert!(before == after);
}
