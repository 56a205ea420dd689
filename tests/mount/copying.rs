//! What the kernel and copy tools really do: every tool reads the right bytes and can import a box,
//! copies inside the mount move no data, and invalid archives leave nothing behind.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::*;

/// Runs a shell script with `$MNT` (the mount), `$B` (an archive) and `$T` (a directory outside the
/// mount).
fn shell(mount: &Mounted, home: &TestHome, archive: &Path, script: &str) -> std::process::Output {
    let beside = home.beside("tools");
    fs::create_dir_all(&beside).unwrap();
    Command::new("bash")
        .args(["-c", script])
        .env("MNT", mount.root())
        .env("B", archive)
        .env("T", &beside)
        .env("PY", python())
        .stdin(Stdio::null())
        .output()
        .expect("bash")
}

fn shell_succeeds(mount: &Mounted, home: &TestHome, archive: &Path, script: &str) {
    let output = shell(mount, home, archive, script);
    assert!(
        output.status.success(),
        "{script}: {}\n{}",
        String::from_utf8_lossy(&output.stderr),
        mount.log()
    );
}

/// Makes a home whose box `web` has a snapshot `s` and a changed disk; returns it with both
/// digests.
fn home_with_snapshot() -> (TestHome, String, String) {
    let home = TestHome::new();
    home.guest_write("web", FREE_AREA, b"at the snapshot");
    let snapshot = digest(&home.live_disk("web"));
    home.wheel(&["snapshot-create", "web", "s"]);
    home.guest_write("web", FREE_AREA + (1 << 20), b"after it");
    let live = digest(&home.live_disk("web"));
    assert_ne!(snapshot, live);
    (home, live, snapshot)
}

#[test]
fn every_tool_that_reads_and_writes_imports_an_archive() {
    let (home, live, _) = home_with_snapshot();
    let mount = home.mount();
    let archive = home.beside("b.boxlite");
    fs::copy(mount.at("web/export.boxlite"), &archive).unwrap();
    assert_eq!(archive_digest(&archive), live);
    let tools = [
        "cp $B $MNT/NEW.boxlite",
        "cp --sparse=always $B $MNT/NEW.boxlite",
        "cp --reflink=never $B $MNT/NEW.boxlite",
        "cp -a $B $MNT/NEW.boxlite",
        "cat $B > $MNT/NEW.boxlite",
        "cat < $B > $MNT/NEW.boxlite",
        "busybox cp $B $MNT/NEW.boxlite",
        "busybox cat $B > $MNT/NEW.boxlite",
        "dd if=$B of=$MNT/NEW.boxlite bs=777 status=none",
        "dd if=$B of=$MNT/NEW.boxlite bs=4M status=none conv=fsync",
        "rsync -a $B $MNT/NEW.boxlite",
        "rsync --inplace $B $MNT/NEW.boxlite",
        "gio copy $B $MNT/NEW.boxlite",
        "install -m 600 $B $MNT/NEW.boxlite",
        "$PY -c \"import shutil; shutil.copyfile('$B', '$MNT/NEW.boxlite')\"",
        "$PY -c \"import shutil; shutil.copy2('$B', '$MNT/NEW.boxlite')\"",
        "zstd -q $B -o $T/b.zst && cp $T/b.zst $MNT/NEW.boxlite && rm $T/b.zst",
        "zstd -q -c $B > $MNT/NEW.boxlite",
        "mkdir $MNT/NEW && cp $B $MNT/NEW/export.boxlite",
        "mkdir $MNT/NEW && cat $B > $MNT/NEW/export.boxlite",
        "cp $B $T/NEW.boxlite && cp $T/NEW.boxlite $MNT/",
        "cp $B $T/NEW.boxlite && rsync -a $T/NEW.boxlite $MNT/",
        "cp --reflink=never --sparse=never $MNT/web/export.boxlite $MNT/NEW.boxlite",
    ];
    for (number, tool) in tools.iter().enumerate() {
        let name = format!("new{number}");
        shell_succeeds(&mount, &home, &archive, &tool.replace("NEW", &name));
        assert!(
            mount.names("").contains(&name),
            "{tool}: {:?}",
            mount.names("")
        );
        assert_eq!(
            mount.export_digest(&format!("{name}/export.boxlite")),
            live,
            "{tool}"
        );
        assert_eq!(
            home.live_disk(&name).metadata().unwrap().nlink(),
            1,
            "{tool}"
        );
    }
    assert_eq!(
        mount.names("").len(),
        tools.len() + 1,
        "only boxes are left"
    );
    mount.unmount();
    assert_eq!(
        home.wheel(&["list"]).as_array().unwrap().len(),
        tools.len() + 1
    );
    home.assert_whole();
}

#[test]
fn every_tool_gets_the_same_bytes_out() {
    let (home, live, _) = home_with_snapshot();
    let mount = home.mount();
    let archive = home.beside("b.boxlite");
    let source = mount.at("web/export.boxlite");
    fs::copy(&source, &archive).unwrap();
    assert_eq!(archive_digest(&archive), live);
    for tool in [
        "cp $MNT/web/export.boxlite $T/out",
        "cp --sparse=always $MNT/web/export.boxlite $T/out",
        "busybox cp $MNT/web/export.boxlite $T/out",
        "cat $MNT/web/export.boxlite > $T/out",
        "rsync -a $MNT/web/export.boxlite $T/out",
        "gio copy $MNT/web/export.boxlite $T/out",
        "dd if=$MNT/web/export.boxlite of=$T/out bs=333 status=none",
        "$PY -c \"import shutil; shutil.copyfile('$MNT/web/export.boxlite', '$T/out')\"",
        "$PY -c \"import mmap,os; f=open('$MNT/web/export.boxlite','rb'); open('$T/out','wb').write(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:])\"",
        "tar -c -C $MNT/web export.boxlite | tar -x -C $T && mv $T/export.boxlite $T/out",
        "tail -c +1 $MNT/web/export.boxlite > $T/out",
    ] {
        let script = format!("{tool} && cmp $B $T/out && rm -f $T/out");
        shell_succeeds(&mount, &home, &archive, &script);
    }
}

#[test]
fn an_export_is_the_same_from_any_offset_for_many_readers_and_after_a_remount() {
    let (home, _, _) = home_with_snapshot();
    let mount = home.mount();
    let path = mount.at("web/export.boxlite");
    let size = path.metadata().unwrap().len();
    // Reads the tail first: the manifest holds a digest of everything before it.
    let tail = {
        let mut bytes = vec![0; 3000];
        let file = File::open(&path).unwrap();
        file.read_exact_at(&mut bytes, size - 3000).unwrap();
        bytes
    };
    let whole = fs::read(&path).unwrap();
    assert_eq!(
        whole.len() as u64,
        size,
        "the size of the first stat is exact"
    );
    assert!(whole.ends_with(&tail));
    std::thread::scope(|scope| {
        for reader in 0..8_u64 {
            let (path, whole) = (&path, &whole);
            scope.spawn(move || {
                let file = File::open(path).unwrap();
                let mut at = reader * 7919;
                for _ in 0..200 {
                    at = at
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407)
                        % (size - 1);
                    let mut bytes = vec![0; usize::try_from((size - at).min(70_001)).unwrap()];
                    file.read_exact_at(&mut bytes, at).unwrap();
                    assert!(whole[at as usize..].starts_with(&bytes), "at {at}");
                }
            });
        }
    });
    assert!(path.metadata().unwrap().blocks() >= size / 512);
    mount.unmount();
    let mount = home.mount();
    assert!(fs::read(mount.at("web/export.boxlite")).unwrap() == whole);
    // A snapshot changes neither the contents of the box nor its export.
    mount.snapshot("web", "later").unwrap();
    assert!(fs::read(mount.at("web/export.boxlite")).unwrap() == whole);
}

#[test]
fn boxlite_and_qemu_accept_an_export_of_either_kind() {
    let (home, live, snapshot) = home_with_snapshot();
    let mount = home.mount();
    for (export, contents) in [
        ("web/export.boxlite", &live),
        ("web/snapshots/s/export.boxlite", &snapshot),
    ] {
        let copy = home.beside("copy.boxlite");
        fs::copy(mount.at(export), &copy).unwrap();
        let place = tempfile::tempdir().unwrap();
        succeed(&["tar", "xf", text(&copy), "-C", text(place.path())]);
        assert_eq!(names_in(place.path()), ["disk.qcow2", "manifest.json"]);
        let disk = place.path().join("disk.qcow2");
        succeed(&["qemu-img", "check", text(&disk)]);
        assert_eq!(digest(&disk), *contents);
        let other = TestHome::empty();
        other.wheel(&["import", text(&copy), "back"]);
        assert_eq!(digest(&other.live_disk("back")), *contents);
        let config = |home: &TestHome, name: &str| -> serde_json::Value {
            let text: String = home
                .database()
                .query_row(
                    "SELECT json FROM box_config WHERE name = ?1",
                    [name],
                    |row| row.get(0),
                )
                .unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["options"].clone()
        };
        assert_eq!(
            config(&other, "back"),
            config(&home, "web"),
            "the configuration comes along"
        );
    }
}

#[test]
fn every_recursive_tool_clones_a_box_with_its_snapshots() {
    let (home, live, snapshot) = home_with_snapshot();
    let mount = home.mount();
    let tools = [
        "cp -r $MNT/web $MNT/NEW",
        "cp -a $MNT/web $MNT/NEW",
        "cp -rT $MNT/web $MNT/NEW",
        "cp -r $MNT/web/. $MNT/NEW/",
        "mkdir $MNT/NEW && cp -r $MNT/web/* $MNT/NEW/",
        "rsync -a $MNT/web/ $MNT/NEW/",
        "busybox cp -r $MNT/web $MNT/NEW",
        "$PY -c \"import shutil; shutil.copytree('$MNT/web', '$MNT/NEW', symlinks=True)\"",
        "mkdir $MNT/NEW && tar -c -C $MNT/web . | tar -x -C $MNT/NEW",
        "cp -r $MNT/web $T/backup && cp -r $T/backup $MNT/NEW && rm -r $T/backup",
        "rsync -a $MNT/web/ $T/backup/ && rsync -a $T/backup/ $MNT/NEW/ && rm -r $T/backup",
    ];
    for (number, tool) in tools.iter().enumerate() {
        let name = format!("new{number}");
        let nothing = Path::new("/dev/null");
        shell_succeeds(&mount, &home, nothing, &tool.replace("NEW", &name));
        assert_eq!(mount.names(&name), BOX_FILES, "{tool}");
        assert_eq!(
            mount.names(format!("{name}/snapshots")),
            ["s"],
            "{tool}\n{}",
            mount.log()
        );
        assert_eq!(
            mount.export_digest(&format!("{name}/export.boxlite")),
            live,
            "{tool}"
        );
        let of_snapshot = format!("{name}/snapshots/s/export.boxlite");
        assert_eq!(mount.export_digest(&of_snapshot), snapshot, "{tool}");
    }
    mount.copy("web/snapshots/s", "from-snapshot");
    assert_eq!(
        mount.export_digest("from-snapshot/export.boxlite"),
        snapshot
    );
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        live,
        "the source is as it was"
    );
    mount.unmount();
    assert_eq!(
        home.wheel(&["list"]).as_array().unwrap().len(),
        tools.len() + 2
    );
    home.assert_whole();
}

#[test]
fn a_clone_inside_the_mount_moves_no_data() {
    let (home, live, _) = home_with_snapshot();
    let mount = home.mount();
    for (number, tool) in [
        "cp -r $MNT/web $MNT/NEW",
        "cp $MNT/web/export.boxlite $MNT/NEW.boxlite",
        "cat $MNT/web/export.boxlite > $MNT/NEW.boxlite",
    ]
    .iter()
    .enumerate()
    {
        let name = format!("new{number}");
        shell_succeeds(
            &mount,
            &home,
            Path::new("/dev/null"),
            &tool.replace("NEW", &name),
        );
        let disk = home.live_disk(&name);
        assert!(chain(&disk).len() > 1, "{tool}: an overlay");
        assert!(
            disk.metadata().unwrap().len() <= 5 * 65536,
            "{tool}: with nothing in it"
        );
        assert_eq!(digest(&disk), live, "{tool}");
    }
    let depth = chain(&home.live_disk("web")).len();
    mount.copy("web", "again");
    assert_eq!(
        chain(&home.live_disk("web")).len(),
        depth,
        "an empty overlay is not stacked upon"
    );
    // Writes to one box do not reach the other.
    mount.unmount();
    home.guest_write("new0", FREE_AREA, b"the clone's own");
    assert_eq!(digest(&home.live_disk("web")), live);
    home.guest_write("web", FREE_AREA, b"the source's own");
    assert_eq!(digest(&home.live_disk("again")), live);
    home.assert_whole();
}

#[test]
fn what_is_no_archive_is_refused_with_ebadmsg_and_leaves_nothing() {
    let home = TestHome::new();
    let mount = home.mount();
    let good = fs::read(mount.at("web/export.boxlite")).unwrap();
    let before = home.kept();
    let mut flipped = good.clone();
    flipped[200_000] ^= 1;
    let cases = [
        ("half of one", good[..good.len() / 2].to_vec()),
        ("all but the end", good[..good.len() - 1024].to_vec()),
        ("a flipped bit", flipped),
        ("garbage", vec![7; 100_000]),
        ("zeros", vec![0; 100_000]),
        ("text", b"hello\n".to_vec()),
        ("garbage behind it", [good.as_slice(), &[1; 4096]].concat()),
    ];
    for (what, bytes) in cases {
        let file = home.beside("bad.boxlite");
        fs::write(&file, &bytes).unwrap();
        for target in ["bad.boxlite", "bad/export.boxlite"] {
            if target.contains('/') {
                fs::create_dir(mount.at("bad")).unwrap();
            }
            let said = fail(&["cp", text(&file), text(&mount.at(target))]);
            assert!(said.contains("Bad message"), "{what}: {said}");
            // Results of the last close are logged a moment after cp has ended.
            let told = || {
                mount
                    .log()
                    .lines()
                    .last()
                    .is_some_and(|line| line.contains("bad"))
            };
            eventually(&format!("the log reports {what}"), told);
            // The kernel reports the last close a moment after cp has ended.
            if target.contains('/') {
                eventually(what, || mount.names("bad").is_empty());
                fs::remove_dir(mount.at("bad")).unwrap();
            }
            eventually(what, || mount.names("") == ["web"]);
        }
    }
    assert_eq!(home.kept(), before);
    let said = fail(&[
        "cp",
        text(&mount.at("web/export.boxlite")),
        text(&mount.at("web.boxlite")),
    ]);
    assert!(said.contains("File exists"), "{said}");
    let said = fail(&[
        "cp",
        text(&mount.at("web/box.json")),
        text(&mount.at("x.boxlite")),
    ]);
    assert!(
        said.contains("Bad message"),
        "a box.json is no archive: {said}"
    );
    File::create(mount.at("nothing.boxlite")).unwrap();
    // The kernel reports the last close a moment later.
    eventually("a file nothing was written to is nothing", || {
        mount.names("") == ["web"]
    });
    mount.unmount();
    assert_eq!(home.kept(), before);
}

#[test]
fn the_verdict_falls_in_the_write_that_completes_or_disproves_the_archive() {
    let home = TestHome::new();
    let mount = home.mount();
    let good = fs::read(mount.at("web/export.boxlite")).unwrap();
    let mut bad = good.clone();
    bad[300_000] ^= 0x10;
    for (bytes, name, right) in [(&good, "good", true), (&bad, "bad", false)] {
        let is_box = || mount.names("").contains(&name.to_owned());
        let file = File::create(mount.at(format!("{name}.boxlite"))).unwrap();
        // In the middle of the manifest, which contains the digest of everything before it.
        let (body, end) = bytes.split_at(bytes.len() - 3000);
        file.write_all_at(body, 0).unwrap();
        assert!(!is_box());
        let last = file.write_at(end, body.len() as u64);
        if right {
            assert_eq!(last.unwrap(), 3000);
        } else {
            assert_eq!(errno(last), libc::EBADMSG);
        }
        drop(file);
        assert_eq!(is_box(), right);
    }
    let garbage = File::create(mount.at("garbage.boxlite")).unwrap();
    assert_eq!(
        errno(garbage.write_at(&[9; 4096], 0)),
        libc::EBADMSG,
        "at once"
    );
}

#[test]
fn closing_a_copy_of_the_descriptor_half_way_is_not_the_end() {
    let home = TestHome::new();
    let mount = home.mount();
    let good = fs::read(mount.at("web/export.boxlite")).unwrap();
    let file = File::create(mount.at("new.boxlite")).unwrap();
    drop(file.try_clone().unwrap());
    let half = good.len() / 2;
    file.write_all_at(&good[..half], 0).unwrap();
    drop(file.try_clone().unwrap());
    file.write_all_at(&good[half..], half as u64).unwrap();
    drop(file);
    eventually("the box is there", || mount.names("") == ["new", "web"]);
}

#[test]
fn writes_out_of_order_are_put_in_order() {
    let (home, live, _) = home_with_snapshot();
    let mount = home.mount();
    let good = fs::read(mount.at("web/export.boxlite")).unwrap();
    let file = File::create(mount.at("new.boxlite")).unwrap();
    let mut pieces: Vec<usize> = (0..good.len().div_ceil(30_000)).collect();
    // Writes later blocks before earlier ones, in groups.
    pieces.chunks_mut(7).for_each(<[usize]>::reverse);
    for piece in pieces {
        let start = piece * 30_000;
        let end = (start + 30_000).min(good.len());
        file.write_all_at(&good[start..end], start as u64).unwrap();
    }
    drop(file);
    assert_eq!(mount.export_digest("new/export.boxlite"), live);
}

#[test]
fn a_box_that_was_made_is_one_box_for_its_maker_and_everyone_else() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    // This process is the maker, and so are its children. The outsider therefore starts through
    // setsid from a process that has exited, which makes it a descendant of init.
    fs::create_dir(mount.at("new")).unwrap();
    let inode = mount.at("new").metadata().unwrap().ino();
    assert_eq!(mount.names("new"), [""; 0]);
    assert!(
        mount.names("").contains(&"new".to_owned()),
        "it is visible from the start"
    );
    fs::copy(
        mount.at("web/export.boxlite"),
        mount.at("new/export.boxlite"),
    )
    .unwrap();
    assert_eq!(mount.names("new"), BOX_FILES);
    assert_eq!(
        mount.export_digest("new/export.boxlite"),
        digest(&home.live_disk("web"))
    );
    let listing = outsider(&format!("ls {}", text(&mount.at("new"))));
    assert_eq!(listing.split_whitespace().collect::<Vec<_>>(), BOX_FILES);
    // Continues like a tool that copies a tree and creates each directory itself.
    fs::create_dir(mount.at("new/snapshots")).unwrap();
    fs::create_dir(mount.at("new/snapshots/later")).unwrap();
    assert_eq!(mount.names("new/snapshots/later"), SNAPSHOT_FILES);
    let listing = outsider(&format!("ls {}", text(&mount.at("new/snapshots"))));
    assert_eq!(listing.trim(), "later");
    let seen = outsider(&format!("stat -c %i {}", text(&mount.at("new"))));
    assert_eq!(seen.trim(), inode.to_string(), "the inode never changes");
}

#[test]
fn a_copy_is_a_box_when_cp_ends() {
    let home = TestHome::new();
    let mount = home.mount();
    for number in 0..20 {
        let (from, to) = (mount.at("web"), mount.at(format!("c{number}")));
        let script = format!("cp -r {} {1} && ls {1}", text(&from), text(&to));
        let listing = succeed(&["sh", "-c", &script]);
        assert_eq!(listing.split_whitespace().collect::<Vec<_>>(), BOX_FILES);
    }
}

#[test]
fn a_directory_nothing_was_put_into_goes_with_rmdir_or_unmount() {
    let home = TestHome::new();
    let before = home.kept();
    let mount = home.mount();
    fs::create_dir(mount.at("one")).unwrap();
    assert_eq!(errno(fs::create_dir(mount.at("one"))), libc::EEXIST);
    fs::remove_dir(mount.at("one")).unwrap();
    assert_eq!(mount.names(""), ["web"]);
    fs::create_dir(mount.at("two")).unwrap();
    mount.unmount();
    let mount = home.mount();
    assert_eq!(mount.names(""), ["web"]);
    mount.unmount();
    assert_eq!(home.kept(), before);
}

#[test]
fn what_means_nothing_is_refused_and_changes_nothing() {
    let home = TestHome::new();
    let mount = home.mount();
    let before = home.kept();
    for (script, said) in [
        ("cp $B $MNT/notes.txt", "Operation not permitted"),
        ("mkdir $MNT/.Trash-0", "Operation not permitted"),
        ("mkdir $MNT/web/other", "Operation not permitted"),
        ("touch $MNT/web/file", "Operation not permitted"),
        (
            "echo x >> $MNT/web/export.boxlite",
            "Operation not permitted",
        ),
        ("echo x > $MNT/web/box.json", "Invalid argument"),
        ("rmdir $MNT/web", "Directory not empty"),
        ("chmod 600 $MNT/web/box.json", "Operation not permitted"),
        (
            "ln $MNT/web/box.json $MNT/web/two",
            "Operation not permitted",
        ),
        ("ln -s x $MNT/web/link", "Operation not permitted"),
        ("mkdir $MNT/50%", "Invalid argument"),
    ] {
        let archive = archive();
        let output = shell(&mount, &home, &archive, script);
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{script}");
        assert!(complaint.contains(said), "{script}: {complaint}");
    }
    assert_eq!(mount.names(""), ["web"]);
    assert_eq!(home.kept(), before);
}

#[test]
fn cp_writes_an_archive_in_large_pieces() {
    let (home, _, _) = home_with_snapshot();
    let mount = home.mount();
    let archive = home.beside("large.boxlite");
    fs::copy(mount.at("web/export.boxlite"), &archive).unwrap();
    let trace = home.beside("trace");
    let new = mount.at("new.boxlite");
    let traced = ["strace", "-qq", "-e", "trace=write", "-o", text(&trace)];
    succeed(&[&traced[..], &["cp", text(&archive), text(&new)]].concat());
    let largest = fs::read_to_string(&trace)
        .unwrap()
        .lines()
        .map(written)
        .max();
    let length = archive.metadata().unwrap().len();
    assert_eq!(largest, Some(length.min(1 << 20)));
    // What is read has pages of the usual size.
    let made = mount.at("new/export.boxlite").metadata().unwrap();
    assert_eq!(made.blksize(), 4096);
}

/// Returns how many bytes a write wrote, as strace shows it.
fn written(call: &str) -> u64 {
    let result = call.rsplit(" = ").next().unwrap_or_default();
    result.trim().parse().unwrap_or(0)
}
