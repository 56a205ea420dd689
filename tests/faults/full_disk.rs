//! Full disks: makes changes on small file systems of the usual kinds, with more and more free
//! space until it is enough. Also checks that changes take little space where files share blocks.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use crate::changes::*;
use crate::common::*;
use crate::contents::{Boxes, contents};

/// Changes that need space.
const CHANGES: [&Change; 17] = [
    &SNAPSHOT,
    &IMPORT,
    &CLONE_WITH_SNAPSHOTS,
    &ADOPT,
    &REMOVE,
    &RENAME,
    &RENAME_BOX,
    &RESTORE,
    &RESTORE_BACKUP,
    &REMOVE_BOX,
    &MERGE,
    &LONG,
    &REMOVE_KEPT,
    &RESTORE_KEPT,
    &REMOVE_BOX_KEPT,
    &BOX_BACK,
    &SNAPSHOT_BACK,
];

/// The first nonzero amount of free space that is tried, in KiB. Each further one is twice as much.
const FIRST_ROOM: u64 = 4;

/// KiB that are enough for any of the changes.
const ENOUGH: u64 = 64 << 10;

/// Bytes that a refused change may leave in use: log lines, space that the file system and SQLite
/// keep for reuse, and the reserve for deletions.
const SLACK: u64 = (512 << 10) + (1 << 20);

/// A change on its own disk.
struct Trial<'c> {
    change: &'c Change,
    kind: FileSystem,
    home: TestHome,
    disk: SmallDisk,
    before: Boxes,
    whole: Boxes,
}

impl Trial<'_> {
    fn of(change: &Change, kind: FileSystem) -> Trial<'_> {
        let home = (change.prepare)();
        let before = contents(&home);
        let mut whole = before.clone();
        (change.whole)(&mut whole);
        let disk = SmallDisk::under(&home, kind, kind.smallest());
        Trial {
            change,
            kind,
            home,
            disk,
            before,
            whole,
        }
    }

    /// Makes the change with that many KiB free. Returns false if there was too little space.
    fn fits(&self, room: u64, mount_when_full: bool) -> bool {
        let Trial {
            change, home, disk, ..
        } = self;
        let log = || fs::read_to_string(home.root().join(".boxlitefs/log")).unwrap_or_default();
        let early = (!mount_when_full).then(|| self.mount()).flatten();
        disk.fill(room << 10);
        if early.is_none() && !self.can_be_read() {
            disk.empty();
            return false;
        }
        let mount = early.or_else(|| self.mount());
        let outcome = match (&mount, change.by.command(home)) {
            (Some(mount), _) => (change.act)(mount),
            (None, Some(mut command)) => {
                let output = command.output().unwrap();
                let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into();
                if output.status.success() {
                    Ok(())
                } else {
                    Err(said)
                }
            }
            (None, None) => panic!("no program makes the change"),
        };
        let mut mount = mount;
        // The process may die at the first access after the change; see below.
        let was_killed = mount.as_mut().is_some_and(|mount| {
            let answers = fs::read_dir(mount.root()).is_ok();
            !answers || !mount.is_alive()
        });
        match mount {
            Some(mount) if !was_killed => {
                let names = mount.names("");
                disk.empty();
                assert_eq!(mount.names(""), names);
                mount.unmount();
            }
            Some(mut mount) => {
                // Btrfs writes nothing in place. Without a free block, a write to SQLite's shared
                // memory, which is a mapped file, raises SIGBUS.
                let signal = mount.ended_by();
                let is_known = self.kind == FileSystem::Btrfs && signal == Some(libc::SIGBUS);
                assert!(is_known, "the daemon died: {signal:?}; {outcome:?}");
                drop(mount);
                disk.empty();
            }
            None => disk.empty(),
        }
        drop(home.mount());
        let now = contents(home);
        match &outcome {
            Ok(()) => assert_eq!(now, self.whole),
            Err(said) => {
                assert!(
                    was_killed || tells(said),
                    "unexpected error with {room} KiB left: {said}; {}",
                    log()
                );
                // A tool that works in several steps, such as `cp -r`, may have done some of them.
                crate::contents::assert_between(&now, &self.before, &self.whole);
                let one = "a refused change changed something";
                if !self.has_steps() && !was_killed {
                    assert_eq!(now, self.before, "{one}");
                }
            }
        }
        let (status, said) = home.check();
        assert_eq!(status, 0, "boxlitefs check: {said}; {}", log());
        outcome.is_ok()
    }

    /// Returns whether the home can be read: SQLite needs a little space for that, too. If not,
    /// `boxlitefs check` must report a full disk.
    fn can_be_read(&self) -> bool {
        let (status, said) = self.home.check();
        assert!(status == 0 || tells(&said), "{said}");
        status == 0
    }

    /// Returns whether the tool makes several changes: one for the box and one for each snapshot.
    fn has_steps(&self) -> bool {
        [&CLONE_WITH_SNAPSHOTS, &IMPORT]
            .iter()
            .any(|change| change.name == self.change.name)
    }

    fn mount(&self) -> Option<Mounted> {
        (self.change.by == By::Mount).then(|| self.home.mount())
    }

    /// Tries the change with more and more space until it succeeds.
    fn try_until_it_fits(&self, tally: &mut Tally) {
        let free = self.disk.free();
        let mut room = 0;
        let mut refused = 0;
        loop {
            tally.operations += 1;
            tally.compared += self.before.len();
            if self.fits(room, refused % 2 == 1) {
                return;
            }
            tally.faults += 1;
            refused += 1;
            // XFS frees the blocks of removed files a little later.
            let is_free = || self.disk.free() + SLACK >= free;
            eventually("as much as before is free again", is_free);
            // The change may be partly done.
            self.disk.put_back(&self.home, "aside");
            room = if room == 0 { FIRST_ROOM } else { room * 2 };
            assert!(room <= ENOUGH, "the change never fits");
        }
    }
}

/// Returns whether an error message reports a full disk.
fn tells(said: &str) -> bool {
    let messages = [
        "No space left on device",
        "the disk is full",
        "there is no room",
    ];
    messages.iter().any(|message| said.contains(message))
}

/// Tries some of the changes on a full file system.
fn try_changes(kind: FileSystem) {
    let what = format!("full disks, {}", kind.name());
    let seed = seed(&what);
    let mut dice = Dice::of(seed, kind);
    let mut changes = CHANGES.to_vec();
    while changes.len() > how_many(2, 4, CHANGES.len()) {
        changes.swap_remove(dice.below(changes.len() as u64) as usize);
    }
    let all = Mutex::new(Tally::default());
    each_in_parallel(&changes, |change| {
        let mut tally = Tally::default();
        let trial = Trial::of(change, kind);
        let case = attempt(|| trial.try_until_it_fits(&mut tally));
        tally
            .losses
            .extend(case.err().map(|why| format!("{}: {why}", change.name)));
        all.lock().unwrap().add(tally);
    });
    let tally = all.into_inner().unwrap();
    assert!(tally.faults > 0, "the disk was never full");
    tally.finish(&what);
}

#[test]
fn on_a_full_ext4_a_change_is_made_or_refused() {
    try_changes(FileSystem::Ext4);
}

#[test]
fn on_a_full_xfs_a_change_is_made_or_refused() {
    try_changes(FileSystem::Xfs);
}

#[test]
fn on_a_full_btrfs_a_change_is_made_or_refused() {
    try_changes(FileSystem::Btrfs);
}

// ---- deletions ----------------------------------------------------------------------------------

/// Deletes snapshots and a box on a disk without free space.
fn deletes_on_a_full_disk(kind: FileSystem) {
    let home = TestHome::new();
    let disk = SmallDisk::under(&home, kind, kind.smallest());
    let mount = home.mount();
    for number in 0..3u64 {
        home.guest_write("web", FREE_AREA, &noise(number + 1, 256 << 10));
        mount.snapshot("web", &format!("s{number}")).unwrap();
    }
    mount.copy("web", "other");
    // After one read, the mount caches the compressed export.
    let compressed = mount.at("web/export.boxlite.zst");
    succeed(&["cp", text(&compressed), text(&home.beside("out.zst"))]);
    disk.fill(0);
    for number in 0..3 {
        let name = format!("s{number}");
        mount
            .remove_snapshot("web", &name)
            .unwrap_or_else(|e| panic!("{name}: {e}; {}", mount.log()));
    }
    // Take the freed space as well, except for the reserve for deletions.
    disk.empty();
    mount.snapshot("web", "last").unwrap();
    mount.remove_snapshot("web", "last").unwrap();
    disk.fill(0);
    let removed = run(&["rm", "-r", text(&mount.at("other"))]);
    assert!(removed.status.success(), "{removed:?}; {}", mount.log());
    assert_eq!(mount.names(""), ["web"]);
    disk.empty();
    mount.unmount();
    home.assert_whole_once_mounted();
}

#[test]
fn on_a_full_ext4_snapshots_and_boxes_can_be_deleted() {
    deletes_on_a_full_disk(FileSystem::Ext4);
}

#[test]
fn on_a_full_xfs_snapshots_and_boxes_can_be_deleted() {
    deletes_on_a_full_disk(FileSystem::Xfs);
}

#[test]
fn on_a_full_btrfs_snapshots_and_boxes_can_be_deleted() {
    deletes_on_a_full_disk(FileSystem::Btrfs);
}

// ---- what is kept -------------------------------------------------------------------------------

/// Bytes of a layer that is kept.
const KEPT: usize = 6 << 20;

/// Makes a home whose disk is full of what was removed and restored over.
fn full_of_entries(kind: FileSystem) -> (TestHome, SmallDisk, Mounted) {
    let home = TestHome::new().keep();
    let disk = SmallDisk::under(&home, kind, kind.smallest());
    let mount = home.mount();
    mount.snapshot("web", "start").unwrap();
    let restore = || {
        succeed(&[
            "cp",
            text(&mount.at("web/snapshots/start/export.boxlite")),
            text(&mount.at("web/export.boxlite")),
        ])
    };
    for number in 0..4u64 {
        home.guest_write("web", FREE_AREA - (3 << 20), &noise(number + 1, KEPT));
        restore();
    }
    assert_eq!(mount.names(".boxlite/undo").len(), 4);
    disk.fill(0);
    (home, disk, mount)
}

/// Makes changes that need the room of what is kept.
fn makes_changes_on_a_disk_full_of_entries(kind: FileSystem) {
    let backup = TestHome::new();
    backup.guest_write("web", FREE_AREA - (3 << 20), &noise(99, KEPT));
    let backup_mount = backup.mount();
    let archive = backup.beside("backup.boxlite");
    succeed(&[
        "cp",
        text(&backup_mount.at("web/export.boxlite")),
        text(&archive),
    ]);
    let (home, disk, mount) = full_of_entries(kind);
    let kept = |mount: &Mounted| mount.names(".boxlite/undo").len();
    let imported = run(&["cp", text(&archive), text(&mount.at("imported.boxlite"))]);
    assert!(imported.status.success(), "{imported:?}; {}", mount.log());
    let left = kept(&mount);
    assert!(left < 4, "{left}");
    disk.empty();
    // The room of data does not become that of metadata on btrfs: once that is full, a snapshot has
    // none, with entries or without.
    disk.fill(if kind == FileSystem::Btrfs {
        16 << 20
    } else {
        0
    });
    let taken = mount.snapshot("web", "more");
    assert!(taken.is_ok(), "{left} were left; {}", mount.log());
    mount.copy("imported", "copy");
    mount.remove_snapshot("web", "more").unwrap();
    succeed(&["rm", "-r", text(&mount.at("copy"))]);
    assert_eq!(mount.names("."), ["imported", "web"]);
    assert_eq!(
        archive_digest(&archive),
        mount.export_digest("imported/export.boxlite")
    );
    disk.empty();
    mount.unmount();
    home.assert_whole_once_mounted();
}

#[test]
fn on_an_ext4_full_of_what_is_kept_changes_have_its_room() {
    makes_changes_on_a_disk_full_of_entries(FileSystem::Ext4);
}

#[test]
fn on_a_btrfs_full_of_what_is_kept_changes_have_its_room() {
    makes_changes_on_a_disk_full_of_entries(FileSystem::Btrfs);
}

#[test]
fn what_is_kept_goes_oldest_first_while_less_than_a_tenth_of_the_disk_is_free() {
    let (home, disk, mount) = full_of_entries(FileSystem::Ext4);
    let before = mount.names(".boxlite/undo");
    drop(mount);
    let mount = home.mount_with(&[], &[("BOXLITEFS_UNDO_ANY_ROOM", "0")]);
    // A part of the 64 MiB is the file system's own.
    eventually("a tenth of the disk is free", || disk.free() >= 5 << 20);
    let after = mount.names(".boxlite/undo");
    assert!(!after.is_empty() && after.len() < before.len(), "{after:?}");
    assert_eq!(after, before[before.len() - after.len()..]);
    // There is no room to keep anything, and no older entry whose end would make some.
    for name in mount.names(".boxlite/undo") {
        succeed(&["rm", "-r", text(&mount.at(format!(".boxlite/undo/{name}")))]);
    }
    disk.empty();
    disk.fill(4 << 20);
    mount.snapshot("web", "s").unwrap();
    mount.remove_snapshot("web", "s").unwrap();
    assert_eq!(mount.names(".boxlite/undo"), [] as [&str; 0]);
    disk.empty();
    mount.unmount();
    home.assert_whole_once_mounted();
}

// ---- shared blocks ------------------------------------------------------------------------------

/// Bytes of a layer, far more than a copy of it with shared blocks may take.
const LARGE: usize = 3 << 20;

/// Bytes that a change may take if it copies no data.
const LITTLE: u64 = 1 << 20;

/// Fails if a change takes more space than one that copies no data.
fn assert_takes_little(change: &str, disk: &SmallDisk, work: impl FnOnce()) {
    let before = disk.free();
    work();
    let taken = before.saturating_sub(disk.free());
    assert!(taken < LITTLE, "{change} took {taken} bytes");
}

/// Makes a box with large layers on a file system that shares blocks.
fn with_large_layers(kind: FileSystem, snapshots: usize) -> (TestHome, SmallDisk) {
    let home = TestHome::in_memory();
    let disk = SmallDisk::under(&home, kind, "512M");
    for number in 0..snapshots {
        // Different bytes each time, so that no two layers have the same data.
        let bytes = noise(number as u64 + 1, LARGE);
        home.guest_write("web", FREE_AREA, &bytes);
        home.wheel(&["snapshot-create", "web", &format!("s{number}")]);
    }
    // The first mount allocates the reserve for deletions.
    home.mount().unmount();
    (home, disk)
}

fn shares_blocks(kind: FileSystem) {
    // The mount adopts a layer of BoxLite. The layer's reader has a second hard link in a backup,
    // so it is copied before it is changed.
    let (home, disk) = with_large_layers(kind, 2);
    let backup = home.root().join("backup.qcow2");
    fs::hard_link(home.snapshot_disk("web", "s1"), &backup).unwrap();
    let copied = digest(&home.snapshot_disk("web", "s1"));
    assert_takes_little("a copy of a layer", &disk, || {
        home.mount().snapshot("web", "a").unwrap();
    });
    let layer = home.snapshot_disk("web", "s1");
    assert_ne!(inode(&layer), inode(&backup), "the layer was not copied");
    assert_eq!(digest(&layer), copied);
    drop(disk);

    // Layers of deleted snapshots are merged.
    let (home, disk) = with_large_layers(kind, 0);
    let mount = home.mount();
    for number in 0..3 {
        let at = FREE_AREA + number * (512 << 10);
        home.guest_write("web", at, &noise(number + 1, 1 << 20));
        mount.snapshot("web", &format!("s{number}")).unwrap();
    }
    for number in 0..2 {
        mount.remove_snapshot("web", &format!("s{number}")).unwrap();
    }
    mount.unmount();
    let merged = digest(&home.snapshot_disk("web", "s2"));
    let length = chain(&home.live_disk("web")).len();
    assert_takes_little("a merge", &disk, || {
        let (status, said) = home.compact();
        assert_eq!(status, 0, "{said}");
    });
    assert!(chain(&home.live_disk("web")).len() < length);
    assert_eq!(digest(&home.snapshot_disk("web", "s2")), merged);
    drop(disk);

    // The upper layers of a chain that is too long are flattened into one.
    let (home, disk) = with_large_layers(kind, 9);
    home.guest_write("web", FREE_AREA, &noise(100, LARGE));
    let live = digest(&home.live_disk("web"));
    assert_takes_little("a snapshot of a long chain", &disk, || {
        home.mount().snapshot("web", "a").unwrap();
    });
    assert_eq!(digest(&home.snapshot_disk("web", "a")), live);
    assert!(chain(&home.live_disk("web")).len() < 9);
    home.assert_whole();
}

fn inode(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().ino()
}

#[test]
fn on_xfs_a_layer_is_copied_without_its_data() {
    shares_blocks(FileSystem::Xfs);
}

#[test]
fn on_btrfs_a_layer_is_copied_without_its_data() {
    shares_blocks(FileSystem::Btrfs);
}
