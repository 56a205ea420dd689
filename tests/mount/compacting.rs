//! `boxlitefs compact` reclaims space and shortens backing chains, and keeps the contents of every
//! box and snapshot byte for byte.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::common::*;

const MIB: u64 = 1 << 20;

/// Maps `box` and `box/snapshot` to the digest of what the guest sees.
fn states(home: &TestHome) -> BTreeMap<String, String> {
    let database = home.database();
    let rows = |statement: &str| -> Vec<(String, String)> {
        let mut statement = database.prepare(statement).unwrap();
        statement
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap()
            .map(Result::unwrap)
            .collect()
    };
    let mut states = BTreeMap::new();
    for (name, _) in rows("SELECT name, '' FROM box_config") {
        states.insert(name.clone(), digest(&home.live_disk(&name)));
    }
    let snapshots = "SELECT box_config.name, snapshot.name FROM snapshot \
         JOIN box_config ON snapshot.box_id = box_config.id";
    for (name, snapshot) in rows(snapshots) {
        let layer = digest(&home.snapshot_disk(&name, &snapshot));
        states.insert(format!("{name}/{snapshot}"), layer);
    }
    states
}

/// Counts the backing files of a box's live disk.
fn backing(home: &TestHome, name: &str) -> usize {
    chain(&home.live_disk(name)).len() - 1
}

/// Compacts and returns the output. Asserts success, unchanged contents, clean images and no
/// findings by `check`.
fn compact(home: &TestHome) -> String {
    let before = states(home);
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    assert_eq!(states(home), before, "{said}");
    home.assert_whole();
    said
}

/// Returns the size in bytes of a disk that qemu flattened into one image.
fn flattened(image: &Path) -> u64 {
    let place = tempfile::tempdir_in(image.parent().unwrap()).unwrap();
    let flat = place.path().join("flat.qcow2");
    succeed(&[
        "qemu-img",
        "convert",
        "-U",
        "-O",
        "qcow2",
        text(image),
        text(&flat),
    ]);
    fs::metadata(flat).unwrap().blocks() * 512
}

fn write(home: &TestHome, name: &str, command: &str) {
    let live = home.live_disk(name);
    let said = succeed(&["qemu-io", "-f", "qcow2", "-c", command, text(&live)]);
    assert!(!said.contains("failed"), "{said}");
}

// ---- space --------------------------------------------------------------------------------------

#[test]
fn what_a_deleted_snapshot_took_comes_back() {
    let home = TestHome::new();
    let archive = home.beside("large.boxlite");
    home.wheel(&["make-archive", text(&archive), "large", "--size", "160M"]);
    home.wheel_batch(&[&["remove", "web"], &["import", text(&archive), "large"]]);
    write(&home, "large", "write -P 1 32M 100M");
    let mount = home.mount();
    mount.snapshot("large", "a").unwrap();
    write(&home, "large", "write -P 2 32M 100M");
    assert!(home.allocated() > 200 * MIB);
    mount.remove_snapshot("large", "a").unwrap();
    drop(mount);
    let said = compact(&home);
    assert!(
        said.contains("box large: 2 layers became one, 100"),
        "{said}"
    );
    assert!(said.contains("MiB freed"), "{said}");
    let (now, least) = (home.allocated(), flattened(&home.live_disk("large")));
    assert!(now * 100 <= least * 105, "{now} where {least} would do");
    assert_eq!(backing(&home, "large"), 0);
    let said = compact(&home);
    assert!(said.contains("nothing more to free"), "{said}");
    home.wheel_batch(&[
        &["snapshot-create", "large", "b"],
        &["snapshot-restore", "large", "b"],
    ]);
}

#[test]
fn a_snapshot_taken_and_deleted_leaves_nothing() {
    let home = TestHome::new();
    let (live, before) = (home.live_disk("web"), states(&home));
    let inode = fs::metadata(&live).unwrap().ino();
    let times = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let changed = times(&live);
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    mount.remove_snapshot("web", "a").unwrap();
    assert_eq!(backing(&home, "web"), 1);
    compact(&home);
    // The disk is the same file as before the snapshot: nothing was copied.
    assert_eq!(fs::metadata(&live).unwrap().ino(), inode);
    assert_eq!(times(&live), changed);
    assert_eq!(backing(&home, "web"), 0);
    assert_eq!(names_in(&home.root().join("bases")), [""; 0]);
    assert_eq!(states(&home), before);
}

#[test]
fn every_deleted_snapshot_of_a_history_is_merged_away() {
    let home = TestHome::new();
    let mount = home.mount();
    for round in 0u8..6 {
        home.guest_write(
            "web",
            FREE_AREA + u64::from(round) * 30_000,
            &[round + 1; 90_000],
        );
        mount.snapshot("web", &format!("s{round}")).unwrap();
        if round == 2 {
            mount.copy("web/snapshots/s2", "copy");
        }
    }
    home.guest_write("web", FREE_AREA + 7, b"the box's own");
    home.guest_write("copy", FREE_AREA + 9, b"the copy's own");
    for gone in ["s0", "s1", "s4", "s2"] {
        mount.remove_snapshot("web", gone).unwrap();
    }
    let exports = [
        "web/export.boxlite",
        "copy/export.boxlite",
        "web/snapshots/s3/export.boxlite",
    ];
    let read = |mount: &Mounted| exports.map(|path| fs::read(mount.at(path)).unwrap());
    let before = read(&mount);
    compact(&home);
    // Three layers remain: s0 to s2 as one, which both boxes use; s3; and s4 merged with s5.
    assert_eq!(backing(&home, "web"), 3);
    assert_eq!(backing(&home, "copy"), 1);
    // Exports are byte for byte the same, both in the mount that was already there and in a new
    // one.
    assert!(read(&mount) == before, "an export changed");
    drop(mount);
    assert!(read(&home.mount()) == before, "an export changed");
    let mount = home.mount();
    for gone in ["s3", "s5"] {
        mount.remove_snapshot("web", gone).unwrap();
    }
    drop(mount);
    compact(&home);
    assert_eq!(backing(&home, "web"), 1, "the copy's layers stay");
}

#[test]
fn what_boxlite_left_of_boxes_that_are_gone_is_freed() {
    let home = TestHome::new();
    home.wheel_batch(&[&["clone", "web", "c1"]]);
    home.guest_write("web", FREE_AREA, b"second");
    home.wheel_batch(&[
        &["clone", "web", "c2"],
        &["remove", "c1"],
        &["remove", "c2"],
    ]);
    home.guest_write("web", FREE_AREA + 512, b"third");
    assert_eq!(backing(&home, "web"), 2);
    compact(&home);
    assert_eq!(backing(&home, "web"), 0);
    assert_eq!(names_in(&home.root().join("bases")), [""; 0]);
    home.wheel_batch(&[&["snapshot-create", "web", "a"], &["clone", "web", "c3"]]);
    drop(home.mount());
    home.assert_whole();
}

// ---- long chains --------------------------------------------------------------------------------

/// Makes a box on twenty layers with BoxLite alone: a snapshot and a clone for each layer.
fn twenty_levels(keep_clones: bool) -> TestHome {
    let home = TestHome::in_memory();
    for round in 0u8..10 {
        let at = FREE_AREA + u64::from(round) * 40_000;
        home.guest_write("web", at, &[round + 1; 60_000]);
        let (snapshot, clone) = (format!("s{round}"), format!("c{round}"));
        home.wheel(&["snapshot-create", "web", &snapshot]);
        home.guest_write("web", at + 512, &[round + 101; 512]);
        home.wheel(&["clone", "web", &clone]);
        if !keep_clones {
            home.wheel(&["remove", &clone]);
        }
    }
    home.guest_write("web", FREE_AREA + 3, b"the box's own");
    assert_eq!(backing(&home, "web"), 20);
    home
}

#[test]
fn a_box_on_twenty_layers_is_read_cloned_and_made_short() {
    for keep_clones in [false, true] {
        let home = twenty_levels(keep_clones);
        let before = states(&home);
        let mount = home.mount();
        assert_eq!(mount.export_digest("web/export.boxlite"), before["web"]);
        let snapshot = "web/snapshots/s9/export.boxlite";
        assert_eq!(mount.export_digest(snapshot), before["web/s9"]);
        mount.copy("web", "copy");
        assert!(backing(&home, "copy") <= 8);
        assert_eq!(digest(&home.live_disk("copy")), before["web"]);
        assert_eq!(digest(&home.snapshot_disk("copy", "s9")), before["web/s9"]);
        drop(mount);
        let said = compact(&home);
        for name in ["web", "copy"] {
            assert!(backing(&home, name) <= 8, "{name}: {said}");
        }
        if keep_clones {
            for round in 0..10 {
                assert!(backing(&home, &format!("c{round}")) <= 8, "{said}");
            }
        }
        let mut now = states(&home);
        now.retain(|name, _| !name.starts_with("copy"));
        assert_eq!(now, before);
        // BoxLite can use the box afterwards.
        let place = tempfile::tempdir().unwrap();
        let answers = home.wheel_batch(&[
            &["export", "web", text(place.path())],
            &["snapshot-restore", "web", "s0"],
            &["snapshot-list", "web"],
        ]);
        let archive = answers[0]["path"].as_str().unwrap();
        assert_eq!(archive_digest(archive.as_ref()), before["web"]);
        assert_eq!(digest(&home.live_disk("web")), before["web/s0"]);
        // All snapshots can be deleted, which frees their space.
        let mount = home.mount();
        for round in 0..10 {
            mount.remove_snapshot("web", &format!("s{round}")).unwrap();
            mount.remove_snapshot("copy", &format!("s{round}")).unwrap();
        }
        drop(mount);
        compact(&home);
        if !keep_clones {
            for name in ["web", "copy"] {
                assert!(backing(&home, name) <= 1);
            }
        }
    }
}

#[test]
fn a_box_between_snapshots_that_all_stay_gets_a_short_chain_of_its_own() {
    let home = TestHome::in_memory();
    for round in 0u8..10 {
        home.guest_write("web", FREE_AREA + u64::from(round) * 512, &[round + 1; 512]);
        home.wheel(&["snapshot-create", "web", &format!("s{round}")]);
    }
    home.guest_write("web", FREE_AREA, b"the box's own");
    assert_eq!(backing(&home, "web"), 10);
    let said = compact(&home);
    assert!(backing(&home, "web") <= 4, "{said}");
    home.wheel_batch(&[
        &["snapshot-create", "web", "more"],
        &["snapshot-restore", "web", "s9"],
        &["snapshot-restore", "web", "more"],
    ]);
}

#[test]
fn no_change_leaves_more_than_eight_backing_files_and_deleted_snapshots_make_room() {
    let home = TestHome::in_memory();
    let mount = home.mount();
    for round in 0u8..24 {
        home.guest_write(
            "web",
            FREE_AREA + u64::from(round) * 700,
            &[round + 1; 1500],
        );
        mount.snapshot("web", &format!("s{round}")).unwrap();
        assert!(backing(&home, "web") <= 8, "after {round}");
        if round % 3 != 0 {
            mount.remove_snapshot("web", &format!("s{round}")).unwrap();
        }
        if round % 8 == 7 {
            let clone = format!("c{round}");
            mount.copy("web", &clone);
            assert!(backing(&home, &clone) <= 8, "clone after {round}");
        }
    }
    compact(&home);
}

// ---- what compacting leaves alone ---------------------------------------------------------------

/// Makes a home with layers to merge and returns it with the paths and inode numbers of its files.
fn mergeable() -> (TestHome, Vec<(PathBuf, u64)>) {
    let home = TestHome::new();
    let mount = home.mount();
    home.guest_write("web", FREE_AREA, &[1; 300_000]);
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, &[2; 300_000]);
    mount.remove_snapshot("web", "a").unwrap();
    drop(mount);
    let inodes = inodes(&home);
    (home, inodes)
}

fn inodes(home: &TestHome) -> Vec<(PathBuf, u64)> {
    let inode = |path: PathBuf| {
        let inode = fs::metadata(&path).unwrap().ino();
        (path, inode)
    };
    home.images().into_iter().map(inode).collect()
}

#[test]
fn a_runtime_that_has_the_home_is_told_of_and_nothing_changes() {
    let (home, before) = mergeable();
    let holder = home.hold();
    let (status, said) = home.compact();
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("BoxLite runtime is using"), "{said}");
    assert_eq!(inodes(&home), before);
    drop(holder);
    compact(&home);
    assert_ne!(inodes(&home), before);
}

#[test]
fn a_box_that_runs_waits_and_others_do_not() {
    let (home, before) = mergeable();
    let mount = home.mount();
    mount.copy("web", "other");
    home.guest_write("other", FREE_AREA, &[3; 1000]);
    mount.snapshot("other", "b").unwrap();
    home.guest_write("other", FREE_AREA, &[4; 1000]);
    mount.remove_snapshot("other", "b").unwrap();
    drop(mount);
    let mut sleeper = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let shim = home.box_dir("web").join("shim.pid");
    fs::write(&shim, sleeper.id().to_string()).unwrap();
    let (status, said) = home.compact();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    fs::remove_file(shim).unwrap();
    assert_eq!(status, 0, "{said}");
    assert!(
        said.contains("not now") && said.contains("web is busy"),
        "{said}"
    );
    assert!(said.contains("box other: 2 layers"), "{said}");
    let (disk, inode) = &before[before.len() - 1];
    assert_eq!(fs::metadata(disk).unwrap().ino(), *inode, "{said}");
    compact(&home);
}

#[test]
fn a_layer_that_is_being_read_stays_and_the_reader_gets_its_bytes() {
    let (home, before) = mergeable();
    let mount = home.mount();
    let wanted = fs::read(mount.at("web/export.boxlite")).unwrap();
    let mut export = File::open(mount.at("web/export.boxlite")).unwrap();
    let mut first = vec![0; 100_000];
    export.read_exact(&mut first).unwrap();
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    assert!(
        said.contains("not now") && said.contains("is being read"),
        "{said}"
    );
    assert_eq!(inodes(&home), before);
    let mut rest = Vec::new();
    export.read_to_end(&mut rest).unwrap();
    drop(export);
    assert!([first, rest].concat() == wanted, "other bytes than before");
    let said = compact(&home);
    assert!(said.contains("2 layers became one"), "{said}");
    assert!(fs::read(mount.at("web/export.boxlite")).unwrap() == wanted);
}

#[test]
fn files_with_names_that_nobody_knows_stay_as_they_are() {
    // A user's backup made of hard links to either layer.
    for index in 0..2 {
        let (home, _) = mergeable();
        let layer = chain(&home.live_disk("web")).remove(index);
        let backup = home.root().join("backup.qcow2");
        fs::hard_link(&layer, &backup).unwrap();
        let (before, bytes) = (inodes(&home), digest(&backup));
        let (status, said) = home.compact();
        assert_eq!(status, 0, "{said}");
        assert_eq!(inodes(&home), before);
        assert_eq!(digest(&backup), bytes);
        fs::remove_file(backup).unwrap();
        compact(&home);
        assert_eq!(backing(&home, "web"), 0);
    }
}

#[test]
fn bases_of_others_and_what_reads_them_stay() {
    let (home, _) = mergeable();
    // A base without a row, as a crash during BoxLite's clone leaves. It has no readers, or its
    // only reader is a file without a row.
    let base = home.root().join("bases/NoRow000.qcow2");
    let reader = home.root().join("bases/NoRow001.qcow2");
    fs::copy(chain(&home.live_disk("web")).remove(1), &base).unwrap();
    let create = [
        "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b",
    ];
    succeed(&[&create[..], &[text(&base), text(&reader)]].concat());
    let before = states(&home);
    let kept = [digest(&base), digest(&reader)];
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    assert_eq!(states(&home), before);
    assert_eq!([digest(&base), digest(&reader)], kept);
    assert_eq!(backing(&home, "web"), 0);
}

#[test]
fn while_a_header_cannot_be_read_nothing_is_merged() {
    let (home, before) = mergeable();
    let broken = home.root().join("bases/Broken00.qcow2");
    fs::write(&broken, b"QFI\xfb\0\0\0\x09").unwrap();
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    fs::remove_file(&broken).unwrap();
    assert_eq!(inodes(&home), before);
}

#[test]
fn a_copied_home_is_left_alone() {
    let (home, before) = mergeable();
    let copy = TestHome::copy_of(&home);
    let fingerprint = home.fingerprint();
    let images = inodes(&copy);
    let (_, said) = copy.compact();
    assert_eq!(inodes(&copy), images, "{said}");
    assert_eq!(inodes(&home), before);
    assert_eq!(home.fingerprint(), fingerprint, "the original changed");
}

#[test]
fn a_raw_image_below_is_never_merged() {
    let home = TestHome::new();
    let image = home.put_on_a_raw_image();
    home.guest_write("web", FREE_AREA, b"second");
    let bytes = fs::read(&image).unwrap();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA + 100_000, b"third");
    mount.remove_snapshot("web", "a").unwrap();
    drop(mount);
    compact(&home);
    assert_eq!(backing(&home, "web"), 1);
    assert!(fs::read(&image).unwrap() == bytes);
}

#[test]
fn compressed_layers_that_would_grow_stay() {
    let home = TestHome::new();
    let live = home.live_disk("web");
    // A base as written by an importer that keeps clusters compressed.
    write(&home, "web", "write -P 7 5M 2M");
    let small = live.with_extension("small");
    succeed(&[
        "qemu-img",
        "convert",
        "-c",
        "-O",
        "qcow2",
        text(&live),
        text(&small),
    ]);
    fs::rename(&small, &live).unwrap();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"second");
    mount.remove_snapshot("web", "a").unwrap();
    drop(mount);
    let before = home.allocated();
    compact(&home);
    assert!(home.allocated() <= before);
}

// ---- background merging -------------------------------------------------------------------------

#[test]
fn a_mount_that_is_left_alone_merges_once_nobody_reads() {
    let (home, before) = mergeable();
    let contents = states(&home);
    let mount = home.mount_with(&["-o", "compact=0.2"], &[]);
    let mut export = File::open(mount.at("web/export.boxlite")).unwrap();
    export.read_exact(&mut [0; 1000]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(inodes(&home), before, "merged under a reader");
    drop(export);
    // Not by qemu-img: it would read the layers while they are merged.
    eventually("the layers are merged", || {
        mount.log().contains("box web: 2 layers became one")
    });
    assert_eq!(backing(&home, "web"), 0);
    assert_eq!(states(&home), contents);
    // A layer is also freed when BoxLite removes its last reader.
    mount.snapshot("web", "start").unwrap();
    home.guest_write("web", FREE_AREA, b"second");
    mount.snapshot("web", "a").unwrap();
    let bases = home.root().join("bases");
    assert_eq!(names_in(&bases).len(), 2);
    home.wheel_batch(&[
        &["snapshot-restore", "web", "start"],
        &["snapshot-remove", "web", "a"],
    ]);
    eventually("the base is freed", || names_in(&bases).len() == 1);
    home.assert_whole();
    mount.unmount();
    let ours = names_in(&home.root().join(".boxlitefs"));
    assert_eq!(ours, ["layers", "log", "reserve"]);
}

#[test]
fn a_mount_does_not_merge_unasked_what_would_cost_far_more_than_it_gives() {
    let home = TestHome::new();
    write(&home, "web", "write -P 1 5M 3M");
    let mount = home.mount_with(&["-o", "compact=0.2"], &[]);
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"little");
    mount.remove_snapshot("web", "a").unwrap();
    let before = inodes(&home);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(inodes(&home), before);
    let said = compact(&home);
    assert!(said.contains("2 layers became one"), "{said}");
}

// ---- reported space -----------------------------------------------------------------------------

/// Reads `space` from a JSON file of the mount.
fn space(mount: &Mounted, path: &str) -> (u64, u64) {
    let text = fs::read(mount.at(path)).unwrap();
    assert_eq!(
        text.len() as u64,
        fs::metadata(mount.at(path)).unwrap().len()
    );
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let bytes = |name: &str| value["space"][name].as_u64().unwrap();
    (bytes("own_bytes"), bytes("shared_bytes"))
}

#[test]
fn box_json_and_snapshot_json_say_what_goes_with_them() {
    let home = TestHome::new();
    write(&home, "web", "write -P 1 5M 1M");
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    mount.copy("web/snapshots/a", "copy");
    write(&home, "web", "write -P 2 6M 1M");
    mount.snapshot("web", "b").unwrap();
    write(&home, "copy", "write -P 3 5M 512k");
    mount.copy("web/snapshots/a", "other");
    home.wheel_batch(&[&["snapshot-restore", "web", "a"]]);
    let settled = || {
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let boxes = ["web", "copy", "other"].map(|name| space(&mount, &format!("{name}/box.json")));
        let snapshots =
            ["a", "b"].map(|name| space(&mount, &format!("web/snapshots/{name}/snapshot.json")));
        (boxes, snapshots)
    };
    let ([web, copy, other], [a, b]) = settled();
    let about = |bytes: u64, wanted: u64| bytes >= wanted && bytes < wanted + 512 * 1024;
    // All three boxes share the layer of `a`. What `b` adds to it belongs to `b` and so to `web`.
    let layer = fs::metadata(home.snapshot_disk("web", "a"))
        .unwrap()
        .blocks()
        * 512;
    assert!(about(web.0, MIB) && web.1 == layer, "{web:?}");
    assert!(about(copy.0, MIB / 2) && copy.1 == layer, "{copy:?}");
    assert!(other.0 < 300_000 && other.1 == layer, "{other:?}");
    assert_eq!(a, (0, layer));
    assert!(about(b.0, MIB) && b.1 == layer, "{b:?}");
    // Deleting frees as much as was reported.
    let before = home.allocated();
    mount.remove_snapshot("web", "b").unwrap();
    assert_eq!(before - home.allocated(), b.0);
    let before = home.allocated();
    succeed(&["rm", "-r", text(&mount.at("copy"))]);
    eventually("its files are gone", || before - home.allocated() == copy.0);
}

// ---- thousands of layers ------------------------------------------------------------------------

/// Adds `number` boxes, each with a chain of `snapshots` snapshots, by writing rows and empty
/// layers directly. BoxLite itself would need an hour.
fn multiply(home: &TestHome, number: usize, snapshots: usize) {
    let empty = fs::read(home.live_disk("web")).unwrap().len() as u64;
    assert!(empty > 0);
    let mut database = home.database();
    let (id, created, config, status, state): (String, i64, String, String, String) = database
        .query_row(
            "SELECT c.id, c.created_at, c.json, s.status, s.json
             FROM box_config c JOIN box_state s USING (id)",
            [],
            |row| {
                Ok((
                    row.get(0)?,
                    row.get(1)?,
                    row.get(2)?,
                    row.get(3)?,
                    row.get(4)?,
                ))
            },
        )
        .unwrap();
    let root = home.root();
    let bases = root.join("bases");
    fs::create_dir_all(&bases).unwrap();
    let rows = database.transaction().unwrap();
    for n in 0..number {
        let (box_id, name) = (format!("crowd{n:07}"), format!("box{n:05}"));
        let dir = root.join("boxes").join(&box_id);
        fs::create_dir_all(dir.join("disks")).unwrap();
        let config = config
            .replace(&id, &box_id)
            .replace("\"web\"", &format!("{name:?}"));
        rows.execute(
            "INSERT INTO box_config VALUES (?1, ?2, ?3, ?4)",
            (&box_id, &name, created, config),
        )
        .unwrap();
        rows.execute(
            "INSERT INTO box_state VALUES (?1, ?2, NULL, ?3)",
            (&box_id, &status, &state),
        )
        .unwrap();
        let mut below = None;
        for s in 0..snapshots {
            let base_id = format!("B{n:05}{s:02}");
            let base = bases.join(format!("{base_id}.qcow2"));
            // A box's chain may be this long and no longer.
            let on = below.take().filter(|_| s % 5 != 0);
            layer(&base, on.as_deref());
            let disk = dir.join(format!("snapshots/s{s}/disk.qcow2"));
            fs::create_dir_all(disk.parent().unwrap()).unwrap();
            fs::hard_link(&base, &disk).unwrap();
            rows.execute(
                "INSERT INTO base_disk VALUES (?1, '__boxlitefs__', NULL, 'snapshot', ?2, 0, '{}')",
                (&base_id, text(&base)),
            )
            .unwrap();
            rows.execute(
                "INSERT INTO base_disk_ref VALUES (?1, ?2)",
                (&base_id, &box_id),
            )
            .unwrap();
            let json = serde_json::json!({"base_path": text(&disk)}).to_string();
            rows.execute(
                "INSERT INTO snapshot VALUES (?1, ?2, ?3, 0, ?4)",
                (format!("S{n:05}{s:02}"), &box_id, format!("s{s}"), json),
            )
            .unwrap();
            below = Some(base);
        }
        layer(&dir.join("disks/disk.qcow2"), below.as_deref());
    }
    rows.commit().unwrap();
}

/// Writes an empty 8 MiB layer directly: qemu-img would take ten minutes for all of them.
fn layer(path: &Path, below: Option<&Path>) {
    const CLUSTER: usize = 65536;
    let mut bytes = vec![0; 3 * CLUSTER + 8];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb\0\0\0\x03");
    if let Some(below) = below {
        put(8, &512u64.to_be_bytes());
        put(16, &(text(below).len() as u32).to_be_bytes());
        put(104, b"\xe2\x79\x2a\xca\0\0\0\x05qcow2");
        put(512, text(below).as_bytes());
    }
    put(20, &16u32.to_be_bytes());
    put(24, &(8u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    put(2 * CLUSTER, &[0, 1, 0, 1, 0, 1, 0, 1]);
    let file = File::create_new(path).unwrap();
    use std::os::unix::fs::FileExt;
    for at in [0, CLUSTER, 2 * CLUSTER] {
        file.write_all_at(&bytes[at..at + 1536], at as u64).unwrap();
    }
    file.set_len(4 * CLUSTER as u64).unwrap();
}

#[test]
#[ignore = "slow"]
fn a_thousand_boxes_with_ten_snapshots_each_are_no_burden() {
    let home = TestHome::in_memory();
    multiply(&home, 1000, 10);
    succeed(&["qemu-img", "check", "-q", text(&home.live_disk("box00999"))]);
    // The benchmark measures what this costs.
    let mount = home.mount_with(&["-o", "compact=off"], &[]);
    mount.remove_snapshot("box00007", "s9").unwrap();
    for n in 0..10 {
        mount.snapshot(&format!("box{n:05}"), "new").unwrap();
    }
    assert_eq!(mount.names("box00000/snapshots").len(), 11);
    drop(mount);
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    assert!(
        said.contains("nothing more to free") || said.contains("freed"),
        "{said}"
    );
}
