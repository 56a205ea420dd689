use super::*;
use crate::disk::judges::{check_clean, create, qemu_io, succeed, text};
use crate::disk::{Flattened, inspect_standalone};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;
use tempfile::TempDir;

const PIECE: usize = 1 << 20;

struct TwoDisks(TempDir);

impl TwoDisks {
    /// Two disks of 1.2 GiB: the later one has other data in some places, none in others, and the
    /// same in most.
    fn make() -> TwoDisks {
        let disks = TwoDisks(tempfile::tempdir().unwrap());
        let base = disks.at("base");
        create(&base, "cluster_size=64k", None, "1200M");
        qemu_io(
            &base,
            &[
                "write -P 1 0 8M",
                "write -P 2 600M 3M",
                "write -P 3 1199M 1M",
            ],
        );
        for (name, writes) in [
            ("earlier", &["write -P 4 1M 64k", "write -P 5 100M 1M"][..]),
            (
                "later",
                &[
                    "write -P 6 2M 128k",
                    "write -z 601M 64k",
                    "write -P 7 1100M 300k",
                    "write -P 5 100M 512k",
                ],
            ),
        ] {
            create(
                &disks.at(name),
                "cluster_size=64k",
                Some((&base, "qcow2")),
                "1200M",
            );
            qemu_io(&disks.at(name), writes);
        }
        disks
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn chain(&self, name: &str) -> Arc<Chain> {
        Arc::new(Chain::open(&self.at(name), Path::new("/"), 0).unwrap())
    }

    /// Writes a disk as an image that stands alone, as exports have it.
    fn flat(&self, name: &str, to: &str) -> Vec<u8> {
        let flattened = Flattened::plan(self.chain(name)).unwrap();
        let mut bytes = vec![0; flattened.len() as usize];
        flattened.read_at(0, &mut bytes).unwrap();
        std::fs::write(self.at(to), &bytes).unwrap();
        bytes
    }

    fn assert_same(&self, one: &str, other: &str) {
        let said = succeed(
            "qemu-img",
            &["compare", text(&self.at(one)), text(&self.at(other))],
        );
        assert!(said.contains("identical"), "{one}, {other}: {said}");
    }
}

/// Receives an image in pieces, as an import does: writes what is wanted, and nothing for pieces of
/// zeros. Returns the clusters that were left out, and the number of bytes written.
fn receive(bytes: &[u8], other: Arc<Chain>, to: &Path) -> (Option<LeftOut>, usize) {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(to)
        .unwrap();
    let mut comparison = Comparison::with(other);
    let mut written = 0;
    for (number, piece) in bytes.chunks(PIECE).enumerate() {
        let at = (number * PIECE) as u64;
        if piece.iter().all(|byte| *byte == 0) {
            comparison.pass_zeros(&file, at..at + piece.len() as u64);
            continue;
        }
        for range in comparison.wanted(&file, at, piece) {
            written += range.len();
            file.write_all_at(&piece[range.clone()], at + range.start as u64)
                .unwrap();
        }
    }
    file.set_len(bytes.len() as u64).unwrap();
    (comparison.end(), written)
}

/// Writes the clusters that were left out into a received image.
fn fill(left_out: &LeftOut, received: &Path) -> Result<()> {
    let file = File::options().write(true).open(received).unwrap();
    left_out.fill(&file, received)
}

#[test]
#[ignore = "needs programs"]
fn what_another_disk_has_is_left_out_and_can_be_filled_in() {
    let disks = TwoDisks::make();
    for (one, other) in [
        ("later", "earlier"),
        ("earlier", "later"),
        ("later", "later"),
    ] {
        let (whole, received) = (format!("{one} {other}"), format!("{one} {other} received"));
        let bytes = disks.flat(one, &whole);
        let (left_out, written) = receive(&bytes, disks.chain(other), &disks.at(&received));
        let left_out = Arc::new(left_out.unwrap());
        let left = left_out.count() * CLUSTER;
        // Of 13 MiB of data, but for what differs, and the tables.
        assert!(left > 11 << 20, "{whole}: {left}");
        assert_eq!(written as u64 + left, bytes.len() as u64);
        inspect_standalone(&disks.at(&received)).unwrap();

        let image = disks.at(&format!("{whole} difference"));
        let backing = disks.at(other);
        let chain = disks.chain(&received);
        let difference = Flattened::plan_received(chain, left_out.clone(), &backing).unwrap();
        assert!(difference.len() < 3 << 20, "{whole}: {}", difference.len());
        let out = File::create_new(&image).unwrap();
        difference.write_to(&out, &mut |_| Ok(())).unwrap();
        check_clean(&image);
        disks.assert_same(one, &format!("{whole} difference"));

        fill(&left_out, &disks.at(&received)).unwrap();
        assert!(
            std::fs::read(disks.at(&received)).unwrap() == bytes,
            "{whole}"
        );
    }
}

#[test]
#[ignore = "needs programs"]
fn images_that_are_in_another_order_or_of_another_kind_are_written_whole() {
    let disks = TwoDisks::make();
    let later = disks.at("later");
    for (name, options) in [
        // qemu puts each L2 table where it needs it, and writes the L1 table last.
        ("ordered by qemu", &["-o", "cluster_size=64k"][..]),
        ("small clusters", &["-o", "cluster_size=4k"]),
        ("compressed", &["-c", "-o", "cluster_size=64k"]),
        ("old", &["-o", "compat=0.10,cluster_size=64k"]),
    ] {
        let whole = disks.at(name);
        let from = [
            &["convert", "-O", "qcow2"],
            options,
            &[text(&later), text(&whole)],
        ]
        .concat();
        succeed("qemu-img", &from);
        let bytes = std::fs::read(&whole).unwrap();
        let received = format!("{name} received");
        let (left_out, _) = receive(&bytes, disks.chain("earlier"), &disks.at(&received));
        if let Some(left_out) = left_out {
            fill(&left_out, &disks.at(&received)).unwrap();
        }
        assert!(
            std::fs::read(disks.at(&received)).unwrap() == bytes,
            "{name}"
        );
    }
}

#[test]
#[ignore = "needs programs"]
fn a_disk_of_another_size_is_written_whole() {
    let disks = TwoDisks::make();
    let bytes = disks.flat("later", "whole");
    create(
        &disks.at("larger"),
        "cluster_size=64k",
        Some((&disks.at("earlier"), "qcow2")),
        "1300M",
    );
    let (left_out, written) = receive(&bytes, disks.chain("larger"), &disks.at("received"));
    assert!(left_out.is_none());
    assert_eq!(written, bytes.len());
}

/// A header and tables for a disk of 1 MiB whose entries name these host clusters.
fn crafted(entries: &[u64], length: u64) -> Vec<u8> {
    let mut image = vec![0u8; (length * CLUSTER) as usize];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(4, &3u32.to_be_bytes());
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &CLUSTER.to_be_bytes());
    put(CLUSTER as usize, &(2 * CLUSTER).to_be_bytes());
    for (number, entry) in entries.iter().enumerate() {
        put(2 * CLUSTER as usize + number * 8, &entry.to_be_bytes());
    }
    image
}

#[test]
fn crafted_tables_leave_out_nothing_that_the_other_disk_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, vec![9u8; 1 << 20]).unwrap();
    let other = || Arc::new(Chain::open(&raw, Path::new("/"), 0).unwrap());
    let data = |cluster: u64| cluster * CLUSTER;
    for (case, entries, count) in [
        ("in order", vec![data(3), data(4)], 2),
        ("one cluster twice", vec![data(3), data(3), data(4)], 1),
        ("backwards", vec![data(4), data(3)], 1),
        ("before the tables", vec![data(0), data(1), data(3)], 1),
        ("past the end", vec![data(1 << 30), data(3)], 0),
        ("compressed", vec![data(3), COMPRESSED | 77, data(4)], 1),
        ("zeros with a place", vec![data(3) | ZERO, data(4)], 1),
    ] {
        let mut image = crafted(&entries, 5);
        image[3 * CLUSTER as usize..].fill(9);
        let place = dir.path().join(case);
        let (left_out, written) = receive(&image, other(), &place);
        let left = left_out.map_or(0, |left_out| left_out.count());
        assert_eq!(left, count, "{case}");
        assert_eq!(
            written as u64,
            image.len() as u64 - left * CLUSTER,
            "{case}"
        );
    }
    // A table that is data of its own, which the other disk has: what it says is missing.
    let image = crafted(&[data(2)], 3);
    let same = dir.path().join("same");
    let mut bytes = image[2 * CLUSTER as usize..].to_vec();
    bytes.resize(1 << 20, 0);
    std::fs::write(&same, bytes).unwrap();
    let place = dir.path().join("of its own");
    let same = Arc::new(Chain::open(&same, Path::new("/"), 0).unwrap());
    let (left_out, _) = receive(&image, same, &place);
    let left_out = Arc::new(left_out.unwrap());
    assert_eq!(fill(&left_out, &place).unwrap_err().errno(), libc::EBADMSG);
    let chain = Arc::new(Chain::open(&place, Path::new("/"), 0).unwrap());
    let planned = Flattened::plan_received(chain, left_out, Path::new("/below"));
    assert_eq!(planned.err().map(|e| e.errno()), Some(libc::EBADMSG));
    // A cut header, and an L1 table that reaches past the end of all offsets.
    for length in [0, 40, 100] {
        let image = crafted(&[data(3)], 4);
        let (left_out, _) = receive(
            &image[..length],
            other(),
            &dir.path().join(format!("{length}")),
        );
        assert!(left_out.is_none());
    }
    let mut image = crafted(&[data(3)], 4);
    image[40..48].copy_from_slice(&u64::MAX.to_be_bytes());
    let (left_out, _) = receive(&image, other(), &dir.path().join("far"));
    assert!(left_out.is_none());
}
