//! A compressed archive that was read once is kept, and the next one of the box is made of it as
//! far as the disk did not change.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::Value;

use crate::common::*;

const ARCHIVE: &str = "web/export.boxlite.zst";

/// Where the guest's data begins, and its bytes: 12 windows that zstd hardly compresses.
const DATA: u64 = 4 << 20;
const LENGTH: usize = 24 << 20;

/// Makes a home with a box whose disk has 64 MiB.
fn roomy() -> TestHome {
    let home = TestHome::empty();
    let archive = make_archive("second.boxlite", &["--size", "64M"]);
    home.wheel(&["import", text(&archive), "web"]);
    home.guest_write("web", DATA, &noise(1, LENGTH));
    home
}

/// Returns what the status says of the cache of archives.
fn cache(mount: &Mounted) -> Value {
    let status = fs::read_to_string(mount.at(".boxlite/status")).unwrap();
    serde_json::from_str::<Value>(&status).unwrap()["cache"].take()
}

/// Waits until the cache has one archive, of this length.
fn is_kept(mount: &Mounted, archive: &[u8]) {
    eventually("the archive is kept", || {
        let cache = cache(mount);
        cache["archives"] == 1 && cache["bytes"] == archive.len()
    });
}

fn read(mount: &Mounted) -> Vec<u8> {
    fs::read(mount.at(ARCHIVE)).unwrap()
}

/// Returns the archive of the box as a mount makes it that knows nothing from before.
fn made_anew(home: &TestHome) -> Vec<u8> {
    for file in ["boxlitefs.db", "boxlitefs.db-wal", "boxlitefs.db-shm"] {
        let _ = fs::remove_file(home.root().join("db").join(file));
    }
    read(&home.mount())
}

/// Opens the files without a name in which a mount keeps archives.
fn kept_files(mount: &Mounted) -> Vec<File> {
    let open = fs::read_dir(format!("/proc/{}/fd", mount.process())).unwrap();
    let open = open.map(|entry| entry.unwrap().path());
    let is_archive = |path: &PathBuf| {
        let target = fs::read_link(path).unwrap_or_default();
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("compressed") && name.ends_with(" (deleted)")
    };
    let kept = open.filter(is_archive);
    kept.map(|path| File::options().read(true).write(true).open(path).unwrap())
        .collect()
}

#[test]
fn a_copy_whose_size_was_known_is_kept_for_the_next() {
    let home = roomy();
    let mount = home.mount();
    let first = read(&mount);
    is_kept(&mount, &first);
    mount.unmount();

    let mount = home.mount();
    assert_eq!(
        mount.at(ARCHIVE).metadata().unwrap().len(),
        first.len() as u64
    );
    assert_eq!(cache(&mount)["archives"], 0);
    assert!(read(&mount) == first);
    is_kept(&mount, &first);
    // The next one is that of the cache: it can be read to its end whatever becomes of the disk.
    let second = File::open(mount.at(ARCHIVE)).unwrap();
    home.guest_write("web", DATA, &noise(2, 1000));
    let mut bytes = vec![0; first.len()];
    second.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == first);
}

#[test]
fn windows_that_did_not_change_are_taken_from_the_archive_that_is_kept() {
    let home = roomy();
    let mount = home.mount();
    let first = read(&mount);
    is_kept(&mount, &first);
    home.guest_write("web", DATA + (7 << 20), &noise(2, 100_000));
    let reads = ["-y", "-e", "trace=pread64"];
    let trace = Trace::begin(&home, &mount, &reads);
    let second = read(&mount);
    let reads = trace.end();
    let of_kept = |line: &&String| line.contains("/compressed") && line.contains("(deleted)");
    // 13 windows have data, and two may have changed.
    assert!(reads.iter().filter(of_kept).count() >= 11, "{reads:#?}");
    assert!(second != first);
    is_kept(&mount, &second);
    assert!(read(&mount) == second, "as it is kept");
    mount.unmount();
    assert!(made_anew(&home) == second);
}

#[test]
fn what_became_damaged_in_the_archive_that_is_kept_is_made_again() {
    let home = roomy();
    let mount = home.mount();
    let first = read(&mount);
    is_kept(&mount, &first);
    let [kept] = &kept_files(&mount)[..] else {
        panic!("one archive is kept");
    };
    let mut byte = [0];
    let place = DATA + (4 << 20);
    kept.read_exact_at(&mut byte, place).unwrap();
    assert_eq!(byte[0], first[place as usize]);
    kept.write_all_at(&[!byte[0]], place).unwrap();
    // Far from there.
    home.guest_write("web", DATA + (17 << 20), &noise(2, 100_000));
    let second = read(&mount);
    mount.unmount();
    assert!(made_anew(&home) == second);
}

#[test]
fn the_archive_of_a_snapshot_takes_the_windows_of_its_box() {
    let home = roomy();
    let mount = home.mount();
    let of_box = read(&mount);
    is_kept(&mount, &of_box);
    mount.snapshot("web", "s").unwrap();
    let path = "web/snapshots/s/export.boxlite.zst";
    let of_snapshot = fs::read(mount.at(path)).unwrap();
    eventually("both are kept", || cache(&mount)["archives"] == 2);
    home.guest_write("web", DATA + (7 << 20), &noise(2, 100_000));
    let changed = read(&mount);
    mount.unmount();
    assert!(made_anew(&home) == changed);
    assert!(fs::read(home.mount().at(path)).unwrap() == of_snapshot);
}

#[test]
fn a_reader_that_stops_half_way_leaves_nothing_in_the_cache() {
    let home = roomy();
    let mount = home.mount();
    let first = read(&mount);
    mount.unmount();

    let mount = home.mount();
    let mut half = vec![0; first.len() / 2];
    let mut file = File::open(mount.at(ARCHIVE)).unwrap();
    file.read_exact(&mut half).unwrap();
    eventually("it is being kept", || cache(&mount)["bytes"] != 0);
    drop(file);
    eventually("nothing is kept", || {
        cache(&mount)["bytes"] == 0 && kept_files(&mount).is_empty()
    });
    assert_eq!(cache(&mount)["archives"], 0);
    assert!(read(&mount) == first);
    is_kept(&mount, &first);
    assert!(read(&mount) == first);
}

#[test]
fn a_disk_that_changes_while_its_archive_passes_leaves_nothing_of_it() {
    let home = roomy();
    let mount = home.mount();
    let first = read(&mount);
    mount.unmount();

    let mount = home.mount();
    let mut file = File::open(mount.at(ARCHIVE)).unwrap();
    let mut half = vec![0; first.len() / 2];
    file.read_exact(&mut half).unwrap();
    home.guest_write("web", DATA, &noise(2, 1 << 20));
    let mut rest = Vec::new();
    assert_eq!(errno(file.read_to_end(&mut rest)), libc::EIO);
    drop(file);
    let second = read(&mount);
    is_kept(&mount, &second);
    assert!(read(&mount) == second);
    mount.unmount();
    assert!(made_anew(&home) == second);
}

#[test]
fn a_disk_that_fills_up_while_an_archive_is_kept_does_not_fail_the_reader() {
    let home = roomy();
    let disk = SmallDisk::under(&home, FileSystem::Ext4, "256M");
    let mount = home.mount();
    let first = read(&mount);
    mount.unmount();

    let mount = home.mount();
    let mut file = File::open(mount.at(ARCHIVE)).unwrap();
    let mut bytes = vec![0; 1 << 20];
    file.read_exact(&mut bytes).unwrap();
    disk.fill(0);
    file.read_to_end(&mut bytes).unwrap();
    drop(file);
    assert!(bytes == first);
    eventually("nothing is kept", || cache(&mount)["bytes"] == 0);
    assert!(read(&mount) == first, "with a disk that is full");
    eventually("nothing is kept", || cache(&mount)["bytes"] == 0);
    assert_eq!(cache(&mount)["archives"], 0);
    disk.empty();
    assert!(read(&mount) == first);
    is_kept(&mount, &first);
}

#[test]
fn a_cache_without_room_for_two_archives_keeps_the_newer_one() {
    let home = roomy();
    let mount = home.mount_with(&["-o", "cache=40M"], &[]);
    let first = read(&mount);
    is_kept(&mount, &first);
    for round in 2..4 {
        home.guest_write("web", DATA + (7 << 20), &noise(round, 100_000));
        let next = read(&mount);
        is_kept(&mount, &next);
        assert!(read(&mount) == next);
    }
    let last = read(&mount);
    mount.unmount();
    assert!(made_anew(&home) == last);
}
