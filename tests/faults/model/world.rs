//! A home, its mount, and the model of both.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::operation::*;
use super::reference::{Disk, Reader, originals};
use super::undo::KeptEntry;
use crate::common::*;

/// Time limit for BoxLite's changes to become visible in the mount.
const SOON: Duration = PATIENCE;

/// Upper limits. At the limit, an operation removes one instead of adding one.
const MOST_BOXES: usize = 6;
const MOST_SNAPSHOTS: usize = 9;
const MOST_BACKUPS: usize = 6;

/// After this many operations, everything is checked, not only the affected boxes.
const LOOK_AT_ALL: usize = 12;

/// Names of boxes. The mount escapes some of them.
pub const BOX_NAMES: [&str; 9] = [
    "web", "api", "db", "a b", "ü", "50%", "x/y", "web.old", "Web",
];
/// Names of snapshots.
const SNAPSHOT_NAMES: [&str; 13] = [
    "a",
    "b",
    "c",
    "before lunch",
    "ü",
    "100%",
    "snapshots",
    "export.boxlite",
    "x.y",
    "d",
    "e",
    "f",
    "g",
];

/// The expected state of a snapshot.
#[derive(Clone)]
pub struct Snapshot {
    pub name: String,
    pub disk: Disk,
    pub created_at: i64,
}

/// The expected state of a box.
#[derive(Clone)]
pub struct ModelBox {
    /// Identifies the box, whatever its name.
    pub number: usize,
    pub name: String,
    pub disk: Disk,
    pub snapshots: Vec<Snapshot>,
}

impl ModelBox {
    /// Returns the name of the box's directory.
    pub fn shown(&self) -> String {
        shown(&self.name)
    }
}

/// Escapes a box's name as the mount does.
pub fn shown(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2F")
}

/// A backup outside the mount.
#[derive(Clone)]
pub struct Backup {
    pub path: PathBuf,
    pub of: Kept,
}

/// The contents of a backup.
#[derive(Clone)]
pub enum Kept {
    Archive(Disk),
    Directory(ModelBox),
}

/// A live disk or a snapshot: the index of its box, and the index of the snapshot in the box.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State {
    pub of: usize,
    pub snapshot: Option<usize>,
}

/// A home and its expected contents.
pub struct World<'a> {
    pub home: &'a TestHome,
    mount: Option<Mounted>,
    pub boxes: Vec<ModelBox>,
    pub backups: Vec<Backup>,
    pub readers: Vec<Reader>,
    /// What can be had back.
    pub entries: Vec<KeptEntry>,
    /// Number of the first backups, which are never removed.
    originals: usize,
    /// Number of operations so far, without those that had nothing to work on.
    pub steps: usize,
    since_all: usize,
    made: usize,
    /// BoxLite has flattened a disk, which a box may use by now. BoxLite leaves flags in it unset.
    pub has_boxlites_disks: bool,
    /// Readable log of the operations. A panic moves it to `failed`.
    trace: RefCell<Vec<String>>,
    failed: &'a RefCell<Vec<String>>,
}

/// Mounts the home so that it merges layers in the background between operations.
fn mount_of(home: &TestHome) -> Mounted {
    home.mount_with(&["-o", "compact=0.05"], &[])
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failed.swap(&self.trace);
        }
    }
}

impl<'a> World<'a> {
    /// Mounts a home that has one box, `web`, with the first original's disk.
    pub fn new(home: &'a TestHome, failed: &'a RefCell<Vec<String>>) -> World<'a> {
        let place = home.beside("backups");
        let _ = fs::remove_dir_all(&place);
        fs::create_dir(&place).expect("a place for backups");
        let originals = originals().iter().enumerate();
        let backups: Vec<Backup> = originals
            .map(|(which, original)| Backup {
                path: original.archive.clone(),
                of: Kept::Archive(Disk::original(which)),
            })
            .collect();
        World {
            home,
            mount: Some(mount_of(home)),
            boxes: vec![ModelBox {
                number: 0,
                name: "web".into(),
                disk: Disk::original(0),
                snapshots: Vec::new(),
            }],
            originals: backups.len(),
            backups,
            readers: Vec::new(),
            entries: Vec::new(),
            steps: 0,
            since_all: 0,
            made: 1,
            has_boxlites_disks: false,
            trace: RefCell::default(),
            failed,
        }
    }

    /// Adds a line to the log of operations.
    pub fn note(&self, message: String) {
        let place = text(self.home.root().parent().expect("a place")).to_owned() + "/";
        let message = message.replace(&place, "").replace("mnt/", "");
        self.trace.borrow_mut().push(message);
    }

    // ---- the current state ----

    /// Returns the mount.
    pub fn mount(&self) -> &Mounted {
        self.mount.as_ref().expect("mounted")
    }

    /// Returns a path in the mount.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.mount().at(path)
    }

    /// Returns the directory of a box in the mount.
    pub fn box_at(&self, of: usize) -> PathBuf {
        self.at(self.boxes[of].shown())
    }

    /// Returns the directory of a state in the mount.
    pub fn state_at(&self, state: State) -> PathBuf {
        let at = self.box_at(state.of);
        match state.snapshot {
            None => at,
            Some(snapshot) => at
                .join("snapshots")
                .join(&self.boxes[state.of].snapshots[snapshot].name),
        }
    }

    /// Returns the export of a state in the mount.
    pub fn export_at(&self, state: State) -> PathBuf {
        self.state_at(state).join("export.boxlite")
    }

    /// Returns the expected disk of a state.
    pub fn disk(&self, state: State) -> &Disk {
        let of = &self.boxes[state.of];
        match state.snapshot {
            None => &of.disk,
            Some(snapshot) => &of.snapshots[snapshot].disk,
        }
    }

    fn called(&self, state: State) -> String {
        let of = &self.boxes[state.of];
        match state.snapshot {
            None => format!("box {}", of.name),
            Some(snapshot) => format!(
                "snapshot {} of box {}",
                of.snapshots[snapshot].name, of.name
            ),
        }
    }

    /// Selects a box.
    pub fn pick_box(&self, pick: Pick) -> Option<usize> {
        (!self.boxes.is_empty()).then(|| usize::from(pick) % self.boxes.len())
    }

    /// Selects a snapshot of any box.
    pub fn pick_snapshot(&self, pick: Pick) -> Option<State> {
        let all: Vec<State> = self.states().filter(|s| s.snapshot.is_some()).collect();
        (!all.is_empty()).then(|| all[usize::from(pick) % all.len()])
    }

    /// Selects a live disk or a snapshot.
    pub fn pick_state(&self, pick: Pick) -> Option<State> {
        let all: Vec<State> = self.states().collect();
        (!all.is_empty()).then(|| all[usize::from(pick) % all.len()])
    }

    /// Selects a backup; there is always one.
    pub fn pick_backup(&self, pick: Pick) -> Backup {
        self.backups[usize::from(pick) % self.backups.len()].clone()
    }

    /// Selects a backup that is an archive.
    pub fn pick_archive(&self, pick: Pick) -> (PathBuf, Disk) {
        let archives: Vec<(PathBuf, Disk)> = self
            .backups
            .iter()
            .filter_map(|backup| match &backup.of {
                Kept::Archive(disk) => Some((backup.path.clone(), disk.clone())),
                Kept::Directory(_) => None,
            })
            .collect();
        archives[usize::from(pick) % archives.len()].clone()
    }

    fn states(&self) -> impl Iterator<Item = State> {
        self.boxes.iter().enumerate().flat_map(|(of, a_box)| {
            let snapshots = (0..a_box.snapshots.len()).map(Some);
            std::iter::once(None)
                .chain(snapshots)
                .map(move |snapshot| State { of, snapshot })
        })
    }

    /// Selects a name that no box has.
    pub fn free_box_name(&self, pick: Pick) -> String {
        let taken: BTreeSet<&str> = self.boxes.iter().map(|b| b.name.as_str()).collect();
        free(&BOX_NAMES, &taken, pick)
    }

    /// Selects a name that no snapshot of the box has.
    pub fn free_snapshot_name(&self, of: usize, pick: Pick) -> String {
        let snapshots = self.boxes[of].snapshots.iter();
        let taken: BTreeSet<&str> = snapshots.map(|s| s.name.as_str()).collect();
        free(&SNAPSHOT_NAMES, &taken, pick)
    }

    /// Returns whether there may be another box.
    pub fn has_room(&self) -> bool {
        self.boxes.len() < MOST_BOXES
    }

    /// Returns whether the box may have another snapshot.
    pub fn has_room_in(&self, of: usize) -> bool {
        self.boxes[of].snapshots.len() < MOST_SNAPSHOTS
    }

    // ---- changes of the model ----

    /// Adds a box; returns its index.
    pub fn add_box(&mut self, name: &str, disk: Disk, snapshots: Vec<Snapshot>) -> usize {
        self.made += 1;
        self.boxes.push(ModelBox {
            number: self.made,
            name: name.to_owned(),
            disk,
            snapshots,
        });
        self.boxes.len() - 1
    }

    /// Adds a snapshot of the live disk. Fails unless its row is dated now, or, if that is later,
    /// up to some seconds after the newest snapshot of the box.
    pub fn add_snapshot(&mut self, of: usize, name: &str, since: i64) {
        let created_at = self.dated(&self.boxes[of].name, name);
        let others = self.boxes[of].snapshots.iter();
        let newest = others.map(|snapshot| snapshot.created_at).max();
        // Copies of snapshots that BoxLite made within a second are dated some seconds apart.
        let newest = newest.map_or(0, |newest| newest + MOST_SNAPSHOTS as i64);
        let latest = now().max(newest);
        assert!(
            (since..=latest).contains(&created_at),
            "snapshot {name} is dated {created_at}, but was made between {since} and {latest}"
        );
        let disk = self.boxes[of].disk.clone();
        self.boxes[of].snapshots.push(Snapshot {
            name: name.to_owned(),
            disk,
            created_at,
        });
    }

    /// Returns a path for a new backup.
    pub fn backup_place(&mut self) -> PathBuf {
        self.made += 1;
        self.home
            .beside("backups")
            .join(format!("{}.boxlite", self.made))
    }

    /// Adds a backup, and removes the oldest one if there are too many.
    pub fn add_backup(&mut self, path: PathBuf, of: Kept) {
        self.backups.push(Backup { path, of });
        if self.backups.len() > self.originals + MOST_BACKUPS {
            let oldest = self.backups.remove(self.originals);
            match oldest.of {
                Kept::Archive(_) => fs::remove_file(&oldest.path),
                Kept::Directory(_) => fs::remove_dir_all(&oldest.path),
            }
            .expect("cannot remove the oldest backup");
        }
    }

    /// Gives the live disk of a box other contents.
    pub fn changes_disk(&mut self, of: usize, disk: Disk) {
        self.boxes[of].disk = disk;
        self.dates_disk(of);
    }

    /// Marks the live disk of a box as changed, even if its contents are the same: the file is new.
    pub fn dates_disk(&mut self, of: usize) {
        let number = self.boxes[of].number;
        let readers = self.readers.iter_mut().filter(|reader| reader.of == number);
        readers.for_each(|reader| reader.may_fail |= reader.is_live);
    }

    /// Renames a box, which changes the manifests of all its exports.
    pub fn changes_name(&mut self, of: usize, name: &str) {
        self.boxes[of].name = name.to_owned();
        let number = self.boxes[of].number;
        let readers = self.readers.iter_mut().filter(|reader| reader.of == number);
        readers.for_each(|reader| reader.may_fail = true);
    }

    /// Closes all files, unmounts, and mounts again.
    pub fn remount(&mut self) {
        self.finish_readers();
        self.mount.take().expect("mounted").unmount();
        self.mount = Some(mount_of(self.home));
    }

    /// Finishes all readers.
    pub fn finish_readers(&mut self) {
        self.readers.drain(..).for_each(Reader::finish);
    }

    /// Opens an export. Of two earlier readers, finishes the older one.
    pub fn begin_reading(&mut self, state: State) {
        if self.readers.len() > 1 {
            self.readers.remove(0).finish();
        }
        let reader = Reader::begin(
            &self.export_at(state),
            &self.called(state),
            self.boxes[state.of].number,
            state.snapshot.is_none(),
            self.disk(state).clone(),
        );
        self.readers.push(reader);
    }

    // ---- checks ----

    /// Checks the contents of a state through the mount.
    pub fn check(&self, state: State) {
        self.disk(state)
            .assert_in_archive(&self.export_at(state), &self.called(state));
    }

    /// Checks the live disk of a box.
    pub fn check_live(&self, of: usize) {
        self.check(State { of, snapshot: None });
    }

    /// Checks a box and its snapshots.
    pub fn check_box(&self, of: usize) {
        self.states()
            .filter(|state| state.of == of)
            .for_each(|state| self.check(state));
    }

    /// Checks all boxes and snapshots.
    pub fn check_all(&self) {
        self.states().for_each(|state| self.check(state));
    }

    /// Checks all names, in the mount and in BoxLite's rows. Checks everything now and then.
    pub fn check_names(&mut self) {
        if let Some(difference) = self.difference_in_names() {
            panic!("{difference}");
        }
        self.check_rows();
        self.since_all += 1;
        if self.since_all >= LOOK_AT_ALL {
            self.since_all = 0;
            self.check_all();
        }
    }

    /// Waits until BoxLite's changes are visible, then checks everything.
    pub fn check_all_soon(&mut self) {
        let begun = Instant::now();
        while let Some(difference) = self.difference_in_names() {
            assert!(begun.elapsed() < SOON, "still: {difference}");
            std::thread::sleep(Duration::from_millis(50));
        }
        // The kernel may cache the attributes of a finished box for half a second.
        std::thread::sleep(Duration::from_millis(550).saturating_sub(begun.elapsed()));
        self.since_all = 0;
        self.check_rows();
        self.check_all();
    }

    fn difference_in_names(&self) -> Option<String> {
        let mut wanted: Vec<String> = self.boxes.iter().map(ModelBox::shown).collect();
        wanted.sort();
        let found = self.mount().names("");
        if found != wanted {
            return Some(format!("boxes {found:?}, not {wanted:?}"));
        }
        for a_box in &self.boxes {
            let mut wanted: Vec<&str> = a_box.snapshots.iter().map(|s| s.name.as_str()).collect();
            wanted.sort();
            let path = self.at(a_box.shown()).join("snapshots");
            // The kernel may still cache the entry of a removed box.
            let Ok(listing) = fs::read_dir(&path) else {
                return Some(format!("{} is not there", path.display()));
            };
            let mut found: Vec<String> = listing
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect();
            found.sort();
            if found != wanted {
                let name = &a_box.name;
                return Some(format!("snapshots {found:?} of {name}, not {wanted:?}"));
            }
        }
        None
    }

    fn check_rows(&self) {
        let mut wanted: Vec<(String, String, i64)> = Vec::new();
        for a_box in &self.boxes {
            wanted.push((a_box.name.clone(), String::new(), 0));
            for snapshot in &a_box.snapshots {
                let name = snapshot.name.clone();
                wanted.push((a_box.name.clone(), name, snapshot.created_at));
            }
        }
        wanted.sort();
        let database = self.home.database();
        let mut rows = database
            .prepare(
                "SELECT name, '', 0 FROM box_config UNION ALL \
                 SELECT box_config.name, snapshot.name, snapshot.created_at \
                 FROM snapshot JOIN box_config ON snapshot.box_id = box_config.id",
            )
            .expect("rows");
        let rows = rows
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .expect("rows");
        let mut found: Vec<(String, String, i64)> = rows.map(|row| row.expect("a row")).collect();
        found.sort();
        // Copies of snapshots that BoxLite made within a second are dated some seconds apart, to
        // keep their order. All other times stay the same.
        let is_it = |(found, wanted): (&(String, String, i64), &(String, String, i64))| {
            let latest = wanted.2 + MOST_SNAPSHOTS as i64;
            (&found.0, &found.1) == (&wanted.0, &wanted.1) && (wanted.2..=latest).contains(&found.2)
        };
        let are_they = found.len() == wanted.len() && found.iter().zip(&wanted).all(is_it);
        assert!(are_they, "BoxLite's rows: {found:?}, not {wanted:?}");
    }

    /// Returns when the row of a snapshot says that it was taken.
    pub fn dated(&self, of: &str, name: &str) -> i64 {
        let query = "SELECT snapshot.created_at FROM snapshot \
             JOIN box_config ON snapshot.box_id = box_config.id \
             WHERE box_config.name = ?1 AND snapshot.name = ?2";
        self.home
            .database()
            .query_row(query, [of, name], |row| row.get(0))
            .unwrap_or_else(|e| panic!("snapshot {name} of box {of}: {e}"))
    }

    // ---- the end ----

    /// Ends a sequence. BoxLite must list and export everything, every image must be intact, and
    /// after all boxes are removed, nothing may be left.
    pub fn finish(mut self) {
        self.finish_readers();
        self.judge_by_boxlite();
        self.check_all_soon();
        self.mount.take().expect("mounted").unmount();
        for state in self.states() {
            let of = &self.boxes[state.of];
            let image = match state.snapshot {
                None => self.home.live_disk(&of.name),
                Some(snapshot) => {
                    let name = &of.snapshots[snapshot].name;
                    self.home.snapshot_disk(&of.name, name)
                }
            };
            self.disk(state)
                .assert_in_image(&image, &self.called(state));
        }
        drop(self.home.mount());
        self.assert_whole();

        let mount = self.home.mount();
        self.check_entries(&mount);
        for a_box in &self.boxes {
            succeed(&["rm", "-r", text(&mount.at(a_box.shown()))]);
        }
        assert_eq!(mount.names(""), [""; 0]);
        self.check_entries(&mount);
        for entry in mount.names(".boxlite/undo") {
            succeed(&["rm", "-r", text(&mount.at(".boxlite/undo").join(entry))]);
        }
        mount.unmount();
        let left = self.home.images();
        assert!(left.is_empty(), "left over from removed boxes: {left:?}");
        self.assert_whole();
    }

    /// Like [`TestHome::assert_whole`], but accepts disks that BoxLite has flattened. In these, the
    /// COPIED flags are unset. qemu-img reports that for each cluster, but it is harmless.
    fn assert_whole(&self) {
        if !self.has_boxlites_disks {
            return self.home.assert_whole();
        }
        for image in self.home.images() {
            let check = run(&["qemu-img", "check", "-U", "-q", text(&image)]);
            let said = String::from_utf8_lossy(&check.stderr);
            let fault = said
                .lines()
                .find(|line| !line.starts_with("ERROR OFLAG_COPIED"));
            assert_eq!(fault, None, "qemu-img check {}", image.display());
        }
        let (status, said) = self.home.check();
        assert_eq!(status, 0, "boxlitefs check: {said}");
    }

    fn judge_by_boxlite(&self) {
        let mut boxlite = Session::start(self.home);
        let mut wanted: Vec<&str> = self.boxes.iter().map(|b| b.name.as_str()).collect();
        wanted.sort();
        assert_eq!(names(&boxlite.must(&["list"])), wanted, "BoxLite's list");
        let place = self.home.beside("backups");
        for a_box in &self.boxes {
            let mut wanted: Vec<&str> = a_box.snapshots.iter().map(|s| s.name.as_str()).collect();
            wanted.sort();
            let listed = boxlite.must(&["snapshot-list", &a_box.name]);
            assert_eq!(names(&listed), wanted, "BoxLite's list of {}", a_box.name);
            let Some(path) = export_by_boxlite(&mut boxlite, a_box, &place) else {
                continue;
            };
            let what = format!("BoxLite's export of box {}", a_box.name);
            a_box.disk.assert_in_archive(&path, &what);
        }
    }
}

/// Has BoxLite export a box. Returns None if it cannot, or if it would misread the disk.
pub fn export_by_boxlite(boxlite: &mut Session, of: &ModelBox, place: &Path) -> Option<PathBuf> {
    // BoxLite uses the name of the box as a file name, even with a slash in it.
    if !of.disk.is_boxlites() || of.name.contains('/') {
        return None;
    }
    let answer = boxlite.must(&["export", &of.name, text(place)]);
    Some(PathBuf::from(answer["path"].as_str().expect("a path")))
}

/// Returns the names in a list from BoxLite, sorted.
fn names(listed: &serde_json::Value) -> Vec<&str> {
    let listed = listed.as_array().expect("a list").iter();
    let mut names: Vec<&str> = listed.filter_map(|entry| entry["name"].as_str()).collect();
    names.sort();
    names
}

fn free(all: &[&str], taken: &BTreeSet<&str>, pick: Pick) -> String {
    let free: Vec<&&str> = all.iter().filter(|name| !taken.contains(**name)).collect();
    (*free[usize::from(pick) % free.len()]).to_owned()
}

/// Returns the seconds since 1970, as in BoxLite's rows.
pub fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(now.expect("after 1970").as_secs()).expect("a time")
}
