//! Shared helpers of the mounting tests: a throwaway home made by BoxLite itself, a mount of it
//! that never outlives its test, and the reference programs that judge results (BoxLite's wheel,
//! qemu-img, tar).
//!
//! ```ignore
//! let home = TestHome::new();                      // BoxLite imported a disk as "web"
//! let mount = home.mount();                        // `boxlitefs mount -f`, unmounted on drop
//! std::fs::create_dir(mount.at("web/snapshots/a")).unwrap();
//! home.wheel(&["snapshot-restore", "web", "a"]);   // BoxLite works on the mounted home
//! home.guest_write("web", 0x10000, b"changed");    // writes to the stopped box like its guest
//! assert_eq!(digest(&home.snapshot_disk("web", "a")), before);
//! home.assert_whole();                             // images and rows agree, nothing is left over
//! ```
//!
//! All tools are required: if the wheel, `qemu-img` or the FUSE device is missing, the test fails
//! and says what to install. The wheel's Python is `$BOXLITE_PYTHON`, else
//! `target/venv/bin/python`.

// Each test program uses only some of these helpers.
#![allow(dead_code, unused_imports)]

mod known_images;
mod process;
mod session;
mod small_disk;
mod template;
mod torture;
mod trace;
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use known_images::Results;
pub use process::*;
pub use session::*;
pub use small_disk::*;
use template::Template;
pub use torture::*;
pub use trace::*;

/// Size of the guest disk that [`TestHome::new`] makes.
pub const DISK_SIZE: &str = "8M";

/// Offset of the tests' guest writes, past the metadata that mke2fs puts in the first half.
pub const FREE_AREA: u64 = 5 << 20;

/// Entries of a box's directory, sorted.
pub const BOX_FILES: [&str; 6] = [
    "box.json",
    "disk.img",
    "export.boxlite",
    "export.boxlite.zst",
    "rootfs",
    "snapshots",
];

/// Entries of a snapshot's directory, sorted.
pub const SNAPSHOT_FILES: [&str; 5] = [
    "disk.img",
    "export.boxlite",
    "export.boxlite.zst",
    "rootfs",
    "snapshot.json",
];

/// How long a test waits for an event before it fails. It is generous because the machine may be
/// busy; no test asserts how fast something happens.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// First lines of a script that runs in its own mount namespace. They detach the mounts copied from
/// other tests, which would otherwise outlive their unmount there. The mount at $KEEP stays.
pub const LEAVE_OTHER_MOUNTS: &str = "findmnt -rn -o TARGET -t fuse.boxlite,fuse |
    while read -r other; do [ \"$other\" = \"${KEEP:-}\" ] || umount -l -c \"$other\"; done\n";

// ---- the home ---------------------------------------------------------------------------------

/// A BoxLite home in its own temporary directory.
pub struct TestHome {
    place: TempDir,
    root: PathBuf,
    keeps: AtomicBool,
}

impl TestHome {
    /// Makes a home in which BoxLite has imported an ext4 disk as the box `web`.
    pub fn new() -> TestHome {
        TestHome::from_template(new_place(), Template::Web)
    }

    /// Makes the same home as [`TestHome::new`] in memory, for tests that use hundreds of homes.
    pub fn in_memory() -> TestHome {
        let place = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| new_place());
        TestHome::from_template(place, Template::Web)
    }

    /// Makes a home without boxes.
    pub fn empty() -> TestHome {
        TestHome::from_template(new_place(), Template::Empty)
    }

    fn from_template(place: TempDir, template: Template) -> TestHome {
        let home = TestHome::without_home(place);
        template.copy_to(&home.root);
        home
    }

    /// Makes the directories around a home, but not the home itself.
    fn without_home(place: TempDir) -> TestHome {
        // BoxLite's rows contain canonical paths.
        let place_path = place.path().canonicalize().expect("its canonical path");
        fs::create_dir(place_path.join("mnt")).expect("the mountpoint");
        TestHome {
            root: place_path.join("home"),
            place,
            keeps: AtomicBool::new(false),
        }
    }

    /// Copies a home with `cp -a`. The copy's rows still refer to the original's directories.
    pub fn copy_of(original: &TestHome) -> TestHome {
        let home = TestHome::without_home(new_place());
        succeed(&["cp", "-a", text(original.root()), text(&home.root)]);
        home
    }

    /// Saves a copy of the home's files under `name`, for [`TestHome::put_back`].
    pub fn put_aside(&self, name: &str) {
        succeed(&["cp", "-a", text(&self.root), text(&self.beside(name))]);
    }

    /// Replaces the home with the copy that [`TestHome::put_aside`] saved under `name`.
    pub fn put_back(&self, name: &str) {
        fs::remove_dir_all(&self.root).expect("cannot remove the home");
        succeed(&["cp", "-a", text(&self.beside(name)), text(&self.root)]);
    }

    /// Returns a digest of every file of the home, except those that SQLite and BoxLite write even
    /// when they only read.
    pub fn fingerprint(&self) -> String {
        let script = "cd \"$1\" && find . -type f ! -path './logs/*' ! -name '*-shm' \
             ! '(' -name '*-wal' -empty ')' -exec sha256sum {} + | sort -k2";
        succeed(&["sh", "-c", script, "sh", text(&self.root)])
    }

    /// Lists the files of boxes and bases with digests, the names in workspaces, and row counts.
    /// The result stays the same if nothing was changed.
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

    /// Returns the home's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns a path next to the home, for a test's other files.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Runs one BoxLite command (`tests/wheel.py`) and returns what it printed.
    ///
    /// Only the output decides about success: the wheel sometimes aborts at exit, after its work
    /// is done.
    pub fn wheel(&self, command: &[&str]) -> Value {
        match self.try_wheel(command) {
            Ok(value) => value,
            Err(refusal) => panic!("BoxLite: {command:?}: {refusal}"),
        }
    }

    /// Runs a command that BoxLite may refuse; the error is its message.
    pub fn try_wheel(&self, command: &[&str]) -> Result<Value, String> {
        let answer = self.try_wheel_batch(&[command]).remove(0);
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer),
        }
    }

    /// Runs several BoxLite commands in one process; fails the test if BoxLite refuses one.
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

    /// Like [`TestHome::wheel_batch`], but the answer to a refused command has an `error` field.
    pub fn try_wheel_batch(&self, commands: &[&[&str]]) -> Vec<Value> {
        wheel::ask(&self.root, commands)
    }

    /// Starts a BoxLite runtime that holds the home's lock until the value is dropped.
    pub fn hold(&self) -> Session {
        Session::start(self)
    }

    /// Mounts the home until the value is dropped.
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

    /// Mounts the home with further arguments and environment. A home can have one such mount at a
    /// time. Unless [`TestHome::keep`] was called, what is removed is not kept: most tests ask what
    /// is left, and what is freed.
    pub fn mount_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Mounted {
        self.mount_on("mnt", arguments, environment)
    }

    /// Mounts the home once more, beside the mount of [`TestHome::mount_with`].
    pub fn mount_again(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Mounted {
        let _ = fs::create_dir(self.beside("mnt-again"));
        self.mount_on("mnt-again", arguments, environment)
    }

    fn mount_on(&self, place: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Mounted {
        let mut all = Vec::new();
        if !self.keeps.load(Ordering::Relaxed) {
            all.extend(["-o", "undo=off"]);
        }
        all.extend(arguments);
        // No test depends on how full the machine's disk is.
        let mut variables = vec![("BOXLITEFS_UNDO_ANY_ROOM", "1")];
        variables.extend(environment);
        let mountpoint = self.beside(place).canonicalize().expect("the mountpoint");
        Mounted::start(&self.root, &mountpoint, &all, &variables)
    }

    /// Returns whether mounts keep what is removed or restored over.
    pub fn keeps(&self) -> bool {
        self.keeps.load(Ordering::Relaxed)
    }

    /// Has all later mounts keep what is removed or restored over, as mounts do by default.
    pub fn keep(self) -> TestHome {
        self.set_keeps(true);
        self
    }

    /// Sets whether later mounts keep what is removed or restored over.
    pub fn set_keeps(&self, keeps: bool) {
        self.keeps.store(keeps, Ordering::Relaxed);
    }

    /// Returns the id of the box with this name.
    pub fn id(&self, name: &str) -> String {
        self.database()
            .query_row("SELECT id FROM box_config WHERE name = ?1", [name], |row| {
                row.get(0)
            })
            .unwrap_or_else(|e| panic!("box {name}: {e}"))
    }

    /// Returns the `box_state` JSON of a box.
    pub fn state(&self, name: &str) -> Value {
        let json: String = self
            .database()
            .query_row(
                "SELECT json FROM box_state WHERE id = ?1",
                [self.id(name)],
                |row| row.get(0),
            )
            .expect("the box's state");
        serde_json::from_str(&json).expect("JSON")
    }

    /// Returns the directory `boxes/ID` of a box.
    pub fn box_dir(&self, name: &str) -> PathBuf {
        self.root.join("boxes").join(self.id(name))
    }

    /// Returns the path of a box's live disk.
    pub fn live_disk(&self, name: &str) -> PathBuf {
        self.box_dir(name).join("disks/disk.qcow2")
    }

    /// Returns the path of a snapshot's layer.
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

    /// Opens the home's database, to read rows or to make rows that BoxLite would not.
    pub fn database(&self) -> rusqlite::Connection {
        let database = rusqlite::Connection::open(self.root.join("db/boxlite.db")).expect("rows");
        database
            .busy_timeout(Duration::from_secs(10))
            .expect("a timeout");
        database
    }

    /// Writes to the disk of a stopped box like its guest, with qemu-io.
    pub fn guest_write(&self, name: &str, offset: u64, bytes: &[u8]) {
        guest_write(&self.live_disk(name), offset, bytes);
    }

    /// Puts the box `web` on a raw image below `images/`, like a box that BoxLite has created.
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

    /// Runs `boxlitefs check`; returns its exit status and output.
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

    /// Runs `boxlitefs compact`; returns its exit status and output.
    pub fn compact(&self) -> (i32, String) {
        let output = run(&[binary(), "compact", text(&self.root)]);
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// Runs a `boxlitefs compact` that kills itself at a named crash point. Returns its output if
    /// it did not reach that point.
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

    /// Returns the bytes that the home's images occupy on the disk, counting each inode once.
    pub fn allocated(&self) -> u64 {
        let mut inodes = std::collections::BTreeMap::new();
        for image in self.images() {
            let meta = fs::metadata(image).expect("an image");
            inodes.insert(meta.ino(), meta.blocks() * 512);
        }
        inodes.values().sum()
    }

    /// Lists every qcow2 file below `boxes/` and `bases/`.
    pub fn images(&self) -> Vec<PathBuf> {
        let mut images = Vec::new();
        for directory in ["boxes", "bases"] {
            images_below(&self.root.join(directory), &mut images);
        }
        images
    }

    /// Fails if `qemu-img check` finds a fault in an image or `boxlitefs check` one in the home.
    pub fn assert_whole(&self) {
        self.assert_images_clean();
        let (status, said) = self.check();
        assert_eq!(status, 0, "boxlitefs check: {said}");
    }

    /// Mounts the home once, then calls [`TestHome::assert_whole`]. The mount frees layers that
    /// became unreferenced when BoxLite removed their reader.
    pub fn assert_whole_once_mounted(&self) {
        drop(self.mount());
        self.assert_whole();
    }

    /// Does the same after boxes ran: a disk as of any moment may have clusters that its machine
    /// had taken and not used yet.
    pub fn assert_whole_but_leaks(&self) {
        drop(self.mount());
        for image in self.images() {
            let check = run(&["qemu-img", "check", "-U", "-q", text(&image)]);
            let is_sound = matches!(check.status.code(), Some(0 | 3));
            assert!(is_sound, "{}: {check:?}", image.display());
        }
        let (status, said) = self.check();
        assert_eq!(status, 0, "boxlitefs check: {said}");
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

/// Adds every file below a directory of the home, with a digest of its contents. Below
/// `.boxlitefs`, adds only the names in workspaces.
fn files_below(root: &Path, directory: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(root.join(directory)).into_iter().flatten() {
        let entry = entry.expect("an entry");
        let path = directory.join(entry.file_name());
        let kind = entry.file_type().expect("its type");
        if !path.starts_with(".boxlitefs") {
            if kind.is_file() {
                // A concurrent change may remove the file.
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

/// Returns the archive that homes are made from: an ext4 disk with one file.
pub fn archive() -> PathBuf {
    template::archive()
}

/// Makes an archive of a new ext4 disk and returns its path. `arguments` go to `make-archive`.
pub fn make_archive(file_name: &str, arguments: &[&str]) -> PathBuf {
    let directory = own_directory();
    let place = tempfile::tempdir_in(directory).expect("a temporary directory");
    let made = place.path().join(file_name);
    let unused_home = TestHome {
        root: place.path().join("home"),
        place,
        keeps: AtomicBool::new(false),
    };
    let mut command = vec!["make-archive", text(&made), "web", "--size", DISK_SIZE];
    command.extend(arguments);
    unused_home.wheel(&command);
    let target = directory.join(file_name);
    fs::rename(&made, &target).expect("the archive");
    target
}

/// Returns a directory for files that a test program makes once. It belongs to this process alone,
/// because two concurrent runs of one program would replace each other's files.
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
            .expect("an unused directory")
    });
    directory
}

// ---- the mount --------------------------------------------------------------------------------

/// A mount served by a child process. Dropping it always unmounts and ends the process.
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
            // Failures are in the mount's log; keep them off the test's terminal.
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
        // Before it is mounted, the lookup would reach the empty directory below.
        while !is_mounted(&self.mountpoint) || fs::metadata(self.at(".boxlite/log")).is_err() {
            if let Some(status) = self.child.try_wait().expect("its status") {
                panic!("boxlitefs mount ended: {status}");
            }
            assert!(Instant::now() < deadline, "the mount is not ready");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the pid of the process that serves the mount.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Returns the mountpoint.
    pub fn root(&self) -> &Path {
        &self.mountpoint
    }

    /// Returns a path in the mount.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.mountpoint.join(path)
    }

    /// Reads the log that the mount shows to users.
    pub fn log(&self) -> String {
        fs::read_to_string(self.at(".boxlite/log")).expect("the log")
    }

    /// Lists the names in a directory of the mount, sorted.
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

    /// Returns a digest of the guest disk in an export of the mount, such as `web/export.boxlite`.
    pub fn export_digest(&self, path: &str) -> String {
        archive_digest(&self.at(path))
    }

    /// Unmounts with `boxlitefs unmount`; fails unless the process then exits successfully.
    pub fn unmount(mut self) {
        unmount(&self.mountpoint);
        let ended = wait(&mut self.child, PATIENCE).expect("boxlitefs ends after unmount");
        assert!(ended.success(), "{ended}");
    }

    /// Waits for the process to end; returns whether SIGKILL (such as from a crash point) ended it.
    pub fn has_crashed(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        wait(&mut self.child, PATIENCE).is_some_and(|status| status.signal() == Some(libc::SIGKILL))
    }

    /// Waits for the process to end; returns the signal that ended it.
    pub fn ended_by(&mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        wait(&mut self.child, PATIENCE)?.signal()
    }

    /// Returns whether the process is still running.
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

/// Runs `boxlitefs unmount`, which must succeed. Another test's mount namespace may hold a copy of
/// the mount until that test detaches it: then the exit status is 3, and the process ends later.
pub fn unmount(mountpoint: &Path) {
    let unmount = [binary(), "unmount", text(mountpoint)];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let done = run(&unmount);
        // If another thread has just forked to start a program, the child holds this process's
        // open files until it calls exec. So retry while the mount is in use.
        let is_busy = String::from_utf8_lossy(&done.stderr).contains(" is in use");
        if !is_busy || Instant::now() > deadline {
            match still_serving(&done) {
                // A zombie that nobody has reaped is still in /proc, but has no exe.
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

/// Returns the /proc directory of the process that, according to `boxlitefs unmount`, still serves
/// the mount in another namespace.
fn still_serving(done: &Output) -> Option<PathBuf> {
    let said = String::from_utf8_lossy(&done.stderr);
    let (_, process) = said.split_once("boxlitefs (pid ")?;
    let (process, _) = process.split_once(") still serves it")?;
    (done.status.code() == Some(3)).then(|| Path::new("/proc").join(process))
}

/// Returns whether a FUSE file system is mounted there.
pub fn is_mounted(mountpoint: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
    table
        .lines()
        .filter(|line| line.contains(" - fuse"))
        .any(|line| line.split(' ').nth(4) == mountpoint.to_str())
}

/// Waits for a process to end, then kills it.
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

/// Mounts a home and gives its box `web` a snapshot `s` whose state differs from the live disk.
/// Returns the mount and a backup of the box.
pub fn mount_and_backup(home: &TestHome) -> (Mounted, PathBuf) {
    let mount = home.mount();
    home.guest_write("web", FREE_AREA, b"then");
    mount.snapshot("web", "s").expect("a snapshot");
    home.guest_write("web", FREE_AREA, b"now");
    let backup = home.beside("backup");
    succeed(&["cp", "-r", text(&mount.at("web")), text(&backup)]);
    (mount, backup)
}

/// Returns the program under test: `$BOXLITEFS_PROGRAM` (another build), else that of this build.
pub fn binary() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let other = std::env::var("BOXLITEFS_PROGRAM");
        other.unwrap_or_else(|_| env!("CARGO_BIN_EXE_boxlitefs").to_owned())
    })
}

/// Returns the Python interpreter that has the wheel.
pub fn python() -> PathBuf {
    std::env::var_os("BOXLITE_PYTHON").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/python"),
        PathBuf::from,
    )
}

/// Runs a program; returns its exit status and output.
pub fn run(command: &[&str]) -> Output {
    Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("cannot run {}: {e}; install it", command[0]))
}

/// Runs a program as the user nobody; returns its exit status and output.
pub fn run_as_nobody(command: &[&str]) -> Output {
    let user = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    run(&[&user[..], command].concat())
}

/// Runs a program that must succeed; returns its output.
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

/// Runs a program that must fail; returns its standard error.
pub fn fail(command: &[&str]) -> String {
    let output = run(command);
    assert!(!output.status.success(), "{command:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Returns the errno of a call that must fail.
pub fn errno<T: Debug>(result: io::Result<T>) -> i32 {
    result
        .expect_err("an error")
        .raw_os_error()
        .expect("an errno")
}

/// Waits until a condition holds. `what` describes it when it never does.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the process's peak resident memory in KiB.
pub fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("its status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let digits = line.expect("VmHWM").split_whitespace().nth(1);
    digits.expect("a number").parse().expect("a number")
}

/// Returns a path as text; the tests' paths are UTF-8.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Lists the names in a directory, sorted.
pub fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("a name in UTF-8"))
        .collect();
    names.sort();
    names
}

/// Writes to an image like a guest, with qemu-io.
pub fn guest_write(disk: &Path, offset: u64, bytes: &[u8]) {
    let source = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(source.path(), bytes).expect("the pattern");
    let write = format!(
        "write -q -s {} {offset} {}",
        source.path().display(),
        bytes.len()
    );
    // qemu-io reports a failed write on its output, but exits successfully.
    let said = succeed(&["qemu-io", "-f", "qcow2", "-c", &write, text(disk)]);
    assert_eq!(said, "", "{write}");
}

/// Returns a digest of the guest disk in a qcow2 image and its backing chain, read by qemu-img.
/// Digests are comparable within one run only.
pub fn digest(image: &Path) -> String {
    static DIGESTS: Results<String> = Results::new();
    DIGESTS.of(image, || {
        contents_digest(raw_disk(image).as_file()).expect("the raw disk")
    })
}

/// Converts a qcow2 image and its backing chain to the raw guest disk, with qemu-img.
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

/// Returns a digest of a file's size and its nonzero blocks. Skips holes, which are most of a disk.
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

/// Returns the [`digest`] of the disk in an archive, compressed or not.
pub fn archive_digest(archive: &Path) -> String {
    digest(&unpacked(archive).path().join("disk.qcow2"))
}

/// Unpacks the `disk.qcow2` of an archive, compressed or not, with tar; returns its directory.
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

/// Returns the file names of an image's backing chain, top first, as qemu-img resolves them.
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
