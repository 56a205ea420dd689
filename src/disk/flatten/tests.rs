use super::*;
use crate::disk::chain::tests::{chains, open};
use crate::disk::judges::{Numbers, check_clean, create, info, qemu_io, succeed, text};
use crate::disk::window::MOST_RECENT;
use crate::disk::{Format, create_overlay};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

fn plan(top: &Path) -> Flattened {
    Flattened::plan(Arc::new(open(top).unwrap())).unwrap()
}

fn whole(flattened: &Flattened) -> Vec<u8> {
    let mut bytes = vec![1u8; flattened.len() as usize];
    flattened.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Stores the image; clusters of zeros become holes.
fn store(flattened: &Flattened, path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(flattened.len()).unwrap();
    let mut piece = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < flattened.len() {
        let len = (flattened.len() - at).min(1 << 20) as usize;
        flattened.read_at(at, &mut piece[..len]).unwrap();
        if piece[..len].iter().any(|&byte| byte != 0) {
            file.write_all_at(&piece[..len], at).unwrap();
        }
        at += len as u64;
    }
}

#[test]
#[ignore = "needs programs"]
fn a_flattened_chain_is_clean_and_equals_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    for (what, top) in chains(dir.path()) {
        let image = dir.path().join("flat.qcow2");
        store(&plan(&top), &image);
        check_clean(&image);
        let said = succeed("qemu-img", &["compare", text(&top), text(&image)]);
        assert!(said.contains("identical"), "{what}: {said}");
        let info = info(&image);
        assert_eq!(info["cluster-size"], 65536);
        assert_eq!(info["format-specific"]["data"]["refcount-bits"], 16);
        assert!(info.get("backing-filename").is_none());
    }
}

#[test]
#[ignore = "needs programs"]
fn a_flattened_image_passes_our_own_inspection() {
    let dir = tempfile::tempdir().unwrap();
    for (what, top) in chains(dir.path()) {
        let image = dir.path().join("flat.qcow2");
        store(&plan(&top), &image);
        let inspected = crate::disk::inspect_standalone(&image);
        assert!(inspected.is_ok(), "{what}: {}", inspected.unwrap_err());
    }
}

#[test]
#[ignore = "needs programs"]
fn reads_at_any_offset_are_the_sequential_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut numbers = Numbers(4711);
    for (what, top) in chains(dir.path()) {
        let flattened = plan(&top);
        let bytes = whole(&flattened);
        for _ in 0..100 {
            let at = numbers.below(bytes.len() as u64) as usize;
            let len = 1 + numbers.below((bytes.len() - at).min(300_000) as u64) as usize;
            let mut part = vec![1u8; len];
            flattened.read_at(at as u64, &mut part).unwrap();
            assert!(part == bytes[at..at + len], "{what} at {at}+{len}");
        }
        let mut past = [1u8; 100];
        flattened.read_at(flattened.len(), &mut past).unwrap();
        assert_eq!(past, [0; 100]);
    }
}

#[test]
#[ignore = "needs programs"]
fn the_image_does_not_depend_on_paths_or_layers() {
    let dir = tempfile::tempdir().unwrap();
    for (what, top) in chains(dir.path()) {
        let over = dir.path().join("another-name-on-top.qcow2");
        let size = open(&top).unwrap().virtual_size();
        let _ = std::fs::remove_file(&over);
        create_overlay(&over, &top, Format::Qcow2, size).unwrap();
        assert!(whole(&plan(&top)) == whole(&plan(&over)), "{what}");
    }
}

#[test]
#[ignore = "needs programs"]
fn windows_without_data_have_no_table_and_holes_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("base.raw");
    let file = File::create(&raw).unwrap();
    file.set_len(3 << 40).unwrap();
    for at in [0, 5 << 30, (1 << 40) + 4096, (3 << 40) - 4096] {
        file.write_all_at(&[3u8; 4096], at).unwrap();
    }
    let top = dir.path().join("top.qcow2");
    create_overlay(&top, &raw, Format::Raw, 3 << 40).unwrap();
    qemu_io(&top, &["write -P 7 2T 192k", "write -z 5G 64k"]);
    let flattened = plan(&top);
    // Header, refcount table and block, L1 table, 4 L2 tables, 1 + 0 + 1 + 3 + 1 clusters.
    assert_eq!(flattened.len(), (4 + 4 + 6) * CLUSTER);
    let image = dir.path().join("flat.qcow2");
    store(&flattened, &image);
    check_clean(&image);
    assert_eq!(info(&image)["virtual-size"], 3u64 << 40);
    let mut byte = [0u8];
    let again = open(&image).unwrap();
    for (at, expected) in [
        (4095, 3),
        (5 << 30, 0),
        ((2 << 40) + 100_000, 7),
        ((3 << 40) - 1, 3),
    ] {
        again.read_at(at, &mut byte).unwrap();
        assert_eq!(byte, [expected], "at {at}");
    }
}

#[test]
#[ignore = "needs programs"]
fn an_image_with_several_refcount_blocks_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("base.raw");
    let file = File::create(&raw).unwrap();
    file.set_len(5 << 30).unwrap();
    // A sector in every other cluster makes more clusters than one block counts.
    for cluster in (0..80_000u64).filter(|cluster| cluster % 16 != 3) {
        file.write_all_at(&[1u8; 512], cluster * CLUSTER).unwrap();
    }
    let flattened = plan(&raw);
    assert!(flattened.len() > 2 * BLOCK_ENTRIES * CLUSTER);
    let image = dir.path().join("flat.qcow2");
    let out = File::create(&image).unwrap();
    out.set_len(flattened.len()).unwrap();
    let mut metadata = vec![0u8; (flattened.layout.data.start * CLUSTER) as usize];
    flattened.read_at(0, &mut metadata).unwrap();
    out.write_all_at(&metadata, 0).unwrap();
    check_clean(&image);
}

#[test]
#[ignore = "needs programs"]
fn an_empty_disk_and_an_odd_size_make_images_that_qemu_opens() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("raw"), dir.path().join("flat.qcow2"));
    for (bytes, size) in [
        (vec![], 0),
        (vec![9u8; 1000], 1024),
        (vec![9u8; 70_001], 70_144),
    ] {
        std::fs::write(&raw, &bytes).unwrap();
        store(&plan(&raw), &image);
        check_clean(&image);
        assert_eq!(info(&image)["virtual-size"], size);
        let mut read = vec![1u8; bytes.len()];
        open(&image).unwrap().read_at(0, &mut read).unwrap();
        assert_eq!(read, bytes);
    }
}

#[test]
#[ignore = "needs programs"]
fn only_counts_per_window_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("large.qcow2");
    create(&image, "cluster_size=64k", None, "8T");
    qemu_io(&image, &["write -P 1 0 32M", "write -P 1 4T 32M"]);
    let flattened = plan(&image);
    let windows = (8u64 << 40) / L2_COVERS;
    assert_eq!(flattened.clusters_before.len() as u64, windows + 1);
    assert_eq!(flattened.tables_before.len() as u64, windows + 1);
    assert_eq!(flattened.clusters_before.last(), Some(&1024));
    whole(&flattened);
    assert!(flattened.recent.len() <= MOST_RECENT);
}

#[test]
fn a_chain_that_changed_since_the_plan_is_an_error_and_no_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::write(&raw, vec![1u8; 1 << 20]).unwrap();
    let flattened = plan(&raw);
    File::options()
        .write(true)
        .open(&raw)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let mut bytes = vec![0u8; flattened.len() as usize];
    assert_eq!(
        flattened.read_at(0, &mut bytes).unwrap_err().errno(),
        libc::EIO
    );
}

#[test]
#[ignore = "needs programs"]
fn an_image_of_the_difference_on_the_other_disk_equals_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    create(&at("base"), "cluster_size=64k", None, "600M");
    qemu_io(&at("base"), &["write -P 1 0 8M", "write -P 1 520M 1M"]);
    // What both write, what only one writes, what one clears, what both have alike.
    let earlier = [
        "write -P 2 0 1M",
        "write -P 3 2M 1M",
        "write -P 4 520M 64k",
        "write -z 4M 1M",
        "write -P 9 599M 1M",
    ];
    let later = [
        "write -P 2 0 1M",
        "write -P 5 512k 4k",
        "write -P 6 6M 100k",
        "write -z 520M 64k",
        "write -z 4M 512k",
        "write -P 9 599M 1M",
    ];
    for (name, writes) in [("earlier", &earlier[..]), ("later", &later[..])] {
        let on = at("base");
        create(&at(name), "cluster_size=64k", Some((&on, "qcow2")), "600M");
        qemu_io(&at(name), writes);
    }
    let chain = |name: &str| Arc::new(open(&at(name)).unwrap());
    for (one, other) in [
        ("later", "earlier"),
        ("earlier", "later"),
        ("later", "later"),
    ] {
        let (image, backing) = (at("image"), at(other));
        let of = ((chain(one), 1), (chain(other), 1));
        let difference = Flattened::plan_differing(of.0, of.1, &backing).unwrap();
        store(&difference, &image);
        check_clean(&image);
        let said = succeed("qemu-img", &["compare", text(&at(one)), text(&image)]);
        assert!(said.contains("identical"), "{one} on {other}: {said}");
        let all = Flattened::plan_upper(chain(one), 1, &at("base")).unwrap();
        assert!(difference.len() < all.len(), "{one} on {other}");
        let clusters: u64 = (0..difference.windows())
            .map(|it| difference.clusters_in(it))
            .sum();
        if one == other {
            assert_eq!(clusters, 0);
        } else if one == "later" {
            // 512k; 2M to 3M, which only the earlier one wrote; 4.5M to 5M, which it cleared; 6M,
            // two clusters; 520M, which it cleared: zeros as data, since BoxLite's export looks
            // below clusters that are marked as zeros.
            assert_eq!(clusters, 1 + 16 + 8 + 2 + 1);
        }
    }
}
