//! The mount option `shared`: changes next to a BoxLite runtime that holds the home. Whether the
//! two sides act in turn or at once, the result is that of some order, or an operation is refused
//! without effect; nothing is lost. The judges are BoxLite itself and qemu-img.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::*;
use serde_json::Value;

/// The maximum number of boxes; BoxLite removes one before another is made.
const MOST_BOXES: usize = 5;
/// The maximum number of snapshots of a box.
const MOST_SNAPSHOTS: usize = 3;
/// How long BoxLite may run while the mount is stopped in the middle of a change. If BoxLite waits
/// for the mount, it is not done by then and finishes afterwards.
const MEANWHILE: Duration = Duration::from_millis(400);

// ---- the expected state -------------------------------------------------------------------------

/// The expected digests of a box's live disk and snapshots.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    live: String,
    snapshots: BTreeMap<String, String>,
}

/// All boxes by name.
type Boxes = BTreeMap<String, Wanted>;

/// An operation for either side.
#[derive(Clone, Debug)]
enum Ask {
    Snapshot {
        of: String,
        name: String,
    },
    RemoveSnapshot {
        of: String,
        name: String,
    },
    /// By the mount only.
    RenameSnapshot {
        of: String,
        name: String,
        new: String,
    },
    Restore {
        of: String,
        from: String,
    },
    /// From the live disk of another box.
    RestoreBox {
        of: String,
        other: String,
    },
    RestoreArchive {
        of: String,
    },
    Clone {
        of: String,
        new: String,
    },
    CloneSnapshot {
        of: String,
        snapshot: String,
        new: String,
    },
    /// Clones the box with all its snapshots.
    CloneWhole {
        of: String,
        new: String,
    },
    Import {
        new: String,
    },
    Remove {
        of: String,
    },
}

impl Ask {
    /// Returns the boxes after this operation, or None if it is impossible.
    fn done(&self, boxes: &Boxes) -> Option<Boxes> {
        let mut boxes = boxes.clone();
        match self {
            Ask::Snapshot { of, name } => {
                let found = boxes.get_mut(of)?;
                let live = found.live.clone();
                if found.snapshots.insert(name.clone(), live).is_some() {
                    return None;
                }
            }
            Ask::RemoveSnapshot { of, name } => {
                boxes.get_mut(of)?.snapshots.remove(name)?;
            }
            Ask::RenameSnapshot { of, name, new } => {
                let snapshots = &mut boxes.get_mut(of)?.snapshots;
                let moved = snapshots.remove(name)?;
                if snapshots.insert(new.clone(), moved).is_some() {
                    return None;
                }
            }
            Ask::Restore { of, from } => {
                let found = boxes.get_mut(of)?;
                found.live = found.snapshots.get(from)?.clone();
            }
            Ask::RestoreBox { of, other } => {
                let live = boxes.get(other)?.live.clone();
                boxes.get_mut(of)?.live = live;
            }
            Ask::RestoreArchive { of } => boxes.get_mut(of)?.live = pristine(),
            Ask::Clone { of, new } => {
                let live = boxes.get(of)?.live.clone();
                add(&mut boxes, new, live, BTreeMap::new())?;
            }
            Ask::CloneSnapshot { of, snapshot, new } => {
                let live = boxes.get(of)?.snapshots.get(snapshot)?.clone();
                add(&mut boxes, new, live, BTreeMap::new())?;
            }
            Ask::CloneWhole { of, new } => {
                let Wanted { live, snapshots } = boxes.get(of)?.clone();
                add(&mut boxes, new, live, snapshots)?;
            }
            Ask::Import { new } => add(&mut boxes, new, pristine(), BTreeMap::new())?,
            Ask::Remove { of } => {
                boxes.remove(of)?;
            }
        }
        Some(boxes)
    }
}

fn add(
    boxes: &mut Boxes,
    new: &str,
    live: String,
    snapshots: BTreeMap<String, String>,
) -> Option<()> {
    let made = boxes.insert(new.to_owned(), Wanted { live, snapshots });
    made.is_none().then_some(())
}

/// Returns the digest of the disk in the archive that is imported.
fn pristine() -> String {
    use std::sync::OnceLock;
    static DIGEST: OnceLock<String> = OnceLock::new();
    DIGEST.get_or_init(|| archive_digest(&archive())).clone()
}

/// Returns whether both remove the same snapshot or box.
fn is_same_removal(one: &Ask, other: &Ask) -> bool {
    match (one, other) {
        (
            Ask::RemoveSnapshot { of, name },
            Ask::RemoveSnapshot {
                of: from,
                name: same,
            },
        ) => (of, name) == (from, same),
        (Ask::Remove { of }, Ask::Remove { of: same }) => of == same,
        _ => false,
    }
}

/// Returns every possible outcome: the successful operations in any order.
fn outcomes(before: &Boxes, done: &[&Ask]) -> BTreeSet<Boxes> {
    match done {
        [] => BTreeSet::from([before.clone()]),
        [one] => one.done(before).into_iter().collect(),
        [one, other] => {
            let order = |first: &Ask, second: &Ask| second.done(&first.done(before)?);
            [order(one, other), order(other, one)]
                .into_iter()
                .flatten()
                .collect()
        }
        _ => unreachable!("two sides"),
    }
}

// ---- the two sides ------------------------------------------------------------------------------

/// A home, a `shared` mount of it, and a runtime that holds it.
struct Both<'h> {
    home: &'h TestHome,
    mount: Mounted,
    boxlite: Session,
    boxes: Boxes,
    tally: Tally,
}

impl<'h> Both<'h> {
    fn begin(home: &'h TestHome, environment: &[(&str, &str)]) -> Both<'h> {
        let boxlite = Session::start(home);
        let mount = home.mount_with(&["-o", "shared"], environment);
        let boxes = observed(home);
        Both {
            home,
            mount,
            boxlite,
            boxes,
            tally: Tally::default(),
        }
    }

    /// Lets BoxLite run an operation while the mount is idle.
    fn boxlite_does(&mut self, ask: &Ask) {
        let wanted = ask.done(&self.boxes).expect("it can be done");
        let said = by_boxlite(&mut self.boxlite, ask);
        self.tally.operations += 1;
        if let Err(refusal) = said {
            // BoxLite refuses to remove what others depend on.
            let may_refuse = matches!(ask, Ask::RemoveSnapshot { .. } | Ask::Remove { .. });
            if !may_refuse {
                self.lost(format!("BoxLite, alone: {ask:?}: {refusal}"));
            }
            return self.unchanged(&format!("{ask:?} refused"));
        }
        self.compare(&[wanted], &format!("by BoxLite {ask:?}"));
    }

    /// Runs an operation through the mount while BoxLite holds the home but is idle.
    fn mount_does(&mut self, ask: &Ask) {
        let wanted = ask.done(&self.boxes).expect("it can be done");
        self.tally.operations += 1;
        match by_mount(self.mount.root(), ask) {
            Ok(()) => self.compare(&[wanted], &format!("by the mount {ask:?}")),
            Err(refusal) => {
                let log = self.last_words();
                self.lost(format!("the mount, alone: {ask:?}: {refusal}: {log}"));
                self.unchanged(&format!("{ask:?} refused"));
            }
        }
    }

    /// Runs one operation on each side at the same time.
    fn race(&mut self, ours: &Ask, theirs: &Ask) {
        let root = self.mount.root().to_owned();
        let boxlite = &mut self.boxlite;
        let (by_us, by_them) = thread::scope(|scope| {
            let by_us = scope.spawn(|| by_mount(&root, ours));
            let by_them = by_boxlite(boxlite, theirs);
            (by_us.join().expect("it does not panic"), by_them)
        });
        self.judge(ours, by_us, theirs, by_them);
    }

    fn judge(
        &mut self,
        ours: &Ask,
        by_us: Result<(), String>,
        theirs: &Ask,
        by_them: Result<(), String>,
    ) {
        self.tally.operations += 2;
        let mut done = Vec::new();
        // Two who remove the same thing may both succeed.
        if by_us.is_ok() && !(by_them.is_ok() && is_same_removal(ours, theirs)) {
            done.push(ours);
        }
        if by_them.is_ok() {
            done.push(theirs);
        }
        self.tally.faults += 2 - done.len();
        let wanted: Vec<Boxes> = outcomes(&self.boxes, &done).into_iter().collect();
        let what = format!("{ours:?} ({by_us:?}) beside {theirs:?} ({by_them:?})");
        if wanted.is_empty() {
            self.lost(format!("both cannot have succeeded: {what}"));
        }
        self.compare(&wanted, &what);
    }

    /// Asserts that every box and snapshot is as before.
    fn unchanged(&mut self, what: &str) {
        let before = self.boxes.clone();
        self.compare(std::slice::from_ref(&before), what);
    }

    /// Compares every box and snapshot with the permitted states; continues with the state found.
    fn compare(&mut self, wanted: &[Boxes], what: &str) {
        let found = observed(self.home);
        self.tally.compared += found
            .values()
            .map(|it| 1 + it.snapshots.len())
            .sum::<usize>();
        if !wanted.contains(&found) {
            let log = self.last_words();
            self.lost(format!(
                "{what}: found {found:#?}, not one of {wanted:#?}; {log}"
            ));
        }
        self.boxes = found;
    }

    fn lost(&mut self, what: String) {
        self.tally.losses.push(what);
    }

    fn last_words(&self) -> String {
        self.mount
            .log()
            .lines()
            .last()
            .unwrap_or_default()
            .to_owned()
    }

    /// Writes to the disk of a stopped box, as its guest would have.
    fn guest_writes(&mut self, name: &str, number: usize) {
        let place = FREE_AREA + (number as u64 % 16) * 0x1_0000;
        self.home
            .guest_write(name, place, format!("write {number} to {name}").as_bytes());
        let live = digest(&self.home.live_disk(name));
        self.boxes.get_mut(name).expect("the box").live = live;
    }

    /// Ends both sides and asserts that the home is sound, also according to BoxLite.
    fn end(self, what: &str) {
        let Both {
            home,
            mount,
            boxlite,
            boxes,
            mut tally,
        } = self;
        drop(mount);
        drop(boxlite);
        home.assert_whole_once_mounted();
        if observed(home) != boxes {
            tally
                .losses
                .push(format!("after all: {:#?}, not {boxes:#?}", observed(home)));
        }
        let place = tempfile::tempdir().unwrap();
        let mut boxlite = Session::start(home);
        for (name, wanted) in &boxes {
            let directory = place.path().join(name);
            fs::create_dir(&directory).unwrap();
            let answer = boxlite.must(&["export", name, text(&directory)]);
            let archive = PathBuf::from(answer["path"].as_str().expect("a path"));
            tally.compared += 1;
            if archive_digest(&archive) != wanted.live {
                tally
                    .losses
                    .push(format!("BoxLite exports other contents of {name}"));
            }
        }
        drop(boxlite);
        home.assert_whole();
        tally.finish(what);
    }
}

/// Returns the actual state: by the rows, read with qemu-img.
fn observed(home: &TestHome) -> Boxes {
    let database = home.database();
    let mut boxes = Boxes::new();
    let mut rows = database.prepare("SELECT id, name FROM box_config").unwrap();
    let rows = rows
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap();
    for row in rows {
        let (id, name): (String, String) = row.unwrap();
        let live = home.root().join("boxes").join(&id).join("disks/disk.qcow2");
        let mut snapshots = BTreeMap::new();
        let mut of_box = database
            .prepare("SELECT name, json FROM snapshot WHERE box_id = ?1")
            .unwrap();
        let of_box = of_box
            .query_map([&id], |row| Ok((row.get(0)?, row.get(1)?)))
            .unwrap();
        for row in of_box {
            let (name, json): (String, String) = row.unwrap();
            let json: Value = serde_json::from_str(&json).unwrap();
            let layer = PathBuf::from(json["base_path"].as_str().expect("a path"));
            snapshots.insert(name, digest(&layer));
        }
        let live = digest(&live);
        boxes.insert(name, Wanted { live, snapshots });
    }
    boxes
}

fn by_boxlite(boxlite: &mut Session, ask: &Ask) -> Result<(), String> {
    let archive = archive();
    let words = match ask {
        Ask::Snapshot { of, name } => vec!["snapshot-create", of, name],
        Ask::RemoveSnapshot { of, name } => vec!["snapshot-remove", of, name],
        Ask::Restore { of, from } => vec!["snapshot-restore", of, from],
        Ask::Clone { of, new } => vec!["clone", of, new],
        Ask::Import { new } => vec!["import", text(&archive), new],
        Ask::Remove { of } => vec!["remove", of],
        _ => unreachable!("BoxLite can't: {ask:?}"),
    };
    boxlite.ask(&words).map(drop)
}

fn by_mount(root: &std::path::Path, ask: &Ask) -> Result<(), String> {
    let at = |path: String| root.join(path);
    let copy = |options: &[&str], from: PathBuf, to: PathBuf| {
        let output = run(&[&["cp"], options, &[text(&from), text(&to)]].concat());
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    };
    match ask {
        Ask::Snapshot { of, name } => {
            fs::create_dir(at(format!("{of}/snapshots/{name}"))).map_err(|e| e.to_string())
        }
        Ask::Restore { of, from } => copy(
            &[],
            at(format!("{of}/snapshots/{from}/export.boxlite")),
            at(format!("{of}/export.boxlite")),
        ),
        Ask::RestoreBox { of, other } => copy(
            &[],
            at(format!("{other}/export.boxlite")),
            at(format!("{of}/export.boxlite")),
        ),
        Ask::RestoreArchive { of } => copy(&[], archive(), at(format!("{of}/export.boxlite"))),
        Ask::Clone { of, new } => copy(
            &[],
            at(format!("{of}/export.boxlite")),
            at(format!("{new}.boxlite")),
        ),
        Ask::CloneSnapshot { of, snapshot, new } => copy(
            &[],
            at(format!("{of}/snapshots/{snapshot}/export.boxlite")),
            at(format!("{new}.boxlite")),
        ),
        Ask::CloneWhole { of, new } => copy(&["-r"], at(of.clone()), at(new.clone())),
        Ask::Import { new } => copy(&[], archive(), at(format!("{new}.boxlite"))),
        Ask::RemoveSnapshot { of, name } => {
            fs::remove_dir(at(format!("{of}/snapshots/{name}"))).map_err(|e| e.to_string())
        }
        Ask::RenameSnapshot { of, name, new } => {
            let snapshot = |name| at(format!("{of}/snapshots/{name}"));
            fs::rename(snapshot(name), snapshot(new)).map_err(|e| e.to_string())
        }
        Ask::Remove { of } => {
            let output = run(&["rm", "-r", text(&at(of.clone()))]);
            if output.status.success() {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&output.stderr).into_owned())
            }
        }
    }
}

// ---- random operations --------------------------------------------------------------------------

/// Pseudo-random numbers, determined by the seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }

    fn one_of<'a>(&mut self, names: &[&'a String]) -> Option<&'a String> {
        (!names.is_empty()).then(|| names[self.below(names.len())])
    }
}

/// Picks an operation for the mount that is possible now.
fn ours(random: &mut Random, boxes: &Boxes, of: &str, number: usize) -> Ask {
    let of = of.to_owned();
    let snapshots: Vec<&String> = boxes[&of].snapshots.keys().collect();
    let one = random.one_of(&snapshots).cloned();
    let new = format!("m{number}");
    let is_full = boxes.len() >= MOST_BOXES;
    let can_snapshot = snapshots.len() < MOST_SNAPSHOTS;
    loop {
        return match (random.below(11), &one) {
            (8, Some(name)) => Ask::RemoveSnapshot {
                of,
                name: name.clone(),
            },
            (9, Some(name)) => Ask::RenameSnapshot {
                of,
                name: name.clone(),
                new: format!("r{}", number % 4),
            },
            (10, _) if of != "web" && boxes.len() > 2 => Ask::Remove { of },
            (0 | 1, _) if can_snapshot => Ask::Snapshot {
                of,
                name: format!("s{}", number % 4 + 10),
            },
            (2, Some(from)) => Ask::Restore {
                of,
                from: from.clone(),
            },
            (3, _) => Ask::RestoreArchive { of },
            (4, _) => {
                let others: Vec<&String> = boxes.keys().filter(|other| **other != of).collect();
                match random.one_of(&others) {
                    Some(other) => Ask::RestoreBox {
                        of,
                        other: other.clone(),
                    },
                    None => continue,
                }
            }
            (5, _) if !is_full => Ask::Clone { of, new },
            (6, Some(snapshot)) if !is_full => Ask::CloneSnapshot {
                of,
                snapshot: snapshot.clone(),
                new,
            },
            (7, _) if !is_full => Ask::Import { new },
            _ => continue,
        };
    }
}

/// Picks an operation for BoxLite that is possible now.
fn theirs(random: &mut Random, boxes: &Boxes, of: &str, number: usize) -> Ask {
    let of = of.to_owned();
    let snapshots: Vec<&String> = boxes[&of].snapshots.keys().collect();
    let one = random.one_of(&snapshots).cloned();
    let new = format!("b{number}");
    let is_full = boxes.len() >= MOST_BOXES;
    let can_snapshot = snapshots.len() < MOST_SNAPSHOTS;
    loop {
        return match (random.below(7), &one) {
            // Sometimes this is the name that the mount takes at the same moment.
            (0, _) if can_snapshot => Ask::Snapshot {
                of,
                name: format!("s{}", number % 4 + 10),
            },
            (1, _) if can_snapshot => Ask::Snapshot {
                of,
                name: format!("t{}", number % 4),
            },
            (2, Some(from)) => Ask::Restore {
                of,
                from: from.clone(),
            },
            (3, Some(name)) => Ask::RemoveSnapshot {
                of,
                name: name.clone(),
            },
            (4, _) if !is_full => Ask::Clone { of, new },
            (5, _) if !is_full => Ask::Import { new },
            (6, _) if of != "web" && boxes.len() > 2 && !removes_by_force() => Ask::Remove { of },
            _ => continue,
        };
    }
}

/// Returns whether the BoxLite that is asked removes boxes by force: `boxlite serve` does, and so
/// breaks the clones of a box that it removes, also without us.
fn removes_by_force() -> bool {
    std::env::var_os("BOXLITE_CLI").is_some()
}

/// Tells whether an operation can be done, for example whether its name is free.
fn is_possible(ask: &Ask, boxes: &Boxes) -> bool {
    ask.done(boxes).is_some()
}

fn another(random: &mut Random, boxes: &Boxes, but: Option<&str>) -> Option<String> {
    let names: Vec<&String> = boxes
        .keys()
        .filter(|name| Some(name.as_str()) != but)
        .collect();
    random.one_of(&names).cloned()
}

// ---- the tests ----------------------------------------------------------------------------------

#[test]
fn two_hundred_operations_from_both_sides_lose_nothing() {
    let home = TestHome::in_memory();
    let mut random = Random(seed("beside a live BoxLite"));
    let mut both = Both::begin(&home, &[]);
    both.boxlite_does(&Ask::Snapshot {
        of: "web".into(),
        name: "first".into(),
    });
    let wanted = how_many(60, 200, 2000);
    let mut number = 0;
    while both.tally.operations < wanted {
        number += 1;
        let of = another(&mut random, &both.boxes, None).expect("a box");
        if random.below(2) == 0 {
            both.guest_writes(&of, number);
        }
        if both.boxes.len() >= MOST_BOXES {
            // BoxLite refuses if another box was cloned from it; another one is removed another
            // time.
            let gone = another(&mut random, &both.boxes, Some("web")).expect("a box beside web");
            let removal = Ask::Remove { of: gone };
            if removes_by_force() {
                both.mount_does(&removal);
            } else {
                both.boxlite_does(&removal);
            }
        }
        let of = if both.boxes.contains_key(&of) {
            of
        } else {
            "web".to_owned()
        };
        let by_us = ours(&mut random, &both.boxes, &of, number);
        let beside = match random.below(2) {
            0 => of.clone(),
            _ => another(&mut random, &both.boxes, None).expect("a box"),
        };
        let by_them = theirs(&mut random, &both.boxes, &beside, number);
        let possible = is_possible(&by_us, &both.boxes) && is_possible(&by_them, &both.boxes);
        match random.below(3) {
            _ if !possible => {
                for ask in [by_us, by_them] {
                    if is_possible(&ask, &both.boxes) {
                        both.mount_does(&ask);
                    }
                }
            }
            0 => {
                both.mount_does(&by_us);
                if is_possible(&by_them, &both.boxes) {
                    both.boxlite_does(&by_them);
                }
            }
            _ => both.race(&by_us, &by_them),
        }
    }
    both.end("beside a live BoxLite, both sides");
}

#[test]
fn a_clone_with_its_snapshots_is_made_beside_a_runtime() {
    let home = TestHome::new();
    let mut both = Both::begin(&home, &[]);
    both.mount_does(&Ask::Snapshot {
        of: "web".into(),
        name: "a".into(),
    });
    both.guest_writes("web", 1);
    both.boxlite_does(&Ask::Snapshot {
        of: "web".into(),
        name: "b".into(),
    });
    both.guest_writes("web", 2);
    both.mount_does(&Ask::CloneWhole {
        of: "web".into(),
        new: "copy".into(),
    });
    let snapshots = both.boxlite.must(&["snapshot-list", "copy"]);
    assert_eq!(snapshots.as_array().map(Vec::len), Some(2), "{snapshots}");
    // BoxLite uses the mount's clone in the runtime that saw it appear.
    both.boxlite_does(&Ask::Restore {
        of: "copy".into(),
        from: "a".into(),
    });
    both.boxlite_does(&Ask::Clone {
        of: "copy".into(),
        new: "third".into(),
    });
    if !removes_by_force() {
        both.boxlite_does(&Ask::Remove { of: "copy".into() });
    }
    both.end("a clone beside a live BoxLite");
}

/// Returns whether a line of the log names the program that has the runtime, and its pid.
fn names_the_runtime(line: &str) -> bool {
    let program = match std::env::var_os("BOXLITE_CLI") {
        Some(_) => "boxlite --home",
        None => "python",
    };
    line.contains(program) && line.contains("(pid ")
}

#[test]
fn what_is_not_safe_beside_a_runtime_is_busy_and_says_so() {
    let home = TestHome::new();
    let mut both = Both::begin(&home, &[]);
    let mount = &both.mount;
    assert_eq!(
        errno(fs::rename(mount.at("web"), mount.at("api"))),
        libc::EBUSY
    );
    let log = mount.log();
    let said = log.lines().last().unwrap_or_default();
    assert!(
        said.contains("Meanwhile everything else is possible but renaming boxes, editing box.json, merging and"),
        "{said}"
    );
    assert!(names_the_runtime(said), "{said}");
    let (_, said) = home.compact();
    assert!(said.contains("a BoxLite runtime is using"), "{said}");
    both.tally.operations += 2;
    both.unchanged("refused changes");
    both.end("refused beside a live BoxLite");
}

#[test]
fn with_the_option_exclusive_a_runtime_keeps_every_change_out_and_is_named() {
    let home = TestHome::new();
    let mount = home.mount_with(&["-o", "exclusive"], &[]);
    let _holder = home.hold();
    assert_eq!(errno(mount.snapshot("web", "a")), libc::EBUSY);
    let log = mount.log();
    let line = log.lines().last().unwrap();
    assert!(line.contains("a BoxLite runtime is using"), "{line}");
    assert!(names_the_runtime(line), "{line}");
}

#[test]
fn a_box_that_boxlite_is_starting_is_busy() {
    let home = TestHome::new();
    let both = Both::begin(&home, &[]);
    let state: String = home
        .database()
        .query_row("SELECT json FROM box_state", [], |row| row.get(0))
        .unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    let lock = home.root().join("locks").join(state["lock_id"].to_string());
    // BoxLite holds this lock from before it makes the disk until its machine runs.
    let starting = File::open(&lock).unwrap();
    starting.lock().unwrap();
    let before = both.home.fingerprint();
    assert_eq!(errno(both.mount.snapshot("web", "a")), libc::EBUSY);
    let log = both.mount.log();
    assert!(log.contains("BoxLite is starting box web"), "{log}");
    let copied = by_mount(
        both.mount.root(),
        &Ask::Clone {
            of: "web".into(),
            new: "copy".into(),
        },
    );
    assert!(copied.unwrap_err().contains("busy"));
    let copied = by_mount(both.mount.root(), &Ask::RestoreArchive { of: "web".into() });
    assert!(copied.unwrap_err().contains("busy"));
    let without_log = |print: String| -> Vec<String> {
        print
            .lines()
            .filter(|line| !line.contains("/.boxlitefs/"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(without_log(home.fingerprint()), without_log(before));
    // Other boxes are not affected.
    let mut both = both;
    both.mount_does(&Ask::Import {
        new: "other".into(),
    });
    both.mount_does(&Ask::Snapshot {
        of: "other".into(),
        name: "a".into(),
    });
    drop(starting);
    both.mount_does(&Ask::Snapshot {
        of: "web".into(),
        name: "a".into(),
    });
    both.end("a box that BoxLite starts");
}

#[test]
fn what_boxlite_is_in_the_middle_of_is_neither_undone_nor_collected() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "a"]);
    let mut both = Both::begin(&home, &[]);
    let dir = home.box_dir("web");
    // Leftovers as BoxLite has them in the middle of a change: a snapshot without a row, a clone's
    // directory without a row, and a clone's base.
    let pending = dir.join(".snapshot_pending");
    fs::write(&pending, "{}").unwrap();
    let snapshot = dir.join("snapshots/n");
    fs::create_dir(&snapshot).unwrap();
    let clone = home.root().join("boxes/Ab3dEf6hIj9L/disks");
    fs::create_dir_all(&clone).unwrap();
    let base = home.root().join("bases/Qw3rTy7u.qcow2");
    fs::copy(home.snapshot_disk("web", "a"), &base).unwrap();
    assert_eq!(errno(both.mount.snapshot("web", "b")), libc::EBUSY);
    assert!(
        both.mount
            .log()
            .contains("BoxLite is taking a snapshot of box web")
    );
    // A mount that starts now leaves all of it alone, too.
    drop(both.mount);
    both.mount = home.mount();
    both.tally.operations += 1;
    for path in [&pending, &snapshot, &clone, &base] {
        assert!(path.exists(), "{}", path.display());
    }
    // A disk on a base without a row.
    fs::remove_file(&pending).unwrap();
    let live = home.live_disk("web");
    let aside = home.beside("live");
    fs::rename(&live, &aside).unwrap();
    let create = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        text(&base),
        text(&live),
    ];
    succeed(&create);
    assert_eq!(errno(both.mount.snapshot("web", "b")), libc::EBUSY);
    assert!(
        both.mount.log().contains("BoxLite is cloning the box"),
        "{}",
        both.mount.log()
    );
    let rows: i64 = home
        .database()
        .query_row(
            "SELECT count(*) FROM base_disk WHERE base_path LIKE '%Qw3rTy7u%'",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(rows, 0, "BoxLite's own row would find the name taken");
    // The disk is missing, as while BoxLite replaces it.
    fs::remove_file(&live).unwrap();
    assert!(
        by_mount(
            both.mount.root(),
            &Ask::Snapshot {
                of: "web".into(),
                name: "b".into()
            }
        )
        .is_err()
    );
    assert!(base.exists() && snapshot.exists());
    fs::rename(&aside, &live).unwrap();
    for path in [&base, &snapshot, &clone] {
        let _ = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
    }
    fs::remove_dir_all(clone.parent().unwrap()).unwrap();
    both.unchanged("unfinished changes of BoxLite");
    both.end("BoxLite in the middle of something");
}

#[test]
fn a_snapshot_deleted_beside_a_runtime_is_freed_while_that_goes_on() {
    let home = TestHome::new();
    home.wheel(&["snapshot-create", "web", "by-boxlite"]);
    home.guest_write("web", FREE_AREA, b"changed");
    let runtime = home.hold();
    let mount = home.mount_with(&["-o", "compact=1"], &[]);
    let live = digest(&home.live_disk("web"));
    mount.snapshot("web", "ours").unwrap();
    home.guest_write("web", FREE_AREA, b"changed again");
    mount.snapshot("web", "later").unwrap();
    mount.remove_snapshot("web", "later").unwrap();
    for name in ["by-boxlite", "ours"] {
        mount.remove_snapshot("web", name).unwrap();
    }
    assert_eq!(mount.names("web/snapshots"), Vec::<String>::new());
    let left = || names_in(&home.box_dir("web").join("snapshots"));
    assert!(!left().is_empty(), "BoxLite may be about to restore them");
    eventually("their names are gone", || left().is_empty());
    // The live disk reads what it read.
    let bases = || names_in(&home.root().join("bases"));
    assert_eq!(bases().len(), 3, "{:?}", bases());
    let archive = mount.at("web/export.boxlite");
    assert_ne!(archive_digest(&archive), live);
    // What no other disk reads is freed with the box.
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    assert_eq!(bases(), Vec::<String>::new());
    drop(runtime);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn snapshots_of_boxlite_deleted_beside_it_leave_no_endless_chain() {
    let home = TestHome::new();
    let mut both = Both::begin(&home, &[]);
    let (of, name) = (|| "web".to_owned(), || "b".to_owned());
    for number in 0..14 {
        both.guest_writes("web", number);
        both.boxlite_does(&Ask::Snapshot {
            of: of(),
            name: name(),
        });
        both.mount_does(&Ask::RemoveSnapshot {
            of: of(),
            name: name(),
        });
        let layers = chain(&home.live_disk("web"));
        assert!(
            layers.len() <= 9,
            "{number}: {layers:?}\n{}",
            both.mount.log()
        );
    }
    both.end("a chain beside a live BoxLite");
}

/// Makes the live disk of a box an overlay on a layer, as BoxLite's restore does.
fn restore_as_boxlite(home: &TestHome, name: &str, layer: &std::path::Path) {
    let live = home.live_disk(name);
    fs::remove_file(&live).unwrap();
    let overlay = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    succeed(&[&["qemu-img"], &overlay[..], &[text(layer), text(&live)]].concat());
}

#[test]
fn a_restore_that_boxlite_began_before_the_snapshot_was_deleted_is_whole() {
    for (by, goes_on) in [("boxlite", true), ("boxlite", false), ("mount", true)] {
        let home = TestHome::new();
        if by == "boxlite" {
            home.wheel(&["snapshot-create", "web", "a"]);
        }
        let mut both = Both::begin(&home, &[]);
        if by == "mount" {
            both.mount.snapshot("web", "a").unwrap();
        }
        let layer = home.snapshot_disk("web", "a");
        let wanted = digest(&layer);
        home.guest_write("web", FREE_AREA, b"changed");
        both.mount.remove_snapshot("web", "a").unwrap();
        both.tally.operations += 1;
        // BoxLite had found the row before.
        restore_as_boxlite(&home, "web", &layer);
        both.boxes = observed(&home);
        assert_eq!(both.boxes["web"].live, wanted);
        if goes_on {
            both.mount_does(&Ask::Snapshot {
                of: "web".into(),
                name: "b".into(),
            });
            // BoxLite puts the live disk where the deleted snapshot was.
            both.boxlite_does(&Ask::Snapshot {
                of: "web".into(),
                name: "a".into(),
            });
            both.guest_writes("web", 1);
            both.boxlite_does(&Ask::Restore {
                of: "web".into(),
                from: "a".into(),
            });
        }
        assert_eq!(digest(&home.live_disk("web")), wanted);
        both.end("a restore that began before a deletion");
        assert_eq!(digest(&home.live_disk("web")), wanted);
    }
}

/// Stops each of our changes at each point and lets BoxLite run an operation there.
#[test]
fn whatever_boxlite_does_in_the_middle_of_a_change_nothing_is_lost() {
    let snapshot = || Ask::Snapshot {
        of: "web".into(),
        name: "new".into(),
    };
    let clone = || Ask::Clone {
        of: "web".into(),
        new: "copy".into(),
    };
    let clone_of = || Ask::CloneSnapshot {
        of: "web".into(),
        snapshot: "a".into(),
        new: "copy".into(),
    };
    let restore = || Ask::Restore {
        of: "web".into(),
        from: "a".into(),
    };
    let archive = || Ask::RestoreArchive { of: "web".into() };
    let import = || Ask::Import { new: "copy".into() };
    let other = || Ask::RestoreBox {
        of: "web".into(),
        other: "other".into(),
    };
    let remove = || Ask::RemoveSnapshot {
        of: "web".into(),
        name: "a".into(),
    };
    let rename = || Ask::RenameSnapshot {
        of: "web".into(),
        name: "a".into(),
        new: "c".into(),
    };
    let remove_box = |of: &str| Ask::Remove { of: of.into() };
    let ours: Vec<(Ask, &[&str])> = vec![
        (
            remove(),
            &["remove.adopted", "remove.marked", "remove.unrecorded"],
        ),
        (
            rename(),
            &["rename.adopted", "rename.linked", "rename.recorded"],
        ),
        (
            remove_box("web"),
            &[
                "remove-box.adopted",
                "remove-box.marked",
                "remove-box.unrecorded",
                "remove-box.moved",
                "free.unlinked",
            ],
        ),
        (
            remove_box("other"),
            &["remove-box.marked", "remove-box.moved"],
        ),
        (
            snapshot(),
            &[
                "freeze.recorded",
                "freeze.linked",
                "beside.exchanged",
                "snapshot.directory",
                "snapshot.linked",
            ],
        ),
        (
            clone(),
            &[
                "freeze.linked",
                "beside.exchanged",
                "clone.built",
                "install.renamed",
            ],
        ),
        (clone_of(), &["clone.frozen", "install.renamed"]),
        (
            restore(),
            &["restore.frozen", "restore.referred", "beside.exchanged"],
        ),
        (
            other(),
            &["freeze.linked", "restore.referred", "beside.exchanged"],
        ),
        (archive(), &["restore.arrived", "beside.exchanged"]),
        (import(), &["import.built", "install.renamed"]),
    ];
    let theirs: Vec<Ask> = vec![
        Ask::Snapshot {
            of: "web".into(),
            name: "new".into(),
        },
        Ask::Snapshot {
            of: "web".into(),
            name: "more".into(),
        },
        Ask::Restore {
            of: "web".into(),
            from: "b".into(),
        },
        Ask::Restore {
            of: "web".into(),
            from: "a".into(),
        },
        Ask::RemoveSnapshot {
            of: "web".into(),
            name: "a".into(),
        },
        Ask::Clone {
            of: "web".into(),
            new: "copy".into(),
        },
        Ask::Clone {
            of: "web".into(),
            new: "theirs".into(),
        },
        Ask::Remove { of: "web".into() },
        Ask::Remove { of: "other".into() },
        Ask::Import { new: "copy".into() },
    ];
    let home = TestHome::in_memory();
    home.wheel_batch(&[&["snapshot-create", "web", "a"]]);
    home.guest_write("web", FREE_AREA, b"second");
    home.wheel_batch(&[
        &["snapshot-create", "web", "b"],
        &["import", text(&crate::common::archive()), "other"],
    ]);
    home.guest_write("web", FREE_AREA, b"third");
    home.guest_write("other", FREE_AREA, b"other");
    home.put_aside("fresh");
    let mut tally = Tally::default();
    let all = ours
        .iter()
        .flat_map(|(ours, points)| points.iter().map(move |point| (ours, *point)));
    let cases: Vec<(&Ask, &str, &Ask)> = all
        .flat_map(|(ours, point)| theirs.iter().map(move |theirs| (ours, point, theirs)))
        .collect();
    let step = cases.len().div_ceil(how_many(20, 40, cases.len()));
    // Tries other cases every day.
    let first = seed("beside a live BoxLite") as usize % step;
    for (ours, point, theirs) in cases.iter().skip(first).step_by(step) {
        home.put_back("fresh");
        println!("at {point}: {ours:?} beside {theirs:?}");
        let mut both = Both::begin(&home, &[("BOXLITEFS_STOP_AT", point)]);
        let stopped = both.interrupt(ours, theirs);
        if !stopped {
            let log = both.mount.log();
            both.lost(format!("{ours:?} never reached {point}: {log}"));
        }
        for loss in &mut both.tally.losses {
            *loss = format!("at {point}: {loss}");
        }
        let Both {
            mount,
            boxlite,
            tally: of_case,
            boxes,
            ..
        } = both;
        drop(mount);
        drop(boxlite);
        tally.operations += of_case.operations;
        tally.compared += of_case.compared;
        tally.faults += 1;
        tally.losses.extend(of_case.losses);
        drop(home.mount());
        let (status, said) = home.check();
        if status != 0 || observed(&home) != boxes {
            tally
                .losses
                .push(format!("at {point}: {ours:?} beside {theirs:?}: {said}"));
        }
        home.assert_images_clean();
    }
    tally.finish("beside a live BoxLite, step by step");
}

/// A change, which returns its error output, and the points at which it is cut off.
type CutOff<'c> = (&'c str, fn(&Mounted) -> String, &'c [&'c str]);

const CUT_OFF: [CutOff; 7] = [
    (
        "removal of a snapshot",
        |mount| format!("{:?}", mount.remove_snapshot("web", "gone")),
        &["remove.adopted", "remove.marked", "remove.unrecorded"],
    ),
    (
        "rename of a snapshot",
        |mount| {
            let snapshots = mount.at("web/snapshots");
            let renamed = fs::rename(snapshots.join("gone"), snapshots.join("new"));
            format!("{renamed:?}")
        },
        &["rename.linked", "rename.recorded"],
    ),
    (
        "removal of a box",
        |mount| complaints(&["rm", "-r", text(&mount.at("other"))]),
        &[
            "remove-box.adopted",
            "remove-box.marked",
            "remove-box.unrecorded",
            "remove-box.moved",
        ],
    ),
    (
        "snapshot",
        |mount| format!("{:?}", mount.snapshot("web", "new")),
        &[
            "freeze.recorded",
            "freeze.linked",
            "beside.exchanged",
            "freeze.replaced",
            "snapshot.directory",
            "snapshot.linked",
        ],
    ),
    (
        "restore",
        |mount| {
            let from = mount.at("web/snapshots/old/export.boxlite");
            complaints(&["cp", text(&from), text(&mount.at("web/export.boxlite"))])
        },
        &["restore.referred", "beside.exchanged", "restore.replaced"],
    ),
    (
        "restore of an archive",
        |mount| {
            let to = mount.at("web/export.boxlite");
            complaints(&["cp", text(&archive()), text(&to)])
        },
        &["restore.arrived", "beside.exchanged"],
    ),
    (
        "clone",
        |mount| complaints(&["cp", "-r", text(&mount.at("web")), text(&mount.at("copy"))]),
        &[
            "beside.exchanged",
            "install.renamed",
            "install.recorded",
            "share.referred",
        ],
    ),
];

/// Returns the error output of a program that may fail.
fn complaints(command: &[&str]) -> String {
    String::from_utf8_lossy(&run(command).stderr).into_owned()
}

#[test]
fn a_change_that_is_cut_off_beside_a_runtime_is_whole_or_undone() {
    let home = TestHome::in_memory();
    let mount = home.mount();
    mount.snapshot("web", "old").unwrap();
    drop(mount);
    home.guest_write("web", FREE_AREA, b"gone");
    home.wheel_batch(&[
        &["snapshot-create", "web", "gone"],
        &["import", text(&archive()), "other"],
    ]);
    home.guest_write("web", FREE_AREA, b"the box's own");
    home.put_aside("first");
    let (live, old, gone) = (
        digest(&home.live_disk("web")),
        digest(&home.snapshot_disk("web", "old")),
        digest(&home.snapshot_disk("web", "gone")),
    );
    let archived = archive_digest(&archive());
    let mut tally = Tally::default();
    for (what, act, points) in CUT_OFF {
        for (number, point) in points.iter().enumerate() {
            home.put_back("first");
            let runtime = home.hold();
            let mut mount = home.mount_with(&["-o", "shared"], &[("BOXLITEFS_CRASH_AT", point)]);
            let told = act(&mount);
            assert!(
                mount.has_crashed(),
                "{what} does not reach {point}: {told} {}",
                mount.log()
            );
            drop(mount);
            tally.faults += 1;
            tally.operations += 1;
            if number % 2 == 0 {
                // Next to a runtime nothing is recovered, but what can be read is sound.
                drop(home.mount());
                drop(runtime);
            } else {
                drop(runtime);
                home.wheel(&["list"]);
            }
            drop(home.mount());
            let mut lost = |message: String| {
                tally
                    .losses
                    .push(format!("{what}, cut off at {point}: {message}"));
            };
            let may_be = match what {
                "restore" => vec![&live, &old],
                "restore of an archive" => vec![&live, &archived],
                _ => vec![&live],
            };
            if !may_be.contains(&&digest(&home.live_disk("web"))) {
                lost("the box has other contents".into());
            }
            if digest(&home.snapshot_disk("web", "old")) != old {
                lost("its snapshot has other contents".into());
            }
            tally.compared += 2;
            let (status, said) = home.check();
            if status != 0 {
                tally
                    .losses
                    .push(format!("{what}, cut off at {point}: {said}"));
            }
            home.assert_images_clean();
            for (name, found) in observed(&home) {
                for (snapshot, contents) in found.snapshots {
                    let wanted = match snapshot.as_str() {
                        "old" => &old,
                        "gone" => &gone,
                        _ if what == "rename of a snapshot" => &gone,
                        _ => &live,
                    };
                    tally.compared += 1;
                    if contents != *wanted {
                        let message = format!("{name}'s snapshot {snapshot} has other contents");
                        tally
                            .losses
                            .push(format!("{what}, cut off at {point}: {message}"));
                    }
                }
                if name == "copy" && found.live != live {
                    tally.losses.push(format!(
                        "{what}, cut off at {point}: copy has other contents"
                    ));
                }
            }
            home.wheel(&["list"]);
        }
    }
    tally.finish("changes cut off beside a live BoxLite");
}

impl Both<'_> {
    /// Starts an operation of the mount, runs one of BoxLite's where the mount stops, and resumes
    /// the mount. Returns whether the mount stopped.
    fn interrupt(&mut self, ours: &Ask, theirs: &Ask) -> bool {
        let root = self.mount.root().to_owned();
        let process = self.mount.process();
        let boxlite = &mut self.boxlite;
        let (by_us, by_them, stopped) = thread::scope(|scope| {
            let by_us = scope.spawn(|| by_mount(&root, ours));
            let deadline = Instant::now() + Duration::from_secs(10);
            while !is_stopped(process) && !by_us.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            let stopped = is_stopped(process);
            let by_them = scope.spawn(|| by_boxlite(boxlite, theirs));
            let begun = Instant::now();
            while !by_them.is_finished() && begun.elapsed() < MEANWHILE {
                thread::sleep(Duration::from_millis(1));
            }
            // SAFETY: kill takes no memory; the process is a child of ours that was not waited for.
            unsafe { libc::kill(process as i32, libc::SIGCONT) };
            let by_us = by_us.join().expect("it does not panic");
            (by_us, by_them.join().expect("it does not panic"), stopped)
        });
        self.judge(ours, by_us, theirs, by_them);
        stopped
    }
}

/// Tells whether a process was stopped by a signal.
fn is_stopped(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, fields)| fields.starts_with('T'))
}

// ---- programs that start ------------------------------------------------------------------------

/// Starts a runtime again and again, a number of times and until a file is there. Prints how often
/// that failed.
const STARTS: &str = r#"
import boxlite, os, sys, time
home, least, enough = sys.argv[1], int(sys.argv[2]), sys.argv[3]
failed, count = [], 0
while count < least or not os.path.exists(enough):
    count += 1
    time.sleep(0.1)
    try:
        runtime = boxlite.Boxlite(boxlite.Options(home_dir=home))
        del runtime
    except Exception as error:
        failed.append(str(error))
print(len(failed), "of", count, *set(failed))
"#;

#[test]
fn a_runtime_that_starts_at_any_step_is_not_kept_out_and_fails_no_change() {
    let home = TestHome::in_memory();
    home.wheel_batch(&[&["snapshot-create", "web", "a"]]);
    home.guest_write("web", FREE_AREA, b"second");
    home.wheel_batch(&[&["import", text(&archive()), "other"]]);
    home.guest_write("web", FREE_AREA, b"third");
    home.put_aside("fresh");
    let web = || "web".to_owned();
    let changes: [(Ask, &[&str]); 8] = [
        (
            Ask::RemoveSnapshot {
                of: web(),
                name: "a".into(),
            },
            &[
                "remove.adopted",
                "remove.marked",
                "remove.unrecorded",
                "remove.unlinked",
            ],
        ),
        (
            Ask::RenameSnapshot {
                of: web(),
                name: "a".into(),
                new: "b".into(),
            },
            &["rename.adopted", "rename.linked", "rename.recorded"],
        ),
        (
            Ask::Remove { of: "other".into() },
            &[
                "remove-box.adopted",
                "remove-box.marked",
                "remove-box.unrecorded",
                "remove-box.moved",
            ],
        ),
        (
            Ask::Snapshot {
                of: web(),
                name: "new".into(),
            },
            &[
                "freeze.recorded",
                "freeze.linked",
                "beside.exchanged",
                "snapshot.directory",
                "snapshot.linked",
                "snapshot.recorded",
            ],
        ),
        (
            Ask::Clone {
                of: web(),
                new: "copy".into(),
            },
            &[
                "freeze.linked",
                "clone.frozen",
                "clone.built",
                "install.renamed",
                "install.recorded",
            ],
        ),
        (
            Ask::Restore {
                of: web(),
                from: "a".into(),
            },
            &[
                "restore.frozen",
                "restore.referred",
                "beside.exchanged",
                "restore.replaced",
            ],
        ),
        (
            Ask::RestoreArchive { of: web() },
            &["restore.arrived", "beside.exchanged"],
        ),
        (
            Ask::Import { new: "copy".into() },
            &["import.built", "install.renamed", "install.recorded"],
        ),
    ];
    let mut cases = 0;
    for (change, points) in &changes {
        for point in *points {
            cases += 1;
            for stays in [true, false] {
                if extent() == Extent::Slice && stays != (cases % 2 == 0) {
                    continue;
                }
                home.put_back("fresh");
                let mount = home.mount_with(&[], &[("BOXLITEFS_STOP_AT", point)]);
                let wanted = change.done(&observed(&home)).expect("it can be done");
                let (by_us, runtime) = started_in_the_middle(&home, &mount, change, point);
                let what = format!("{change:?}, a runtime starts at {point}, stays: {stays}");
                let runtime = runtime.unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
                by_us.unwrap_or_else(|refusal| panic!("{what}: {refusal}\n{}", mount.log()));
                let kept = stays.then_some(runtime);
                assert_eq!(observed(&home), wanted, "{what}\n{}", mount.log());
                drop(kept);
                drop(mount);
                // What starts next finds it as well.
                home.wheel(&["list"]);
                drop(home.mount());
                assert_eq!(observed(&home), wanted, "{what}");
                assert_eq!(home.check().0, 0, "{what}: {}", home.check().1);
                home.assert_images_clean();
            }
        }
    }
}

/// Makes a change, and starts a runtime while the mount is stopped in the middle of it. Returns how
/// both ended.
fn started_in_the_middle(
    home: &TestHome,
    mount: &Mounted,
    change: &Ask,
    point: &str,
) -> (Result<(), String>, Result<Session, String>) {
    let process = mount.process();
    thread::scope(|scope| {
        let by_us = scope.spawn(|| by_mount(mount.root(), change));
        let stopped = format!("{change:?} is stopped at {point}");
        eventually(&stopped, || is_stopped(process));
        let starts = scope.spawn(|| Session::start_once(home));
        // It waits where the mount keeps others from writing.
        let begun = Instant::now();
        while !starts.is_finished() && begun.elapsed() < MEANWHILE {
            thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: kill takes no memory; the process is a child of ours that was not waited for.
        unsafe { libc::kill(process as i32, libc::SIGCONT) };
        let by_us = by_us.join().expect("it does not panic");
        (by_us, starts.join().expect("it does not panic"))
    })
}

/// Tells a program to end, by a file, also when the test fails.
struct End<'p>(&'p std::path::Path);

impl End<'_> {
    fn tell(&mut self) {
        fs::write(self.0, "").unwrap();
    }
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.tell();
    }
}

#[test]
fn programs_start_while_the_mount_changes_everything() {
    let home = TestHome::new();
    let mount = home.mount();
    for number in 0..4 {
        mount.snapshot("web", &format!("s{number}")).unwrap();
        home.guest_write("web", FREE_AREA + number * 512, b"another state");
    }
    let count = how_many(40, 40, 200);
    let enough = home.beside("enough");
    let starts = Command::new(python())
        .args(["-c", STARTS, text(home.root()), &count.to_string()])
        .arg(&enough)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let is_over = AtomicBool::new(false);
    let mut made = 0;
    let said = thread::scope(|scope| {
        let starts = scope.spawn(|| {
            let output = starts.wait_with_output().unwrap();
            is_over.store(true, Ordering::Relaxed);
            String::from_utf8_lossy(&output.stdout).into_owned()
        });
        let mut end = End(&enough);
        while !is_over.load(Ordering::Relaxed) {
            let name = format!("c{made}");
            mount.copy("web", &name);
            assert_eq!(mount.names(format!("{name}/snapshots")).len(), 4);
            mount.snapshot(&name, "own").unwrap();
            let from = mount.at(format!("{name}/snapshots/s1/export.boxlite"));
            succeed(&[
                "cp",
                text(&from),
                text(&mount.at(format!("{name}/export.boxlite"))),
            ]);
            let imported = mount.at(format!("i{made}.boxlite"));
            succeed(&["cp", text(&archive()), text(&imported)]);
            let snapshots = mount.at(format!("{name}/snapshots"));
            fs::rename(snapshots.join("s0"), snapshots.join("renamed")).unwrap();
            mount.remove_snapshot(&name, "s2").unwrap();
            for gone in [&name, &format!("i{made}")] {
                succeed(&["rm", "-r", text(&mount.at(gone))]);
            }
            made += 1;
            if made == 3 {
                end.tell();
            }
        }
        starts.join().unwrap()
    });
    assert!(
        said.starts_with("0 of"),
        "starts failed: {said}\n{}",
        mount.log()
    );
    mount.unmount();
    home.assert_whole_once_mounted();
}
