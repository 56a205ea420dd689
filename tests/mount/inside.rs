//! Views into a disk: `rootfs` must agree with a loop mount of the same disk, and `disk.img` with
//! qemu-img, for the live disk and for snapshots. Tools that walk the mount do not descend into
//! them unasked.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::*;
use tempfile::TempDir;

/// A file system that the kernel mounts until this is dropped.
pub struct Loop(TempDir);

impl Loop {
    pub fn of(image: &Path) -> Loop {
        let place = tempfile::tempdir().unwrap();
        let options = "loop,ro,noatime";
        succeed(&["mount", "-o", options, text(image), text(place.path())]);
        Loop(place)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run(&["umount", text(self.0.path())]);
    }
}

/// Makes every kind of file that `mke2fs -d` copies, in the directory $1.
const TREE: &str = r#"
set -e; cd "$1"; umask 022
mkdir -p a/b/c 'with space' many; echo deep > a/b/c/deep; : > empty; printf x > short
head -c 3000000 /dev/urandom > large; ln large 'a/another name'
printf odd > "$(printf '\377\n\\\001')"; printf long > "$(printf 'n%.0s' $(seq 255))"
truncate -s 5M sparse; for at in 1 700 701 1200; do
    head -c 4096 /dev/urandom | dd of=sparse bs=4096 seek=$at conv=notrunc status=none; done
truncate -s 100001 'all hole'
ln -s a/b/c/deep link; ln -s ../short 'with space/up'; ln -s "$(printf 't%.0s' $(seq 300))" 'long link'
for mode in 4755 2711 1777 0000 0640; do echo $mode > m$mode; chmod $mode m$mode; done
touch -d '1970-01-01 00:00:01 UTC' old; touch -d '2021-02-03 04:05:06.123456789 UTC' dated
mkdir 0700; chmod 700 0700; echo secret > 0700/secret; chown 1234:70000 0700/secret
for n in $(seq 1500); do : > "many/a file of the many, number $n"; done
mkfifo pipe
"#;

/// Files that only debugfs can make.
const ODD: &str = "mknod console c 5 1\nmknod disk b 259 60000\nsif large uid 70000\n\
    ea_set short user.small value\nea_set a user.of_a_directory yes\nea_set large trusted.note another\n";

/// Makes a raw image of `size` with all kinds of files.
fn image(place: &Path, size: &str) -> PathBuf {
    let tree = tempfile::tempdir().unwrap();
    succeed(&["bash", "-c", TREE, "bash", text(tree.path())]);
    let image = place.join("disk.raw");
    let from = text(tree.path());
    succeed(&[
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-d",
        from,
        text(&image),
        size,
    ]);
    let script = place.join("debugfs");
    fs::write(&script, ODD).unwrap();
    succeed(&["debugfs", "-w", "-f", text(&script), text(&image)]);
    image
}

/// Makes a raw image the disk of a stopped box.
pub fn give_disk(home: &TestHome, name: &str, image: &Path) {
    let disk = text(image);
    let live = home.live_disk(name);
    succeed(&[
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        disk,
        text(&live),
    ]);
}

/// Makes a home whose box has all kinds of files; returns it with the image of its disk.
pub fn home() -> (TestHome, PathBuf) {
    let home = TestHome::new();
    let image = image(home.root().parent().unwrap(), "32M");
    give_disk(&home, "web", &image);
    (home, image)
}

/// Changes files of the box in place, as its guest would. `image` has the disk's current contents.
/// Returns a raw image of the new contents.
fn change_files(home: &TestHome, image: &Path, commands: &str) -> PathBuf {
    let changed = home.beside("changed.raw");
    fs::copy(image, &changed).unwrap();
    let script = home.beside("changes");
    fs::write(&script, commands).unwrap();
    succeed(&["debugfs", "-w", "-f", text(&script), text(&changed)]);
    home.guest_write("web", 0, &fs::read(&changed).unwrap());
    changed
}

/// Describes a tree by what find, sha256sum, getfattr and lseek report.
fn account(root: &Path) -> String {
    const SCRIPT: &str = r#"
cd "$1"
find . -printf '%P\t%y\t%m\t%U\t%G\t%n\t%s\t%b\t%A@\t%T@\t%C@\t%l\n' | LC_ALL=C sort
find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
getfattr -R -h -d -m - . | LC_ALL=C sort
find . -type b -o -type c | LC_ALL=C sort | xargs stat -c '%n %t %T'
python3 - <<'PYTHON'
import os
for root, _, names in sorted(os.walk(b".")):
    for name in sorted(names):
        path = os.path.join(root, name)
        if os.path.islink(path) or not os.path.isfile(path):
            continue
        f, at, runs = os.open(path, os.O_RDONLY), 0, []
        end = os.fstat(f).st_size
        while at < end:
            try:
                data = os.lseek(f, at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(f, data, os.SEEK_HOLE)
            runs.append((data, at))
        os.close(f)
        print(path, end, runs)
PYTHON
"#;
    succeed(&["bash", "-o", "pipefail", "-c", SCRIPT, "bash", text(root)])
}

#[track_caller]
pub fn assert_same(ours: &Path, kernel: &Path) {
    let (ours, kernel) = (account(ours), account(kernel));
    assert!(kernel.lines().count() > 10, "{kernel}");
    for (our, theirs) in ours.lines().zip(kernel.lines()) {
        assert_eq!(our, theirs);
    }
    assert_eq!(ours.lines().count(), kernel.lines().count());
}

#[test]
fn rootfs_is_what_the_kernel_says_of_the_live_disk_and_of_snapshots() {
    let (home, image) = home();
    let mount = home.mount();
    mount.snapshot("web", "before").unwrap();
    let kernel = Loop::of(&image);
    assert_same(&mount.at("web/rootfs/"), kernel.path());
    assert_same(&mount.at("web/snapshots/before/rootfs/"), kernel.path());
    drop(kernel);
    // The guest makes files. Only the live disk has them, and it spans two layers.
    let changes = "mkdir new\nwrite /etc/hostname new/hostname\nrm short\n";
    let changed = change_files(&home, &image, changes);
    let kernel = Loop::of(&changed);
    assert_same(&mount.at("web/rootfs/"), kernel.path());
    let before = Loop::of(&image);
    assert_same(&mount.at("web/snapshots/before/rootfs/"), before.path());
    // Both states can be read side by side.
    let difference = run(&[
        "diff",
        "-rq",
        "--no-dereference",
        "--exclude=pipe",
        "--exclude=console",
        "--exclude=disk",
        text(&mount.at("web/snapshots/before/rootfs/")),
        text(&mount.at("web/rootfs/")),
    ]);
    let said = String::from_utf8(difference.stdout).unwrap();
    let mut lines: Vec<&str> = said
        .lines()
        .map(|line| line.rsplit('/').next().unwrap())
        .collect();
    lines.sort();
    assert_eq!(lines, [": new", ": short"], "{said}");
    drop((kernel, before));
    // A remount shows the same, also for files that nothing has read yet.
    let numbers = |mount: &Mounted| mount.at("web/rootfs/a/b/c/deep").metadata().unwrap().ino();
    let number = numbers(&mount);
    mount.unmount();
    let mount = home.mount_read_only();
    assert_eq!(numbers(&mount), number);
    assert_same(&mount.at("web/rootfs/"), Loop::of(&changed).path());
}

#[test]
fn disk_img_is_the_raw_disk_with_its_holes() {
    let (home, image) = home();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    home.guest_write("web", 9 << 20, &[7; 300_000]);
    for (name, top) in [
        ("web/disk.img", home.live_disk("web")),
        ("web/snapshots/s/disk.img", home.snapshot_disk("web", "s")),
    ] {
        let ours = mount.at(name);
        let raw = home.beside("raw");
        succeed(&["qemu-img", "convert", "-O", "raw", text(&top), text(&raw)]);
        succeed(&["cmp", text(&ours), text(&raw)]);
        let size = raw.metadata().unwrap().len();
        assert_eq!(ours.metadata().unwrap().len(), size);
        // The data is where some layer has it, according to qemu-img.
        let map = succeed(&["qemu-img", "map", "--output=json", text(&top)]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for part in map
            .as_array()
            .unwrap()
            .iter()
            .filter(|part| part["data"] == true)
        {
            let start = part["start"].as_u64().unwrap();
            let end = start + part["length"].as_u64().unwrap();
            match runs.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => runs.push((start, end)),
            }
        }
        let blocks: u64 = runs.iter().map(|(start, end)| (end - start) / 512).sum();
        assert!(runs.len() > 2 && blocks * 512 < size, "{runs:?}");
        assert_eq!(seen_runs(&ours), runs);
        assert_eq!(ours.metadata().unwrap().blocks(), blocks);
        // Sparse copies keep the holes.
        let copy = home.beside("copy");
        succeed(&["cp", "--sparse=auto", text(&ours), text(&copy)]);
        assert!(copy.metadata().unwrap().blocks() <= blocks);
        succeed(&["cmp", text(&copy), text(&raw)]);
    }
    // Random access works, and there is nothing after the last byte.
    let file = File::open(mount.at("web/disk.img")).unwrap();
    let raw = fs::read(home.beside("raw")).unwrap();
    assert_eq!(raw.len() as u64, image.metadata().unwrap().len());
    let mut bytes = [0; 5000];
    assert_eq!(
        file.read_at(&mut bytes, raw.len() as u64 - 1000).unwrap(),
        1000
    );
    assert_eq!(file.read_at(&mut bytes, raw.len() as u64).unwrap(), 0);
    for at in (0..raw.len() - 5000).step_by(1_234_567).rev() {
        File::open(mount.at("web/snapshots/s/disk.img"))
            .unwrap()
            .read_exact_at(&mut bytes, at as u64)
            .unwrap();
        assert!(bytes[..] == raw[at..at + 5000], "at {at}");
    }
}

/// Returns the ranges of a file that hold data according to lseek.
fn seen_runs(path: &Path) -> Vec<(u64, u64)> {
    const SCRIPT: &str = "
import os, sys, json
f = os.open(sys.argv[1], os.O_RDONLY); at = 0; runs = []
while True:
    try: at = os.lseek(f, at, os.SEEK_DATA)
    except OSError as e:
        assert e.errno == 6, e
        break
    end = os.lseek(f, at, os.SEEK_HOLE); runs.append((at, end)); at = end
print(json.dumps(runs))";
    let said = succeed(&["python3", "-c", SCRIPT, text(path)]);
    serde_json::from_str(&said).unwrap()
}

#[test]
fn disk_img_is_good_for_what_takes_disks() {
    let (home, image) = home();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    let disk = mount.at("web/snapshots/s/disk.img");
    let reference = Loop::of(&image);
    let through = Loop::of(&disk);
    assert_same(through.path(), reference.path());
    drop((through, reference));
    let copy = home.beside("copy.qcow2");
    succeed(&[
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&disk),
        text(&copy),
    ]);
    succeed(&[
        "qemu-img",
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        text(&copy),
        text(&image),
    ]);
    let said = succeed(&["debugfs", "-R", "cat /a/b/c/deep", text(&disk)]);
    assert_eq!(said, "deep\n");
    succeed(&["e2fsck", "-fn", text(&disk)]);
    let out = home.beside("out");
    let (from, to) = (format!("if={}", text(&disk)), format!("of={}", text(&out)));
    succeed(&["dd", &from, &to, "bs=1M", "status=none"]);
    succeed(&["cmp", text(&out), text(&image)]);
    // Nobody may write to it, not even root.
    assert_eq!(errno(File::options().write(true).open(&disk)), libc::EROFS);
    assert_eq!(
        errno(fs::write(mount.at("web/rootfs/short"), "no")),
        libc::EROFS
    );
    assert_eq!(
        errno(fs::create_dir(mount.at("web/rootfs/no"))),
        libc::EROFS
    );
    assert_eq!(
        errno(fs::remove_file(mount.at("web/rootfs/short"))),
        libc::EROFS
    );
    assert_eq!(
        errno(fs::rename(
            mount.at("web/rootfs/short"),
            mount.at("web/rootfs/no")
        )),
        libc::EROFS
    );
}

#[test]
fn a_disk_with_partitions_shows_them_by_number() {
    let (home, image) = home();
    let whole = home.beside("whole.raw");
    for (label, fourth) in [("gpt", "4"), ("dos", "5")] {
        File::create(&whole).unwrap().set_len(96 << 20).unwrap();
        // The second has no known file system; the third is unused or is an extended partition.
        let table = match label {
            "gpt" => "label: gpt\n2048,65536\n67584,2048\n4: start=71680, size=65536\n",
            _ => "label: dos\n2048,65536\n67584,2048\n69632,,E\n71680,65536\n",
        };
        let apply = format!(
            "printf '{}' | sfdisk -q {}",
            table.replace('\n', "\\n"),
            text(&whole)
        );
        succeed(&["bash", "-o", "pipefail", "-c", &apply]);
        for seek in ["seek=1", "seek=35"] {
            let (from, to) = (
                format!("if={}", text(&image)),
                format!("of={}", text(&whole)),
            );
            succeed(&[
                "dd",
                &from,
                &to,
                "bs=1M",
                seek,
                "conv=notrunc",
                "status=none",
            ]);
        }
        give_disk(&home, "web", &whole);
        let mount = home.mount();
        let fourth = format!("p{fourth}");
        // An extended partition is not shown.
        let names = ["p1", "p2", &fourth];
        assert_eq!(mount.names("web/rootfs"), names, "{label}");
        let kernel = Loop::of(&image);
        assert_same(&mount.at("web/rootfs/p1/"), kernel.path());
        assert_same(&mount.at(format!("web/rootfs/{fourth}/")), kernel.path());
        assert_eq!(errno(fs::read_dir(mount.at("web/rootfs/p2"))), libc::EIO);
        assert!(mount.log().contains("partition p2"), "{}", mount.log());
        let table = succeed(&["sfdisk", "-d", text(&mount.at("web/disk.img"))]);
        assert!(table.contains("size=       65536"), "{table}");
        mount.unmount();
    }
}

#[test]
fn a_disk_that_has_no_readable_file_system_says_so_and_the_rest_works() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    // Damages the superblock, then everything.
    for (bytes, says) in [
        (vec![0xff; 4096], "EIO"),
        (vec![0; 4 << 20], "no file system"),
    ] {
        home.guest_write("web", 0, &bytes);
        let rootfs = mount.at("web/rootfs");
        assert!(rootfs.metadata().unwrap().is_dir());
        assert_eq!(errno(fs::read_dir(&rootfs)), libc::EIO, "{says}");
        assert_eq!(errno(File::open(rootfs.join("etc"))), libc::ENOENT);
        let log = mount.log();
        assert!(log.contains("looking into box web"), "{log}");
        let size = mount.at("web/disk.img").metadata().unwrap().len();
        assert_eq!(
            fs::read(mount.at("web/disk.img")).unwrap().len() as u64,
            size
        );
        mount.export_digest("web/export.boxlite");
        assert_eq!(mount.names("web/snapshots/s/rootfs"), ["etc", "lost+found"]);
    }
    let noted = mount
        .log()
        .lines()
        .filter(|line| line.contains("looking into"))
        .count();
    assert!(noted <= 4, "{}", mount.log());
    mount.copy("web", "web2");
    drop(mount);
    home.assert_whole();
}

#[test]
fn reading_a_changing_disk_gives_one_state_or_estale() {
    let (home, image) = home();
    let mount = home.mount();
    let rootfs = mount.at("web/rootfs");
    let kept = rootfs.canonicalize().unwrap();
    let old = File::open(rootfs.join("large")).unwrap();
    let old_disk = File::open(mount.at("web/disk.img")).unwrap();
    let mut start = vec![0; 4096];
    old.read_exact_at(&mut start, 0).unwrap();
    let changes = "write /etc/hostname a/hostname\nsif short mtime @1234567\n";
    change_files(&home, &image, changes);
    let mut bytes = vec![0; 100_000];
    assert_eq!(
        errno(old.read_exact_at(&mut bytes, 2_500_000)),
        libc::ESTALE
    );
    assert_eq!(
        errno(old_disk.read_exact_at(&mut bytes, 20 << 20)),
        libc::ESTALE
    );
    eventually("the new state is shown", || {
        rootfs.join("a/hostname").exists()
    });
    assert_eq!(rootfs.join("short").metadata().unwrap().mtime(), 1_234_567);
    let mut whole = Vec::new();
    File::open(rootfs.join("large"))
        .unwrap()
        .read_to_end(&mut whole)
        .unwrap();
    assert!(whole.len() == 3_000_000 && whole.starts_with(&start));
    // A restore replaces the file; open files keep the old contents.
    mount.snapshot("web", "s").unwrap();
    let old = File::open(rootfs.join("large")).unwrap();
    let number = old.metadata().unwrap().ino();
    give_disk(&home, "web", &image);
    let mut all = vec![0; 3_000_000];
    old.read_exact_at(&mut all, 0).unwrap();
    assert!(all == whole);
    eventually("the old state is shown again", || {
        !rootfs.join("a/hostname").exists()
    });
    assert_ne!(rootfs.join("large").metadata().unwrap().ino(), number);
    assert_same(&mount.at("web/rootfs/"), Loop::of(&image).path());
    assert_eq!(kept, rootfs.canonicalize().unwrap());
}

#[test]
fn a_restore_shows_in_rootfs_and_a_deleted_snapshot_goes_with_its_view() {
    let (home, image) = home();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    home.guest_write("web", 0, &vec![0; 1 << 20]);
    assert_eq!(errno(fs::read_dir(mount.at("web/rootfs"))), libc::EIO);
    let open = File::open(mount.at("web/snapshots/s/rootfs/large")).unwrap();
    let (from, to) = (
        mount.at("web/snapshots/s/export.boxlite"),
        mount.at("web/export.boxlite"),
    );
    succeed(&["cp", text(&from), text(&to)]);
    eventually("the restored state is shown", || {
        mount.at("web/rootfs/short").exists()
    });
    assert_same(&mount.at("web/rootfs/"), Loop::of(&image).path());
    mount.remove_snapshot("web", "s").unwrap();
    assert!(!mount.at(".boxlite/view/web/snapshots/s").exists());
    let mut bytes = vec![0; 3_000_000];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == fs::read(mount.at("web/rootfs/large")).unwrap());
    drop(open);
    // When the last reader is gone, the layer's space is reclaimed.
    fs::rename(mount.at("web"), mount.at("api")).unwrap();
    assert_eq!(fs::read(mount.at("api/rootfs/short")).unwrap(), b"x");
    drop(mount);
    home.assert_whole();
}

#[test]
fn more_states_than_are_kept_open_can_be_walked_at_once() {
    let (home, _) = home();
    let mount = home.mount();
    let count = 20;
    for number in 0..count {
        let name = format!("s{number}");
        mount.snapshot("web", &name).unwrap();
        home.guest_write("web", (30 << 20) + number * 4096, &[1; 4096]);
    }
    let open: Vec<File> = (0..count)
        .map(|n| File::open(mount.at(format!("web/snapshots/s{n}/rootfs/a/b/c/deep"))).unwrap())
        .collect();
    let inside: Vec<PathBuf> = (0..count)
        .map(|n| mount.at(format!("web/snapshots/s{n}/rootfs/")))
        .collect();
    for round in 0..2 {
        for path in &inside {
            assert_eq!(
                fs::read_dir(path.join("many")).unwrap().count(),
                1500,
                "{round}"
            );
            assert_eq!(fs::read(path.join("short")).unwrap(), b"x");
        }
        for file in &open {
            let mut bytes = [0; 5];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(&bytes, b"deep\n");
        }
    }
    drop(open);
    // Unused states are closed again. A few stay open, each with at most nine layers and the files
    // of a chain.
    let files = format!("/proc/{}/fd", mount.process());
    eventually("files are closed", || {
        fs::read_dir(&files).unwrap().count() < 150
    });
}

#[test]
fn tools_that_walk_the_mount_do_not_walk_into_guests() {
    let (home, _) = home();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    let root = text(mount.root());
    let out = home.beside("out");
    let found = succeed(&["find", root]);
    assert_eq!(
        found
            .lines()
            .filter(|line| line.ends_with("/rootfs"))
            .count(),
        2
    );
    assert!(
        !found.contains("deep") && !found.contains(".boxlite/"),
        "{found}"
    );
    let grep = run(&["grep", "-r", "--include=deep", "deep", root]);
    assert_eq!((grep.status.code(), grep.stdout), (Some(1), Vec::new()));
    succeed(&["cp", "-r", root, text(&out)]);
    for name in ["web/rootfs", "web/disk.img", "web/snapshots/s/rootfs"] {
        assert!(
            out.join(name).symlink_metadata().unwrap().is_symlink(),
            "{name}"
        );
    }
    assert!(!out.join(".boxlite").exists());
    let rsync = home.beside("rsync");
    succeed(&["rsync", "-a", &format!("{root}/"), text(&rsync)]);
    assert!(
        rsync
            .join("web/rootfs")
            .symlink_metadata()
            .unwrap()
            .is_symlink()
    );
    let tar = succeed(&["sh", "-c", &format!("tar c -C {root} . | tar t")]);
    assert!(
        tar.contains("./web/rootfs\n") && !tar.contains("deep"),
        "{tar}"
    );
    let du = succeed(&["du", "-s", "-B1", "--apparent-size", root]);
    let size: u64 = du.split_whitespace().next().unwrap().parse().unwrap();
    let exports = mount.at("web/export.boxlite").metadata().unwrap().len() * 2;
    assert!(size < exports + 100_000, "{du}");
    // Such a backup can be restored, whatever its links point to by then.
    succeed(&["cp", "-r", text(&out.join("web")), text(&mount.at("web2"))]);
    assert_eq!(fs::read(mount.at("web2/rootfs/short")).unwrap(), b"x");
    assert_eq!(
        fs::read(mount.at("web2/snapshots/s/rootfs/short")).unwrap(),
        b"x"
    );
    drop(mount);
    home.assert_whole();
}

#[test]
fn a_file_comes_back_by_cp_and_a_tree_with_its_modes() {
    let (home, image) = home();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    home.guest_write("web", 0, &vec![0; 4096]);
    let out = home.beside("out");
    let from = mount.at("web/snapshots/s/rootfs/a/.");
    succeed(&["cp", "-a", text(&from), text(&out)]);
    let kernel = Loop::of(&image);
    let (ours, theirs) = (text(&out), kernel.path().join("a"));
    succeed(&["diff", "-r", ours, text(&theirs)]);
    // Sparse as before.
    succeed(&["cp", text(&mount.at("web/snapshots/s/rootfs/sparse")), ours]);
    assert!(out.join("sparse").metadata().unwrap().blocks() <= 4 * 8 * 4);
    let archive = home.beside("rootfs.tar");
    let rootfs = mount.at("web/snapshots/s/rootfs");
    succeed(&[
        "tar",
        "--xattrs",
        "-cf",
        text(&archive),
        "-C",
        text(&rootfs),
        ".",
    ]);
    let listing = succeed(&["tar", "tvf", text(&archive)]);
    assert!(
        listing.contains("1234/70000") && listing.contains("c---------"),
        "{listing}"
    );
}

#[test]
fn devices_and_setuid_files_of_guests_are_shown_and_do_nothing() {
    let (home, _) = home();
    let mount = home.mount();
    let rootfs = mount.at("web/rootfs");
    assert_eq!(errno(File::open(rootfs.join("console"))), libc::EACCES);
    assert_eq!(errno(File::open(rootfs.join("disk"))), libc::EACCES);
    let options = succeed(&["findmnt", "-no", "OPTIONS", text(mount.root())]);
    for option in ["nosuid", "nodev"] {
        assert!(
            options.split(',').any(|it| it.trim() == option),
            "{options}"
        );
    }
}

/// Runs a script as an unprivileged user who may mount with FUSE. Some machines restrict the FUSE
/// device, so this puts another one in its place.
fn as_other(home: &TestHome, script: &str) -> std::process::Output {
    const WITH_FUSE: &str = "set -e; [ -e \"$1\" ] || mknod -m 666 \"$1\" c 10 229; \
        mount --bind \"$1\" /dev/fuse; \
        exec setpriv --reuid=nobody --regid=nogroup --clear-groups sh -c \"$2\"";
    let device = home.beside("fuse");
    Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            &format!("{LEAVE_OTHER_MOUNTS}{WITH_FUSE}"),
            "sh",
            text(&device),
            script,
        ])
        .env("KEEP", home.beside("mnt").canonicalize().unwrap())
        .output()
        .expect("unshare")
}

#[test]
fn modes_and_owners_of_guests_hold_for_others_where_others_are_let_in() {
    let (home, _) = home();
    // Other users need access to the directories above the mount.
    let open = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    open(home.root().parent().unwrap());
    open(home.root());
    let mount = home.mount_with(&["-o", "allow_other"], &[]);
    let at = |name: &str| text(&mount.at("web/rootfs").join(name)).to_owned();
    let read = |name: &str| as_other(&home, &format!("cat '{}'", at(name)));
    assert_eq!(read("short").stdout, b"x");
    for name in ["m0000", "m0640", "0700/secret"] {
        let refused = read(name);
        assert!(!refused.status.success(), "{name}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("Permission denied"));
    }
    assert!(
        !as_other(&home, &format!("ls '{}'", at("0700")))
            .status
            .success()
    );
    assert!(
        as_other(&home, &format!("test -x '{}'", at("m4755")))
            .status
            .success()
    );
    assert!(
        !as_other(&home, &format!("test -x '{}'", at("short")))
            .status
            .success()
    );
    assert_eq!(fs::read(mount.at("web/rootfs/m0000")).unwrap(), b"0000\n");
    mount.unmount();
    // Without allow_other, the home's owner can read all files, although they have other owners.
    let owner = home.root().parent().unwrap();
    succeed(&["chown", "-R", "nobody:nogroup", text(owner)]);
    let script = format!(
        "'{0}' mount '{1}' '{2}' && cat '{2}/web/rootfs/m0000' '{2}/web/rootfs/0700/secret' \
         '{2}/web/rootfs/short'; '{0}' unmount '{2}'",
        binary(),
        text(home.root()),
        text(mount_point(&home).as_path()),
    );
    let said = as_other(&home, &script);
    assert_eq!(
        String::from_utf8_lossy(&said.stdout),
        "0000\nsecret\nx",
        "{said:?}"
    );
}

fn mount_point(home: &TestHome) -> PathBuf {
    home.root().parent().unwrap().join("mnt")
}

#[test]
fn a_running_box_is_not_looked_into_but_its_snapshots_are() {
    let (home, _) = home();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    let mut shim = Command::new("sleep").arg("60").spawn().unwrap();
    fs::write(home.box_dir("web").join("shim.pid"), shim.id().to_string()).unwrap();
    assert_eq!(errno(fs::read_dir(mount.at("web/rootfs/"))), libc::EBUSY);
    assert_eq!(errno(File::open(mount.at("web/disk.img"))), libc::EBUSY);
    assert!(
        mount.log().contains("looking into box web"),
        "{}",
        mount.log()
    );
    assert_eq!(
        fs::read(mount.at("web/snapshots/s/rootfs/short")).unwrap(),
        b"x"
    );
    shim.kill().unwrap();
    shim.wait().unwrap();
    fs::remove_file(home.box_dir("web").join("shim.pid")).unwrap();
    assert_eq!(fs::read(mount.at("web/rootfs/short")).unwrap(), b"x");
}

#[test]
fn a_look_right_after_a_change_shows_the_new_state() {
    let (home, _) = home();
    let mount = home.mount();
    let at = |name: &str| text(&mount.at(name)).to_owned();
    home.guest_write("web", 31 << 20, &[1; 4096]);
    mount.snapshot("web", "s").unwrap();
    for round in 0..5u8 {
        home.guest_write("web", 31 << 20, &[round + 2; 4096]);
        let script = format!(
            "dd if={0} bs=4096 skip=7936 count=1 status=none | od -An -tu1 -N1; \
             cp {1} {2}; dd if={0} bs=4096 skip=7936 count=1 status=none | od -An -tu1 -N1; \
             rmdir {3} && mkdir {3} && stat -L -c %s {3}/rootfs/short {3}/export.boxlite.zst",
            at("web/disk.img"),
            at("web/snapshots/s/export.boxlite"),
            at("web/export.boxlite"),
            at("web/snapshots/s"),
        );
        let said = succeed(&["sh", "-c", &script]);
        let said: Vec<&str> = said.split_whitespace().collect();
        assert_eq!(said[..3], [&(round + 2).to_string(), "1", "1"], "{round}");
        assert_eq!(said.len(), 4);
    }
}

#[test]
fn links_follow_a_rename_at_once_whoever_takes_the_name() {
    let (home, _) = home();
    let mount = home.mount();
    mount.copy("web", "other");
    home.guest_write("other", 0, &vec![0; 1 << 20]);
    mount.snapshot("web", "a").unwrap();
    for (first, second) in [("web", "other"), ("other", "web")] {
        let script = format!(
            "cd {}; cat {first}/rootfs/short {first}/snapshots/a/rootfs/short && \
             mv {first} old && cat old/rootfs/short old/snapshots/a/rootfs/short && \
             mv {second} {first} && cat old/rootfs/short old/snapshots/a/rootfs/short && \
             mv old/snapshots/a old/snapshots/b && mkdir old/snapshots/a && \
             cat old/snapshots/b/rootfs/short && rmdir old/snapshots/a && \
             mv old/snapshots/b old/snapshots/a && cat old/snapshots/a/rootfs/short && \
             ! ls {first}/rootfs/ 2> /dev/null && mv old {second}",
            text(mount.root())
        );
        assert_eq!(succeed(&["bash", "-c", &script]), "xxxxxxxx", "{first}");
        assert!(!mount.at(".boxlite/view/none").exists());
    }
    drop(mount);
    home.assert_whole();
}
