//! Waiting archives: a mount is killed or loses power while an archive waits for its box or its
//! final name. Such an archive must not be lost, because close(2) has confirmed it to the copying
//! program, which may have removed its source.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::common::*;
use super::contents::{Boxes, contents};
use super::files::Files;
use super::record::{Flushes, Left, after_power_loss};
use super::server::FaultyDisk;

/// Makes a home whose box `web` has a snapshot `s` that differs from the live disk, and a backup of
/// the box.
fn home_and_backup() -> (TestHome, PathBuf) {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    mount.unmount();
    (home, backup)
}

/// Runs a script with $M, the mountpoint, and $BK, the backup. Returns whether it succeeded.
fn shell(mount: &Mounted, backup: &Path, command: &str) -> bool {
    let mut shell = script(command, &[("M", mount.root()), ("BK", backup)]);
    shell.output().expect("a shell").status.success()
}

/// Kills the process that serves a mount.
fn kill(mut mount: Mounted) {
    succeed(&["kill", "-KILL", &mount.process().to_string()]);
    assert!(mount.has_crashed());
}

/// Moves the backup's archive to a temporary name in a mount and kills the mount. The archive waits
/// to become the box `up`.
fn leave_waiting(home: &TestHome, backup: &Path) {
    let mount = home.mount();
    let moved = "mv $BK/export.boxlite $M/up.boxlite.part";
    assert!(shell(&mount, backup, moved));
    kill(mount);
}

/// Mounts and unmounts the home; returns its contents afterwards.
fn after_a_mount(home: &TestHome) -> Boxes {
    home.mount().unmount();
    home.assert_whole();
    contents(home)
}

#[test]
fn archives_that_wait_outlive_a_mount_that_is_killed() {
    let (home, backup) = home_and_backup();
    let mut wanted = contents(&home);
    let web = wanted["web"].clone();
    let mount = home.mount();
    assert!(shell(
        &mount,
        &backup,
        "mkdir $M/first && mv $BK/snapshots $M/first/ && mv $BK/export.boxlite $M/first.boxlite.part"
    ));
    // The mount must record the new names.
    assert!(shell(
        &mount,
        &backup,
        "mv $M/first $M/new && mv $M/first.boxlite.part $M/up.boxlite.part"
    ));
    kill(mount);
    let (status, said) = home.check();
    assert_eq!(status, 1, "{said}");
    for name in ["new-s", "up"] {
        assert!(said.contains(&format!("the archive {name} in ")), "{said}");
    }
    for (name, digest) in [("new-s", &web.snapshots["s"]), ("up", &web.live)] {
        let mut made = web.clone();
        made.live = digest.clone();
        made.snapshots.clear();
        wanted.insert(name.to_owned(), made);
    }
    for _ in 0..2 {
        assert_eq!(after_a_mount(&home), wanted);
    }
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}");
}

#[test]
fn an_archive_that_waits_is_one_box_or_snapshot_wherever_the_mount_is_killed() {
    let (home, backup) = home_and_backup();
    let then = contents(&home)["web"].snapshots["s"].clone();
    home.put_aside("before");
    let sources = home.beside("sources");
    for point in [
        "waiting.noted",
        "import.built",
        "install.renamed",
        "install.recorded",
        "import.snapshot",
        "snapshot.recorded",
    ] {
        home.put_back("before");
        let _ = std::fs::remove_dir_all(&sources);
        succeed(&["cp", "-r", text(&backup), text(&sources)]);
        let mut mount = home.mount_crashing_at(point);
        let was_moved = shell(&mount, &sources, "mkdir $M/new && mv $BK/snapshots $M/new/");
        shell(&mount, &sources, "mv $BK/export.boxlite $M/new/");
        assert!(mount.has_crashed(), "never reached {point}");
        drop(mount);

        let boxes = after_a_mount(&home);

        let has_it = |name: &str, snapshot: &str| match boxes.get(name) {
            Some(made) if snapshot.is_empty() => made.live == then,
            Some(made) => made.snapshots.get(snapshot) == Some(&then),
            None => false,
        };
        let arrived = usize::from(has_it("new-s", "")) + usize::from(has_it("new", "s"));
        let is_there = sources.join("snapshots/s/export.boxlite").exists();
        assert!(
            arrived == 1 || (arrived == 0 && is_there),
            "{point}: {boxes:?}"
        );
        assert_eq!(is_there, !was_moved, "{point}");
        assert_eq!(after_a_mount(&home), boxes, "{point}");
    }
}

#[test]
fn a_waiting_archive_becomes_one_box_wherever_its_import_is_killed() {
    let (home, backup) = home_and_backup();
    let live = contents(&home)["web"].live.clone();
    leave_waiting(&home, &backup);
    home.put_aside("waiting");
    for point in ["import.built", "install.renamed", "install.recorded"] {
        home.put_back("waiting");
        let said = home.compact_crashing_at(point);
        assert!(said.is_none(), "never reached {point}: {said:?}");

        let boxes = after_a_mount(&home);

        let names: Vec<&String> = boxes.keys().collect();
        assert_eq!(names, ["up", "web"], "{point}");
        assert_eq!(boxes["up"].live, live, "{point}");
    }
}

#[test]
fn concurrent_mounts_make_one_box_of_a_waiting_archive() {
    let (home, backup) = home_and_backup();
    leave_waiting(&home, &backup);
    let others: Vec<_> = ["a", "b", "c"]
        .map(|name| {
            let mountpoint = home.beside(name);
            std::fs::create_dir(&mountpoint).unwrap();
            mountpoint
        })
        .into_iter()
        .collect();
    std::thread::scope(|scope| {
        for mountpoint in &others {
            scope.spawn(|| succeed(&[binary(), "mount", text(home.root()), text(mountpoint)]));
        }
    });
    others.iter().for_each(|mountpoint| unmount(mountpoint));
    assert_eq!(contents(&home).keys().collect::<Vec<_>>(), ["up", "web"]);
    home.assert_whole();
}

#[test]
fn a_waiting_archive_is_kept_until_it_can_become_a_box() {
    let (home, backup) = home_and_backup();
    leave_waiting(&home, &backup);
    let database = home.database();
    let refuse = "CREATE TRIGGER full BEFORE INSERT ON box_config
        BEGIN SELECT RAISE(ABORT, 'no room'); END";
    database.execute_batch(refuse).unwrap();
    let mount = home.mount();
    assert!(
        mount.log().contains("waits for the next mount"),
        "{}",
        mount.log()
    );
    database.execute_batch("DROP TRIGGER full").unwrap();
    mount.unmount();
    let boxes = after_a_mount(&home);
    assert_eq!(boxes.keys().collect::<Vec<_>>(), ["up", "web"]);
}

#[test]
fn an_archive_that_waits_outlives_a_loss_of_power() {
    let (home, backup) = home_and_backup();
    let live = contents(&home)["web"].live.clone();
    let before = Files::load(home.root());
    let disk = FaultyDisk::mount(home.root(), before.clone());
    let mount = home.mount();
    assert!(shell(
        &mount,
        &backup,
        "mv $BK/export.boxlite $M/up.boxlite.part"
    ));
    let answered = disk.calls_so_far();
    kill(mount);
    let calls = disk.calls();
    drop(disk);

    let mut seen = HashSet::new();
    let mut dice = Dice::of(seed("power loss while an archive waits"), "waiting");
    let mut tally = Tally::default();
    let most = how_many(12, 40, 400);
    let unanswered = (0..most).map(|_| dice.below(answered as u64) as usize);
    let moments: Vec<usize> = unanswered.chain([answered, calls.len()]).collect();
    for after in moments {
        for mut left in [Left::Nothing, Left::Names, Left::Contents, Left::All] {
            let files = after_power_loss(&before, &calls[..after], &mut left, Flushes::Count);
            if !seen.insert(files.fingerprint()) {
                continue;
            }
            tally.operations += 1;
            tally.faults += 1;
            files.store(home.root());
            let boxes = after_a_mount(&home);
            tally.compared += boxes.len();
            let up = boxes.get("up").map(|up| up.live.as_str());
            let is_right = match up {
                Some(digest) => digest == live,
                None => after < answered,
            };
            if !is_right || !boxes.contains_key("web") {
                tally
                    .losses
                    .push(format!("after call {after}, {left:?}: {boxes:?}"));
            }
        }
    }
    tally.finish("power lost while an archive waits");
}
