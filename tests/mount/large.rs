//! A large home, in which a scan of all files takes too long to wait for. Test builds take from the
//! environment how many files that is.

use std::fs;
use std::path::Path;

use crate::common::*;

const LARGE: (&str, &str) = ("BOXLITEFS_MOST_AT_ONCE", "0");

fn mount(home: &TestHome) -> Mounted {
    home.mount_with(&[], &[LARGE])
}

fn bases(home: &TestHome) -> Vec<String> {
    names_in(&home.root().join("bases"))
}

/// A home whose box has a snapshot, and has changed since.
fn with_snapshot() -> TestHome {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"changed");
    mount.unmount();
    home
}

fn restore(mount: &Mounted, snapshot: &str) {
    let export = |path: &str| mount.at(path).join("export.boxlite");
    succeed(&[
        "cp",
        text(&export(&format!("web/snapshots/{snapshot}"))),
        text(&export("web")),
    ]);
}

#[test]
fn layers_that_a_restore_or_a_removal_leaves_are_freed_behind() {
    let home = TestHome::new();
    home.wheel_batch(&[
        &["snapshot-create", "web", "start"],
        &["clone", "web", "gone"],
        &["remove", "gone"],
    ]);
    let made_by_boxlite = bases(&home);
    assert_eq!(made_by_boxlite.len(), 1);
    let mount = mount(&home);
    restore(&mount, "start");
    eventually("BoxLite's base is freed", || {
        !bases(&home).contains(&made_by_boxlite[0])
    });
    home.assert_whole();
    let live = digest(&home.live_disk("web"));
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"the box's own");
    mount.snapshot("web", "b").unwrap();
    mount.copy("web", "copy");
    restore(&mount, "a");
    mount.remove_snapshot("web", "b").unwrap();
    succeed(&["rm", "-r", text(&mount.at("copy"))]);
    eventually("the layer of b is freed", || bases(&home).len() == 1);
    assert_eq!(digest(&home.live_disk("web")), live);
    home.assert_whole();
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    eventually("all layers are freed", || bases(&home).is_empty());
    home.assert_whole();
}

#[test]
fn a_layer_in_use_stays_when_one_of_its_readers_goes() {
    let home = with_snapshot();
    let mount = mount(&home);
    mount.copy("web/snapshots/a", "copy");
    home.wheel(&["clone", "web", "theirs"]);
    let first = digest(&home.live_disk("copy"));
    let live = digest(&home.live_disk("theirs"));
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    mount.unmount();
    assert_eq!(digest(&home.live_disk("theirs")), live);
    assert_eq!(digest(&home.live_disk("copy")), first);
    home.assert_whole();
    home.wheel(&["remove", "theirs"]);
    assert_eq!(digest(&home.live_disk("copy")), first);
}

#[test]
fn what_is_left_is_freed_when_the_mount_ends() {
    let home = with_snapshot();
    let mount = mount(&home);
    mount.remove_snapshot("web", "a").unwrap();
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    mount.unmount();
    assert_eq!(bases(&home), [""; 0]);
    home.assert_whole();
}

#[test]
fn what_is_left_is_freed_by_the_next_mount_if_this_one_is_killed() {
    for point in ["unfreed.taken", "unfreed.dropped", "free.unlinked"] {
        let home = with_snapshot();
        let live = digest(&home.snapshot_disk("web", "a"));
        let mut mount = home.mount_with(&[], &[LARGE, ("BOXLITEFS_CRASH_AT", point)]);
        mount.snapshot("web", "b").unwrap();
        home.guest_write("web", FREE_AREA, b"more");
        let then = bases(&home).len();
        mount.remove_snapshot("web", "b").unwrap();
        let export = |path: &str| mount.at(path).join("export.boxlite");
        // The mount may be killed before or after it has restored the box.
        run(&["cp", text(&export("web/snapshots/a")), text(&export("web"))]);
        eventually("the mount is killed", || mount.has_crashed());
        drop(mount);
        let mount = home.mount();
        restore(&mount, "a");
        assert_eq!(digest(&home.live_disk("web")), live, "{point}");
        mount.unmount();
        assert!(bases(&home).len() < then, "{point}");
        home.assert_whole();
    }
}

#[test]
fn a_layer_inside_a_box_stays_while_a_disk_elsewhere_reads_it_against_all_rules() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "a"]);
    home.wheel(&["clone", "web", "other"]);
    let layer = home.snapshot_disk("web", "a");
    let other = home.live_disk("other");
    let overlay = |disk: &Path, on: &Path| {
        fs::remove_file(disk).unwrap();
        let mut command = vec!["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"];
        command.extend(["-b", text(on), text(disk)]);
        succeed(&command);
    };
    overlay(&other, &layer);
    let wanted = digest(&layer);
    for removed in ["web/snapshots/a", "web"] {
        let mount = mount(&home);
        if removed == "web" {
            succeed(&["rm", "-r", text(&mount.at(removed))]);
        } else {
            fs::remove_dir(mount.at(removed)).unwrap();
        }
        mount.unmount();
        assert_eq!(digest(&other), wanted, "{removed}");
    }
}

#[test]
fn a_large_home_is_recovered_behind_and_a_box_before_its_first_change() {
    for changes in [false, true] {
        let home = with_snapshot();
        let mut crashing = home.mount_crashing_at("freeze.linked");
        let live = digest(&home.live_disk("web"));
        crashing.snapshot("web", "cut-off").unwrap_err();
        assert!(crashing.has_crashed());
        drop(crashing);
        let bases_then = bases(&home);
        let mount = mount(&home);
        assert_eq!(mount.names("web/snapshots"), ["a"]);
        if changes {
            mount.snapshot("web", "b").unwrap();
            assert_eq!(digest(&home.snapshot_disk("web", "b")), live);
        } else {
            eventually("the second name is gone", || {
                bases(&home).len() < bases_then.len()
            });
        }
        assert_eq!(digest(&home.live_disk("web")), live);
        mount.unmount();
        home.assert_whole();
    }
}
