//! `.boxlite/undo`: what was removed or restored over can be had back.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use serde_json::Value;

use crate::common::*;

/// Returns the only entry of a mount, by its name.
fn only_entry(mount: &Mounted) -> String {
    let names = mount.names(".boxlite/undo");
    assert_eq!(names.len(), 1, "{names:?}");
    names.into_iter().next().unwrap()
}

/// Returns a path in the only entry.
fn in_entry(mount: &Mounted, path: &str) -> PathBuf {
    mount.at(".boxlite/undo").join(only_entry(mount)).join(path)
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn remove(mount: &Mounted, path: &str) {
    succeed(&["rm", "-r", text(&mount.at(path))]);
}

fn move_to(mount: &Mounted, from: PathBuf, to: &str) {
    succeed(&["mv", "-T", text(&from), text(&mount.at(to))]);
}

/// A home whose box `web` has a snapshot `s` with `then`, and a disk with `now`.
fn with_snapshot() -> (TestHome, Mounted) {
    let home = TestHome::new().keep();
    let mount = home.mount();
    home.guest_write("web", FREE_AREA, b"then");
    mount.snapshot("web", "s").unwrap();
    home.guest_write("web", FREE_AREA, b"now");
    (home, mount)
}

// ---- removed boxes --------------------------------------------------------------------------------

#[test]
fn a_removed_box_comes_back_as_it_was() {
    let (home, mount) = with_snapshot();
    let (id, live) = (home.id("web"), digest(&home.live_disk("web")));
    let snapshot = digest(&home.snapshot_disk("web", "s"));
    let before = json(mount.at("web/box.json"));
    let of_snapshot = json(mount.at("web/snapshots/s/snapshot.json"));
    let inode = fs::metadata(home.live_disk("web")).unwrap().ino();
    remove(&mount, "web");
    assert_eq!(mount.names("."), [""; 0]);
    let entry = only_entry(&mount);
    assert!(entry.ends_with("Z-web"), "{entry}");

    move_to(&mount, mount.at(".boxlite/undo").join(entry), "web");

    assert_eq!(mount.names("."), ["web"]);
    assert_eq!(mount.names(".boxlite/undo"), [""; 0]);
    assert_eq!(home.id("web"), id);
    assert_eq!(digest(&home.live_disk("web")), live);
    assert_eq!(digest(&home.snapshot_disk("web", "s")), snapshot);
    let after = json(mount.at("web/box.json"));
    assert_eq!(after["options"], before["options"]);
    assert_eq!(after["created_at"], before["created_at"]);
    let again = json(mount.at("web/snapshots/s/snapshot.json"));
    assert_eq!(again["id"], of_snapshot["id"]);
    assert_eq!(again["created_at"], of_snapshot["created_at"]);
    // The disk itself, and no layer more.
    assert_eq!(fs::metadata(home.live_disk("web")).unwrap().ino(), inode);
    assert_eq!(fs::metadata(home.live_disk("web")).unwrap().nlink(), 1);
    // BoxLite works with it.
    home.wheel(&["snapshot-restore", "web", "s"]);
    assert_eq!(digest(&home.live_disk("web")), snapshot);
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn a_removed_box_comes_back_under_another_name_and_not_over_another_box() {
    let (home, mount) = with_snapshot();
    mount.copy("web", "other");
    remove(&mount, "web");
    let entry = in_entry(&mount, "");
    let said = fail(&["mv", "-T", text(&entry), text(&mount.at("other"))]);
    assert!(
        said.contains("not empty") || said.contains("exists"),
        "{said}"
    );
    move_to(&mount, entry, "a%2Fb");
    assert_eq!(mount.names("."), ["a%2Fb", "other"]);
    home.assert_whole();
    // A box of the same name that was made meanwhile keeps the name.
    remove(&mount, "a%2Fb");
    assert!(only_entry(&mount).ends_with("Z-a%2Fb"));
    succeed(&["cp", "-r", text(&mount.at("other")), text(&mount.at("web"))]);
    let entry = in_entry(&mount, "");
    fail(&["mv", "-T", text(&entry), text(&mount.at("web"))]);
    move_to(&mount, entry, "third");
    assert_eq!(mount.names("."), ["other", "third", "web"]);
    home.assert_whole();
}

#[test]
fn a_box_that_comes_back_is_seen_though_a_file_of_it_was_open_all_the_time() {
    let (home, mount) = with_snapshot();
    let open = fs::File::open(mount.at("web/export.boxlite")).unwrap();
    let now = digest(&home.live_disk("web"));
    for name in ["web", "api", "web"] {
        remove(&mount, &mount.names(".")[0]);
        move_to(&mount, in_entry(&mount, ""), name);
        assert_eq!(mount.export_digest(&format!("{name}/export.boxlite")), now);
        assert_eq!(mount.names(format!("{name}/snapshots")), ["s"]);
        let of_snapshot = format!("{name}/snapshots/s/export.boxlite");
        assert!(fs::metadata(mount.at(of_snapshot)).is_ok());
    }
    drop(open);
    home.assert_whole();
}

#[test]
fn what_was_removed_is_cloned_and_looked_into_and_stays() {
    let (home, mount) = with_snapshot();
    let live = digest(&home.live_disk("web"));
    let snapshot = digest(&home.snapshot_disk("web", "s"));
    let tree = names_in(&mount.at("web/rootfs/"));
    remove(&mount, "web");
    let entry = only_entry(&mount);
    assert_eq!(
        mount.names(format!(".boxlite/undo/{entry}")),
        [
            "box.json",
            "disk.img",
            "export.boxlite",
            "export.boxlite.zst",
            "rootfs",
            "snapshots",
            "why.json"
        ]
    );
    assert_eq!(names_in(&in_entry(&mount, "rootfs/")), tree);
    assert_eq!(names_in(&in_entry(&mount, "snapshots/s/rootfs/")), tree);
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), live);
    let why = json(in_entry(&mount, "why.json"));
    assert_eq!(why["action"], "box-removed");
    assert_eq!(why["box"], "web");
    mount.copy(&format!(".boxlite/undo/{entry}"), "new");
    assert_eq!(digest(&home.live_disk("new")), live);
    assert_eq!(digest(&home.snapshot_disk("new", "s")), snapshot);
    assert_eq!(only_entry(&mount), entry);
    // Others read its disk by now: it comes back on top of that.
    move_to(&mount, in_entry(&mount, ""), "web");
    assert_eq!(digest(&home.live_disk("web")), live);
    home.guest_write("web", FREE_AREA, b"later");
    assert_eq!(digest(&home.live_disk("new")), live);
    home.assert_whole();
}

#[test]
fn an_entry_shows_no_secret_and_only_the_owner_can_read_it_on_disk() {
    let home = TestHome::new().keep();
    let secret = r#"[{"name":"k","hosts":[],"placeholder":"p","value":"s3cret"}]"#;
    home.database()
        .execute(
            "UPDATE box_config SET json = json_set(json, '$.options.secrets', json(?1))",
            [secret],
        )
        .unwrap();
    let mount = home.mount();
    remove(&mount, "web");
    for file in ["box.json", "why.json"] {
        let said = fs::read_to_string(in_entry(&mount, file)).unwrap();
        assert!(!said.contains("s3cret"), "{said}");
    }
    let undo = home.root().join(".boxlitefs/undo");
    let dir = undo.join(&names_in(&undo)[0]);
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.clone()), 0o700);
    assert_eq!(mode(dir.join("why.json")), 0o600);
    move_to(&mount, in_entry(&mount, ""), "web");
    let config: String = home
        .database()
        .query_row("SELECT json FROM box_config", [], |row| row.get(0))
        .unwrap();
    assert!(config.contains("s3cret"));
}

#[test]
fn a_removed_clone_of_boxlites_is_kept_though_boxlite_removes_its_source() {
    let home = TestHome::new().keep();
    home.guest_write("web", FREE_AREA, b"shared");
    home.wheel(&["clone", "web", "web2"]);
    home.guest_write("web2", FREE_AREA + 0x10000, b"own");
    let state = digest(&home.live_disk("web2"));
    let mount = home.mount();
    remove(&mount, "web2");
    home.wheel(&["remove", "web"]);
    home.wheel(&["list"]);
    move_to(&mount, in_entry(&mount, ""), "web2");
    assert_eq!(digest(&home.live_disk("web2")), state);
    drop(mount);
    home.assert_whole_once_mounted();
}

// ---- snapshots ------------------------------------------------------------------------------------

#[test]
fn a_removed_snapshot_comes_back_with_its_time() {
    let (home, mount) = with_snapshot();
    let state = digest(&home.snapshot_disk("web", "s"));
    let before = json(mount.at("web/snapshots/s/snapshot.json"));
    mount.remove_snapshot("web", "s").unwrap();
    let entry = only_entry(&mount);
    assert!(entry.ends_with("Z-web-s"), "{entry}");
    assert_eq!(json(in_entry(&mount, "why.json"))["snapshot"], "s");
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), state);
    // It is no box.
    let said = fail(&[
        "mv",
        "-T",
        text(&in_entry(&mount, "")),
        text(&mount.at("new")),
    ]);
    assert!(said.contains("Operation not permitted"), "{said}");

    move_to(&mount, in_entry(&mount, ""), "web/snapshots/again");

    assert_eq!(mount.names("web/snapshots"), ["again"]);
    assert_eq!(digest(&home.snapshot_disk("web", "again")), state);
    let after = json(mount.at("web/snapshots/again/snapshot.json"));
    assert_eq!(after["created_at"], before["created_at"]);
    assert_eq!(mount.names(".boxlite/undo"), [""; 0]);
    home.wheel(&["snapshot-restore", "web", "again"]);
    assert_eq!(digest(&home.live_disk("web")), state);
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn a_snapshot_whose_layer_was_only_in_its_box_is_kept() {
    let home = TestHome::new().keep();
    home.guest_write("web", FREE_AREA, b"then");
    home.wheel_batch(&[
        &["snapshot-create", "web", "a"],
        &["snapshot-create", "web", "s"],
        &["snapshot-restore", "web", "a"],
    ]);
    let mount = home.mount();
    let state = digest(&home.snapshot_disk("web", "s"));
    mount.remove_snapshot("web", "s").unwrap();
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), state);
    drop(mount);
    let mount = home.mount();
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), state);
    home.assert_whole();
}

// ---- restores -------------------------------------------------------------------------------------

#[test]
fn a_restore_is_undone_by_restoring_what_it_replaced() {
    let (home, mount) = with_snapshot();
    let now = digest(&home.live_disk("web"));
    let export = mount.at("web/export.boxlite");
    succeed(&[
        "cp",
        text(&mount.at("web/snapshots/s/export.boxlite")),
        text(&export),
    ]);
    assert_eq!(
        json(in_entry(&mount, "why.json"))["action"],
        "disk-replaced"
    );
    assert_ne!(digest(&home.live_disk("web")), now);
    succeed(&[
        "cp",
        text(&in_entry(&mount, "export.boxlite")),
        text(&export),
    ]);
    assert_eq!(digest(&home.live_disk("web")), now);
    // What that replaced is the snapshot's state, which is still there.
    let entry = in_entry(&mount, "");
    move_to(&mount, entry, "web/snapshots/before");
    assert_eq!(digest(&home.snapshot_disk("web", "before")), now);
    home.assert_whole();
}

#[test]
fn a_disk_without_data_of_its_own_comes_back_as_a_snapshot_and_leaves_nothing() {
    let (home, mount) = with_snapshot();
    let (export, of_snapshot) = ("web/export.boxlite", "web/snapshots/s/export.boxlite");
    succeed(&["cp", text(&mount.at(of_snapshot)), text(&mount.at(export))]);
    let state = digest(&home.live_disk("web"));
    mount.remove_snapshot("web", "s").unwrap();
    for entry in mount.names(".boxlite/undo") {
        remove(&mount, &format!(".boxlite/undo/{entry}"));
    }
    succeed(&["cp", text(&archive()), text(&mount.at(export))]);
    move_to(&mount, in_entry(&mount, ""), "web/snapshots/t");
    assert_eq!(digest(&home.snapshot_disk("web", "t")), state);
    drop(mount);
    home.assert_whole();
}

#[test]
fn an_archive_restored_over_a_disk_leaves_that_and_an_unchanged_disk_leaves_nothing() {
    let (home, mount) = with_snapshot();
    let now = digest(&home.live_disk("web"));
    let export = mount.at("web/export.boxlite");
    succeed(&["cp", text(&archive()), text(&export)]);
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), now);
    remove(&mount, &format!(".boxlite/undo/{}", only_entry(&mount)));
    assert_eq!(mount.names(".boxlite/undo"), [""; 0]);
    mount.snapshot("web", "t").unwrap();
    succeed(&[
        "cp",
        text(&mount.at("web/snapshots/s/export.boxlite")),
        text(&export),
    ]);
    assert_eq!(mount.names(".boxlite/undo"), [""; 0]);
    home.assert_whole();
}

// ---- until when -----------------------------------------------------------------------------------

#[test]
fn dropping_an_entry_frees_its_space() {
    let home = TestHome::new().keep();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    let before = home.kept();
    home.guest_write("web", FREE_AREA, &[7; 1 << 20]);
    succeed(&[
        "cp",
        text(&mount.at("web/snapshots/s/export.boxlite")),
        text(&mount.at("web/export.boxlite")),
    ]);
    let with_entry = home.allocated();
    remove(&mount, &format!(".boxlite/undo/{}", only_entry(&mount)));
    assert!(home.allocated() + (1 << 20) <= with_entry);
    assert_eq!(names_in(&home.root().join(".boxlitefs/undo")), [""; 0]);
    let lines = |text: &str| text.lines().count();
    assert_eq!(lines(&home.kept()), lines(&before));
    home.assert_whole();
}

#[test]
fn entries_go_when_their_time_is_over() {
    let home = TestHome::new().keep();
    let mount = home.mount_with(&["-o", "undo=2s"], &[]);
    mount.snapshot("web", "s").unwrap();
    mount.remove_snapshot("web", "s").unwrap();
    remove(&mount, "web");
    eventually("the entries are gone", || {
        mount.names(".boxlite/undo").is_empty()
    });
    eventually("their space is free", || home.allocated() == 0);
    home.assert_whole();
}

#[test]
fn with_undo_off_nothing_is_kept() {
    let home = TestHome::new().keep();
    let mount = home.mount_with(&["-o", "undo=off"], &[]);
    mount.snapshot("web", "s").unwrap();
    mount.remove_snapshot("web", "s").unwrap();
    remove(&mount, "web");
    assert_eq!(mount.names(".boxlite/undo"), [""; 0]);
    assert_eq!(home.allocated(), 0);
}

#[test]
fn what_is_kept_can_not_be_changed() {
    let (_home, mount) = with_snapshot();
    remove(&mount, "web");
    let entry = in_entry(&mount, "");
    assert_eq!(
        errno(fs::create_dir(entry.join("snapshots/new"))),
        libc::EPERM
    );
    assert_eq!(errno(fs::write(entry.join("notes"), "x")), libc::EPERM);
    assert_eq!(
        errno(fs::write(entry.join("export.boxlite"), "x")),
        libc::EPERM
    );
    assert_eq!(
        errno(fs::remove_dir(entry.join("snapshots/s"))),
        libc::EPERM
    );
    assert_eq!(errno(fs::remove_dir(&entry)), libc::ENOTEMPTY);
    assert_eq!(
        errno(fs::create_dir(mount.at(".boxlite/undo/new"))),
        libc::EPERM
    );
    assert_eq!(
        errno(fs::rename(&entry, mount.at(".boxlite/undo/new"))),
        libc::EPERM
    );
    assert_eq!(
        errno(fs::rename(entry.join("snapshots/s"), mount.at("s"))),
        libc::EPERM
    );
    assert_eq!(mount.names(".boxlite/undo").len(), 1);
}

#[test]
fn entries_outlive_the_mount_and_a_kill() {
    let (home, mut mount) = with_snapshot();
    let live = digest(&home.live_disk("web"));
    mount.remove_snapshot("web", "s").unwrap();
    remove(&mount, "web");
    let names = mount.names(".boxlite/undo");
    succeed(&["kill", "-KILL", &mount.process().to_string()]);
    assert!(mount.has_crashed());
    drop(mount);
    let mount = home.mount();
    assert_eq!(mount.names(".boxlite/undo"), names);
    let of_box = names.iter().find(|name| name.ends_with("Z-web")).unwrap();
    let entry = mount.at(".boxlite/undo").join(of_box);
    move_to(&mount, entry, "web");
    assert_eq!(digest(&home.live_disk("web")), live);
    home.assert_whole();
}

// ---- beside others --------------------------------------------------------------------------------

#[test]
fn beside_a_runtime_all_is_kept_and_comes_back() {
    let (home, mount) = with_snapshot();
    let (now, then) = (
        digest(&home.live_disk("web")),
        digest(&home.snapshot_disk("web", "s")),
    );
    let runtime = home.hold();
    let export = mount.at("web/export.boxlite");
    let of_snapshot = mount.at("web/snapshots/s/export.boxlite");
    succeed(&["cp", text(&of_snapshot), text(&export)]);
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), now);
    move_to(&mount, in_entry(&mount, ""), "web/snapshots/now");
    mount.remove_snapshot("web", "s").unwrap();
    move_to(&mount, in_entry(&mount, ""), "web/snapshots/s");
    remove(&mount, "web");
    move_to(&mount, in_entry(&mount, ""), "back");
    drop(runtime);
    assert_eq!(digest(&home.live_disk("back")), then);
    assert_eq!(digest(&home.snapshot_disk("back", "now")), now);
    assert_eq!(digest(&home.snapshot_disk("back", "s")), then);
    home.wheel(&["snapshot-restore", "back", "now"]);
    assert_eq!(digest(&home.live_disk("back")), now);
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn a_runtime_that_starts_collects_nothing_of_what_is_kept() {
    let (home, mount) = with_snapshot();
    let (now, then) = (
        digest(&home.live_disk("web")),
        digest(&home.snapshot_disk("web", "s")),
    );
    mount.copy("web", "other");
    remove(&mount, "web");
    // It collects what it takes for orphans after 300 seconds.
    for base in names_in(&home.root().join("bases")) {
        let base = home.root().join("bases").join(base);
        succeed(&["touch", "-d", "2 days ago", text(&base)]);
    }
    home.wheel(&["remove", "other"]);
    home.wheel(&["list"]);
    home.wheel(&["list"]);
    move_to(&mount, in_entry(&mount, ""), "web");
    assert_eq!(digest(&home.live_disk("web")), now);
    assert_eq!(digest(&home.snapshot_disk("web", "s")), then);
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn an_entry_of_a_home_that_was_moved_is_read_and_comes_back() {
    let (home, mount) = with_snapshot();
    let now = digest(&home.live_disk("web"));
    remove(&mount, "web");
    mount.unmount();
    let moved = home.beside("moved");
    fs::rename(home.root(), &moved).unwrap();
    std::os::unix::fs::symlink(&moved, home.root()).unwrap();
    let mount = home.mount();
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), now);
    move_to(&mount, in_entry(&mount, ""), "web");
    assert_eq!(digest(&home.live_disk("web")), now);
    home.wheel(&["list"]);
    assert_eq!(digest(&home.live_disk("web")), now);
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn a_copy_of_a_home_shows_its_entries_and_brings_none_back() {
    let (home, mount) = with_snapshot();
    let now = digest(&home.live_disk("web"));
    mount.copy("web", "other");
    remove(&mount, "web");
    mount.unmount();
    let copy = TestHome::copy_of(&home).keep();
    let mount = copy.mount();
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), now);
    let entry = in_entry(&mount, "");
    assert_eq!(errno(fs::rename(&entry, mount.at("web"))), libc::EPERM);
    assert_eq!(mount.names("."), ["other"]);
    drop(mount);
    let mount = home.mount();
    move_to(&mount, in_entry(&mount, ""), "web");
    assert_eq!(digest(&home.live_disk("web")), now);
}

#[test]
fn a_read_only_mount_shows_entries_and_keeps_them() {
    let (home, mount) = with_snapshot();
    let now = digest(&home.live_disk("web"));
    remove(&mount, "web");
    mount.unmount();
    let mount = home.mount_with(&["-o", "ro,undo=1s"], &[]);
    assert_eq!(archive_digest(&in_entry(&mount, "export.boxlite")), now);
    let entry = in_entry(&mount, "");
    assert_eq!(errno(fs::rename(&entry, mount.at("web"))), libc::EROFS);
    fail(&["rm", "-r", text(&entry)]);
    assert_eq!(mount.names(".boxlite/undo").len(), 1);
}

// ---- layers ---------------------------------------------------------------------------------------

#[test]
fn chains_of_a_box_that_is_restored_to_and_fro_stay_short() {
    let (home, mount) = with_snapshot();
    let export = mount.at("web/export.boxlite");
    let of_snapshot = mount.at("web/snapshots/s/export.boxlite");
    for number in 0..12u8 {
        home.guest_write(
            "web",
            FREE_AREA + 512 * u64::from(number),
            &[number + 1; 512],
        );
        let state = digest(&home.live_disk("web"));
        let before = mount.names(".boxlite/undo");
        succeed(&["cp", text(&of_snapshot), text(&export)]);
        let mut new = mount.names(".boxlite/undo");
        new.retain(|name| !before.contains(name));
        assert_eq!(new.len(), 1, "{new:?}");
        let entry = mount
            .at(".boxlite/undo")
            .join(&new[0])
            .join("export.boxlite");
        succeed(&["cp", text(&entry), text(&export)]);
        assert_eq!(digest(&home.live_disk("web")), state);
        assert!(chain(&home.live_disk("web")).len() <= 9);
    }
    home.assert_whole();
}

#[test]
fn compacting_leaves_what_is_kept_as_it_is() {
    let (home, mount) = with_snapshot();
    let export = mount.at("web/export.boxlite");
    for round in ["one", "two", "three"] {
        mount.snapshot("web", round).unwrap();
        home.guest_write("web", FREE_AREA, round.as_bytes());
    }
    let now = digest(&home.live_disk("web"));
    succeed(&[
        "cp",
        text(&mount.at("web/snapshots/s/export.boxlite")),
        text(&export),
    ]);
    for name in ["one", "two", "three"] {
        mount.remove_snapshot("web", name).unwrap();
    }
    let kept: Vec<(String, String)> = mount
        .names(".boxlite/undo")
        .into_iter()
        .map(|name| {
            let export = mount.at(".boxlite/undo").join(&name).join("export.boxlite");
            (name, archive_digest(&export))
        })
        .collect();
    assert_eq!(kept.len(), 4);
    assert!(kept.iter().any(|(_, state)| *state == now));
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    for (name, state) in &kept {
        let export = mount.at(".boxlite/undo").join(name).join("export.boxlite");
        assert_eq!(archive_digest(&export), *state, "{name}");
    }
    home.assert_whole();
}

// ---- what shows of it -----------------------------------------------------------------------------

#[test]
fn the_command_and_the_status_show_what_is_kept_and_its_space() {
    let home = TestHome::new().keep();
    let mount = home.mount();
    let undo = [binary(), "undo", text(mount.root())];
    assert!(succeed(&undo).contains("nothing can be had back"));
    mount.snapshot("web", "s").unwrap();
    home.guest_write("web", FREE_AREA - (2 << 20), &noise(1, 3 << 20));
    succeed(&[
        "cp",
        text(&mount.at("web/snapshots/s/export.boxlite")),
        text(&mount.at("web/export.boxlite")),
    ]);
    let said = succeed(&undo);
    assert!(said.contains(&only_entry(&mount)), "{said}");
    assert!(
        said.contains("restore of box web from snapshot s"),
        "{said}"
    );
    let status = json(mount.at(".boxlite/status"));
    assert_eq!(status["undo"]["entries"], 1);
    let bytes = status["undo"]["bytes"].as_u64().unwrap();
    assert!((3 << 20..4 << 20).contains(&bytes), "{bytes}");
    let of_entry = json(in_entry(&mount, "box.json"));
    assert_eq!(of_entry["space"]["own_bytes"].as_u64(), Some(bytes));
    assert!(fail(&[binary(), "undo", "/"]).contains("not mounted"));
}

#[test]
fn check_finds_what_is_wrong_with_an_entry() {
    let (home, mount) = with_snapshot();
    remove(&mount, "web");
    mount.unmount();
    home.assert_whole();
    let undo = home.root().join(".boxlitefs/undo");
    let dir = undo.join(&names_in(&undo)[0]);
    let why = fs::read(dir.join("why.json")).unwrap();
    fs::write(dir.join("why.json"), "{").unwrap();
    let (status, said) = home.check();
    assert!(status == 1 && said.contains("damaged"), "{said}");
    fs::write(dir.join("why.json"), why).unwrap();
    home.assert_whole();
    fs::create_dir(undo.join("undo-left")).unwrap();
    let (status, said) = home.check();
    assert!(
        status == 1 && said.contains("left of what was kept"),
        "{said}"
    );
    drop(home.mount());
    home.assert_whole();
    assert_eq!(names_in(&undo).len(), 1);
    let purge = [binary(), "compact", "--purge-undo", text(home.root())];
    succeed(&purge);
    assert_eq!(names_in(&undo), [""; 0]);
    assert_eq!(home.allocated(), 0);
    home.assert_whole();
}
