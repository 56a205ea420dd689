use super::*;
use crate::disk::chain::tests::{chains, open};
use crate::disk::judges::{Numbers, check_clean, create, info, qemu_io, succeed, text};
use crate::disk::{Format, Layer, chain_paths};
use std::path::Path;
use std::sync::Arc;

/// Writes the upper layers of a chain as one.
fn merge(top: &Path, upper: usize, to: &Path) {
    let chain = Arc::new(open(top).unwrap());
    let image = match chain_paths(top).unwrap().get(upper) {
        Some(below) => Flattened::plan_upper(chain, upper, below).unwrap(),
        None => Flattened::plan(chain).unwrap(),
    };
    let mut done = 0;
    let mut pace = |bytes| {
        done += bytes;
        Ok(())
    };
    let out = File::create(to).unwrap();
    image.write_to(&out, &mut pace).unwrap();
    assert_eq!(out.metadata().unwrap().len(), image.len());
    assert!(done <= image.len() && done + CLUSTER > image.metadata_len());
}

fn flattened(top: &Path) -> Vec<u8> {
    let image = Flattened::plan(Arc::new(open(top).unwrap())).unwrap();
    let mut bytes = vec![1u8; image.len() as usize];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Fails unless any number of upper layers, written as one, reads as before, for qemu and for
/// us, and flattens to the very same image.
fn assert_merges(what: &str, top: &Path) {
    let merged = top.with_extension("merged");
    let paths = chain_paths(top).unwrap();
    let before = flattened(top);
    for upper in 1..=paths.len() {
        let what = format!("{what}, the upper {upper}");
        merge(top, upper, &merged);
        check_clean(&merged);
        let said = succeed("qemu-img", &["compare", text(top), text(&merged)]);
        assert!(said.contains("identical"), "{what}: {said}");
        let info = info(&merged);
        match paths.get(upper) {
            Some(below) => assert_eq!(info["full-backing-filename"], text(below), "{what}"),
            None => assert!(info.get("backing-filename").is_none(), "{what}"),
        }
        assert!(flattened(&merged) == before, "{what} exports otherwise");
    }
}

#[test]
#[ignore = "needs programs"]
fn upper_layers_as_one_read_as_before_in_chains_of_every_kind() {
    let dir = tempfile::tempdir().unwrap();
    for (what, top) in chains(dir.path()) {
        assert_merges(&what, &top);
    }
}

/// What two layers say of one place each: data, zeros, nothing, something thrown away, in whole
/// clusters and in part of one, and beyond the end of either.
#[test]
#[ignore = "needs programs"]
fn whatever_two_layers_say_of_a_cluster_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let bottom = dir.path().join("bottom.qcow2");
    create(&bottom, "cluster_size=64k", None, "6M");
    qemu_io(&bottom, &["write -P 1 0 6M"]);
    let says = |layer: u8, at: u64, kind: usize| match kind {
        0 => None,
        1 => Some(format!("write -P {layer} {at} 64k")),
        2 => Some(format!("write -z {at} 64k")),
        3 => Some(format!("write -z -u {at} 64k")),
        4 => Some(format!("discard {at} 64k")),
        5 => Some(format!("write -P {layer} {} 4k", at + 8192)),
        _ => Some(format!("write -z {} 8k", at + 16384)),
    };
    for (row, (below, above)) in [
        ("64k", "64k"),
        ("4k", "64k"),
        ("64k", "4k"),
        ("4k", "512"),
        ("2M", "64k"),
        ("512", "2M"),
    ]
    .into_iter()
    .enumerate()
    {
        for (sizes, (size_below, size_above)) in [
            ("6M", "6M"),
            ("3170304", "6M"),
            ("6M", "3170304"),
            ("5M", "7M"),
        ]
        .into_iter()
        .enumerate()
        {
            let name = |what: &str| dir.path().join(format!("{row}-{sizes}-{what}"));
            let (p, c) = (name("p.qcow2"), name("c.qcow2"));
            let options = |cluster: &str| format!("cluster_size={cluster}");
            create(&p, &options(below), Some((&bottom, "qcow2")), size_below);
            create(&c, &options(above), Some((&p, "qcow2")), size_above);
            let (mut of_p, mut of_c) = (Vec::new(), Vec::new());
            for pair in 0..49u64 {
                let at = pair * 65536;
                let inside = |image: &Path| at + 65536 <= open(image).unwrap().virtual_size();
                if inside(&p) {
                    of_p.extend(says(2, at, (pair / 7) as usize));
                }
                if inside(&c) {
                    of_c.extend(says(3, at, (pair % 7) as usize));
                }
            }
            for (image, commands) in [(&p, of_p), (&c, of_c)] {
                let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
                qemu_io(image, &commands);
            }
            assert_merges(&format!("{below} under {above}, {sizes}"), &c);
        }
    }
}

#[test]
#[ignore = "needs programs"]
fn zeros_over_data_stay_zeros_and_unallocated_clusters_stay_unallocated() {
    let dir = tempfile::tempdir().unwrap();
    let name = |what: &str| dir.path().join(what);
    let (bottom, p, c, merged) = (name("b"), name("p"), name("c"), name("m"));
    create(&bottom, "cluster_size=64k", None, "1M");
    qemu_io(&bottom, &["write -P 1 0 1M"]);
    create(&p, "cluster_size=64k", Some((&bottom, "qcow2")), "1M");
    qemu_io(&p, &["write -P 2 0 64k"]);
    create(&c, "cluster_size=64k", Some((&p, "qcow2")), "1M");
    qemu_io(&c, &["write -z -u 0 128k"]);
    merge(&c, 2, &merged);
    let layer = Layer::open(&merged, Format::Qcow2).unwrap();
    use crate::disk::layer::Run;
    assert_eq!(layer.run_at(0, 1 << 20).unwrap(), (Run::Zero, 128 << 10));
    let rest = layer.run_at(128 << 10, 1 << 20).unwrap();
    assert_eq!(rest, (Run::Unallocated, (1 << 20) - (128 << 10)));
    // Header, refcount table and block, L1 and one L2 table.
    assert_eq!(std::fs::metadata(&merged).unwrap().len(), 5 * CLUSTER);
}

#[test]
#[ignore = "needs programs"]
fn random_layers_merge_right() {
    let dir = tempfile::tempdir().unwrap();
    let mut numbers = Numbers(0x5eed_0007);
    for round in 0..12 {
        let mut below: Option<std::path::PathBuf> = None;
        for level in 0..4 {
            let image = dir.path().join(format!("{round}-{level}.qcow2"));
            let cluster = ["512", "4k", "64k", "64k", "256k"][numbers.below(5) as usize];
            let size = (1 << 20) + 512 * numbers.below(4096);
            let backing = below.as_deref().map(|below| (below, "qcow2"));
            let options = format!("cluster_size={cluster}");
            create(&image, &options, backing, &size.to_string());
            let mut commands = Vec::new();
            for _ in 0..10 {
                let at = numbers.below(size / 512) * 512;
                let len = ((1 + numbers.below(400)) * 512).min(size - at);
                commands.push(match numbers.below(5) {
                    0 => format!("write -z {at} {len}"),
                    1 => format!("write -z -u {at} {len}"),
                    2 => format!("discard {at} {len}"),
                    n => format!("write -P {} {at} {len}", n + numbers.below(200)),
                });
            }
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            qemu_io(&image, &commands);
            below = Some(image);
        }
        assert_merges(&format!("round {round}"), &below.unwrap());
    }
}

#[test]
#[ignore = "needs programs"]
fn zeros_that_are_data_take_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let (image, out) = (dir.path().join("image.qcow2"), dir.path().join("out"));
    create(&image, "cluster_size=64k", None, "64M");
    qemu_io(&image, &["write -P 0 0 32M", "write -P 1 32M 64k"]);
    merge(&image, 1, &out);
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(&out).unwrap();
    assert!(meta.len() > 32 << 20 && meta.blocks() * 512 < 1 << 20);
    check_clean(&out);
}

#[test]
#[ignore = "needs programs"]
fn pace_may_end_the_writing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    create(&image, "cluster_size=64k", None, "64M");
    qemu_io(&image, &["write -P 1 0 64M"]);
    let flat = Flattened::plan(Arc::new(open(&image).unwrap())).unwrap();
    let out = File::create(dir.path().join("out")).unwrap();
    let mut left = 3;
    let mut pace = |_| {
        left -= 1;
        match left {
            0 => Err(crate::Error::new(libc::ECANCELED, "enough")),
            _ => Ok(()),
        }
    };
    let error = flat.write_to(&out, &mut pace).unwrap_err();
    assert_eq!(error.errno(), libc::ECANCELED);
}
