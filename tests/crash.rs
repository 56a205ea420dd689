//! Crashes: the process that serves the mount, or that compacts the home, is killed at every named point of every change, and
//! then the home is mounted again, or BoxLite is started first and uses the box. Whatever happens
//! next, the box is there with its contents, and what was under way is whole or gone.

mod common;

#[cfg(not(feature = "crash-points"))]
#[test]
fn the_crash_tests_need_the_crash_points() {
    panic!("no crash point is built in: run `cargo test --features crash-points`, or `make test`");
}

#[cfg(feature = "crash-points")]
mod with_crash_points {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::Path;

    use super::common::*;

    // ---- what a home holds ------------------------------------------------------------------------

    /// The guest's bytes of a box: its disk and its snapshots by name.
    #[derive(Clone, Debug, PartialEq)]
    struct Contents {
        live: String,
        snapshots: BTreeMap<String, String>,
    }

    /// Every box by name.
    type Boxes = BTreeMap<String, Contents>;

    /// What the rows name, read by qemu-img.
    fn contents(home: &TestHome) -> Boxes {
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

    // ---- what is under way ------------------------------------------------------------------------

    /// A change, the points it passes, and what the home may hold when it was cut off.
    struct Change {
        name: &'static str,
        by: By,
        /// Makes a home that the change passes all of its points in.
        prepare: fn() -> TestHome,
        act: fn(&Mounted),
        points: &'static [&'static str],
        /// What the home holds once the change is whole, from what it held before.
        whole: fn(&mut Boxes),
    }

    /// The process that is killed.
    #[derive(PartialEq)]
    enum By {
        Mount,
        /// `boxlitefs compact`, beside a mount.
        Compact,
    }

    /// A box with a state of its own.
    fn plain() -> TestHome {
        let home = TestHome::in_memory();
        home.guest_write("web", FREE_AREA, b"the box's own");
        home
    }

    /// A box with a snapshot `old` by the mount: its layers are bases already.
    fn with_our_snapshot() -> TestHome {
        let home = TestHome::in_memory();
        home.mount().snapshot("web", "old").unwrap();
        home.guest_write("web", FREE_AREA, b"the box's own");
        home
    }

    /// A box with a snapshot `old` by BoxLite: its layer lies inside the box.
    fn with_boxlites_snapshot() -> TestHome {
        let home = TestHome::in_memory();
        home.wheel(&["snapshot-create", "web", "old"]);
        home.guest_write("web", FREE_AREA, b"the box's own");
        home
    }

    /// A box that went on from an older state, so that the layer of `old` is read by nobody.
    fn with_an_unread_snapshot() -> TestHome {
        let home = TestHome::in_memory();
        let mount = home.mount();
        mount.snapshot("web", "start").unwrap();
        home.guest_write("web", FREE_AREA, b"a state that ended");
        mount.snapshot("web", "old").unwrap();
        drop(mount);
        home.wheel(&["snapshot-restore", "web", "start"]);
        home.guest_write("web", FREE_AREA, b"the box's own");
        home
    }

    /// Likewise by BoxLite: the layer of `old` has no other name.
    fn with_an_unread_snapshot_by_boxlite() -> TestHome {
        let home = TestHome::in_memory();
        home.wheel(&["snapshot-create", "web", "start"]);
        home.guest_write("web", FREE_AREA, b"a state that ended");
        home.wheel_batch(&[
            &["snapshot-create", "web", "old"],
            &["snapshot-restore", "web", "start"],
        ]);
        home.guest_write("web", FREE_AREA, b"the box's own");
        home
    }

    /// A box whose chain is too long to be stacked upon, with the snapshots of it.
    fn with_a_long_chain() -> TestHome {
        let home = TestHome::in_memory();
        for round in 0u8..4 {
            home.guest_write("web", FREE_AREA + u64::from(round) * 512, &[round; 512]);
            let clone = format!("c{round}");
            let snapshot = if round == 0 {
                "old".to_owned()
            } else {
                format!("s{round}")
            };
            home.wheel_batch(&[
                &["snapshot-create", "web", &snapshot],
                &["clone", "web", &clone],
                &["remove", &clone],
            ]);
        }
        home.guest_write("web", FREE_AREA, b"the box's own");
        assert!(chain(&home.live_disk("web")).len() > 8);
        home
    }

    /// Beside the box, the backup of it that `cp -r` makes.
    fn with_a_backup() -> TestHome {
        let home = with_our_snapshot();
        let mount = home.mount();
        succeed(&[
            "cp",
            "-r",
            text(&mount.at("web")),
            text(&home.beside("backup")),
        ]);
        drop(mount);
        home
    }

    /// Beside the box, a backup of the state that its snapshot `kept` has, too.
    fn with_an_older_backup() -> TestHome {
        let home = with_a_backup();
        home.mount().snapshot("web", "kept").unwrap();
        home.guest_write("web", FREE_AREA + 512, b"since the backup");
        home
    }

    /// A box `other` that BoxLite cloned from `web`: it reads a layer in the directory of that.
    fn with_boxlites_clone() -> TestHome {
        let home = TestHome::in_memory();
        home.wheel_batch(&[
            &["snapshot-create", "web", "old"],
            &["clone", "web", "other"],
        ]);
        home.guest_write("other", FREE_AREA, b"the other's own");
        home.guest_write("web", FREE_AREA, b"the box's own");
        home
    }

    /// The same with a layer that only `web` reads.
    fn with_another_box() -> TestHome {
        let home = with_boxlites_clone();
        home.mount().snapshot("web", "mine").unwrap();
        home.guest_write("web", FREE_AREA + 512, b"the box's own, later");
        home
    }

    /// A box whose snapshot `old` lies on a layer that nothing else needs any more.
    fn with_a_deleted_snapshot_below() -> TestHome {
        let home = TestHome::in_memory();
        let mount = home.mount();
        for name in ["gone", "old"] {
            home.guest_write("web", FREE_AREA, name.repeat(40_000).as_bytes());
            mount.snapshot("web", name).unwrap();
        }
        mount.remove_snapshot("web", "gone").unwrap();
        mount.copy("web", "other");
        home.guest_write("web", FREE_AREA, b"the box's own");
        home
    }

    /// A box that went on from a snapshot which is gone.
    fn with_a_deleted_snapshot() -> TestHome {
        let home = TestHome::in_memory();
        let mount = home.mount();
        mount.snapshot("web", "gone").unwrap();
        home.guest_write("web", FREE_AREA, &[9; 0x2_3456]);
        mount.remove_snapshot("web", "gone").unwrap();
        home
    }

    /// A box that did not change since a snapshot which is gone.
    fn with_nothing_over_a_deleted_snapshot() -> TestHome {
        let home = TestHome::in_memory();
        home.guest_write("web", FREE_AREA, b"the box's own");
        let mount = home.mount();
        mount.snapshot("web", "gone").unwrap();
        mount.remove_snapshot("web", "gone").unwrap();
        home
    }

    /// A box on layers that hold nothing: BoxLite stacks one for each clone.
    fn with_empty_layers() -> TestHome {
        let home = TestHome::in_memory();
        home.wheel_batch(&[
            &["snapshot-create", "web", "old"],
            &["clone", "web", "c1"],
            &["clone", "web", "c2"],
            &["remove", "c1"],
            &["remove", "c2"],
        ]);
        home.guest_write("web", FREE_AREA, b"the box's own");
        assert!(chain(&home.live_disk("web")).len() > 3);
        home
    }

    /// A box on more snapshots than a virtual machine can start from.
    fn with_many_snapshots() -> TestHome {
        let home = TestHome::in_memory();
        for round in 0u8..9 {
            home.guest_write("web", FREE_AREA + u64::from(round) * 512, &[round; 512]);
            let name = if round == 0 {
                "old".to_owned()
            } else {
                format!("s{round}")
            };
            home.wheel(&["snapshot-create", "web", &name]);
        }
        home.guest_write("web", FREE_AREA, b"the box's own");
        assert_eq!(chain(&home.live_disk("web")).len(), 10);
        home
    }

    /// `cp` that the crash cuts off: how it fails is not the point.
    fn copy(from: &Path, to: &Path) {
        run(&["cp", "-r", text(from), text(to)]);
    }

    fn snapshot_taken(boxes: &mut Boxes) {
        let web = boxes.get_mut("web").unwrap();
        web.snapshots.insert("a".to_owned(), web.live.clone());
    }

    fn box_cloned(boxes: &mut Boxes) {
        boxes.insert("copy".to_owned(), boxes["web"].clone());
    }

    fn snapshot_cloned(boxes: &mut Boxes) {
        let live = boxes["web"].snapshots["old"].clone();
        let snapshots = BTreeMap::new();
        boxes.insert("copy".to_owned(), Contents { live, snapshots });
    }

    const SNAPSHOT: Change = Change {
        name: "snapshot",
        by: By::Mount,
        prepare: with_our_snapshot,
        act: |mount| drop(mount.snapshot("web", "a")),
        points: &[
            "freeze.linked",
            "freeze.recorded",
            "freeze.replaced",
            "snapshot.directory",
            "snapshot.linked",
            "snapshot.recorded",
        ],
        whole: snapshot_taken,
    };

    const ADOPT: Change = Change {
        name: "snapshot that adopts",
        by: By::Mount,
        prepare: with_boxlites_snapshot,
        act: |mount| drop(mount.snapshot("web", "a")),
        points: &[
            "adopt.linked",
            "adopt.recorded",
            "adopt.rebased",
            "freeze.linked",
        ],
        whole: snapshot_taken,
    };

    const LONG: Change = Change {
        name: "snapshot of a long chain",
        by: By::Mount,
        prepare: with_many_snapshots,
        act: |mount| drop(mount.snapshot("web", "a")),
        points: &[
            "flat.recorded",
            "flat.installed",
            "freeze.replaced",
            "snapshot.linked",
        ],
        whole: snapshot_taken,
    };

    const LONG_MERGING: Change = Change {
        name: "snapshot of a long chain that merges",
        by: By::Mount,
        prepare: with_a_long_chain,
        act: |mount| drop(mount.snapshot("web", "a")),
        points: &["merge.rebased", "free.claimed", "freeze.replaced"],
        whole: snapshot_taken,
    };

    const REMOVE: Change = Change {
        name: "rmdir",
        by: By::Mount,
        prepare: with_an_unread_snapshot,
        act: |mount| drop(mount.remove_snapshot("web", "old")),
        points: &[
            "remove.adopted",
            "remove.marked",
            "remove.unrecorded",
            "remove.unlinked",
            "free.unlinked",
        ],
        whole: |boxes| drop(boxes.get_mut("web").unwrap().snapshots.remove("old")),
    };

    const REMOVE_ONLY_NAME: Change = Change {
        name: "rmdir of a layer that has no other name",
        by: By::Mount,
        prepare: with_an_unread_snapshot_by_boxlite,
        act: |mount| drop(mount.remove_snapshot("web", "old")),
        points: &["remove.marked", "remove.unrecorded", "remove.unlinked"],
        whole: |boxes| drop(boxes.get_mut("web").unwrap().snapshots.remove("old")),
    };

    const REMOVE_ADOPTING: Change = Change {
        name: "rmdir that adopts",
        by: By::Mount,
        prepare: with_boxlites_snapshot,
        act: |mount| drop(mount.remove_snapshot("web", "old")),
        points: &[
            "adopt.linked",
            "adopt.recorded",
            "adopt.rebased",
            "remove.adopted",
            "remove.unrecorded",
            "remove.unlinked",
        ],
        whole: |boxes| drop(boxes.get_mut("web").unwrap().snapshots.remove("old")),
    };

    const CLONE: Change = Change {
        name: "clone",
        by: By::Mount,
        prepare: plain,
        act: |mount| copy(&mount.at("web"), &mount.at("copy")),
        points: &[
            "freeze.linked",
            "freeze.recorded",
            "freeze.replaced",
            "clone.frozen",
            "clone.built",
            "install.renamed",
            "install.recorded",
        ],
        whole: box_cloned,
    };

    const CLONE_WITH_SNAPSHOTS: Change = Change {
        name: "clone with snapshots",
        by: By::Mount,
        prepare: with_boxlites_snapshot,
        act: |mount| copy(&mount.at("web"), &mount.at("copy")),
        points: &[
            "adopt.linked",
            "adopt.rebased",
            "clone.built",
            "install.recorded",
            "share.referred",
            "snapshot.directory",
            "snapshot.linked",
            "snapshot.recorded",
        ],
        whole: box_cloned,
    };

    const CLONE_OF_SNAPSHOT: Change = Change {
        name: "clone of a snapshot",
        by: By::Mount,
        prepare: with_boxlites_snapshot,
        act: |mount| copy(&mount.at("web/snapshots/old"), &mount.at("copy")),
        points: &[
            "adopt.recorded",
            "clone.frozen",
            "clone.built",
            "install.renamed",
            "install.recorded",
        ],
        whole: snapshot_cloned,
    };

    const CLONE_OF_LONG: Change = Change {
        name: "clone of a long chain",
        by: By::Mount,
        prepare: with_a_long_chain,
        act: |mount| copy(&mount.at("web/export.boxlite"), &mount.at("copy.boxlite")),
        points: &[
            "flat.recorded",
            "flat.installed",
            "clone.built",
            "install.renamed",
        ],
        whole: |boxes| {
            let live = boxes["web"].live.clone();
            let snapshots = BTreeMap::new();
            boxes.insert("copy".to_owned(), Contents { live, snapshots });
        },
    };

    const IMPORT: Change = Change {
        name: "import",
        by: By::Mount,
        prepare: with_a_backup,
        act: |mount| {
            let backup = mount.root().with_file_name("backup");
            copy(&backup, &mount.at("copy"));
        },
        points: &[
            "import.built",
            "install.renamed",
            "install.recorded",
            "import.snapshot",
            "snapshot.recorded",
        ],
        whole: box_cloned,
    };

    const RESTORE: Change = Change {
        name: "restore",
        by: By::Mount,
        prepare: with_boxlites_snapshot,
        act: |mount| {
            let snapshot = mount.at("web/snapshots/old/export.boxlite");
            copy(&snapshot, &mount.at("web/export.boxlite"));
        },
        points: &[
            "adopt.linked",
            "adopt.rebased",
            "restore.frozen",
            "restore.referred",
            "restore.replaced",
        ],
        whole: |boxes| {
            let web = boxes.get_mut("web").unwrap();
            web.live = web.snapshots["old"].clone();
        },
    };

    const RESTORE_FROM_ANOTHER: Change = Change {
        name: "restore from another box",
        by: By::Mount,
        prepare: with_another_box,
        act: |mount| {
            let other = mount.at("other/export.boxlite");
            copy(&other, &mount.at("web/export.boxlite"));
        },
        points: &[
            "freeze.linked",
            "freeze.replaced",
            "restore.frozen",
            "restore.referred",
            "restore.replaced",
        ],
        whole: |boxes| boxes.get_mut("web").unwrap().live = boxes["other"].live.clone(),
    };

    const RESTORE_BACKUP: Change = Change {
        name: "restore of a backup",
        by: By::Mount,
        prepare: with_an_older_backup,
        act: |mount| {
            let backup = mount.root().with_file_name("backup");
            let export = mount.at("web/export.boxlite");
            copy(&backup.join("export.boxlite"), &export);
        },
        points: &["restore.arrived", "restore.replaced"],
        whole: |boxes| {
            let web = boxes.get_mut("web").unwrap();
            web.live = web.snapshots["kept"].clone();
        },
    };

    const RENAME: Change = Change {
        name: "rename of a snapshot",
        by: By::Mount,
        prepare: with_boxlites_snapshot,
        act: |mount| {
            let snapshots = mount.at("web/snapshots");
            drop(fs::rename(snapshots.join("old"), snapshots.join("new")));
        },
        points: &[
            "adopt.linked",
            "rename.adopted",
            "rename.linked",
            "rename.recorded",
            "rename.unlinked",
        ],
        whole: |boxes| {
            let snapshots = &mut boxes.get_mut("web").unwrap().snapshots;
            let renamed = snapshots.remove("old").unwrap();
            snapshots.insert("new".to_owned(), renamed);
        },
    };

    const REMOVE_BOX: Change = Change {
        name: "rm -r",
        by: By::Mount,
        prepare: with_another_box,
        act: |mount| drop(run(&["rm", "-r", text(&mount.at("web"))])),
        points: &[
            "remove-box.adopted",
            "remove-box.marked",
            "remove-box.unrecorded",
            "remove-box.moved",
            "free.unlinked",
        ],
        whole: |boxes| drop(boxes.remove("web")),
    };

    const REMOVE_BOX_ADOPTING: Change = Change {
        name: "rm -r that adopts",
        by: By::Mount,
        prepare: with_boxlites_clone,
        act: |mount| drop(run(&["rm", "-r", text(&mount.at("web"))])),
        points: &[
            "adopt.linked",
            "adopt.rebased",
            "remove-box.adopted",
            "remove-box.unrecorded",
        ],
        whole: |boxes| drop(boxes.remove("web")),
    };

    const MERGE: Change = Change {
        name: "merge into a snapshot's layer",
        by: By::Compact,
        prepare: with_a_deleted_snapshot_below,
        act: |_| {},
        points: &["merge.written", "merge.renamed", "free.unlinked"],
        whole: |_| {},
    };

    const MERGE_INTO_LIVE: Change = Change {
        name: "merge into a live disk",
        by: By::Compact,
        prepare: with_a_deleted_snapshot,
        act: |_| {},
        points: &["merge.written", "merge.renamed", "free.unlinked"],
        whole: |_| {},
    };

    const PROMOTE: Change = Change {
        name: "merge into a live disk that holds nothing",
        by: By::Compact,
        prepare: with_nothing_over_a_deleted_snapshot,
        act: |_| {},
        points: &["merge.claimed", "merge.promoted", "free.unlinked"],
        whole: |_| {},
    };

    const SKIP: Change = Change {
        name: "merge of layers that hold nothing",
        by: By::Compact,
        prepare: with_empty_layers,
        act: |_| {},
        points: &["merge.rebased", "free.claimed", "free.unlinked"],
        whole: |_| {},
    };

    const SHORTEN: Change = Change {
        name: "shortening of a chain",
        by: By::Compact,
        prepare: with_many_snapshots,
        act: |_| {},
        points: &["merge.written", "merge.renamed"],
        whole: |_| {},
    };

    const CHANGES: [&Change; 23] = [
        &SNAPSHOT,
        &ADOPT,
        &LONG,
        &LONG_MERGING,
        &REMOVE,
        &REMOVE_ONLY_NAME,
        &REMOVE_ADOPTING,
        &CLONE,
        &CLONE_WITH_SNAPSHOTS,
        &CLONE_OF_SNAPSHOT,
        &CLONE_OF_LONG,
        &IMPORT,
        &RESTORE,
        &RESTORE_FROM_ANOTHER,
        &RESTORE_BACKUP,
        &RENAME,
        &REMOVE_BOX,
        &REMOVE_BOX_ADOPTING,
        &MERGE,
        &MERGE_INTO_LIVE,
        &PROMOTE,
        &SKIP,
        &SHORTEN,
    ];

    // ---- what happens next ------------------------------------------------------------------------

    /// What is done to the home before it is mounted again.
    struct Next {
        name: &'static str,
        by_boxlite: &'static [&'static [&'static str]],
        /// What a guest writes into web's disk after that.
        by_guest: Option<&'static [u8]>,
    }

    const NEXT: [Next; 8] = [
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
        /// Whether BoxLite, told by force, would remove a layer that another box reads: with our crash
        /// or without.
        fn loses_by_itself(&self, home: &TestHome, boxes: &Boxes) -> bool {
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

        /// Does it, and follows in `boxes` what it does to each box. What BoxLite refuses, it did
        /// not do.
        fn happen(&self, home: &TestHome, boxes: &mut Boxes) {
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
                assert_eq!(before, web.live, "the disk was another one");
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

    // ---- the table --------------------------------------------------------------------------------

    /// Kills the change at each of its points, and has each of the things happen after each.
    fn survives(change: &Change) {
        let home = (change.prepare)();
        let before = contents(&home);
        let mut whole = before.clone();
        (change.whole)(&mut whole);
        home.put_aside("before");
        let mut wrong = Vec::new();
        for point in change.points {
            home.put_back("before");
            match change.by {
                By::Mount => {
                    let mut mount = home.mount_crashing_at(point);
                    (change.act)(&mount);
                    assert!(mount.has_crashed(), "{} never came to {point}", change.name);
                }
                By::Compact => {
                    let said = home.compact_crashing_at(point);
                    assert_eq!(said, None, "{} never came to {point}", change.name);
                }
            }
            let crashed = contents(&home);
            assert_between(&crashed, &before, &whole);
            home.put_aside(point);
            for next in &NEXT {
                home.put_back(point);
                if next.loses_by_itself(&home, &crashed) {
                    continue;
                }
                let case = std::panic::catch_unwind(|| {
                    assert_recovers(&home, crashed.clone(), next);
                });
                if let Err(why) = case {
                    let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
                    let case = format!("killed at {point}, then {}: {why}", next.name);
                    wrong.push(format!("{} {case}", change.name));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// After what happens next, mounting the home finds every box and snapshot as it is to be, and
    /// leaves nothing to be found by a check.
    fn assert_recovers(home: &TestHome, mut boxes: Boxes, next: &Next) {
        next.happen(home, &mut boxes);
        let mount = home.mount();
        let recovered: Vec<&String> = boxes.keys().collect();
        assert_eq!(mount.names("").iter().collect::<Vec<_>>(), recovered);
        for (name, contents) in &boxes {
            let snapshots: Vec<&String> = contents.snapshots.keys().collect();
            let shown = mount.names(format!("{name}/snapshots"));
            assert_eq!(shown.iter().collect::<Vec<_>>(), snapshots);
        }
        let (status, said) = home.check();
        assert_eq!(status, 0, "boxlitefs check after the mount: {said}");
        // The home can be used as before.
        for (name, contents) in &mut boxes {
            mount.snapshot(name, "afterwards").unwrap();
            let live = contents.live.clone();
            contents.snapshots.insert("afterwards".to_owned(), live);
        }
        if let Some(web) = boxes.get("web") {
            assert_eq!(mount.export_digest("web/export.boxlite"), web.live);
        }
        drop(mount);
        assert_eq!(contents(home), boxes);
        home.assert_whole_once_mounted();
        if next.by_boxlite.is_empty() {
            assert_boxlite_goes_on(home, &boxes);
        }
    }

    /// BoxLite lists every box and exports it.
    fn assert_boxlite_goes_on(home: &TestHome, boxes: &Boxes) {
        let place = tempfile::tempdir().unwrap();
        let mut commands = vec![vec!["list"]];
        for name in boxes.keys() {
            commands.push(vec!["export", name, text(place.path())]);
        }
        let commands: Vec<&[&str]> = commands.iter().map(Vec::as_slice).collect();
        let answers = home.wheel_batch(&commands);
        assert_eq!(answers[0].as_array().unwrap().len(), boxes.len());
        for (answer, contents) in answers[1..].iter().zip(boxes.values()) {
            let archive = answer["path"].as_str().unwrap();
            assert_eq!(archive_digest(archive.as_ref()), contents.live);
        }
    }

    /// Everything from before that the change does not take away, nothing but what it adds; what it
    /// takes away is there or, where all it adds is there, gone.
    fn assert_between(boxes: &Boxes, before: &Boxes, whole: &Boxes) {
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

    #[test]
    fn a_snapshot_that_is_cut_off_is_whole_or_gone() {
        survives(&SNAPSHOT);
    }

    #[test]
    fn an_adoption_that_is_cut_off_changes_no_contents() {
        survives(&ADOPT);
    }

    #[test]
    fn a_snapshot_of_a_long_chain_that_is_cut_off_is_whole_or_gone() {
        survives(&LONG);
    }

    #[test]
    fn a_snapshot_that_merges_first_and_is_cut_off_is_whole_or_gone() {
        survives(&LONG_MERGING);
    }

    #[test]
    fn a_deletion_that_is_cut_off_is_whole_or_undone() {
        survives(&REMOVE);
    }

    #[test]
    fn a_deletion_of_a_layers_only_name_that_is_cut_off_is_whole_or_undone() {
        survives(&REMOVE_ONLY_NAME);
    }

    #[test]
    fn a_deletion_that_adopts_and_is_cut_off_is_whole_or_undone() {
        survives(&REMOVE_ADOPTING);
    }

    #[test]
    fn a_clone_that_is_cut_off_is_whole_or_gone() {
        survives(&CLONE);
    }

    #[test]
    fn a_clone_with_snapshots_that_is_cut_off_has_those_that_came_along() {
        survives(&CLONE_WITH_SNAPSHOTS);
    }

    #[test]
    fn a_clone_of_a_snapshot_that_is_cut_off_is_whole_or_gone() {
        survives(&CLONE_OF_SNAPSHOT);
    }

    #[test]
    fn a_clone_of_a_long_chain_that_is_cut_off_is_whole_or_gone() {
        survives(&CLONE_OF_LONG);
    }

    #[test]
    fn an_import_that_is_cut_off_is_whole_or_gone() {
        survives(&IMPORT);
    }

    #[test]
    fn a_restore_that_is_cut_off_leaves_the_old_disk_or_the_new() {
        survives(&RESTORE);
    }

    #[test]
    fn a_restore_from_another_box_that_is_cut_off_leaves_the_old_disk_or_the_new() {
        survives(&RESTORE_FROM_ANOTHER);
    }

    #[test]
    fn a_restore_of_a_backup_that_is_cut_off_leaves_the_old_disk_or_the_new() {
        survives(&RESTORE_BACKUP);
    }

    #[test]
    fn a_snapshots_rename_that_is_cut_off_leaves_one_of_its_names() {
        survives(&RENAME);
    }

    #[test]
    fn a_boxs_removal_that_is_cut_off_is_whole_or_undone() {
        survives(&REMOVE_BOX);
    }

    #[test]
    fn a_boxs_removal_that_adopts_and_is_cut_off_is_whole_or_undone() {
        survives(&REMOVE_BOX_ADOPTING);
    }

    #[test]
    fn a_merge_that_is_cut_off_changes_no_contents() {
        survives(&MERGE);
    }

    #[test]
    fn a_merge_into_a_live_disk_that_is_cut_off_changes_no_contents() {
        survives(&MERGE_INTO_LIVE);
    }

    #[test]
    fn a_merge_that_moves_a_base_and_is_cut_off_changes_no_contents() {
        survives(&PROMOTE);
    }

    #[test]
    fn a_merge_of_empty_layers_that_is_cut_off_changes_no_contents() {
        survives(&SKIP);
    }

    #[test]
    fn a_shortening_that_is_cut_off_changes_no_contents() {
        survives(&SHORTEN);
    }

    #[test]
    fn every_crash_point_in_the_store_is_tried() {
        let tried: BTreeSet<&str> = CHANGES
            .iter()
            .flat_map(|change| change.points)
            .copied()
            .collect();
        let store = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store");
        let mut named = BTreeSet::new();
        for file in names_in(&store) {
            let source = fs::read_to_string(store.join(file)).unwrap();
            for call in source.split("crash_point(\"").skip(1) {
                named.insert(call.split('"').next().unwrap().to_owned());
            }
        }
        assert!(!named.is_empty());
        let tried: BTreeSet<String> = tried.into_iter().map(str::to_owned).collect();
        assert_eq!(tried, named);
    }
}
