//! `mkdir` and `rmdir` below `snapshots/`: their effect on the layers, and on nothing else.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::common::*;

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// Maps `live` and each snapshot's name to the digest of the guest's data.
fn states(home: &TestHome, name: &str, snapshots: &[&str]) -> BTreeMap<String, String> {
    let mut states = BTreeMap::new();
    states.insert("live".to_owned(), digest(&home.live_disk(name)));
    for snapshot in snapshots {
        let layer = home.snapshot_disk(name, snapshot);
        states.insert((*snapshot).to_owned(), digest(&layer));
    }
    states
}

// ---- mkdir --------------------------------------------------------------------------------------

#[test]
fn snapshots_of_an_unchanged_box_are_names_of_one_layer_and_the_chain_does_not_grow() {
    let home = TestHome::new();
    let mount = home.mount();
    let live = home.live_disk("web");
    mount.snapshot("web", "a").unwrap();
    assert_eq!(chain(&live).len(), 2);
    mount.snapshot("web", "b").unwrap();
    mount.snapshot("web", "c").unwrap();
    assert_eq!(chain(&live).len(), 2);
    let a = inode(&home.snapshot_disk("web", "a"));
    assert_eq!(inode(&home.snapshot_disk("web", "b")), a);
    assert_eq!(inode(&home.snapshot_disk("web", "c")), a);
    assert_eq!(inode(&chain(&live)[1]), a);
    mount.copy("web", "copy");
    assert_eq!(chain(&live).len(), 2);
    assert_eq!(chain(&home.live_disk("copy")).len(), 2);
    home.guest_write("web", FREE_AREA, b"changed");
    mount.snapshot("web", "d").unwrap();
    assert_eq!(chain(&live).len(), 3);
    assert_ne!(inode(&home.snapshot_disk("web", "d")), a);
    home.assert_whole();
}

#[test]
fn a_snapshot_has_the_contents_of_its_moment_and_the_disk_goes_on() {
    let home = TestHome::new();
    let mount = home.mount();
    let mut wanted = BTreeMap::new();
    for round in 0u8..4 {
        // Each round also changes data of earlier rounds.
        home.guest_write(
            "web",
            FREE_AREA + 0x8000 * u64::from(round),
            &[round + 1; 0x1_2345],
        );
        let name = format!("s{round}");
        mount.snapshot("web", &name).unwrap();
        wanted.insert(name.clone(), digest(&home.live_disk("web")));
    }
    for (name, wanted) in &wanted {
        assert_eq!(&digest(&home.snapshot_disk("web", name)), wanted, "{name}");
        let export = format!("web/snapshots/{name}/export.boxlite");
        assert_eq!(&mount.export_digest(&export), wanted, "{name}");
    }
    home.assert_whole();
}

#[test]
fn taking_a_snapshot_is_no_change_of_the_disk() {
    let home = TestHome::new();
    home.guest_write("web", FREE_AREA, b"before");
    let mount = home.mount();
    let times = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    };
    let live = home.live_disk("web");
    let before = (times(&live), digest(&live));
    let export = fs::read(mount.at("web/export.boxlite")).unwrap();
    // A newly taken timestamp would show another second.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    mount.snapshot("web", "a").unwrap();
    assert_eq!((times(&live), digest(&live)), before);
    assert_eq!(times(&home.snapshot_disk("web", "a")), before.0);
    assert_eq!(times(&mount.at("web/export.boxlite")), before.0);
    mount.copy("web", "copy");
    assert_eq!(times(&live), before.0);
    assert_eq!(times(&home.live_disk("copy")), before.0);
    // An incremental backup sees nothing new.
    let again = fs::read(mount.at("web/export.boxlite")).unwrap();
    assert!(again == export, "the export of the same state differs");
}

#[test]
fn names_with_spaces_dots_and_other_scripts_are_snapshots() {
    let home = TestHome::new();
    let mount = home.mount();
    let longest = "x".repeat(255);
    let mut names = vec![
        "before upgrade",
        "snímek–日本 🙂",
        "a.b",
        "-rf",
        "100%",
        " lead and trail ",
        &longest,
    ];
    for name in &names {
        mount.snapshot("web", name).unwrap();
    }
    names.sort();
    assert_eq!(mount.names("web/snapshots"), names);
    let answer = home.wheel(&["snapshot-list", "web"]);
    let mut listed: Vec<&str> = answer
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["name"].as_str().unwrap())
        .collect();
    listed.sort();
    assert_eq!(listed, names);
    let before = digest(&home.live_disk("web"));
    home.guest_write("web", FREE_AREA, b"after");
    home.wheel(&["snapshot-restore", "web", "snímek–日本 🙂"]);
    assert_eq!(digest(&home.live_disk("web")), before);
    for name in &names {
        mount.remove_snapshot("web", name).unwrap();
    }
    assert!(mount.names("web/snapshots").is_empty());
    home.assert_whole();
}

#[test]
fn names_boxlite_would_refuse_are_invalid_and_taken_ones_exist() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "theirs"]);
    let mount = home.mount();
    mount.snapshot("web", "ours").unwrap();
    let before = states(&home, "web", &["ours", "theirs"]);
    for bad in [".hidden", "..x", "a\\b"] {
        assert_eq!(errno(mount.snapshot("web", bad)), libc::EINVAL, "{bad}");
    }
    let too_long = "x".repeat(256);
    assert_eq!(errno(mount.snapshot("web", &too_long)), libc::EINVAL);
    for taken in ["ours", "theirs"] {
        assert_eq!(errno(mount.snapshot("web", taken)), libc::EEXIST);
    }
    assert_eq!(mount.names("web/snapshots"), ["ours", "theirs"]);
    assert_eq!(states(&home, "web", &["ours", "theirs"]), before);
    home.assert_whole();
}

#[test]
fn directories_mean_something_below_snapshots_only() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    for place in ["web/x", "web/snapshots/a/x", ".boxlite/x"] {
        assert_eq!(
            errno(fs::create_dir(mount.at(place))),
            libc::EPERM,
            "{place}"
        );
    }
    home.assert_whole();
}

#[test]
fn a_box_on_a_raw_image_is_snapshotted_before_and_after_its_first_change() {
    let home = TestHome::new();
    let image = home.put_on_a_raw_image();
    let image_before = fs::read(&image).unwrap();
    let first = digest(&home.live_disk("web"));
    let mount = home.mount();
    mount.snapshot("web", "unchanged").unwrap();
    mount.snapshot("web", "again").unwrap();
    mount.copy("web", "early");
    assert_eq!(chain(&home.live_disk("web")).len(), 2);
    assert_eq!(chain(&home.live_disk("early")).len(), 2);
    home.guest_write("web", FREE_AREA, b"second");
    let second = digest(&home.live_disk("web"));
    mount.snapshot("web", "changed").unwrap();
    home.guest_write("web", FREE_AREA, b"third");
    let third = digest(&home.live_disk("web"));
    mount.copy("web", "late");

    for name in ["unchanged", "again"] {
        assert_eq!(digest(&home.snapshot_disk("web", name)), first, "{name}");
        let export = format!("web/snapshots/{name}/export.boxlite");
        assert_eq!(mount.export_digest(&export), first, "{name}");
    }
    assert_eq!(digest(&home.snapshot_disk("web", "changed")), second);
    assert_eq!(digest(&home.live_disk("web")), third);
    assert_eq!(digest(&home.live_disk("early")), first);
    assert_eq!(digest(&home.live_disk("late")), third);
    for name in ["unchanged", "again"] {
        assert_eq!(digest(&home.snapshot_disk("late", name)), first, "{name}");
    }
    for (name, wanted) in [("unchanged", &first), ("changed", &second)] {
        home.wheel(&["snapshot-restore", "web", name]);
        assert_eq!(&digest(&home.live_disk("web")), wanted, "{name}");
    }
    home.wheel(&["snapshot-restore", "late", "again"]);
    assert_eq!(digest(&home.live_disk("late")), first);
    mount.remove_snapshot("web", "again").unwrap();
    mount.remove_snapshot("web", "unchanged").unwrap();
    assert_eq!(digest(&home.live_disk("web")), second);
    home.wheel(&["remove", "web", "--force"]);
    assert_eq!(digest(&home.live_disk("early")), first);
    assert_eq!(fs::read(&image).unwrap(), image_before);
    home.assert_whole();
}

#[test]
fn layers_that_boxlite_froze_inside_the_box_are_adopted() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "a"]);
    home.guest_write("web", FREE_AREA, b"second");
    home.wheel(&["snapshot-create", "web", "b"]);
    home.guest_write("web", FREE_AREA + 0x1_0000, b"third");
    home.wheel(&["clone", "web", "copy"]);
    home.guest_write("web", FREE_AREA + 0x2_0000, b"fourth");
    let before = states(&home, "web", &["a", "b"]);
    let copy = digest(&home.live_disk("copy"));
    let inside = |path: &PathBuf| path.starts_with(home.root().join("boxes"));
    assert!(chain(&home.live_disk("web"))[1..].iter().any(inside));

    let mount = home.mount();
    mount.snapshot("web", "c").unwrap();
    let bases = home.root().join("bases");
    for top in [
        home.live_disk("web"),
        home.live_disk("copy"),
        home.snapshot_disk("web", "b"),
        home.snapshot_disk("web", "c"),
    ] {
        for layer in &chain(&top)[1..] {
            assert!(layer.starts_with(&bases), "{} in {}", layer.display(), {
                top.display()
            });
        }
    }
    let mut after = states(&home, "web", &["a", "b", "c"]);
    assert_eq!(after.remove("c").as_ref(), before.get("live"));
    assert_eq!(after, before);
    assert_eq!(digest(&home.live_disk("copy")), copy);
    home.assert_whole();
    // The rows still work.
    home.wheel_batch(&[
        &["snapshot-restore", "web", "a"],
        &["snapshot-remove", "web", "c"],
        &["clone", "copy", "copy2"],
    ]);
    assert_eq!(Some(&digest(&home.live_disk("web"))), before.get("a"));
    assert_eq!(digest(&home.live_disk("copy2")), copy);
    assert_eq!(digest(&home.snapshot_disk("web", "b")), before["b"]);
    mount.snapshot("web", "d").unwrap();
    drop(mount);
    home.assert_whole_once_mounted();
}

// ---- rmdir --------------------------------------------------------------------------------------

/// Makes a box with three different snapshots, by the mount or by BoxLite, and a clone of the
/// middle one.
fn three_snapshots(by_boxlite: bool) -> TestHome {
    let home = TestHome::new();
    let mount = home.mount();
    for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
        let offset = FREE_AREA + number as u64 * 0x1_0000;
        home.guest_write("web", offset, name.as_bytes());
        if by_boxlite {
            home.wheel(&["snapshot-create", "web", name]);
        } else {
            mount.snapshot("web", name).unwrap();
        }
        // Each snapshot changes some data of the one before and adds some.
        home.guest_write("web", FREE_AREA, &[number as u8; 0x1_8000]);
    }
    drop(mount);
    home
}

#[test]
fn deleting_any_snapshot_leaves_every_other_state_as_it_is() {
    for by_boxlite in [false, true] {
        let home = three_snapshots(by_boxlite);
        home.put_aside("made");
        for victim in ["a", "b", "c"] {
            home.put_back("made");
            let mut wanted = states(&home, "web", &["a", "b", "c"]);
            let mount = home.mount();
            mount.remove_snapshot("web", victim).unwrap();
            wanted.remove(victim);
            let left: Vec<&str> = ["a", "b", "c"]
                .into_iter()
                .filter(|name| *name != victim)
                .collect();
            let what = format!("{victim}, by BoxLite: {by_boxlite}");
            assert_eq!(mount.names("web/snapshots"), left, "{what}");
            assert!(!mount.at("web/snapshots").join(victim).exists());
            assert_eq!(states(&home, "web", &left), wanted, "{what}");
            assert!(!home.snapshot_disk("web", victim).exists());
            home.assert_whole();
            for name in &left {
                home.wheel_batch(&[
                    &["snapshot-restore", "web", name],
                    &["snapshot-list", "web"],
                ]);
                assert_eq!(digest(&home.live_disk("web")), wanted[*name], "{what}");
            }
            // The name is free again.
            mount.snapshot("web", victim).unwrap();
            drop(mount);
            home.assert_whole_once_mounted();
        }
    }
}

#[test]
fn all_snapshots_go_in_any_order_and_the_disk_stays() {
    for order in [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]] {
        for by_boxlite in [false, true] {
            let home = three_snapshots(by_boxlite);
            let live = digest(&home.live_disk("web"));
            let mount = home.mount();
            for name in order {
                mount.remove_snapshot("web", name).unwrap();
                assert_eq!(digest(&home.live_disk("web")), live, "{order:?} {name}");
            }
            assert_eq!(mount.export_digest("web/export.boxlite"), live);
            home.assert_whole();
        }
    }
}

#[test]
fn a_clone_outlives_the_snapshot_it_was_made_from() {
    for by_boxlite in [false, true] {
        let home = three_snapshots(by_boxlite);
        let wanted = digest(&home.snapshot_disk("web", "b"));
        let mount = home.mount();
        mount.copy("web/snapshots/b", "copy");
        mount.remove_snapshot("web", "b").unwrap();
        assert_eq!(digest(&home.live_disk("copy")), wanted);
        home.wheel(&["remove", "web", "--force"]);
        assert_eq!(digest(&home.live_disk("copy")), wanted);
        mount.snapshot("copy", "x").unwrap();
        assert_eq!(mount.export_digest("copy/export.boxlite"), wanted);
        drop(mount);
        home.assert_whole_once_mounted();
    }
}

#[test]
fn a_layer_that_nothing_needs_any_more_is_freed() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "start").unwrap();
    let before = home.allocated();
    home.guest_write("web", FREE_AREA, &vec![7; 2 << 20]);
    mount.snapshot("web", "large").unwrap();
    // Another name of the layer; the layer is freed with its last name.
    mount.snapshot("web", "same").unwrap();
    home.wheel(&["snapshot-restore", "web", "start"]);
    assert!(home.allocated() >= before + (2 << 20));
    mount.remove_snapshot("web", "large").unwrap();
    assert!(home.allocated() >= before + (2 << 20));
    mount.remove_snapshot("web", "same").unwrap();
    assert!(
        home.allocated() < before + (1 << 20),
        "{} {before}",
        home.allocated()
    );
    home.assert_whole();
}

#[test]
fn the_layers_of_a_removed_box_go_at_once_but_for_those_that_others_read() {
    let home = three_snapshots(false);
    home.wheel(&["clone", "web", "theirs"]);
    let mount = home.mount();
    mount.copy("web/snapshots/a", "copy");
    let first = digest(&home.live_disk("copy"));
    let live = digest(&home.live_disk("theirs"));
    for (name, left) in [("web", true), ("theirs", true), ("copy", false)] {
        succeed(&["rm", "-r", text(&mount.at(name))]);
        let bases = names_in(&home.root().join("bases"));
        assert_eq!(!bases.is_empty(), left, "{bases:?} after {name}");
        match name {
            "web" => assert_eq!(digest(&home.live_disk("theirs")), live),
            "theirs" => assert_eq!(digest(&home.live_disk("copy")), first),
            _ => {}
        }
        home.assert_whole();
    }
}

#[test]
fn a_layer_of_boxlites_clone_goes_when_no_snapshot_and_no_disk_needs_it_any_more() {
    for last in ["rmdir", "rm", "boxlite"] {
        let home = TestHome::new();
        home.wheel(&["clone", "web", "copy"]);
        let mount = home.mount();
        // Another name of the layer below both boxes.
        mount.snapshot("copy", "a").unwrap();
        for name in ["web", "copy"] {
            let export = mount.at(name).join("export.boxlite");
            succeed(&["cp", text(&archive()), text(&export)]);
        }
        let before = digest(&home.snapshot_disk("copy", "a"));
        assert_eq!(names_in(&home.root().join("bases")).len(), 1);
        assert_eq!(before, digest(&home.live_disk("web")));
        match last {
            "rmdir" => mount.remove_snapshot("copy", "a").unwrap(),
            "boxlite" => drop(home.wheel(&["remove", "copy"])),
            _ => drop(succeed(&["rm", "-r", text(&mount.at("copy"))])),
        }
        assert_eq!(names_in(&home.root().join("bases")), [""; 0], "{last}");
        home.assert_whole();
    }
}

#[test]
fn a_layer_of_boxlites_clone_goes_at_a_mount_that_finds_its_last_reference_was_left_over() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"changed");
    home.wheel(&["clone", "web", "theirs"]);
    mount.copy("web", "copy");
    // The layer below all three no longer has readers. One reference to it is BoxLite's to drop.
    home.wheel_batch(&[&["snapshot-restore", "copy", "a"], &["remove", "theirs"]]);
    let export = mount.at("web/export.boxlite");
    succeed(&["cp", text(&archive()), text(&export)]);
    assert_eq!(names_in(&home.root().join("bases")).len(), 2);
    mount.unmount();
    let mount = home.mount();
    assert_eq!(names_in(&home.root().join("bases")).len(), 1);
    let first = digest(&home.snapshot_disk("web", "a"));
    assert_eq!(mount.export_digest("copy/export.boxlite"), first);
    home.assert_whole();
}

#[test]
fn whoever_reads_a_snapshot_while_it_is_deleted_reads_it_to_the_end() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "start").unwrap();
    home.guest_write("web", FREE_AREA, &vec![7; 2 << 20]);
    mount.snapshot("web", "large").unwrap();
    home.wheel(&["snapshot-restore", "web", "start"]);
    let path = mount.at("web/snapshots/large/export.boxlite");
    let wanted = fs::read(&path).unwrap();
    let mut reader = File::open(&path).unwrap();
    let mut read = vec![0; 4096];
    reader.read_exact(&mut read).unwrap();
    mount.remove_snapshot("web", "large").unwrap();
    reader.read_to_end(&mut read).unwrap();
    assert!(read == wanted, "the data read is not the snapshot");
    reader.seek(SeekFrom::Start(0)).unwrap();
    read.clear();
    reader.read_to_end(&mut read).unwrap();
    assert!(
        read == wanted,
        "a second read from the start is not the snapshot"
    );
}

#[test]
fn what_is_no_snapshot_is_not_deleted_by_rmdir() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let before = states(&home, "web", &["a"]);
    assert_eq!(errno(fs::remove_dir(mount.at("web"))), libc::ENOTEMPTY);
    let snapshots = fs::remove_dir(mount.at("web/snapshots"));
    assert_eq!(errno(snapshots), libc::ENOTEMPTY);
    assert_eq!(errno(mount.remove_snapshot("web", "none")), libc::ENOENT);
    assert_eq!(states(&home, "web", &["a"]), before);
    assert_eq!(mount.names("web/snapshots"), ["a"]);
}
