//! Running boxes: reads see their disk at one moment, and the virtual machine always continues. A
//! process that keeps writing to the disk stands in for the machine.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::*;

/// The two places to which the writer writes each number, one after the other.
const FIRST: u64 = FREE_AREA;
const SECOND: u64 = FREE_AREA + 0x8_0000;

/// Makes qemu-io write numbers: each to the first place, then to the second, and now and then to a
/// new cluster. Each step is on disk before the next. The script reports when it has started, and
/// records which numbers are certain to be on disk.
const WRITER: &str = r#"
import os, subprocess, sys
disk, first, second, counter = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
io = subprocess.Popen(["qemu-io", "-f", "qcow2", disk], stdin=subprocess.PIPE,
                      stdout=subprocess.PIPE, bufsize=0)
def prompt():
    # One command at a time: it polls for the next, and does not see what it has read along.
    said = b""
    while not said.endswith(b"qemu-io> "):
        more = io.stdout.read(4096)
        if not more: sys.exit(1)
        said += more
def do(command):
    io.stdin.write(command.encode() + b"\n")
    prompt()
prompt()
number = 0
while True:
    number += 1
    byte = number % 251
    for place in (first, second):
        do(f"write -q -P {byte} {place} 512")
        do("flush")
    if number % 4 == 0:
        do(f"write -q -P {byte} {first + 65536 * (1 + number // 4 % 6)} 65536")
        do("flush")
    with open(counter + ".new", "w") as file:
        file.write(str(number))
    os.rename(counter + ".new", counter)
    if number == 1:
        print(io.pid, flush=True)
"#;

/// A stand-in for a virtual machine.
struct Machine {
    child: Child,
    /// The qemu-io process, a child of the one above.
    writer: u32,
    counter: std::path::PathBuf,
    pid_file: std::path::PathBuf,
}

impl Machine {
    /// Starts to write to the disk of a box, and records itself in shim.pid as BoxLite does.
    fn of(home: &TestHome, name: &str) -> Machine {
        let counter = home.beside(&format!("counter-{name}"));
        let mut child = Command::new("python3")
            .args(["-c", WRITER, text(&home.live_disk(name))])
            .args([FIRST.to_string(), SECOND.to_string()])
            .arg(&counter)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut line = String::new();
        let out = child.stdout.take().expect("its output");
        BufReader::new(out).read_line(&mut line).expect("a line");
        let writer = line.trim().parse().expect("the pid of qemu-io");
        let pid_file = home.box_dir(name).join("shim.pid");
        let machine = Machine {
            writer,
            counter,
            pid_file,
            child,
        };
        let started = started(machine.pid());
        fs::write(&machine.pid_file, format!("{}\n{started}\n", machine.pid())).unwrap();
        machine
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the number that is certain to be in both places.
    fn written(&self) -> u64 {
        fs::read_to_string(&self.counter).unwrap().parse().unwrap()
    }

    fn is_stopped(&self) -> bool {
        [self.pid(), self.writer]
            .iter()
            .any(|pid| matches!(state(*pid), 'T'))
    }

    /// Waits until it writes again.
    fn goes_on(&self) {
        let before = self.written();
        eventually("the machine continues", || {
            !self.is_stopped() && self.written() > before + 1
        });
    }

    fn signal(&self, signal: i32) {
        for pid in [self.pid(), self.writer] {
            // SAFETY: kill takes no memory; both are processes of this test.
            unsafe { libc::kill(pid as i32, signal) };
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::kill(self.writer as i32, libc::SIGKILL) };
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.pid_file);
        // No longer our child: it is gone once it has no disk open.
        let deadline = Instant::now() + Duration::from_secs(10);
        while state(self.writer) != 'Z' && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Returns the state of a process: R, S, T…; Z if it does not exist.
fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .and_then(|(_, fields)| fields.chars().next())
        .unwrap_or('Z')
}

/// Field 22 of proc_pid_stat(5).
fn started(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(22 - 3).unwrap().to_owned()
}

/// Returns the bytes at the two places of an image.
fn bytes_in(image: &Path) -> (u8, u8) {
    bytes_of(&fs::read(raw_disk(image)).unwrap())
}

/// Returns the bytes at the two places of a raw disk.
fn bytes_of(raw: &[u8]) -> (u8, u8) {
    let of = |place: u64| {
        let bytes = &raw[place as usize..place as usize + 512];
        assert!(
            bytes.iter().all(|byte| *byte == bytes[0]),
            "half a write at {place}"
        );
        bytes[0]
    };
    (of(FIRST), of(SECOND))
}

/// Asserts that the image is sound and has the writes in order, at least up to `before`.
fn assert_a_moment(image: &Path, before: u64, after: u64) {
    let check = run(&["qemu-img", "check", "-q", text(image)]);
    // 3: only leaks, clusters that the machine had taken and not used yet.
    let is_sound = matches!(check.status.code(), Some(0 | 3));
    assert!(is_sound, "{}: {check:?}", image.display());
    assert_in_order(bytes_in(image), before, after);
}

/// Asserts that the bytes at the two places are of one moment between these numbers.
fn assert_in_order((first, second): (u8, u8), before: u64, after: u64) {
    let (first, second) = (u64::from(first), u64::from(second));
    let is_next = |a: u64, b: u64| (a + 1) % 251 == b;
    assert!(
        first == second || is_next(second, first),
        "{second} without {first}"
    );
    // Everything that was on disk before the copy is in it.
    let may_be = |number: u64| number % 251 == second;
    assert!(
        (before..=after + 1).any(may_be),
        "{second} is none of {before} to {after}"
    );
}

#[test]
fn the_export_of_a_box_that_runs_is_its_disk_at_one_moment() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    let elsewhere = TestHome::empty();
    let mut tally = Tally::default();
    let target = home.beside("out.boxlite");
    for round in 0..how_many(6, 6, 100) {
        let name = ["export.boxlite", "export.boxlite.zst"][round % 2];
        let before = machine.written();
        succeed(&["cp", "-L", text(&mount.at("web").join(name)), text(&target)]);
        let unpacked = unpacked(&target);
        assert_a_moment(
            &unpacked.path().join("disk.qcow2"),
            before,
            machine.written(),
        );
        machine.goes_on();
        tally.operations += 1;
        tally.compared += 1;
        if round < 2 {
            let imported = format!("imported{round}");
            // Imports into another home, because BoxLite stops the boxes that run in a home when it
            // exits.
            elsewhere.wheel(&["import", text(&target), &imported]);
            let digest = digest(&elsewhere.live_disk(&imported));
            assert_eq!(digest, archive_digest(&target));
        }
    }
    // Copies without readers are removed after a while.
    eventually("the copies are gone", || !has_copies(&mount));
    assert!(
        mount.log().contains("it was paused for "),
        "{}",
        mount.log()
    );
    drop(machine);
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        digest(&home.live_disk("web"))
    );
    drop(mount);
    home.assert_whole();
    tally.finish("exports of boxes that run");
}

/// Tells whether the mount has a copy of a running box's disk.
fn has_copies(mount: &Mounted) -> bool {
    let fds = fs::read_dir(format!("/proc/{}/fd", mount.process()))
        .unwrap()
        .flatten();
    let mut names = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    names.any(|name| name.to_string_lossy().contains("/running-"))
}

#[test]
fn all_who_read_at_once_get_the_same_state_and_the_next_gets_another() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    let path = mount.at("web/export.boxlite");
    let mut slow = File::open(&path).unwrap();
    let mut begun = vec![0; 1000];
    slow.read_exact(&mut begun).unwrap();
    machine.goes_on();
    let read = |_| {
        let path = path.clone();
        thread::spawn(move || fs::read(path).unwrap())
    };
    let others: Vec<Vec<u8>> = (0..4)
        .map(read)
        .collect::<Vec<_>>()
        .into_iter()
        .map(|it| it.join().unwrap())
        .collect();
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).unwrap();
    begun.extend(rest);
    assert!(others.iter().all(|other| *other == begun));
    assert_eq!(fs::metadata(&path).unwrap().len(), begun.len() as u64);
    drop(slow);
    machine.goes_on();
    eventually("the copy is gone", || !has_copies(&mount));
    assert_ne!(fs::read(&path).unwrap(), begun);
}

#[test]
fn a_box_that_runs_is_cloned_with_its_snapshots_and_goes_on() {
    let home = TestHome::new();
    // One snapshot stays in the box, as BoxLite keeps it; the disk refers to it by that path.
    home.wheel(&["snapshot-create", "web", "theirs"]);
    let theirs = digest(&home.snapshot_disk("web", "theirs"));
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    let header = || {
        let mut bytes = vec![0; 4096];
        File::open(home.live_disk("web"))
            .unwrap()
            .read_exact(&mut bytes)
            .unwrap();
        bytes
    };
    let before = (header(), machine.written());
    mount.copy("web", "copy");
    assert_a_moment(&home.live_disk("copy"), before.1, machine.written());
    assert_eq!(
        header(),
        before.0,
        "the disk of a running box is not touched"
    );
    machine.goes_on();
    mount.copy("web/snapshots/theirs", "from-theirs");
    assert_eq!(digest(&home.live_disk("from-theirs")), theirs);
    // A running box is the source of a restore.
    succeed(&["cp", text(&archive()), text(&mount.at("other.boxlite"))]);
    let before = machine.written();
    succeed(&[
        "cp",
        text(&mount.at("web/export.boxlite")),
        text(&mount.at("other/export.boxlite")),
    ]);
    assert_a_moment(
        &home.live_disk("other"),
        before.saturating_sub(400),
        machine.written(),
    );
    machine.goes_on();
    drop(machine);
    assert_eq!(snapshots_by_boxlite(&home, "copy"), ["theirs"]);
    assert_eq!(digest(&home.snapshot_disk("copy", "theirs")), theirs);
    let live = digest(&home.live_disk("copy"));
    // They need nothing of the box they were made from.
    home.wheel(&["remove", "web", "--force"]);
    drop(mount);
    home.assert_whole_but_leaks();
    assert_eq!(digest(&home.live_disk("copy")), live);
    let place = tempfile::tempdir().unwrap();
    let exported = home.wheel(&["export", "copy", text(place.path())]);
    assert_eq!(
        archive_digest(exported["path"].as_str().unwrap().as_ref()),
        live
    );
}

/// Returns the names of a box's snapshots, as BoxLite lists them.
fn snapshots_by_boxlite(home: &TestHome, name: &str) -> Vec<String> {
    let listed = home.wheel(&["snapshot-list", name]);
    let rows = listed.as_array().unwrap().iter();
    let names = rows.map(|it| it["name"].as_str().unwrap().to_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_of_a_running_box_is_its_disk_at_one_moment() {
    for beside_runtime in [false, true] {
        let home = TestHome::new();
        // Its layer is inside the box, and the live disk names it by that path.
        home.wheel(&["snapshot-create", "web", "theirs"]);
        let mount = home.mount();
        // A runtime that starts kills machines that it does not know.
        let runtime = beside_runtime.then(|| home.hold());
        let machine = Machine::of(&home, "web");
        let live = fs::metadata(home.live_disk("web")).unwrap().ino();
        let mut taken = Vec::new();
        for name in ["first", "second", "third"] {
            let before = machine.written();
            mount.snapshot("web", name).unwrap();
            assert_a_moment(&home.snapshot_disk("web", name), before, machine.written());
            machine.goes_on();
            taken.push((name, digest(&home.snapshot_disk("web", name))));
        }
        assert_eq!(errno(mount.snapshot("web", "first")), libc::EEXIST);
        let now = fs::metadata(home.live_disk("web")).unwrap().ino();
        assert_eq!(now, live, "the machine's disk is left alone");
        // They stay as they are while the machine goes on, and can be cloned and exported.
        machine.goes_on();
        for (name, digest_of_snapshot) in &taken {
            assert_eq!(
                digest(&home.snapshot_disk("web", name)),
                *digest_of_snapshot
            );
            let export = format!("web/snapshots/{name}/export.boxlite");
            assert_eq!(mount.export_digest(&export), *digest_of_snapshot);
        }
        mount.copy("web/snapshots/second", "copy");
        assert_eq!(digest(&home.live_disk("copy")), taken[1].1);
        drop(machine);
        drop(runtime);
        // To BoxLite they are ordinary snapshots.
        let names = snapshots_by_boxlite(&home, "web");
        assert_eq!(names, ["first", "second", "theirs", "third"]);
        home.wheel(&["snapshot-restore", "web", "second"]);
        assert_eq!(digest(&home.live_disk("web")), taken[1].1);
        home.wheel(&["snapshot-remove", "web", "third"]);
        mount.remove_snapshot("web", "first").unwrap();
        assert_eq!(digest(&home.live_disk("web")), taken[1].1);
        drop(mount);
        home.assert_whole_but_leaks();
        assert_eq!(digest(&home.live_disk("copy")), taken[1].1);
    }
}

#[test]
fn a_second_snapshot_of_a_running_box_holds_only_the_difference() {
    let home = TestHome::new();
    let live = home.live_disk("web");
    let write = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 5 6M 2M"];
    succeed(&[&write[..], &[text(&live)]].concat());
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    let mut moments = Vec::new();
    for name in ["first", "second", "third"] {
        machine.goes_on();
        let before = machine.written();
        mount.snapshot("web", name).unwrap();
        assert_a_moment(&home.snapshot_disk("web", name), before, machine.written());
        moments.push((name, digest(&home.snapshot_disk("web", name))));
    }
    let bytes = |name: &str| fs::metadata(home.snapshot_disk("web", name)).unwrap().len();
    for name in ["second", "third"] {
        assert!(bytes(name) < bytes("first") / 2, "{name}: {}", bytes(name));
    }
    machine.goes_on();
    drop(machine);
    // What later ones read stays without the earlier ones.
    for (number, (name, _)) in moments.iter().enumerate() {
        for (later, digest_of) in &moments[number..] {
            assert_eq!(
                digest(&home.snapshot_disk("web", later)),
                *digest_of,
                "{later}"
            );
        }
        home.wheel(&["snapshot-restore", "web", name]);
        assert_eq!(digest(&home.live_disk("web")), moments[number].1);
        eventually("the restored disk is seen", || {
            mount.remove_snapshot("web", name).is_ok()
        });
    }
    assert_eq!(digest(&home.live_disk("web")), moments[2].1);
    mount.unmount();
    home.assert_whole_but_leaks();
}

#[test]
fn a_snapshot_of_a_running_box_that_is_cut_off_is_whole_or_gone() {
    for point in [
        "running.begun",
        "running.paused",
        "running.copied",
        "flat.recorded",
        "flat.installed",
        "running.referred",
        "snapshot.directory",
        "snapshot.linked",
        "snapshot.recorded",
    ] {
        let home = TestHome::new();
        let mut mount = home.mount_crashing_at(point);
        let machine = Machine::of(&home, "web");
        let before = machine.written();
        let _ = mount.snapshot("web", "a");
        assert!(mount.has_crashed(), "{point}");
        let after = machine.written();
        machine.goes_on();
        drop(mount);
        let mount = home.mount();
        for name in mount.names("web/snapshots") {
            assert_a_moment(&home.snapshot_disk("web", &name), before, after);
        }
        drop(machine);
        // The next change of the box recovers it.
        mount.snapshot("web", "b").unwrap();
        mount.unmount();
        home.assert_whole_but_leaks();
    }
}

#[test]
fn a_machine_that_writes_below_the_top_is_copied_where_it_writes() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    // BoxLite's snapshot of a running box: the machine goes on writing to the renamed file.
    let live = home.live_disk("web");
    let renamed = home.box_dir("web").join("snapshots/theirs/disk.qcow2");
    fs::create_dir_all(renamed.parent().unwrap()).unwrap();
    fs::rename(&live, &renamed).unwrap();
    succeed(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-F",
        "qcow2",
        "-b",
        text(&renamed),
        text(&live),
        "64M",
    ]);
    machine.goes_on();
    let before = machine.written();
    mount.snapshot("web", "a").unwrap();
    assert_a_moment(&home.snapshot_disk("web", "a"), before, machine.written());
    machine.goes_on();
    let before = machine.written();
    let target = home.beside("out.boxlite");
    succeed(&["cp", text(&mount.at("web/export.boxlite")), text(&target)]);
    let unpacked = unpacked(&target);
    assert_a_moment(
        &unpacked.path().join("disk.qcow2"),
        before,
        machine.written(),
    );
    let before = machine.written();
    mount.copy("web", "copy");
    assert_a_moment(&home.live_disk("copy"), before, machine.written());
    let copied = digest(&home.live_disk("copy"));
    machine.goes_on();
    assert_eq!(
        digest(&home.live_disk("copy")),
        copied,
        "the clone does not change"
    );
}

#[test]
fn a_snapshot_that_a_machine_still_writes_is_busy_until_the_machine_ends() {
    let home = TestHome::new();
    let mount = home.mount();
    let mut boxlite = home.hold();
    let machine = Machine::of(&home, "web");
    // BoxLite renames the disk that the machine has open.
    boxlite.must(&["snapshot-create", "web", "theirs"]);
    boxlite.must(&["clone", "web", "clone"]);
    machine.goes_on();
    eventually("the snapshot is seen", || {
        mount.names("web/snapshots") == ["theirs"] && mount.names("").len() == 2
    });
    let busy =
        |result: std::io::Result<()>| assert_eq!(errno(result), libc::EBUSY, "{}", mount.log());
    for name in ["web/snapshots/theirs", "clone"] {
        busy(File::open(mount.at(name).join("export.boxlite")).map(drop));
        busy(fs::read_dir(mount.at(name).join("rootfs/")).map(drop));
        busy(File::open(mount.at(name).join("disk.img")).map(drop));
        let to = format!("of-{}", name.replace('/', "-"));
        let said = fail(&["cp", "-r", text(&mount.at(name)), text(&mount.at(to))]);
        assert!(said.contains("busy"), "{said}");
    }
    assert!(
        mount.log().contains("still changes: a machine writes to"),
        "{}",
        mount.log()
    );
    busy(mount.snapshot("clone", "s"));
    // The box itself is its machine's state.
    let before = machine.written();
    let taken = mount.snapshot("web", "ours");
    assert!(taken.is_ok(), "{}", mount.log());
    assert_a_moment(
        &home.snapshot_disk("web", "ours"),
        before,
        machine.written(),
    );
    drop(machine);
    drop(boxlite);
    mount.export_digest("web/snapshots/theirs/export.boxlite");
    mount.copy("clone", "copy");
    assert_eq!(
        digest(&home.live_disk("copy")),
        digest(&home.live_disk("clone"))
    );
    drop(mount);
    home.assert_whole_but_leaks();
}

#[test]
fn a_look_into_a_running_box_shows_its_disk_at_one_moment() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    for _ in 0..how_many(3, 3, 30) {
        // Each process sees the disk as it is then.
        let before = machine.written();
        let copied = home.beside("disk.img");
        succeed(&["cp", "-L", text(&mount.at("web/disk.img")), text(&copied)]);
        let raw = fs::read(&copied).unwrap();
        assert_in_order(bytes_of(&raw), before, machine.written());
        machine.goes_on();
    }
    let rootfs = mount.at("web/rootfs");
    assert_eq!(
        fs::read_to_string(rootfs.join("etc/hostname")).unwrap(),
        "web\n"
    );
    let listed = succeed(&["ls", text(&rootfs.join("."))]);
    assert!(listed.contains("etc\n"), "{listed}");
    let found = succeed(&["find", text(&rootfs.join(".")), "-name", "hostname"]);
    assert!(found.ends_with("/etc/hostname\n"), "{found}");
    succeed(&[
        "qemu-img",
        "info",
        "-f",
        "raw",
        text(&mount.at("web/disk.img")),
    ]);
    assert_eq!(errno(fs::write(rootfs.join("new"), "")), libc::EROFS);
    machine.goes_on();
    // A file that is open stays what it was, also when the copy is used for nothing else.
    let mut open = File::open(mount.at("web/disk.img")).unwrap();
    let mut begin = vec![0; 4096];
    open.read_exact(&mut begin).unwrap();
    drop(machine);
    let mut rest = Vec::new();
    open.read_to_end(&mut rest).unwrap();
    drop(open);
    // Once it has stopped, the disk itself is seen.
    let raw = fs::read(mount.at("web/disk.img")).unwrap();
    assert_eq!(bytes_of(&raw), bytes_in(&home.live_disk("web")));
    eventually("the copies are gone", || !has_copies(&mount));
    mount.unmount();
    home.assert_whole();
}

/// Prints the inode of a file in rootfs twice, with a write by the machine between.
const TWO_LOOKS: &str = r#"
import os, sys, time
path, counter = sys.argv[1:]
def written(): return int(open(counter).read())
first = os.stat(path).st_ino
before = written()
while written() < before + 2: time.sleep(0.005)
print(first, os.stat(path).st_ino)
"#;

#[test]
fn one_process_sees_one_state_of_a_running_box_and_the_next_another() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    let inodes = || {
        let file = mount.at("web/rootfs/etc/hostname");
        let said = succeed(&[
            "python3",
            "-c",
            TWO_LOOKS,
            text(&file),
            text(&machine.counter),
        ]);
        let numbers: Vec<u64> = said
            .split_whitespace()
            .map(|it| it.parse().unwrap())
            .collect();
        assert_eq!(numbers[0], numbers[1], "one process");
        numbers[0]
    };
    assert_ne!(inodes(), inodes(), "two processes");
    // What did not change is not copied again.
    machine.signal(libc::SIGSTOP);
    let looked = || run(&["stat", "-L", "-c", "%i", text(&mount.at("web/rootfs/etc"))]).stdout;
    let first = looked();
    assert!(!first.is_empty(), "{}", mount.log());
    eventually("the state is settled", || {
        let first = looked();
        first == looked()
    });
    machine.signal(libc::SIGCONT);
}

#[test]
fn looking_at_a_running_box_from_outside_copies_nothing() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    let root = text(mount.root());
    let web = mount.at("web");
    for command in [
        &["ls", "-lR", "--color=always", root][..],
        &["find", root, "-ls"],
        &["ls", "-lL", text(&web)],
        &[
            "stat",
            "-L",
            text(&web.join("rootfs")),
            text(&web.join("disk.img")),
        ],
        &["du", "-s", root],
        &["gio", "info", text(&web.join("rootfs"))],
        &["gio", "list", "-l", text(&web)],
    ] {
        succeed(command);
        assert!(!has_copies(&mount), "{command:?}");
    }
    let meta = fs::metadata(web.join("disk.img")).unwrap();
    assert_eq!(
        meta.len(),
        fs::read(web.join("disk.img")).unwrap().len() as u64
    );
    machine.goes_on();
}

#[test]
fn a_large_top_layer_of_a_running_box_is_not_copied_for_a_look() {
    let home = TestHome::in_memory();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    let machine = Machine::of(&home, "web");
    // It takes the space at its end, and is no longer.
    succeed(&[
        "fallocate",
        "-n",
        "-l",
        "300M",
        text(&home.live_disk("web")),
    ]);
    let busy = |result: std::io::Result<()>| assert_eq!(errno(result), libc::EBUSY);
    busy(fs::read_dir(mount.at("web/rootfs/")).map(drop));
    busy(fs::read(mount.at("web/rootfs/etc/hostname")).map(drop));
    busy(File::open(mount.at("web/disk.img")).map(drop));
    let log = mount.log();
    assert!(log.contains("take a snapshot and look into that"), "{log}");
    assert!(!has_copies(&mount));
    let hostname = mount.at("web/snapshots/s/rootfs/etc/hostname");
    assert_eq!(fs::read_to_string(hostname).unwrap(), "web\n");
    machine.goes_on();
}

#[test]
fn what_would_change_a_box_that_runs_is_busy() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let machine = Machine::of(&home, "web");
    assert_eq!(errno(mount.remove_snapshot("web", "a")), libc::EBUSY);
    assert!(
        mount.log().contains("its virtual machine runs as process"),
        "{}",
        mount.log()
    );
    let onto = mount.at("web/export.boxlite");
    fail(&["cp", text(&archive()), text(&onto)]);
    fail(&[
        "cp",
        text(&mount.at("web/snapshots/a/export.boxlite")),
        text(&onto),
    ]);
    assert_eq!(
        errno(fs::rename(mount.at("web"), mount.at("api"))),
        libc::EBUSY
    );
    assert_eq!(
        errno(fs::remove_file(mount.at("web/box.json"))),
        libc::EBUSY
    );
    machine.goes_on();
    // A process is never stopped unless it is certainly the machine.
    fs::write(&machine.pid_file, format!("{}\n", machine.pid())).unwrap();
    eventually("the copy is gone", || !has_copies(&mount));
    assert_eq!(errno(File::open(&onto)), libc::EBUSY);
    assert_eq!(errno(mount.snapshot("web", "b")), libc::EBUSY);
    fs::write(&machine.pid_file, format!("{}\n{}\n", machine.pid(), "12")).unwrap();
    assert_eq!(errno(File::open(&onto)), libc::EBUSY);
    machine.goes_on();
}

#[test]
fn a_machine_that_was_paused_by_us_goes_on_when_we_are_killed() {
    let home = TestHome::new();
    for point in ["running.paused", "running.copied"] {
        let mut mount = home.mount_crashing_at(point);
        let machine = Machine::of(&home, "web");
        let _ = File::open(mount.at("web/export.boxlite"));
        assert!(mount.has_crashed(), "{point}");
        eventually("it is resumed", || !machine.is_stopped());
        machine.goes_on();
        drop(mount);
        drop(machine);
        let mount = home.mount();
        assert_eq!(
            mount.export_digest("web/export.boxlite"),
            digest(&home.live_disk("web"))
        );
        drop(mount);
        let mut ours = names_in(&home.root().join(".boxlitefs"));
        ours.retain(|name| !matches!(name.as_str(), "layers" | "reserve"));
        assert_eq!(ours, ["log"]);
    }
    // The writer was killed in the middle of a step.
    let live = home.live_disk("web");
    run(&["qemu-img", "check", "-q", "-r", "leaks", text(&live)]);
    home.assert_whole();
}

#[test]
fn a_machine_that_somebody_else_paused_stays_so() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    machine.signal(libc::SIGSTOP);
    eventually("it is stopped", || {
        state(machine.writer) == 'T' && state(machine.pid()) == 'T'
    });
    let before = machine.written();
    let target = home.beside("out.boxlite");
    succeed(&["cp", text(&mount.at("web/export.boxlite")), text(&target)]);
    assert!(state(machine.writer) == 'T' && state(machine.pid()) == 'T');
    let unpacked = unpacked(&target);
    assert_a_moment(&unpacked.path().join("disk.qcow2"), before, before + 1);
    machine.signal(libc::SIGCONT);
    machine.goes_on();
}

/// Runs `act` while the mount is stopped at the point where it has paused the machine.
fn meanwhile(
    home: &TestHome,
    act: impl FnOnce(&Machine),
) -> (Mounted, Machine, std::io::Result<Vec<u8>>) {
    let mount = home.mount_with(&[], &[("BOXLITEFS_STOP_AT", "running.paused")]);
    let machine = Machine::of(home, "web");
    // From then on, the disk no longer grows.
    eventually("it has written all places", || machine.written() > 30);
    let path = mount.at("web/export.boxlite");
    let reader = thread::spawn(move || fs::read(path));
    eventually("the mount is stopped", || state(mount.process()) == 'T');
    let states = (
        state(machine.writer),
        state(machine.pid()),
        reader.is_finished(),
    );
    assert_eq!(
        states,
        ('T', 'T', false),
        "{}",
        fs::read_to_string(home.root().join(".boxlitefs/log")).unwrap()
    );
    act(&machine);
    // SAFETY: kill takes no memory; the process is a child of this test.
    unsafe { libc::kill(mount.process() as i32, libc::SIGCONT) };
    let read = reader.join().unwrap();
    (mount, machine, read)
}

#[test]
fn a_machine_that_somebody_pauses_while_we_do_stays_paused() {
    let home = TestHome::new();
    let (_mount, machine, read) = meanwhile(&home, |machine| machine.signal(libc::SIGSTOP));
    assert!(!read.unwrap().is_empty());
    assert!(state(machine.writer) == 'T' && state(machine.pid()) == 'T');
    machine.signal(libc::SIGCONT);
    machine.goes_on();
}

#[test]
fn a_machine_that_somebody_sets_going_while_it_is_copied_is_noticed() {
    let home = TestHome::new();
    let (mount, machine, read) = meanwhile(&home, |machine| {
        machine.signal(libc::SIGCONT);
        machine.goes_on();
    });
    assert_eq!(errno(read), libc::EBUSY);
    assert!(
        mount.log().contains("another process resumed"),
        "{}",
        mount.log()
    );
    machine.goes_on();
    // A second read succeeds.
    assert!(!fs::read(mount.at("web/export.boxlite")).unwrap().is_empty());
}

#[test]
fn a_machine_that_ran_for_a_moment_is_noticed_though_its_disk_has_the_time_it_had() {
    let home = TestHome::new();
    let (mount, machine, read) = meanwhile(&home, |machine| {
        let disk = fs::File::options()
            .write(true)
            .open(home.live_disk("web"))
            .unwrap();
        let before = disk.metadata().unwrap();
        machine.signal(libc::SIGCONT);
        machine.goes_on();
        machine.signal(libc::SIGSTOP);
        eventually("it is stopped again", || {
            state(machine.pid()) == 'T' && state(machine.writer) == 'T'
        });
        // Restores the disk's times, as if everything had happened within one tick of the file
        // system's clock.
        assert_eq!(disk.metadata().unwrap().len(), before.len());
        disk.set_modified(before.modified().unwrap()).unwrap();
    });
    assert_eq!(errno(read), libc::EBUSY);
    assert!(mount.log().contains("another process resumed"));
    machine.signal(libc::SIGCONT);
    machine.goes_on();
}

#[test]
fn a_machine_that_is_killed_while_it_is_paused_leaves_a_box_as_it_was() {
    let home = TestHome::new();
    let (mount, machine, _read) = meanwhile(&home, |machine| machine.signal(libc::SIGKILL));
    drop(machine);
    eventually("the copy is gone", || !has_copies(&mount));
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        digest(&home.live_disk("web"))
    );
    drop(mount);
    // qemu-io was killed: qemu-img reports clusters that it allocated and did not use as leaks, not
    // errors.
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}");
}

#[test]
fn a_second_writer_that_is_none_of_the_machine_keeps_it_from_being_copied() {
    let home = TestHome::new();
    let mount = home.mount();
    let machine = Machine::of(&home, "web");
    let writer = fs::OpenOptions::new()
        .write(true)
        .open(home.live_disk("web"))
        .unwrap();
    assert_eq!(
        errno(File::open(mount.at("web/export.boxlite"))),
        libc::EBUSY
    );
    assert!(
        mount.log().contains("has the disk open for writing"),
        "{}",
        mount.log()
    );
    machine.goes_on();
    drop(writer);
    assert!(!fs::read(mount.at("web/export.boxlite")).unwrap().is_empty());
}
