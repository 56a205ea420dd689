use super::*;
use crate::archive::Manifest;
use crate::disk::judges::{Numbers, check_clean, create, qemu_io, succeed, text};
use crate::disk::{Format, create_overlay};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A chain with some MiB of data on a raw base.
fn box_disk(dir: &Path) -> PathBuf {
    let base = dir.join("base.raw");
    let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i / 7) as u8).collect();
    std::fs::write(&base, bytes).unwrap();
    let top = dir.join("top.qcow2");
    create_overlay(&top, &base, Format::Raw, 1 << 30).unwrap();
    qemu_io(
        &top,
        &["write -P 3 10M 20M", "write -P 4 700M 1M", "write -z 0 1M"],
    );
    top
}

fn export(top: &Path) -> Export {
    let home = top.parent().unwrap();
    let owner = std::fs::metadata(home).unwrap().uid();
    let chain = Arc::new(Chain::open(top, home, owner).unwrap());
    let about = About {
        box_name: Some("web".into()),
        image: "alpine:latest".into(),
        options: serde_json::json!({"rootfs": {"Image": "alpine:latest"}}),
        changed_at: chain.changed_at(),
    };
    Export::plan(chain, about).unwrap()
}

fn whole(export: &Export) -> Vec<u8> {
    let mut bytes = vec![1u8; export.len() as usize + 10];
    let len = export.read_at(0, &mut bytes).unwrap();
    assert_eq!(len as u64, export.len());
    bytes.truncate(len);
    bytes
}

/// mke2fs leaves unwritten extents, and what of them is in the page cache counts as data for
/// SEEK_DATA.
#[test]
#[ignore = "needs programs"]
fn what_was_read_of_a_raw_base_changes_no_byte_of_the_archive() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    let file = File::create_new(&base).unwrap();
    file.set_len(256 << 20).unwrap();
    succeed("mke2fs", &["-q", "-F", "-t", "ext4", text(&base)]);
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let top = dir.path().join("top.qcow2");
    create_overlay(&top, &base, Format::Raw, 256 << 20).unwrap();
    let before = export(&top);
    std::fs::read(&base).unwrap();
    let after = export(&top);
    assert_eq!(before.disk_key(), after.disk_key());
    assert_eq!(before.len(), after.len());
    assert!(whole(&before) == whole(&after));
    let disk = dir.path().join("disk.qcow2");
    let bytes = whole(&after);
    std::fs::write(&disk, &bytes[after.disk_range().start as usize..]).unwrap();
    let said = succeed("qemu-img", &["compare", text(&base), text(&disk)]);
    assert!(said.contains("identical"), "{said}");
}

#[test]
#[ignore = "needs programs"]
fn tar_and_python_unpack_it_and_the_checksum_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let top = box_disk(dir.path());
    let archive = dir.path().join("export.boxlite");
    std::fs::write(&archive, whole(&export(&top))).unwrap();
    let listed = succeed("tar", &["--utc", "-tvf", text(&archive)]);
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(
        listed
            .lines()
            .all(|line| line.starts_with("-rw-r--r-- 0/0 ")),
        "{listed}"
    );
    let script = "import sys, tarfile, json, hashlib, os\n\
            t = tarfile.open(sys.argv[1])\n\
            assert t.getnames() == ['disk.qcow2', 'manifest.json'], t.getnames()\n\
            m = json.load(t.extractfile('manifest.json'))\n\
            d = t.extractfile('disk.qcow2').read()\n\
            assert m['container_disk_checksum'] == 'sha256:' + hashlib.sha256(d).hexdigest()\n\
            assert {i.mtime for i in t} == {int(os.stat(sys.argv[2]).st_mtime)}\n\
            print(m['version'], m['box_name'])";
    let said = succeed("python3", &["-c", script, text(&archive), text(&top)]);
    assert_eq!(said.trim(), "3 web");
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    succeed("tar", &["-xf", text(&archive), "-C", text(&out)]);
    let disk = out.join("disk.qcow2");
    check_clean(&disk);
    let said = succeed("qemu-img", &["compare", text(&top), text(&disk)]);
    assert!(said.contains("identical"), "{said}");
    let sum = succeed("sha256sum", &[text(&disk)]);
    let manifest = std::fs::read(out.join("manifest.json")).unwrap();
    let checksum = Manifest::parse(&manifest).unwrap().disk_digest.unwrap();
    let hex: String = checksum.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(sum.split(' ').next(), Some(hex.as_str()));
}

#[test]
#[ignore = "needs programs"]
fn two_exports_of_one_state_are_the_same_bytes_in_whatever_order_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let top = box_disk(dir.path());
    let expected = whole(&export(&top));
    let mut numbers = Numbers(99);
    // Backwards: the manifest first, so that the checksum is computed on demand.
    for piece in [4096usize, 131_072, 1_000_003] {
        let again = export(&top);
        let mut bytes = vec![1u8; expected.len()];
        let starts: Vec<usize> = (0..bytes.len()).step_by(piece).collect();
        for &start in starts.iter().rev() {
            let end = (start + piece).min(bytes.len());
            let len = again.read_at(start as u64, &mut bytes[start..end]).unwrap();
            assert_eq!(len, end - start);
        }
        assert!(bytes == expected, "backwards by {piece}");
    }
    let again = export(&top);
    for _ in 0..300 {
        let at = numbers.below(expected.len() as u64 + 5000) as usize;
        let mut part = vec![1u8; 1 + numbers.below(200_000) as usize];
        let len = again.read_at(at as u64, &mut part).unwrap();
        let there = expected.get(at..(at + part.len()).min(expected.len()));
        assert!(part[..len] == *there.unwrap_or_default(), "at {at}");
    }
}

#[test]
#[ignore = "needs programs"]
fn reading_ahead_in_several_threads_still_hashes_along() {
    let dir = tempfile::tempdir().unwrap();
    let top = box_disk(dir.path());
    let expected = whole(&export(&top));
    let again = export(&top);
    let piece = 128 << 10;
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let at = piece * next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if at >= expected.len() {
                        break;
                    }
                    let mut bytes = vec![0u8; piece];
                    let len = again.read_at(at as u64, &mut bytes).unwrap();
                    assert!(bytes[..len] == expected[at..at + len]);
                    again.take_along(at as u64, &bytes[..len]);
                }
            });
        }
    });
    assert!(again.digest().is_some());
}

#[test]
#[ignore = "needs programs"]
fn a_disk_of_eight_gibibytes_and_more_is_listed_with_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("large.qcow2");
    create(&image, "preallocation=metadata", None, "9G");
    let export = export(&image);
    let archive = File::create(dir.path().join("export.boxlite")).unwrap();
    archive.set_len(export.len()).unwrap();
    // All but the data (zeros) and the manifest (its checksum takes a while).
    for range in [0..BLOCK, export.layout.manifest_header.clone()] {
        let mut bytes = vec![0u8; (range.end - range.start) as usize];
        export.read_at(range.start, &mut bytes).unwrap();
        archive.write_all_at(&bytes, range.start).unwrap();
    }
    let size = export.disk.len();
    assert!(size > 9 << 30);
    let path = dir.path().join("export.boxlite");
    let listed = succeed("tar", &["-tvf", text(&path)]);
    assert!(
        listed.contains(&size.to_string()) && listed.contains("manifest.json"),
        "{listed}"
    );
    let script = "import sys, tarfile; print([i.size for i in tarfile.open(sys.argv[1])])";
    let said = succeed("python3", &["-c", script, text(&path)]);
    let manifest = export.layout.manifest.end - export.layout.manifest.start;
    assert_eq!(said.trim(), format!("[{size}, {manifest}]"));
    let mut archive = tar::Archive::new(File::open(&path).unwrap());
    let sizes: Vec<u64> = archive
        .entries_with_seek()
        .unwrap()
        .map(|entry| entry.unwrap().size())
        .collect();
    assert_eq!(sizes, [size, manifest]);
}

#[test]
#[ignore = "needs programs"]
fn a_disk_that_changes_while_it_is_read_is_an_error_and_no_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let top = box_disk(dir.path());
    let export = export(&top);
    let mut bytes = vec![0u8; 1 << 20];
    export.read_at(0, &mut bytes).unwrap();
    qemu_io(&top, &["write -P 9 10M 64k"]);
    assert_eq!(
        export.read_at(1 << 20, &mut bytes).unwrap_err().errno(),
        libc::EIO
    );
    let end = export.len() - 2048;
    assert_eq!(
        export.read_at(end, &mut bytes).unwrap_err().errno(),
        libc::EIO
    );
}
