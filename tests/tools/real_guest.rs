//! A real Linux guest, in QEMU without KVM, which writes files to the disk of a box and flushes
//! them all the time. Every file that it had flushed before a copy began has to be in the copy, and
//! e2fsck has to recover the file system. `tests/guest` prepares QEMU, the kernel and its init.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::*;

/// How long the guest may take to boot: 3 s alone, more beside other tests.
const BOOT: Duration = Duration::from_secs(120);

/// A virtual machine that runs a box.
struct Guest {
    child: Child,
    console: PathBuf,
    pid_file: PathBuf,
}

impl Guest {
    /// Boots the guest on the live disk of a box, and waits until it has flushed some files.
    fn of(home: &TestHome, name: &str) -> Guest {
        let prepared = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest");
        let console = home.beside(&format!("console-{name}"));
        let drive = format!(
            "file={},format=qcow2,if=virtio,cache=writeback",
            text(&home.live_disk(name))
        );
        let child = Command::new(prepared.join("qemu"))
            .args("-machine pc,accel=tcg -cpu max -m 256 -nodefaults -no-user-config".split(' '))
            .args("-display none -append".split(' '))
            .arg("console=ttyS0 quiet panic=-1")
            .args(["-serial", &format!("file:{}", text(&console))])
            .args(["-kernel", text(&prepared.join("vmlinuz"))])
            .args(["-initrd", text(&prepared.join("initrd.gz"))])
            .args(["-drive", &drive])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("QEMU: `make setup` prepares it");
        let pid_file = home.box_dir(name).join("shim.pid");
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        // Field 22 of proc_pid_stat(5): when it started.
        let started = fields.split(' ').nth(22 - 3).unwrap();
        fs::write(&pid_file, format!("{}\n{started}\n", child.id())).unwrap();
        let guest = Guest {
            child,
            console,
            pid_file,
        };
        let begun = Instant::now();
        while guest.flushed() < 3 {
            let said = guest.said();
            assert!(begun.elapsed() < BOOT, "the guest has not booted: {said}");
            thread::sleep(Duration::from_millis(20));
        }
        guest
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.console).unwrap_or_default()
    }

    /// Returns the number of the last file that is certain to be on the disk.
    fn flushed(&self) -> u32 {
        let said = self.said();
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut numbers = whole.lines().rev();
        let last = numbers.find_map(|line| line.trim().strip_prefix("synced ")?.parse().ok());
        last.unwrap_or(0)
    }

    /// Waits until it has flushed more files.
    fn goes_on(&self) {
        let before = self.flushed();
        eventually("the guest goes on", || self.flushed() > before + 1);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.pid_file);
    }
}

/// Asserts that e2fsck recovers the file system of a disk, and that it has the files up to
/// `flushed`.
fn assert_recovers(disk: &Path, format: &str, flushed: u32) {
    let raw = tempfile::NamedTempFile::new().unwrap();
    let convert = ["qemu-img", "convert", "-U", "-f", format, "-O", "raw"];
    succeed(&[&convert[..], &[text(disk), text(raw.path())]].concat());
    // It replays the journal, which is not an error: no -f, so that nothing else is repaired.
    let recovered = run(&["e2fsck", "-p", text(raw.path())]);
    assert!(
        matches!(recovered.status.code(), Some(0 | 1)),
        "{recovered:?}"
    );
    let sound = run(&["e2fsck", "-fn", text(raw.path())]);
    assert!(sound.status.success(), "{sound:?}");
    let commands: String = (1..=flushed)
        .map(|number| format!("cat /synced/{number}\n"))
        .collect();
    let script = tempfile::NamedTempFile::new().unwrap();
    fs::write(script.path(), commands).unwrap();
    let read = succeed(&["debugfs", "-f", text(script.path()), text(raw.path())]);
    for number in 1..=flushed {
        let line = format!("file {number}\n");
        assert!(
            read.contains(&line),
            "file {number} of {flushed} is missing"
        );
    }
}

/// Exports, clones, snapshots and looks into a box while its guest writes.
fn assert_copies_are_whole(home: &TestHome, mount: &Mounted, guest: &Guest, round: usize) {
    let out = home.beside("out.boxlite");
    let flushed = guest.flushed();
    succeed(&["cp", text(&mount.at("web/export.boxlite")), text(&out)]);
    let unpacked = unpacked(&out);
    assert_recovers(&unpacked.path().join("disk.qcow2"), "qcow2", flushed);

    let flushed = guest.flushed();
    let clone = format!("clone{round}");
    // Not with its snapshots: the machine may still write to one of BoxLite's.
    let archive = mount.at(format!("{clone}.boxlite"));
    succeed(&["cp", text(&mount.at("web/export.boxlite")), text(&archive)]);
    assert_recovers(&home.live_disk(&clone), "qcow2", flushed);

    let flushed = guest.flushed();
    let name = format!("s{round}");
    mount.snapshot("web", &name).unwrap();
    assert_recovers(&home.snapshot_disk("web", &name), "qcow2", flushed);

    let flushed = guest.flushed();
    let image = home.beside("disk.img");
    succeed(&["cp", "-L", text(&mount.at("web/disk.img")), text(&image)]);
    assert_recovers(&image, "raw", flushed);

    let flushed = guest.flushed();
    let seen = mount.at(format!("web/rootfs/synced/{flushed}"));
    assert_eq!(
        succeed(&["cat", text(&seen)]),
        format!("file {flushed}\n"),
        "{}",
        mount.log()
    );
    guest.goes_on();
}

#[test]
fn what_a_real_guest_flushed_is_in_every_copy_of_its_running_box() {
    let home = TestHome::new();
    // Started first: a runtime that starts ends the machines that its rows do not know.
    let mut boxlite = home.hold();
    let mount = home.mount();
    let guest = Guest::of(&home, "web");
    for round in 0..how_many(1, 2, 20) {
        assert_copies_are_whole(&home, &mount, &guest, round);
    }
    // BoxLite renames the disk that the machine has open, and puts an overlay in its place.
    boxlite.must(&["snapshot-create", "web", "theirs"]);
    guest.goes_on();
    assert_copies_are_whole(&home, &mount, &guest, 100);
    assert_eq!(
        errno(File::open(mount.at("web/snapshots/theirs/export.boxlite"))),
        libc::EBUSY,
        "its machine still writes to it"
    );
    let flushed = guest.flushed();
    drop(guest);
    // The machine is gone as if its power had failed.
    assert_recovers(&home.snapshot_disk("web", "theirs"), "qcow2", flushed);
    drop(boxlite);
    drop(mount);
    home.assert_whole_but_leaks();
}
