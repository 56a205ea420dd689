//! Writes to the `disk.img` of a stopped box.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::common::*;

fn open(mount: &Mounted) -> io::Result<File> {
    let options = File::options().read(true).write(true).clone();
    options.open(mount.at("web/disk.img"))
}

fn at(number: u64) -> u64 {
    FREE_AREA + number * 70_000
}

fn raw_of(home: &TestHome) -> Vec<u8> {
    fs::read(raw_disk(&home.live_disk("web"))).unwrap()
}

#[test]
fn what_is_written_to_a_disk_is_in_the_box_and_not_in_its_snapshot() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let before = raw_of(&home);
    assert_eq!(
        fs::metadata(mount.at("web/disk.img")).unwrap().mode() & 0o777,
        0o600
    );
    let snapshot = mount.at("web/snapshots/a/disk.img");
    assert_eq!(fs::metadata(&snapshot).unwrap().mode() & 0o777, 0o400);
    assert_eq!(
        errno(File::options().write(true).open(&snapshot)),
        libc::EROFS
    );
    let disk = open(&mount).unwrap();
    disk.write_all_at(&[7; 100_000], at(1)).unwrap();
    let mut read = vec![0; 100_000];
    disk.read_exact_at(&mut read, at(1)).unwrap();
    assert!(read.iter().all(|byte| *byte == 7));
    disk.sync_all().unwrap();
    let size = disk.metadata().unwrap().len();
    assert_eq!(errno(disk.write_all_at(&[1; 2], size - 1)), libc::EFBIG);
    assert_eq!(errno(disk.set_len(size - 1)), libc::EPERM);
    assert_eq!(errno(fs::write(mount.at("web/disk.img"), "x")), libc::EPERM);
    // The box is in use, and the message says by which process.
    assert_eq!(errno(mount.snapshot("web", "b")), libc::EBUSY);
    assert_eq!(errno(fs::read_dir(mount.at("web/rootfs/"))), libc::EBUSY);
    let pid = format!(
        "(pid {}) has its disk.img open for writing",
        std::process::id()
    );
    assert!(mount.log().contains(&pid), "{}", mount.log());
    drop(disk);
    mount.snapshot("web", "b").unwrap();
    let mut expected = before.clone();
    expected[at(1) as usize..][..100_000].fill(7);
    assert!(fs::read(mount.at("web/disk.img")).unwrap() == expected);
    assert!(fs::read(snapshot).unwrap() == before);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_kernel_file_system_on_a_disk_writes_to_the_box() {
    let home = TestHome::new();
    let mount = home.mount();
    let place = home.beside("inside");
    fs::create_dir(&place).unwrap();
    succeed(&[
        "mount",
        "-o",
        "loop",
        text(&mount.at("web/disk.img")),
        text(&place),
    ]);
    let written = fs::write(place.join("new"), vec![5; 3 << 20]);
    let trimmed = std::process::Command::new("fstrim").arg(&place).output();
    succeed(&["umount", text(&place)]);
    written.unwrap();
    assert!(trimmed.unwrap().status.success());
    eventually("the disk is closed", || mount.snapshot("web", "a").is_ok());
    assert!(fs::read(mount.at("web/rootfs/new")).unwrap() == vec![5; 3 << 20]);
    succeed(&["e2fsck", "-fn", text(&mount.at("web/disk.img"))]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_kill_in_a_flush_keeps_what_was_flushed_and_leaves_a_whole_image() {
    for point in [
        "write.refcounts",
        "write.tables",
        "write.roots",
        "write.lowered",
    ] {
        let home = TestHome::new();
        let mut mount = home.mount();
        mount.snapshot("web", "a").unwrap();
        if point == "write.lowered" {
            let disk = open(&mount).unwrap();
            disk.write_all_at(&[1; 200_000], at(4)).unwrap();
        }
        mount.unmount();
        mount = home.mount_crashing_at(point);
        let disk = open(&mount).unwrap();
        disk.write_all_at(&[2; 70_000], at(0)).unwrap();
        if point == "write.lowered" {
            let zeros = rustix::fs::FallocateFlags::ZERO_RANGE;
            rustix::fs::fallocate(&disk, zeros, at(4), 200_000).unwrap();
        }
        assert!(disk.sync_all().is_err(), "{point}");
        drop(disk);
        assert!(mount.has_crashed(), "{point}");
        drop(mount);
        home.assert_whole_but_leaks();
        let raw = raw_of(&home);
        let is = |number: u64, length: usize, byte: u8| {
            let bytes = &raw[at(number) as usize..][..length];
            bytes.iter().all(|found| *found == byte)
        };
        let is_done = point == "write.lowered" || point == "write.roots";
        if is_done {
            assert!(is(0, 70_000, 2), "{point}: what was durable is there");
        }
        if point == "write.lowered" {
            assert!(is(4, 200_000, 0), "{point}");
        }
        let mount = home.mount();
        let disk = open(&mount).unwrap();
        disk.write_all_at(&[3; 70_000], at(0)).unwrap();
        drop(disk);
        mount.snapshot("web", "b").unwrap();
    }
}
