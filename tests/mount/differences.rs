//! A box that comes back from a backup with its snapshots: each is stored as what differs from a
//! state that is there already.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::common::*;
use crate::inside::give_disk;

/// Snapshots of the box, one more than a chain may have layers.
const SNAPSHOTS: usize = 12;
const MIB: u64 = 1 << 20;

/// Makes a home whose box has 12 MB of data that does not compress, and twelve snapshots that differ
/// by 1 MiB each.
fn home_with_snapshots() -> TestHome {
    let home = TestHome::new();
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("data"), noise(1, 12_000_000)).unwrap();
    let image = home.beside("raw");
    let (tree, place) = (text(tree.path()), text(&image));
    succeed(&["mke2fs", "-q", "-t", "ext4", "-d", tree, place, "40M"]);
    give_disk(&home, "web", &image);
    let mount = home.mount();
    for number in 1..=SNAPSHOTS as u64 {
        let bytes = noise(number + 1, MIB as usize);
        home.guest_write("web", (2 + 2 * number) * MIB, &bytes);
        mount.snapshot("web", &format!("s{number:02}")).unwrap();
    }
    mount.unmount();
    home
}

/// Returns the digest of the disk of a box and of each of its snapshots.
fn digests(mount: &Mounted, name: &str) -> BTreeMap<String, String> {
    let snapshots = mount.names(format!("{name}/snapshots"));
    let snapshots = snapshots.into_iter().map(|it| format!("snapshots/{it}/"));
    let states = snapshots.chain([String::new()]);
    let digest = |state: &String| mount.export_digest(&format!("{name}/{state}export.boxlite"));
    states
        .map(|state| (state.clone(), digest(&state)))
        .collect()
}

/// Waits until what nothing needs is freed, and returns the space that the home takes.
fn space(home: &TestHome) -> u64 {
    home.compact();
    home.allocated()
}

#[test]
fn a_box_comes_back_from_a_backup_about_as_small_as_it_was() {
    let home = home_with_snapshots();
    let original = home.allocated();
    let mount = home.mount();
    let expected = digests(&mount, "web");
    assert_eq!(expected.len(), SNAPSHOTS + 1);
    let backup = home.beside("backup");
    succeed(&["cp", "-r", text(&mount.at("web")), text(&backup)]);
    // The states in the backup are those of no box here.
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    mount.unmount();
    let empty = space(&home);
    for tool in [
        "cp -r $B $MNT/new",
        "rsync -a $B/ $MNT/new/",
        "tar -C $B -c . | (mkdir $MNT/new && tar -C $MNT/new -x)",
        "python3 -c 'import os, shutil
shutil.copytree(os.environ[\"B\"], os.environ[\"MNT\"] + \"/new\", symlinks=True)'",
    ] {
        let mount = home.mount();
        let environment = [("B", &*backup), ("MNT", mount.root())];
        let output = script(tool, &environment).output().unwrap();
        assert!(
            output.status.success(),
            "{tool}: {output:?}\n{}",
            mount.log()
        );
        assert_eq!(digests(&mount, "new"), expected, "{tool}");
        mount.unmount();
        let (status, said) = home.check();
        assert_eq!(status, 0, "{tool}: {said}");
        let listed = home.wheel(&["snapshot-list", "new"]);
        assert_eq!(listed.as_array().map(Vec::len), Some(SNAPSHOTS), "{tool}");
        let taken = home.allocated() - empty;
        let most = original + original / 5 + SNAPSHOTS as u64 * MIB;
        assert!(
            taken < most,
            "{tool}: {taken} bytes, the original has {original}"
        );
        for image in home.images() {
            assert!(chain(&image).len() <= 9, "{tool}: {image:?}");
        }

        // What BoxLite makes of it, and what is left when it is gone.
        let restored = expected["snapshots/s03/"].clone();
        home.wheel(&["snapshot-restore", "new", "s03"]);
        let theirs = home.beside("theirs.boxlite");
        home.wheel(&["export", "new", text(&theirs)]);
        assert_eq!(archive_digest(&theirs), restored, "{tool}");
        fs::remove_file(&theirs).unwrap();
        let mount = home.mount();
        assert_eq!(
            mount.export_digest("new/export.boxlite"),
            restored,
            "{tool}"
        );
        mount.remove_snapshot("new", "s01").unwrap();
        let mut others = digests(&mount, "new");
        others.insert(String::new(), expected[""].clone());
        others.insert(
            "snapshots/s01/".to_owned(),
            expected["snapshots/s01/"].clone(),
        );
        assert_eq!(others, expected, "{tool}");
        succeed(&["rm", "-r", text(&mount.at("new"))]);
        mount.unmount();
        home.assert_whole();
        assert!(space(&home) < empty + MIB, "{tool}");
    }
}

#[test]
fn a_copy_by_reading_and_writing_takes_no_more_than_a_clone() {
    let home = home_with_snapshots();
    let before = home.allocated();
    let mount = home.mount();
    for (name, tool) in [
        (
            "python",
            "python3 -c 'import os, shutil
mnt = os.environ[\"MNT\"]
shutil.copytree(mnt + \"/web\", mnt + \"/python\", symlinks=True)'",
        ),
        ("never", "cp -r --reflink=never $MNT/web $MNT/never"),
    ] {
        let output = script(tool, &[("MNT", mount.root())]).output().unwrap();
        assert!(
            output.status.success(),
            "{tool}: {output:?}\n{}",
            mount.log()
        );
        assert_eq!(digests(&mount, name), digests(&mount, "web"), "{tool}");
        let taken = home.allocated() - before;
        assert!(
            taken < 8 * MIB,
            "{tool}: {taken} of {before}\n{}",
            mount.log()
        );
    }
    let dropped = home.beside("dropped.boxlite");
    fs::copy(mount.at("web/snapshots/s05/export.boxlite"), &dropped).unwrap();
    fs::copy(&dropped, mount.at("dropped.boxlite")).unwrap();
    mount.unmount();
    let taken = home.allocated() - before;
    assert!(taken < 8 * MIB, "{taken} of {before}");
    home.assert_whole();

    // Each is a box of its own.
    home.wheel(&["remove", "web"]);
    let mount = home.mount();
    let digest = mount.export_digest("dropped/export.boxlite");
    assert_eq!(digest, archive_digest(&dropped));
    assert_eq!(mount.names("python/snapshots").len(), SNAPSHOTS);
}

#[test]
fn what_was_left_out_is_written_when_its_state_is_gone_before_the_end() {
    let home = home_with_snapshots();
    let mount = home.mount();
    let expected = mount.export_digest("web/snapshots/s07/export.boxlite");
    let archive = home.beside("archive");
    fs::copy(mount.at("web/snapshots/s07/export.boxlite"), &archive).unwrap();
    let backup = home.beside("backup");
    succeed(&["cp", "-r", text(&mount.at("web")), text(&backup)]);
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    fs::remove_dir_all(backup.join("snapshots")).unwrap();
    mount.unmount();

    let mount = home.mount();
    succeed(&["cp", "-r", text(&backup), text(&mount.at("new"))]);
    // A state that nothing else reads.
    fs::create_dir(mount.at("new/snapshots/a")).unwrap();
    fs::copy(
        backup.join("export.boxlite"),
        mount.at("new/export.boxlite"),
    )
    .unwrap();
    fs::create_dir(mount.at("new/snapshots/b")).unwrap();
    let bytes = fs::read(&archive).unwrap();
    let mut file = File::create(mount.at("new/snapshots/b/export.boxlite")).unwrap();
    let (first, second) = bytes.split_at(bytes.len() / 2);
    file.write_all(first).unwrap();
    let received = || names_in(&home.root().join(".boxlitefs"));
    assert!(!received().is_empty());
    // By now the first half was compared with it. It goes.
    succeed(&["rmdir", text(&mount.at("new/snapshots/a"))]);
    file.write_all(second).unwrap();
    drop(file);
    assert_eq!(
        mount.export_digest("new/snapshots/b/export.boxlite"),
        expected
    );
    mount.unmount();
    // It stands alone.
    assert_eq!(chain(&home.snapshot_disk("new", "b")).len(), 1);
    home.assert_whole();
}

/// Makes a box `new` of a box's backup, and returns the archive of its snapshot s07.
fn home_with_a_new_box() -> (TestHome, Mounted, PathBuf) {
    let home = home_with_snapshots();
    let mount = home.mount();
    let archive = home.beside("archive");
    fs::copy(mount.at("web/snapshots/s07/export.boxlite"), &archive).unwrap();
    let whole = home.beside("whole");
    fs::copy(mount.at("web/export.boxlite"), &whole).unwrap();
    succeed(&["rm", "-r", text(&mount.at("web"))]);
    mount.unmount();
    let mount = home.mount();
    succeed(&["cp", text(&whole), text(&mount.at("new.boxlite"))]);
    (home, mount, archive)
}

/// Copies an archive into a new snapshot, as cp -r does.
fn copy_snapshot(mount: &Mounted, archive: &Path, name: &str) {
    let directory = mount.at(format!("new/snapshots/{name}"));
    succeed(&["mkdir", text(&directory)]);
    let export = directory.join("export.boxlite");
    succeed(&["cp", text(archive), text(&export)]);
}

/// Fails unless a snapshot of the box has the disk of an archive.
fn assert_is_of(home: &TestHome, snapshot: &str, archive: &Path) {
    let disk = home.snapshot_disk("new", snapshot);
    assert_eq!(digest(&disk), archive_digest(archive));
}

/// Overwrites 64 KiB of a file and leaves its times as they were.
fn damage(file: &Path, offset: u64) {
    let stamp = tempfile::NamedTempFile::new().unwrap();
    succeed(&["touch", "-r", text(file), text(stamp.path())]);
    let seek = format!("seek={}", offset >> 16);
    let of = format!("of={}", text(file));
    succeed(&[
        "dd",
        "if=/dev/zero",
        &of,
        "bs=64k",
        &seek,
        "count=1",
        "conv=notrunc,fsync",
        "status=none",
    ]);
    succeed(&["touch", "-r", text(stamp.path()), text(file)]);
}

#[test]
fn a_known_checksum_of_a_disk_that_decayed_since_proves_nothing() {
    let (home, mount, archive) = home_with_a_new_box();
    succeed(&["cp", text(&archive), text(&mount.at("old.boxlite"))]);
    let backup = home.beside("backup");
    fs::copy(mount.at("old/export.boxlite"), &backup).unwrap();
    let expected = archive_digest(&backup);
    damage(&home.live_disk("old"), 4 * MIB);
    succeed(&["cp", text(&backup), text(&mount.at("recovered.boxlite"))]);
    assert_eq!(digest(&home.live_disk("recovered")), expected);
    assert_ne!(digest(&home.live_disk("old")), expected);
}

#[test]
fn what_a_snapshot_shares_is_flushed_before_its_copy_is_answered() {
    let (home, mount, archive) = home_with_a_new_box();
    home.guest_write("new", 5 * MIB, &noise(3, 1 << 16));
    home.wheel(&["snapshot-create", "new", "theirs"]);
    let trace = Trace::begin(&home, &mount, &["-y", "-e", "trace=fsync,fdatasync"]);
    copy_snapshot(&mount, &archive, "s");
    let flushed = trace.end();
    let layers = chain(&home.snapshot_disk("new", "s"));
    assert!(layers.len() > 1, "{layers:?}");
    for layer in &layers[1..] {
        let names: Vec<_> = home
            .images()
            .into_iter()
            .filter(|it| is_same(it, layer))
            .collect();
        let is_flushed = |name: &PathBuf| flushed.iter().any(|line| line.contains(text(name)));
        assert!(names.iter().any(is_flushed), "{names:?}: {flushed:#?}");
    }
}

fn is_same(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(one).unwrap().ino() == fs::metadata(other).unwrap().ino()
}

#[test]
fn a_snapshot_comes_back_whole_where_the_other_state_is_damaged() {
    let (home, mount, archive) = home_with_a_new_box();
    mount.snapshot("new", "a").unwrap();
    // The refcounts, L1 and L2 tables are the first clusters.
    for table in 1..5 {
        damage(&home.snapshot_disk("new", "a"), table << 16);
    }
    copy_snapshot(&mount, &archive, "s");
    assert_is_of(&home, "s", &archive);
}

#[test]
fn a_snapshot_needs_no_more_space_than_its_whole_disk() {
    let (home, mount, archive) = home_with_a_new_box();
    // Nothing is the same but the tables' places.
    let image = home.beside("other.raw");
    fs::write(&image, noise(4, 20 << 20)).unwrap();
    succeed(&["truncate", "-s", "40M", text(&image)]);
    mount.unmount();
    give_disk(&home, "new", &image);
    let disk = SmallDisk::under(&home, FileSystem::Ext4, "160M");
    let mount = home.mount();
    let size = fs::metadata(&archive).unwrap().len();
    disk.fill(size + size / 4);
    copy_snapshot(&mount, &archive, "s");
    mount.unmount();
    assert_is_of(&home, "s", &archive);
}

#[test]
fn a_snapshot_is_there_as_soon_as_it_has_replaced_the_one_of_its_directory() {
    let (_home, mount, archive) = home_with_a_new_box();
    let directory = mount.at("new/snapshots/q");
    succeed(&["mkdir", text(&directory)]);
    names_in(&directory);
    let export = directory.join("export.boxlite");
    let script = format!(
        "cp {0} {1} && cat {1} > /dev/null",
        text(&archive),
        text(&export)
    );
    succeed(&["bash", "-c", &script]);
}
