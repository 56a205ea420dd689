//! `boxlitefs du`: what boxes and snapshots take, and what deleting them gives back. The judges are
//! `du`, and the deletions themselves.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::common::*;

/// Bytes of a cluster of an image: a merged image may need some more or less for its tables.
const CLUSTER: i64 = 64 << 10;

/// Returns what `boxlitefs du --json` says.
fn du(place: &Path) -> Value {
    let said = succeed(&[binary(), "du", "--json", text(place)]);
    serde_json::from_str(&said).expect("JSON")
}

/// Returns the bytes on the disk of some directories, as du(1) counts them.
fn on_disk(directories: &[&Path]) -> i64 {
    let mut command = vec!["du", "-s", "-c", "-B1"];
    command.extend(directories.iter().map(|it| text(it)));
    let said = succeed(&command);
    let total = said.lines().last().unwrap().split('\t').next().unwrap();
    total.parse().unwrap()
}

/// Returns the bytes on the disk of what boxes are made of.
fn of_boxes(home: &TestHome) -> i64 {
    on_disk(&[&home.root().join("boxes"), &home.root().join("bases")])
}

fn mount(home: &TestHome) -> Mounted {
    home.mount_with(&["-o", "compact=off"], &[])
}

/// Returns the paths in a mount of all boxes and snapshots, with what is said of them.
fn items(said: &Value) -> Vec<(String, Value)> {
    let mut items = Vec::new();
    for of in said["boxes"].as_array().unwrap() {
        let name = of["name"].as_str().unwrap();
        items.push((name.to_owned(), of.clone()));
        for snapshot in of["snapshots"].as_array().unwrap() {
            let path = format!("{name}/snapshots/{}", snapshot["name"].as_str().unwrap());
            items.push((path, snapshot.clone()));
        }
    }
    items
}

/// Deletes each box and each snapshot of a home in turn, and fails if that gives back another number
/// of bytes than `boxlitefs du` said, by itself or once the home was compacted.
///
/// Merging makes holes of zeros that are stored, and nothing but reading all data could tell how
/// many there are. So they are holes before.
fn assert_true_of_each(home: &TestHome) {
    for image in home.images() {
        succeed(&["fallocate", "--dig-holes", text(&image)]);
    }
    home.put_aside("whole");
    home.put_back("whole");
    succeed(&["sync", "-f", text(home.root())]);
    let said = du(home.root());
    let before = of_boxes(home);
    assert_eq!(home.compact().0, 0);
    let compacting = before - of_boxes(home);
    let told = said["compact_frees_bytes"].as_i64().unwrap();
    assert!(
        (compacting - told).abs() <= CLUSTER,
        "{compacting}, not {told}"
    );
    for (path, _) in items(&said) {
        home.put_back("whole");
        // Blocks count once they are written, and a copy may have others than the original.
        succeed(&["sync", "-f", text(home.root())]);
        let mount = mount(home);
        let said = items(&du(mount.root()));
        let (_, item) = said.into_iter().find(|(it, _)| *it == path).unwrap();
        let before = of_boxes(home);
        let place = mount.at(&path);
        if path.contains("/snapshots/") {
            fs::remove_dir(&place).unwrap();
        } else {
            succeed(&["rm", "-r", text(&place)]);
        }
        let freed = before - of_boxes(home);
        mount.unmount();
        assert_eq!(item["frees_bytes"], freed, "{path}: {item:#}");
        let (status, compact) = home.compact();
        assert_eq!(status, 0, "{path}: {compact}");
        let freed = before - of_boxes(home) - compacting;
        let told = item["frees_compacted_bytes"].as_i64().unwrap();
        assert!(
            (freed - told).abs() <= CLUSTER,
            "{path}: {freed} once compacted: {item:#} {compact}"
        );
    }
    home.put_back("whole");
    fs::remove_dir_all(home.beside("whole")).unwrap();
}

#[test]
fn the_parts_add_up_to_what_du_counts() {
    let home = TestHome::new().keep();
    home.wheel(&["clone", "web", "theirs"]);
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    mount.copy("web", "ours");
    home.guest_write("web", FREE_AREA, &[1; 200_000]);
    mount.snapshot("web", "b").unwrap();
    mount.remove_snapshot("web", "b").unwrap();
    fs::read(mount.at("web/export.boxlite.zst")).unwrap();
    mount.unmount();
    let other = home.root().join("notes");
    fs::write(&other, [1; 10_000]).unwrap();
    fs::hard_link(&other, home.root().join("same-notes")).unwrap();
    fs::create_dir_all(home.root().join("images/disk-images")).unwrap();
    fs::write(home.root().join("images/disk-images/x.ext4"), [1; 9_000]).unwrap();
    let said = du(home.root());
    let counted = on_disk(&[home.root()]);
    assert_eq!(said["total_bytes"], counted, "{said:#}");
    let parts = said["parts"].as_object().unwrap();
    let sum: i64 = parts.values().map(|part| part.as_i64().unwrap()).sum();
    assert_eq!(sum, counted, "{said:#}");
    for part in [
        "boxes", "shared", "undo", "images", "database", "caches", "other",
    ] {
        assert!(
            parts[&format!("{part}_bytes")].as_i64().unwrap() > 0,
            "{part}: {said:#}"
        );
    }
    let boxes = said["boxes"].as_array().unwrap().iter();
    let own: i64 = boxes.map(|it| it["own_bytes"].as_i64().unwrap()).sum();
    assert_eq!(parts["boxes_bytes"], own, "{said:#}");
    assert_eq!(said["undo"].as_array().unwrap().len(), 1, "{said:#}");
    let table = succeed(&[binary(), "du", text(home.root())]);
    assert!(table.contains("total, as du -s counts"), "{table}");
}

#[test]
fn deleting_gives_back_what_was_said() {
    let home = TestHome::new();
    let mount = mount(&home);
    home.guest_write("web", FREE_AREA, &[1; 900_000]);
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA + 300_000, &[2; 900_000]);
    mount.snapshot("web", "b").unwrap();
    mount.snapshot("web", "same").unwrap();
    mount.copy("web/snapshots/a", "copy");
    home.guest_write("copy", FREE_AREA + 100_000, &[3; 700_000]);
    mount.snapshot("copy", "c").unwrap();
    home.guest_write("web", FREE_AREA, &[4; 500_000]);
    mount.unmount();
    assert_true_of_each(&home);
    // Once more where there is something to merge and a layer that only a clone reads.
    let mount = self::mount(&home);
    mount.remove_snapshot("web", "a").unwrap();
    mount.remove_snapshot("web", "same").unwrap();
    mount.unmount();
    assert_true_of_each(&home);
    assert_eq!(home.compact().0, 0);
    assert_true_of_each(&home);
    home.assert_whole();
}

#[test]
fn deleting_what_boxlite_made_gives_back_what_was_said() {
    let home = TestHome::new();
    home.guest_write("web", FREE_AREA, &[1; 400_000]);
    home.wheel(&["snapshot-create", "web", "a"]);
    home.guest_write("web", FREE_AREA + 200_000, &[2; 400_000]);
    home.wheel(&["clone", "web", "theirs"]);
    home.guest_write("web", FREE_AREA + 300_000, &[3; 400_000]);
    home.guest_write("theirs", FREE_AREA + 100_000, &[4; 400_000]);
    home.wheel(&["snapshot-create", "theirs", "b"]);
    home.guest_write("theirs", FREE_AREA, &[5; 100_000]);
    mount(&home).unmount();
    assert_true_of_each(&home);
}

#[test]
fn compacting_gives_back_at_least_what_was_said() {
    let home = TestHome::new();
    let mount = mount(&home);
    // Most of what the top layer has is stored zeros.
    home.guest_write("web", FREE_AREA, &[1; 400_000]);
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, &[0; 400_000]);
    mount.remove_snapshot("web", "a").unwrap();
    mount.unmount();
    let told = du(home.root())["compact_frees_bytes"].as_i64().unwrap();
    let before = of_boxes(&home);
    assert_eq!(home.compact().0, 0);
    let freed = before - of_boxes(&home);
    assert!((300_000..freed).contains(&told), "{told} {freed}");
}

/// Makes a home with a random history, by the mount and by BoxLite.
fn random_home(dice: &mut Dice) -> TestHome {
    let home = TestHome::new();
    let mut mount = mount(&home);
    let mut boxes = vec!["web".to_owned()];
    for number in 0..8 {
        let name = dice.one_of(&boxes).clone();
        let snapshots = mount.names(format!("{name}/snapshots"));
        let new = format!("n{number}");
        let at = FREE_AREA + dice.below(20) * 50_000;
        match dice.below(8) {
            0 | 1 => home.guest_write(&name, at, &vec![number + 1; 150_000]),
            2 | 3 => mount.snapshot(&name, &new).unwrap(),
            4 => {
                mount.copy(&name, &new);
                boxes.push(new);
            }
            5 if !snapshots.is_empty() => {
                let gone = dice.one_of(&snapshots);
                mount.remove_snapshot(&name, gone).unwrap();
            }
            6 if !snapshots.is_empty() => {
                let from = format!("{name}/snapshots/{}", dice.one_of(&snapshots));
                if dice.coin() {
                    mount.copy(&from, &new);
                    boxes.push(new);
                } else {
                    let [from, to] = [&*from, &name].map(|it| mount.at(it).join("export.boxlite"));
                    succeed(&["cp", text(&from), text(&to)]);
                }
            }
            _ => {
                mount.unmount();
                if dice.coin() {
                    home.wheel(&["snapshot-create", &name, &new]);
                } else {
                    home.wheel(&["clone", &name, &new]);
                    boxes.push(new);
                }
                mount = self::mount(&home);
            }
        }
    }
    mount.unmount();
    home
}

#[test]
fn deleting_gives_back_what_was_said_after_any_history() {
    let seed = seed("histories");
    for case in 0..how_many(2, 6, 100) {
        println!("case {case}");
        let home = random_home(&mut Dice::of(seed, case));
        assert_true_of_each(&home);
    }
}

#[test]
fn what_can_be_had_back_takes_its_space_until_it_is_dropped() {
    let home = TestHome::new().keep();
    succeed(&["fallocate", "--dig-holes", text(&home.live_disk("web"))]);
    let mount = mount(&home);
    home.guest_write("web", FREE_AREA, &[1; 900_000]);
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, &[2; 900_000]);
    let told = du(mount.root());
    mount.remove_snapshot("web", "a").unwrap();
    let said = du(home.root());
    let entry = &said["undo"][0];
    let whole = of_boxes(&home);
    let name = mount.names(".boxlite/undo").remove(0);
    succeed(&["rm", "-r", text(&mount.at(".boxlite/undo").join(name))]);
    let freed = whole - of_boxes(&home);
    assert_eq!(du(home.root())["undo"].as_array().unwrap().len(), 0);
    mount.unmount();
    assert_eq!(home.compact().0, 0);
    let freed_at_all = whole - of_boxes(&home);
    let compacted = entry["frees_compacted_bytes"].as_i64().unwrap();
    let now = entry["frees_bytes"].as_i64().unwrap();
    // The entry's own directory lies elsewhere.
    let directories = now - freed;
    assert!((0..CLUSTER).contains(&directories), "{entry:#} {freed}");
    let off = compacted - directories - freed_at_all;
    assert!(off.abs() <= CLUSTER, "{entry:#} {freed_at_all}");
    let told = told["boxes"][0]["snapshots"][0]["frees_compacted_bytes"]
        .as_i64()
        .unwrap();
    assert!(
        (told - freed_at_all).abs() <= CLUSTER,
        "{told} {freed_at_all}"
    );
}

#[test]
fn what_has_a_name_elsewhere_is_not_freed() {
    let home = TestHome::new();
    let mount = mount(&home);
    home.guest_write("web", FREE_AREA, &[1; 900_000]);
    mount.snapshot("web", "a").unwrap();
    let layer = home.snapshot_disk("web", "a");
    fs::hard_link(&layer, home.beside("backup.qcow2")).unwrap();
    let said = du(mount.root());
    let whole = of_boxes(&home);
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    // A base with a name that is not known stays.
    let freed = whole - of_boxes(&home);
    assert_eq!(said["boxes"][0]["frees_bytes"], freed, "{said:#}");
    let backup = on_disk(&[&home.beside("backup.qcow2")]);
    let own = said["boxes"][0]["own_bytes"].as_i64().unwrap();
    assert_eq!(own, freed + backup, "{said:#}");
}

#[test]
fn nothing_is_promised_where_a_header_is_damaged() {
    let home = TestHome::new();
    let mount = mount(&home);
    mount.snapshot("web", "a").unwrap();
    mount.copy("web/snapshots/a", "copy");
    mount.unmount();
    fs::write(home.live_disk("copy"), [7; 70_000]).unwrap();
    let said = du(home.root());
    assert_eq!(said["compact_frees_bytes"], Value::Null, "{said:#}");
    let snapshot = &said["boxes"][1]["snapshots"][0];
    assert_eq!(snapshot["frees_compacted_bytes"], Value::Null, "{said:#}");
    assert_eq!(said["total_bytes"], on_disk(&[home.root()]), "{said:#}");
    let table = succeed(&[binary(), "du", text(home.root())]);
    assert!(table.contains('?'), "{table}");
}

#[test]
fn directories_that_lie_elsewhere_count_as_well() {
    let home = TestHome::new();
    let elsewhere = home.beside("elsewhere");
    let mount = mount(&home);
    mount.snapshot("web", "a").unwrap();
    mount.unmount();
    succeed(&["mv", text(&home.root().join("bases")), text(&elsewhere)]);
    std::os::unix::fs::symlink(&elsewhere, home.root().join("bases")).unwrap();
    let said = du(home.root());
    let counted = on_disk(&[home.root(), &elsewhere]);
    assert_eq!(said["total_bytes"], counted, "{said:#}");
    let own = said["boxes"][0]["own_bytes"].as_i64().unwrap();
    assert_eq!(said["parts"]["boxes_bytes"], own, "{said:#}");
}
