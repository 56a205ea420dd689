//! Large, odd and hostile guests: links stay inside the guest, directories of any size are listed,
//! and inode numbers are distinct. The kernel is the judge: it mounts the same file system through
//! a loop device.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::*;
use crate::inside::{Loop, assert_same, give_disk};

/// Makes a file system with the contents of `tree`. Options are split at spaces.
fn image_of(tree: &Path, place: &Path, options: &str, size: &str) -> PathBuf {
    let image = place.join("guest.raw");
    let mut command = vec!["mke2fs", "-q", "-F"];
    command.extend(options.split(' '));
    command.extend(["-d", text(tree), text(&image), size]);
    succeed(&command);
    image
}

fn debugfs(image: &Path, commands: &str) {
    let script = image.with_extension("debugfs");
    fs::write(&script, commands).unwrap();
    succeed(&["debugfs", "-w", "-f", text(&script), text(image)]);
}

/// Makes a disk with a GPT whose partitions are these images.
fn partitioned(place: &Path, images: &[&Path]) -> PathBuf {
    let whole = place.join("whole.raw");
    let mut table = String::from("label: gpt\n");
    for _ in images {
        table += "size=32M\n";
    }
    File::create(&whole).unwrap().set_len(128 << 20).unwrap();
    let script = place.join("table");
    fs::write(&script, table).unwrap();
    let make = format!("sfdisk -q '{}' < '{}'", text(&whole), text(&script));
    succeed(&["sh", "-c", &make]);
    for (number, image) in images.iter().enumerate() {
        let (from, to) = (
            format!("if={}", text(image)),
            format!("of={}", text(&whole)),
        );
        let seek = format!("seek={}", 1 + 32 * number);
        succeed(&[
            "dd",
            &from,
            &to,
            "bs=1M",
            &seek,
            "conv=notrunc",
            "status=none",
        ]);
    }
    whole
}

/// Makes directories, files and links between them, to the root and above it. The link targets are
/// known hard cases and random paths. $1 is the directory, $2 the seed.
const LINKS: &str = r#"
import os, random, sys
os.chdir(sys.argv[1]); rnd = random.Random(int(sys.argv[2]))
places = [".", "a", "a/b", "a/b/c", "d", "d/b"]
for place in places:
    os.makedirs(place, exist_ok=True)
    open(place + "/file", "w").write(place)
steps = ["..", "..", "..", "a", "b", "c", "d", "file", ".", ""]
for n in range(200):
    target = "/".join(rnd.choice(steps + ["l%d" % rnd.randrange(200)]) for _ in range(rnd.randint(1, 6)))
    target = rnd.choice(["/", "", ""]) + target or "."
    name = "%s/l%d" % (rnd.choice(places), n)
    os.symlink(target, name)
    if n % 3 == 0:
        for place in places:
            try: os.link(name, "%s/h%d" % (place, n), follow_symlinks=False)
            except FileExistsError: pass
odd = ["/etc/passwd", "../../../../../../../../etc/passwd", "/proc/self/root", "/proc/self/cwd/etc/passwd", "/", "..",
    "/../..", "//", "/a/../../etc/passwd", "b/../../../etc/passwd", "l1/../../../../etc/passwd", "self", "none/../../..",
    "t/" * 2000, "/" + "t/" * 500, "../" * 1300, "/a/b/c/" + "../" * 1000 + "file", "loop/../..", "a/../" * 300 + "a"]
for place in places:
    for n, target in enumerate(odd):
        os.symlink(target, "%s/odd%d" % (place, n))
    os.symlink("self", place + "/self"); os.symlink("loop2/..", place + "/loop"); os.symlink("loop/..", place + "/loop2")
"#;

/// Prints where each link leads, either in a chroot, as the guest sees it, or from outside. $1 is
/// the directory; $2 is `chroot` or empty.
const ENDS: &str = r#"
import os, sys
os.chdir(sys.argv[1])
if len(sys.argv) > 2:
    os.chroot(".")
for base, directories, files in sorted(os.walk(".")):
    for name in sorted(directories + files):
        path = os.path.join(base, name)
        if not os.path.islink(path):
            continue
        try:
            end = os.stat(path).st_ino & 0xffffffff
        except OSError as e:
            end = os.strerror(e.errno)
        print(path, end)
        if len(sys.argv) == 2:
            target = os.readlink(path)
            assert len(target) == os.lstat(path).st_size, path
            assert not target.startswith("/"), (path, target)
"#;

fn ends(root: &Path, chroot: bool) -> String {
    let root = format!("{}/", text(root));
    let mut command = vec!["python3", "-c", ENDS, &root];
    command.extend(chroot.then_some("chroot"));
    succeed(&command)
}

#[track_caller]
fn assert_same_lines(ours: &str, theirs: &str) {
    for (our, their) in ours.lines().zip(theirs.lines()) {
        assert_eq!(our, their);
    }
    assert_eq!(ours.lines().count(), theirs.lines().count());
}

/// Makes a home whose box has links to all kinds of targets; returns it with the file system's
/// image.
fn home_with_links(seed: &str) -> (TestHome, PathBuf) {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    succeed(&["python3", "-c", LINKS, text(tree.path()), seed]);
    let place = home.root().parent().unwrap();
    let image = image_of(tree.path(), place, "-t ext4 -b 4096 -N 8192", "32M");
    (home, image)
}

#[test]
fn links_lead_to_the_guests_own_files_as_they_do_for_the_guest() {
    let (home, image) = home_with_links("1");
    give_disk(&home, "web", &image);
    let kernel = Loop::of(&image);
    let theirs = ends(kernel.path(), true);
    assert!(theirs.lines().count() > 300, "{theirs}");
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    for path in [
        "web/rootfs",
        ".boxlite/view/web/rootfs",
        "web/snapshots/s/rootfs",
        ".boxlite/view/web/snapshots/s/rootfs",
    ] {
        assert_same_lines(&ends(&mount.at(path), false), &theirs);
    }
    // Links lead to the same files in a bind mount elsewhere, and after single names were looked
    // up.
    let elsewhere = tempfile::tempdir().unwrap();
    let rootfs = mount.at("web/rootfs").canonicalize().unwrap();
    succeed(&["mount", "--bind", text(&rootfs), text(elsewhere.path())]);
    let bound = ends(elsewhere.path(), false);
    succeed(&["umount", text(elsewhere.path())]);
    assert_same_lines(&bound, &theirs);
    mount.unmount();
    let mount = home.mount();
    for place in ["a/b/c", "", "d/b", "a"] {
        let directory = mount.at("web/rootfs").join(place);
        for n in (0..200).step_by(3) {
            let _ = fs::metadata(directory.join(format!("h{n}")));
        }
    }
    assert_same_lines(&ends(&mount.at("web/rootfs"), false), &theirs);
}

#[test]
fn links_in_a_partition_stay_in_it() {
    let (home, image) = home_with_links("2");
    let whole = partitioned(home.root().parent().unwrap(), &[&image, &image]);
    give_disk(&home, "web", &whole);
    let kernel = Loop::of(&image);
    let theirs = ends(kernel.path(), true);
    let mount = home.mount();
    for path in ["web/rootfs/p1", ".boxlite/view/web/rootfs/p2"] {
        assert_same_lines(&ends(&mount.at(path), false), &theirs);
    }
    let numbers = |path: &str| mount.at(path).metadata().unwrap().ino();
    assert_ne!(numbers("web/rootfs/p1/file"), numbers("web/rootfs/p2/file"));
}

#[test]
fn with_links_guest_links_say_what_the_guest_said() {
    let (home, image) = home_with_links("3");
    give_disk(&home, "web", &image);
    let mount = home.mount_with(&["-o", "links=guest"], &[]);
    let words = |root: &Path| {
        let list = "cd \"$1\" && find . -type l -printf '%P %s %n %l\\n' | LC_ALL=C sort";
        succeed(&["bash", "-c", list, "bash", &format!("{}/", text(root))])
    };
    let kernel = Loop::of(&image);
    assert_same_lines(&words(&mount.at("web/rootfs")), &words(kernel.path()));
    let status = succeed(&[binary(), "status", text(mount.root())]);
    assert!(status.contains("links=guest"), "{status}");
}

#[test]
fn a_copied_tree_has_links_that_stay_in_the_copy() {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    let at = |name: &str| tree.path().join(name);
    fs::create_dir_all(at("usr/bin")).unwrap();
    fs::create_dir_all(at("etc/alternatives")).unwrap();
    fs::write(at("usr/bin/tool-1"), "tool").unwrap();
    symlink("/usr/bin/tool-1", at("etc/alternatives/tool")).unwrap();
    symlink("/etc/alternatives/tool", at("usr/bin/tool")).unwrap();
    symlink("../../../../../usr/bin/tool", at("etc/high")).unwrap();
    symlink("/etc/passwd", at("usr/outside")).unwrap();
    symlink("usr/bin", at("bin")).unwrap();
    let place = home.root().parent().unwrap();
    let image = image_of(tree.path(), place, "-t ext4 -b 4096", "16M");
    give_disk(&home, "web", &image);
    let mount = home.mount();
    let from = format!("{}/", text(&mount.at("web/rootfs")));
    for (number, copy) in [
        "mkdir \"$2\" && cp -a \"$1.\" \"$2\"",
        "rsync -a \"$1\" \"$2\"",
        "mkdir \"$2\" && tar c -C \"$1\" . | tar x -C \"$2\"",
        "cp -aL \"$1.\" \"$2\" 2> /dev/null; test -d \"$2\"",
    ]
    .into_iter()
    .enumerate()
    {
        let to = home.beside(&format!("copy{number}"));
        succeed(&["bash", "-c", copy, "bash", &from, text(&to)]);
        for name in [
            "usr/bin/tool",
            "bin/tool",
            "etc/high",
            "etc/alternatives/tool",
        ] {
            assert_eq!(fs::read(to.join(name)).unwrap(), b"tool", "{copy} {name}");
        }
        assert!(fs::metadata(to.join("usr/outside")).is_err(), "{copy}");
    }
    let kept = fs::read_link(mount.at("web/rootfs/bin")).unwrap();
    assert_eq!(kept, Path::new("usr/bin"));
}

#[test]
fn a_directory_in_two_places_leads_nobody_out() {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir_all(tree.path().join("a/b/c/deep")).unwrap();
    symlink("../../../../file", tree.path().join("a/b/c/deep/link")).unwrap();
    symlink("/file", tree.path().join("a/b/c/deep/absolute")).unwrap();
    fs::write(tree.path().join("file"), "inside").unwrap();
    let place = home.root().parent().unwrap();
    let image = image_of(tree.path(), place, "-t ext4 -b 4096", "16M");
    debugfs(&image, "link a/b/c/deep deep\nlink / a/root\n");
    give_disk(&home, "web", &image);
    let mount = home.mount();
    let at = |name: &str| mount.at("web/rootfs").join(name);
    assert_eq!(fs::read(at("a/b/c/deep/link")).unwrap(), b"inside");
    for closed in ["deep", "a/root"] {
        assert!(at(closed).symlink_metadata().unwrap().is_dir());
        assert_eq!(errno(fs::read_dir(at(closed))), libc::EIO, "{closed}");
        assert_eq!(errno(fs::metadata(at(closed).join("link"))), libc::EIO);
    }
    assert!(mount.log().contains("e2fsck"), "{}", mount.log());
    // This also holds for a program whose working directory is below it.
    let script = format!(
        "cd '{0}/a/b/c/deep' && cat link && ls -lR '{0}/' > /dev/null; ls -l '{0}/deep' 2> /dev/null; \
         cat link absolute && cd ../../../.. && cat file",
        text(&mount.at("web/rootfs")).trim_end_matches('/')
    );
    assert_eq!(
        succeed(&["bash", "-c", &script]),
        "insideinsideinsideinside"
    );
    mount.unmount();
    let mount = home.mount_with(&["-o", "links=guest"], &[]);
    assert!(mount.at("web/rootfs/deep/link").symlink_metadata().is_ok());
}

/// Links $2 names of 40 bytes each to a few files in the directory $1.
const NAMES: &str = r#"
import os, sys
os.mkdir(sys.argv[1]); os.chdir(sys.argv[1])
for n in range(int(sys.argv[2])):
    name = "%040d" % (n * 7919)
    if n % 50000 == 0:
        first = name
        open(name, "w").close()
    else:
        os.link(first, name)
"#;

#[test]
#[ignore = "slow"]
fn a_directory_of_hundreds_of_thousands_of_names_is_listed_and_searched() {
    let home = TestHome::new();
    let empty = tempfile::tempdir().unwrap();
    let place = home.root().parent().unwrap();
    for (count, is_indexed) in [(200_000, true), (20_000, false)] {
        let options = if is_indexed {
            "-t ext4 -b 4096"
        } else {
            "-t ext4 -b 4096 -O ^metadata_csum"
        };
        let image = image_of(empty.path(), place, options, "64M");
        let mounted = tempfile::tempdir().unwrap();
        succeed(&["mount", "-o", "loop", text(&image), text(mounted.path())]);
        let many = mounted.path().join("many");
        let made = run(&["python3", "-c", NAMES, text(&many), &count.to_string()]);
        succeed(&["umount", text(mounted.path())]);
        assert!(made.status.success(), "{made:?}");
        if !is_indexed {
            // Without this option, the kernel would take minutes.
            debugfs(&image, "feature -dir_index\nsif many flags 0x80000\n");
        }
        give_disk(&home, "web", &image);
        let mount = home.mount();
        let many = mount.at("web/rootfs/many");
        let list =
            "cd \"$1\" && ls -lU --time-style=+%s | sort | sha256sum && ls -f | sort | sha256sum";
        let said =
            |root: &Path| succeed(&["bash", "-o", "pipefail", "-c", list, "bash", text(root)]);
        let kernel = Loop::of(&image);
        assert_eq!(said(&many), said(&kernel.path().join("many")), "{count}");
        for n in [0, 1, count / 2, count - 1] {
            let name = format!("{:040}", n * 7919);
            assert!(many.join(name).symlink_metadata().is_ok(), "{n}");
            let none = many.join(format!("{:040}", n * 7919 + 1));
            assert_eq!(errno(none.symlink_metadata()), libc::ENOENT);
        }
        // A listing continues from any earlier position, also backwards.
        const SEEK: &str = r#"
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Entry(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("len", ctypes.c_uint16), ("type", ctypes.c_uint8), ("name", ctypes.c_char * 256)]
libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Entry)
libc.telldir.restype = ctypes.c_long
for f in (libc.readdir, libc.telldir): f.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
d = libc.opendir(sys.argv[1].encode())
seen = []
for n in range(3000):
    at = libc.telldir(d)
    seen.append((at, libc.readdir(d).contents.name))
for at, name in seen[::-97]:
    libc.seekdir(d, at)
    assert libc.readdir(d).contents.name == name, (at, name)
"#;
        succeed(&["python3", "-c", SEEK, text(&many)]);
        assert!(peak_memory(mount.process()) < 400 << 20);
        drop(kernel);
        mount.unmount();
    }
}

#[test]
fn every_number_is_told_apart_by_programs_that_take_it_for_a_floating_point_number() {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        fs::write(tree.path().join(name), name).unwrap();
        fs::hard_link(
            tree.path().join(name),
            tree.path().join(format!("{name} again")),
        )
        .unwrap();
    }
    symlink("/a", tree.path().join("absolute")).unwrap();
    let place = home.root().parent().unwrap();
    let image = image_of(tree.path(), place, "-t ext4 -b 4096", "32M");
    let whole = partitioned(place, &[&image, &image]);
    give_disk(&home, "web", &whole);
    let mount = home.mount();
    mount.copy("web", "other");
    for name in ["s", "t"] {
        mount.snapshot("web", name).unwrap();
    }
    let numbers = |mount: &Mounted| {
        let list = "cd \"$1\" && find . .boxlite/view/ -printf '%i %p\\n' && \
                    find -L . .boxlite/view/ -type f -printf '%i %p\\n'";
        succeed(&["bash", "-c", list, "bash", text(mount.root())])
    };
    let said = numbers(&mount);
    let mut files = std::collections::BTreeMap::new();
    for line in said.lines() {
        let (number, path) = line.split_once(' ').unwrap();
        let number: u64 = number.parse().unwrap();
        assert!(number < 1 << 53, "{line}");
        files.insert(path.to_owned(), number);
    }
    // Files with the same name in two boxes, states or partitions are different files.
    let of = |path: &str| files[path];
    let mut all = std::collections::BTreeSet::new();
    for rootfs in [
        "web/rootfs",
        "other/rootfs",
        "web/snapshots/s/rootfs",
        "web/snapshots/t/rootfs",
    ] {
        for partition in ["p1", "p2"] {
            for name in ["a", "b", "c"] {
                let number = of(&format!(".boxlite/view/{rootfs}/{partition}/{name}"));
                assert!(all.insert(number), "{rootfs} {partition} {name}");
                let again = format!(".boxlite/view/{rootfs}/{partition}/{name} again");
                assert_eq!(of(&again), number);
            }
        }
    }
    // Numbers survive a remount, except those that are new in each mount.
    mount.unmount();
    let mount = home.mount();
    let later = numbers(&mount);
    let lasting = |said: &str| {
        let is_lasting = |line: &&str| !line.contains("status") && !line.contains(".boxlite/log");
        let mut lines: Vec<_> = said.lines().filter(is_lasting).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(lasting(&said), lasting(&later));
    if Command::new("node").arg("--version").output().is_ok() {
        const SCRIPT: &str = "const fs = require('fs'); const seen = new Set();
            for (const file of process.argv.slice(1)) seen.add(fs.statSync(file).ino);
            console.log(seen.size)";
        let file = |name: &str| text(&mount.at(format!("web/rootfs/{name}"))).to_owned();
        let names = [file("p1/a"), file("p1/b"), file("p2/a"), file("p2/b")];
        let mut command = vec!["node", "-e", SCRIPT];
        command.extend(names.iter().map(String::as_str));
        assert_eq!(succeed(&command).trim(), "4");
    }
}

#[test]
fn directories_that_tell_no_kinds_are_walked_to_the_end() {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    for n in 0..300 {
        fs::create_dir(tree.path().join(format!("directory number {n}"))).unwrap();
        fs::write(tree.path().join(format!("directory number {n}/file")), "x").unwrap();
    }
    symlink("directory number 1", tree.path().join("link")).unwrap();
    let place = home.root().parent().unwrap();
    let image = image_of(tree.path(), place, "-t ext2 -b 1024 -O ^filetype", "32M");
    give_disk(&home, "web", &image);
    let mount = home.mount();
    let kernel = Loop::of(&image);
    let list = "cd \"$1/\" && ls -R && find . -type f | wc -l";
    let said = |root: &Path| succeed(&["bash", "-c", list, "bash", text(root)]);
    assert_eq!(said(&mount.at("web/rootfs")), said(kernel.path()));
    assert_same(&mount.at("web/rootfs/"), kernel.path());
}

#[test]
fn attributes_that_only_an_administrator_can_read_are_listed_to_no_others() {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("file"), "x").unwrap();
    let place = home.root().parent().unwrap();
    let image = image_of(tree.path(), place, "-t ext4 -b 4096", "16M");
    debugfs(
        &image,
        "ea_set file trusted.overlay.opaque y\nea_set file user.note z\n",
    );
    give_disk(&home, "web", &image);
    let mount = home.mount();
    let kernel = Loop::of(&image);
    let list = "cd \"$1/\" && getfattr -d -m - file";
    for before in [
        "",
        "setpriv --bounding-set=-sys_admin ",
        "unshare --user --map-root-user ",
    ] {
        let script = format!("exec {before}bash -c '{list}' bash \"$1\"");
        let said = |root: &Path| succeed(&["bash", "-c", &script, "bash", text(root)]);
        let (ours, theirs) = (said(&mount.at("web/rootfs")), said(kernel.path()));
        assert_eq!(ours, theirs, "{before}");
        assert!(ours.contains("user.note"));
        assert_eq!(ours.contains("trusted."), before.is_empty());
    }
}

#[test]
fn names_and_links_that_are_no_text_come_out_as_they_are() {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\x01 \n");
    fs::write(tree.path().join(odd), "odd").unwrap();
    symlink(Path::new("/").join(odd), tree.path().join("link")).unwrap();
    let place = home.root().parent().unwrap();
    let image = image_of(tree.path(), place, "-t ext4 -b 4096", "16M");
    give_disk(&home, "web", &image);
    let mount = home.mount();
    assert_eq!(fs::read(mount.at("web/rootfs/link")).unwrap(), b"odd");
    let target = fs::read_link(mount.at("web/rootfs/link")).unwrap();
    assert_eq!(target.as_os_str(), odd);
}
