//! Events between an interrupted change and the next mount of the home.

// Not every test uses all of these items.
#![allow(dead_code)]

use std::collections::BTreeMap;

use super::common::*;
use super::contents::{Boxes, Contents};

/// Changes to the home before it is mounted again.
pub struct Next {
    /// The name in failure messages.
    pub name: &'static str,
    /// Commands that one BoxLite runtime runs.
    pub by_boxlite: &'static [&'static [&'static str]],
    /// Bytes that a guest then writes to web's disk.
    pub by_guest: Option<&'static [u8]>,
}

pub static NEXT: [Next; 8] = [
    Next {
        name: "the home is mounted again",
        by_boxlite: &[],
        by_guest: None,
    },
    Next {
        name: "BoxLite starts and the guest writes",
        by_boxlite: &[&["list"]],
        by_guest: Some(b"written after the crash"),
    },
    Next {
        name: "BoxLite takes the same snapshot and the guest writes",
        by_boxlite: &[&["snapshot-create", "web", "a"]],
        by_guest: Some(b"written after the crash"),
    },
    Next {
        name: "BoxLite takes the same snapshot and restores it",
        by_boxlite: &[
            &["snapshot-create", "web", "a"],
            &["snapshot-restore", "web", "a"],
        ],
        by_guest: Some(b"written after the crash"),
    },
    Next {
        name: "BoxLite restores a snapshot",
        by_boxlite: &[&["snapshot-restore", "web", "old"]],
        by_guest: Some(b"written after the crash"),
    },
    Next {
        name: "BoxLite removes snapshots",
        by_boxlite: &[
            &["snapshot-remove", "web", "a"],
            &["snapshot-remove", "web", "old"],
            &["snapshot-remove", "web", "new"],
        ],
        by_guest: None,
    },
    Next {
        name: "BoxLite clones the box and the guest writes",
        by_boxlite: &[&["clone", "web", "theirs"]],
        by_guest: Some(b"written after the crash"),
    },
    Next {
        name: "BoxLite removes the box",
        by_boxlite: &[&["remove", "web", "--force"]],
        by_guest: None,
    },
];

impl Next {
    /// Returns whether BoxLite's forced removal would delete a layer that another box reads. It
    /// would do so without a crash, too, so such a case proves nothing.
    pub fn loses_by_itself(&self, home: &TestHome, boxes: &Boxes) -> bool {
        let forced = |command: &&[&str]| command.contains(&"--force");
        if !self.by_boxlite.iter().any(forced) || !boxes.contains_key("web") {
            return false;
        }
        let web = home.box_dir("web");
        let mut others = boxes.keys().filter(|name| *name != "web");
        others.any(|name| {
            chain(&home.live_disk(name))
                .iter()
                .any(|layer| layer.starts_with(&web))
        })
    }

    /// Makes the changes and applies them to `boxes`, except for the commands BoxLite refuses.
    pub fn happen(&self, home: &TestHome, boxes: &mut Boxes) {
        if !self.by_boxlite.is_empty() {
            let answers = home.try_wheel_batch(self.by_boxlite);
            for (command, answer) in self.by_boxlite.iter().zip(answers) {
                if answer.get("error").is_none() {
                    follow(command, boxes);
                }
            }
        }
        if let (Some(bytes), Some(web)) = (self.by_guest, boxes.get_mut("web")) {
            let before = digest(&home.live_disk("web"));
            assert_eq!(before, web.live, "the disk has other contents");
            home.guest_write("web", FREE_AREA + 3, bytes);
            web.live = digest(&home.live_disk("web"));
            assert_ne!(before, web.live);
        }
    }
}

fn follow(command: &[&str], boxes: &mut Boxes) {
    match *command {
        ["snapshot-create", name, snapshot] => {
            let contents = boxes.get_mut(name).unwrap();
            let live = contents.live.clone();
            contents.snapshots.insert(snapshot.to_owned(), live);
        }
        ["snapshot-restore", name, snapshot] => {
            let contents = boxes.get_mut(name).unwrap();
            contents.live = contents.snapshots[snapshot].clone();
        }
        ["snapshot-remove", name, snapshot] => {
            boxes.get_mut(name).unwrap().snapshots.remove(snapshot);
        }
        ["clone", name, clone] => {
            let live = boxes[name].live.clone();
            let snapshots = BTreeMap::new();
            boxes.insert(clone.to_owned(), Contents { live, snapshots });
        }
        ["remove", name, ..] => {
            boxes.remove(name);
        }
        _ => {}
    }
}
