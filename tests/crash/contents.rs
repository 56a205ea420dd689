//! What a home holds, and whether that is what it held before a change, after it, or what lies between.

// Every test file uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;

use super::common::*;

/// The guest's bytes of a box: its disk and its snapshots by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// What the live disk has.
    pub live: String,
    /// What each snapshot has.
    pub snapshots: BTreeMap<String, String>,
}

/// Every box by name.
pub type Boxes = BTreeMap<String, Contents>;

/// What the rows name, read by qemu-img.
pub fn contents(home: &TestHome) -> Boxes {
    let rows = |statement: &str, parameter: &str| -> Vec<String> {
        let database = home.database();
        let mut statement = database.prepare(statement).unwrap();
        statement
            .query_map([parameter], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect()
    };
    rows("SELECT name FROM box_config WHERE ?1 = ''", "")
        .into_iter()
        .map(|name| {
            let snapshots = rows(
                "SELECT name FROM snapshot WHERE box_id = ?1",
                &home.id(&name),
            )
            .into_iter()
            .map(|snapshot| {
                let layer = home.snapshot_disk(&name, &snapshot);
                (snapshot, digest(&layer))
            })
            .collect();
            let live = digest(&home.live_disk(&name));
            (name, Contents { live, snapshots })
        })
        .collect()
}

/// Everything from before that the change does not take away, nothing but what it adds; what it
/// takes away is there or, where all it adds is there, gone.
pub fn assert_between(boxes: &Boxes, before: &Boxes, whole: &Boxes) {
    for name in before.keys() {
        let stays = boxes.contains_key(name);
        let is_done = !whole.contains_key(name) && whole.keys().all(|n| boxes.contains_key(n));
        assert!(stays || is_done, "box {name} is gone");
    }
    for (name, contents) in boxes {
        let possible = [before.get(name), whole.get(name)];
        let possible: Vec<&Contents> = possible.into_iter().flatten().collect();
        assert!(!possible.is_empty(), "box {name} is from nowhere");
        let live = possible.iter().any(|known| known.live == contents.live);
        assert!(live, "the disk of {name}");
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
