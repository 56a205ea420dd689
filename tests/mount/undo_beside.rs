//! `.boxlite/undo` where several programs work on one home: two mounts, and commands that make changes
//! themselves.

use std::fs;
use std::path::PathBuf;

use crate::common::*;

fn remove(mount: &Mounted, path: &str) {
    succeed(&["rm", "-r", text(&mount.at(path))]);
}

fn restore_archive(mount: &Mounted, name: &str) {
    let export = mount.at(name).join("export.boxlite");
    succeed(&["cp", text(&archive()), text(&export)]);
}

/// Returns the paths of all entries in a mount.
fn entries(mount: &Mounted) -> Vec<PathBuf> {
    let names = mount.names(".boxlite/undo").into_iter();
    names
        .map(|name| mount.at(".boxlite/undo").join(name))
        .collect()
}

fn only_entry(mount: &Mounted) -> PathBuf {
    let mut all = entries(mount);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

/// Runs two commands at once. Returns which of them succeeded.
fn at_once(one: &[&str], other: &[&str]) -> (bool, bool) {
    let run = |command: &[&str]| run(command).status.success();
    std::thread::scope(|threads| {
        let one = threads.spawn(|| run(one));
        let other = run(other);
        (one.join().unwrap(), other)
    })
}

// ---- two mounts -----------------------------------------------------------------------------------

#[test]
fn what_one_mount_keeps_another_shows_and_brings_back() {
    let home = TestHome::new().keep();
    let (one, other) = (home.mount(), home.mount_again(&["-o", "undo=off"], &[]));
    one.snapshot("web", "s").unwrap();
    home.guest_write("web", FREE_AREA, b"now");
    let now = digest(&home.live_disk("web"));
    // The other keeps nothing itself, and leaves what is kept.
    remove(&one, "web");
    assert_eq!(one.names(".boxlite/undo"), other.names(".boxlite/undo"));
    assert_eq!(
        archive_digest(&only_entry(&other).join("export.boxlite")),
        now
    );
    fs::rename(only_entry(&other), other.at("back")).unwrap();
    for mount in [&one, &other] {
        assert_eq!(mount.names("."), ["back"]);
        assert_eq!(mount.names(".boxlite/undo"), [""; 0]);
        assert_eq!(mount.export_digest("back/export.boxlite"), now);
    }
    restore_archive(&one, "back");
    restore_archive(&other, "back");
    assert_eq!(
        archive_digest(&only_entry(&one).join("export.boxlite")),
        now
    );
    remove(&other, "back");
    remove(
        &other,
        &format!(".boxlite/undo/{}", one.names(".boxlite/undo")[0]),
    );
    assert_eq!(entries(&one).len(), 0);
    drop((one, other));
    home.assert_whole();
    assert_eq!(home.allocated(), 0);
}

#[test]
fn an_entry_goes_when_the_time_of_its_mount_is_over_though_that_mount_was_killed() {
    let home = TestHome::new().keep();
    let mut one = home.mount_with(&["-o", "undo=2s"], &[]);
    let other = home.mount_again(&[], &[]);
    one.snapshot("web", "s").unwrap();
    one.remove_snapshot("web", "s").unwrap();
    succeed(&["kill", "-KILL", &one.process().to_string()]);
    assert!(one.has_crashed());
    restore_archive(&other, "web");
    // Its own stays.
    eventually("the entry is gone", || entries(&other).len() == 1);
    assert!(only_entry(&other).to_str().unwrap().ends_with("Z-web"));
    drop((one, other));
    home.assert_whole_once_mounted();
}

#[test]
fn of_two_mounts_that_bring_back_or_end_one_entry_at_once_one_does_it() {
    let home = TestHome::new().keep();
    let (one, other) = (home.mount(), home.mount_again(&[], &[]));
    one.snapshot("web", "s").unwrap();
    home.guest_write("web", FREE_AREA, b"now");
    let now = digest(&home.live_disk("web"));
    for round in 0..8 {
        let name = one.names(".").remove(0);
        remove(if round % 2 == 0 { &one } else { &other }, &name);
        let (here, there) = (only_entry(&one), only_entry(&other));
        let (here_to, there_to) = (one.at("here"), other.at("there"));
        let bring = ["mv", "-T", text(&here), text(&here_to)];
        let did = match round % 4 {
            3 => at_once(&bring, &["rm", "-r", text(&there)]),
            _ => at_once(&bring, &["mv", "-T", text(&there), text(&there_to)]),
        };
        // rm does not mind what another has taken away.
        let is_right = did.0 ^ did.1 || (round % 4 == 3 && did.0);
        assert!(is_right, "round {round}: {did:?}\n{}", one.log());
        assert_eq!(entries(&one).len(), 0);
        if !did.0 && round % 4 == 3 {
            assert_eq!(one.names("."), [""; 0]);
            succeed(&["cp", text(&archive()), text(&one.at("new.boxlite"))]);
            home.guest_write("new", FREE_AREA, b"now");
        }
        let back = one.names(".");
        assert_eq!(back.len(), 1);
        assert_eq!(back, other.names("."));
        assert_eq!(digest(&home.live_disk(&back[0])), now, "round {round}");
    }
    drop((one, other));
    home.assert_whole();
}

#[test]
fn one_mount_goes_on_where_another_was_killed_at_any_step_of_keeping() {
    let restore = "cp \"$ARCHIVE\" web/export.boxlite";
    for (point, command) in [
        ("undo.recorded", restore),
        ("undo.linked", restore),
        ("undo.placed", restore),
        ("undo.linked", "rm -r web"),
        ("undo.placed", "rm -r web"),
        (
            "undo.unrecorded",
            "cp -r web new && rm -r new && rm -r .boxlite/undo/*",
        ),
        ("undo.box-back", "rm -r web && mv .boxlite/undo/* web"),
    ] {
        let home = TestHome::new().keep();
        let other = home.mount_again(&[], &[]);
        let mut one = home.mount_crashing_at(point);
        home.guest_write("web", FREE_AREA, b"now");
        let now = digest(&home.live_disk("web"));
        let in_mount = format!("cd \"$MNT\" && {command}");
        let environment = [("MNT", one.root()), ("ARCHIVE", &archive())];
        let ended = script(&in_mount, &environment).output().unwrap();
        assert!(!ended.status.success(), "{command}");
        assert!(one.has_crashed(), "{point}");
        // The next change of the box recovers it.
        other.snapshot("web", "s").unwrap();
        assert_eq!(digest(&home.snapshot_disk("web", "s")), now, "{point}");
        assert_eq!(entries(&other).len(), 0, "{point}");
        remove(&other, "web");
        let export = only_entry(&other).join("snapshots/s/export.boxlite");
        assert_eq!(archive_digest(&export), now, "{point}");
        remove(
            &other,
            &format!(".boxlite/undo/{}", other.names(".boxlite/undo")[0]),
        );
        drop((one, other));
        home.assert_whole_once_mounted();
        assert_eq!(home.allocated(), 0, "{point}");
    }
}

// ---- commands -------------------------------------------------------------------------------------

fn prune(home: &TestHome, arguments: &[&str]) {
    let mut command = vec![binary(), "prune", "--keep-last", "1"];
    command.extend(arguments);
    command.extend(["--home", text(home.root()), "web"]);
    succeed(&command);
}

#[test]
fn what_prune_deletes_can_be_had_back_though_nothing_is_mounted() {
    let home = TestHome::new().keep();
    let mount = home.mount();
    for name in ["a", "b"] {
        home.guest_write("web", FREE_AREA, name.as_bytes());
        mount.snapshot("web", name).unwrap();
    }
    let state = digest(&home.snapshot_disk("web", "a"));
    mount.unmount();
    prune(&home, &[]);
    let mount = home.mount();
    assert_eq!(mount.names("web/snapshots"), ["b"]);
    let entry = only_entry(&mount);
    assert!(entry.to_str().unwrap().ends_with("Z-web-a"));
    fs::rename(entry, mount.at("web/snapshots/c")).unwrap();
    assert_eq!(digest(&home.snapshot_disk("web", "c")), state);
    prune(&home, &["--undo", "off"]);
    assert_eq!(mount.names("web/snapshots"), ["b"]);
    assert_eq!(entries(&mount).len(), 0);
    drop(mount);
    home.assert_whole_once_mounted();
    let said = fail(&[
        binary(),
        "prune",
        "--undo",
        "soon",
        "--keep-last",
        "1",
        "web",
    ]);
    assert!(said.contains("a time such as 30m"), "{said}");
}

#[test]
fn compacting_frees_what_was_kept_until_now() {
    let home = TestHome::new();
    let mount = home.mount();
    for name in ["a", "b"] {
        home.guest_write("web", FREE_AREA, name.as_bytes());
        mount.snapshot("web", name).unwrap();
    }
    mount.unmount();
    prune(&home, &["--undo", "1s"]);
    let undo = home.root().join(".boxlitefs/undo");
    assert_eq!(names_in(&undo).len(), 1);
    eventually("its time is over", || {
        let (status, said) = home.compact();
        assert_eq!(status, 0, "{said}");
        names_in(&undo).is_empty()
    });
    home.assert_whole();
}
