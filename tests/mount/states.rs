//! Two states of a disk are never confused, however coarse the clock of the file system: each
//! archive, size, file and merge belongs to exactly one moment.

use std::fs::{self, File, FileTimes};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::*;

/// File systems whose clocks tick in seconds, milliseconds and nanoseconds.
const CLOCKS: [FileSystem; 3] = [FileSystem::SmallInodes, FileSystem::Ext2, FileSystem::Ext4];

/// A part of the disk that the guest does not use.
const FREE_AREA: u64 = 5 << 20;

/// Makes a home on a file system of its own.
fn home_on(kind: FileSystem) -> (TestHome, SmallDisk) {
    let home = TestHome::new();
    let disk = SmallDisk::under(&home, kind, "256M");
    (home, disk)
}

/// Reads the whole raw disk of a box with qemu-img.
fn raw(home: &TestHome, name: &str) -> Vec<u8> {
    let raw = home.beside("raw");
    let live = home.live_disk(name);
    let convert = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw"];
    succeed(&[&convert[..], &[text(&live), text(&raw)]].concat());
    fs::read(raw).unwrap()
}

/// Reads a file below a mount with a new process.
fn cat(path: &Path) -> Vec<u8> {
    let output = run(&["cat", text(path)]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", path.display());
    output.stdout
}

#[test]
fn archives_of_states_within_one_tick_are_each_of_its_moment_and_can_be_imported() {
    for kind in CLOCKS {
        let (home, _disk) = home_on(kind);
        let mut mount = home.mount();
        let mut expected = Vec::new();
        for round in 1..=3u8 {
            for (form, name) in [("plain", "export.boxlite"), ("zst", "export.boxlite.zst")] {
                let byte = round * 2 + u8::from(form == "zst");
                home.guest_write("web", FREE_AREA, &[byte; 100_000]);
                // If a look cached anything, the next read would use it.
                fs::metadata(mount.at("web").join(name)).unwrap();
                let archive = home.beside(&format!("{round}-{form}.boxlite"));
                fs::write(&archive, cat(&mount.at("web").join(name))).unwrap();
                expected.push((archive, digest(&home.live_disk("web")), byte));
            }
            // The sizes cached on disk belong to the right state, too.
            mount.unmount();
            mount = home.mount();
        }
        for (archive, digest, byte) in &expected {
            assert_eq!(archive_digest(archive), *digest, "{kind:?} {byte}");
            let name = format!("box-{byte}");
            home.wheel(&["import", text(archive), &name]);
            assert_eq!(
                digest_of(&home, &name),
                *digest,
                "{kind:?} {byte}: BoxLite took it"
            );
        }
        assert_eq!(home.check().0, 0);
    }
}

fn digest_of(home: &TestHome, name: &str) -> String {
    digest(&home.live_disk(name))
}

#[test]
fn a_disk_written_to_right_after_it_was_opened_fails_the_reader() {
    for kind in CLOCKS {
        let (home, _disk) = home_on(kind);
        // More than the kernel's read-ahead.
        let archive = make_archive("states.boxlite", &["--size", "64M"]);
        home.wheel(&["import", text(&archive), "large"]);
        let many: Vec<u8> = (0..16u32 << 20).map(|at| (at / 13) as u8).collect();
        home.guest_write("large", 32 << 20, &many);
        let mount = home.mount();
        home.guest_write("large", 32 << 20, &[1; 1000]);
        let mut export = File::open(mount.at("large/export.boxlite")).unwrap();
        let mut first = [0; 4096];
        export.read_exact(&mut first).unwrap();
        // At once, to be within the same clock tick as the previous write if ticks are long.
        home.guest_write("large", 47 << 20, &[2; 1000]);
        let mut rest = Vec::new();
        assert_eq!(errno(export.read_to_end(&mut rest)), libc::EIO, "{kind:?}");
        let archive = home.beside("after.boxlite");
        fs::write(&archive, cat(&mount.at("large/export.boxlite"))).unwrap();
        assert_eq!(archive_digest(&archive), digest(&home.live_disk("large")));
    }
}

#[test]
fn disk_views_show_the_state_at_the_moment_of_opening() {
    for kind in CLOCKS {
        let (home, _disk) = home_on(kind);
        let mount = home.mount();
        let before = raw(&home, "web");
        let hostname = cat(&mount.at("web/rootfs/etc/hostname"));
        let blocks = succeed(&[
            "debugfs",
            "-R",
            "blocks /etc/hostname",
            text(&home.beside("raw")),
        ]);
        let block: u64 = blocks.trim().parse().expect("one block");
        let at = block * block_size(&home.beside("raw"));
        let length = hostname.len();
        assert_eq!(before[at as usize..][..length], hostname);
        for round in 0..4u8 {
            let written = vec![b'a' + round; length];
            home.guest_write("web", at, &written);
            let found = cat(&mount.at("web/rootfs/etc/hostname"));
            assert_eq!(found, written, "{kind:?} {round}");
            let open = File::open(mount.at("web/disk.img")).unwrap();
            let inode = open.metadata().unwrap().ino();
            let image = cat(&mount.at("web/disk.img"));
            assert!(image == raw(&home, "web"), "{kind:?} {round}");
            // A new state is a new file.
            let changed = vec![b'A' + round; length];
            home.guest_write("web", at, &changed);
            assert_eq!(cat(&mount.at("web/rootfs/etc/hostname")), changed);
            let now = fs::metadata(mount.at("web/disk.img")).unwrap().ino();
            assert_ne!(now, inode, "{kind:?} {round}");
            let mut bytes = vec![0; length];
            let read = open.read_exact_at(&mut bytes, at);
            // Either the kernel has cached the opened state, or the read is refused.
            match read {
                Ok(()) => assert_eq!(bytes, written),
                read => assert_eq!(errno(read), libc::ESTALE),
            }
        }
    }
}

fn block_size(image: &Path) -> u64 {
    let said = succeed(&["dumpe2fs", "-h", text(image)]);
    let line = said.lines().find(|line| line.starts_with("Block size:"));
    let size = line.and_then(|line| line.split_whitespace().last());
    size.unwrap().parse().unwrap()
}

#[test]
fn states_with_one_time_and_one_size_are_told_apart() {
    let (home, _disk) = home_on(FileSystem::SmallInodes);
    let mount = home.mount();
    let time = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let mut digests = Vec::new();
    for (name, byte) in [("a", 1u8), ("b", 2)] {
        home.guest_write("web", FREE_AREA, &[byte; 70_000]);
        set_time(&home.live_disk("web"), time);
        mount.snapshot("web", name).unwrap();
        digests.push((name, digest(&home.live_disk("web"))));
    }
    let names = ["export.boxlite", "export.boxlite.zst", "disk.img"];
    for (name, expected) in digests.iter().cycle().take(6) {
        mount.copy(
            &format!("web/snapshots/{name}/export.boxlite"),
            "web/export.boxlite",
        );
        let found: Vec<Vec<u8>> = names
            .iter()
            .map(|file| cat(&mount.at("web").join(file)))
            .collect();
        for archive in &found[..2] {
            let path = home.beside("archive");
            fs::write(&path, archive).unwrap();
            assert_eq!(archive_digest(&path), *expected, "{name}");
        }
        assert!(found[2] == raw(&home, "web"), "{name}");
    }
}

fn set_time(path: &Path, time: SystemTime) {
    let file = File::options().write(true).open(path).unwrap();
    let times = FileTimes::new().set_accessed(time).set_modified(time);
    file.set_times(times).unwrap();
}

#[test]
fn a_disk_with_a_time_in_the_future_is_read_as_it_is() {
    let home = TestHome::new();
    let mount = home.mount();
    let future = SystemTime::now() + Duration::from_secs(100_000);
    for byte in 1..3u8 {
        home.guest_write("web", FREE_AREA, &[byte; 1000]);
        set_time(
            &home.live_disk("web"),
            future + Duration::from_secs(byte.into()),
        );
        succeed(&["ls", "-l", text(&mount.at("web"))]);
        let archive = home.beside("archive");
        fs::write(&archive, cat(&mount.at("web/export.boxlite"))).unwrap();
        assert_eq!(archive_digest(&archive), digest(&home.live_disk("web")));
        assert!(cat(&mount.at("web/disk.img")) == raw(&home, "web"));
    }
}

#[test]
fn a_mount_that_is_read_only_tells_states_apart_as_well() {
    for kind in [FileSystem::SmallInodes, FileSystem::Ext2] {
        let (home, _disk) = home_on(kind);
        let before = names_in(home.root());
        let mount = home.mount_read_only();
        for byte in 1..4u8 {
            home.guest_write("web", FREE_AREA, &[byte; 1000]);
            let archive = home.beside("archive");
            fs::write(&archive, cat(&mount.at("web/export.boxlite"))).unwrap();
            assert_eq!(archive_digest(&archive), digest(&home.live_disk("web")));
        }
        assert_eq!(names_in(home.root()), before, "nothing was made");
    }
}

#[test]
fn a_disk_that_is_written_to_while_its_layers_are_merged_keeps_what_was_written() {
    for kind in CLOCKS {
        let (home, _disk) = home_on(kind);
        let mount = home.mount();
        home.guest_write("web", FREE_AREA, &[1; 300_000]);
        mount.snapshot("web", "a").unwrap();
        home.guest_write("web", FREE_AREA, &[2; 300_000]);
        mount.remove_snapshot("web", "a").unwrap();
        drop(mount);
        home.guest_write("web", FREE_AREA, &[3; 300_000]);
        let child = Command::new(binary())
            .arg("compact")
            .arg(home.root())
            .env("BOXLITEFS_STOP_AT", "merge.prepared")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id();
        eventually("it is stopped", || is_stopped(pid));
        home.guest_write("web", FREE_AREA + 4096, &[4; 1000]);
        let written = digest(&home.live_disk("web"));
        // SAFETY: kill takes no memory; the process is a child of this test.
        unsafe { libc::kill(pid as i32, libc::SIGCONT) };
        let output = child.wait_with_output().unwrap();
        // It noticed the write and started again.
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("2 layers became one"), "{kind:?}: {said}");
        assert_eq!(digest(&home.live_disk("web")), written, "{kind:?}");
        assert_eq!(home.check().0, 0);
    }
}

fn is_stopped(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    let stats = threads
        .flatten()
        .map(|thread| fs::read_to_string(thread.path().join("stat")).unwrap_or_default());
    stats.into_iter().all(|stat| stat.contains(") T "))
}

#[test]
fn snapshots_made_in_one_second_sort_by_time_in_their_order() {
    let home = TestHome::new();
    let mount = home.mount();
    // The order of the snapshots is neither the order of their names nor its reverse.
    let names = ["m", "z", "a", "k", "b"];
    for (number, name) in names.iter().enumerate() {
        home.guest_write("web", FREE_AREA, &[number as u8 + 1; 1000]);
        mount.snapshot("web", name).unwrap();
    }
    assert_eq!(by_time(&mount, "web"), names);
    assert_eq!(by_boxlite(&home, "web"), names);
    // Copying them out by name and back keeps the order.
    let backup = home.beside("backup");
    succeed(&["cp", "-r", text(&mount.at("web")), text(&backup)]);
    succeed(&["cp", "-r", text(&backup), text(&mount.at("again"))]);
    assert_eq!(by_time(&mount, "again"), names);
    assert_eq!(by_boxlite(&home, "again"), names);
    succeed(&[
        "rsync",
        "-a",
        &format!("{}/", text(&backup)),
        text(&mount.at("more")),
    ]);
    assert_eq!(by_time(&mount, "more"), names);
    mount.copy("web", "clone");
    assert_eq!(by_time(&mount, "clone"), names);
    // A new snapshot is the newest, even if others have times in the future.
    home.database()
        .execute(
            "UPDATE snapshot SET created_at = created_at + 1000000 WHERE name = 'k'",
            [],
        )
        .unwrap();
    mount.snapshot("web", "c").unwrap();
    assert_eq!(by_time(&mount, "web"), ["m", "z", "a", "b", "k", "c"]);
    assert_eq!(by_boxlite(&home, "web"), ["m", "z", "a", "b", "k", "c"]);
}

#[test]
fn snapshots_that_boxlite_made_in_one_second_keep_their_order_in_a_backup() {
    let home = TestHome::new();
    let names = ["m", "z", "a", "k"];
    let create = names.map(|name| ["snapshot-create", "web", name]);
    let create: Vec<&[&str]> = create.iter().map(|it| &it[..]).collect();
    home.wheel_batch(&create);
    // Copying may take any length of time.
    home.database()
        .execute(
            "UPDATE snapshot SET created_at = 1700000000,
                 json = json_set(json, '$.created_at', 1700000000)",
            [],
        )
        .unwrap();
    let mount = home.mount();
    assert_eq!(by_time(&mount, "web"), names);
    assert_eq!(by_boxlite(&home, "web"), names);
    let backup = home.beside("backup");
    succeed(&["cp", "-r", text(&mount.at("web")), text(&backup)]);
    succeed(&["cp", "-r", text(&backup), text(&mount.at("again"))]);
    assert_eq!(by_time(&mount, "again"), names);
    assert_eq!(by_boxlite(&home, "again"), names);
    mount.snapshot("web", "b").unwrap();
    assert_eq!(by_time(&mount, "web").last().unwrap(), "b");
}

/// Returns the snapshots of a box as `ls` sorts them by time, oldest first.
fn by_time(mount: &Mounted, name: &str) -> Vec<String> {
    let said = succeed(&["ls", "-tr", text(&mount.at(name).join("snapshots"))]);
    said.lines().map(str::to_owned).collect()
}

/// Returns the snapshots in the order in which BoxLite lists them, newest first.
fn by_boxlite(home: &TestHome, name: &str) -> Vec<String> {
    let listed = home.wheel(&["snapshot-list", name]);
    let names = listed.as_array().unwrap().iter();
    let mut names: Vec<String> = names
        .map(|it| it["name"].as_str().unwrap().to_owned())
        .collect();
    names.reverse();
    names
}

#[test]
fn a_reader_goes_on_while_a_chain_that_is_too_long_is_written_out_as_one() {
    let home = TestHome::new();
    let archive = make_archive("long.boxlite", &["--size", "64M"]);
    home.wheel(&["import", text(&archive), "large"]);
    let mount = home.mount();
    for number in 1..=9u8 {
        let many = vec![number; 2 << 20];
        home.guest_write("large", (30 + 3 * u64::from(number)) << 20, &many);
        if number < 9 {
            mount.snapshot("large", &number.to_string()).unwrap();
        }
    }
    let before = home.images().len();
    let mut export = File::open(mount.at("large/export.boxlite")).unwrap();
    let mut read = vec![0; 4096];
    export.read_exact(&mut read).unwrap();
    mount.snapshot("large", "nine").unwrap();
    assert!(mount.at("large/snapshots/nine").is_dir());
    assert!(home.images().len() > before);
    // A second reader meanwhile gets the same state.
    fs::metadata(mount.at("large/export.boxlite")).unwrap();
    export.read_to_end(&mut read).unwrap();
    assert!(read == cat(&mount.at("large/export.boxlite")));
}
