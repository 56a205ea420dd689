//! `boxlitefs check` finds and names every kind of damage and leftover, and changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::*;

/// Makes a home with a box, two snapshots (one by BoxLite, one by the mount) and a clone.
fn home() -> TestHome {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "theirs"]);
    home.guest_write("web", FREE_AREA, b"second");
    let mount = home.mount();
    mount.snapshot("web", "ours").unwrap();
    home.guest_write("web", FREE_AREA, b"third");
    mount.copy("web", "copy");
    drop(mount);
    home
}

/// Asserts that check exits with status 1, that one line of its findings contains all of these
/// words, and that checking did not change the home.
fn assert_finds(home: &TestHome, words: &[&str]) {
    let before = home.fingerprint();
    let (status, said) = home.check();
    assert_eq!(status, 1, "{said}");
    let named = |line: &str| words.iter().all(|word| line.contains(word));
    assert!(said.lines().any(named), "no {words:?} in:\n{said}");
    assert!(said.contains("finding"), "no summary in:\n{said}");
    assert_eq!(home.fingerprint(), before, "check changed the home");
}

fn change_rows(home: &TestHome, statement: &str) {
    home.database().execute(statement, []).unwrap();
}

fn overwrite(path: &Path, offset: usize, bytes: &[u8]) {
    let mut contents = fs::read(path).unwrap();
    contents[offset..offset + bytes.len()].copy_from_slice(bytes);
    fs::write(path, contents).unwrap();
}

#[test]
fn a_home_that_boxlite_and_a_mount_used_is_clean() {
    let home = home();
    let before = home.fingerprint();
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("2 boxes, clean"), "{said}");
    assert_eq!(home.fingerprint(), before);
    // It is also clean while mounted and in use.
    let mount = home.mount();
    mount.copy("copy", "copy2");
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}");
}

#[test]
fn a_home_in_use_by_boxlite_can_be_checked() {
    let home = home();
    let _holder = home.hold();
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}");
}

// ---- homes that cannot be checked ---------------------------------------------------------------

fn assert_cannot_check(root: &Path, words: &str) {
    let output = run(&[binary(), "check", text(root)]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains(words), "{said}");
}

#[test]
fn what_is_no_home_cannot_be_checked() {
    let place = tempfile::tempdir().unwrap();
    assert_cannot_check(place.path(), "is not a BoxLite home");
    assert_cannot_check(&place.path().join("none"), "there is no BoxLite home");
    let file = place.path().join("file");
    fs::write(&file, "").unwrap();
    assert_cannot_check(&file, "not a directory");
}

#[test]
fn a_damaged_database_cannot_be_checked() {
    let home = home();
    home.database()
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    let database = home.root().join("db/boxlite.db");
    overwrite(&database, 0, &[0x5a; 100]);
    assert_cannot_check(home.root(), "damaged");
    fs::write(&database, "").unwrap();
    let (status, said) = home.check();
    assert_eq!(status, 2, "{said}");
}

// ---- rows ---------------------------------------------------------------------------------------

#[test]
fn a_database_older_than_ours_is_found() {
    let home = home();
    change_rows(&home, "UPDATE schema_version SET version = 6");
    assert_finds(&home, &["schema 6", "older"]);
}

#[test]
fn a_database_that_lacks_a_table_is_found() {
    let home = home();
    change_rows(&home, "DROP TABLE base_disk_ref");
    assert_finds(&home, &["no base_disk_ref"]);
}

#[test]
fn rows_that_are_no_json_are_found() {
    let home = home();
    let row = format!("WHERE id = '{}'", home.id("copy"));
    change_rows(
        &home,
        &format!("UPDATE box_config SET json = '{{broken' {row}"),
    );
    assert_finds(&home, &["configuration", &home.id("copy"), "JSON"]);
    change_rows(
        &home,
        &format!("UPDATE box_state SET json = '{{broken' {row}"),
    );
    assert_finds(&home, &["state", &home.id("copy"), "JSON"]);
}

#[test]
fn a_copied_home_is_found() {
    let home = home();
    let copy = TestHome::copy_of(&home);
    assert_finds(&copy, &["box web", "is a copy"]);
}

#[test]
fn a_base_row_without_a_file_is_found() {
    let home = home();
    change_rows(
        &home,
        "INSERT INTO base_disk (id, source_box_id, kind, base_path, created_at, json)
         VALUES ('Gone0000', 'x', 'clone_base', '/nowhere/Gone0000.qcow2', 0, '{}')",
    );
    assert_finds(&home, &["Gone0000", "has no file", "nothing reads from it"]);
}

// ---- files --------------------------------------------------------------------------------------

#[test]
fn a_box_without_its_directory_is_found() {
    let home = home();
    let dir = home.box_dir("copy");
    fs::rename(&dir, home.beside("away")).unwrap();
    assert_finds(&home, &["box copy", "has no directory", text(&dir)]);
}

#[test]
fn a_box_with_snapshots_and_no_disk_is_found() {
    let home = home();
    fs::rename(home.live_disk("web"), home.beside("away")).unwrap();
    assert_finds(&home, &["box web", "no disk"]);
}

#[test]
fn a_snapshot_without_its_layer_is_found() {
    let home = home();
    let layer = home.snapshot_disk("web", "ours");
    fs::rename(&layer, home.beside("away")).unwrap();
    assert_finds(
        &home,
        &["snapshot ours of box web", "no file", text(&layer)],
    );
}

#[test]
fn a_layer_that_is_gone_is_found_with_who_needs_it() {
    let home = home();
    let layer = chain(&home.live_disk("copy")).remove(1);
    fs::rename(&layer, home.beside("away")).unwrap();
    assert_finds(&home, &["box copy", text(&layer)]);
    assert_finds(&home, &["base ", "has no file", "reads from it"]);
}

#[test]
fn a_damaged_header_is_found() {
    let home = home();
    // The version is a big-endian number after the magic.
    overwrite(&home.live_disk("copy"), 4, &[0, 0, 0, 9]);
    assert_finds(&home, &[text(&home.live_disk("copy"))]);
}

#[test]
fn a_cut_off_image_is_found() {
    let home = home();
    fs::write(home.live_disk("copy"), b"QFI\xfb\0\0\0\x03").unwrap();
    assert_finds(&home, &[text(&home.live_disk("copy"))]);
}

#[test]
fn a_layer_outside_the_home_is_found() {
    let home = home();
    let outside = home.beside("outside.qcow2");
    fs::copy(chain(&home.live_disk("copy")).remove(1), &outside).unwrap();
    let live = home.live_disk("copy");
    succeed(&[
        "qemu-img",
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        text(&outside),
        text(&live),
    ]);
    assert_finds(&home, &["box copy", "outside", text(&outside)]);
}

#[test]
fn a_chain_that_is_a_cycle_is_found() {
    let home = home();
    let live = home.live_disk("copy");
    succeed(&[
        "qemu-img",
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        text(&live),
        text(&live),
    ]);
    assert_finds(&home, &["box copy"]);
}

#[test]
fn a_live_disk_with_a_second_name_is_found() {
    let home = home();
    let name = home.root().join("bases/Second00.qcow2");
    fs::hard_link(home.live_disk("web"), &name).unwrap();
    assert_finds(&home, &[text(&name), "live disk of box web"]);
}

#[test]
fn a_base_without_a_row_is_found() {
    let home = home();
    let base = home.root().join("bases/NoRow000.qcow2");
    fs::copy(home.live_disk("web"), &base).unwrap();
    assert_finds(&home, &[text(&base), "no row"]);
}

#[test]
fn a_base_of_ours_that_nothing_reads_from_is_found_and_freed_by_the_next_mount() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "start").unwrap();
    home.guest_write("web", FREE_AREA, b"second");
    mount.snapshot("web", "a").unwrap();
    home.wheel_batch(&[
        &["snapshot-restore", "web", "start"],
        &["snapshot-remove", "web", "a"],
    ]);
    drop(mount);
    assert_finds(&home, &["bases/", "leftover", "frees it"]);
    home.assert_whole_once_mounted();
}

#[test]
fn a_box_directory_without_a_row_is_found() {
    let home = home();
    let dir = home.root().join("boxes/nobody000000");
    fs::create_dir(&dir).unwrap();
    assert_finds(&home, &[text(&dir), "no box"]);
}

#[test]
fn a_snapshot_directory_without_a_row_is_found() {
    let home = home();
    let dir = home.box_dir("web").join("snapshots/unknown");
    fs::create_dir(&dir).unwrap();
    assert_finds(&home, &[text(&dir), "no snapshot of box web"]);
}

#[test]
fn a_snapshot_that_boxlite_did_not_finish_is_found() {
    let home = home();
    let marker = home.box_dir("web").join(".snapshot_pending");
    fs::write(marker, "{}").unwrap();
    assert_finds(&home, &["box web", "middle of a snapshot"]);
}

#[test]
fn what_a_killed_mount_left_is_found_and_removed_by_the_next() {
    let home = home();
    let work = home.root().join(".boxlitefs/work-killed00");
    fs::create_dir(&work).unwrap();
    fs::write(work.join("lock"), "").unwrap();
    assert_finds(&home, &[text(&work), "killed"]);
    home.assert_whole_once_mounted();
    assert!(!work.exists());
}

#[test]
fn several_findings_are_all_named() {
    let home = home();
    let base = home.root().join("bases/NoRow000.qcow2");
    fs::copy(home.live_disk("web"), &base).unwrap();
    let dir = home.root().join("boxes/nobody000000");
    fs::create_dir(&dir).unwrap();
    assert_finds(&home, &[text(&base)]);
    assert_finds(&home, &[text(&dir)]);
    let (_, said) = home.check();
    assert!(said.contains("2 findings"), "{said}");
}

// ---- repair -------------------------------------------------------------------------------------

/// Runs `boxlitefs check --repair` and returns its exit status and output.
fn repair(home: &TestHome) -> (i32, String) {
    let output = run(&[binary(), "check", "--repair", text(home.root())]);
    let said = [output.stdout, output.stderr].concat();
    let status = output.status.code().unwrap_or(-1);
    (status, String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn repair_changes_nothing_where_nothing_is_wrong() {
    let home = home();
    let before = home.fingerprint();
    let (status, said) = repair(&home);
    assert_eq!(status, 0, "{said}");
    assert_eq!(home.fingerprint(), before);
}

#[test]
fn what_crashes_leave_is_named_with_its_size_and_removed() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "start").unwrap();
    home.guest_write("web", FREE_AREA, &[5; 300_000]);
    mount.snapshot("web", "a").unwrap();
    home.wheel_batch(&[
        &["snapshot-restore", "web", "start"],
        &["snapshot-remove", "web", "a"],
    ]);
    drop(mount);
    let work = home.root().join(".boxlitefs/work-killed00");
    fs::create_dir(&work).unwrap();
    fs::write(work.join("disk"), vec![1; 3 << 20]).unwrap();
    // An unfinished snapshot: its layer also exists under another name.
    let half = home.box_dir("web").join("snapshots/half");
    fs::create_dir(&half).unwrap();
    let layer = home.snapshot_disk("web", "start");
    fs::hard_link(layer, half.join("disk.qcow2")).unwrap();
    assert_finds(&home, &["bases/", "is a leftover", "KiB"]);
    assert_finds(
        &home,
        &["last reader BoxLite removed: 1", "boxlitefs compact"],
    );
    assert_finds(&home, &[text(&work), "killed", "3.0 MiB"]);
    assert_finds(&home, &[text(&half), "no snapshot of box web"]);
    let (status, said) = repair(&home);
    assert_eq!(status, 0, "{said}");
    assert_eq!(said.matches("repaired: ").count(), 3, "{said}");
    assert!(!work.exists() && !half.exists());
    assert_eq!(home.check().0, 0);
    home.assert_images_clean();
}

#[test]
fn a_layer_in_a_snapshots_place_becomes_a_snapshot() {
    let home = home();
    let lost = home.snapshot_disk("web", "lost");
    fs::create_dir(lost.parent().unwrap()).unwrap();
    fs::copy(home.live_disk("web"), &lost).unwrap();
    let wanted = digest(&lost);
    assert_finds(&home, &["snapshots/lost", "no snapshot of box web"]);
    let (status, said) = repair(&home);
    assert_eq!(status, 0, "{said}");
    assert_eq!(digest(&home.snapshot_disk("web", "lost")), wanted);
    home.guest_write("web", FREE_AREA, b"later");
    home.wheel_batch(&[&["snapshot-restore", "web", "lost"]]);
    assert_eq!(digest(&home.live_disk("web")), wanted);
    home.assert_whole_once_mounted();
}

#[test]
fn what_may_be_the_only_copy_of_a_disk_is_not_touched() {
    let home = home();
    let base = home.root().join("bases/NoRow000.qcow2");
    fs::copy(home.live_disk("web"), &base).unwrap();
    let broken = home.snapshot_disk("copy", "broken");
    fs::create_dir(broken.parent().unwrap()).unwrap();
    fs::write(&broken, "no image at all").unwrap();
    let (base_bytes, broken_bytes) = (fs::read(&base).unwrap(), fs::read(&broken).unwrap());
    let (status, said) = repair(&home);
    assert_eq!(status, 1, "{said}");
    assert!(
        said.contains("NoRow000") && said.contains("broken"),
        "{said}"
    );
    assert_eq!(fs::read(&base).unwrap(), base_bytes);
    assert_eq!(fs::read(&broken).unwrap(), broken_bytes);
}

#[test]
fn boxlites_copy_of_a_snapshot_under_way_is_left_to_boxlite() {
    let home = home();
    let marker = home.box_dir("web").join(".snapshot_pending");
    let half = home.snapshot_disk("web", "half");
    fs::create_dir(half.parent().unwrap()).unwrap();
    fs::copy(home.live_disk("web"), &half).unwrap();
    let pending = serde_json::json!({"copy": true, "name": "half", "snapshot_dir": half.parent()});
    fs::write(&marker, pending.to_string()).unwrap();
    let (status, said) = repair(&home);
    assert_eq!(status, 1, "{said}");
    assert!(half.exists() && marker.exists());
    assert!(said.contains("middle of a snapshot"), "{said}");
}

#[test]
fn repair_waits_for_a_runtime_and_for_boxes_that_run() {
    let home = home();
    let lost = home.snapshot_disk("web", "lost");
    fs::create_dir(lost.parent().unwrap()).unwrap();
    fs::copy(home.live_disk("web"), &lost).unwrap();
    let holder = home.hold();
    let (status, said) = repair(&home);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("BoxLite runtime is using"), "{said}");
    drop(holder);
    let mut machine = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let shim = home.box_dir("web").join("shim.pid");
    fs::write(&shim, machine.id().to_string()).unwrap();
    let (status, said) = repair(&home);
    machine.kill().unwrap();
    machine.wait().unwrap();
    assert_eq!(status, 1, "{said}");
    assert!(lost.exists());
    fs::remove_file(shim).unwrap();
    assert_eq!(repair(&home).0, 0);
}

#[test]
fn what_boxlite_keeps_for_nothing_is_told_and_is_no_fault() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "start"]);
    home.guest_write("web", FREE_AREA, &[5; 300_000]);
    home.wheel_batch(&[
        &["clone", "web", "c1"],
        &["snapshot-restore", "web", "start"],
        &["remove", "c1"],
    ]);
    drop(home.mount());
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}");
    assert!(
        said.contains("note: nothing reads from BoxLite's"),
        "{said}"
    );
    let (status, said) = repair(&home);
    assert_eq!(status, 0, "{said}");
    assert!(said.contains("repaired: nothing reads from"), "{said}");
    home.wheel(&["snapshot-restore", "web", "start"]);
    home.assert_whole_once_mounted();
}

#[test]
fn what_is_lost_is_told_with_what_can_be_done() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    mount.copy("web", "copy");
    mount.unmount();
    home.put_aside("whole");
    // The live disk is gone, its snapshot is not.
    fs::remove_file(home.live_disk("web")).unwrap();
    let (status, said) = home.check();
    assert_eq!(status, 1, "{said}");
    assert!(
        said.contains("`cp -r` of a snapshot in a mount makes a box of it"),
        "{said}"
    );
    let mount = home.mount();
    let before = mount.export_digest("web/snapshots/a/export.boxlite");
    succeed(&[
        "cp",
        "-r",
        text(&mount.at("web/snapshots/a")),
        text(&mount.at("saved")),
    ]);
    assert_eq!(mount.export_digest("saved/export.boxlite"), before);
    mount.unmount();
    home.put_back("whole");
    // A layer is gone, by all its names.
    let inode = fs::metadata(home.snapshot_disk("web", "a")).unwrap().ino();
    let layer = format!("find '{}' -inum {inode} -delete", text(home.root()));
    succeed(&["sh", "-c", &layer]);
    let (status, said) = home.check();
    assert_eq!(status, 1, "{said}");
    for subject in ["snapshot a of box web", "box web: ", "box copy: "] {
        let mut lines = said.lines().filter(|line| line.starts_with(subject));
        let line = lines.next().unwrap_or_else(|| panic!("{subject}: {said}"));
        assert!(
            line.contains("what is lost is only in a backup: import it"),
            "{line}"
        );
    }
    // What is damaged is named once, whatever names it has.
    home.put_back("whole");
    let layer = home.snapshot_disk("web", "a");
    let file = fs::OpenOptions::new().write(true).open(&layer).unwrap();
    file.set_len(100).unwrap();
    let (_, said) = home.check();
    let lines: std::collections::BTreeSet<&str> = said.lines().collect();
    assert_eq!(lines.len(), said.lines().count(), "{said}");
}
