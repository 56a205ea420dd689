//! The contents of a home, and whether an interrupted change could have left them.

// Not every test uses all of these items.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::common::*;

/// The guest disks of a box, as digests.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// The digest of the live disk.
    pub live: String,
    /// The digests of the snapshots, by name.
    pub snapshots: BTreeMap<String, String>,
}

/// The contents of every box, by name.
pub type Boxes = BTreeMap<String, Contents>;

/// Reads the disks of all boxes and snapshots that have rows, with qemu-img. Another process reads
/// the rows, too: the home may lie on a file system that this process serves, and SQLite maps one
/// of its files into memory.
pub fn contents(home: &TestHome) -> Boxes {
    let mut boxes = Boxes::new();
    let mut names = BTreeMap::new();
    for row in rows(home, "SELECT id, name FROM box_config") {
        let [id, name] = row.as_slice() else {
            panic!("{row:?}")
        };
        let directory = home.root().join("boxes").join(id);
        let live = digest(&directory.join("disks/disk.qcow2"));
        let snapshots = BTreeMap::new();
        boxes.insert(name.clone(), Contents { live, snapshots });
        names.insert(id.clone(), name.clone());
    }
    let snapshots = "SELECT box_id, name, json_extract(json, '$.base_path') FROM snapshot";
    for row in rows(home, snapshots) {
        let [id, snapshot, layer] = row.as_slice() else {
            panic!("{row:?}")
        };
        let name = &names[id];
        let digest = digest(Path::new(layer));
        let contents = boxes.get_mut(name).unwrap();
        contents.snapshots.insert(snapshot.clone(), digest);
    }
    boxes
}

fn rows(home: &TestHome, statement: &str) -> Vec<Vec<String>> {
    let database = home.root().join("db/boxlite.db");
    let wait = ["-cmd", ".timeout 10000"];
    let mut command = vec!["sqlite3", "-batch", "-noheader", "-separator", "|"];
    command.extend(wait);
    command.extend([text(&database), statement]);
    let said = succeed(&command);
    let fields = |line: &str| line.split('|').map(str::to_owned).collect();
    said.lines().map(fields).collect()
}

/// Fails unless `boxes` lies between `before` and `whole`. Boxes and snapshots that the change
/// keeps must be there; nothing else may be there except those it adds. Those it removes may be
/// gone only if all it adds is there.
pub fn assert_between(boxes: &Boxes, before: &Boxes, whole: &Boxes) {
    for name in before.keys() {
        let stays = boxes.contains_key(name);
        let is_done = !whole.contains_key(name) && whole.keys().all(|n| boxes.contains_key(n));
        assert!(stays || is_done, "box {name} is gone");
    }
    for (name, contents) in boxes {
        let possible = [before.get(name), whole.get(name)];
        let possible: Vec<&Contents> = possible.into_iter().flatten().collect();
        assert!(!possible.is_empty(), "unexpected box {name}");
        let live = possible.iter().any(|known| known.live == contents.live);
        assert!(live, "the disk of box {name} has other contents");
        for (snapshot, digest) in &contents.snapshots {
            let right = possible
                .iter()
                .any(|contents| contents.snapshots.get(snapshot) == Some(digest));
            assert!(right, "snapshot {snapshot} of {name} has other contents");
        }
    }
    for (name, contents) in before {
        let (Some(now), Some(whole)) = (boxes.get(name), whole.get(name)) else {
            continue;
        };
        for snapshot in contents.snapshots.keys() {
            let stays = now.snapshots.contains_key(snapshot);
            let is_done = !whole.snapshots.contains_key(snapshot)
                && whole
                    .snapshots
                    .keys()
                    .all(|n| now.snapshots.contains_key(n));
            assert!(stays || is_done, "snapshot {snapshot} of {name} is gone");
        }
    }
}

/// Returns the digests of all disks and snapshots.
pub fn states(boxes: &Boxes) -> BTreeSet<String> {
    let of_box = |contents: &Contents| {
        let snapshots = contents.snapshots.values().cloned();
        snapshots.chain([contents.live.clone()]).collect::<Vec<_>>()
    };
    boxes.values().flat_map(of_box).collect()
}

/// Returns the digests of all disks that can be had back, as the files of the home are.
pub fn kept_states(home: &TestHome) -> BTreeSet<String> {
    let undo = home.root().join(".boxlitefs/undo");
    let mut kept = BTreeSet::new();
    for entry in fs::read_dir(undo).into_iter().flatten().flatten() {
        let dir = entry.path();
        if !dir.join("why.json").exists() {
            continue;
        }
        let snapshots = fs::read_dir(dir.join("snapshots")).into_iter().flatten();
        let snapshots = snapshots.map(|entry| entry.unwrap().path().join("disk.qcow2"));
        for disk in snapshots.chain([dir.join("disks/disk.qcow2")]) {
            if disk.exists() {
                kept.insert(digest(&disk));
            }
        }
    }
    kept
}

/// The states of all boxes and undo entries before a change, in a home with undo.
pub struct KeptStates(BTreeSet<String>);

impl KeptStates {
    /// Returns the states of a home with these boxes, if it keeps what is removed.
    pub fn of(home: &TestHome, boxes: &Boxes) -> KeptStates {
        if !home.keeps() {
            return KeptStates(BTreeSet::new());
        }
        let mut all = states(boxes);
        all.extend(kept_states(home));
        KeptStates(all)
    }

    /// Fails unless each state that the boxes no longer had when the change was cut off can be had
    /// back.
    pub fn assert_kept(&self, home: &TestHome, crashed: &Boxes) {
        let there = states(crashed);
        let kept = kept_states(home);
        let mut lost = self.0.difference(&there);
        assert!(
            lost.all(|state| kept.contains(state)),
            "a state that was removed can't be had back"
        );
    }
}
