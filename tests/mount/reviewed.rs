//! What ordinary programs did with exit status 0 that was not done, or lost what had been accepted.

use std::fs;
use std::path::Path;

use crate::common::*;

/// Runs a script with $M, the mountpoint, and $BK, the backup. Returns whether it succeeded.
fn shell(mount: &Mounted, backup: &Path, command: &str) -> bool {
    let variables = [("M", mount.root()), ("BK", backup)];
    let output = script(command, &variables).output().expect("a shell");
    output.status.success()
}

#[test]
fn programs_that_extract_do_not_delete_a_snapshot_by_rmdir() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    // A newer state by the same name.
    mount.remove_snapshot("web", "s").unwrap();
    mount.snapshot("web", "s").unwrap();
    let newer = digest(&home.snapshot_disk("web", "s"));
    let old = home.beside("old.tar");
    succeed(&["tar", "cf", text(&old), "-C", text(&backup), "."]);
    let flat = home.beside("flat");
    fs::create_dir(&flat).unwrap();
    fs::write(flat.join("s"), "a file").unwrap();
    let flat_tar = home.beside("flat.tar");
    succeed(&["tar", "cf", text(&flat_tar), "-C", text(&flat), "s"]);
    for command in [
        format!("tar x --keep-newer-files -f {} -C $M/web", text(&old)),
        format!("tar x -U -f {} -C $M/web", text(&old)),
        format!("tar x -f {} -C $M/web/snapshots", text(&flat_tar)),
        format!(
            "tar x --keep-newer-files -f {} -C $M/web ./snapshots",
            text(&old)
        ),
    ] {
        assert!(
            !shell(&mount, &backup, &command),
            "{command}\n{}",
            mount.log()
        );
        assert_eq!(mount.names("web/snapshots"), ["s"], "{command}");
        assert_eq!(digest(&home.snapshot_disk("web", "s")), newer, "{command}");
    }
    // rmdir alone, and rm, delete it.
    succeed(&["rmdir", text(&mount.at("web/snapshots/s"))]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_failed_rename_by_another_process_keeps_a_copied_archive() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let live = digest(&home.live_disk("web"));
    fs::create_dir(mount.at("made")).unwrap();
    for (number, target) in ["web.boxlite", "made.boxlite", "50%.boxlite"]
        .into_iter()
        .enumerate()
    {
        let part = format!("n{number}.boxlite.part");
        let copied = format!("cp $BK/export.boxlite $M/{part}");
        assert!(shell(&mount, &backup, &copied), "{}", mount.log());
        assert!(
            !shell(&mount, &backup, &format!("mv $M/{part} $M/{target}")),
            "{target}"
        );
        assert!(mount.names("").contains(&part), "{target}: {}", mount.log());
        let named = format!("mv $M/{part} $M/n{number}.boxlite");
        assert!(shell(&mount, &backup, &named), "{target}: {}", mount.log());
        assert_eq!(digest(&home.live_disk(&format!("n{number}"))), live);
    }
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_box_that_appears_is_seen_in_place_of_a_directory_being_made() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    fs::create_dir_all(mount.at("m/snapshots")).unwrap();
    home.wheel(&["import", text(&backup.join("export.boxlite")), "m"]);
    eventually("the box is seen", || {
        mount.names("m").contains(&"box.json".to_owned())
    });
    assert_eq!(mount.names(""), ["m", "web"]);
    let copied = home.beside("copied");
    succeed(&["cp", "-r", text(&mount.at("m")), text(&copied)]);
    assert!(copied.join("export.boxlite").exists());
    mount.snapshot("m", "s").unwrap();
    let listed = home.wheel(&["snapshot-list", "m"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
    succeed(&["mv", text(&mount.at("m")), text(&mount.at("p"))]);
    // The directory is there again: what its maker has begun.
    assert_eq!(
        home.wheel(&["snapshot-list", "p"]).as_array().map(Vec::len),
        Some(1)
    );
    succeed(&["rm", "-r", text(&mount.at("p"))]);
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_live_disk_with_a_waiting_copy_is_not_restored_over() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let live = digest(&home.live_disk("web"));
    assert!(shell(
        &mount,
        &backup,
        "cp $M/web/export.boxlite $M/r.boxlite.part"
    ));
    let restore = "cp $BK/snapshots/s/export.boxlite $M/web/export.boxlite";
    assert!(!shell(&mount, &backup, restore));
    assert_eq!(digest(&home.live_disk("web")), live);
    assert!(
        shell(&mount, &backup, "mv $M/r.boxlite.part $M/r.boxlite"),
        "{}",
        mount.log()
    );
    assert_eq!(digest(&home.live_disk("r")), live);
    assert!(shell(&mount, &backup, restore), "{}", mount.log());
    mount.unmount();
    home.assert_whole();
}

#[test]
fn archives_extracted_from_a_pipe_stay_when_the_extraction_fails() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let of_snapshot = digest(&home.snapshot_disk("web", "s"));
    let source = home.beside("source");
    fs::create_dir_all(source.join("n/snapshots")).unwrap();
    succeed(&[
        "cp",
        "-r",
        text(&backup.join("snapshots/s")),
        text(&source.join("n/snapshots/s")),
    ]);
    fs::write(source.join("n/zz-notes.txt"), "no part of a backup").unwrap();
    let piped = format!(
        "(cd {} && tar c --remove-files --sort=name n) | tar x -C $M",
        text(&source)
    );
    assert!(!shell(&mount, &backup, &piped));
    assert!(
        !source.join("n/snapshots/s/export.boxlite").exists(),
        "its source is gone"
    );
    assert!(
        shell(&mount, &backup, "cp $BK/export.boxlite $M/n/"),
        "{}",
        mount.log()
    );
    assert_eq!(
        digest(&home.snapshot_disk("n", "s")),
        of_snapshot,
        "{}",
        mount.log()
    );
    mount.unmount();
    home.assert_whole();
}

#[test]
fn rsync_of_a_snapshots_directory_over_a_box_restores_nothing() {
    let home = TestHome::new();
    let (mount, backup) = mount_and_backup(&home);
    let live = digest(&home.live_disk("web"));
    assert!(!shell(&mount, &backup, "rsync -a $BK/snapshots/s/ $M/web/"));
    assert_eq!(digest(&home.live_disk("web")), live);
    let named = "rsync -a --ignore-times $BK/snapshots/s/export.boxlite $M/web/export.boxlite";
    assert!(shell(&mount, &backup, named), "{}", mount.log());
    assert_ne!(digest(&home.live_disk("web")), live);
    mount.unmount();
    home.assert_whole();
}
