use super::*;
use crate::disk::judges::{Numbers, create, guest_bytes, qemu_io, succeed, text};
use crate::disk::{Format, chain_paths, create_overlay, rebase};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Opens a chain in its own directory, as its owner.
pub fn open(top: &Path) -> Result<Chain> {
    let home = top.parent().unwrap();
    Chain::open(top, home, std::fs::metadata(home).unwrap().uid())
}

/// A raw image of `size` bytes: random bytes here and there, holes between.
fn sparse_raw(path: &Path, size: u64, numbers: &mut Numbers) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for _ in 0..6 {
        let at = numbers.below(size / 4096) * 4096;
        let len = (1 + numbers.below(40)) * 4096;
        let bytes: Vec<u8> = (0..len.min(size - at))
            .map(|_| numbers.below(256) as u8)
            .collect();
        file.write_all_at(&bytes, at).unwrap();
    }
}

/// Writes data and explicit zeros somewhere into a qcow2.
fn scribble(image: &Path, size: u64, zeros: bool, numbers: &mut Numbers) {
    let mut commands = Vec::new();
    for _ in 0..8 {
        let at = numbers.below(size / 512) * 512;
        let len = ((1 + numbers.below(300)) * 512).min(size - at);
        commands.push(match numbers.below(3) {
            0 if zeros => format!("write -z {at} {len}"),
            n => format!("write -P {} {at} {len}", 1 + n + numbers.below(200)),
        });
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io(image, &commands);
}

/// Chains of every kind, each with what it is: differing cluster sizes, versions, explicit zeros,
/// compressed clusters, sizes that differ, relative paths, sparse raw bases.
pub fn chains(dir: &Path) -> Vec<(String, PathBuf)> {
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    let mut made = Vec::new();
    let options = [
        ["cluster_size=512", "cluster_size=4k", "cluster_size=64k"],
        ["cluster_size=64k", "cluster_size=2M", "cluster_size=512"],
        [
            "cluster_size=2M",
            "compat=0.10,cluster_size=4k",
            "compat=0.10",
        ],
        [
            "compat=0.10,cluster_size=512",
            "cluster_size=2M",
            "cluster_size=4k",
        ],
    ];
    for (row, options) in options.iter().enumerate() {
        for raw_base in [true, false] {
            let name = |what: &str| dir.join(format!("{row}-{raw_base}-{what}"));
            let base = name("base");
            // No multiple of 64 KiB, and shorter than what lies on it.
            let base_size = (3 << 20) + 512 * (1 + numbers.below(127));
            if raw_base {
                sparse_raw(&base, base_size, &mut numbers);
            } else {
                compressed_base(&base, base_size, options[0], &mut numbers);
            }
            let mut below = (base, if raw_base { "raw" } else { "qcow2" });
            for (level, options) in options.iter().enumerate() {
                let image = name(&format!("level{level}.qcow2"));
                let size = (4 << 20) + 512 * numbers.below(3000);
                overlay_with(&image, options, &below, size, level % 2 == 1);
                scribble(&image, size, !options.contains("0.10"), &mut numbers);
                made.push((
                    format!("{options} at level {level} of {row}, raw {raw_base}"),
                    image.clone(),
                ));
                below = (image, "qcow2");
            }
        }
    }
    made
}

/// A compressed qcow2 of random data, made from a raw image.
fn compressed_base(path: &Path, size: u64, options: &str, numbers: &mut Numbers) {
    let raw = path.with_extension("raw");
    sparse_raw(&raw, size, numbers);
    // Text compresses; qemu stores what does not compress as it is, so both kinds occur.
    let file = File::options().write(true).open(&raw).unwrap();
    file.write_all_at("layers upon layers ".repeat(40_000).as_bytes(), 70_000)
        .unwrap();
    let all = [
        "convert",
        "-c",
        "-O",
        "qcow2",
        "-o",
        options,
        text(&raw),
        text(path),
    ];
    succeed("qemu-img", &all);
}

/// An overlay by qemu, with the path below stored relative to it or absolute.
fn overlay_with(image: &Path, options: &str, below: &(PathBuf, &str), size: u64, relative: bool) {
    let stored = if relative {
        PathBuf::from(below.0.file_name().unwrap())
    } else {
        below.0.clone()
    };
    create(image, options, Some((&stored, below.1)), &size.to_string());
}

#[test]
#[ignore = "needs programs"]
fn every_chain_reads_as_qemu_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    for (what, top) in chains(dir.path()) {
        let expected = guest_bytes(&top);
        let chain = open(&top).unwrap();
        assert_eq!(chain.virtual_size(), expected.len() as u64, "{what}");
        let mut bytes = vec![1u8; expected.len() + 1000];
        chain.read_at(0, &mut bytes).unwrap();
        assert!(bytes[..expected.len()] == expected, "{what}");
        assert!(
            bytes[expected.len()..].iter().all(|&byte| byte == 0),
            "{what}"
        );
        chain.unchanged().unwrap();
    }
}

#[test]
#[ignore = "needs programs"]
fn reads_at_any_offset_are_the_sequential_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut numbers = Numbers(77);
    for (what, top) in chains(dir.path()) {
        let expected = guest_bytes(&top);
        let chain = open(&top).unwrap();
        for _ in 0..100 {
            let at = numbers.below(expected.len() as u64) as usize;
            let len = 1 + numbers.below((expected.len() - at).min(200_000) as u64) as usize;
            let mut bytes = vec![1u8; len];
            chain.read_at(at as u64, &mut bytes).unwrap();
            assert!(bytes == expected[at..at + len], "{what} at {at}+{len}");
        }
    }
}

#[test]
#[ignore = "needs programs"]
fn extents_cover_the_range_in_order_and_zeros_are_zeros() {
    let dir = tempfile::tempdir().unwrap();
    for (what, top) in chains(dir.path()) {
        let expected = guest_bytes(&top);
        let chain = open(&top).unwrap();
        let range = 1000..expected.len() as u64 + 70_000;
        let extents = chain.extents(range.clone()).unwrap();
        let mut at = range.start;
        for pair in extents.windows(2) {
            let continued = pair[0].source.after(pair[0].len) == pair[1].source;
            assert!(!continued, "{what}: adjacent runs are merged");
        }
        for extent in &extents {
            assert!(extent.guest == at && extent.len > 0, "{what}");
            at += extent.len;
            let end = (at as usize).min(expected.len());
            let bytes = expected.get(extent.guest as usize..end).unwrap_or_default();
            match extent.source {
                DataSource::Zero => assert!(bytes.iter().all(|&byte| byte == 0), "{what}"),
                DataSource::Data { layer, .. } | DataSource::Compressed { layer } => {
                    assert!(layer < chain.layers().len(), "{what}");
                }
            }
        }
        assert_eq!(at, range.end, "{what}");
    }
}

#[test]
#[ignore = "needs programs"]
fn compressed_clusters_holes_and_zeros_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, "the same over and over ".repeat(10_000)).unwrap();
    let base = dir.path().join("base.qcow2");
    succeed(
        "qemu-img",
        &["convert", "-c", "-O", "qcow2", text(&raw), text(&base)],
    );
    let top = dir.path().join("top.qcow2");
    create_overlay(&top, &base, Format::Qcow2, 1 << 20).unwrap();
    qemu_io(&top, &["write -z 64k 64k", "write -P 9 512k 64k"]);
    let sources: Vec<(u64, DataSource)> = open(&top)
        .unwrap()
        .extents(0..1 << 20)
        .unwrap()
        .iter()
        .map(|extent| (extent.len >> 10, extent.source))
        .collect();
    assert_eq!(sources[0], (64, DataSource::Compressed { layer: 1 }));
    assert_eq!(sources[1], (64, DataSource::Zero));
    assert!(matches!(sources[2].1, DataSource::Compressed { layer: 1 }));
    assert_eq!(sources[3].1, DataSource::Zero);
    assert!(matches!(
        sources[4],
        (64, DataSource::Data { layer: 0, .. })
    ));
    assert_eq!(sources[5], (448, DataSource::Zero));
}

#[test]
#[ignore = "needs programs"]
fn a_rebase_is_no_change_and_a_write_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![5u8; 1 << 20]).unwrap();
    let other = dir.path().join("other.raw");
    std::fs::hard_link(&base, &other).unwrap();
    let top = dir.path().join("top.qcow2");
    create_overlay(&top, &base, Format::Raw, 1 << 20).unwrap();
    let chain = open(&top).unwrap();
    let mtime = std::fs::metadata(&top).unwrap().modified().unwrap();
    assert_eq!(chain.changed_at(), mtime);
    rebase(&top, &other).unwrap();
    chain.unchanged().unwrap();
    qemu_io(&top, &["write -P 1 0 64k"]);
    let error = chain.unchanged().unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    let chain = open(&top).unwrap();
    File::options()
        .append(true)
        .open(&base)
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    assert!(
        chain
            .unchanged()
            .unwrap_err()
            .to_string()
            .contains("other.raw")
    );
}

#[test]
fn an_open_chain_outlives_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![5u8; 1 << 20]).unwrap();
    let top = dir.path().join("top.qcow2");
    create_overlay(&top, &base, Format::Raw, 1 << 20).unwrap();
    let chain = open(&top).unwrap();
    std::fs::remove_file(&base).unwrap();
    std::fs::remove_file(&top).unwrap();
    let mut byte = [0u8];
    chain.read_at(12345, &mut byte).unwrap();
    assert_eq!(byte, [5]);
}

#[test]
fn cycles_and_endless_chains_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |i: usize| dir.path().join(format!("{i}.qcow2"));
    create_overlay(&path(0), &path(1), Format::Qcow2, 1 << 20).unwrap();
    create_overlay(&path(1), &path(0), Format::Qcow2, 1 << 20).unwrap();
    assert_eq!(open(&path(0)).err().unwrap().errno(), libc::ELOOP);
    assert_eq!(chain_paths(&path(0)).unwrap_err().errno(), libc::ELOOP);
    std::fs::write(path(100), [0u8; 512]).unwrap();
    create_overlay(&path(101), &path(100), Format::Raw, 1 << 20).unwrap();
    for i in 102..=164 {
        create_overlay(&path(i), &path(i - 1), Format::Qcow2, 1 << 20).unwrap();
    }
    assert_eq!(open(&path(163)).unwrap().layers().len(), 64);
    assert_eq!(open(&path(164)).err().unwrap().errno(), libc::ELOOP);
    assert_eq!(chain_paths(&path(164)).unwrap_err().errno(), libc::ELOOP);
}

#[test]
fn a_layer_outside_of_the_home_must_belong_to_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    std::fs::create_dir(&home).unwrap();
    let uid = std::fs::metadata(&home).unwrap().uid();
    let outside = dir.path().join("secret.raw");
    std::fs::write(&outside, [1u8; 4096]).unwrap();
    // A symlink inside does not make it a file of the home.
    let link = home.join("link.raw");
    std::os::unix::fs::symlink(&outside, &link).unwrap();
    for (i, below) in [&outside, &link].into_iter().enumerate() {
        let top = home.join(format!("{i}.qcow2"));
        create_overlay(&top, below, Format::Raw, 1 << 20).unwrap();
        assert!(Chain::open(&top, &home, uid).is_ok());
        let error = Chain::open(&top, &home, uid + 1).err().unwrap();
        assert_eq!(error.errno(), libc::EPERM);
        assert!(chain_paths(&top).is_ok());
    }
    let inside = home.join("inside.raw");
    std::fs::write(&inside, [1u8; 4096]).unwrap();
    assert!(Chain::open(&inside, &home, uid + 1).is_ok());
}

#[test]
#[ignore = "needs programs"]
fn the_format_that_a_header_says_is_trusted_and_else_the_magic_decides() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.qcow2");
    create(&base, "compat=1.1", None, "1M");
    let as_raw = dir.path().join("raw.qcow2");
    create_overlay(&as_raw, &base, Format::Raw, 1 << 20).unwrap();
    assert_eq!(open(&as_raw).unwrap().layers()[1].format(), Format::Raw);
    let unsaid = dir.path().join("unsaid.qcow2");
    create(&unsaid, "compat=0.10", Some((&base, "qcow2")), "1M");
    let file = File::options().write(true).open(&unsaid).unwrap();
    // The name of another extension, which is skipped.
    file.write_all_at(&0x1111_1111u32.to_be_bytes(), 72)
        .unwrap();
    let chain = open(&unsaid).unwrap();
    assert_eq!(
        chain.layers()[0]
            .header()
            .unwrap()
            .backing
            .as_ref()
            .unwrap()
            .format,
        None
    );
    assert_eq!(chain.layers()[1].format(), Format::Qcow2);
    let text = dir.path().join("text");
    std::fs::write(&text, "no qcow2").unwrap();
    let wrong = dir.path().join("wrong.qcow2");
    create_overlay(&wrong, &text, Format::Qcow2, 1 << 20).unwrap();
    assert_eq!(open(&wrong).err().unwrap().errno(), libc::EIO);
    assert_eq!(chain_paths(&wrong).unwrap_err().errno(), libc::EIO);
}

#[test]
#[ignore = "needs programs"]
fn the_paths_of_a_chain_are_absolute_and_normal() {
    let dir = tempfile::tempdir().unwrap();
    let sub = dir.path().join("sub");
    std::fs::create_dir(&sub).unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, [0u8; 4096]).unwrap();
    let top = sub.join("top.qcow2");
    create(
        &top,
        "compat=1.1",
        Some((Path::new(".././base.raw"), "raw")),
        "1M",
    );
    let crooked = sub.join("../sub/./top.qcow2");
    assert_eq!(chain_paths(&crooked).unwrap(), [top.clone(), base.clone()]);
    std::fs::remove_file(&base).unwrap();
    let error = chain_paths(&top).unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT);
    assert!(error.to_string().contains("base.raw"));
}
