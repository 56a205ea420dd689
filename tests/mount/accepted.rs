//! An archive whose close succeeded is kept, in whatever order the rest comes: the release of the
//! file, a rename that fails, the end of the mount, other files of the same name or box.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::*;

/// Writes `contents` through a duplicate of `file`, which another process closes. Returns whether
/// that process succeeded: only `file` itself is still open then.
fn write_and_close_a_duplicate(file: &File, contents: &Path) -> bool {
    let duplicate = file.try_clone().unwrap();
    let cat = Command::new("cat")
        .arg(contents)
        .stdout(Stdio::from(duplicate))
        .stderr(Stdio::null())
        .status();
    cat.unwrap().success()
}

#[test]
fn a_rename_that_fails_before_the_release_keeps_an_accepted_archive() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let live = digest(&home.live_disk("web"));
    let (part, named) = (mount.at(".n.boxlite.AbCdEf"), mount.at("n.boxlite"));
    let file = File::create(&part).unwrap();
    assert!(write_and_close_a_duplicate(
        &file,
        &backup.join("export.boxlite")
    ));
    // As if another boxlitefs were changing the home.
    let turn = File::open(home.root().join(".boxlitefs")).unwrap();
    rustix::fs::flock(&turn, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let renamed = fs::rename(&part, &named);
    drop(turn);
    assert!(renamed.is_err(), "{}", mount.log());
    drop(file);
    fs::rename(&part, &named).unwrap();
    eventually("the box is there", || {
        mount.names("").contains(&"n".to_owned())
    });
    assert_eq!(digest(&home.live_disk("n")), live);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_connection_that_is_aborted_before_the_release_keeps_an_accepted_archive() {
    let home = TestHome::new();
    let (mut mount, backup) = mount_and_backup(&home);
    let live = digest(&home.live_disk("web"));
    let connection = fs::metadata(mount.root()).unwrap().dev();
    let file = File::create(mount.at("up.boxlite.part")).unwrap();
    assert!(write_and_close_a_duplicate(
        &file,
        &backup.join("export.boxlite")
    ));
    let minor = rustix::fs::minor(connection);
    let abort = format!(
        "mount -t fusectl none /sys/fs/fuse/connections; \
         echo 1 > /sys/fs/fuse/connections/{minor}/abort"
    );
    succeed(&["unshare", "-m", "sh", "-c", &abort]);
    eventually("the mount ends", || !mount.is_alive());
    drop(file);
    drop(mount);
    let mount = home.mount();
    assert_eq!(mount.names(""), ["up", "web"], "{}", mount.log());
    assert_eq!(digest(&home.live_disk("up")), live);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_late_release_of_a_refused_file_keeps_the_next_one_of_its_name() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    fs::create_dir_all(mount.at("n/snapshots/a")).unwrap();
    let export = mount.at("n/snapshots/a/export.boxlite");
    let refused = File::create(&export).unwrap();
    let garbage = home.beside("garbage");
    fs::write(&garbage, [7; 4096]).unwrap();
    assert!(!write_and_close_a_duplicate(&refused, &garbage));
    let accepted = File::create(&export).unwrap();
    assert!(write_and_close_a_duplicate(
        &accepted,
        &backup.join("snapshots/s/export.boxlite")
    ));
    drop(refused);
    drop(accepted);
    succeed(&[
        "cp",
        text(&backup.join("export.boxlite")),
        text(&mount.at("n/export.boxlite")),
    ]);
    assert_eq!(mount.names("n/snapshots"), ["a"], "{}", mount.log());
    assert_eq!(digest(&home.snapshot_disk("n", "a")), of_snapshot);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn an_archive_whose_note_cannot_be_updated_keeps_its_earlier_note() {
    let home = TestHome::new();
    let _disk = SmallDisk::under(&home, FileSystem::Ext4, "64M");
    let (mount, backup) = mount_and_backup(&home);
    let live = digest(&home.live_disk("web"));
    let part = mount.at(".n.boxlite.AbCdEf");
    succeed(&["cp", text(&backup.join("export.boxlite")), text(&part)]);
    let work = home.root().join(".boxlitefs");
    let workspaces = names_in(&work).into_iter();
    let disks = workspaces
        .filter(|name| name.starts_with("work-"))
        .flat_map(|name| {
            let dir = work.join(name);
            let names = names_in(&dir).into_iter();
            let disks =
                names.filter(|name| name.starts_with("disk-") && !name.ends_with(".waiting"));
            disks.map(move |name| dir.join(name)).collect::<Vec<_>>()
        });
    let disks: Vec<_> = disks.collect();
    assert_eq!(disks.len(), 1, "{disks:?}");
    // It can't be opened for writing, not even by root.
    succeed(&["chattr", "+i", text(&disks[0])]);
    let moved = fs::rename(&part, mount.at(".m.boxlite.GhIjKl"));
    succeed(&["chattr", "-i", text(&disks[0])]);
    moved.unwrap();
    fs::rename(mount.at(".m.boxlite.GhIjKl"), mount.at("n.boxlite")).unwrap();
    assert_eq!(digest(&home.live_disk("n")), live);
    mount.unmount();
    home.assert_whole();
}
