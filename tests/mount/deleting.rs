//! Deleting by hand removes a whole box or nothing, even if it stops half-way, and never affects
//! what other boxes share with it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::*;

/// Everything in a box with the snapshot `s`, except its directories.
const UNLINK_ALL: &str = "[os.unlink(m + 'web/' + name) for name in \
    ['box.json', 'export.boxlite', 'export.boxlite.zst', 'rootfs', 'disk.img'] + \
    ['snapshots/s/' + name for name in \
    ['snapshot.json', 'export.boxlite', 'export.boxlite.zst', 'rootfs', 'disk.img']]]";

/// Makes a home whose box `web` has a snapshot `s` that differs from its live disk.
fn home_with_snapshot() -> TestHome {
    let home = TestHome::new();
    home.guest_write("web", FREE_AREA, b"at the snapshot");
    home.wheel(&["snapshot-create", "web", "s"]);
    home.guest_write("web", FREE_AREA, b"after it");
    home
}

/// Maps every live disk and snapshot to the digest of what its guest sees.
fn states(home: &TestHome) -> BTreeMap<String, String> {
    let database = home.database();
    let mut states = BTreeMap::new();
    let mut rows = database
        .prepare(
            "SELECT b.name, s.name FROM box_config b LEFT JOIN snapshot s ON s.box_id = b.id \
             UNION SELECT name, NULL FROM box_config",
        )
        .expect("rows");
    let rows = rows.query_map([], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?))
    });
    for (name, snapshot) in rows.expect("rows").map(|row| row.expect("a row")) {
        let (key, image) = match snapshot {
            None => (name.clone(), home.live_disk(&name)),
            Some(s) => (format!("{name}@{s}"), home.snapshot_disk(&name, &s)),
        };
        states.insert(key, digest(&image));
    }
    states
}

/// Asserts that every process sees all of `web`, unchanged.
fn assert_web_is_back(home: &TestHome, mount: &Mounted, before: &BTreeMap<String, String>) {
    let mut passer_by = Process::start(mount);
    assert_eq!(passer_by.names(""), ["web"]);
    assert_eq!(passer_by.names("web"), BOX_FILES);
    assert_eq!(passer_by.names("web/snapshots"), ["s"]);
    assert_eq!(passer_by.names("web/snapshots/s"), SNAPSHOT_FILES);
    passer_by.does("open(m + 'web/snapshots/s/snapshot.json').read()");
    assert_eq!(states(home), *before);
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}\n{}", mount.log());
}

fn shell(mount: &Mounted, home: &TestHome, text_of_script: &str) -> std::process::Output {
    let out = home.beside("out");
    fs::create_dir_all(&out).expect("a place outside");
    script(text_of_script, &[("MNT", mount.root()), ("OUT", &out)])
        .output()
        .expect("a shell")
}

#[test]
fn every_recursive_delete_removes_the_box_and_nothing_else() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    for tool in [
        "rm -r $MNT/NEW",
        "rm -rf $MNT/NEW/",
        "rm -rv $MNT/NEW",
        "cd $MNT && rm -r NEW",
        "printf 'y\\n%.0s' {1..20} | rm -ri $MNT/NEW",
        "busybox rm -rf $MNT/NEW",
        "find $MNT/NEW -delete",
        "find $MNT/NEW -depth -exec rm -d {} +",
        "rm $MNT/NEW/{box.json,export.*} $MNT/NEW/snapshots/s/*; rmdir $MNT/NEW/snapshots/s; rm -r $MNT/NEW",
        "python3 -c \"import shutil; shutil.rmtree('$MNT/NEW')\"",
        "python3 -c \"import os, pathlib; p = pathlib.Path('$MNT/NEW'); [f.unlink() if f.is_symlink() or f.is_file() else f.rmdir() for f in sorted(p.rglob('*'), reverse=True)]; p.rmdir()\"",
        "perl -e 'use File::Path; File::Path::remove_tree(\"$ENV{MNT}/NEW\"); exit -e \"$ENV{MNT}/NEW\"'",
    ] {
        mount.copy("web", "new");
        let output = shell(&mount, &home, &tool.replace("NEW", "new"));
        assert!(
            output.status.success(),
            "{tool}: {output:?}\n{}",
            mount.log()
        );
        assert_eq!(mount.names(""), ["web"], "{tool}\n{}", mount.log());
        assert_eq!(states(&home), before, "{tool}");
    }
    mount.unmount();
    assert_eq!(home.wheel(&["list"]).as_array().map(Vec::len), Some(1));
    home.assert_whole();
}

#[test]
fn a_name_is_free_again_at_once_also_for_who_deleted_it() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let wanted = mount.export_digest("web/export.boxlite");
    let mut process = Process::start(&mount);
    process.does("shutil.copytree(m + 'web', '/dev/shm/kept-' + str(os.getpid()), symlinks=True)");
    process.does("os.chdir(m + 'web/snapshots/s')");
    for _ in 0..3 {
        process.does("shutil.rmtree(m + 'web')");
        assert_eq!(process.names(""), [""; 0]);
        process
            .does("shutil.copytree('/dev/shm/kept-' + str(os.getpid()), m + 'web', symlinks=True)");
        eventually("its maker sees a whole box", || {
            process.names("web") == BOX_FILES
        });
        let export = mount.export_digest("web/export.boxlite");
        assert_eq!(export, wanted, "{}", mount.log());
        assert_eq!(process.names("web/snapshots"), ["s"]);
    }
    process.does("os.chdir('/')");
    process.does("shutil.rmtree('/dev/shm/kept-' + str(os.getpid()))");
    drop(process);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn unlinking_box_json_alone_deletes_nothing_and_is_invisible_to_others() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    succeed(&["rm", text(&mount.at("web/box.json"))]);
    assert_web_is_back(&home, &mount, &before);
    // The process that unlinked it keeps seeing the file as gone; no other process does.
    let mut process = Process::start(&mount);
    process.does("os.unlink(m + 'web/box.json')");
    assert_eq!(process.names("web"), BOX_FILES[1..]);
    assert_eq!(process.fails("os.stat(m + 'web/box.json')"), libc::ENOENT);
    assert_eq!(process.fails("os.unlink(m + 'web/box.json')"), libc::ENOENT);
    assert_eq!(process.fails("os.rmdir(m + 'web')"), libc::ENOTEMPTY);
    assert_web_is_back(&home, &mount, &before);
    // Other processes can work with the box while one process deletes it.
    let mut other = Process::start(&mount);
    other.does("os.mkdir(m + 'web/snapshots/other')");
    other.does("os.rmdir(m + 'web/snapshots/other')");
    drop((process, other));
    assert_web_is_back(&home, &mount, &before);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn deleting_a_box_may_start_with_its_empty_snapshots() {
    let home = home_with_snapshot();
    let mount = home.mount();
    mount.copy("web", "new");
    mount.remove_snapshot("new", "s").unwrap();
    let before = states(&home);
    let mut process = Process::start(&mount);
    // Removing the empty `snapshots` alone deletes nothing.
    process.does("os.rmdir(m + 'new/snapshots')");
    assert!(!process.names("new").contains(&"snapshots".to_owned()));
    assert!(mount.names("new").contains(&"snapshots".to_owned()));
    process.does("os.mkdir(m + 'new/snapshots')");
    process.does("os.mkdir(m + 'new/snapshots/again')");
    process.does("os.rmdir(m + 'new/snapshots/again')");
    assert_eq!(states(&home), before);
    // In the order in which Thunar deletes.
    for name in [
        "snapshots",
        "rootfs",
        "export.boxlite.zst",
        "export.boxlite",
        "disk.img",
        "box.json",
    ] {
        let remove = if name == "snapshots" {
            "rmdir"
        } else {
            "unlink"
        };
        process.does(&format!("os.{remove}(m + 'new/{name}')"));
    }
    process.does("os.rmdir(m + 'new')");
    assert_eq!(mount.names(""), ["web"]);
    drop(process);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_deletion_that_stops_half_way_takes_nothing() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    // With everything unlinked, one step before the end.
    for last_steps in ["[]", "['snapshots/s']", "['snapshots/s', 'snapshots']"] {
        let mut process = Process::start(&mount);
        process.does(UNLINK_ALL);
        process.does(&format!(
            "[os.rmdir(m + 'web/' + name) for name in {last_steps}]"
        ));
        assert_web_is_back(&home, &mount, &before);
        process.kill();
        assert_web_is_back(&home, &mount, &before);
    }
    // rm itself, refused after some of the files.
    for yes in 1..8 {
        let script = format!("yes | head -n {yes} | rm -ri $MNT/web");
        shell(&mount, &home, &script);
        assert_web_is_back(&home, &mount, &before);
    }
    // Incomplete deletions by several processes do not add up to a complete one.
    let output = shell(
        &mount,
        &home,
        "rm $MNT/web/box.json; rm $MNT/web/export.*; rmdir $MNT/web/snapshots/s $MNT/web",
    );
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("not empty"),
        "{output:?}"
    );
    assert_eq!(
        mount.names("web/snapshots"),
        [""; 0],
        "a bare rmdir deletes"
    );
    mount.unmount();
    home.assert_whole();
}

#[test]
fn rm_that_is_killed_at_any_step_leaves_all_or_nothing() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    // Six files and three directories; the last step is the one that deletes.
    for step in 1..=9 {
        let inject = format!("--inject=unlinkat:signal=SIGKILL:when={step}");
        let web = mount.at("web");
        let output = run(&[
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=unlinkat",
            &inject,
            "rm",
            "-r",
            text(&web),
        ]);
        assert!(!output.status.success(), "{step}: {output:?}");
        if step == 9 && mount.names("").is_empty() {
            break;
        }
        assert_web_is_back(&home, &mount, &before);
    }
    if mount.at("web").exists() {
        succeed(&["rm", "-r", text(&mount.at("web"))]);
    }
    mount.unmount();
    assert_eq!(home.wheel(&["list"]).as_array().map(Vec::len), Some(0));
    home.assert_whole();
}

#[test]
fn a_snapshot_goes_without_its_box_and_all_snapshots_too() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let live = digest(&home.live_disk("web"));
    for (script, left) in [
        ("rm -rf $MNT/web/snapshots/s", &["t", "u"][..]),
        ("rm -rf $MNT/web/snapshots", &[]),
        ("rm -r $MNT/web/snapshots/*", &[]),
        ("find $MNT/web/snapshots/ -mindepth 1 -delete", &[]),
        ("busybox rm -r $MNT/web/snapshots/t", &["s", "u"]),
    ] {
        for name in ["s", "t", "u"] {
            if !mount.at("web/snapshots").join(name).exists() {
                mount.snapshot("web", name).expect("a snapshot");
            }
        }
        let output = shell(&mount, &home, script);
        assert!(
            output.status.success(),
            "{script}: {output:?}\n{}",
            mount.log()
        );
        assert_eq!(mount.names("web"), BOX_FILES, "{script}");
        assert_eq!(mount.names("web/snapshots"), left, "{script}");
        assert_eq!(digest(&home.live_disk("web")), live, "{script}");
        let (status, said) = home.check();
        assert_eq!(status, 0, "{script}: {said}");
    }
    mount.unmount();
    let listed = home.wheel(&["snapshot-list", "web"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(2));
    home.assert_whole();
}

#[test]
fn everything_in_a_box_unlinked_by_a_pattern_is_back_when_the_box_stays() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    let output = shell(&mount, &home, "rm -rf $MNT/web/*");
    assert!(output.status.success(), "{output:?}");
    assert_web_is_back(&home, &mount, &before);
    let output = shell(&mount, &home, "rm -rf $MNT/web/*; rmdir $MNT/web");
    assert!(!output.status.success());
    assert_web_is_back(&home, &mount, &before);
}

// ---- what others share with the box -------------------------------------------------------------

#[test]
fn clones_keep_their_contents_when_the_box_they_were_made_from_goes() {
    let home = home_with_snapshot();
    let mount = home.mount();
    mount.snapshot("web", "t").expect("a snapshot");
    home.guest_write("web", FREE_AREA, b"last");
    mount.copy("web", "whole");
    mount.copy("web/snapshots/s", "of-s");
    home.wheel(&["clone", "web", "by-boxlite"]);
    mount.copy("by-boxlite", "of-that");
    home.guest_write("whole", FREE_AREA + (1 << 20), b"its own");
    let mut wanted = states(&home);
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    wanted.retain(|name, _| name != "web" && !name.starts_with("web@"));
    assert_eq!(states(&home), wanted);
    home.assert_whole();
    // BoxLite's start collects what it takes to be unreferenced.
    let listed = home.wheel(&["list"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(4));
    assert_eq!(states(&home), wanted);
    // Each is removed in turn, by the mount or by BoxLite; the others stay.
    for (name, by_boxlite) in [("by-boxlite", true), ("whole", false), ("of-s", true)] {
        if by_boxlite {
            drop(home.wheel(&["remove", name]));
        } else {
            drop(succeed(&["rm", "-r", text(&mount.at(name))]));
        }
        wanted.retain(|known, _| known != name && !known.starts_with(&format!("{name}@")));
        assert_eq!(states(&home), wanted, "{name}\n{}", mount.log());
        home.wheel_batch(&[&["list"], &["snapshot-list", "of-that"]]);
        assert_eq!(states(&home), wanted, "{name}");
    }
    mount.unmount();
    home.assert_whole_once_mounted();
    let mount = home.mount();
    succeed(&["rm", "-r", text(&mount.at("of-that"))]);
    mount.unmount();
    assert_eq!(
        names_in(&home.root().join("bases")),
        [""; 0],
        "nothing is left"
    );
    home.assert_whole();
}

#[test]
fn a_snapshot_taken_while_the_box_is_deleted_keeps_it() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let mut deleting = Process::start(&mount);
    deleting.does(UNLINK_ALL);
    deleting.does("os.rmdir(m + 'web/snapshots/s')");
    let mut other = Process::start(&mount);
    other.does("os.mkdir(m + 'web/snapshots/late')");
    let before = states(&home);
    assert_eq!(
        deleting.fails("os.rmdir(m + 'web/snapshots')"),
        libc::ENOTEMPTY
    );
    assert_eq!(deleting.fails("os.rmdir(m + 'web')"), libc::ENOTEMPTY);
    deleting.kill();
    assert_eq!(other.names("web/snapshots"), ["late", "s"]);
    assert_eq!(states(&home), before);

    // One step later, when `snapshots` is already gone.
    let mut deleting = Process::start(&mount);
    deleting.does(
        "[shutil.rmtree(m + 'web/snapshots/late'), os.mkdir(m + 'web/snapshots/late')] and None",
    );
    deleting.does(UNLINK_ALL);
    let rest =
        "[os.unlink(m + 'web/snapshots/late/' + n) for n in os.listdir(m + 'web/snapshots/late')]";
    deleting.does(rest);
    deleting.does("[os.rmdir(m + 'web/snapshots' + name) for name in ['/s', '/late', '']]");
    home.wheel(&["snapshot-create", "web", "by-boxlite"]);
    eventually("BoxLite's snapshot shows", || {
        other.names("web/snapshots").len() == 3
    });
    let before = states(&home);
    assert_eq!(deleting.fails("os.rmdir(m + 'web')"), libc::ENOTEMPTY);
    deleting.kill();
    assert_eq!(other.names("web/snapshots"), ["by-boxlite", "late", "s"]);
    assert_eq!(states(&home), before);
    drop(other);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_box_that_changes_while_it_is_deleted_stays() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let steps = |deleting: &mut Process| {
        for name in [
            "box.json",
            "export.boxlite",
            "export.boxlite.zst",
            "rootfs",
            "disk.img",
        ] {
            deleting.does(&format!("os.remove(m + 'web/{name}')"));
        }
        deleting.does("[os.remove(m + 'web/snapshots/s/' + name) for name in os.listdir(m + 'web/snapshots/s')]");
        deleting.does("[os.rmdir(m + 'web/snapshots' + name) for name in ['/s', '']]");
    };
    // Its disk is changed by another mount, BoxLite or a guest.
    let mut deleting = Process::start(&mount);
    steps(&mut deleting);
    home.guest_write("web", FREE_AREA, b"meanwhile");
    assert_eq!(deleting.fails("os.rmdir(m + 'web')"), libc::ENOTEMPTY);
    drop(deleting);
    // A snapshot's name.
    let mut deleting = Process::start(&mount);
    steps(&mut deleting);
    let (from, to) = (mount.at("web/snapshots/s"), mount.at("web/snapshots/kept"));
    fs::rename(from, to).unwrap();
    assert_eq!(deleting.fails("os.rmdir(m + 'web')"), libc::ENOTEMPTY);
    drop(deleting);
    assert_eq!(mount.names("web/snapshots"), ["kept"]);
    // A process that takes a snapshot has given up deleting the box.
    let mut program = Process::start(&mount);
    program.does("os.remove(m + 'web/box.json')");
    program.does("os.mkdir(m + 'web/snapshots/new')");
    program.does("os.rmdir(m + 'web/snapshots/new')");
    assert_eq!(mount.names("web/snapshots"), ["kept"]);
    drop(program);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn two_who_delete_the_same_box_do_not_harm_anything() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    for _ in 0..5 {
        mount.copy("web", "new");
        let both = shell(
            &mount,
            &home,
            "rm -rf $MNT/new & rm -rf $MNT/new & wait -n; wait",
        );
        assert_eq!(mount.names(""), ["web"], "{both:?}\n{}", mount.log());
        assert_eq!(states(&home), before);
    }
    mount.unmount();
    home.assert_whole();
}

// ---- busy ---------------------------------------------------------------------------------------

/// A process that runs until it is dropped.
struct Living(Child);

impl Living {
    fn start() -> Living {
        let mut sleep = Command::new("sleep");
        sleep.arg("300").stdin(Stdio::null()).stdout(Stdio::null());
        Living(sleep.spawn().expect("sleep"))
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asserts that the first unlink of every tool fails because `web` is busy, and that its snapshots
/// survive.
fn assert_refused_while_busy(home: &TestHome, mount: &Mounted, before: &BTreeMap<String, String>) {
    for (tool, tells) in [
        ("rm -r $MNT/web", true),
        ("rm -rf $MNT/web", true),
        ("busybox rm -rf $MNT/web", true),
        ("find $MNT/web -delete", true),
        ("mv $MNT/web $OUT/moved-$$", true),
        (
            "gio remove $MNT/web/box.json $MNT/web/export.boxlite $MNT/web/snapshots/s $MNT/web",
            true,
        ),
        (
            "python3 -c \"import shutil; shutil.rmtree('$MNT/web', ignore_errors=True)\"",
            false,
        ),
    ] {
        let output = shell(mount, home, tool);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(!output.status.success(), tells, "{tool}: {said}");
        assert_eq!(said.contains("busy"), tells, "{tool}: {said}");
        assert_eq!(mount.names("web"), BOX_FILES, "{tool}");
        assert_eq!(mount.names("web/snapshots"), ["s"], "{tool}");
    }
    let mut process = Process::start(mount);
    assert_eq!(process.fails("os.unlink(m + 'web/box.json')"), libc::EBUSY);
    assert_eq!(
        process.names("web"),
        BOX_FILES,
        "a refused process sees everything"
    );
    process.fails("os.rmdir(m + 'web/snapshots/s')");
    assert_eq!(process.fails("os.rmdir(m + 'web')"), libc::ENOTEMPTY);
    assert_eq!(states(home), *before);
}

#[test]
fn a_box_in_use_refuses_at_the_first_file_with_its_snapshots_intact() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    {
        let machine = Living::start();
        let shim = home.box_dir("web").join("shim.pid");
        fs::write(&shim, machine.0.id().to_string()).expect("shim.pid");
        assert_refused_while_busy(&home, &mount, &before);
        fs::remove_file(&shim).expect("shim.pid goes");
    }
    {
        let _writing = File::options()
            .write(true)
            .open(home.live_disk("web"))
            .expect("the disk");
        assert_refused_while_busy(&home, &mount, &before);
    }
    assert_web_is_back(&home, &mount, &before);
    // The box is used after the first files are gone.
    let mut process = Process::start(&mount);
    process.does(UNLINK_ALL);
    process.does("[os.rmdir(m + 'web/snapshots' + name) for name in ['/s', '']]");
    {
        let _writing = File::options()
            .write(true)
            .open(home.live_disk("web"))
            .expect("the disk");
        assert_eq!(process.fails("os.rmdir(m + 'web')"), libc::EBUSY);
        assert_web_is_back(&home, &mount, &before);
    }
    // A program that has a runtime open does not use it.
    let runtime = home.hold();
    process.does("os.rmdir(m + 'web')");
    drop(runtime);
    drop(process);
    assert_eq!(mount.names(""), [""; 0]);
    mount.unmount();
    home.assert_whole();
}

// ---- moving away --------------------------------------------------------------------------------

#[test]
fn a_box_that_is_moved_away_is_there_as_a_whole_before_it_goes_here() {
    let home = home_with_snapshot();
    let mount = home.mount();
    let before = states(&home);
    // The destination has no room for the whole box.
    let output = shell(
        &mount,
        &home,
        "trap '' XFSZ; ulimit -f 600; mv $MNT/web $OUT/web",
    );
    assert!(!output.status.success(), "{output:?}");
    assert_web_is_back(&home, &mount, &before);
    let output = shell(&mount, &home, "rm -rf $OUT/web && mv $MNT/web $OUT/");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(mount.names(""), [""; 0]);
    let web: PathBuf = home.beside("out/web");
    assert_eq!(archive_digest(&web.join("export.boxlite")), before["web"]);
    let snapshot: &Path = &web.join("snapshots/s/export.boxlite");
    assert_eq!(archive_digest(snapshot), before["web@s"]);
    let output = shell(&mount, &home, "mv $OUT/web $MNT/");
    assert!(output.status.success(), "{output:?}");
    assert!(!web.exists());
    assert_eq!(states(&home), before);
    mount.unmount();
    assert_eq!(home.wheel(&["list"]).as_array().map(Vec::len), Some(1));
    home.assert_whole();
}
