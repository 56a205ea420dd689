//! Images made by qemu-img and qemu-io, good ones and damaged ones.

use std::fs;
use std::process::{Command, Output};

use tempfile::TempDir;

use super::*;

/// A directory with an image `disk.qcow2`.
struct Made {
    dir: TempDir,
}

impl Made {
    /// 8 MiB with data at 1 MiB, 3 MiB and 5 MiB, converted with `options`.
    fn converted(options: &[&str]) -> Made {
        let made = Made {
            dir: tempfile::tempdir().unwrap(),
        };
        let mut raw = vec![0; 8 << 20];
        for at in [1 << 20, 3 << 20, 5 << 20] {
            for (n, byte) in raw[at..at + 300_000].iter_mut().enumerate() {
                *byte = (n / 3 + n / 1000) as u8;
            }
        }
        fs::write(made.dir.path().join("raw"), raw).unwrap();
        let mut args = vec!["convert", "-O", "qcow2"];
        args.extend(options);
        args.extend(["raw", "disk.qcow2"]);
        made.qemu("qemu-img", &args);
        made
    }

    fn output(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program)
            .args(args)
            .current_dir(self.dir.path())
            .output()
            .unwrap()
    }

    fn qemu(&self, program: &str, args: &[&str]) {
        let output = self.output(program, args);
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
    }

    fn io(&self, commands: &[&str]) {
        for command in commands {
            self.qemu("qemu-io", &["-f", "qcow2", "-c", command, "disk.qcow2"]);
        }
    }

    fn inspect(&self) -> Result<Header> {
        inspect_standalone(&self.dir.path().join("disk.qcow2"))
    }

    fn must_pass(&self) {
        if let Err(error) = self.inspect() {
            panic!("{error}");
        }
    }

    /// Refused by us with `why`, and no less by qemu-img.
    fn must_fail(&self, why: &str) {
        self.must_be_refused(why);
        let check = self.output("qemu-img", &["check", "disk.qcow2"]);
        assert!(!check.status.success(), "qemu-img finds nothing; we: {why}");
    }

    /// Refused by us; qemu-img does not look at this.
    fn must_be_refused(&self, why: &str) {
        let error = self.inspect().expect_err(why);
        assert!(error.to_string().contains(why), "{error}; wanted: {why}");
        assert_eq!(error.errno(), libc::EBADMSG, "{error}");
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("disk.qcow2")).unwrap()
    }

    fn put(&self, bytes: &[u8]) {
        fs::write(self.dir.path().join("disk.qcow2"), bytes).unwrap();
    }

    /// With the big-endian words at some places changed.
    fn patched(&self, words: &[(u64, u64)]) -> &Made {
        let mut bytes = self.bytes();
        for (at, word) in words {
            bytes[*at as usize..][..8].copy_from_slice(&word.to_be_bytes());
        }
        self.put(&bytes);
        self
    }
}

/// Where the tables of an image are, in its bytes.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    fn of(made: &Made) -> Tables {
        Tables {
            bytes: made.bytes(),
        }
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes[at as usize..][..8].try_into().unwrap())
    }

    fn l1(&self) -> u64 {
        self.word(40)
    }

    /// Places of the first L2 table's entries in use, in guest order.
    fn entries(&self) -> Vec<u64> {
        let l2 = self.word(self.l1()) & OFFSET_MASK;
        (l2..l2 + (1 << 16))
            .step_by(8)
            .filter(|at| self.word(*at) != 0)
            .collect()
    }

    fn refcount_block(&self) -> u64 {
        self.word(self.word(48))
    }

    /// The word that has the 16-bit refcount of the cluster at `host`, with that one replaced.
    fn refcount(&self, host: u64, value: u64) -> (u64, u64) {
        let at = self.refcount_block() + (host >> 16) * 2;
        let shift = 48 - at % 8 * 8;
        (
            at & !7,
            self.word(at & !7) & !(0xffff << shift) | value << shift,
        )
    }
}

#[test]
#[ignore = "needs programs"]
fn images_that_qemu_makes_pass() {
    for options in [
        [].as_slice(),
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=4k"],
        &["-o", "cluster_size=2M"],
        &["-o", "refcount_bits=1"],
        &["-o", "refcount_bits=2,cluster_size=512"],
        &["-o", "refcount_bits=4"],
        &["-o", "refcount_bits=8"],
        &["-o", "refcount_bits=32"],
        &["-o", "refcount_bits=64,cluster_size=1k"],
        &["-o", "preallocation=metadata"],
        &["-o", "preallocation=full,cluster_size=512"],
        &["-o", "lazy_refcounts=on"],
        &["-c"],
        &["-c", "-o", "compat=0.10"],
        &["-c", "-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=4k,refcount_bits=64"],
        &["-S", "0"],
    ] {
        let made = Made::converted(options);
        made.must_pass();
        let header = made.inspect().unwrap();
        assert_eq!(header.virtual_size, 8 << 20);
    }
}

#[test]
#[ignore = "needs programs"]
fn images_that_were_used_pass() {
    let made = Made::converted(&["-c"]);
    made.io(&[
        "write -P 7 1M 100k",
        "write -z 3M 128k",
        "write -zu 4M 512k",
        "write -P 9 4100k 4k",
        "write -z 1M 64k",
        "discard 5M 64k",
        "write -c -P 3 6M 64k",
    ]);
    made.must_pass();
    made.qemu("qemu-img", &["snapshot", "-c", "one", "disk.qcow2"]);
    made.io(&["write -P 1 0 7M"]);
    made.qemu("qemu-img", &["snapshot", "-d", "one", "disk.qcow2"]);
    made.qemu("qemu-img", &["resize", "-q", "disk.qcow2", "70G"]);
    made.io(&["write -P 2 69G 1M", "write -P 2 513M 10"]);
    made.qemu("qemu-img", &["bitmap", "--add", "disk.qcow2", "b"]);
    made.must_pass();

    let made = Made::converted(&["-o", "compat=0.10"]);
    made.io(&["write -P 2 7M 1", "discard 1M 1M"]);
    made.must_pass();
    made.qemu(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "disk.qcow2", "1025"],
    );
    made.must_pass();
    made.io(&["write -P 2 0 1025"]);
    made.must_pass();
}

#[test]
#[ignore = "needs programs"]
fn unset_copied_flags_and_leaked_clusters_are_accepted() {
    let made = Made::converted(&[]);
    let tables = Tables::of(&made);
    let mut words: Vec<_> = tables
        .entries()
        .iter()
        .map(|at| (*at, tables.word(*at) & !COPIED))
        .collect();
    words.push((tables.l1(), tables.word(tables.l1()) & !COPIED));
    made.patched(&words).must_pass();
    let entry = tables.entries()[3];
    made.patched(&[(entry, 0)]).must_pass();
    let host = tables.word(tables.entries()[4]) & OFFSET_MASK;
    made.patched(&[tables.refcount(host, 5)]).must_pass();
    let mut longer = made.bytes();
    longer.extend([1; 100_000]);
    made.put(&longer);
    made.must_pass();
}

#[test]
#[ignore = "needs programs"]
fn an_entry_out_of_the_file_or_unaligned_is_refused() {
    let made = Made::converted(&[]);
    let good = made.bytes();
    let tables = Tables::of(&made);
    let (entry, l1) = (tables.entries()[2], tables.l1());
    let past = (good.len() as u64).next_multiple_of(1 << 16);
    for (at, word, why) in [
        (entry, COPIED | past, "data cluster"),
        (entry, COPIED | OFFSET_MASK & !0xffff, "data cluster"),
        (entry, COPIED | past | ZERO, "data cluster"),
        (entry, tables.word(entry) + 512, "not cluster-aligned"),
        (l1, COPIED | past, "L2 table"),
        (l1, COPIED | OFFSET_MASK & !0xffff, "L2 table"),
        (l1, tables.word(l1) + 512, "not cluster-aligned"),
        (tables.word(48), past, "refcount block"),
        (tables.word(48), 1 << 63, "refcount block"),
        (
            tables.word(48),
            tables.word(tables.word(48)) + 512,
            "not cluster-aligned",
        ),
        (40, past, "L1 table"),
        (48, past, "refcount table"),
    ] {
        made.put(&good);
        made.patched(&[(at, word)]).must_fail(why);
    }
    made.put(&good[..good.len() - (3 << 16)]);
    made.must_fail("outside the file");
    made.put(&good[..100]);
    made.must_fail("");
}

#[test]
#[ignore = "needs programs"]
fn two_owners_of_a_cluster_are_refused() {
    let made = Made::converted(&[]);
    let good = made.bytes();
    let tables = Tables::of(&made);
    let entries = tables.entries();
    let header = COPIED;
    let owners = [
        tables.word(entries[5]),
        COPIED | tables.l1(),
        tables.word(tables.l1()),
        COPIED | tables.word(48),
        COPIED | tables.refcount_block(),
    ];
    for owner in owners {
        made.put(&good);
        made.patched(&[(entries[2], owner)])
            .must_fail("shares a cluster");
        made.put(&good);
        made.patched(&[(entries[2], owner | ZERO)])
            .must_fail("shares a cluster");
    }
    // Offset 0 is the header, and in an L2 entry it means unallocated.
    made.put(&good);
    made.patched(&[(entries[2], header)]).must_pass();
    for (at, word) in [
        (48, tables.l1()),
        (40, tables.word(48)),
        (tables.word(48), tables.l1()),
        (tables.l1(), COPIED | tables.refcount_block()),
    ] {
        made.put(&good);
        made.patched(&[(at, word)]).must_fail("");
    }
    // Two L1 entries with one L2 table.
    let made = Made::converted(&["-o", "cluster_size=4k"]);
    let tables = Tables::of(&made);
    made.patched(&[(tables.l1(), tables.word(tables.l1() + 8))])
        .must_fail("shares a cluster");
}

#[test]
#[ignore = "needs programs"]
fn a_cluster_in_use_without_a_refcount_is_refused() {
    let made = Made::converted(&[]);
    let good = made.bytes();
    let tables = Tables::of(&made);
    let data = tables.word(tables.entries()[2]) & OFFSET_MASK;
    let l2 = tables.word(tables.l1()) & OFFSET_MASK;
    for host in [
        data,
        l2,
        tables.l1(),
        tables.word(48),
        tables.refcount_block(),
        0,
    ] {
        made.put(&good);
        made.patched(&[tables.refcount(host, 0)])
            .must_fail("has refcount 0");
    }
    made.put(&good);
    made.patched(&[(tables.word(48), 0)])
        .must_fail("has refcount 0");
}

#[test]
#[ignore = "needs programs"]
fn compressed_clusters_are_checked_like_others() {
    let made = Made::converted(&["-c"]);
    let good = made.bytes();
    let tables = Tables::of(&made);
    let entries = tables.entries();
    let first = tables.word(entries[0]);
    assert_ne!(first & COMPRESSED, 0);
    // 64 KiB clusters: 54 bits of offset.
    let host = first & ((1 << 54) - 1);
    let sharing = entries
        .iter()
        .filter(|at| (tables.word(**at) & ((1 << 54) - 1)) >> 16 == host >> 16)
        .count() as u64;
    assert!(sharing > 2, "{sharing}");
    let past = good.len() as u64;
    for (at, word, why) in [
        (entries[1], COMPRESSED | past, "lies outside"),
        (entries[1], first | 0xff << 54, "lies outside"),
        (entries[1], COMPRESSED | ((1 << 54) - 1), "lies outside"),
        (entries[1], COMPRESSED | tables.l1(), "shares a cluster"),
        (entries[1], first | COPIED, "marked COPIED"),
        (entries[1], COPIED | host & !0xffff, "shares a cluster"),
    ] {
        made.put(&good);
        made.patched(&[(at, word)]);
        match why {
            "lies outside" => made.must_be_refused(why),
            _ => made.must_fail(why),
        }
    }
    made.put(&good);
    let low = tables.refcount(host, sharing - 1);
    made.patched(&[low])
        .must_fail(&format!("in use {sharing} times"));
    made.patched(&[tables.refcount(host, sharing)]).must_pass();
    made.patched(&[tables.refcount(host, sharing + 1)])
        .must_pass();
}

#[test]
#[ignore = "needs programs"]
fn reserved_bits_are_refused() {
    let made = Made::converted(&[]);
    let good = made.bytes();
    let tables = Tables::of(&made);
    let entry = tables.entries()[2];
    for (at, bit) in [
        (entry, 1 << 1),
        (entry, 1 << 56),
        (tables.l1(), 1),
        (tables.l1(), 1 << 62),
        (tables.word(48), 1),
    ] {
        made.put(&good);
        made.patched(&[(at, tables.word(at) | bit)]);
        let error = made.inspect().unwrap_err().to_string();
        assert!(error.contains("reserved bits"), "{error}");
    }
    let made = Made::converted(&["-o", "compat=0.10"]);
    let tables = Tables::of(&made);
    let entry = tables.entries()[2];
    made.patched(&[(entry, tables.word(entry) | ZERO)]);
    assert!(
        made.inspect()
            .unwrap_err()
            .to_string()
            .contains("version 2")
    );
}

#[test]
#[ignore = "needs programs"]
fn impossible_sizes_are_refused() {
    let made = Made::converted(&[]);
    let good = made.bytes();
    for (at, word, why) in [
        (24, 0, "virtual size is 0"),
        (24, 1 << 40, "L1 table too short"),
        (24, u64::MAX, "L1 table too short"),
        (36, u64::MAX, "L1 table of more than 32 MiB"),
        (56, 0, "refcount table of 0 bytes"),
        (56, 0xffff_ffff << 32, "refcount table of"),
        (56, 129 << 32, "refcount table of"),
    ] {
        made.put(&good);
        made.patched(&[(at, word)]);
        let error = made.inspect().unwrap_err();
        assert!(error.to_string().contains(why), "{error}; wanted: {why}");
        assert_eq!(error.errno(), libc::EBADMSG);
    }
    made.put(b"");
    assert_eq!(made.inspect().unwrap_err().errno(), libc::EBADMSG);

    // 65 TiB; and 512-byte clusters in a file of 1 TiB, which would need 256 MiB of bits.
    made.qemu(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=2M",
            "disk.qcow2",
            "65T",
        ],
    );
    assert!(
        made.inspect()
            .unwrap_err()
            .to_string()
            .contains("over 64 TiB")
    );
    made.qemu(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            "disk.qcow2",
            "1M",
        ],
    );
    let path = made.dir.path().join("disk.qcow2");
    let file = File::options().write(true).open(path).unwrap();
    if file.set_len(1 << 40).is_ok() {
        assert!(
            made.inspect()
                .unwrap_err()
                .to_string()
                .contains("too much memory")
        );
    }
}

#[test]
#[ignore = "needs programs"]
fn images_that_do_not_stand_alone_are_refused() {
    let made = Made::converted(&[]);
    let refused = |why: &str| {
        let error = made.inspect().unwrap_err();
        assert_eq!(error.errno(), libc::EBADMSG, "{error}");
        assert!(error.to_string().contains(why), "{error}; wanted: {why}");
    };
    made.qemu(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "raw",
            "-F",
            "raw",
            "disk.qcow2",
        ],
    );
    refused("backing file");
    made.qemu(
        "qemu-img",
        &[
            "convert",
            "-O",
            "qcow2",
            "-o",
            "data_file=data,data_file_raw=on",
            "raw",
            "disk.qcow2",
        ],
    );
    refused("external data file");
    made.qemu(
        "qemu-img",
        &[
            "convert",
            "-O",
            "qcow2",
            "-o",
            "extended_l2=on",
            "raw",
            "disk.qcow2",
        ],
    );
    refused("extended L2");
    made.qemu("qemu-img", &["convert", "-O", "qcow2", "raw", "disk.qcow2"]);
    made.qemu("qemu-img", &["snapshot", "-c", "one", "disk.qcow2"]);
    refused("internal snapshots");
    made.qemu("qemu-img", &["convert", "-O", "raw", "raw", "disk.qcow2"]);
    refused("not a qcow2 image");
}

/// An image of `len` bytes made by hand, mostly a hole: the refcount table from cluster 1 on, its
/// first block, the L1 table, L2 tables; and the header's fields for them.
struct Handmade {
    dir: TempDir,
    file: File,
    bits: u32,
}

impl Handmade {
    fn new(bits: u32, len: u64, table_clusters: u64, l2_tables: u64) -> Handmade {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create_new(dir.path().join("disk.qcow2")).unwrap();
        file.set_len(len).unwrap();
        let made = Handmade { dir, file, bits };
        let size = l2_tables << (2 * bits - 3);
        let mut header = Vec::new();
        header.extend(b"QFI\xfb\0\0\0\x03");
        header.extend([0; 12]);
        header.extend(bits.to_be_bytes());
        header.extend(size.to_be_bytes());
        header.extend([0; 4]);
        header.extend((l2_tables as u32).to_be_bytes());
        header.extend(made.at(table_clusters + 2).to_be_bytes());
        header.extend(made.at(1).to_be_bytes());
        header.extend((table_clusters as u32).to_be_bytes());
        header.resize(96, 0);
        header.extend([0, 0, 0, 4, 0, 0, 0, 104]);
        made.file.write_all_at(&header, 0).unwrap();
        made.word(made.at(1), made.at(table_clusters + 1));
        for table in 0..l2_tables {
            let l1 = made.at(table_clusters + 2);
            made.word(l1 + 8 * table, made.at(table_clusters + 3 + table));
        }
        for cluster in 0..table_clusters + 3 + l2_tables {
            made.count(made.at(table_clusters + 1), cluster, 1);
        }
        made
    }

    /// Where a cluster begins.
    fn at(&self, cluster: u64) -> u64 {
        cluster << self.bits
    }

    fn word(&self, at: u64, word: u64) {
        self.file.write_all_at(&word.to_be_bytes(), at).unwrap();
    }

    /// The refcount of a cluster that the block at `block` begins at or before.
    fn count(&self, block: u64, index: u64, count: u16) {
        let at = block + 2 * index;
        self.file.write_all_at(&count.to_be_bytes(), at).unwrap();
    }

    fn inspect(&self) -> (Result<()>, u64) {
        let path = self.dir.path().join("disk.qcow2");
        let file = open_image(&path, false).unwrap();
        let header = Header::read(&file, &path).unwrap().unwrap();
        let image = InspectedImage {
            path: &path,
            length: file.metadata().unwrap().len(),
            file,
            header: &header,
            read: Cell::new(0),
        };
        let result = image.check_header().and_then(|()| image.check_clusters());
        (result, image.read.get())
    }
}

#[test]
fn compressed_clusters_all_over_a_huge_file_cost_a_walk_for_each_part_they_are_in() {
    // 4 TiB are four windows. A refcount block speaks of 2 GiB.
    let image = Handmade::new(16, 4 << 40, 1, 1);
    let (l2, table) = (image.at(4), image.at(1));
    for (entry, at) in [(0u64, 1u64 << 40), (1, 3 << 40)] {
        let block = image.at(5 + entry);
        image.count(image.at(2), 5 + entry, 1);
        image.word(l2 + 8 * entry, COMPRESSED | at);
        image.word(table + 8 * (at >> 31), block);
        image.count(block, (at >> 16) % 32768, 1);
    }
    let (result, read) = image.inspect();
    result.unwrap();
    // L1, L2 and refcount table and the three blocks; then for each of the two windows L1 and L2
    // table, refcount table, and a block.
    assert!(read <= (6 + 2 * 4) << 16, "{read} bytes of tables");
    // A second user of the last one.
    image.word(l2 + 8 * 2, COMPRESSED | ((3 << 40) + 100));
    let (result, _) = image.inspect();
    let error = result.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("in use 2 times but has refcount 1"),
        "{error}"
    );
}

#[test]
fn no_number_of_compressed_clusters_in_one_overflows_its_count() {
    let image = Handmade::new(16, 16 << 16, 1, 9);
    let data = image.at(13);
    for entry in 0..9 * 8192u64 {
        image.word(image.at(4) + 8 * entry, COMPRESSED | data);
    }
    image.count(image.at(2), 13, u16::MAX);
    let (result, _) = image.inspect();
    let error = result.unwrap_err();
    assert_eq!(error.errno(), libc::EBADMSG);
    assert!(error.to_string().contains("over 65535 others"), "{error}");
}
