//! Restoring, renaming and removing boxes and snapshots: states are never mixed, nothing is left
//! over, and operations that mean something else are refused.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::*;

/// A Python script that pauses half-way after printing a line, and continues when its input gets a
/// line or ends.
struct HalfWay {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl HalfWay {
    fn start(script: &str, arguments: &[&Path]) -> HalfWay {
        let mut child = Command::new(python())
            .args(["-c", script])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python");
        let said = BufReader::new(child.stdout.take().unwrap());
        let mut half_way = HalfWay { child, said };
        assert_eq!(half_way.line(), "half");
        half_way
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Lets the script continue and returns its remaining output.
    fn ends(mut self) -> String {
        drop(self.child.stdin.take());
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        self.child.wait().unwrap();
        said.trim().to_owned()
    }
}

/// Starts to write an archive, far longer than any export here, over the existing one; then pauses.
const WRITES_LONG: &str = "
import sys, tarfile
member = tarfile.TarInfo('disk.qcow2')
member.size = 1 << 30
file = open(sys.argv[1], 'wb', 0)
file.write(member.tobuf())
for piece in range(8):
    file.write(bytes(1 << 20))
print('half', flush=True)
sys.stdin.read()
for piece in range(8):
    file.write(bytes(1 << 20))
";

#[test]
fn readers_of_an_export_keep_their_bytes_while_another_is_written_over_it() {
    let home = TestHome::new();
    let mount = home.mount();
    let path = mount.at("web/export.boxlite");
    let own = fs::read(&path).unwrap();
    let mut early = File::open(&path).unwrap();
    let mut start = vec![0; own.len() / 2];
    early.read_exact(&mut start).unwrap();
    let writer = HalfWay::start(WRITES_LONG, &[&path]);
    assert_eq!(fs::metadata(&path).unwrap().len(), own.len() as u64);
    assert_eq!(early.metadata().unwrap().len(), own.len() as u64);
    let mut rest = Vec::new();
    early.read_to_end(&mut rest).unwrap();
    assert!([start, rest].concat() == own, "opened before the write");
    assert!(fs::read(&path).unwrap() == own, "opened during the write");
    // Reads in pieces while the other process keeps writing.
    let mut late = File::open(&path).unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let mut piece = vec![0; 16384];
        loop {
            match late.read(&mut piece).unwrap() {
                0 => return bytes,
                read => bytes.extend_from_slice(&piece[..read]),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    writer.ends();
    assert!(reader.join().unwrap() == own, "read during the write");
    assert!(fs::read(&path).unwrap() == own, "afterwards");
}

#[test]
fn while_a_file_takes_the_place_of_an_export_others_see_the_export_and_two_writers_do_not_meet() {
    let home = TestHome::new();
    let mount = home.mount();
    home.guest_write("web", FREE_AREA, b"the box's own");
    let path = mount.at("web/export.boxlite");
    let own = fs::read(&path).unwrap();
    let replaces = "
import os, sys
bytes = open(sys.argv[2], 'rb').read()
os.unlink(sys.argv[1])
file = open(sys.argv[1], 'xb', 0)
file.write(bytes[:100000])
print('half', flush=True)
sys.stdin.read()
file.write(bytes[100000:])
file.close()
print('done')
";
    let over = "
import sys
file = open(sys.argv[1], 'wb', 0)
file.write(open(sys.argv[2], 'rb').read()[:100000])
print('half', flush=True)
sys.stdin.read()
try:
    file.close()
except OSError as error:
    print(error.strerror)
";
    let archive = archive();
    let first = HalfWay::start(replaces, &[&path, &archive]);
    let second = HalfWay::start(over, &[&path, &archive]);
    assert!(fs::read(&path).unwrap() == own, "it is unchanged");
    assert_eq!(first.ends(), "done");
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        archive_digest(&archive)
    );
    assert_eq!(second.ends(), "Bad message");
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        archive_digest(&archive)
    );
    home.assert_whole();
}

#[test]
fn a_tool_that_copies_the_files_of_a_box_at_once_over_another_does_not_restore_it() {
    let home = TestHome::new();
    let mount = home.mount();
    let copies = "
import sys
bytes = open(sys.argv[2], 'rb').read()
file = open(sys.argv[1] + '/export.boxlite', 'wb', 0)
file.write(bytes[:100000])
try:
    open(sys.argv[1] + '/box.json', 'wb')
except OSError as error:
    print('half', flush=True)
sys.stdin.read()
file.write(bytes[100000:])
try:
    file.close()
except OSError as error:
    print(error.strerror)
";
    home.guest_write("web", FREE_AREA, b"the box's own");
    let own = digest(&home.live_disk("web"));
    let tool = HalfWay::start(copies, &[&mount.at("web"), &archive()]);
    // Another process may change the box meanwhile.
    home.guest_write("web", FREE_AREA, b"the box's own");
    assert_eq!(tool.ends(), "Operation not permitted");
    assert_eq!(digest(&home.live_disk("web")), own);
    assert!(
        mount
            .log()
            .contains("it copies a whole box over one that exists")
    );
    succeed(&[
        "cp",
        text(&archive()),
        text(&mount.at("web/export.boxlite")),
    ]);
    assert_ne!(digest(&home.live_disk("web")), own);
}

#[test]
fn a_disk_that_another_reads_from_is_not_replaced() {
    let home = TestHome::new();
    home.wheel(&["import", text(&archive()), "other"]);
    let other = home.live_disk("other");
    let options = ["-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    let made = home.beside("made");
    let mut command = vec!["qemu-img", "create"];
    command.extend(options);
    let live = home.live_disk("web");
    command.extend([text(&live), text(&made)]);
    succeed(&command);
    fs::rename(&made, &other).unwrap();
    home.guest_write("web", FREE_AREA, b"the box's own");
    let before = digest(&other);
    let mount = home.mount();
    fail(&[
        "cp",
        text(&archive()),
        text(&mount.at("web/export.boxlite")),
    ]);
    assert!(mount.log().contains("reads from the disk of box web"));
    assert_eq!(digest(&other), before);
}

#[test]
fn unreferenced_layers_are_freed_at_once_after_a_restore_or_a_removal() {
    let home = TestHome::new();
    home.wheel_batch(&[
        &["snapshot-create", "web", "start"],
        &["clone", "web", "gone"],
        &["remove", "gone"],
    ]);
    // `web` reads from the base that BoxLite made for the clone.
    let bases = || names_in(&home.root().join("bases"));
    let made_by_boxlite = bases();
    assert_eq!(made_by_boxlite.len(), 1);
    let mount = home.mount();
    let web = mount.at("web");
    succeed(&[
        "cp",
        text(&web.join("snapshots/start/export.boxlite")),
        text(&web.join("export.boxlite")),
    ]);
    assert!(!bases().contains(&made_by_boxlite[0]));
    home.assert_whole();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"the box's own");
    mount.snapshot("web", "b").unwrap();
    home.guest_write("web", FREE_AREA, b"more");
    succeed(&["rm", "-r", text(&web)]);
    assert_eq!(bases(), Vec::<String>::new());
    home.assert_whole();
}

#[test]
fn a_snapshot_whose_row_names_a_base_can_be_renamed() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"the box's own");
    let layer = home.snapshot_disk("web", "a");
    let wanted = digest(&layer);
    let base = home
        .root()
        .join("bases")
        .join(&names_in(&home.root().join("bases"))[0]);
    let statement = "UPDATE snapshot SET json = json_set(json, '$.base_path', ?1)";
    home.database().execute(statement, [text(&base)]).unwrap();
    fs::remove_dir_all(layer.parent().unwrap()).unwrap();
    let snapshots = mount.at("web/snapshots");
    fs::rename(snapshots.join("a"), snapshots.join("b")).unwrap();
    assert_eq!(digest(&home.snapshot_disk("web", "b")), wanted);
    home.wheel(&["snapshot-restore", "web", "b"]);
    assert_eq!(digest(&home.live_disk("web")), wanted);
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn a_box_whose_layer_is_missing_is_restored_or_removed_and_frees_nothing_of_others() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    home.guest_write("web", FREE_AREA, b"the box's own");
    mount.snapshot("web", "b").unwrap();
    home.guest_write("web", FREE_AREA + 4096, b"more");
    let before = digest(&home.live_disk("web"));
    // In the chain live → b → a, the middle layer is moved away for a while.
    let chain = chain(&home.live_disk("web"));
    fs::remove_dir_all(home.snapshot_disk("web", "a").parent().unwrap()).unwrap();
    fs::remove_dir_all(home.snapshot_disk("web", "b").parent().unwrap()).unwrap();
    home.database().execute("DELETE FROM snapshot", []).unwrap();
    let parked = home.beside("parked");
    // Moves the spare names too, which would otherwise bring the layer back.
    let spares = home.root().join(".boxlitefs/layers");
    let park = || {
        fs::rename(&chain[1], &parked).unwrap();
        let _ = fs::remove_dir_all(&spares);
    };
    park();
    home.wheel(&["import", text(&archive()), "other"]);
    mount.snapshot("other", "s").unwrap();
    mount.remove_snapshot("other", "s").unwrap();
    drop(mount);
    let mount = home.mount();
    assert!(chain[2].exists(), "the layer below the missing one");
    let export = mount.at("web/export.boxlite");
    assert_eq!(errno(fs::read(&export)), libc::EIO);
    fs::rename(&parked, &chain[1]).unwrap();
    assert_eq!(digest(&home.live_disk("web")), before);
    assert_eq!(mount.export_digest("web/export.boxlite"), before);
    // Moved away for good.
    park();
    succeed(&["cp", text(&archive()), text(&export)]);
    assert_eq!(
        mount.export_digest("web/export.boxlite"),
        archive_digest(&archive())
    );
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn a_box_with_a_missing_layer_or_without_a_directory_can_be_removed() {
    let home = TestHome::new();
    home.wheel(&["import", text(&archive()), "other"]);
    home.wheel_batch(&[
        &["snapshot-create", "web", "a"],
        &["snapshot-create", "web", "b"],
    ]);
    fs::remove_dir_all(home.box_dir("other")).unwrap();
    fs::remove_file(home.snapshot_disk("web", "a")).unwrap();
    let mount = home.mount();
    succeed(&["rm", "-r", text(&mount.at("web")), text(&mount.at("other"))]);
    assert_eq!(mount.names(""), Vec::<String>::new());
    assert!(home.wheel(&["list"]).as_array().unwrap().is_empty());
    drop(mount);
    home.assert_whole_once_mounted();
}

#[test]
fn who_has_just_made_a_box_can_remove_it() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    let script = "
import shutil, sys
shutil.copytree(sys.argv[1] + '/web', sys.argv[1] + '/new', symlinks=True)
shutil.rmtree(sys.argv[1] + '/new')
";
    let python = python();
    succeed(&[text(&python), "-c", script, text(mount.root())]);
    assert_eq!(mount.names(""), ["web"]);
    home.assert_whole();
}
