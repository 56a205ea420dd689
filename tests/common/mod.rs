//! What the tests that mount share: a throwaway home made by BoxLite itself, a mount of it that
//! never outlives its test, and the judges (BoxLite's wheel, qemu-img, tar) that say what is right.
//!
//! ```ignore
//! let home = TestHome::new();                      // BoxLite imported an ext4 disk as the box "web"
//! let mount = home.mount();                        // `boxlitefs mount -f`, gone with the guard
//! std::fs::create_dir(mount.at("web/snapshots/a")).unwrap();
//! home.wheel(&["snapshot-restore", "web", "a"]);   // BoxLite does something, beside us
//! home.guest_write("web", 0x10000, b"changed");    // what a guest would do to a stopped box's disk
//! assert_eq!(digest(&home.snapshot_disk("web", "a")), before);
//! home.assert_whole();                             // images, rows and leftovers are as they must be
//! ```
//!
//! Everything here is required: a wheel, a `qemu-img` or a FUSE device that is missing fails the
//! test and says what to install. The python with the wheel is `$BOXLITE_PYTHON`, else
//! `target/venv/bin/python`.

// Every test file uses a part of it.
#![allow(dead_code, unused_imports)]

mod known_images;
mod process;
mod session;
mod small_disk;
mod template;
mod torture;
pub mod wheel;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use known_images::Results;
pub use process::*;
pub use session::*;
pub use small_disk::*;
use template::Template;
pub use torture::*;

/// Bytes of the guest disk that [`TestHome::new`] makes.
pub const DISK_SIZE: &str = "8M";

/// Where the tests write as a guest would: past what mke2fs put into the first half of the disk.
pub const FREE_AREA: u64 = 5 << 20;

/// What a box's directory has, sorted.
pub const BOX_FILES: [&str; 6] = [
    "box.json",
    "disk.img",
    "export.boxlite",
    "export.boxlite.zst",
    "rootfs",
    "snapshots",
];

/// What a snapshot's directory has, sorted.
pub const SNAPSHOT_FILES: [&str; 5] = [
    "disk.img",
    "export.boxlite",
    "export.boxlite.zst",
    "rootfs",
    "snapshot.json",
];

/// How long a test waits for an event before it fails. No promise is a time: the machine may be
/// busy with other work.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The beginning of a script in a mount namespace of its own: the mounts of other tests, which were
/// copied into it, would live on there after those tests have unmounted them. $KEEP is left.
pub const LEAVE_OTHER_MOUNTS: &str = "findmnt -rn -o TARGET -t fuse.boxlite,fuse |
    while read -r other; do [ \"$other\" = \"${KEEP:-}\" ] || umount -l -c \"$other\"; done\n";

// ---- the home ---------------------------------------------------------------------------------

/// A BoxLite home in a directory of its own, with the box `web` in it. Made by BoxLite.
pub struct TestHome {
    place: TempDir,
    root: PathBuf,
}

impl TestHome {
    /// A home in which BoxLite has imported an ext4 disk as the box `web`.
    pub fn new() -> TestHome {
        TestHome::from_template(new_place(), Template::Web)
    }

    /// As [`TestHome::new`], kept in memory: for tests that go through hundreds of homes.
    pub fn in_memory() -> TestHome {
        let place = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| new_place());
        TestHome::from_template(place, Template::Web)
    }

    /// A home that BoxLite made and that has no box.
    pub fn empty() -> TestHome {
        TestHome::from_template(new_place(), Template::Empty)
    }

    fn from_template(place: TempDir, template: Template) -> TestHome {
        let home = TestHome::without_home(place);
        template.copy_to(&home.root);
        home
    }

    /// The place of a home that is not made yet.
    fn without_home(place: TempDir) -> TestHome {
        // The rows name canonical paths.
        let place_path = place.path().canonicalize().expect("its canonical path");
        fs::create_dir(place_path.join("mnt")).expect("the mountpoint");
        TestHome {
            root: place_path.join("home"),
            place,
        }
    }

    /// A copy of a home, as `cp -a` makes it: its rows still name the original's directories.
    pub fn copy_of(original: &TestHome) -> TestHome {
        let home = TestHome::without_home(new_place());
        succeed(&["cp", "-a", text(original.root()), text(&home.root)]);
        home
    }

    /// Puts the home's files aside; [`TestHome::put_back`] makes them those of this moment again.
    pub fn put_aside(&self, name: &str) {
        succeed(&["cp", "-a", text(&self.root), text(&self.beside(name))]);
    }

    /// Makes the home what it was when it was put aside under this name.
    pub fn put_back(&self, name: &str) {
        fs::remove_dir_all(&self.root).expect("the home goes");
        succeed(&["cp", "-a", text(&self.beside(name)), text(&self.root)]);
    }

    /// A digest of every file of the home but what SQLite and BoxLite write when they only look.
    pub fn fingerprint(&self) -> String {
        let script = "cd \"$1\" && find . -type f ! -path './logs/*' ! -name '*-shm' \
             ! '(' -name '*-wal' -empty ')' -exec sha256sum {} + | sort -k2";
        succeed(&["sh", "-c", script, "sh", text(&self.root)])
    }

    /// Every file of boxes and bases with a digest, what lies in a workspace, and how many rows there are:
    /// what must be the same when nothing was done.
    pub fn kept(&self) -> String {
        let mut files = Vec::new();
        for directory in ["boxes", "bases", "locks", ".boxlitefs"] {
            files_below(&self.root, Path::new(directory), &mut files);
        }
        files.sort();
        let database = self.database();
        let count = |table: &str| -> i64 {
            let count = format!("SELECT COUNT(*) FROM {table}");
            database.query_row(&count, [], |row| row.get(0)).unwrap()
        };
        let tables = [
            "box_config",
            "box_state",
            "snapshot",
            "base_disk",
            "base_disk_ref",
        ];
        let counts: Vec<i64> = tables.into_iter().map(count).collect();
        format!("{}\n{counts:?}", files.join("\n"))
    }

    /// The home's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path beside the home, for what a test puts aside.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Has BoxLite do something (`tests/wheel.py`) and returns what it printed.
    ///
    /// Judged by what it prints, not by its exit status: the wheel aborts now and then at exit,
    /// after its work is done.
    pub fn wheel(&self, command: &[&str]) -> Value {
        match self.try_wheel(command) {
            Ok(value) => value,
            Err(refusal) => panic!("BoxLite: {command:?}: {refusal}"),
        }
    }

    /// As [`TestHome::wheel`], for what BoxLite may refuse: the error is its message.
    pub fn try_wheel(&self, command: &[&str]) -> Result<Value, String> {
        let answer = self.try_wheel_batch(&[command]).remove(0);
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer),
        }
    }

    /// Has BoxLite do several things in one process; fails the test if it refuses one.
    pub fn wheel_batch(&self, commands: &[&[&str]]) -> Vec<Value> {
        let answers = self.try_wheel_batch(commands);
        for (command, answer) in commands.iter().zip(&answers) {
            assert!(
                answer.get("error").is_none(),
                "BoxLite: {command:?}: {answer}"
            );
        }
        answers
    }

    /// As [`TestHome::wheel_batch`]; what was refused has an `error`.
    pub fn try_wheel_batch(&self, commands: &[&[&str]]) -> Vec<Value> {
        wheel::ask(&self.root, commands)
    }

    /// A BoxLite runtime that holds the home until the value is dropped.
    pub fn hold(&self) -> Session {
        Session::start(self)
    }

    /// Mounts the home; the mount ends with the value.
    pub fn mount(&self) -> Mounted {
        self.mount_with(&[], &[])
    }

    /// Mounts the home read-only.
    pub fn mount_read_only(&self) -> Mounted {
        self.mount_with(&["-o", "ro"], &[])
    }

    /// Mounts the home in a process that kills itself at a named crash point.
    pub fn mount_crashing_at(&self, point: &str) -> Mounted {
        self.mount_with(&[], &[("BOXLITEFS_CRASH_AT", point)])
    }

    /// Mounts the home with more arguments and environment. One mount at a time.
    pub fn mount_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Mounted {
        Mounted::start(
            &self.root,
            &self.place.path().join("mnt").canonicalize().expect("mnt"),
            arguments,
            environment,
        )
    }

    /// The id of a box by its name.
    pub fn id(&self, name: &str) -> String {
        self.database()
            .query_row("SELECT id FROM box_config WHERE name = ?1", [name], |row| {
                row.get(0)
            })
            .unwrap_or_else(|e| panic!("box {name}: {e}"))
    }

    /// What BoxLite and we keep of a box's state.
    pub fn state(&self, name: &str) -> Value {
        let json: String = self
            .database()
            .query_row(
                "SELECT json FROM box_state WHERE id = ?1",
                [self.id(name)],
                |row| row.get(0),
            )
            .expect("its state");
        serde_json::from_str(&json).expect("JSON")
    }

    /// `boxes/ID` of a box.
    pub fn box_dir(&self, name: &str) -> PathBuf {
        self.root.join("boxes").join(self.id(name))
    }

    /// The live disk of a box.
    pub fn live_disk(&self, name: &str) -> PathBuf {
        self.box_dir(name).join("disks/disk.qcow2")
    }

    /// The layer of a snapshot.
    pub fn snapshot_disk(&self, name: &str, snapshot: &str) -> PathBuf {
        let dir = self.box_dir(name);
        let usual = dir.join("snapshots").join(snapshot).join("disk.qcow2");
        if usual.exists() {
            return usual;
        }
        // One that replaced another has a directory of its own.
        let id = dir.file_name().unwrap().to_str().unwrap();
        let path = self.database().query_row(
            "SELECT json_extract(json, '$.base_path') FROM snapshot WHERE box_id = ?1 AND name = ?2",
            [id, snapshot],
            |row| row.get::<_, String>(0),
        );
        path.map_or(usual, PathBuf::from)
    }

    /// The database, opened by SQLite, to look at rows and to make ones that BoxLite would not.
    pub fn database(&self) -> rusqlite::Connection {
        let database = rusqlite::Connection::open(self.root.join("db/boxlite.db")).expect("rows");
        database
            .busy_timeout(Duration::from_secs(10))
            .expect("a timeout");
        database
    }

    /// Writes to the disk of a stopped box as its guest would, through qemu-io.
    pub fn guest_write(&self, name: &str, offset: u64, bytes: &[u8]) {
        guest_write(&self.live_disk(name), offset, bytes);
    }

    /// Puts the box `web` on a raw image below `images/`, as BoxLite makes one at its first start.
    pub fn put_on_a_raw_image(&self) -> PathBuf {
        let images = self.root().join("images/disk-images");
        fs::create_dir_all(&images).unwrap();
        let image = images.join("alpine.ext4");
        let live = self.live_disk("web");
        succeed(&[
            "qemu-img",
            "convert",
            "-O",
            "raw",
            text(&live),
            text(&image),
        ]);
        fs::remove_file(&live).unwrap();
        succeed(&[
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(&image),
            "-F",
            "raw",
            text(&live),
        ]);
        image
    }

    /// `boxlitefs check`: its exit status and what it printed.
    pub fn check(&self) -> (i32, String) {
        let output = Command::new(binary())
            .arg("check")
            .arg(&self.root)
            .output()
            .expect("boxlitefs");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// `boxlitefs compact`: its exit status and what it printed.
    pub fn compact(&self) -> (i32, String) {
        let output = run(&[binary(), "compact", text(&self.root)]);
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// `boxlitefs compact` that kills itself at a named crash point; what it printed if it did not.
    pub fn compact_crashing_at(&self, point: &str) -> Option<String> {
        use std::os::unix::process::ExitStatusExt;
        let output = Command::new(binary())
            .arg("compact")
            .arg(&self.root)
            .env("BOXLITEFS_CRASH_AT", point)
            .output()
            .expect("boxlitefs");
        let said = [output.stdout, output.stderr].concat();
        let killed = output.status.signal() == Some(libc::SIGKILL);
        (!killed).then(|| String::from_utf8_lossy(&said).into_owned())
    }

    /// Bytes that the home's images take on the disk, every inode once.
    pub fn allocated(&self) -> u64 {
        let mut inodes = std::collections::BTreeMap::new();
        for image in self.images() {
            let meta = fs::metadata(image).expect("an image");
            inodes.insert(meta.ino(), meta.blocks() * 512);
        }
        inodes.values().sum()
    }

    /// Every qcow2 file below `boxes/` and `bases/`.
    pub fn images(&self) -> Vec<PathBuf> {
        let mut images = Vec::new();
        for directory in ["boxes", "bases"] {
            images_below(&self.root.join(directory), &mut images);
        }
        images
    }

    /// Fails unless `qemu-img check` finds nothing in any image and `boxlitefs check` nothing in
    /// the home.
    pub fn assert_whole(&self) {
        self.assert_images_clean();
        let (status, said) = self.check();
        assert_eq!(status, 0, "boxlitefs check: {said}");
    }

    /// As [`TestHome::assert_whole`], after a mount has seen the home: what nothing needs any more
    /// since BoxLite took its reader away is freed then.
    pub fn assert_whole_once_mounted(&self) {
        drop(self.mount());
        self.assert_whole();
    }

    /// Fails unless `qemu-img check` finds no error and no leak in any image of the home.
    pub fn assert_images_clean(&self) {
        let mut seen = BTreeSet::new();
        for image in self.images() {
            // A snapshot's layer is another name of a base.
            if !seen.insert(fs::metadata(&image).expect("an image").ino()) {
                continue;
            }
            check_image(&image);
        }
    }
}

/// Fails unless `qemu-img check` finds no error and no leak.
fn check_image(image: &Path) {
    static CHECKS: Results<()> = Results::new();
    CHECKS.of(image, || {
        let check = run(&["qemu-img", "check", "-U", "-q", text(image)]);
        assert!(check.status.success(), "{}: {check:?}", image.display());
    });
}

fn new_place() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Every file below a directory of a home with a digest of its contents; of a workspace all that is in it,
/// by name alone.
fn files_below(root: &Path, directory: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(root.join(directory)).into_iter().flatten() {
        let entry = entry.expect("an entry");
        let path = directory.join(entry.file_name());
        let kind = entry.file_type().expect("its kind");
        if !path.starts_with(".boxlitefs") {
            if kind.is_file() {
                // A change beside may take it away meanwhile.
                let bytes = fs::read(root.join(&path)).unwrap_or_default();
                files.push(format!("{} {}", path.display(), blake3::hash(&bytes)));
            }
        } else if path.components().count() > 2 && path.file_name() != Some(OsStr::new("lock")) {
            files.push(path.display().to_string());
        }
        if kind.is_dir() {
            files_below(root, &path, files);
        }
    }
}

fn images_below(directory: &Path, images: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            images_below(&path, images);
        } else if path.extension() == Some(OsStr::new("qcow2")) {
            images.push(path);
        }
    }
}

/// The archive that homes are made from: an ext4 disk with a file in it. Made once.
pub fn archive() -> PathBuf {
    template::archive()
}

/// Makes an archive of a new ext4 disk with more arguments for the wheel; returns its path.
pub fn make_archive(file_name: &str, arguments: &[&str]) -> PathBuf {
    let directory = own_directory();
    let place = tempfile::tempdir_in(directory).expect("a temporary directory");
    let made = place.path().join(file_name);
    let unused_home = TestHome {
        root: place.path().join("home"),
        place,
    };
    let mut command = vec!["make-archive", text(&made), "web", "--size", DISK_SIZE];
    command.extend(arguments);
    unused_home.wheel(&command);
    let target = directory.join(file_name);
    fs::rename(&made, &target).expect("the archive");
    target
}

/// A directory for what a test program makes once, of this process alone as long as it lives: two runs of one
/// program at the same time would replace each other's.
pub fn own_directory() -> &'static Path {
    static OWN: OnceLock<(PathBuf, File)> = OnceLock::new();
    let (directory, _) = OWN.get_or_init(|| {
        let program = std::env::current_exe().expect("the test program");
        let name = program.file_stem().expect("its name").to_string_lossy();
        (0..)
            .map(|n| Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{n}")))
            .find_map(|directory| {
                fs::create_dir_all(&directory).expect("the directory of a test program");
                let lock = File::create(directory.join("lock")).expect("its lock");
                match lock.try_lock() {
                    Ok(()) => Some((directory, lock)),
                    Err(TryLockError::WouldBlock) => None,
                    Err(TryLockError::Error(error)) => {
                        panic!("cannot lock {}: {error}", directory.display())
                    }
                }
            })
            .expect("one that nobody has")
    });
    directory
}

// ---- the mount --------------------------------------------------------------------------------

/// A mount served by a child process. Dropping it unmounts and ends the process, whatever happened.
pub struct Mounted {
    child: Child,
    mountpoint: PathBuf,
}

impl Mounted {
    fn start(home: &Path, mountpoint: &Path, arguments: &[&str], env: &[(&str, &str)]) -> Mounted {
        let child = Command::new(binary())
            .args(["mount", "-f"])
            .args(arguments)
            .args([home, mountpoint])
            // What goes wrong is in the mount's log; the terminal is the tests'.
            .env("RUST_LOG", "error")
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .spawn()
            .expect("boxlitefs");
        let mut mounted = Mounted {
            child,
            mountpoint: mountpoint.to_owned(),
        };
        mounted.wait_until_it_serves();
        mounted
    }

    fn wait_until_it_serves(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        // Looked up only once it is mounted; then the process answers.
        while !is_mounted(&self.mountpoint) || fs::metadata(self.at(".boxlite/log")).is_err() {
            if let Some(status) = self.child.try_wait().expect("its status") {
                panic!("boxlitefs mount ended: {status}");
            }
            assert!(Instant::now() < deadline, "boxlitefs does not serve");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The pid of the process that serves it.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Where it is mounted.
    pub fn root(&self) -> &Path {
        &self.mountpoint
    }

    /// A path in the mount.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.mountpoint.join(path)
    }

    /// The log that a user reads in the mount.
    pub fn log(&self) -> String {
        fs::read_to_string(self.at(".boxlite/log")).expect("the log")
    }

    /// The names in a directory of the mount, sorted.
    pub fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        names_in(&self.at(path))
    }

    /// `mkdir box/snapshots/name`.
    pub fn snapshot(&self, name: &str, snapshot: &str) -> io::Result<()> {
        fs::create_dir(self.at(name).join("snapshots").join(snapshot))
    }

    /// `rmdir box/snapshots/name`.
    pub fn remove_snapshot(&self, name: &str, snapshot: &str) -> io::Result<()> {
        fs::remove_dir(self.at(name).join("snapshots").join(snapshot))
    }

    /// `cp -r from to`, both in the mount; fails the test if cp does.
    pub fn copy(&self, from: &str, to: &str) {
        let (from, to) = (self.at(from), self.at(to));
        succeed(&["cp", "-r", text(&from), text(&to)]);
    }

    /// The guest's bytes in an export of the mount, such as `web/export.boxlite`.
    pub fn export_digest(&self, path: &str) -> String {
        archive_digest(&self.at(path))
    }

    /// Unmounts in the ordinary way and fails unless the process then ends well.
    pub fn unmount(mut self) {
        unmount(&self.mountpoint);
        let ended = wait(&mut self.child, PATIENCE).expect("boxlitefs ends after unmount");
        assert!(ended.success(), "{ended}");
    }

    /// Whether the process was killed (by a crash point), waited for.
    pub fn has_crashed(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        wait(&mut self.child, PATIENCE).is_some_and(|status| status.signal() == Some(libc::SIGKILL))
    }

    /// The signal that ended the process, waited for.
    pub fn ended_by(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        wait(&mut self.child, PATIENCE)?.signal()
    }

    /// Whether the process still serves.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mountpoint = self.mountpoint.clone();
        for way in [
            &["fusermount3", "-u", "-q", "--"][..],
            &["fusermount3", "-u", "-z", "-q", "--"],
            &["umount", "-l"],
        ] {
            if !is_mounted(&mountpoint) {
                break;
            }
            let _ = Command::new(way[0])
                .args(&way[1..])
                .arg(&mountpoint)
                .stderr(Stdio::null())
                .status();
        }
        end(&mut self.child);
    }
}

/// Runs `boxlitefs unmount`, which must succeed. The mount namespace of another test may have a copy of the
/// mount until that test detaches it: then the exit status is 3, and the process ends a little later.
pub fn unmount(mountpoint: &Path) {
    let unmount = [binary(), "unmount", text(mountpoint)];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let done = run(&unmount);
        // Another thread of the test may just be starting a program, which has, until it has begun, whatever
        // files this process had open at that moment.
        let is_busy = String::from_utf8_lossy(&done.stderr).contains(" is in use");
        if !is_busy || Instant::now() > deadline {
            match still_serving(&done) {
                // A process that has ended and was not waited for is a zombie: in /proc, without exe.
                Some(process) => eventually("the mount's process ended", || {
                    fs::read_link(process.join("exe")).is_err()
                }),
                None => assert!(done.status.success(), "{unmount:?}: {done:?}"),
            }
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The process (in /proc) that `boxlitefs unmount` says still serves another namespace.
fn still_serving(done: &Output) -> Option<PathBuf> {
    let said = String::from_utf8_lossy(&done.stderr);
    let (_, process) = said.split_once("boxlitefs (pid ")?;
    let (process, _) = process.split_once(") still serves it")?;
    (done.status.code() == Some(3)).then(|| Path::new("/proc").join(process))
}

/// Whether a FUSE file system is mounted there.
pub fn is_mounted(mountpoint: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
    table
        .lines()
        .filter(|line| line.contains(" - fuse"))
        .any(|line| line.split(' ').nth(4) == mountpoint.to_str())
}

/// Waits for a process to end by itself, then makes it.
fn end(child: &mut Child) {
    if wait(child, Duration::from_secs(5)).is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

// ---- the judges -------------------------------------------------------------------------------

/// Mounts a home and gives its box `web` the snapshot `s` of another state than now; returns the mount and a
/// backup of the box.
pub fn mount_and_backup(home: &TestHome) -> (Mounted, PathBuf) {
    let mount = home.mount();
    home.guest_write("web", FREE_AREA, b"then");
    mount.snapshot("web", "s").expect("a snapshot");
    home.guest_write("web", FREE_AREA, b"now");
    let backup = home.beside("backup");
    succeed(&["cp", "-r", text(&mount.at("web")), text(&backup)]);
    (mount, backup)
}

/// The program under test: that of this build, or `$BOXLITEFS_PROGRAM`, one that was built otherwise.
pub fn binary() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let other = std::env::var("BOXLITEFS_PROGRAM");
        other.unwrap_or_else(|_| env!("CARGO_BIN_EXE_boxlitefs").to_owned())
    })
}

/// The python that has the wheel.
pub fn python() -> PathBuf {
    std::env::var_os("BOXLITE_PYTHON").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/python"),
        PathBuf::from,
    )
}

/// Runs a program and returns how it ended and what it said.
pub fn run(command: &[&str]) -> Output {
    Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}; install it", command[0]))
}

/// Runs a program that must succeed; returns what it printed.
pub fn succeed(command: &[&str]) -> String {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program that must fail; returns what it complained of.
pub fn fail(command: &[&str]) -> String {
    let output = run(command);
    assert!(!output.status.success(), "{command:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The errno a call failed with.
pub fn errno<T: Debug>(result: io::Result<T>) -> i32 {
    result
        .expect_err("an error")
        .raw_os_error()
        .expect("an errno")
}

/// Waits until something is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Most memory the process has had, in KiB.
pub fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("its status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let digits = line.expect("VmHWM").split_whitespace().nth(1);
    digits.expect("a number").parse().expect("a number")
}

/// A path as text; the tests' paths are.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The names in a directory, sorted.
pub fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("a name in UTF-8"))
        .collect();
    names.sort();
    names
}

/// Writes to an image as a guest would, through qemu-io.
pub fn guest_write(disk: &Path, offset: u64, bytes: &[u8]) {
    let source = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(source.path(), bytes).expect("the pattern");
    let write = format!(
        "write -q -s {} {offset} {}",
        source.path().display(),
        bytes.len()
    );
    // qemu-io tells of a failed write on its output and exits well.
    let said = succeed(&["qemu-io", "-f", "qcow2", "-c", &write, text(disk)]);
    assert_eq!(said, "", "{write}");
}

/// A digest of the bytes that the guest sees of a qcow2 image and its chain, read by qemu-img. To
/// compare within one run.
pub fn digest(image: &Path) -> String {
    static DIGESTS: Results<String> = Results::new();
    DIGESTS.of(image, || {
        contents_digest(raw_disk(image).as_file()).expect("the raw disk")
    })
}

/// The bytes that the guest sees of a qcow2 image and its chain, read by qemu-img.
pub fn raw_disk(image: &Path) -> NamedTempFile {
    let raw = NamedTempFile::new().expect("a temporary file");
    succeed(&[
        "qemu-img",
        "convert",
        "-U",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(image),
        text(raw.path()),
    ]);
    raw
}

/// A digest of a file's size and of its blocks that are not zero. Most of a disk is holes, which are skipped.
fn contents_digest(file: &File) -> io::Result<String> {
    const BLOCK: usize = 64 << 10;
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while at < size {
        at = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data - data % BLOCK as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let there = &mut block[..(size - at).min(BLOCK as u64) as usize];
        file.read_exact_at(there, at)?;
        if *there != ZEROS[..there.len()] {
            hasher.update(&at.to_le_bytes()).update(there);
        }
        at += there.len() as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// [`digest`] of the disk in an archive, compressed or not.
pub fn archive_digest(archive: &Path) -> String {
    digest(&unpacked(archive).path().join("disk.qcow2"))
}

/// A directory with the `disk.qcow2` of an archive, compressed or not, unpacked by tar.
pub fn unpacked(archive: &Path) -> TempDir {
    let place = tempfile::tempdir().expect("a temporary directory");
    succeed(&[
        "tar",
        "-C",
        text(place.path()),
        "-xf",
        text(archive),
        "disk.qcow2",
    ]);
    place
}

/// The file names of an image's chain, top first, as qemu-img resolves it.
pub fn chain(image: &Path) -> Vec<PathBuf> {
    let said = succeed(&[
        "qemu-img",
        "info",
        "-U",
        "--backing-chain",
        "--output=json",
        text(image),
    ]);
    let layers: Value = serde_json::from_str(&said).expect("JSON");
    layers
        .as_array()
        .expect("layers")
        .iter()
        .map(|layer| PathBuf::from(layer["filename"].as_str().expect("a file name")))
        .collect()
}
