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
    refused("no qcow2 image");
}
