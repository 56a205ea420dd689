//! Homes reached by other paths than their rows name, and bases deleted by accident. At its start,
//! BoxLite deletes every base older than five minutes that no row names by its canonical path.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::common::*;

/// Makes a home with five boxes and four snapshots through the mount, all on layers in `bases/`.
fn full_home() -> TestHome {
    let home = TestHome::new();
    fill(&home);
    home
}

fn fill(home: &TestHome) {
    let mount = home.mount();
    for name in ["a", "b"] {
        mount.snapshot("web", name).unwrap();
        home.guest_write("web", FREE_AREA, name.as_bytes());
    }
    for name in ["two", "three", "four", "five"] {
        let from = mount.at("web/export.boxlite");
        let to = mount.at(format!("{name}.boxlite"));
        succeed(&["cp", text(&from), text(&to)]);
        home.guest_write(name, FREE_AREA + 512, name.as_bytes());
    }
    for name in ["two", "three"] {
        mount.snapshot(name, "c").unwrap();
        home.guest_write(name, FREE_AREA + 1024, name.as_bytes());
    }
    mount.unmount();
}

/// Maps each live disk and snapshot to what qemu-img reads of it.
fn states(home: &TestHome) -> BTreeMap<String, String> {
    let mut states = BTreeMap::new();
    for name in ["web", "two", "three", "four", "five"] {
        states.insert(name.to_owned(), digest(&home.live_disk(name)));
    }
    for (name, snapshot) in [("web", "a"), ("web", "b"), ("two", "c"), ("three", "c")] {
        let layer = home.snapshot_disk(name, snapshot);
        states.insert(format!("{name}/{snapshot}"), digest(&layer));
    }
    states
}

fn bases(home: &TestHome) -> Vec<PathBuf> {
    let dir = home.root().join("bases");
    names_in(&dir)
        .into_iter()
        .map(|name| dir.join(name))
        .collect()
}

/// Starts BoxLite three times, long after the bases were made.
fn let_boxlite_collect(home: &TestHome) {
    for base in bases(home) {
        succeed(&["touch", "-d", "1 hour ago", text(&base)]);
    }
    for _ in 0..3 {
        home.wheel(&["list"]);
    }
}

/// Moves the home or a directory of it, and puts a symlink in its place.
fn move_and_link(from: &Path, to: &Path) {
    fs::rename(from, to).unwrap();
    symlink(to, from).unwrap();
}

fn assert_everything_is_there(home: &TestHome, before: &BTreeMap<String, String>) {
    assert_eq!(states(home), *before);
    home.assert_whole();
}

#[test]
fn a_home_that_was_moved_and_linked_is_put_right_by_a_mount_before_boxlite_starts() {
    let home = full_home();
    let before = states(&home);
    move_and_link(home.root(), &home.beside("moved"));
    let (status, said) = home.check();
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("by another path"), "{said}");
    let mount = home.mount();
    assert!(mount.log().contains("by another path"), "{}", mount.log());
    mount.unmount();
    assert_eq!(home.check().0, 0, "{}", home.check().1);
    let count = bases(&home).len();
    let_boxlite_collect(&home);
    assert_eq!(bases(&home).len(), count);
    assert_everything_is_there(&home, &before);
    // Everything works through the symlink.
    let mount = home.mount();
    mount.snapshot("web", "later").unwrap();
    mount.remove_snapshot("web", "a").unwrap();
    mount.unmount();
    let_boxlite_collect(&home);
    home.assert_whole();
}

#[test]
fn check_repair_puts_a_moved_home_right() {
    let home = full_home();
    let before = states(&home);
    move_and_link(home.root(), &home.beside("moved"));
    let output = run(&[binary(), "check", "--repair", text(home.root())]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("repaired: the row of base"), "{said}");
    assert!(said.contains("repaired: the header of"), "{said}");
    assert!(said.contains("repaired: the row of snapshot"), "{said}");
    let_boxlite_collect(&home);
    assert_everything_is_there(&home, &before);
}

#[test]
fn where_paths_cannot_be_put_right_the_log_warns() {
    let home = full_home();
    move_and_link(home.root(), &home.beside("moved"));
    let mount = home.mount_read_only();
    let warning = "BoxLite's next start may delete layers";
    assert!(mount.log().contains(warning), "{}", mount.log());
    mount.unmount();
    // A runtime that started before the files were old enough holds the lock.
    let holder = home.hold();
    let mount = home.mount();
    let log = mount.log();
    assert!(log.matches(warning).count() > 0, "{log}");
    drop(holder);
    // The next change repairs the paths.
    mount.snapshot("web", "later").unwrap();
    mount.unmount();
    assert_eq!(home.check().0, 0, "{}", home.check().1);
}

#[test]
fn bases_that_were_a_link_from_the_beginning_or_become_one_are_kept() {
    for is_late in [false, true] {
        let home = TestHome::new();
        let link = || move_and_link(&home.root().join("bases"), &home.beside("elsewhere"));
        if !is_late {
            link();
        }
        fill(&home);
        if is_late {
            link();
        }
        let before = states(&home);
        home.mount().unmount();
        home.assert_whole();
        let_boxlite_collect(&home);
        assert_everything_is_there(&home, &before);
        let mount = home.mount();
        mount.remove_snapshot("web", "a").unwrap();
        mount.snapshot("web", "later").unwrap();
        mount.unmount();
        let_boxlite_collect(&home);
        home.assert_whole();
    }
}

#[test]
fn boxes_that_are_a_link_work() {
    for is_late in [false, true] {
        let home = TestHome::new();
        let link = || move_and_link(&home.root().join("boxes"), &home.beside("elsewhere"));
        if !is_late {
            link();
        }
        fill(&home);
        if is_late {
            link();
        }
        let before = states(&home);
        home.mount().unmount();
        home.assert_whole();
        let_boxlite_collect(&home);
        assert_everything_is_there(&home, &before);
        // Each side can use what the other makes.
        home.wheel_batch(&[
            &["snapshot-create", "four", "theirs"],
            &["clone", "five", "six"],
        ]);
        let mount = home.mount();
        mount.snapshot("four", "ours").unwrap();
        mount.remove_snapshot("four", "theirs").unwrap();
        succeed(&["rm", "-r", text(&mount.at("five"))]);
        mount.unmount();
        let_boxlite_collect(&home);
        home.assert_whole();
    }
}

#[test]
fn parts_of_a_home_on_another_file_system_are_refused_before_anything_is_changed() {
    for part in ["bases", "boxes"] {
        let home = full_home();
        let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else {
            panic!("no file system in memory at /dev/shm; mount one");
        };
        let (from, to) = (home.root().join(part), elsewhere.path().join(part));
        succeed(&["cp", "-a", text(&from), text(&to)]);
        fs::remove_dir_all(&from).unwrap();
        symlink(&to, &from).unwrap();
        let before = home.kept();
        let mount = home.mount();
        let refused = mount.snapshot("web", "later");
        assert_eq!(errno(refused), libc::EXDEV);
        assert!(
            mount.log().contains("another file system"),
            "{}",
            mount.log()
        );
        assert!(!mount.export_digest("web/export.boxlite").is_empty());
        mount.unmount();
        assert_eq!(home.kept(), before);
    }
}

#[test]
fn a_home_that_is_mounted_in_two_places_is_changed_by_the_path_of_its_rows_only() {
    let home = full_home();
    let second = home.beside("second");
    fs::create_dir(&second).unwrap();
    succeed(&["mount", "--bind", text(home.root()), text(&second)]);
    let mountpoint = home.beside("mnt2");
    fs::create_dir(&mountpoint).unwrap();
    let before = home.kept();
    let tried = attempt(|| {
        succeed(&[binary(), "mount", text(&second), text(&mountpoint)]);
        let refused = fs::create_dir(mountpoint.join("web/snapshots/later"));
        let log = fs::read_to_string(mountpoint.join(".boxlite/log")).unwrap();
        unmount(&mountpoint);
        assert_eq!(errno(refused), libc::EPERM);
        assert!(log.contains("mounted a second time"), "{log}");
        let said = run(&[binary(), "check", text(&second)]);
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains("mounted a second time"), "{said}");
    });
    succeed(&["umount", text(&second)]);
    tried.unwrap();
    assert_eq!(home.kept(), before);
    home.mount().snapshot("web", "later").unwrap();
}

// ---- accidental deletion ------------------------------------------------------------------------

fn delete_bases(home: &TestHome) {
    for base in bases(home) {
        fs::remove_file(base).unwrap();
    }
}

#[test]
fn what_boxlite_collects_of_a_moved_home_comes_back_with_the_mount() {
    let home = full_home();
    let before = states(&home);
    let count = bases(&home).len();
    move_and_link(home.root(), &home.beside("moved"));
    let_boxlite_collect(&home);
    assert_eq!(
        bases(&home).len(),
        0,
        "BoxLite does not delete them any more"
    );
    let (status, said) = home.check();
    assert_eq!(status, 1);
    assert!(said.contains("its layer is still there as"), "{said}");
    let mount = home.mount();
    assert!(mount.log().contains("were put back"), "{}", mount.log());
    mount.unmount();
    assert_eq!(bases(&home).len(), count);
    assert_everything_is_there(&home, &before);
    let_boxlite_collect(&home);
    assert_everything_is_there(&home, &before);
}

#[test]
fn deleted_bases_come_back_with_check_repair_and_with_the_next_change() {
    let home = full_home();
    let before = states(&home);
    delete_bases(&home);
    succeed(&[binary(), "check", "--repair", text(home.root())]);
    assert_everything_is_there(&home, &before);
    let mount = home.mount();
    fs::remove_dir_all(home.root().join("bases")).unwrap();
    mount.snapshot("web", "later").unwrap();
    assert!(mount.log().contains("were put back"), "{}", mount.log());
    mount.unmount();
    assert_everything_is_there(&home, &before);
}

#[test]
fn deleted_bases_of_an_older_version_come_back_by_the_names_of_snapshots() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, &[7; 300_000]);
    mount.snapshot("web", "b").unwrap();
    home.guest_write("web", FREE_AREA, b"the box's own");
    mount.unmount();
    let before = digest(&home.live_disk("web"));
    fs::remove_dir_all(home.root().join(".boxlitefs/layers")).unwrap();
    delete_bases(&home);
    home.mount().unmount();
    assert_eq!(digest(&home.live_disk("web")), before);
    home.assert_whole();
}

/// Asserts that every base has a spare name for its own file, and that there are no other spare
/// names.
fn assert_spare_names(home: &TestHome) {
    let spares = home.root().join(".boxlitefs/layers");
    let inodes = |dir: &Path| -> BTreeMap<String, u64> {
        let names = names_in(dir).into_iter();
        names
            .map(|name| {
                let inode = fs::metadata(dir.join(&name)).unwrap().ino();
                (name, inode)
            })
            .collect()
    };
    assert_eq!(inodes(&spares), inodes(&home.root().join("bases")));
}

#[test]
fn spare_names_follow_their_layers_through_every_change_and_go_with_them() {
    let home = full_home();
    assert_spare_names(&home);
    let mount = home.mount();
    // A layer loses its last other reader and is merged.
    mount.remove_snapshot("web", "a").unwrap();
    assert_spare_names(&home);
    succeed(&["rm", "-r", text(&mount.at("two"))]);
    assert_spare_names(&home);
    mount.unmount();
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    assert_spare_names(&home);
    // An adopted layer gets a spare name.
    home.wheel(&["snapshot-create", "web", "theirs"]);
    let mount = home.mount();
    mount.snapshot("web", "ours").unwrap();
    assert_spare_names(&home);
    for name in ["web", "three", "four", "five"] {
        succeed(&["rm", "-r", text(&mount.at(name))]);
    }
    mount.unmount();
    home.mount().unmount();
    assert_spare_names(&home);
    assert_eq!(bases(&home).len(), 0);
}

#[test]
fn a_live_disk_that_takes_the_place_of_a_base_keeps_one_name() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "gone").unwrap();
    mount.remove_snapshot("web", "gone").unwrap();
    mount.unmount();
    let (status, said) = home.compact();
    assert_eq!(status, 0, "{said}");
    assert_eq!(fs::metadata(home.live_disk("web")).unwrap().nlink(), 1);
    assert_spare_names(&home);
}

#[test]
fn bases_of_an_older_version_get_spare_names() {
    let home = full_home();
    fs::remove_dir_all(home.root().join(".boxlitefs/layers")).unwrap();
    let mount = home.mount();
    mount.snapshot("web", "later").unwrap();
    mount.unmount();
    let spares = home.root().join(".boxlitefs/layers");
    for layer in chain(&home.live_disk("web")).iter().skip(1) {
        assert!(spares.join(layer.file_name().unwrap()).exists());
    }
    home.compact();
    assert_spare_names(&home);
}

#[test]
fn spare_names_cost_no_room_that_is_told_of() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let space = |file: &str| {
        let text = fs::read_to_string(mount.at(file)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json["space"]["own_bytes"].as_u64().unwrap()
    };
    assert_eq!(space("web/box.json"), home.allocated());
}

// ---- read-only homes ----------------------------------------------------------------------------

/// A read-only bind mount of a home that lasts until this is dropped.
struct ReadOnly {
    at: PathBuf,
}

impl ReadOnly {
    fn bind(home: &TestHome) -> ReadOnly {
        let at = home.beside("ro");
        fs::create_dir(&at).unwrap();
        succeed(&["mount", "--bind", text(home.root()), text(&at)]);
        let ro = ReadOnly { at };
        succeed(&["mount", "-o", "remount,bind,ro", text(&ro.at)]);
        ro
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        run(&["umount", text(&self.at)]);
    }
}

/// Mounts a home as it is and asserts that everything is readable. `expect` maps exports to
/// digests.
fn assert_is_shown(
    home: &Path,
    mountpoint: &Path,
    options: &[&str],
    expect: &BTreeMap<String, String>,
) -> String {
    fs::create_dir_all(mountpoint).unwrap();
    let mut command = vec![binary(), "mount"];
    command.extend(options);
    command.extend([text(home), text(mountpoint)]);
    let said = run(&command);
    assert!(said.status.success(), "{said:?}");
    let shown = attempt(|| {
        for (state, digest) in expect {
            let export = match state.split_once('/') {
                Some((name, snapshot)) => format!("{name}/snapshots/{snapshot}/export.boxlite"),
                None => format!("{state}/export.boxlite"),
            };
            assert_eq!(archive_digest(&mountpoint.join(export)), *digest, "{state}");
        }
        let inside = mountpoint.join("web/rootfs/etc/hostname");
        assert_eq!(fs::read_to_string(inside).unwrap(), "web\n");
        let changed = fs::create_dir(mountpoint.join("web/snapshots/no"));
        assert_eq!(errno(changed), libc::EROFS);
    });
    let log = fs::read_to_string(mountpoint.join(".boxlite/log"));
    unmount(mountpoint);
    shown.unwrap();
    log.unwrap()
}

/// Makes a home whose latest rows are only in the WAL: BoxLite was killed before a checkpoint.
fn home_with_a_wal() -> TestHome {
    let home = full_home();
    let database = home.database();
    database
        .set_db_config(
            rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE,
            true,
        )
        .unwrap();
    database
        .execute("UPDATE box_config SET name = 'renamed', json = json_set(json, '$.name', 'renamed') WHERE name = 'five'", [])
        .unwrap();
    drop(database);
    let db = home.root().join("db");
    let _ = fs::remove_file(db.join("boxlite.db-shm"));
    assert!(fs::metadata(db.join("boxlite.db-wal")).unwrap().len() > 0);
    home
}

fn renamed(states: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let rename = |name: String| {
        if name == "five" {
            "renamed".into()
        } else {
            name
        }
    };
    states
        .into_iter()
        .map(|(name, it)| (rename(name), it))
        .collect()
}

#[test]
fn a_home_on_a_read_only_mount_is_shown_with_a_wal_or_without() {
    let mountpoint = |home: &TestHome| home.beside("ro-mnt");
    let home = full_home();
    let before = states(&home);
    // Removes SQLite's other files next to the database.
    for name in ["boxlite.db-shm", "boxlite.db-wal"] {
        let _ = fs::remove_file(home.root().join("db").join(name));
    }
    let ro = ReadOnly::bind(&home);
    assert_is_shown(&ro.at, &mountpoint(&home), &["-o", "ro"], &before);
    let check = run(&[binary(), "check", text(&ro.at)]);
    assert_ne!(check.status.code(), Some(2), "{check:?}");
    drop(ro);

    let home = home_with_a_wal();
    let before = renamed(states_by(&home, "renamed"));
    let ro = ReadOnly::bind(&home);
    assert_is_shown(&ro.at, &mountpoint(&home), &["-o", "ro"], &before);
    // Without `ro` the home can also be mounted, and the log says that it was opened read-only.
    let log = assert_is_shown(&ro.at, &mountpoint(&home), &[], &before);
    assert!(log.contains("opened read-only"), "{log}");
    let compact = run(&[binary(), "compact", text(&ro.at)]);
    assert!(!compact.status.success());
    let said = String::from_utf8_lossy(&compact.stderr).into_owned();
    assert!(said.contains("can't be written"), "{said}");
}

/// Returns [`states`] after the box `five` was renamed.
fn states_by(home: &TestHome, five: &str) -> BTreeMap<String, String> {
    let mut states = BTreeMap::new();
    for name in ["web", "two", "three", "four", five] {
        let shown = if name == five { "five" } else { name };
        states.insert(shown.to_owned(), digest(&home.live_disk(name)));
    }
    for (name, snapshot) in [("web", "a"), ("web", "b"), ("two", "c"), ("three", "c")] {
        let layer = home.snapshot_disk(name, snapshot);
        states.insert(format!("{name}/{snapshot}"), digest(&layer));
    }
    states
}

#[test]
fn a_read_only_home_that_changes_by_another_path_is_shown_as_it_is_now() {
    let home = TestHome::new();
    let ro = ReadOnly::bind(&home);
    let mountpoint = home.beside("ro-mnt");
    fs::create_dir(&mountpoint).unwrap();
    succeed(&[
        binary(),
        "mount",
        "-o",
        "ro",
        text(&ro.at),
        text(&mountpoint),
    ]);
    let seen = attempt(|| {
        home.wheel(&["snapshot-create", "web", "a"]);
        eventually("the snapshot shows", || {
            mountpoint.join("web/snapshots/a").is_dir()
        });
    });
    unmount(&mountpoint);
    seen.unwrap();
}

#[test]
fn a_backup_of_a_home_shows_its_own_files_whatever_became_of_the_original() {
    let home = home_with_a_wal();
    let before = renamed(states_by(&home, "renamed"));
    let image = home.beside("home.img");
    let place = home.beside("backup");
    fs::create_dir(&place).unwrap();
    // A copy made on a file system without hard links: each name is a file of its own.
    succeed(&[
        "cp",
        "-r",
        "--no-preserve=links",
        text(home.root()),
        text(&place.join("copy")),
    ]);
    let backup = place.join("copy");
    // A copy on read-only media.
    succeed(&[
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-d",
        text(home.root()),
        text(&image),
        "128M",
    ]);
    // The original is changed, and finally deleted.
    let mount = home.mount();
    succeed(&["rm", "-r", text(&mount.at("two"))]);
    mount.remove_snapshot("web", "a").unwrap();
    mount.unmount();
    home.compact();
    fs::rename(home.root(), home.beside("gone")).unwrap();
    let mountpoint = home.beside("backup-mnt");
    assert_is_shown(&backup, &mountpoint, &["-o", "ro"], &before);
    let at = home.beside("media");
    fs::create_dir(&at).unwrap();
    let media = [
        "mount",
        "-t",
        "ext4",
        "-o",
        "loop,ro",
        text(&image),
        text(&at),
    ];
    succeed(&media);
    let ro = ReadOnly { at: at.clone() };
    assert_is_shown(&ro.at, &mountpoint, &[], &before);
    let check = run(&[binary(), "check", text(&ro.at)]);
    assert_ne!(check.status.code(), Some(2), "{check:?}");
}

#[test]
fn a_backup_that_belongs_to_another_user_is_shown() {
    let home = home_with_a_wal();
    let before = renamed(states_by(&home, "renamed"));
    // The user can read all of it and write none of it.
    succeed(&["chmod", "-R", "a+rX,go-w", text(home.root())]);
    let place = home.root().parent().unwrap();
    succeed(&["chmod", "755", text(place)]);
    let mountpoint = home.beside("other-mnt");
    fs::create_dir(&mountpoint).unwrap();
    succeed(&["chown", "nobody", text(&mountpoint)]);
    let check = run_as_nobody(&[binary(), "check", text(home.root())]);
    assert_eq!(check.status.code(), Some(0), "{check:?}");
    let mounted = run_as_nobody(&[binary(), "mount", text(home.root()), text(&mountpoint)]);
    if !mounted.status.success() {
        // A user who may not use FUSE gets an error about that, not about the home.
        let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
        assert!(said.contains("fuse"), "{said}");
        return;
    }
    let shown = run_as_nobody(&["ls", text(&mountpoint)]);
    let export = text(&mountpoint).to_owned() + "/web/export.boxlite";
    let read = run_as_nobody(&["tar", "-tf", &export]);
    run_as_nobody(&[binary(), "unmount", text(&mountpoint)]);
    assert!(
        String::from_utf8_lossy(&shown.stdout).contains("renamed"),
        "{shown:?}"
    );
    assert!(read.status.success(), "{read:?}");
    assert!(before.contains_key("web"));
}
