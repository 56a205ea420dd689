//! What a user sees of a home (names, attributes, descriptions), and how a mount starts and ends.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::*;
use serde_json::Value;

/// Maps every path below a directory to its inode number.
fn inodes(root: &Path) -> BTreeMap<String, u64> {
    let listing = succeed(&["find", text(root), "-printf", "%P %i\n"]);
    listing
        .lines()
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(path, inode)| (path.to_owned(), inode.parse().unwrap()))
        .collect()
}

#[test]
fn the_tree_is_that_of_the_documents() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "s"]);
    let mount = home.mount();
    let paths: Vec<String> = inodes(mount.root()).into_keys().collect();
    assert_eq!(
        paths,
        [
            "",
            "web",
            "web/box.json",
            "web/disk.img",
            "web/export.boxlite",
            "web/export.boxlite.zst",
            "web/rootfs",
            "web/snapshots",
            "web/snapshots/s",
            "web/snapshots/s/disk.img",
            "web/snapshots/s/export.boxlite",
            "web/snapshots/s/export.boxlite.zst",
            "web/snapshots/s/rootfs",
            "web/snapshots/s/snapshot.json",
        ]
    );
    // Hidden: reachable by name, never listed.
    assert!(mount.at(".boxlite").is_dir());
    assert_eq!(mount.names(".boxlite"), ["log", "status", "undo", "view"]);
    assert!(!succeed(&["ls", "-A", text(mount.root())]).contains(".boxlite"));
    // Recursive tools reach the snapshots last.
    let listing = succeed(&["ls", "-U", text(&mount.at("web"))]);
    assert_eq!(listing.split_whitespace().last(), Some("snapshots"));
}

#[test]
fn attributes_are_real() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "s"]);
    home.guest_write("web", FREE_AREA, b"changed");
    std::os::unix::fs::chown(home.root(), Some(1234), Some(2345)).unwrap();
    let mount = home.mount();
    let root = mount.root().metadata().unwrap();
    assert_eq!(
        (root.uid(), root.gid()),
        (1234, 2345),
        "the owner of the home"
    );
    assert_eq!(root.nlink(), 3, "2 and one for each box");
    assert_eq!(mount.at("web").metadata().unwrap().nlink(), 3);
    assert_eq!(mount.at("web/snapshots").metadata().unwrap().nlink(), 3);
    assert_eq!(mount.at("web/snapshots/s").metadata().unwrap().nlink(), 2);
    let disk = home.live_disk("web").metadata().unwrap();
    for path in ["web", "web/export.boxlite"] {
        let meta = mount.at(path).metadata().unwrap();
        let time = (meta.mtime(), meta.mtime_nsec());
        assert_eq!(
            time,
            (disk.mtime(), disk.mtime_nsec()),
            "{path}: the last disk change"
        );
    }
    for path in [
        "web/box.json",
        "web/export.boxlite",
        "web/snapshots/s/snapshot.json",
    ] {
        let meta = mount.at(path).metadata().unwrap();
        assert_eq!(
            fs::read(mount.at(path)).unwrap().len() as u64,
            meta.len(),
            "{path}"
        );
        assert!(meta.blocks() >= meta.len() / 512, "{path}");
        assert_eq!(meta.nlink(), 1);
        assert_eq!(meta.mode() & 0o7777, 0o600, "{path}");
    }
    let created: i64 = home
        .database()
        .query_row("SELECT created_at FROM snapshot", [], |row| row.get(0))
        .unwrap();
    assert_eq!(
        mount.at("web/snapshots/s").metadata().unwrap().mtime(),
        created
    );
    let df = |path: &Path| succeed(&["stat", "-f", "-c", "%b %S", text(path)]);
    assert_eq!(df(mount.root()), df(home.root()), "the home's file system");
}

#[test]
fn inode_numbers_stay_across_remounts() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "s"]);
    let mount = home.mount();
    mount.copy("web", "copy");
    let first = inodes(mount.root());
    mount.unmount();
    let mount = home.mount();
    assert_eq!(inodes(mount.root()), first);
    let distinct: std::collections::BTreeSet<&u64> = first.values().collect();
    assert_eq!(distinct.len(), first.len());
}

#[test]
fn box_json_has_every_field_and_no_secret() {
    let home = TestHome::new();
    let id = home.id("web");
    let rows = home.database();
    let stored: String = rows
        .query_row("SELECT json FROM box_config WHERE id = ?1", [&id], |row| {
            row.get(0)
        })
        .unwrap();
    let mut config: Value = serde_json::from_str(&stored).unwrap();
    config["options"]["secrets"] = serde_json::json!([
        {"name": "key", "hosts": ["example.com"], "placeholder": "<key>", "value": "s3cr3t-value"}
    ]);
    config["a_field_of_the_future"] = serde_json::json!({"deep": [1, 2]});
    rows.execute(
        "UPDATE box_config SET json = ?1 WHERE id = ?2",
        [&config.to_string(), &id],
    )
    .unwrap();
    let mount = home.mount();
    let shown = fs::read_to_string(mount.at("web/box.json")).unwrap();
    assert!(!shown.contains("s3cr3t-value"));
    assert!(shown.lines().count() > 20, "pretty");
    let mut value: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(value["state"]["status"], "stopped");
    let secret = &mut value["options"]["secrets"][0];
    assert_eq!(secret["placeholder"], "<key>");
    secret["value"] = "s3cr3t-value".into();
    let shown = value.as_object_mut().unwrap();
    shown.remove("state");
    shown.remove("space");
    assert_eq!(value, config, "all else is as BoxLite keeps it");
    // A clone keeps fields that this version does not know.
    mount.copy("web", "copy");
    let copy: Value =
        serde_json::from_str(&fs::read_to_string(mount.at("copy/box.json")).unwrap()).unwrap();
    assert_eq!(
        copy["a_field_of_the_future"],
        config["a_field_of_the_future"]
    );
}

#[test]
fn boxes_are_called_by_their_names_as_far_as_files_can_be() {
    let home = TestHome::new();
    let rows = home.database();
    let stored: String = rows
        .query_row("SELECT json FROM box_config", [], |row| row.get(0))
        .unwrap();
    for (id, name) in [
        ("slash0000001", Some("a/b")),
        ("percent00001", Some("50%")),
        ("unnamed00001", None),
        ("dots00000001", Some("..")),
        ("hidden000001", Some(".boxlite")),
        ("space0000001", Some("with space")),
    ] {
        let insert = "INSERT INTO box_config (id, name, created_at, json) VALUES (?1, ?2, 1, ?3)";
        rows.execute(insert, rusqlite::params![id, name, stored])
            .unwrap();
    }
    let mount = home.mount();
    assert_eq!(
        mount.names(""),
        [
            "50%25",
            "a%2Fb",
            "dots00000001",
            "hidden000001",
            "unnamed00001",
            "web",
            "with space"
        ]
    );
    assert_eq!(
        mount.names("a%2Fb"),
        ["box.json", "export.boxlite", "snapshots"],
        "without a disk there is nothing else"
    );
    let export = fs::read(mount.at("a%2Fb/export.boxlite"));
    assert_eq!(errno(export), libc::ENODATA);
    let empty = fs::metadata(mount.at("unnamed00001/export.boxlite"));
    // 7z does not open empty files, and deletes them with -sdel.
    assert_ne!(empty.unwrap().len(), 0);
    let no_disk = fs::create_dir(mount.at("unnamed00001/snapshots/s"));
    assert_eq!(errno(no_disk), libc::ENODATA);
}

#[test]
fn extended_attributes_say_what_a_box_is() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "s"]);
    let mount = home.mount();
    let dump = succeed(&["getfattr", "-d", "--absolute-names", text(&mount.at("web"))]);
    assert!(
        dump.contains(&format!("user.boxlite.id=\"{}\"", home.id("web"))),
        "{dump}"
    );
    assert!(dump.contains("user.boxlite.status=\"stopped\""), "{dump}");
    assert!(
        dump.contains("user.boxlite.image=\"alpine:latest\""),
        "{dump}"
    );
    assert!(dump.contains("user.boxlite.created_at=\"20"), "{dump}");
    let dump = succeed(&[
        "getfattr",
        "-d",
        "--absolute-names",
        text(&mount.at("web/snapshots/s")),
    ]);
    assert!(dump.contains("user.boxlite.created_at"), "{dump}");
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let home = TestHome::new();
    let before = home.fingerprint();
    let mount = home.mount_read_only();
    assert_eq!(
        errno(fs::create_dir(mount.at("web/snapshots/s"))),
        libc::EROFS
    );
    assert_eq!(errno(fs::create_dir(mount.at("new"))), libc::EROFS);
    assert_eq!(
        errno(fs::File::create(mount.at("new.boxlite"))),
        libc::EROFS
    );
    let digest_of_live = digest(&home.live_disk("web"));
    assert_eq!(mount.export_digest("web/export.boxlite"), digest_of_live);
    mount.unmount();
    assert_eq!(home.fingerprint(), before);
    assert!(!home.root().join(".boxlitefs").exists());
}

#[test]
fn a_thousand_boxes_are_listed_without_opening_their_disks() {
    let home = TestHome::new();
    let mut rows = home.database();
    let stored: String = rows
        .query_row("SELECT json FROM box_config", [], |row| row.get(0))
        .unwrap();
    let changes = rows.transaction().unwrap();
    for number in 0..1000 {
        let id = format!("many{number:08}");
        let dir = home.root().join("boxes").join(&id).join("disks");
        fs::create_dir_all(&dir).unwrap();
        fs::copy(home.live_disk("web"), dir.join("disk.qcow2")).unwrap();
        changes
            .execute(
                "INSERT INTO box_config (id, name, created_at, json) VALUES (?1, ?2, 1, ?3)",
                rusqlite::params![id, format!("box{number}"), stored],
            )
            .unwrap();
    }
    changes.commit().unwrap();
    // Recovery, which reads all headers, is over when the mount serves.
    let mount = home.mount_with(&[], &[("BOXLITEFS_MOST_AT_ONCE", "100000")]);
    let trace = Trace::begin(&home, &mount, &["-e", "trace=openat,open"]);
    for _ in 0..2 {
        let listing = succeed(&["ls", "-l", text(mount.root())]);
        assert_eq!(listing.lines().count(), 1002);
    }
    // Reads one export, to prove that the trace would show a disk being opened.
    succeed(&["ls", "-l", text(&mount.at("web"))]);
    let opened = trace.end();
    let disks: Vec<&String> = opened
        .iter()
        .filter(|line| line.contains("disk.qcow2"))
        .collect();
    assert!(!disks.is_empty(), "the trace works");
    let id = home.id("web");
    assert!(disks.iter().all(|line| line.contains(&id)), "{disks:?}");
}

// ---- start and end ------------------------------------------------------------------------------

fn refusal(arguments: &[&str]) -> String {
    let output = run(&[&[binary()], arguments].concat());
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.trim_end().lines().count(), 1, "one message: {said}");
    said
}

#[test]
fn what_can_not_be_mounted_is_refused_in_one_sentence() {
    let home = TestHome::new();
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    fs::create_dir(at("mnt")).unwrap();
    fs::write(at("file"), "").unwrap();
    let (mnt, root) = (at("mnt"), home.root());
    let (mnt, root) = (text(&mnt), text(root));
    assert!(refusal(&["mount", text(&at("absent")), mnt]).contains("absent"));
    fs::create_dir(at("foreign")).unwrap();
    assert!(refusal(&["mount", text(&at("foreign")), mnt]).contains("not a BoxLite home"));
    assert!(refusal(&["mount", text(place.path()), mnt]).contains("inside"));
    assert!(refusal(&["mount", text(&at("file")), mnt]).contains("file"));
    assert!(refusal(&["mount", root, text(&at("nowhere"))]).contains("nowhere"));
    assert!(refusal(&["mount", root, text(&at("file"))]).contains("not a directory"));
    assert!(refusal(&["mount", "-o", "colour=blue", root, mnt]).contains("colour=blue"));
    let mounted = home.mount();
    assert!(refusal(&["mount", root, text(mounted.root())]).contains("mounted"));
    mounted.unmount();
    assert!(refusal(&["unmount", mnt]).contains("mnt"));
    fs::write(
        home.root().join("db/boxlite.db"),
        "this is no database at all, not even a little",
    )
    .unwrap();
    assert!(refusal(&["mount", root, mnt]).contains("database"));
    let checked = run(&[binary(), "check", root]);
    assert_eq!(checked.status.code(), Some(2));
}

#[test]
fn mount_goes_to_the_background_when_it_serves_and_signals_unmount() {
    let home = TestHome::new();
    for signal in ["TERM", "INT"] {
        let place = tempfile::tempdir().unwrap();
        let mnt = text(place.path());
        succeed(&[
            binary(),
            "mount",
            "-o",
            "nosuid,_netdev,nofail",
            text(home.root()),
            mnt,
        ]);
        assert_eq!(names_in(place.path()), ["web"]);
        let line = mount_line(place.path());
        assert!(line.contains("fuse.boxlite"), "{line}");
        assert!(
            line.contains(text(home.root())),
            "the source is the home: {line}"
        );
        let pid = process_serving(home.root(), place.path());
        succeed(&["kill", &format!("-{signal}"), &pid.to_string()]);
        eventually("unmounted", || !is_mounted(place.path()));
        eventually("ended", || !Path::new(&format!("/proc/{pid}")).exists());
    }
}

#[test]
fn the_mount_helper_starts_a_mount_and_uses_mounts_exit_codes() {
    let home = TestHome::new();
    let place = tempfile::tempdir().unwrap();
    let mnt = text(place.path());
    let helper = Path::new(binary()).with_file_name("mount-boxlite");
    let helper = text(&helper);
    succeed(&[
        helper,
        text(home.root()),
        mnt,
        "-s",
        "-o",
        "rw,strange_option,_netdev",
    ]);
    assert_eq!(names_in(place.path()), ["web"]);
    let again = run(&[helper, text(home.root()), mnt]);
    assert_eq!(again.status.code(), Some(32));
    succeed(&[binary(), "unmount", mnt]);
    assert_eq!(run(&[helper, "/nonexistent", mnt]).status.code(), Some(32));
    assert_eq!(run(&[helper]).status.code(), Some(1));
    succeed(&[helper, "-f", text(home.root()), mnt]);
    assert!(!is_mounted(place.path()), "-f only pretends");
}

/// Returns the line of /proc/self/mountinfo for a mountpoint.
fn mount_line(mountpoint: &Path) -> String {
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .find(|line| line.contains(text(mountpoint)))
        .expect("mounted")
        .to_owned()
}

/// Finds the boxlitefs that serves a home at a mountpoint by its command line, which names both.
fn process_serving(home: &Path, mountpoint: &Path) -> u32 {
    let names = |bytes: &[u8], path: &Path| {
        bytes
            .split(|byte| *byte == 0)
            .any(|argument| argument == path.as_os_str().as_bytes())
    };
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find(|pid: &u32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            names(&command, home) && names(&command, mountpoint)
        })
        .expect("a process that serves it")
}
