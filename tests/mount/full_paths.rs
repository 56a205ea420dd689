//! Guests' files by their full paths: the kernel keeps the way there for a moment, asks for little,
//! and drops what it keeps as soon as the mount changes something.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::*;
use crate::inside::{give_disk, home};

fn count(requests: &[u32], kind: u32) -> usize {
    requests.iter().filter(|request| **request == kind).count()
}

#[test]
fn a_stat_by_the_full_path_asks_for_nothing_and_opens_no_disk() {
    let (home, _) = home();
    let mount = home.mount();
    // By a program that ends: the maker of a snapshot may still fill it.
    succeed(&["mkdir", text(&mount.at("web/snapshots/s"))]);
    let files = [
        mount.at("web/rootfs/a/b/c/deep"),
        mount.at("web/snapshots/s/rootfs/a/b/c/deep"),
    ];
    let look = |times: usize| {
        for _ in 0..times {
            for file in &files {
                assert_eq!(fs::metadata(file).unwrap().len(), 5);
            }
        }
    };
    look(1);
    let trace = Trace::begin(&home, &mount, &["-e", "trace=openat,open"]);
    look(200);
    let opened = trace.end();
    let disks = opened.iter().filter(|line| line.contains(".qcow2"));
    assert_eq!(disks.count(), 0, "{opened:#?}");

    let trace = Trace::of_requests(&home, &mount);
    look(1000);
    let lookups = count(&trace.end_of_requests(), LOOKUP);
    // Some, when the moment is over; 2,000 at least where one name on the way is not kept.
    assert!(lookups < 500, "{lookups} lookups");
}

#[test]
fn a_small_file_costs_an_open_and_a_read_and_then_an_open() {
    let (home, _) = home();
    let mount = home.mount();
    let read = |name: &str| fs::read(mount.at("web/rootfs").join(name)).unwrap();
    fs::metadata(mount.at("web/rootfs/short")).unwrap();
    fs::metadata(mount.at("web/rootfs/dated")).unwrap();
    for (again, reads) in [(false, 1), (true, 0)] {
        let trace = Trace::of_requests(&home, &mount);
        assert_eq!(read("short"), b"x");
        let requests = trace.end_of_requests();
        assert_eq!(count(&requests, OPEN), 1, "{requests:?}");
        assert_eq!(
            count(&requests, READ),
            reads,
            "again: {again}, {requests:?}"
        );
        // Closing it waits for nothing.
        assert_eq!(count(&requests, FLUSH), 0, "{requests:?}");
    }
}

#[test]
fn a_directory_of_a_state_is_listed_again_without_asking() {
    let (home, _) = home();
    let mount = home.mount();
    let many = mount.at("web/rootfs/many");
    let first = names_in(&many);
    assert_eq!(first.len(), 1500);
    let trace = Trace::of_requests(&home, &mount);
    assert_eq!(names_in(&many), first);
    let requests = trace.end_of_requests();
    assert_eq!(count(&requests, READDIR) + count(&requests, READDIRPLUS), 0);
}

/// Returns what a look by the full path finds: the inode of the guest's root, a file and the names
/// beside it.
fn look(root: &Path) -> (u64, Option<String>, Vec<String>) {
    let inode = fs::metadata(root.join(".")).unwrap().ino();
    let text = fs::read_to_string(root.join("state")).ok();
    (inode, text, names_in(root))
}

#[test]
fn what_the_mount_changes_is_seen_by_full_paths_at_once() {
    let home = TestHome::new();
    let disk_with = |state: &str| {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("state"), state).unwrap();
        let image = home.beside("raw");
        let from = text(tree.path());
        let made = format!(
            "rm -f {0}; mke2fs -q -t ext4 -d {from} {0} 8M",
            text(&image)
        );
        succeed(&["bash", "-c", &made]);
        image
    };
    give_disk(&home, "web", &disk_with("old"));
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    give_disk(&home, "web", &disk_with("new"));
    std::thread::sleep(std::time::Duration::from_secs(1));
    let (live, of_snapshot) = (mount.at("web/rootfs"), mount.at("web/snapshots/s/rootfs"));
    let state = |root: &Path| look(root).1.unwrap_or_default();

    // A restore.
    assert_eq!(
        (state(&live), state(&of_snapshot)),
        ("new".into(), "old".into())
    );
    let new = home.beside("new");
    fs::copy(mount.at("web/export.boxlite"), &new).unwrap();
    let before = look(&live);
    fs::copy(
        mount.at("web/snapshots/s/export.boxlite"),
        mount.at("web/export.boxlite"),
    )
    .unwrap();
    let after = look(&live);
    assert_eq!(after.1.as_deref(), Some("old"));
    assert_ne!(after.0, before.0);

    // A snapshot in place of another.
    fs::remove_dir(mount.at("web/snapshots/s")).unwrap();
    assert!(fs::metadata(of_snapshot.join(".")).is_err());
    fs::copy(&new, mount.at("web/export.boxlite")).unwrap();
    assert_eq!(state(&live), "new");
    mount.snapshot("web", "s").unwrap();
    assert_eq!(state(&of_snapshot), "new");

    // A snapshot that takes the name of another.
    fs::copy(mount.at("web/export.boxlite"), home.beside("kept")).unwrap();
    mount.snapshot("web", "t").unwrap();
    state(&mount.at("web/snapshots/t/rootfs"));
    fs::rename(mount.at("web/snapshots/t"), mount.at("web/snapshots/u")).unwrap();
    assert!(fs::metadata(mount.at("web/snapshots/t/rootfs/.")).is_err());
    assert_eq!(state(&mount.at("web/snapshots/u/rootfs")), "new");

    // A box that takes the name of another.
    fs::copy(home.beside("kept"), mount.at("other.boxlite")).unwrap();
    give_disk(&home, "other", &disk_with("other"));
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!(state(&mount.at("other/rootfs")), "other");
    assert_eq!(state(&live), "new");
    fs::rename(mount.at("web"), mount.at("elsewhere")).unwrap();
    fs::rename(mount.at("other"), mount.at("web")).unwrap();
    assert_eq!(state(&live), "other");
    assert_eq!(state(&mount.at("elsewhere/rootfs")), "new");

    // A box in place of one that was removed.
    fs::remove_dir_all(mount.at("web")).unwrap();
    fs::rename(mount.at("elsewhere"), mount.at("web")).unwrap();
    assert_eq!(state(&live), "new");
    mount.unmount();
    home.assert_whole();
}
