//! Boxes being made: who sees what of them, who may continue them, what happens to unfinished ones,
//! and that a box stays the same directory throughout.

use std::fs;
use std::path::PathBuf;

use crate::common::*;

/// Makes a home whose box `web` has a snapshot `s` that differs from its live disk, a mount of it,
/// and a complete backup of the box.
fn home_and_backup() -> (TestHome, Mounted, PathBuf) {
    let home = TestHome::new();
    home.guest_write("web", FREE_AREA, b"at the snapshot");
    home.wheel(&["snapshot-create", "web", "s"]);
    home.guest_write("web", FREE_AREA, b"after it");
    let mount = home.mount();
    let backup = home.beside("backup");
    succeed(&["cp", "-r", text(&mount.at("web")), text(&backup)]);
    (home, mount, backup)
}

/// Asserts that a box equals `web` for every process and for BoxLite.
fn assert_is_like_web(home: &TestHome, mount: &Mounted, name: &str) {
    let mut passer_by = Process::start(mount);
    assert_eq!(passer_by.names(name), BOX_FILES, "{}", mount.log());
    assert_eq!(passer_by.names(&format!("{name}/snapshots")), ["s"]);
    let live = [home.live_disk(name), home.live_disk("web")];
    assert_eq!(digest(&live[0]), digest(&live[1]), "{name}");
    let snapshots = [
        home.snapshot_disk(name, "s"),
        home.snapshot_disk("web", "s"),
    ];
    assert_eq!(digest(&snapshots[0]), digest(&snapshots[1]), "{name}");
    let listed = home.wheel(&["snapshot-list", name]);
    assert_eq!(listed[0]["name"], "s", "{name}");
}

#[test]
fn a_file_manager_sees_what_it_copied_then_the_box_and_goes_on_with_it() {
    let (home, mount, backup) = home_and_backup();
    let mut manager = Process::start(&mount);
    let mut other = Process::start(&mount);
    let copy = format!(
        "shutil.copytree({:?}, m + 'new', symlinks=True)",
        text(&backup)
    );
    manager.does(&copy);
    // The maker reads everything it made at once; other processes see the box.
    assert_eq!(manager.names("new"), BOX_FILES);
    assert_eq!(manager.names("new/snapshots"), ["s"]);
    let size = fs::metadata(backup.join("export.boxlite"))
        .expect("it")
        .len();
    let seen = manager.does("os.stat(m + 'new/export.boxlite').st_size");
    assert_eq!(seen, size, "as long as what it wrote");
    assert_eq!(other.names("new"), BOX_FILES);
    other.does("open(m + 'new/export.boxlite', 'rb').read(1)");
    assert_is_like_web(&home, &mount, "new");
    // While the maker runs, it too sees the copy as a box: it can read, snapshot and rename it.
    let mut seen_by_manager = || {
        let read = "[os.path.exists(m + 'new/export.boxlite'), \
                    os.getxattr(m + 'new', 'user.boxlite.status').decode()]";
        manager.does(&format!("{read} if os.listxattr(m + 'new') else None"))
    };
    eventually("the maker sees a box", || {
        seen_by_manager() == serde_json::json!([true, "stopped"])
    });
    manager.does("open(m + 'new/export.boxlite', 'rb').read(1)");
    manager.does("os.mkdir(m + 'new/snapshots/later')");
    assert_eq!(other.names("new/snapshots"), ["later", "s"]);
    manager.does("os.rmdir(m + 'new/snapshots/later')");
    manager.does("os.rename(m + 'new', m + 'newer')");
    manager.does("shutil.rmtree(m + 'newer')");
    assert_eq!(other.names(""), ["web"]);
    drop((manager, other));
    mount.unmount();
    home.assert_whole();
}

#[test]
fn who_made_a_box_may_rename_and_delete_it_at_once() {
    let (home, mount, backup) = home_and_backup();
    let mut manager = Process::start(&mount);
    let copy = format!(
        "shutil.copytree({:?}, m + 'new', symlinks=True)",
        text(&backup)
    );
    manager.does(&copy);
    manager.does("os.rename(m + 'new', m + 'newer')");
    assert_is_like_web(&home, &mount, "newer");
    manager.does(&copy);
    manager.does("shutil.rmtree(m + 'new')");
    assert_eq!(manager.names(""), ["newer", "web"], "{}", mount.log());
    manager.does("shutil.rmtree(m + 'newer')");
    drop(manager);
    mount.unmount();
    assert_eq!(home.wheel(&["list"]).as_array().map(Vec::len), Some(1));
    home.assert_whole();
}

#[test]
fn all_threads_and_children_of_a_process_make_one_box_together() {
    let (home, mount, backup) = home_and_backup();
    let mut maker = Process::start(&mount);
    let mut other = Process::start(&mount);
    // One thread makes directories and others make files, all at the same time.
    let backup = format!("{:?}", text(&backup));
    maker.does("concurrent.futures.ThreadPoolExecutor(1).submit(os.makedirs, m + 'new/snapshots/s').result()");
    assert_eq!(other.fails("os.mkdir(m + 'new/mine')"), libc::EPERM);
    assert_eq!(
        other.fails("open(m + 'new/export.boxlite', 'wb')"),
        libc::EBUSY
    );
    assert_eq!(
        other.names("new"),
        ["snapshots"],
        "everybody sees what is being made"
    );
    let copies = "list(concurrent.futures.ThreadPoolExecutor(4).map(\
        lambda name: shutil.copyfile(BACKUP + '/' + name, m + 'new/' + name), \
        ['snapshots/s/export.boxlite', 'snapshots/s/snapshot.json', 'box.json', 'export.boxlite']))";
    maker.does(&copies.replace("BACKUP", &backup));
    let seen =
        "sorted(concurrent.futures.ThreadPoolExecutor(1).submit(os.listdir, m + 'new').result())";
    let made = serde_json::json!(BOX_FILES);
    assert_eq!(maker.does(seen), made, "a box, to its threads");
    let by_child = "sorted(subprocess.check_output(['ls', m + 'new'], text=True).split())";
    assert_eq!(maker.does(by_child), made, "to its children");
    assert_eq!(other.names("new"), BOX_FILES, "and to others");
    assert_is_like_web(&home, &mount, "new");
    // A child continues where its parent started.
    maker.does("os.makedirs(m + 'second')");
    let by_child =
        "subprocess.run(['cp', '-r', BACKUP + '/.', m + 'second'], check=True).returncode";
    maker.does(&by_child.replace("BACKUP", &backup));
    assert_is_like_web(&home, &mount, "second");
    drop((maker, other));
    mount.unmount();
    home.assert_whole();
}

#[test]
fn two_processes_that_a_third_began_for_share_what_is_made() {
    let (home, mount, backup) = home_and_backup();
    // Works like rsync: one process makes directories and names, its sibling writes and looks. Both
    // descend from the process that started.
    let script_of_both = r#"
import os, shutil, sys
backup, new = sys.argv[1], sys.argv[2]
os.mkdir(new)
r, w = os.pipe()
if os.fork() == 0:                      # the one that makes directories, once told
    os.read(r, 1)
    os.makedirs(new + "/snapshots/s")
    os._exit(0)
if os.fork() == 0:                      # the one that writes files
    shutil.copyfile(backup + "/export.boxlite", new + "/.export.boxlite.AbCdEf")
    os.rename(new + "/.export.boxlite.AbCdEf", new + "/export.boxlite")
    assert "box.json" in os.listdir(new), os.listdir(new)
    os.write(w, b"x")
    while not os.path.isdir(new + "/snapshots/s"):
        pass
    for name in ["snapshot.json", "export.boxlite"]:
        shutil.copyfile(f"{backup}/snapshots/s/{name}", f"{new}/snapshots/s/{name}")
    os._exit(0)
statuses = [os.wait()[1], os.wait()[1]]
sys.exit(any(statuses))
"#;
    let new = mount.at("new");
    succeed(&[
        "timeout",
        "60",
        "python3",
        "-c",
        script_of_both,
        text(&backup),
        text(&new),
    ]);
    assert_is_like_web(&home, &mount, "new");
    mount.unmount();
    home.assert_whole();
}

#[test]
fn what_a_process_left_half_way_the_next_one_finishes() {
    let (home, mount, backup) = home_and_backup();
    let backup = format!("{:?}", text(&backup));
    for (name, half) in [
        ("a", "None"),
        (
            "b",
            "[os.makedirs(m + 'b/snapshots/s'), shutil.copyfile(BACKUP + '/box.json', m + 'b/box.json')]",
        ),
        // A snapshot that arrives before its box waits for it, whichever process brings the box.
        (
            "c",
            "[os.makedirs(m + 'c/snapshots/s')] + [shutil.copyfile(BACKUP + '/snapshots/s/' + n, m + 'c/snapshots/s/' + n) for n in ['export.boxlite', 'snapshot.json']]",
        ),
        // An incomplete archive is dropped.
        (
            "d",
            "globals().update(f=open(m + 'd/export.boxlite', 'wb', 0)) or f.write(open(BACKUP + '/export.boxlite', 'rb').read(400000))",
        ),
        (
            "e",
            "globals().update(f=open(m + 'e/.export.boxlite.AbCdEf', 'wb', 0)) or f.write(open(BACKUP + '/export.boxlite', 'rb').read(400000))",
        ),
    ] {
        let mut first = Process::start(&mount);
        first.does(&format!("os.mkdir(m + {name:?})"));
        first.does(&half.replace("BACKUP", &backup));
        let mut second = Process::start(&mount);
        let copy =
            format!("shutil.copytree({backup}, m + {name:?}, symlinks=True, dirs_exist_ok=True)");
        let refused = format!("open(m + '{name}/.box.json.AbCdEf', 'wb')");
        assert_eq!(
            second.fails(&refused),
            libc::EBUSY,
            "{name}: the first lives"
        );
        first.kill();
        // The kernel closes the files of a killed process a moment after its end.
        eventually("half of an archive is gone", || {
            let left = format!("[files for _, _, files in os.walk(m + {name:?})][:1]");
            !second.does(&left).to_string().contains("export")
        });
        second.does(&copy);
        drop(second);
        assert_is_like_web(&home, &mount, name);
    }
    mount.unmount();
    assert_eq!(home.wheel(&["list"]).as_array().map(Vec::len), Some(6));
    home.assert_whole();
}

#[test]
fn killing_a_mount_drops_incomplete_imports() {
    let (home, mut mount, backup) = home_and_backup();
    // Everything except our caches and the log.
    let kept = || {
        let files = home.fingerprint();
        let lines = files
            .lines()
            .filter(|line| !line.contains("boxlitefs.db") && !line.ends_with(".boxlitefs/log"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let before = kept();
    let backup = format!("{:?}", text(&backup));
    let mut maker = Process::start(&mount);
    maker.does("os.makedirs(m + 'new/snapshots/s')");
    let half = "exec(\"w = open(m + 'new/snapshots/s/export.boxlite', 'wb', 0); w.write(open(BACKUP + '/snapshots/s/export.boxlite', 'rb').read()[:400000])\", globals())";
    maker.does(&half.replace("BACKUP", &backup.replace('"', "'")));
    assert_eq!(maker.names("new/snapshots/s"), ["export.boxlite"]);
    succeed(&["kill", "-KILL", &mount.process().to_string()]);
    assert_eq!(mount.ended_by(), Some(libc::SIGKILL));
    drop(maker);
    drop(mount);
    let mount = home.mount();
    assert_eq!(mount.names(""), ["web"]);
    assert_eq!(kept(), before);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_directory_being_made_is_the_same_directory_when_it_is_a_box() {
    let (home, mount, backup) = home_and_backup();
    let backup = format!("{:?}", text(&backup));
    let mut maker = Process::start(&mount);
    let mut inside = Process::start(&mount);
    let mut below = Process::start(&mount);
    maker.does("os.makedirs(m + 'new/snapshots/s')");
    inside.does("os.chdir(m + 'new')");
    below.does("os.chdir(m + 'new/snapshots/s')");
    maker.does("os.chdir(m + 'new/snapshots')");
    let inodes =
        "[os.stat(m + name).st_ino for name in ['new', 'new/snapshots', 'new/snapshots/s']]";
    let before = maker.does(inodes);
    let copy = "shutil.copytree(BACKUP, m + 'new', symlinks=True, dirs_exist_ok=True)";
    maker.does(&copy.replace("BACKUP", &backup));
    let at = |path: &str| mount.at(path).display().to_string();
    for _ in 0..2 {
        assert_eq!(maker.does("os.getcwd()"), at("new/snapshots"));
        assert_eq!(inside.does("os.getcwd()"), at("new"));
        assert_eq!(below.does("os.getcwd()"), at("new/snapshots/s"));
        assert_eq!(
            inside.does("sorted(os.listdir('.'))"),
            serde_json::json!(BOX_FILES)
        );
        assert_eq!(below.does("os.path.exists('export.boxlite')"), true);
        assert_eq!(maker.does("os.listdir('.')"), serde_json::json!(["s"]));
        let by_others = inside.does(inodes);
        assert_eq!([&maker.does(inodes), &by_others], [&before, &before]);
        // In the second round, the maker's own view of the box has ended as well.
        eventually("the maker sees a box", || {
            maker.does("os.listxattr(m + 'new')") != serde_json::json!([])
        });
    }
    drop((maker, inside, below));
    assert_is_like_web(&home, &mount, "new");
    mount.unmount();
    home.assert_whole();
}

// ---- several boxes, and existing targets --------------------------------------------------------

#[test]
fn several_boxes_are_copied_at_once_each_to_its_name() {
    let (home, mount, backup) = home_and_backup();
    let environment = [
        ("MNT", mount.root()),
        ("BACKUP", &*backup),
        ("OUT", backup.parent().expect("it")),
    ];
    for (command, names) in [
        (
            "mkdir $OUT/several && cp -r $BACKUP $OUT/several/a && cp -r $BACKUP $OUT/several/b && cp -r $OUT/several/* $MNT/",
            ["a", "b"],
        ),
        (
            "mv $OUT/several/a $OUT/several/c && mv $OUT/several/b $OUT/several/d && rsync -a $OUT/several/{c,d} $MNT/",
            ["c", "d"],
        ),
        (
            "mv $OUT/several/c $OUT/several/e && mv $OUT/several/d $OUT/several/f && tar c -C $OUT/several e f | tar x -C $MNT",
            ["e", "f"],
        ),
        (
            "mv $OUT/several/e $OUT/several/g && mv $OUT/several/f $OUT/several/h && mv $OUT/several/* $MNT",
            ["g", "h"],
        ),
    ] {
        let output = script(command, &environment).output().expect("a shell");
        assert!(
            output.status.success(),
            "{command}: {output:?}\n{}",
            mount.log()
        );
        for name in names {
            assert_is_like_web(&home, &mount, name);
        }
    }
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_copy_onto_a_box_that_is_there_is_refused_and_changes_nothing() {
    let (home, mount, backup) = home_and_backup();
    mount.copy("web", "web2");
    home.guest_write("web2", FREE_AREA, b"its own");
    let log = |mount: &Mounted| mount.log().lines().count();
    let states = || {
        (
            digest(&home.live_disk("web")),
            digest(&home.live_disk("web2")),
        )
    };
    let before = states();
    // cp goes by inode numbers, other tools by the order in the directory.
    let disordered = home.beside("disordered");
    fs::create_dir(&disordered).unwrap();
    for name in ["export.boxlite", "snapshots", "box.json"] {
        succeed(&["cp", "-a", text(&backup.join(name)), text(&disordered)]);
    }
    let environment = [
        ("MNT", mount.root()),
        ("DISORDERED", &*disordered),
        ("BACKUP", &*backup),
        ("OUT", backup.parent().expect("it")),
    ];
    for (command, errors_are_logged) in [
        ("cp -r $MNT/web $MNT/web2", true),
        ("cp -r $MNT/web/ $MNT/web2/", true),
        ("cp -rT $MNT/web $MNT/web2", true),
        ("cp -aT $BACKUP $MNT/web2", true),
        ("cp -r $MNT/web/. $MNT/web2", true),
        ("cp -r $MNT/web/* $MNT/web2", true),
        ("cp -ruT $BACKUP $MNT/web2", true),
        ("cp -r $MNT/web $MNT/web2/snapshots", true),
        ("cp -r $MNT/web $MNT/web", false),
        ("cp -rT $MNT/web $MNT/web", false),
        ("cp $MNT/web/export.boxlite $MNT/web/export.boxlite", false),
        ("cp -r $BACKUP/snapshots $MNT/web2", true),
        ("rsync -a $BACKUP/ $MNT/web2", true),
        ("rsync -a $MNT/web $MNT/web2", true),
        ("busybox cp -r $MNT/web $MNT/web2", true),
        ("cp -aT $DISORDERED $MNT/web2", true),
        ("busybox cp -r $DISORDERED/. $MNT/web2", true),
        (
            "tar c -C $DISORDERED export.boxlite snapshots box.json | tar x -C $MNT/web2",
            true,
        ),
        // The arguments can be in any order, except that the export must not come first.
        (
            "busybox cp -r $BACKUP/snapshots $BACKUP/export.boxlite $BACKUP/box.json $MNT/web2",
            true,
        ),
        ("mv $BACKUP $MNT/web2", true),
        ("mv -T $MNT/web $MNT/web2", false),
        ("mv -T $BACKUP $MNT/web2", false),
        (
            "tar c -C $BACKUP snapshots export.boxlite box.json | tar x -C $MNT/web2",
            true,
        ),
        (
            "python3 -c \"import shutil; shutil.copytree('$BACKUP', '$MNT/web2')\"",
            false,
        ),
        ("ln -s $BACKUP $MNT/web2/link", true),
    ] {
        let lines = log(&mount);
        let output = script(command, &environment).output().expect("a shell");
        assert!(
            !output.status.success(),
            "{command}: {output:?}\n{}",
            mount.log()
        );
        assert_eq!(states(), before, "{command}\n{}", mount.log());
        assert_eq!(mount.names(""), ["web", "web2"], "{command}");
        for name in ["web", "web2"] {
            assert_eq!(mount.names(name), BOX_FILES, "{command}");
            assert_eq!(
                mount.names(format!("{name}/snapshots")),
                ["s"],
                "{command}\n{}",
                mount.log()
            );
        }
        assert!(backup.join("export.boxlite").exists(), "{command}");
        let has_said = log(&mount) > lines;
        assert!(
            has_said || !errors_are_logged,
            "{command}: a message is logged"
        );
    }
    mount.unmount();
    home.assert_whole();
}
