//! Exit status 0 means success: data that would not be kept is refused, every process sees a new
//! box as one box, and no source is lost. The judges are the programs that people use.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::common::*;

/// Makes a home whose box `web` has a snapshot `s` that differs from its live disk, a mount of it,
/// and a backup.
fn home_and_backup() -> (TestHome, Mounted, PathBuf) {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    (home, mount, backup)
}

/// Runs a script with the mountpoint in $M and the backup in $BK.
fn shell(mount: &Mounted, backup: &Path, command: &str) -> Output {
    script(command, &[("M", mount.root()), ("BK", backup)])
        .output()
        .expect("a shell")
}

fn done(mount: &Mounted, backup: &Path, command: &str) {
    let output = shell(mount, backup, command);
    assert!(
        output.status.success(),
        "{command}: {output:?}\n{}",
        mount.log()
    );
}

fn refused(mount: &Mounted, backup: &Path, command: &str) -> String {
    let output = shell(mount, backup, command);
    assert!(
        !output.status.success(),
        "{command}: {output:?}\n{}",
        mount.log()
    );
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_ordinary_directory_is_refused_and_stays_where_it_was() {
    let (home, mount, backup) = home_and_backup();
    let precious = home.beside("precious");
    fs::create_dir_all(precious.join("deep/er")).unwrap();
    fs::write(precious.join("notes.txt"), "mine").unwrap();
    fs::write(precious.join("deep/er/more.txt"), "mine as well").unwrap();
    let home_dir = precious.parent().unwrap();
    for command in [
        "mv precious $M/",
        "cp -r precious $M/",
        "rsync -a precious $M/",
    ] {
        let said = refused(
            &mount,
            &backup,
            &format!("cd {}; {command}", text(home_dir)),
        );
        assert!(
            said.contains("Operation not permitted"),
            "{command}: {said}"
        );
        assert_eq!(
            fs::read_to_string(precious.join("notes.txt")).unwrap(),
            "mine"
        );
        assert!(precious.join("deep/er/more.txt").exists(), "{command}");
        eventually("nothing of it is left", || mount.names("") == ["web"]);
    }
    assert!(mount.log().contains("notes.txt would not be kept"));
    home.assert_whole();
}

#[test]
fn what_is_no_part_of_a_backup_is_refused_when_it_is_made() {
    let (home, mount, backup) = home_and_backup();
    for (name, command) in [
        (
            "notes",
            "mkdir $M/n1; cp $BK/export.boxlite $M/n1/; echo x > $M/n1/notes.txt",
        ),
        ("rootfs", "mkdir $M/n2 && mkdir $M/n2/rootfs"),
        ("disk.img", "mkdir $M/n3 && echo x > $M/n3/disk.img"),
        (
            "disk.img in bytes",
            "mkdir $M/n4 && cp $BK/export.boxlite $M/n4/disk.img",
        ),
        (
            "a strange box.json",
            "mkdir $M/n5 && echo '{\"a\": 1}' > $M/n5/box.json",
        ),
        (
            "a text as box.json",
            "mkdir $M/n6 && echo notes > $M/n6/box.json",
        ),
        (
            "a strange link",
            "mkdir $M/n7 && ln -s /etc/passwd $M/n7/rootfs",
        ),
        (
            "half a box.json",
            "mkdir $M/n8 && head -c 100 $BK/box.json > $M/n8/box.json",
        ),
        (
            "links followed",
            "rm -rf w; mkdir w; cp -rL $M/web/snapshots w/ 2>/dev/null; cp -r w/snapshots/s $M/n9",
        ),
    ] {
        let command = format!("cd {}; {command}", text(backup.parent().unwrap()));
        refused(&mount, &backup, &command);
        assert!(
            mount.log().contains("refused") || name.contains("json"),
            "{name}: {}",
            mount.log()
        );
    }
    assert!(mount.log().contains("copy without following links"));
    home.assert_whole();
}

#[test]
fn a_box_that_was_copied_is_a_box_to_the_process_that_copied_it() {
    let (home, mount, backup) = home_and_backup();
    let live = digest(&home.live_disk("web"));
    let then = digest(&home.snapshot_disk("web", "s"));
    let mut program = Process::start(&mount);
    let copy = format!(
        "shutil.copytree({:?}, m + 'new', symlinks=True)",
        text(&backup)
    );
    program.does(&copy);
    assert_eq!(program.names("new"), BOX_FILES);
    program.does("len(open(m + 'new/export.boxlite', 'rb').read())");
    program.does("os.mkdir(m + 'new/snapshots/first')");
    assert_eq!(program.names("new/snapshots/first"), SNAPSHOT_FILES);
    assert_eq!(digest(&home.live_disk("new")), live);
    assert_eq!(digest(&home.snapshot_disk("new", "first")), live);
    assert_eq!(digest(&home.snapshot_disk("new", "s")), then);
    // Small files that file managers and servers leave in a box do not undo it.
    for name in [".DS_Store", "notes.txt", ".directory"] {
        let put = format!("open(m + 'new/snapshots/first/{name}', 'wb')");
        assert_eq!(program.fails(&put), libc::EPERM);
    }
    assert_eq!(digest(&home.snapshot_disk("new", "first")), live);
    done(
        &mount,
        &backup,
        "mkdir $M/n3; { cat $BK/export.boxlite; } > $M/n3/export.boxlite; mkdir $M/n3/snapshots/s",
    );
    assert_eq!(digest(&home.snapshot_disk("n3", "s")), live);
    drop(program);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_snapshot_that_is_copied_into_a_box_arrives_as_what_it_is() {
    let (home, mount, backup) = home_and_backup();
    let then = digest(&home.snapshot_disk("web", "s"));
    mount.remove_snapshot("web", "s").unwrap();
    for (number, command) in [
        "cp -r $BK/snapshots/s $M/web/snapshots/N",
        "cp -rn $BK/snapshots/s $M/web/snapshots/N",
        "cp -a $BK/snapshots/s $M/web/snapshots/N",
        "rsync -a $BK/snapshots/s/ $M/web/snapshots/N",
        "rsync -r --ignore-existing $BK/snapshots/s/ $M/web/snapshots/N",
        "rsync -ru $BK/snapshots/s/ $M/web/snapshots/N",
        "mkdir $BK/snapshots/N; cp -a $BK/snapshots/s/. $BK/snapshots/N; tar c -C $BK/snapshots N | tar x --skip-old-files -C $M/web/snapshots",
        "mv -n $BK/snapshots/N $M/web/snapshots/M",
        "busybox cp -r $BK/snapshots/s $M/web/snapshots/N",
        "python3 -c \"import shutil, sys; shutil.copytree('$BK/snapshots/s', '$M/web/snapshots/N', symlinks=True)\"",
    ]
    .into_iter()
    .enumerate()
    {
        // `mv` moves what the command before it made.
        let name = format!("n{}", number - usize::from(command.contains("mv ")));
        let to = format!("m{number}");
        let command = command.replace("/N", &format!("/{name}")).replace("/M", &format!("/{to}"));
        let command = command.replace("s N ", &format!("s {name} "));
        if command.contains("copytree") {
            // The live disk must still have the state that the snapshot is to have.
            mount.snapshot("web", "just-now").unwrap();
        }
        done(&mount, &backup, &command);
        let arrived = if command.contains("mv ") { &to } else { &name };
        assert_eq!(digest(&home.snapshot_disk("web", arrived)), then, "{command}");
        assert_eq!(mount.names(format!("web/snapshots/{arrived}")), SNAPSHOT_FILES);
    }
    assert!(!backup.join("snapshots/n6").exists(), "it was moved");
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_copy_that_is_stopped_for_a_while_goes_on_with_what_it_meant() {
    let (home, mount, backup) = home_and_backup();
    let then = digest(&home.snapshot_disk("web", "s"));
    for number in 0..12 {
        succeed(&[
            "cp",
            "-r",
            text(&backup.join("snapshots/s")),
            text(&backup.join(format!("snapshots/s{number}"))),
        ]);
    }
    let new = mount.at("new");
    let mut copy = Command::new("cp")
        .args(["-r", text(&backup), text(&new)])
        .spawn()
        .unwrap();
    eventually("some of it is there", || {
        new.join("snapshots").exists() && !mount.names("new/snapshots").is_empty()
    });
    stop_for(&copy, 3);
    assert!(copy.wait().unwrap().success(), "{}", mount.log());
    assert_eq!(mount.names("new/snapshots").len(), 13);
    for name in mount.names("new/snapshots") {
        assert_eq!(digest(&home.snapshot_disk("new", &name)), then, "{name}");
    }
    mount.unmount();
    home.assert_whole();
}

/// Stops a process and resumes it after some seconds, in which its unfinished work could be
/// mistaken for something else.
fn stop_for(process: &Child, seconds: u64) {
    let pid = process.id().to_string();
    succeed(&["kill", "-STOP", &pid]);
    std::thread::sleep(std::time::Duration::from_secs(seconds));
    succeed(&["kill", "-CONT", &pid]);
}

#[test]
fn a_process_that_cannot_be_told_from_others_is_refused_and_hides_nothing() {
    let home = TestHome::new();
    home.mount().snapshot("web", "s").unwrap();
    let mountpoint = home.beside("mnt").canonicalize().unwrap();
    // The process is in another pid namespace, so the mount cannot identify any caller.
    let mut server = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", binary(), "mount", "-f"])
        .args([home.root(), &mountpoint])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let web = mountpoint.join("web");
    eventually("it serves", || web.exists());
    let said = fail(&["rm", text(&web.join("box.json"))]);
    assert!(said.contains("Operation not permitted"), "{said}");
    assert!(web.join("box.json").exists());
    let said = fail(&["rm", "-r", text(&web)]);
    assert!(said.contains("Operation not permitted"), "{said}");
    assert_eq!(names_in(&web), BOX_FILES);
    assert_eq!(names_in(&web.join("snapshots")), ["s"]);
    // It may be about to copy a snapshot; a tool that skips existing files would leave today's
    // state in its place.
    let said = fail(&["mkdir", text(&web.join("snapshots/t"))]);
    assert!(said.contains("Operation not permitted"), "{said}");
    assert_eq!(names_in(&web.join("snapshots")), ["s"]);
    // It may be mv, which removes the directory that it is about to replace.
    let other = home.beside("other/s");
    fs::create_dir_all(&other).unwrap();
    for command in [
        &["rmdir", text(&web.join("snapshots/s"))][..],
        &["mv", text(&other), text(&web.join("snapshots"))],
    ] {
        fail(command);
        assert_eq!(names_in(&web.join("snapshots")), ["s"], "{command:?}");
    }
    let listed = home.wheel(&["snapshot-list", "web"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
    unmount(&mountpoint);
    server.wait().unwrap();
    home.assert_whole();
}

#[test]
fn a_box_is_not_removed_while_an_archive_is_written_over_its_disk() {
    let (home, mount, backup) = home_and_backup();
    let mut writer = Process::start(&mount);
    writer.does("globals().update(f=open(m + 'web/export.boxlite', 'wb', 0)) or f.write(b'')");
    let written = format!(
        "f.write(open({:?}, 'rb').read(300000))",
        text(&backup.join("export.boxlite"))
    );
    writer.does(&written);
    let said = refused(&mount, &backup, "rm -r $M/web");
    assert!(said.contains("busy"), "{said}");
    assert_eq!(mount.names("web"), BOX_FILES);
    assert_eq!(mount.names("web/snapshots"), ["s"]);
    drop(writer);
    eventually("it can be removed", || {
        shell(&mount, &backup, "ls $M/web && sleep 2.1 && rm -r $M/web")
            .status
            .success()
    });
    assert_eq!(mount.names(""), [""; 0]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn names_created_without_contents_leave_nothing() {
    let (home, mount, backup) = home_and_backup();
    refused(&mount, &backup, "cp -rs $BK $M/new");
    eventually("links leave nothing", || mount.names("") == ["web"]);
    shell(
        &mount,
        &backup,
        "rm -rf $BK/snapshots; cp -r --attributes-only $BK $M/new",
    );
    eventually("attributes alone leave nothing", || {
        mount.names("") == ["web"]
    });
    mount.unmount();
    home.assert_whole();
}

#[test]
fn options_that_need_other_names_are_refused_before_anything_is_changed() {
    let (home, mount, backup) = home_and_backup();
    let before = home.kept();
    for command in [
        "rsync -a --delay-updates --partial-dir=aside $BK/ $M/new",
        "cp --backup $BK/export.boxlite $M/web/export.boxlite",
        "rsync -b -c $BK/export.boxlite $M/web/snapshots/s/export.boxlite",
    ] {
        refused(&mount, &backup, command);
        eventually("nothing of it is left", || mount.names("") == ["web"]);
        assert_eq!(home.kept(), before, "{command}\n{}", mount.log());
    }
    mount.unmount();
    home.assert_whole();
}

#[test]
fn copying_snapshots_into_a_box_imports_nothing_else() {
    let (home, mount, backup) = home_and_backup();
    mount.remove_snapshot("web", "s").unwrap();
    home.guest_write("web", FREE_AREA, b"since");
    let live = digest(&home.live_disk("web"));
    let sources = home.beside("sources");
    for command in [
        "rsync -r --no-links --delay-updates --remove-source-files $BK/ $M/web",
        "rsync -r --no-links --remove-source-files $BK/ $M/web",
        "rsync -r --no-links --inplace --remove-source-files $BK/ $M/web",
        "mv $BK/snapshots $BK/box.json $M/web/",
        "mv $BK/snapshots $BK/box.json $BK/export.boxlite $M/web/",
        "cp -r $BK/snapshots $BK/box.json $M/web/",
        "tar c -C $BK snapshots box.json | tar x -C $M/web",
    ] {
        let _ = fs::remove_dir_all(&sources);
        succeed(&["cp", "-r", text(&backup), text(&sources)]);
        // rsync takes files of the same size and time to be equal.
        for name in ["box.json", "export.boxlite"] {
            succeed(&["touch", "-d", "yesterday", text(&sources.join(name))]);
        }
        refused(&mount, &sources, command);
        assert_eq!(
            digest(&home.live_disk("web")),
            live,
            "{command}\n{}",
            mount.log()
        );
        assert!(sources.join("box.json").exists(), "{command}");
        assert!(sources.join("export.boxlite").exists(), "{command}");
        succeed(&[
            "find",
            text(&mount.at("web/snapshots")),
            "-mindepth",
            "1",
            "-maxdepth",
            "1",
            "-exec",
            "rm",
            "-r",
            "{}",
            "+",
        ]);
    }
    mount.unmount();
    home.assert_whole();
}

/// Defines DAEMON, an rsync daemon on a pipe that serves $M as the module `m`, and SERVER, an rsync
/// server whose options are not visible on its command line.
const RSYNCS: &str = r#"
    printf '[m]\npath = %s\nread only = no\nuse chroot = no\nuid = 0\ngid = 0\n' "$M" > "$BK.conf"
    daemon() { rsync -a --delay-updates --rsh="sh -c 'exec rsync --server --daemon --config=$BK.conf .'" "$1" "x::m/$2"; }
    hidden() { rsync -a -s --delay-updates --rsh="sh -c 'shift; exec \"\$@\"' -" "$1" "x:$M/$2"; }
    partial() { rsync -a -s --delay-updates --partial-dir=.aside --rsh="sh -c 'shift; exec \"\$@\"' -" "$1" "x:$M/$2"; }
    local_() { rsync -a --delay-updates "$1" "$M/$2"; }
"#;

#[test]
fn rsync_may_put_files_aside_until_all_have_come() {
    let (home, mount, backup) = home_and_backup();
    let live = digest(&home.live_disk("web"));
    let then = digest(&home.snapshot_disk("web", "s"));
    for how in ["local_", "hidden", "daemon", "partial"] {
        let run = |command: &str| done(&mount, &backup, &format!("{RSYNCS}\n{command}"));
        run(&format!("{how} $BK/ {how}"));
        assert_eq!(mount.names(how), BOX_FILES, "{how}");
        assert_eq!(digest(&home.live_disk(how)), live, "{how}");
        assert_eq!(digest(&home.snapshot_disk(how, "s")), then, "{how}");
        assert_eq!(
            home.wheel(&["snapshot-list", how])[0]["created_at"],
            home.wheel(&["snapshot-list", "web"])[0]["created_at"],
            "{how}"
        );
        // One archive to the root, and one over the disk of a box.
        run(&format!(
            "mkdir -p $BK.d && cp $BK/snapshots/s/export.boxlite $BK.d/{how}2.boxlite && \
             {how} $BK.d/{how}2.boxlite ''"
        ));
        assert_eq!(digest(&home.live_disk(&format!("{how}2"))), then, "{how}");
        run(&format!(
            "cp $BK/snapshots/s/export.boxlite $BK.d/ && touch -d tomorrow $BK.d/export.boxlite && \
             {how} $BK.d/export.boxlite {how}/"
        ));
        assert_eq!(digest(&home.live_disk(how)), then, "{how}");
    }
    // The leftovers of a killed transfer are visible, and disappear with the unfinished box.
    done(
        &mount,
        &backup,
        "python3 -c \"
import os, shutil
os.makedirs('$M/cut/snapshots/s/.~tmp~')
shutil.copy('$BK/export.boxlite', '$M/cut/snapshots/s/.~tmp~/export.boxlite')\"",
    );
    assert_eq!(mount.names("cut/snapshots/s"), [".~tmp~"]);
    assert_eq!(mount.names("cut/snapshots/s/.~tmp~"), ["export.boxlite"]);
    refused(&mount, &backup, "rmdir $M/cut/snapshots/s/.~tmp~");
    done(&mount, &backup, "rm -r $M/cut");
    assert!(mount.names("").iter().all(|name| !name.starts_with('.')));
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_archive_may_come_from_several_programs_and_under_any_name_that_uploads_have() {
    let (home, mount, backup) = home_and_backup();
    let live = digest(&home.live_disk("web"));
    let long = "l".repeat(240);
    let upload = |name: &str, to: &str| {
        format!(
            "python3 -c \"import os, shutil; shutil.copyfile('$BK/export.boxlite', '$M/{name}'); \
             os.rename('$M/{name}', '$M/{to}.boxlite')\""
        )
    };
    for (name, command) in [
        ("turns", "cd $BK; head -c 400000 export.boxlite > a; tail -c +400001 export.boxlite > b; { cat a; cat b; } > $M/turns.boxlite || true".to_owned()),
        ("packed", "zstd -q -c $BK/export.boxlite > $M/packed.boxlite.zst".to_owned()),
        ("win", upload("win.boxlite.filepart", "win")),
        ("sync", upload(".syncthing.sync.boxlite.tmp", "sync")),
        ("browser", upload("browser.boxlite.crdownload", "browser")),
        (&long, format!("rsync $BK/export.boxlite $M/{long}.boxlite")),
    ] {
        done(&mount, &backup, &command);
        assert_eq!(digest(&home.live_disk(name)), live, "{command}");
    }
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_archive_that_was_taken_waits_for_its_box_whatever_else_is_refused() {
    let (home, mount, backup) = home_and_backup();
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    for (name, refusal) in [
        ("a", "touch $M/a/notes.txt"),
        (
            "b",
            "head -c 50000 $BK/export.boxlite > $BK/cut; mv $BK/cut $M/b/export.boxlite",
        ),
        (
            "c",
            "mkdir $M/c/snapshots/t && head -c 50000 $BK/export.boxlite > $M/c/snapshots/t/export.boxlite",
        ),
    ] {
        let begin = format!(
            "mkdir -p $M/{name}/snapshots/s && cp $BK/snapshots/s/export.boxlite $BK/moved && \
             mv $BK/moved $M/{name}/snapshots/s/export.boxlite"
        );
        done(&mount, &backup, &begin);
        refused(&mount, &backup, refusal);
        assert_eq!(
            mount.names(format!("{name}/snapshots/s")),
            ["export.boxlite"],
            "{name}"
        );
        let time = || {
            let export = mount.at(format!("{name}/snapshots/s/export.boxlite"));
            let meta = fs::metadata(export).ok()?;
            meta.modified().ok()
        };
        let shown = time();
        let end = format!("cp $BK/export.boxlite $M/{name}/export.boxlite");
        done(&mount, &backup, &end);
        eventually("it has its snapshot, and what was refused is gone", || {
            mount.names(format!("{name}/snapshots")) == ["s"]
        });
        assert_eq!(digest(&home.snapshot_disk(name, "s")), of_snapshot);
        // rclone reads a file again if its time has changed.
        assert_eq!(time(), shown);
    }
    mount.unmount();
    home.assert_whole();
}

#[test]
fn archives_that_still_wait_when_the_mount_ends_are_boxes_of_their_own() {
    let (home, mount, backup) = home_and_backup();
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    let live = digest(&home.live_disk("web"));
    done(&mount, &backup, "mkdir $M/new && mv $BK/snapshots $M/new/");
    done(
        &mount,
        &backup,
        "cat $BK/export.boxlite > $M/web/.export.boxlite.AbCdEf",
    );
    done(&mount, &backup, "mv $BK/export.boxlite $M/up.boxlite.part");
    // This includes copies made inside the mount, even though their source still exists.
    done(
        &mount,
        &backup,
        "mkdir -p $M/inner/snapshots && cp -r $M/web/snapshots/s $M/inner/snapshots/ && \
         cp $M/web/export.boxlite $M/later.boxlite.part",
    );
    // An archive that waits in a box is visible there under its own name.
    eventually("it waits", || {
        mount
            .names("web")
            .contains(&".export.boxlite.AbCdEf".to_owned())
    });
    assert_eq!(
        mount.names(""),
        [
            "inner",
            "later.boxlite.part",
            "new",
            "up.boxlite.part",
            "web"
        ]
    );
    mount.unmount();
    let mount = home.mount();
    assert_eq!(
        mount.names(""),
        ["inner-s", "later", "new-s", "up", "web", "web-2"]
    );
    assert_eq!(digest(&home.live_disk("inner-s")), of_snapshot);
    assert_eq!(digest(&home.live_disk("later")), live);
    assert_eq!(digest(&home.live_disk("web-2")), live);
    assert_eq!(digest(&home.live_disk("new-s")), of_snapshot);
    assert_eq!(digest(&home.live_disk("up")), live);
    drop(mount);
    home.assert_whole();
    assert_eq!(home.wheel(&["list"]).as_array().map(Vec::len), Some(6));
}

#[test]
fn a_whole_archive_under_a_temporary_name_waits_for_its_name() {
    let (home, mount, backup) = home_and_backup();
    let live = digest(&home.live_disk("web"));
    for (number, name) in ["p.boxlite.part", "p.boxlite.crdownload", ".p.boxlite.tmp"]
        .into_iter()
        .enumerate()
    {
        done(&mount, &backup, &format!("cp $BK/export.boxlite $M/{name}"));
        assert!(mount.at(name).exists(), "{name}");
        let named = format!("mv $M/{name} $M/p{number}.boxlite");
        done(&mount, &backup, &named);
        assert_eq!(digest(&home.live_disk(&format!("p{number}"))), live);
    }
    done(
        &mount,
        &backup,
        "cp $BK/export.boxlite $M/gone.boxlite.part; rm $M/gone.boxlite.part",
    );
    assert_eq!(mount.names(""), ["p0", "p1", "p2", "web"]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn in_a_box_being_made_no_rename_loses_what_was_taken() {
    let (home, mount, backup) = home_and_backup();
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    let live = digest(&home.live_disk("web"));
    done(
        &mount,
        &backup,
        "mkdir -p $M/n/snapshots/a $M/n/snapshots/b; cp $BK/snapshots/s/export.boxlite $M/n/snapshots/a/; \
         cp $BK/export.boxlite $M/n/snapshots/b/",
    );
    for (command, errno) in [
        (
            "mv -T $M/n/snapshots/a $M/n/snapshots/b",
            "Directory not empty",
        ),
        (
            "mv $M/n/snapshots/a $M/n/snapshots/.before",
            "Operation not permitted",
        ),
        ("mv $M/n/snapshots/a $M/n/", "Operation not permitted"),
        ("mv $M/n $M/.n", "Operation not permitted"),
    ] {
        let said = refused(&mount, &backup, command);
        assert!(said.contains(errno), "{command}: {said}");
    }
    done(
        &mount,
        &backup,
        "mv $M/n/snapshots/a $M/n/snapshots/c; cp $BK/export.boxlite $M/n/",
    );
    assert_eq!(mount.names("n/snapshots"), ["b", "c"]);
    assert_eq!(digest(&home.snapshot_disk("n", "b")), live);
    assert_eq!(digest(&home.snapshot_disk("n", "c")), of_snapshot);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn the_maker_of_a_box_can_rename_its_snapshots() {
    let (home, mount, backup) = home_and_backup();
    done(
        &mount,
        &backup,
        "python3 -c \"import os, shutil; shutil.copytree('$BK', '$M/new', symlinks=True); \
         os.rename('$M/new/snapshots/s', '$M/new/snapshots/renamed')\"",
    );
    assert_eq!(mount.names("new/snapshots"), ["renamed"]);
    mount.unmount();
    assert_eq!(home.wheel(&["snapshot-list", "new"])[0]["name"], "renamed");
    home.assert_whole();
}

#[test]
fn a_snapshot_whose_export_was_left_is_not_removed() {
    let (home, mount, backup) = home_and_backup();
    fs::create_dir(backup.join("s")).unwrap();
    let before = home.kept();
    for command in [
        "mv -f $BK/snapshots/s $M/web/snapshots/",
        "mv $BK/s $M/web/snapshots/",
        "find $M/web/snapshots/s ! -name export.boxlite -delete",
        "printf 'y\\ny\\nn\\ny\\ny\\ny\\ny\\ny\\n' | rm -ri $M/web/snapshots/s; test ! -e $M/web/snapshots/s",
    ] {
        refused(&mount, &backup, command);
        assert_eq!(home.kept(), before, "{command}\n{}", mount.log());
        assert!(
            backup.join("snapshots/s/export.boxlite").exists(),
            "{command}"
        );
    }
    mount.remove_snapshot("web", "s").unwrap();
    assert_eq!(mount.names("web/snapshots"), [""; 0]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn imports_that_cannot_succeed_are_refused_at_their_first_step() {
    let (home, mount, backup) = home_and_backup();
    mount.unmount();
    let mount = home.mount_with(&["-o", "exclusive"], &[]);
    let boxlite = home.hold();
    for command in [
        "cat $BK/export.boxlite > $M/x.boxlite",
        "mkdir $M/new",
        "mv $BK/export.boxlite $M/y.boxlite",
    ] {
        let said = refused(&mount, &backup, command);
        assert!(said.contains("busy"), "{command}: {said}");
        assert_eq!(mount.names(""), ["web"]);
    }
    drop(boxlite);
    done(&mount, &backup, "mv $BK/export.boxlite $M/y.boxlite");
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_file_that_is_only_a_hole_is_no_archive() {
    let (home, mount, backup) = home_and_backup();
    let before = home.kept();
    for command in [
        "truncate -s 593920 $BK/hole; cp --sparse=always $BK/hole $M/h.boxlite",
        "truncate -s 593920 $M/h.boxlite",
        "truncate -s 593920 $M/web/export.boxlite",
    ] {
        refused(&mount, &backup, command);
        eventually("nothing of it is left", || mount.names("") == ["web"]);
        eventually("nothing is changed", || home.kept() == before);
    }
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_snapshot_that_could_not_be_made_with_its_box_waits_until_it_can() {
    let home = TestHome::new();
    let disk = SmallDisk::under(&home, FileSystem::Ext4, "64M");
    let (mount, backup) = mount_and_backup(&home);
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    let mut has_waited = false;
    let mut has_removed = false;
    // With some number of free inodes in this range there is room for the box but not for a
    // snapshot.
    for left in 2..12 {
        let begin = "mkdir -p $M/n/snapshots/{a,b} && cp $BK/snapshots/s/export.boxlite $M/n/snapshots/a/ && \
                     cp $BK/snapshots/s/export.boxlite $M/n/snapshots/b/";
        done(&mount, &backup, begin);
        let filler = disk.root().join("names");
        fs::create_dir(&filler).unwrap();
        take_inodes(disk.root(), &filler, left);
        let is_made = shell(&mount, &backup, "cp $BK/export.boxlite $M/n/")
            .status
            .success();
        fs::remove_dir_all(&filler).unwrap();
        if !is_made {
            // Nothing is lost: now the box is made, or as many snapshots as there is room for.
            if mount.at("n/box.json").exists() {
                has_waited = true;
                let made = made_snapshots(&home, "n");
                if made == 0 && !has_removed {
                    // Removing one of those that wait does not take the other one along.
                    has_removed = true;
                    done(
                        &mount,
                        &backup,
                        "rm $M/n/snapshots/a/export.boxlite; touch $M/n/snapshots/b/export.boxlite; true",
                    );
                    assert_eq!(digest(&home.snapshot_disk("n", "b")), of_snapshot);
                    done(&mount, &backup, "cp -r $BK/snapshots/s $M/n/snapshots/a");
                }
                // An existing snapshot cannot be touched.
                shell(&mount, &backup, "touch $M/n/snapshots/*/export.boxlite");
            } else {
                done(&mount, &backup, "cp $BK/export.boxlite $M/n/");
            }
        }
        assert_eq!(
            mount.names("n/snapshots"),
            ["a", "b"],
            "{left} were free\n{}",
            mount.log()
        );
        for snapshot in ["a", "b"] {
            assert_eq!(digest(&home.snapshot_disk("n", snapshot)), of_snapshot);
        }
        done(&mount, &backup, "rm -r $M/n");
    }
    assert!(
        has_waited && has_removed,
        "the box always came with its snapshots, or not at all"
    );
    mount.unmount();
    home.assert_whole();
}

/// Returns how many snapshots of a box have rows.
fn made_snapshots(home: &TestHome, name: &str) -> u32 {
    let count = "SELECT count(*) FROM snapshot WHERE box_id = ?1";
    let count = home
        .database()
        .query_row(count, [home.id(name)], |row| row.get(0));
    count.unwrap()
}

/// Creates files until the file system has only `left` free inodes.
fn take_inodes(root: &Path, filler: &Path, left: u64) {
    let free = || rustix::fs::statvfs(root).unwrap().f_ffree;
    for number in 0.. {
        if free() <= left {
            return;
        }
        fs::File::create(filler.join(number.to_string())).unwrap();
    }
}

#[test]
fn a_snapshot_that_is_moved_to_a_box_being_made_is_kept_until_that_is_there() {
    let (home, mount, backup) = home_and_backup();
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    let said = refused(
        &mount,
        &backup,
        "mkdir -p $M/n/snapshots && mv $M/web/snapshots/s $M/n/snapshots/",
    );
    assert!(said.contains("busy"), "{said}");
    assert_eq!(digest(&home.snapshot_disk("web", "s")), of_snapshot);
    done(&mount, &backup, "cp $M/web/export.boxlite $M/n/");
    assert_eq!(digest(&home.snapshot_disk("n", "s")), of_snapshot);
    mount.remove_snapshot("web", "s").unwrap();
    mount.unmount();
    home.assert_whole();
}

#[test]
fn the_description_of_a_snapshot_that_did_not_come_stays_until_it_is_removed() {
    let (home, mount, backup) = home_and_backup();
    fs::remove_file(backup.join("snapshots/s/export.boxlite")).unwrap();
    done(&mount, &backup, "mv $BK/snapshots/s $M/web/snapshots/j");
    let left = mount.names("web/snapshots/j");
    assert!(left.contains(&"snapshot.json".to_owned()), "{left:?}");
    done(
        &mount,
        &backup,
        "cp $M/web/snapshots/s/export.boxlite $M/web/snapshots/j/",
    );
    assert_eq!(
        digest(&home.snapshot_disk("web", "j")),
        digest(&home.snapshot_disk("web", "s"))
    );
    mount.unmount();
    home.assert_whole();
}

#[test]
fn what_a_shell_was_refused_hides_nothing_from_its_programs() {
    let (home, mount, backup) = home_and_backup();
    let before = (
        digest(&home.live_disk("web")),
        digest(&home.snapshot_disk("web", "s")),
    );
    // Each begins with a refused redirection of the shell itself.
    for (number, (refused, then)) in [
        (
            "echo x > $M/web/box.json",
            "! cp -f $BK/snapshots/s/export.boxlite $M/web/snapshots/s/export.boxlite",
        ),
        (
            "echo x > $M/web/snapshots/s/export.boxlite",
            "rm -f $M/web/snapshots/s/export.boxlite",
        ),
        ("echo x > $M/web/box.json", "! rm -r $M/web/*"),
        ("echo x > $M/web/box.json", "rm -f $M/web/export.boxlite"),
        (
            "echo x > $M/web/box.json",
            "! cp -f $BK/box.json $M/web/box.json",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        if !mount.at("web/snapshots/s").exists() {
            // The third removes it, as it says.
            let put_back =
                "mkdir $M/web/snapshots/s && cp $BK/snapshots/s/export.boxlite $M/web/snapshots/s/";
            done(&mount, &backup, put_back);
        }
        let out = home.beside(&format!("out{number}"));
        fs::create_dir(&out).unwrap();
        let moved = format!(
            "{{ {refused}; }} 2> /dev/null; {then}; ls $M/web $M/web/snapshots/*; \
             cp -r $M/web {0}/copy && cp -r $M/web $M/copy && mv $M/web {0}/",
            text(&out)
        );
        let output = shell(&mount, &backup, &moved);
        for (name, is_there) in [("copy", true), ("web", !mount.at("web").exists())] {
            if !is_there {
                continue;
            }
            let at = out.join(name);
            let said = format!("{moved}: {output:?}\n{}", mount.log());
            assert_eq!(
                archive_digest(&at.join("export.boxlite")),
                before.0,
                "{name} {said}"
            );
            let of_snapshot = at.join("snapshots/s/export.boxlite");
            if number != 2 {
                assert_eq!(archive_digest(&of_snapshot), before.1, "{name} {said}");
            }
        }
        let copied = mount.export_digest("copy/export.boxlite");
        assert_eq!(copied, before.0);
        succeed(&["rm", "-r", text(&mount.at("copy"))]);
        if !mount.at("web").exists() {
            succeed(&["cp", "-r", text(&backup), text(&mount.at("web"))]);
        }
    }
    // Nor is anything else refused to them.
    let begin = "{ echo x > $M/web/box.json; } 2> /dev/null;";
    for command in [
        "cp $M/web/snapshots/s/export.boxlite $M/web/export.boxlite",
        "mkdir $M/web/snapshots/new",
        "rmdir $M/web/snapshots/new",
    ] {
        done(&mount, &backup, &format!("{begin} {command}"));
    }
}

#[test]
fn an_archive_that_has_become_a_box_is_named_after_it_and_goes_with_it() {
    let (home, mount, backup) = home_and_backup();
    let python = |code: &str| {
        let script = format!(
            "python3 -c \"import os, shutil; M = os.environ['M']; B = os.environ['BK'] + '/export.boxlite'\n{code}\""
        );
        shell(&mount, &backup, &script)
    };
    let live = digest(&home.live_disk("web"));
    // A file that gets its final name after it was written.
    let output = python(
        "shutil.copyfile(B, M + '/new.tmp.boxlite'); os.replace(M + '/new.tmp.boxlite', M + '/new.boxlite')",
    );
    assert!(output.status.success(), "{output:?}");
    assert_eq!(mount.names(""), ["new", "web"]);
    assert_eq!(digest(&home.live_disk("new")), live);
    let output = python(
        "shutil.copyfile(B, M + '/a.tmp.boxlite'); os.replace(M + '/a.tmp.boxlite', M + '/new.boxlite')",
    );
    assert!(!output.status.success(), "{output:?}");
    assert_eq!(mount.names(""), ["a.tmp", "new", "web"]);
    let output = python("shutil.copyfile(B, M + '/b.boxlite'); os.remove(M + '/b.boxlite')");
    assert!(!output.status.success(), "{output:?}");
    assert!(mount.at("b").is_dir());
    // The same name again, when the box is gone.
    let output = python(
        "for _ in range(3): shutil.copyfile(B, M + '/again.boxlite'); shutil.rmtree(M + '/again')",
    );
    assert!(output.status.success(), "{output:?}\n{}", mount.log());
    assert!(!mount.at("again").exists());

    // A shell that redirects writes the archive; the programs that it runs did not.
    for command in ["mv $M/x.boxlite $M/y.boxlite", "rm $M/x.boxlite"] {
        let script = format!(
            "{{ cat $BK/export.boxlite; }} > $M/x.boxlite; test -d $M/x && ! {command} && rm -r $M/x"
        );
        done(&mount, &backup, &script);
    }
    let script = "{ cat $BK/export.boxlite; } > $M/x.boxlite; rm -r $M/x; cp -p $BK/export.boxlite $BK/s; \
                  rsync -a --size-only --remove-source-files $BK/s $M/x.boxlite; test -d $M/x && ! test -e $BK/s";
    done(&mount, &backup, script);
}

#[test]
fn a_box_is_not_removed_while_a_file_of_a_snapshot_is_left() {
    let (home, mount, backup) = home_and_backup();
    let before = home.kept();
    for command in [
        "find $M/web ! -path '*/s/export.boxlite' -delete",
        "find $M/web ! -path '*/s/*' -delete",
        "tar cf x.tar --remove-files -C $M --exclude=web/snapshots/s/export.boxlite web",
    ] {
        let command = format!("cd $BK && {command}");
        refused(&mount, &backup, &command);
        assert_eq!(home.kept(), before, "{command}\n{}", mount.log());
    }
    assert!(mount.log().contains("snapshot s is not empty"));
    done(&mount, &backup, "rm -r $M/web");
    assert_eq!(mount.names(""), [""; 0]);
    mount.unmount();
    home.assert_whole();
}

/// A program that reads the export of the box, waits until it may go on, and removes the box by the
/// names it knows: as mv does, which first copies everything.
const COPIES_AND_REMOVES: &str = "
import os, sys
box = sys.argv[1]
reads = sys.argv[2] == 'reads'
if reads:
    open(box + '/export.boxlite', 'rb').read(1)
else:
    os.unlink(box + '/box.json')
print('begun', flush=True)
sys.stdin.readline()
if reads:
    os.unlink(box + '/box.json')
for name in ('export.boxlite', 'export.boxlite.zst', 'disk.img', 'rootfs'):
    os.unlink(box + '/' + name)
for snapshot in os.listdir(box + '/snapshots'):
    directory = box + '/snapshots/' + snapshot
    for name in os.listdir(directory):
        os.unlink(directory + '/' + name)
    os.rmdir(directory)
os.rmdir(box + '/snapshots')
os.rmdir(box)
";

#[test]
fn what_changes_in_a_box_after_it_was_copied_is_not_removed_with_it() {
    for begins_by in ["reads", "removes"] {
        for change in ["guest", "snapshot", "rename"] {
            let (home, mount, _) = home_and_backup();
            let mut remover = Command::new("python3")
                .args(["-c", COPIES_AND_REMOVES, text(&mount.at("web")), begins_by])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut said = String::new();
            BufReader::new(remover.stdout.as_mut().unwrap())
                .read_line(&mut said)
                .unwrap();
            assert_eq!(said, "begun\n");
            match change {
                "guest" => home.guest_write("web", FREE_AREA, b"precious"),
                "snapshot" => mount.snapshot("web", "precious").map(drop).unwrap(),
                _ => {
                    let at = |name| mount.at(format!("web/snapshots/{name}"));
                    fs::rename(at("s"), at("precious")).unwrap();
                }
            }
            let before = home.kept();
            remover.stdin.take().unwrap().write_all(b"\n").unwrap();
            let output = remover.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("not empty"), "{begins_by} {change}: {said}");
            assert_eq!(home.kept(), before, "{begins_by} {change}");
            mount.unmount();
            home.assert_whole();
        }
    }
}

#[test]
fn a_mover_under_another_name_leaves_what_it_does_not_bring() {
    let (home, mount, backup) = home_and_backup();
    home.guest_write("web", FREE_AREA, b"since then");
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    for (name, command) in [
        ("g", "ln -s $(command -v mv) gmv && ./gmv -n"),
        ("z", "exec -a zmv mv -n"),
        (
            "loader",
            "$(ls /lib64/ld-linux-*.so.* | head -n 1) $(command -v mv) -n",
        ),
    ] {
        let command =
            format!("cd $BK && cp -r snapshots/s {name} && {command} {name} $M/web/snapshots/");
        done(&mount, &backup, &command);
        assert_eq!(
            digest(&home.snapshot_disk("web", name)),
            of_snapshot,
            "{name}\n{}",
            mount.log()
        );
    }
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_snapshot_that_did_not_come_does_not_stand_in_the_way_of_the_next_backup() {
    let (home, mount, backup) = home_and_backup();
    done(
        &mount,
        &backup,
        "cp -r $BK/snapshots/s $BK/cut && truncate -s 40000 $BK/cut/export.boxlite && mkdir $BK/moved && \
         cp $BK/snapshots/s/snapshot.json $BK/moved/ && cp -r $BK/moved $BK/described",
    );
    refused(&mount, &backup, "cp -r $BK/cut $M/web/snapshots/");
    done(&mount, &backup, "cp -r $BK/described $M/web/snapshots/");
    eventually("only what was made is listed", || {
        mount.names("web/snapshots") == ["s"]
    });
    // mv has removed its source: what it brought stays, and can be read.
    done(&mount, &backup, "mv $BK/moved $M/web/snapshots/");
    assert_eq!(
        fs::read(mount.at("web/snapshots/moved/snapshot.json")).unwrap(),
        fs::read(backup.join("snapshots/s/snapshot.json")).unwrap()
    );
    done(
        &mount,
        &backup,
        "cp -r $M/web $BK/nightly && tar cf $BK/nightly.tar -C $M web",
    );
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_archive_whose_name_was_taken_while_it_was_written_waits_for_another() {
    let (home, mount, backup) = home_and_backup();
    let archive = fs::read(backup.join("export.boxlite")).unwrap();
    let mut file = File::create(mount.at("new.boxlite")).unwrap();
    file.write_all(&archive).unwrap();
    fs::rename(mount.at("web"), mount.at("new")).unwrap();
    drop(file);
    eventually("the log says that it waits", || {
        mount.log().contains("new.boxlite waits")
    });
    fs::rename(mount.at("new.boxlite"), mount.at("other.boxlite")).unwrap();
    eventually("it is a box", || {
        mount.names("").contains(&"other".to_owned())
    });
    mount.unmount();
    home.assert_whole();
}

#[test]
fn what_comes_through_a_pipe_waits_though_the_pipe_is_not_the_input() {
    let (home, mount, backup) = home_and_backup();
    done(
        &mount,
        &backup,
        "cp -r $BK/snapshots $BK/parts && head -c 40000 $BK/export.boxlite > $BK/cut",
    );
    let command = "mkdir $M/new $BK/all && mv $BK/parts $BK/all/snapshots && mv $BK/cut $BK/all/export.boxlite && \
                   tar xf <(tar c --remove-files -C $BK/all .) -C $M/new";
    refused(&mount, &backup, command);
    assert!(!backup.join("all/snapshots/s/export.boxlite").exists());
    done(&mount, &backup, "cp $BK/export.boxlite $M/new/");
    eventually("its snapshot is there", || {
        mount.names("new/snapshots") == ["s"]
    });
    mount.unmount();
    home.assert_whole();
}
