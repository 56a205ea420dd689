//! The changes that the fault tests interrupt, and the homes in which they run.

// Not every test uses all of these items.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::common::*;
use super::contents::{Boxes, Contents, contents};

/// A change, its crash points, and the contents of the home before and after it.
pub struct Change {
    /// The name in failure messages.
    pub name: &'static str,
    /// The program that makes the change.
    pub by: By,
    /// Makes a home in which the change reaches all of its points.
    pub prepare: fn() -> TestHome,
    /// Makes the change, if a mount makes it.
    pub act: fn(&Mounted) -> Outcome,
    /// The crash points that the change reaches.
    pub points: &'static [&'static str],
    /// Turns the contents of the home before the change into those after it.
    pub whole: fn(&mut Boxes),
}

impl Change {
    /// Returns whether the change is to drop what was kept.
    pub fn ends_keeping(&self) -> bool {
        self.name == END_KEEPING.name
    }
}

/// The result of a change: the tool's error message, if it failed.
pub type Outcome = Result<(), String>;

/// The process that makes a change, and that the tests kill.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum By {
    Mount,
    /// `boxlitefs compact`.
    Compact,
    /// `boxlitefs check --repair`.
    Repair,
}

impl By {
    /// Returns the command that makes the change; None if a mount makes it.
    pub fn command(&self, home: &TestHome) -> Option<Command> {
        let arguments: &[&str] = match self {
            By::Mount => return None,
            By::Compact => &["compact"],
            By::Repair => &["check", "--repair"],
        };
        let mut command = Command::new(binary());
        command.args(arguments).arg(home.root());
        Some(command)
    }
}

/// Makes a box that was written to.
fn plain() -> TestHome {
    let home = TestHome::in_memory();
    home.guest_write("web", FREE_AREA, b"the box's own");
    home
}

/// Makes a box with a snapshot `old` taken through the mount, so that its layers are bases already.
fn with_our_snapshot() -> TestHome {
    let home = TestHome::in_memory();
    home.mount().snapshot("web", "old").unwrap();
    home.guest_write("web", FREE_AREA, b"the box's own");
    home
}

/// Makes a box with a snapshot `old` taken by BoxLite, so that its layer lies inside the box.
fn with_boxlites_snapshot() -> TestHome {
    let home = TestHome::in_memory();
    home.wheel(&["snapshot-create", "web", "old"]);
    home.guest_write("web", FREE_AREA, b"the box's own");
    home
}

/// Makes a box that was restored to an older state, so that only the snapshot `old` uses its layer.
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

/// Makes a home whose rows and image headers contain paths through a symlink, as after a move of
/// the home that left a symlink at the old place.
fn with_paths_through_a_link() -> TestHome {
    let home = with_our_snapshot();
    let link = home.beside("link");
    std::os::unix::fs::symlink(home.root(), &link).unwrap();
    let (here, there) = (text(home.root()), text(&link));
    let database = home.database();
    for statement in [
        "UPDATE base_disk SET base_path = replace(base_path, ?1, ?2), json = replace(json, ?1, ?2)",
        "UPDATE snapshot SET json = replace(json, ?1, ?2)",
        "UPDATE box_config SET json = replace(json, ?1, ?2)",
    ] {
        database.execute(statement, [here, there]).unwrap();
    }
    let live = home.live_disk("web");
    let base = text(&chain(&live)[1]).replace(here, there);
    succeed(&[
        "qemu-img",
        "rebase",
        "-u",
        "-b",
        &base,
        "-F",
        "qcow2",
        text(&live),
    ]);
    home
}

/// Makes a home in which a user deleted a base of ours: the layer of `old` keeps its name in the
/// snapshot, and its spare name.
fn with_a_deleted_base() -> TestHome {
    let home = with_an_unread_snapshot();
    let layer = fs::metadata(home.snapshot_disk("web", "old")).unwrap();
    let bases = home.root().join("bases");
    let is_it = |name: &String| fs::metadata(bases.join(name)).unwrap().ino() == layer.ino();
    let base = names_in(&bases).into_iter().find(is_it).unwrap();
    fs::remove_file(bases.join(base)).unwrap();
    home
}

/// Makes a box that BoxLite restored to an older state. The layer of its snapshot `old` is
/// unreferenced and, unlike in [`with_an_unread_snapshot`], has no other name.
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

/// Makes a box with snapshots whose chain is too long for another layer.
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

/// Makes a box and, next to the home, a backup of it made by `cp -r`.
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

/// Makes a box and a backup with the same state as the box's snapshot `kept`.
fn with_an_older_backup() -> TestHome {
    let home = with_a_backup();
    home.mount().snapshot("web", "kept").unwrap();
    home.guest_write("web", FREE_AREA + 512, b"since the backup");
    home
}

/// Beside the box, a backup of it with a snapshot `old`. The box did not change since its snapshot `kept`.
fn with_a_snapshot_to_replace() -> TestHome {
    let home = with_a_backup();
    home.mount().snapshot("web", "kept").unwrap();
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

/// Makes a box whose snapshot `old` lies directly on the layer of a deleted snapshot.
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

/// Makes a box that was written to since its only snapshot, which was deleted.
fn with_a_deleted_snapshot() -> TestHome {
    let home = TestHome::in_memory();
    let mount = home.mount();
    mount.snapshot("web", "gone").unwrap();
    home.guest_write("web", FREE_AREA, &[9; 0x2_3456]);
    mount.remove_snapshot("web", "gone").unwrap();
    home
}

/// Makes a box that has not changed since its only snapshot, which was deleted.
fn with_nothing_over_a_deleted_snapshot() -> TestHome {
    let home = TestHome::in_memory();
    home.guest_write("web", FREE_AREA, b"the box's own");
    let mount = home.mount();
    mount.snapshot("web", "gone").unwrap();
    mount.remove_snapshot("web", "gone").unwrap();
    home
}

/// Makes a box on empty layers: BoxLite adds one for each clone.
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

/// Makes a box with a snapshot layer that has no row, and with an unreferenced base of BoxLite.
fn with_an_orphan() -> TestHome {
    let home = with_empty_layers();
    home.wheel_batch(&[
        &["clone", "web", "c3"],
        &["remove", "c3"],
        &["snapshot-restore", "web", "old"],
    ]);
    home.guest_write("web", FREE_AREA, b"the box's own");
    let orphan = home.snapshot_disk("web", "orphan");
    fs::create_dir(orphan.parent().unwrap()).unwrap();
    fs::copy(home.snapshot_disk("web", "old"), &orphan).unwrap();
    home
}

/// Makes a box whose chain of snapshots is too long for a virtual machine to start from.
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

/// Runs `cp -r`.
fn copy(from: &Path, to: &Path) -> Outcome {
    tool(&["cp", "-r", text(from), text(to)])
}

fn tool(command: &[&str]) -> Outcome {
    let output = run(command);
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn said(result: io::Result<()>) -> Outcome {
    result.map_err(|error| error.to_string())
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

pub const SNAPSHOT: Change = Change {
    name: "snapshot",
    by: By::Mount,
    prepare: with_our_snapshot,
    act: |mount| said(mount.snapshot("web", "a")),
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

pub const ADOPT: Change = Change {
    name: "snapshot that adopts",
    by: By::Mount,
    prepare: with_boxlites_snapshot,
    act: |mount| said(mount.snapshot("web", "a")),
    points: &[
        "adopt.linked",
        "adopt.recorded",
        "adopt.rebased",
        "freeze.linked",
    ],
    whole: snapshot_taken,
};

pub const LONG: Change = Change {
    name: "snapshot of a long chain",
    by: By::Mount,
    prepare: with_many_snapshots,
    act: |mount| said(mount.snapshot("web", "a")),
    points: &[
        "flat.recorded",
        "flat.installed",
        "freeze.replaced",
        "snapshot.linked",
    ],
    whole: snapshot_taken,
};

pub const LONG_MERGING: Change = Change {
    name: "snapshot of a long chain that merges",
    by: By::Mount,
    prepare: with_a_long_chain,
    act: |mount| said(mount.snapshot("web", "a")),
    points: &["merge.rebased", "free.claimed", "freeze.replaced"],
    whole: snapshot_taken,
};

pub const REMOVE: Change = Change {
    name: "rmdir",
    by: By::Mount,
    prepare: with_an_unread_snapshot,
    act: |mount| said(mount.remove_snapshot("web", "old")),
    points: &[
        "remove.adopted",
        "remove.marked",
        "remove.unrecorded",
        "remove.unlinked",
        "free.unlinked",
    ],
    whole: |boxes| drop(boxes.get_mut("web").unwrap().snapshots.remove("old")),
};

pub const REMOVE_ONLY_NAME: Change = Change {
    name: "rmdir of a layer that has no other name",
    by: By::Mount,
    prepare: with_an_unread_snapshot_by_boxlite,
    act: |mount| said(mount.remove_snapshot("web", "old")),
    points: &["remove.marked", "remove.unrecorded", "remove.unlinked"],
    whole: |boxes| drop(boxes.get_mut("web").unwrap().snapshots.remove("old")),
};

pub const REMOVE_ADOPTING: Change = Change {
    name: "rmdir that adopts",
    by: By::Mount,
    prepare: with_boxlites_snapshot,
    act: |mount| said(mount.remove_snapshot("web", "old")),
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

pub const CLONE: Change = Change {
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

pub const CLONE_WITH_SNAPSHOTS: Change = Change {
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

pub const CLONE_OF_SNAPSHOT: Change = Change {
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

pub const CLONE_OF_LONG: Change = Change {
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

pub const IMPORT: Change = Change {
    name: "import",
    by: By::Mount,
    prepare: with_a_backup,
    act: |mount| {
        let backup = mount.root().with_file_name("backup");
        copy(&backup, &mount.at("copy"))
    },
    points: &[
        "import.built",
        "install.renamed",
        "install.recorded",
        "freeze.linked",
        "freeze.replaced",
        "import.compared",
        "import.snapshot",
        "snapshot.recorded",
    ],
    whole: box_cloned,
};

pub const RESTORE: Change = Change {
    name: "restore",
    by: By::Mount,
    prepare: with_boxlites_snapshot,
    act: |mount| {
        let snapshot = mount.at("web/snapshots/old/export.boxlite");
        copy(&snapshot, &mount.at("web/export.boxlite"))
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

pub const RESTORE_FROM_ANOTHER: Change = Change {
    name: "restore from another box",
    by: By::Mount,
    prepare: with_another_box,
    act: |mount| {
        let other = mount.at("other/export.boxlite");
        copy(&other, &mount.at("web/export.boxlite"))
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

pub const RESTORE_BACKUP: Change = Change {
    name: "restore of a backup",
    by: By::Mount,
    prepare: with_an_older_backup,
    act: |mount| {
        let backup = mount.root().with_file_name("backup");
        let export = mount.at("web/export.boxlite");
        copy(&backup.join("export.boxlite"), &export)
    },
    points: &["restore.arrived", "restore.replaced"],
    whole: |boxes| {
        let web = boxes.get_mut("web").unwrap();
        web.live = web.snapshots["kept"].clone();
    },
};

pub const REPLACE: Change = Change {
    name: "snapshot that replaces another",
    by: By::Mount,
    prepare: with_a_snapshot_to_replace,
    act: |mount| {
        let backup = mount.root().with_file_name("backup/snapshots/old");
        let export = mount.at("web/snapshots/kept/export.boxlite");
        copy(&backup.join("export.boxlite"), &export)
    },
    points: &[
        "import.snapshot",
        "replace.marked",
        "snapshot.recorded",
        "remove.unlinked",
    ],
    whole: |boxes| {
        let snapshots = &mut boxes.get_mut("web").unwrap().snapshots;
        snapshots.insert("kept".to_owned(), snapshots["old"].clone());
    },
};

pub const RENAME: Change = Change {
    name: "rename of a snapshot",
    by: By::Mount,
    prepare: with_boxlites_snapshot,
    act: |mount| {
        let snapshots = mount.at("web/snapshots");
        said(fs::rename(snapshots.join("old"), snapshots.join("new")))
    },
    points: &[
        "adopt.linked",
        "rename.adopted",
        "rename.linked",
        "rename.recorded",
    ],
    whole: |boxes| {
        let snapshots = &mut boxes.get_mut("web").unwrap().snapshots;
        let renamed = snapshots.remove("old").unwrap();
        snapshots.insert("new".to_owned(), renamed);
    },
};

pub const RENAME_BOX: Change = Change {
    name: "rename of a box",
    by: By::Mount,
    prepare: with_our_snapshot,
    act: |mount| said(fs::rename(mount.at("web"), mount.at("api"))),
    points: &["rename-box.recorded"],
    whole: |boxes| {
        let web = boxes.remove("web").unwrap();
        boxes.insert("api".to_owned(), web);
    },
};

pub const EDIT_BOX: Change = Change {
    name: "edit of box.json",
    by: By::Mount,
    prepare: with_our_snapshot,
    act: |mount| {
        let json = text(&mount.at("web/box.json")).to_owned();
        tool(&["sed", "-i", "s/\"cpus\": null/\"cpus\": 2/", &json])
    },
    points: &["edit.recorded"],
    whole: |_| {},
};

pub const REMOVE_BOX: Change = Change {
    name: "rm -r",
    by: By::Mount,
    prepare: with_another_box,
    act: |mount| tool(&["rm", "-r", text(&mount.at("web"))]),
    points: &[
        "remove-box.adopted",
        "remove-box.marked",
        "remove-box.unrecorded",
        "remove-box.moved",
        "free.unlinked",
    ],
    whole: |boxes| drop(boxes.remove("web")),
};

pub const REMOVE_BOX_ADOPTING: Change = Change {
    name: "rm -r that adopts",
    by: By::Mount,
    prepare: with_boxlites_clone,
    act: |mount| tool(&["rm", "-r", text(&mount.at("web"))]),
    points: &[
        "adopt.linked",
        "adopt.rebased",
        "remove-box.adopted",
        "remove-box.unrecorded",
    ],
    whole: |boxes| drop(boxes.remove("web")),
};

/// Returns the path of the only entry that can be had back. The mount may be dead.
fn entry(mount: &Mounted) -> Result<PathBuf, String> {
    let undo = mount.at(".boxlite/undo");
    let mut entries = fs::read_dir(&undo).map_err(|error| error.to_string())?;
    match entries.next() {
        Some(Ok(entry)) => Ok(entry.path()),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("nothing can be had back".to_owned()),
    }
}

/// Makes a box, and keeps another that was removed.
fn with_a_removed_box() -> TestHome {
    let home = with_boxlites_clone().keep();
    let mount = home.mount();
    mount.snapshot("other", "theirs").unwrap();
    home.guest_write("other", FREE_AREA + 512, b"the other's own, later");
    OTHER.get_or_init(|| contents(&home)["other"].clone());
    tool(&["rm", "-r", text(&mount.at("other"))]).unwrap();
    drop(mount);
    home
}

/// The same, and a box `reader` that was made of what is kept.
fn with_a_removed_box_that_is_read() -> TestHome {
    let home = with_a_removed_box();
    let mount = home.mount();
    copy(&entry(&mount).unwrap(), &mount.at("reader")).unwrap();
    drop(mount);
    home
}

/// Makes a box, and keeps a snapshot of it that was removed, whose layer nothing else reads.
fn with_a_removed_snapshot() -> TestHome {
    let home = with_an_unread_snapshot().keep();
    OLD.get_or_init(|| contents(&home)["web"].snapshots["old"].clone());
    home.mount().remove_snapshot("web", "old").unwrap();
    home
}

/// The same after somebody deleted the layer's base, its spare name and its row.
fn with_an_entry_without_base() -> TestHome {
    let home = with_a_removed_snapshot();
    let undo = home.root().join(".boxlitefs/undo");
    let kept = undo.join(&names_in(&undo)[0]).join("disks/disk.qcow2");
    let inode = fs::metadata(kept).unwrap().ino();
    for directory in ["bases", ".boxlitefs/layers"] {
        let directory = home.root().join(directory);
        for name in names_in(&directory) {
            let path = directory.join(&name);
            if fs::metadata(&path).unwrap().ino() == inode {
                fs::remove_file(&path).unwrap();
                let id = name.trim_end_matches(".qcow2");
                let delete = "DELETE FROM base_disk WHERE id = ?1";
                home.database().execute(delete, [id]).unwrap();
            }
        }
    }
    home
}

fn other_is_back(boxes: &mut Boxes) {
    boxes.insert("other".to_owned(), OTHER.get().unwrap().clone());
}

/// The contents of the box that [`with_a_removed_box`] removes.
static OTHER: std::sync::OnceLock<Contents> = std::sync::OnceLock::new();

pub const REMOVE_KEPT: Change = Change {
    name: "rmdir that keeps",
    prepare: || with_an_unread_snapshot().keep(),
    points: &[
        "undo.recorded",
        "undo.linked",
        "undo.placed",
        "remove.marked",
        "remove.unrecorded",
        "remove.unlinked",
    ],
    ..REMOVE
};

pub const REMOVE_ONLY_NAME_KEPT: Change = Change {
    name: "rmdir of a layer that has no other name, that keeps",
    prepare: || with_an_unread_snapshot_by_boxlite().keep(),
    points: &[
        "undo.recorded",
        "undo.linked",
        "undo.placed",
        "remove.marked",
        "remove.unrecorded",
        "remove.unlinked",
    ],
    ..REMOVE_ONLY_NAME
};

pub const RESTORE_KEPT: Change = Change {
    name: "restore that keeps",
    prepare: || with_boxlites_snapshot().keep(),
    points: &[
        "restore.frozen",
        "restore.referred",
        "undo.recorded",
        "undo.linked",
        "undo.placed",
        "restore.replaced",
    ],
    ..RESTORE
};

pub const RESTORE_BACKUP_KEPT: Change = Change {
    name: "restore of a backup that keeps",
    prepare: || with_a_changed_box_and_a_backup().keep(),
    points: &[
        "undo.recorded",
        "undo.linked",
        "undo.placed",
        "restore.replaced",
    ],
    ..RESTORE_BACKUP
};

/// Makes a box that was written to since its backup.
fn with_a_changed_box_and_a_backup() -> TestHome {
    let home = with_an_older_backup();
    home.guest_write("web", FREE_AREA + 1024, b"since the snapshot");
    home
}

pub const REMOVE_BOX_KEPT: Change = Change {
    name: "rm -r that keeps",
    prepare: || with_another_box().keep(),
    points: &[
        "remove-box.adopted",
        "undo.recorded",
        "undo.linked",
        "undo.placed",
        "remove-box.marked",
        "remove-box.unrecorded",
        "remove-box.moved",
    ],
    ..REMOVE_BOX
};

pub const REMOVE_CLONE_KEPT: Change = Change {
    name: "rm -r of BoxLite's clone that keeps",
    by: By::Mount,
    prepare: || with_boxlites_clone().keep(),
    act: |mount| tool(&["rm", "-r", text(&mount.at("other"))]),
    points: &[
        "undo.recorded",
        "undo.linked",
        "undo.placed",
        "remove-box.unrecorded",
    ],
    whole: |boxes| drop(boxes.remove("other")),
};

pub const BOX_BACK: Change = Change {
    name: "return of a removed box",
    by: By::Mount,
    prepare: with_a_removed_box,
    act: |mount| tool(&["mv", "-T", text(&entry(mount)?), text(&mount.at("other"))]),
    points: &[
        "undo.box-placed",
        "undo.box-back",
        "undo.unrecorded",
        "undo.removed",
    ],
    whole: other_is_back,
};

pub const BOX_BACK_SHARED: Change = Change {
    name: "return of a removed box whose disk is read",
    prepare: with_a_removed_box_that_is_read,
    ..BOX_BACK
};

pub const SNAPSHOT_BACK: Change = Change {
    name: "return of a removed snapshot",
    by: By::Mount,
    prepare: with_a_removed_snapshot,
    act: |mount| {
        let back = mount.at("web/snapshots/back");
        tool(&["mv", "-T", text(&entry(mount)?), text(&back)])
    },
    points: &[
        "share.referred",
        "snapshot.linked",
        "snapshot.recorded",
        "undo.snapshot-back",
        "undo.unrecorded",
    ],
    whole: |boxes| {
        let web = boxes.get_mut("web").unwrap();
        web.snapshots
            .insert("back".to_owned(), OLD.get().unwrap().clone());
    },
};

/// The state of the snapshot that [`with_a_removed_snapshot`] removes.
static OLD: std::sync::OnceLock<String> = std::sync::OnceLock::new();

pub const END_KEEPING: Change = Change {
    name: "end of keeping",
    by: By::Mount,
    prepare: with_a_removed_snapshot,
    act: |mount| tool(&["rm", "-r", text(&entry(mount)?)]),
    points: &["undo.unrecorded", "undo.removed", "free.unlinked"],
    whole: |_| {},
};

pub const COMPLETE_KEPT: Change = Change {
    name: "repair of what is kept",
    by: By::Repair,
    prepare: with_an_entry_without_base,
    act: |_| Ok(()),
    points: &["undo.completed"],
    whole: |_| {},
};

pub const MERGE: Change = Change {
    name: "merge into a snapshot's layer",
    by: By::Compact,
    prepare: with_a_deleted_snapshot_below,
    act: |_| Ok(()),
    points: &[
        "merge.prepared",
        "merge.written",
        "merge.renamed",
        "free.unlinked",
    ],
    whole: |_| {},
};

pub const MERGE_INTO_LIVE: Change = Change {
    name: "merge into a live disk",
    by: By::Compact,
    prepare: with_a_deleted_snapshot,
    act: |_| Ok(()),
    points: &[
        "merge.prepared",
        "merge.written",
        "merge.renamed",
        "free.unlinked",
    ],
    whole: |_| {},
};

pub const PROMOTE: Change = Change {
    name: "merge into a live disk that holds nothing",
    by: By::Compact,
    prepare: with_nothing_over_a_deleted_snapshot,
    act: |_| Ok(()),
    points: &["merge.claimed", "merge.promoted", "free.unlinked"],
    whole: |_| {},
};

pub const SKIP: Change = Change {
    name: "merge of layers that hold nothing",
    by: By::Compact,
    prepare: with_empty_layers,
    act: |_| Ok(()),
    points: &["merge.rebased", "free.claimed", "free.unlinked"],
    whole: |_| {},
};

pub const SHORTEN: Change = Change {
    name: "shortening of a chain",
    by: By::Compact,
    prepare: with_many_snapshots,
    act: |_| Ok(()),
    points: &["merge.written", "merge.renamed"],
    whole: |_| {},
};

pub const REPAIR: Change = Change {
    name: "check --repair",
    by: By::Repair,
    prepare: with_an_orphan,
    act: |_| Ok(()),
    points: &["snapshot.recorded", "free.claimed", "free.unlinked"],
    whole: |boxes| {
        // The orphan is a copy of the layer of `old`.
        let web = boxes.get_mut("web").unwrap();
        let orphan = web.snapshots["old"].clone();
        web.snapshots.insert("orphan".to_owned(), orphan);
    },
};

pub const PATHS: Change = Change {
    name: "putting paths right",
    by: By::Repair,
    prepare: with_paths_through_a_link,
    act: |_| Ok(()),
    points: &["paths.recorded", "paths.rebased"],
    whole: |_| {},
};

pub const PUT_BACK: Change = Change {
    name: "putting bases back",
    by: By::Repair,
    prepare: with_a_deleted_base,
    act: |_| Ok(()),
    points: &["put-back.recorded", "put-back.linked"],
    whole: |_| {},
};

/// All of them.
pub const CHANGES: [&Change; 40] = [
    &PATHS,
    &PUT_BACK,
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
    &REPLACE,
    &RENAME,
    &RENAME_BOX,
    &EDIT_BOX,
    &REMOVE_BOX,
    &REMOVE_BOX_ADOPTING,
    &MERGE,
    &MERGE_INTO_LIVE,
    &PROMOTE,
    &SKIP,
    &SHORTEN,
    &REPAIR,
    &REMOVE_KEPT,
    &REMOVE_ONLY_NAME_KEPT,
    &RESTORE_KEPT,
    &RESTORE_BACKUP_KEPT,
    &REMOVE_BOX_KEPT,
    &REMOVE_CLONE_KEPT,
    &BOX_BACK,
    &BOX_BACK_SHARED,
    &SNAPSHOT_BACK,
    &END_KEEPING,
    &COMPLETE_KEPT,
];

/// One of each kind of change.
pub const ONE_OF_EACH: [&Change; 20] = [
    &CLONE_WITH_SNAPSHOTS,
    &IMPORT,
    &SNAPSHOT,
    &ADOPT,
    &REMOVE,
    &RENAME,
    &RENAME_BOX,
    &RESTORE,
    &RESTORE_FROM_ANOTHER,
    &RESTORE_BACKUP,
    &REMOVE_BOX,
    &MERGE,
    &MERGE_INTO_LIVE,
    &REPAIR,
    &REMOVE_KEPT,
    &RESTORE_KEPT,
    &REMOVE_BOX_KEPT,
    &BOX_BACK,
    &SNAPSHOT_BACK,
    &END_KEEPING,
];
