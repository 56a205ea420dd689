use super::*;
use crate::disk::judges::{
    Numbers, check_clean, create, guest_bytes, qemu_img, qemu_io, run, text,
};
use crate::disk::{Format, Layer, create_overlay};
use std::cell::RefCell;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

thread_local! {
    /// The image that is being flushed, and the steps after which it was examined.
    static FLUSHED: RefCell<(PathBuf, Vec<FlushStep>)> = RefCell::default();
}

/// Fails unless the image, as a crash would leave it now, is whole; leaked clusters may be there.
fn examine(step: FlushStep) {
    FLUSHED.with_borrow_mut(|(image, steps)| {
        let copy = tempfile::NamedTempFile::new_in(image.parent().unwrap()).unwrap();
        std::fs::copy(&image, copy.path()).unwrap();
        let output = run(
            "qemu-img",
            &["check", "-q", "-f", "qcow2", text(copy.path())],
        );
        // 3: there are leaked clusters, and nothing else.
        let code = output.status.code();
        assert!(matches!(code, Some(0 | 3)), "after {step:?}: {output:?}");
        steps.push(step);
    });
}

fn chain(image: &Path) -> Chain {
    let owner = std::fs::metadata(image).unwrap().uid();
    Chain::open(image, image.parent().unwrap(), owner).unwrap()
}

fn open(image: &Path) -> Result<DiskWriter> {
    DiskWriter::open(chain(image), |_| {})
}

/// A layer with data, compressed clusters and zeros, an empty overlay on it, and the disk's bytes.
fn layers(dir: &Path, size: u64) -> (PathBuf, Vec<u8>) {
    let (base, image) = (dir.join("base.qcow2"), dir.join("disk.qcow2"));
    create(&base, "compat=1.1", None, &size.to_string());
    qemu_io(
        &base,
        &[
            "write -P 7 100k 500k",
            "write -P 8 3M 1M",
            "write -c -P 9 2M 128k",
        ],
    );
    create_overlay(&image, &base, Format::Qcow2, size).unwrap();
    let bytes = guest_bytes(&image);
    (image, bytes)
}

#[test]
#[ignore = "needs programs"]
fn what_is_written_and_zeroed_is_what_qemu_reads() {
    let dir = tempfile::tempdir().unwrap();
    let size = 5 * MIB + 512;
    let (image, mut expected) = layers(dir.path(), size);
    let below = std::fs::read(dir.path().join("base.qcow2")).unwrap();
    FLUSHED.set((image.clone(), Vec::new()));
    let mut numbers = Numbers(11);
    for round in 0..6u8 {
        let writer = DiskWriter::open(chain(&image), examine).unwrap();
        for step in 0..60u8 {
            let at = numbers.below(size);
            let most = [512, 4096, 65536, 300_000][numbers.below(4) as usize];
            let len = (1 + numbers.below(most)).min(size - at);
            let range = at as usize..(at + len) as usize;
            if numbers.below(3) == 0 {
                writer.zero(at, len).unwrap();
                expected[range].fill(0);
            } else {
                let bytes = vec![round.wrapping_mul(61).wrapping_add(step) | 1; len as usize];
                writer.write_at(at, &bytes).unwrap();
                expected[range].copy_from_slice(&bytes);
            }
            if step % 20 == 0 {
                writer.flush().unwrap();
            }
        }
        let mut read = vec![1; size as usize];
        writer.read_at(0, &mut read).unwrap();
        assert!(read == expected, "a read sees what was written before it");
        writer.flush().unwrap();
        drop(writer);
        check_clean(&image);
        assert!(guest_bytes(&image) == expected, "round {round}");
    }
    let steps = FLUSHED.take().1;
    for step in [
        FlushStep::Refcounts,
        FlushStep::Tables,
        FlushStep::Roots,
        FlushStep::Lowered,
    ] {
        assert!(steps.contains(&step), "{step:?} was never reached");
    }
    let after = std::fs::read(dir.path().join("base.qcow2")).unwrap();
    assert!(after == below, "the layer below stays as it was");
}

#[test]
#[ignore = "needs programs"]
fn clusters_that_qemu_wrote_compressed_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    create(&image, "compat=1.1", None, "4M");
    qemu_io(&image, &["write -c -P 5 0 1M", "write -P 6 2M 1M"]);
    let mut expected = guest_bytes(&image);
    let writer = open(&image).unwrap();
    writer.write_at(100, &[1; 1000]).unwrap();
    writer.write_at(128 << 10, &[2; 256 << 10]).unwrap();
    writer.zero(600 << 10, 300 << 10).unwrap();
    writer.write_at(5 << 19, &[3; 10]).unwrap();
    writer.flush().unwrap();
    expected[100..1100].fill(1);
    expected[128 << 10..384 << 10].fill(2);
    expected[600 << 10..900 << 10].fill(0);
    expected[5 << 19..(5 << 19) + 10].fill(3);
    drop(writer);
    check_clean(&image);
    assert!(guest_bytes(&image) == expected);
}

#[test]
#[ignore = "needs programs"]
fn without_a_flush_the_image_stays_whole_and_keeps_what_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let (image, mut expected) = layers(dir.path(), 8 * MIB);
    let writer = open(&image).unwrap();
    writer.write_at(MIB, &[1; 200_000]).unwrap();
    writer.flush().unwrap();
    expected[MIB as usize..MIB as usize + 200_000].fill(1);
    writer.write_at(6 * MIB, &[2; 200_000]).unwrap();
    writer.zero(3 * MIB, MIB).unwrap();
    drop(writer);
    assert!(guest_bytes(&image) == expected);
    // Clusters that were written and not flushed are allocated again: no space is lost.
    let writer = open(&image).unwrap();
    writer.write_at(6 * MIB, &[3; 200_000]).unwrap();
    writer.flush().unwrap();
    expected[6 * MIB as usize..6 * MIB as usize + 200_000].fill(3);
    drop(writer);
    check_clean(&image);
    assert!(guest_bytes(&image) == expected);
}

#[test]
#[ignore = "needs programs"]
fn zeroed_clusters_give_their_room_back_and_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = layers(dir.path(), 64 * MIB);
    let writer = open(&image).unwrap();
    let blocks = || std::fs::metadata(&image).unwrap().blocks() * 512;
    writer
        .write_at(16 * MIB, &vec![1; 32 * MIB as usize])
        .unwrap();
    writer.flush().unwrap();
    let (full, length) = (blocks(), std::fs::metadata(&image).unwrap().len());
    assert!(full >= 32 * MIB);
    writer.zero(16 * MIB, 32 * MIB).unwrap();
    writer.flush().unwrap();
    assert!(blocks() <= full - 30 * MIB, "{} of {full}", blocks());
    writer
        .write_at(16 * MIB, &vec![2; 32 * MIB as usize])
        .unwrap();
    writer.flush().unwrap();
    let again = std::fs::metadata(&image).unwrap().len();
    assert!(again <= length + MIB, "{again} after {length}");
    drop(writer);
    check_clean(&image);
}

#[test]
#[ignore = "needs programs"]
fn an_image_grows_past_one_refcount_block_and_more_tables_than_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    // A refcount block of 2048 clusters of 4 KiB, and L2 tables for 2 MiB.
    create(&image, "compat=1.1,cluster_size=4096", None, "400M");
    FLUSHED.set((image.clone(), Vec::new()));
    let writer = DiskWriter::open(chain(&image), examine).unwrap();
    for number in 0..100 {
        writer
            .write_at(number * 4 * MIB, &vec![number as u8 + 1; 200_000])
            .unwrap();
    }
    writer.flush().unwrap();
    drop(writer);
    check_clean(&image);
    let bytes = guest_bytes(&image);
    for number in 0..100 {
        let at = (number * 4 * MIB) as usize;
        assert!(
            bytes[at..at + 200_000]
                .iter()
                .all(|byte| *byte == number as u8 + 1)
        );
        assert_eq!(bytes[at + 200_000], 0);
    }
}

#[test]
#[ignore = "needs programs"]
fn what_would_be_past_the_end_is_refused_before_a_byte_changes() {
    let dir = tempfile::tempdir().unwrap();
    let (image, expected) = layers(dir.path(), 4 * MIB);
    let writer = open(&image).unwrap();
    assert_eq!(writer.size(), 4 * MIB);
    let errno = |done: Result<()>| done.unwrap_err().errno();
    assert_eq!(errno(writer.write_at(4 * MIB - 10, &[1; 11])), libc::EFBIG);
    assert_eq!(errno(writer.write_at(u64::MAX - 1, &[1; 11])), libc::EFBIG);
    assert_eq!(errno(writer.zero(4 * MIB - 10, 11)), libc::EFBIG);
    writer.flush().unwrap();
    drop(writer);
    check_clean(&image);
    assert!(guest_bytes(&image) == expected);
}

#[test]
#[ignore = "needs programs"]
fn images_that_a_write_could_damage_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let refused = |errno: i32, why: &str| {
        let Err(error) = open(&image) else {
            panic!("opened, though {why}")
        };
        assert!(
            error.errno() == errno && error.to_string().contains(why),
            "{error}"
        );
    };
    for (options, why) in [
        ("compat=0.10", "version 2"),
        ("compat=1.1,refcount_bits=8", "16 bits"),
        ("compat=1.1,lazy_refcounts=on", "lazy refcounts"),
    ] {
        create(&image, options, None, "1M");
        refused(libc::EROFS, why);
    }
    create(&image, "compat=1.1", None, "1M");
    qemu_img("snapshot -c one", &image);
    refused(libc::EROFS, "internal snapshots");
    create(&image, "compat=1.1", None, "1M");
    let other = dir.path().join("backup.qcow2");
    std::fs::hard_link(&image, &other).unwrap();
    refused(libc::EPERM, "another name");
    std::fs::remove_file(other).unwrap();
    qemu_io(&image, &["write -P 1 0 128k"]);
    let header = Header::open(&image).unwrap().unwrap();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, header.refcount_table_offset)
        .unwrap();
    // The refcounts of the last clusters, with the data, become 0.
    let block = u64::from_be_bytes(entry);
    let last = file.metadata().unwrap().len() / header.cluster_size() - 1;
    file.write_all_at(&[0; 2], block + last * 2).unwrap();
    refused(libc::EROFS, "refcount in it is too low");
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    assert_eq!(Layer::open(&raw, Format::Raw).unwrap().virtual_size(), 4096);
    let error = open(&raw).err().unwrap();
    assert_eq!(error.errno(), libc::EROFS);
}
