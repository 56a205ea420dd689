//! A mount and BoxLite on one home: each works with what the other made, without conflicts. BoxLite
//! itself is the judge.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::common::*;
use serde_json::Value;

/// Returns the sorted names in the wheel's answer to a list request.
fn listed(answer: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = answer
        .as_array()
        .expect("a list")
        .iter()
        .map(|entry| entry["name"].as_str().expect("a name"))
        .collect();
    names.sort();
    names
}

fn assert_boxlite_lists(home: &TestHome, names: &[&str]) {
    assert_eq!(listed(&home.wheel(&["list"])), names);
}

/// Returns the digest of the disk in BoxLite's own export of a box.
fn digest_by_boxlite(home: &TestHome, name: &str) -> String {
    let place = tempfile::tempdir().unwrap();
    let answer = home.wheel(&["export", name, text(place.path())]);
    archive_digest(answer["path"].as_str().unwrap().as_ref())
}

// ---- BoxLite's changes --------------------------------------------------------------------------

#[test]
fn boxes_and_snapshots_that_boxlite_makes_appear_eventually() {
    let home = TestHome::new();
    let mount = home.mount();
    assert_eq!(mount.names(""), ["web"]);
    let first = digest(&home.live_disk("web"));
    home.wheel(&["snapshot-create", "web", "a"]);
    eventually("snapshot a", || mount.names("web/snapshots") == ["a"]);
    home.guest_write("web", FREE_AREA, b"second");
    let second = digest(&home.live_disk("web"));
    home.wheel(&["clone", "web", "copy"]);
    eventually("box copy", || mount.names("") == ["copy", "web"]);
    home.wheel(&["import", text(&archive()), "new"]);
    eventually("box new", || mount.names("") == ["copy", "new", "web"]);
    assert_eq!(mount.export_digest("web/export.boxlite"), second);
    assert_eq!(mount.export_digest("copy/export.boxlite"), second);
    assert_eq!(mount.export_digest("new/export.boxlite"), first);
    assert_eq!(mount.export_digest("web/snapshots/a/export.boxlite"), first);
}

#[test]
fn restores_and_removals_by_boxlite_appear_eventually() {
    let home = TestHome::new();
    let first = digest(&home.live_disk("web"));
    home.wheel_batch(&[
        &["snapshot-create", "web", "a"],
        &["snapshot-create", "web", "b"],
        &["import", text(&archive()), "other"],
    ]);
    home.guest_write("web", FREE_AREA, b"changed");
    let changed = digest(&home.live_disk("web"));
    let mount = home.mount();
    assert_eq!(mount.export_digest("web/export.boxlite"), changed);
    home.wheel(&["snapshot-restore", "web", "a"]);
    eventually("the restored disk", || {
        mount.export_digest("web/export.boxlite") == first
    });
    home.wheel(&["snapshot-remove", "web", "b"]);
    eventually("snapshot b is gone", || {
        mount.names("web/snapshots") == ["a"]
    });
    home.wheel(&["remove", "other"]);
    eventually("box other is gone", || mount.names("") == ["web"]);
    home.wheel(&["remove", "web", "--force"]);
    eventually("box web is gone", || mount.names("").is_empty());
}

#[test]
fn a_box_after_twenty_changes_by_boxlite_is_read_exported_and_cloned_right() {
    let home = TestHome::new();
    let mut states = Vec::new();
    for round in 0u8..10 {
        let offset = FREE_AREA + u64::from(round) * 0x1_0000;
        home.guest_write("web", offset, &[round + 1; 0x1_8000]);
        let state = digest(&home.live_disk("web"));
        let snapshot = format!("s{round}");
        home.wheel_batch(&[&["snapshot-create", "web", &snapshot]]);
        home.guest_write("web", offset, &[round + 101; 512]);
        let clone = format!("c{round}");
        states.push((
            snapshot,
            state,
            clone.clone(),
            digest(&home.live_disk("web")),
        ));
        home.wheel_batch(&[&["clone", "web", &clone]]);
    }
    home.guest_write("web", FREE_AREA + 7, b"the end");
    let live = digest(&home.live_disk("web"));
    assert_eq!(chain(&home.live_disk("web")).len(), 21);

    let mount = home.mount();
    assert_eq!(mount.export_digest("web/export.boxlite"), live);
    for (snapshot, state, clone, cloned) in &states {
        let path = format!("web/snapshots/{snapshot}/export.boxlite");
        assert_eq!(&mount.export_digest(&path), state, "{snapshot}");
        let path = format!("{clone}/export.boxlite");
        assert_eq!(&mount.export_digest(&path), cloned, "{clone}");
    }
    mount.copy("web", "copy");
    assert_eq!(mount.export_digest("copy/export.boxlite"), live);
    assert_eq!(digest(&home.live_disk("copy")), live);
    // libkrun starts no box with more than eight backing files.
    let layers = chain(&home.live_disk("copy"));
    assert!(layers.len() <= 9, "{layers:?}");
    mount.copy("web/snapshots/s4", "fourth");
    assert_eq!(digest(&home.live_disk("fourth")), states[4].1);
    assert_eq!(digest_by_boxlite(&home, "fourth"), states[4].1);
    for (snapshot, state, clone, cloned) in &states {
        assert_eq!(&digest(&home.snapshot_disk("copy", snapshot)), state);
        assert_eq!(&digest(&home.snapshot_disk("web", snapshot)), state);
        assert_eq!(&digest(&home.live_disk(clone)), cloned);
    }
    mount.snapshot("web", "now").unwrap();
    assert_eq!(digest(&home.live_disk("web")), live);
    assert_eq!(digest(&home.snapshot_disk("web", "now")), live);
    let layers = chain(&home.live_disk("web"));
    assert!(layers.len() <= 9, "{layers:?}");
    home.assert_whole();
}

// ---- changes through the mount ------------------------------------------------------------------

#[test]
fn boxlite_uses_what_the_mount_made_as_its_own() {
    let home = TestHome::new();
    let first = digest(&home.live_disk("web"));
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"second");
    let second = digest(&home.live_disk("web"));
    mount.copy("web", "copy");
    mount.copy("web/snapshots/a", "from-a");
    succeed(&["cp", text(&archive()), text(&mount.at("new.boxlite"))]);
    assert_eq!(mount.names(""), ["copy", "from-a", "new", "web"]);

    assert_boxlite_lists(&home, &["copy", "from-a", "new", "web"]);
    for (name, wanted) in [
        ("web", &second),
        ("copy", &second),
        ("from-a", &first),
        ("new", &first),
    ] {
        assert_eq!(&digest_by_boxlite(&home, name), wanted, "{name}");
        assert_eq!(&digest(&home.live_disk(name)), wanted, "{name}");
    }
    for name in ["web", "copy"] {
        let snapshots = home.wheel(&["snapshot-list", name]);
        assert_eq!(listed(&snapshots), ["a"], "{name}");
    }
    // Every operation BoxLite has for a box, on each of the boxes.
    for name in ["copy", "from-a", "new", "web"] {
        let before = digest(&home.live_disk(name));
        let clone = format!("{name}-clone");
        home.wheel_batch(&[
            &["snapshot-create", name, "theirs"],
            &["clone", name, &clone],
        ]);
        home.guest_write(name, FREE_AREA + 99, b"third");
        home.wheel_batch(&[&["snapshot-restore", name, "theirs"]]);
        assert_eq!(digest(&home.live_disk(name)), before, "{name}");
        assert_eq!(digest(&home.live_disk(&clone)), before, "{clone}");
    }
    for name in ["copy", "web"] {
        home.wheel_batch(&[&["snapshot-restore", name, "a"]]);
        assert_eq!(digest(&home.live_disk(name)), first, "{name}");
        home.guest_write(name, FREE_AREA + 5000, name.as_bytes());
    }
    assert_ne!(digest(&home.live_disk("copy")), first);
    assert_eq!(digest(&home.snapshot_disk("copy", "a")), first);
    assert_eq!(digest(&home.snapshot_disk("web", "a")), first);
    assert_eq!(digest(&home.live_disk("from-a-clone")), first);
    assert_eq!(digest(&home.live_disk("web-clone")), second);
    home.assert_whole();
}

#[test]
fn boxlite_removes_a_snapshot_of_ours_and_what_reads_from_its_layer_stays() {
    let home = TestHome::new();
    let first = digest(&home.live_disk("web"));
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"second");
    let second = digest(&home.live_disk("web"));
    mount.copy("web/snapshots/a", "from-a");
    home.wheel(&["snapshot-remove", "web", "a"]);
    assert!(mount.names("web/snapshots").is_empty());
    assert_eq!(digest(&home.live_disk("web")), second);
    assert_eq!(digest(&home.live_disk("from-a")), first);
    mount.snapshot("web", "a").unwrap();
    assert_eq!(digest(&home.snapshot_disk("web", "a")), second);
    assert_eq!(digest_by_boxlite(&home, "from-a"), first);
    home.assert_whole();
}

/// Makes a box and, through the mount, a clone of it. Both then get changes of their own.
fn source_and_clone() -> (TestHome, String, String) {
    let home = TestHome::new();
    home.guest_write("web", FREE_AREA, b"common");
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"middle");
    mount.copy("web", "copy");
    home.guest_write("web", FREE_AREA + 0x2_0000, b"source");
    home.guest_write("copy", FREE_AREA + 0x3_0000, b"clone");
    drop(mount);
    let (web, copy) = (
        digest(&home.live_disk("web")),
        digest(&home.live_disk("copy")),
    );
    (home, web, copy)
}

#[test]
fn the_clone_is_whole_after_boxlite_removed_the_source_by_force() {
    let (home, _, copy) = source_and_clone();
    let snapshot = digest(&home.snapshot_disk("copy", "a"));
    home.wheel(&["remove", "web", "--force"]);
    assert_boxlite_lists(&home, &["copy"]);
    assert_eq!(digest(&home.live_disk("copy")), copy);
    assert_eq!(digest_by_boxlite(&home, "copy"), copy);
    let mount = home.mount();
    assert_eq!(mount.export_digest("copy/export.boxlite"), copy);
    mount.snapshot("copy", "b").unwrap();
    assert_eq!(digest(&home.snapshot_disk("copy", "b")), copy);
    assert_eq!(digest(&home.snapshot_disk("copy", "a")), snapshot);
    home.assert_whole();
}

#[test]
fn the_source_is_whole_after_boxlite_removed_the_clone() {
    for force in [&[][..], &["--force"]] {
        let (home, web, _) = source_and_clone();
        let snapshot = digest(&home.snapshot_disk("web", "a"));
        home.wheel(&[&["remove", "copy"], force].concat());
        assert_boxlite_lists(&home, &["web"]);
        assert_eq!(digest(&home.live_disk("web")), web);
        assert_eq!(digest_by_boxlite(&home, "web"), web);
        let mount = home.mount();
        assert_eq!(mount.export_digest("web/export.boxlite"), web);
        mount.copy("web", "again");
        assert_eq!(digest(&home.live_disk("again")), web);
        assert_eq!(digest(&home.snapshot_disk("again", "a")), snapshot);
        home.assert_whole();
    }
}

#[test]
fn boxlite_removes_every_box_we_made_and_nothing_is_left() {
    let (home, _, _) = source_and_clone();
    // The order does not matter: without force, BoxLite refuses to remove a box that others depend
    // on.
    home.wheel_batch(&[
        &["remove", "web", "--force"],
        &["remove", "copy", "--force"],
        &["list"],
    ]);
    assert!(names_in(&home.root().join("boxes")).is_empty());
    let mount = home.mount();
    assert!(mount.names("").is_empty());
    // The next look frees our layers that have become unreferenced.
    assert_eq!(home.images(), Vec::<std::path::PathBuf>::new());
    home.assert_whole();
}

#[test]
fn a_clone_by_boxlite_of_a_clone_of_ours_outlives_both_ancestors() {
    let (home, _, copy) = source_and_clone();
    home.wheel_batch(&[&["clone", "copy", "third"]]);
    home.wheel_batch(&[
        &["remove", "web", "--force"],
        &["remove", "copy", "--force"],
        &["list"],
    ]);
    assert_eq!(digest(&home.live_disk("third")), copy);
    let mount = home.mount();
    assert_eq!(mount.export_digest("third/export.boxlite"), copy);
    mount.copy("third", "fourth");
    home.wheel(&["remove", "third", "--force"]);
    assert_eq!(digest(&home.live_disk("fourth")), copy);
    drop(mount);
    drop(home.mount());
    assert_eq!(digest(&home.live_disk("fourth")), copy);
    home.assert_whole();
}

#[test]
fn an_import_that_asks_to_be_removed_survives_boxlites_next_start() {
    let home = TestHome::new();
    let options = r#"{"auto_remove": true, "auto_delete": 5}"#;
    let archive = make_archive("fleeting.boxlite", &["--options", options]);
    let mount = home.mount();
    succeed(&["cp", text(&archive), text(&mount.at("kept.boxlite"))]);
    mount.copy("kept", "copy");
    let names = ["copy", "kept", "web"];
    assert_boxlite_lists(&home, &names);
    assert_boxlite_lists(&home, &names);
    assert_eq!(mount.names(""), names);
    assert_eq!(
        digest_by_boxlite(&home, "kept"),
        digest(&home.live_disk("kept"))
    );
}

#[test]
fn our_lock_numbers_leave_boxlites_alone() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.copy("web", "copy");
    succeed(&["cp", text(&archive()), text(&mount.at("new.boxlite"))]);
    let mut numbers = Vec::new();
    for name in ["copy", "new"] {
        let state = home.state(name);
        let number = state["lock_id"].as_u64().unwrap();
        assert!((1_000_000..1 << 32).contains(&number), "{name}: {number}");
        let file = home.root().join("locks").join(number.to_string());
        assert!(file.is_file(), "{}", file.display());
        numbers.push(number);
    }
    assert_ne!(numbers[0], numbers[1]);
    home.wheel_batch(&[
        &["import", text(&archive()), "theirs"],
        &["clone", "copy", "clone"],
        &["clone", "web", "clone2"],
    ]);
    home.wheel_batch(&[&["import", text(&archive()), "theirs2"], &["list"]]);
    mount.copy("clone", "ours");
    let names = [
        "clone", "clone2", "copy", "new", "ours", "theirs", "theirs2", "web",
    ];
    assert_boxlite_lists(&home, &names);
}

// ---- other users of the home --------------------------------------------------------------------

#[test]
fn a_runtime_that_holds_the_home_makes_changes_busy_and_reading_goes_on() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "a"]);
    let wanted = digest(&home.live_disk("web"));
    let mount = home.mount_with(&["-o", "exclusive"], &[]);
    let holder = home.hold();
    assert_eq!(errno(mount.snapshot("web", "b")), libc::EBUSY);
    assert_eq!(errno(mount.remove_snapshot("web", "a")), libc::EBUSY);
    let said = fail(&["cp", "-r", text(&mount.at("web")), text(&mount.at("copy"))]);
    assert!(said.contains("busy"), "{said}");
    let said = fail(&["cp", text(&archive()), text(&mount.at("new.boxlite"))]);
    assert!(said.contains("busy"), "{said}");
    assert!(mount.log().contains("runtime"), "{}", mount.log());
    assert_eq!(mount.names("web/snapshots"), ["a"]);
    assert_eq!(mount.export_digest("web/export.boxlite"), wanted);
    drop(holder);
    mount.snapshot("web", "b").unwrap();
    // The same copy succeeds once the runtime has released the home.
    mount.copy("web", "copy");
    assert_eq!(mount.names(""), ["copy", "web"]);
    assert_eq!(mount.export_digest("copy/export.boxlite"), wanted);
    assert_boxlite_lists(&home, &["copy", "web"]);
    home.assert_whole();
}

#[test]
fn a_home_that_a_runtime_holds_can_be_mounted_and_read() {
    let home = TestHome::new();
    let wanted = digest(&home.live_disk("web"));
    let holder = home.hold();
    let mount = home.mount_with(&["-o", "exclusive"], &[]);
    assert_eq!(mount.export_digest("web/export.boxlite"), wanted);
    assert_eq!(errno(mount.snapshot("web", "a")), libc::EBUSY);
    drop(holder);
    mount.snapshot("web", "a").unwrap();
}

/// A process that stands in for a box's virtual machine.
struct Shim(Child);

impl Shim {
    /// Starts a process and records it in shim.pid the way BoxLite does.
    fn of(home: &TestHome, name: &str) -> Shim {
        let child = Command::new("sleep")
            .arg("300")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        // Field 22 of proc_pid_stat(5). The first field after the command is the third.
        let started = fields.split(' ').nth(22 - 3).unwrap();
        let text = format!("{}\n{started}\n", child.id());
        fs::write(home.box_dir(name).join("shim.pid"), text).unwrap();
        Shim(child)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_box_whose_shim_lives_is_busy_whatever_its_row_says() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    for status in ["running", "stopped", "failed", "configured"] {
        home.database()
            .execute("UPDATE box_state SET status = ?1, pid = NULL", [status])
            .unwrap();
        let shim = Shim::of(&home, "web");
        let before = home.fingerprint();
        let removed = mount.remove_snapshot("web", "a");
        assert_eq!(errno(removed), libc::EBUSY, "{status}");
        // The disk of a running box can be read, from a copy.
        File::open(mount.at("web/export.boxlite")).unwrap();
        // The log grows, and a size may be noted; nothing else may change.
        let of_boxlite = |print: String| {
            let is_ours =
                |line: &&str| line.contains("/.boxlitefs/") || line.contains("/boxlitefs.db");
            let lines = print.lines().filter(|line| !is_ours(line));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(of_boxlite(home.fingerprint()), of_boxlite(before));
        // A snapshot does not change while its box runs.
        let mut archive = Vec::new();
        File::open(mount.at("web/snapshots/a/export.boxlite"))
            .and_then(|mut file| file.read_to_end(&mut archive))
            .unwrap();
        assert!(!archive.is_empty());
        drop(shim);
        File::open(mount.at("web/export.boxlite")).unwrap();
    }
    home.database()
        .execute("UPDATE box_state SET status = 'stopped', pid = NULL", [])
        .unwrap();
    mount.snapshot("web", "b").unwrap();
}

#[test]
fn a_disk_that_someone_has_open_for_writing_makes_its_box_busy() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let writer = OpenOptions::new()
        .read(true)
        .write(true)
        .open(home.live_disk("web"))
        .unwrap();
    assert_eq!(errno(mount.snapshot("web", "b")), libc::EBUSY);
    let said = fail(&["cp", "-r", text(&mount.at("web")), text(&mount.at("copy"))]);
    assert!(said.contains("busy"), "{said}");
    let export = File::open(mount.at("web/export.boxlite"));
    assert_eq!(errno(export), libc::EBUSY);
    drop(writer);
    mount.snapshot("web", "b").unwrap();
    // Opening the disk read-only does not make the box busy.
    let _reader = File::open(home.live_disk("web")).unwrap();
    mount.snapshot("web", "c").unwrap();
}

#[test]
fn a_copied_home_refuses_changes_and_the_original_is_untouched() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "a"]);
    home.guest_write("web", FREE_AREA, b"second");
    let wanted = digest(&home.live_disk("web"));
    let snapshot = digest(&home.snapshot_disk("web", "a"));
    let copy = TestHome::copy_of(&home);
    let before = home.fingerprint();
    let mount = copy.mount();
    assert_eq!(mount.names(""), ["web"]);
    assert_eq!(errno(mount.snapshot("web", "b")), libc::EPERM);
    assert_eq!(errno(mount.remove_snapshot("web", "a")), libc::EPERM);
    let said = fail(&["cp", "-r", text(&mount.at("web")), text(&mount.at("web2"))]);
    assert!(said.contains("not permitted"), "{said}");
    assert!(mount.log().contains("copy"), "{}", mount.log());
    assert_eq!(names_in(&copy.root().join("boxes")).len(), 1);
    assert_eq!(mount.names("web/snapshots"), ["a"]);
    drop(mount);
    assert_eq!(home.fingerprint(), before);
    assert_eq!(digest(&home.live_disk("web")), wanted);
    assert_eq!(digest(&home.snapshot_disk("web", "a")), snapshot);
    let (status, said) = copy.check();
    assert_eq!(status, 1, "{said}");
    home.assert_whole();
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "a"]);
    let before = home.fingerprint();
    let mount = home.mount_read_only();
    assert_eq!(errno(mount.snapshot("web", "b")), libc::EROFS);
    assert_eq!(errno(mount.remove_snapshot("web", "a")), libc::EROFS);
    let said = fail(&["cp", "-r", text(&mount.at("web")), text(&mount.at("web2"))]);
    assert!(said.contains("Read-only"), "{said}");
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        digest(&home.live_disk("web"))
    );
    drop(mount);
    assert_eq!(home.fingerprint(), before);
}

#[test]
fn an_unmount_ends_the_process_and_leaves_nothing_behind() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let mountpoint = mount.root().to_owned();
    mount.unmount();
    assert!(!is_mounted(&mountpoint));
    let ours = names_in(&home.root().join(".boxlitefs"));
    assert_eq!(ours, ["layers", "log", "reserve"]);
    home.assert_whole();
}

// ---- a replaced database ------------------------------------------------------------------------

/// Moves the database and SQLite's files next to it to `to`.
fn move_database(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for name in ["boxlite.db", "boxlite.db-wal", "boxlite.db-shm"] {
        let _ = fs::rename(from.join(name), to.join(name));
    }
}

#[test]
fn a_database_made_anew_under_a_mount_is_the_one_that_counts() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let wanted = digest(&home.live_disk("web"));
    let web = home.box_dir("web");
    let snapshots = File::open(mount.at("web/snapshots")).unwrap();
    let db = home.root().join("db");
    let aside = home.beside("db");
    move_database(&db, &aside);
    // BoxLite makes such a database when it starts without one. Nothing cached from the old one may
    // be used.
    let empty = TestHome::empty();
    move_database(&empty.root().join("db"), &home.beside("empty"));
    for name in names_in(&home.beside("empty")) {
        fs::copy(home.beside("empty").join(&name), db.join(&name)).unwrap();
    }
    eventually("no box is shown", || mount.names("").is_empty());
    for result in [
        mount.snapshot("web", "b"),
        mount.remove_snapshot("web", "a"),
        fs::rename(mount.at("web"), mount.at("api")),
    ] {
        assert_eq!(errno(result), libc::ENOENT);
    }
    drop(snapshots);
    assert!(web.join("disks/disk.qcow2").is_file());
    let layers = names_in(&web.join("snapshots")).into_iter();
    let mut layers = layers.map(|name| web.join("snapshots").join(name).join("disk.qcow2"));
    assert!(layers.any(|layer| layer.is_file()));
    // A box made now belongs to the new database.
    succeed(&["cp", text(&archive()), text(&mount.at("new.boxlite"))]);
    assert_eq!(mount.names(""), ["new"]);
    assert_boxlite_lists_one(&home, "new");
    // BoxLite's start removed every disk without a row: only the new box's disk is left.
    move_database(&db, &home.beside("second"));
    move_database(&aside, &db);
    eventually("web is shown again", || mount.names("") == ["web"]);
    assert_ne!(wanted, "");
}

fn assert_boxlite_lists_one(home: &TestHome, name: &str) {
    let rows: String = home
        .database()
        .query_row("SELECT group_concat(name) FROM box_config", [], |row| {
            row.get(0)
        })
        .unwrap();
    assert_eq!(rows, name);
}

#[test]
fn a_database_that_is_gone_is_an_error_and_its_boxes_are_not_shown() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let wanted = digest(&home.live_disk("web"));
    let db = home.root().join("db");
    let aside = home.beside("db");
    move_database(&db, &aside);
    eventually("an error", || fs::read_dir(mount.root()).is_err());
    assert_eq!(errno(fs::read_dir(mount.root()).map(drop)), libc::EIO);
    assert!(mount.snapshot("web", "b").is_err());
    assert!(mount.remove_snapshot("web", "a").is_err());
    assert!(File::open(mount.at("web/export.boxlite")).is_err());
    assert!(
        !run(&["cp", text(&archive()), text(&mount.at("new.boxlite"))])
            .status
            .success()
    );
    // The mount created neither a new database nor anything of a new box.
    assert!(!db.join("boxlite.db").exists());
    assert_eq!(names_in(&home.root().join("boxes")).len(), 1);
    // Moving the database back restores everything.
    move_database(&aside, &db);
    eventually("web is shown again", || {
        fs::read_dir(mount.root()).is_ok() && mount.names("") == ["web"]
    });
    assert_eq!(mount.export_digest("web/export.boxlite"), wanted);
    mount.snapshot("web", "b").unwrap();
    assert_eq!(mount.names("web/snapshots"), ["a", "b"]);
    home.assert_whole();
}

// ---- a box that starts while it is copied -------------------------------------------------------

#[test]
fn a_box_that_begins_to_run_while_its_export_is_read_is_noticed() {
    let home = TestHome::new();
    let mount = home.mount();
    let mut reader = File::open(mount.at("web/export.boxlite")).unwrap();
    let mut start = vec![0; 4096];
    reader.read_exact(&mut start).unwrap();
    let shim = Shim::of(&home, "web");
    home.guest_write("web", FREE_AREA, &[7; 4096]);
    let mut rest = Vec::new();
    let error = reader.read_to_end(&mut rest).expect_err("the disk changed");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    drop(reader);
    drop(shim);
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        digest(&home.live_disk("web"))
    );
}

#[test]
fn a_box_that_begins_to_run_before_a_copy_is_done_is_neither_restored_nor_cloned() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"second");
    let wanted = digest(&home.live_disk("web"));
    let whole = fs::read(archive()).unwrap();
    let (first, last) = whole.split_at(whole.len() / 2);
    // Writes half of an archive over the box's disk; then the box starts.
    let mut over = OpenOptions::new()
        .write(true)
        .open(mount.at("web/export.boxlite"))
        .unwrap();
    over.write_all(first).unwrap();
    let shim = Shim::of(&home, "web");
    let ended = over.write_all(last).and_then(|()| {
        // Closes with close(2), because std does not report its result.
        let duplicate = over.try_clone()?;
        // SAFETY: `into_raw_fd` gives up the duplicate, so nothing else closes its descriptor.
        match unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(duplicate)) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    });
    assert_eq!(errno(ended), libc::EBUSY);
    drop(over);
    assert_eq!(digest(&home.live_disk("web")), wanted);
    drop(shim);
    // Clones what was read before the box ran. No program may be started between copy and close:
    // spawning closes the descriptors that the child does not inherit, and the first close
    // completes the copy.
    let shim = Shim::of(&home, "web");
    let named = home.box_dir("web").join("shim.pid");
    let aside = home.beside("shim.pid");
    fs::rename(&named, &aside).unwrap();
    let source = File::open(mount.at("web/export.boxlite")).unwrap();
    let target = File::create(mount.at("copy.boxlite")).unwrap();
    let length = usize::try_from(source.metadata().unwrap().len()).unwrap();
    // SAFETY: both descriptors are open, and the offsets are null.
    let copied = unsafe {
        libc::copy_file_range(
            std::os::fd::AsRawFd::as_raw_fd(&source),
            std::ptr::null_mut(),
            std::os::fd::AsRawFd::as_raw_fd(&target),
            std::ptr::null_mut(),
            length,
            0,
        )
    };
    assert_eq!(usize::try_from(copied), Ok(length));
    fs::rename(&aside, &named).unwrap();
    // SAFETY: `into_raw_fd` gives up the file, so nothing else closes its descriptor.
    let closed = unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(target)) };
    let error = std::io::Error::last_os_error().raw_os_error();
    assert_eq!(closed, -1, "{}", mount.log());
    assert_eq!(error, Some(libc::EBUSY));
    drop(source);
    drop(shim);
    // The kernel releases a file some time after close returns.
    eventually("the refused copy is gone", || mount.names("") == ["web"]);
    assert_eq!(digest(&home.live_disk("web")), wanted);
    home.assert_whole();
}

// ---- the network policy -------------------------------------------------------------------------

#[test]
fn a_network_policy_narrowed_at_run_time_comes_with_exports_and_clones() {
    let home = TestHome::new();
    let mount = home.mount();
    let export = mount.at("web/export.boxlite");
    let network_in = |archive: &Path| {
        let manifest = succeed(&["tar", "-xOf", text(archive), "manifest.json"]);
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        manifest["box_options"]["network"].clone()
    };
    let wide = network_in(&export);
    for (policy, network) in [
        (
            r#"{"mode": "enabled", "allow_net": ["example.com", "10.0.0.0/8"]}"#,
            serde_json::json!({"Enabled": {"allow_net": ["example.com", "10.0.0.0/8"]}}),
        ),
        (r#"{"mode": "disabled"}"#, serde_json::json!("Disabled")),
    ] {
        let set = "UPDATE box_state SET json = json_set(json, '$.outbound_policy', json(?1))";
        home.database().execute(set, [policy]).unwrap();
        eventually("the export has the policy", || {
            network_in(&export) == network
        });
        mount.copy("web", "copy");
        let config: String = home
            .database()
            .query_row(
                "SELECT json FROM box_config WHERE name = 'copy'",
                [],
                |row| row.get(0),
            )
            .unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["options"]["network"], network);
        let kept = "SELECT count(*) FROM box_state JOIN box_config USING (id)
                    WHERE name = 'copy' AND json_extract(box_state.json, '$.outbound_policy') NOT NULL";
        let kept: u32 = home
            .database()
            .query_row(kept, [], |row| row.get(0))
            .unwrap();
        assert_eq!(kept, 0, "the clone's configuration has the policy");
        succeed(&["rm", "-r", text(&mount.at("copy"))]);
    }
    // One that BoxLite could not read is not dropped: the box would get its wide network back.
    let damage =
        "UPDATE box_state SET json = json_set(json, '$.outbound_policy', json('{\"mode\": 7}'))";
    home.database().execute(damage, []).unwrap();
    eventually("the export is refused", || fs::read(&export).is_err());
    let mend = "UPDATE box_state SET json = json_remove(json, '$.outbound_policy')";
    home.database().execute(mend, []).unwrap();
    eventually("the export has its configuration's network", || {
        fs::metadata(&export).is_ok() && network_in(&export) == wide
    });
    mount.unmount();
    home.assert_whole();
}

/// Makes one of each change, and asserts that all are as they should be.
fn assert_changes_work(home: &TestHome) {
    let mount = home.mount();
    let live = digest(&home.live_disk("web"));
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"changed");
    mount.copy("web", "copy");
    let archive = text(&archive()).to_owned();
    succeed(&["cp", &archive, text(&mount.at("new.boxlite"))]);
    let from = mount.at("web/snapshots/a/export.boxlite");
    succeed(&["cp", text(&from), text(&mount.at("copy/export.boxlite"))]);
    assert_eq!(digest(&home.live_disk("copy")), live, "{}", mount.log());
    let snapshots = mount.at("web/snapshots");
    std::fs::rename(snapshots.join("a"), snapshots.join("b")).unwrap();
    std::fs::rename(mount.at("copy"), mount.at("kept")).unwrap();
    mount.remove_snapshot("web", "b").unwrap();
    succeed(&["rm", "-r", text(&mount.at("new"))]);
    assert_eq!(mount.names(""), ["kept", "web"]);
    mount.unmount();
}

#[test]
fn homes_with_columns_and_tables_of_other_builds_are_changed_and_keep_their_keys() {
    let home = TestHome::new();
    let rows = |statements: &str| home.database().execute_batch(statements).unwrap();
    // One build writes schema 10 with a digest for each base.
    rows("ALTER TABLE base_disk ADD COLUMN digest TEXT");
    assert_changes_work(&home);
    home.assert_whole();
    home.wheel(&["snapshot-create", "kept", "by-boxlite"]);
    // Unreleased builds write 11, with a key for each box.
    let id = home.id("web");
    rows(&format!(
        "UPDATE schema_version SET version = 11;
         CREATE TABLE ssh_config (
             box_id TEXT PRIMARY KEY REFERENCES box_config(id) ON DELETE CASCADE, json TEXT);
         INSERT INTO ssh_config VALUES ('{id}', '{{\"private_key\": \"tell-nobody\"}}');"
    ));
    let mount = home.mount();
    succeed(&["rm", "-r", text(&mount.at("kept"))]);
    mount.unmount();
    assert_changes_work(&home);
    let mount = home.mount();
    for name in ["web", "kept"] {
        for file in ["box.json", "export.boxlite"] {
            let bytes = std::fs::read(mount.at(name).join(file)).unwrap();
            let key = b"tell-nobody";
            assert!(
                !bytes.windows(key.len()).any(|it| it == key),
                "{name}/{file}"
            );
        }
    }
    let keys = |of: &str| -> i64 {
        let count = format!("SELECT count(*) FROM ssh_config WHERE box_id {of}");
        home.database()
            .query_row(&count, [], |row| row.get(0))
            .unwrap()
    };
    assert_eq!((keys("NOT NULL"), keys(&format!("= '{id}'"))), (1, 1));
    assert_eq!(home.check().0, 0, "{}", home.check().1);
    // A key goes with its box.
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    assert_eq!(keys("NOT NULL"), 0);
    mount.unmount();
    // The judge knows schema 10.
    rows("UPDATE schema_version SET version = 10");
    home.assert_whole();
    home.wheel(&["snapshot-create", "kept", "after"]);
}
