//! Every operation of the product with every copy tool. Each row of the tables is a command, its
//! operation and the expected result. After each row, the database, the contents of every box and
//! snapshot, `boxlitefs check` and `qemu-img check` must agree on the state of the home. At the end
//! of each table, BoxLite itself lists and exports everything.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use crate::common::*;

use End::*;
use Verb::*;

/// The operation of a row, from `$FROM` to `$TO`. `out` is outside the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    /// box → out/DIRECTORY
    BackUp,
    /// box/export.boxlite → out/FILE
    BackUpArchive,
    /// out/FILE → NEW.boxlite
    Import,
    /// out/DIRECTORY, made by the last `BackUp` row → NEW
    Return,
    /// box/snapshots/s/export.boxlite → box/export.boxlite
    RestoreSnapshot,
    /// out/FILE → box/export.boxlite
    RestoreFile,
    /// box → NEW
    CloneBox,
    /// box/snapshots/t → NEW
    CloneSnapshot,
    /// box → NEW, the box itself
    RenameBox,
    /// box/snapshots/s → box/snapshots/NEW
    RenameSnapshot,
    /// box
    DeleteBox,
    /// box/snapshots/t
    DeleteSnapshot,
}

/// The expected result of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The operation is done.
    Works,
    /// The operation is done, and the source is gone.
    Moves,
    /// The operation is done, but the tool prints this complaint.
    Complains(&'static str),
    /// The tool fails with this message, and nothing has changed.
    Fails(&'static str),
}

type Table = &'static [(Verb, &'static str, End)];

const CP_R: Table = &[
    (BackUp, "cp -r $FROM $TO", Works),
    (BackUpArchive, "cp $FROM $TO", Works),
    (Import, "cp $FROM $TO", Works),
    (Return, "cp -r $FROM $TO", Works),
    (Return, "cp -rT $FROM/ $TO/", Works),
    (Return, "cp -ru $FROM $TO", Works),
    (RestoreSnapshot, "cp $FROM $TO", Works),
    (RestoreSnapshot, "cat $FROM > $TO", Works),
    (RestoreFile, "cp $FROM $TO", Works),
    (RestoreFile, "cat $FROM > $TO", Works),
    (CloneBox, "cp -r $FROM $TO", Works),
    (CloneSnapshot, "cp -r $FROM $TO", Works),
    (DeleteSnapshot, "rm -rf $FROM", Works),
    (DeleteBox, "rm -r $FROM", Works),
];

const CP_A: Table = &[
    (BackUp, "cp -a $FROM $TO", Works),
    (BackUpArchive, "cp -a $FROM $TO", Works),
    (Import, "cp -a $FROM $TO", Works),
    (Return, "cp -a $FROM $TO", Works),
    (RestoreSnapshot, "cp -a $FROM $TO", Works),
    (RestoreFile, "cp -a $FROM $TO", Works),
    (RestoreFile, "cp -a --remove-destination $FROM $TO", Works),
    (CloneBox, "cp -a $FROM $TO", Works),
    (CloneSnapshot, "cp -a $FROM $TO", Works),
];

const MV: Table = &[
    (BackUp, "mv $FROM $TO", Moves),
    // An export can only be removed together with its box.
    (BackUpArchive, "mv $FROM $TO", Works),
    (Import, "mv $FROM $TO", Moves),
    (Return, "mv $FROM $TO", Moves),
    (RestoreSnapshot, "mv $FROM $TO", Works),
    (RestoreFile, "mv $FROM $TO", Moves),
    (CloneSnapshot, "mv $FROM $TO", Moves),
    (RenameSnapshot, "mv $FROM $TO", Works),
    (RenameBox, "mv $FROM $TO", Works),
    (RenameBox, "mv -T $FROM/ $TO", Works),
];

const RSYNC: Table = &[
    (BackUp, "rsync -a $FROM/ $TO", Works),
    (BackUpArchive, "rsync -a $FROM $TO", Works),
    (Import, "rsync -a $FROM $TO", Works),
    (Return, "rsync -a $FROM/ $TO", Works),
    (RestoreSnapshot, "rsync -a $FROM $TO", Works),
    (RestoreFile, "rsync -a $FROM $TO", Works),
    (
        RestoreFile,
        "rsync -a --inplace --ignore-times $FROM $TO",
        Works,
    ),
    (CloneBox, "rsync -a $FROM/ $TO", Works),
    (CloneSnapshot, "rsync -a $FROM/ $TO", Works),
];

#[rustfmt::skip] // a row a line
const TAR: Table = &[
    (BackUp, "mkdir $TO && tar c -C $FROM . | tar x -C $TO", Works),
    (BackUpArchive, "tar c -C ${FROM%/*} ${FROM##*/} | tar xO > $TO", Works),
    (Import, "tar c -C ${FROM%/*} --transform s/.*/${TO##*/}/ ${FROM##*/} | tar x -C ${TO%/*}", Works),
    (Return, "mkdir $TO && tar c -C $FROM . | tar x -C $TO", Works),
    (RestoreSnapshot, "tar c -C ${FROM%/*} ${FROM##*/} | tar x -C ${TO%/*} ${TO##*/}", Works),
    (RestoreFile, "tar c -C ${FROM%/*} --transform s/.*/${TO##*/}/ ${FROM##*/} | tar x -C ${TO%/*} ${TO##*/}", Works),
    // More files may follow, so it could be a whole box over another.
    (RestoreSnapshot, "tar c -C ${FROM%/*} ${FROM##*/} | tar x -C ${TO%/*}", Fails("Operation not permitted")),
    (RestoreFile, "tar c -C ${FROM%/*} ${FROM##*/} | tar xO > $TO", Works),
    (CloneBox, "mkdir $TO && tar c -C $FROM . | tar x -C $TO", Works),
    (CloneSnapshot, "mkdir $TO && tar c -C $FROM . | tar x -C $TO", Works),
];

const PYTHON: Table = &[
    (BackUp, "p copytree symlinks=True", Works),
    (BackUpArchive, "p copyfile", Works),
    (Import, "p copyfile", Works),
    (Import, "p move", Moves),
    (Return, "p copytree symlinks=True", Works),
    // It follows the links to the compressed exports, which are broken outside the mount.
    (Return, "p copytree", Complains("No such file or directory")),
    (BackUp, "p copytree", Works),
    (Return, "p copytree", Complains("Operation not permitted")),
    (BackUp, "p copytree symlinks=True", Works),
    (Return, "p move", Moves),
    (RestoreSnapshot, "p copyfile", Works),
    (RestoreSnapshot, "p copy2", Works),
    (RestoreFile, "p copyfile", Works),
    (RestoreFile, "p move", Moves),
    (CloneBox, "p copytree", Complains("Operation not permitted")),
    (CloneBox, "p copytree symlinks=True", Works),
    (
        CloneSnapshot,
        "p copytree",
        Complains("Operation not permitted"),
    ),
    (CloneSnapshot, "p move", Moves),
    (RenameSnapshot, "p move", Works),
    (RenameBox, "p move", Works),
    (BackUp, "p move", Moves),
    (DeleteSnapshot, "p rmtree", Works),
    (DeleteBox, "p rmtree", Works),
];

const BUSYBOX: Table = &[
    (BackUp, "busybox cp -r $FROM $TO", Works),
    (BackUp, "busybox mv $FROM $TO", Moves),
    (BackUpArchive, "busybox cp $FROM $TO", Works),
    (Import, "busybox cp $FROM $TO", Works),
    (Import, "busybox mv $FROM $TO", Moves),
    (Return, "busybox cp -a $FROM $TO", Works),
    (Return, "busybox mv $FROM $TO", Moves),
    (RestoreSnapshot, "busybox cp $FROM $TO", Works),
    (RestoreFile, "busybox cp $FROM $TO", Works),
    (RestoreFile, "busybox mv $FROM $TO", Moves),
    (CloneBox, "busybox cp -r $FROM $TO", Works),
    (CloneSnapshot, "busybox cp -r $FROM $TO", Works),
    (CloneSnapshot, "busybox mv $FROM $TO", Moves),
    (RenameSnapshot, "busybox mv $FROM $TO", Works),
    (RenameBox, "busybox mv $FROM $TO", Works),
    (DeleteSnapshot, "busybox rm -r $FROM", Works),
    (DeleteBox, "busybox rm -r $FROM", Works),
];

#[rustfmt::skip] // a row a line
const GIO: Table = &[
    // It cannot copy directories; file managers do that with the same library, file by file.
    (BackUp, "gio copy $FROM $TO", Fails("recursively copy directory")),
    (BackUpArchive, "gio copy $FROM $TO", Works),
    (Import, "gio copy $FROM $TO", Works),
    (Import, "gio move $FROM $TO", Moves),
    (Return, "gio copy $FROM $TO", Fails("recursively copy directory")),
    (Return, "mkdir -p $TO/snapshots/{s,t} && for s in s t; do gio copy $FROM/snapshots/$s/*.{json,boxlite} $TO/snapshots/$s || exit; done && gio copy $FROM/*.{json,boxlite} $TO", Works),
    (RestoreSnapshot, "gio copy $FROM $TO", Works),
    (RestoreFile, "gio copy $FROM $TO", Works),
    (RestoreFile, "gio move $FROM $TO", Moves),
    (CloneBox, "gio copy $FROM $TO", Fails("recursively copy directory")),
    (CloneSnapshot, "gio copy $FROM $TO", Fails("recursively copy directory")),
    (CloneSnapshot, "gio copy $FROM/export.boxlite $TO.boxlite", Works),
    (RenameSnapshot, "gio move $FROM $TO", Works),
    (RenameSnapshot, "gio rename $FROM ${TO##*/}", Works),
    (RenameBox, "gio move $FROM $TO", Works),
    (RenameBox, "gio rename $FROM ${TO##*/}", Works),
    // Trash or Trashing: the reason depends on where the mount is.
    (DeleteSnapshot, "gio trash $FROM", Fails("rash")),
    (DeleteSnapshot, "gio remove $FROM", Works),
    (DeleteBox, "gio trash $FROM", Fails("rash")),
    (DeleteBox, "gio remove $FROM", Fails("Directory not empty")),
    (DeleteBox, "gio remove $FROM/box.json $FROM/export.boxlite* $FROM/rootfs $FROM/disk.img $FROM/snapshots/*/* $FROM/snapshots/* $FROM/snapshots $FROM", Works),
];

const RCLONE: Table = &[
    (BackUp, "rclone copy $FROM $TO", Works),
    (BackUp, "rclone copy --copy-links $FROM $TO", Works),
    (BackUpArchive, "rclone copyto $FROM $TO", Works),
    (Import, "rclone copyto $FROM $TO", Works),
    (Import, "rclone moveto $FROM $TO", Moves),
    (
        Return,
        "rclone copy $FROM $TO",
        Complains("operation not permitted"),
    ),
    (RestoreSnapshot, "rclone copyto $FROM $TO", Works),
    (RestoreFile, "rclone copyto $FROM $TO", Works),
    (CloneBox, "rclone copy $FROM $TO", Works),
    (CloneSnapshot, "rclone copy $FROM $TO", Works),
    (RenameSnapshot, "rclone moveto $FROM $TO", Works),
    (RenameBox, "rclone moveto $FROM $TO", Works),
    (DeleteSnapshot, "rclone purge $FROM", Works),
    (DeleteBox, "rclone purge $FROM", Works),
];

const JAVA: Table = &[
    (BackUp, "j copy $FROM $TO", Works),
    (BackUpArchive, "j copy $FROM $TO", Works),
    (Import, "j copy $FROM $TO", Works),
    (Import, "j move $FROM $TO", Moves),
    (Return, "j copy $FROM $TO", Works),
    (RestoreSnapshot, "j copy $FROM $TO", Works),
    (RestoreFile, "j copy $FROM $TO", Works),
    (RestoreFile, "j move $FROM $TO", Moves),
    (CloneBox, "j copy $FROM $TO", Works),
    (CloneSnapshot, "j copy $FROM $TO", Works),
    (RenameSnapshot, "j move $FROM $TO", Works),
    (RenameBox, "j move $FROM $TO", Works),
    // It cannot move a directory to another file system.
    (
        BackUp,
        "j move $FROM $TO",
        Fails("DirectoryNotEmptyException"),
    ),
    (DeleteSnapshot, "j delete $FROM", Works),
    (DeleteBox, "j delete $FROM", Works),
];

const MC: Table = &[
    (BackUp, "c copy $FROM $TO", Works),
    (BackUpArchive, "c copy $FROM $TO", Works),
    (Import, "c copy $FROM $TO", Works),
    (Return, "c copy $FROM $TO", Works),
    (RestoreSnapshot, "c copy $FROM $TO", Works),
    (RestoreFile, "c copy $FROM $TO", Works),
    (CloneBox, "c copy $FROM $TO", Works),
    (CloneSnapshot, "c copy $FROM $TO", Works),
    (RenameSnapshot, "c move $FROM $TO", Works),
    (RenameBox, "c move $FROM $TO", Works),
    (BackUp, "c move $FROM $TO", Moves),
    (DeleteSnapshot, "c delete $FROM", Works),
    (DeleteBox, "c delete $FROM", Works),
];

#[test]
fn midnight_commander_does_every_verb() {
    assert_every_row(MC);
}

#[test]
fn cp_r_does_every_verb() {
    assert_every_row(CP_R);
}

#[test]
fn cp_a_does_every_verb() {
    assert_every_row(CP_A);
}

#[test]
fn mv_does_every_verb() {
    assert_every_row(MV);
}

#[test]
fn rsync_does_every_verb() {
    assert_every_row(RSYNC);
}

#[test]
fn a_tar_pipe_does_every_verb() {
    assert_every_row(TAR);
}

#[test]
fn python_does_every_verb() {
    assert_every_row(PYTHON);
}

#[test]
fn busybox_does_every_verb() {
    assert_every_row(BUSYBOX);
}

#[test]
fn gio_does_every_verb_or_says_why_not() {
    assert_every_row(GIO);
}

#[test]
fn rclone_does_every_verb() {
    assert_every_row(RCLONE);
}

#[test]
fn java_with_many_threads_does_every_verb() {
    assert_every_row(JAVA);
}

// ---- a table ------------------------------------------------------------------------------------

/// Shell functions that the rows use.
const SHELL: &str = r#"
p() { python3 -c "import os, shutil; shutil.$1(*os.environ['ENDS'].split(), $2)"; }
c() { python3 "$TOOLS/mc.py" "$@"; }
j() { java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -cp "$CLASSES" Copier "$@"; }
"#;

/// The box that exists for a whole table.
const WEB: &str = "web";

/// A box to be moved, renamed or deleted.
const VICTIM: &str = "victim";

/// The contents of a box, as digests of what its guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Contents {
    live: String,
    /// Time, name and digest of each snapshot, in order of time.
    snapshots: Vec<(i64, String, String)>,
}

impl Contents {
    fn of_snapshot(&self, name: &str) -> &str {
        let snapshot = self.snapshots.iter().find(|(_, known, _)| known == name);
        &snapshot.expect("a snapshot").2
    }

    fn alone(live: &str) -> Contents {
        Contents {
            live: live.to_owned(),
            snapshots: Vec::new(),
        }
    }
}

/// A home for one table.
struct Matrix {
    home: TestHome,
    mount: Mounted,
    /// The boxes that must exist.
    boxes: BTreeMap<String, Contents>,
    /// The last complete backup and its contents.
    kept: (PathBuf, Contents),
}

fn assert_every_row(table: Table) {
    let mut matrix = Matrix::new();
    for (number, &(verb, script, end)) in table.iter().enumerate() {
        matrix.run(number, verb, script, end);
    }
    matrix.assert_boxlite_agrees();
}

impl Matrix {
    /// Makes a home whose box `web` has the snapshots `s` and `t`, all in different states.
    fn new() -> Matrix {
        let home = TestHome::in_memory();
        for snapshot in ["s", "t"] {
            home.guest_write(WEB, FREE_AREA, snapshot.as_bytes());
            home.wheel(&["snapshot-create", WEB, snapshot]);
        }
        home.guest_write(WEB, FREE_AREA, b"now");
        let age = "UPDATE snapshot SET created_at = ?2, json = json_set(json, '$.created_at', ?2) \
                   WHERE name = ?1";
        for (snapshot, time) in [("s", 1_700_000_000), ("t", 1_700_100_000)] {
            home.database()
                .execute(age, (snapshot, time))
                .expect("rows");
        }
        let mount = home.mount();
        fs::create_dir(home.beside("out")).expect("a place outside");
        let kept = home.beside("out/kept");
        succeed(&["cp", "-a", text(&mount.at(WEB)), text(&kept)]);
        let boxes = contents(&home);
        Matrix {
            kept: (kept, boxes[WEB].clone()),
            boxes,
            home,
            mount,
        }
    }

    /// Returns the box that a row uses.
    fn subject(verb: Verb, end: End) -> &'static str {
        match verb {
            BackUp | CloneSnapshot if end == Moves => VICTIM,
            RenameBox | RenameSnapshot | DeleteBox | DeleteSnapshot => VICTIM,
            _ => WEB,
        }
    }

    fn run(&mut self, number: usize, verb: Verb, script: &str, end: End) {
        let subject = Matrix::subject(verb, end);
        let is_whole = |victim: &Contents| {
            let mut names = victim.snapshots.iter().map(|snapshot| &*snapshot.1);
            names.all(|name| name == "s" || name == "t") && victim.snapshots.len() == 2
        };
        if subject == VICTIM && !self.boxes.get(VICTIM).is_some_and(is_whole) {
            self.renew_victim();
        }
        if matches!(verb, RestoreSnapshot | RestoreFile) {
            self.home.guest_write(WEB, FREE_AREA, script.as_bytes());
            let live = digest(&self.home.live_disk(WEB));
            self.boxes.get_mut(WEB).expect("web").live = live;
        }
        let (from, to) = self.ends(number, verb, subject);
        let output = self.output_of(script, &from, &to);
        let what = format!("{verb:?}: {script}");
        assert_ended(&what, &output, end, &self.mount);
        if !matches!(end, Fails(_)) {
            self.expect(verb, end, subject, &from, &to);
            assert!(end != Moves || !from.exists(), "{what}: it is still there");
        }
        self.assert_as_expected(&what);
    }

    /// Makes a new box to be moved, renamed or deleted.
    fn renew_victim(&mut self) {
        let victim = self.mount.at(VICTIM);
        if self.boxes.contains_key(VICTIM) {
            succeed(&["rm", "-r", text(&victim)]);
        }
        self.mount.copy(WEB, VICTIM);
        self.boxes
            .insert(VICTIM.to_owned(), self.boxes[WEB].clone());
    }

    /// Returns the source and target of a row.
    fn ends(&self, number: usize, verb: Verb, subject: &str) -> (PathBuf, PathBuf) {
        let out = |name: &str| self.home.beside("out").join(name);
        let at = |path: &str| self.mount.at(path);
        let a_box = at(subject);
        // Each row has its own source, because it may move it.
        let file = out(&format!("from{number}.boxlite"));
        let directory = out(&format!("from{number}"));
        // Keeps the time, which rsync compares.
        let put = |from: &Path, to: &Path| drop(succeed(&["cp", "-a", text(from), text(to)]));
        match verb {
            Import => put(&archive(), &file),
            RestoreFile => put(&self.kept.0.join("export.boxlite"), &file),
            Return => put(&self.kept.0, &directory),
            _ => (),
        }
        match verb {
            BackUp => (a_box, out(&format!("to{number}"))),
            BackUpArchive => (
                a_box.join("export.boxlite"),
                out(&format!("to{number}.boxlite")),
            ),
            Import => (file, at(&format!("new{number}.boxlite"))),
            Return => (directory, at(&format!("new{number}"))),
            RestoreSnapshot => (
                a_box.join("snapshots/s/export.boxlite"),
                a_box.join("export.boxlite"),
            ),
            RestoreFile => (file, a_box.join("export.boxlite")),
            CloneBox | RenameBox => (a_box, at(&format!("new{number}"))),
            CloneSnapshot => (a_box.join("snapshots/t"), at(&format!("new{number}"))),
            RenameSnapshot => (
                a_box.join("snapshots/s"),
                a_box.join(format!("snapshots/new{number}")),
            ),
            DeleteBox => (a_box, PathBuf::new()),
            DeleteSnapshot => (a_box.join("snapshots/t"), PathBuf::new()),
        }
    }

    fn output_of(&self, text_of_row: &str, from: &Path, to: &Path) -> Output {
        let script_of_row = format!("{SHELL}{text_of_row}");
        let ends = PathBuf::from(format!("{} {}", from.display(), to.display()));
        let home = self.home.beside("out");
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools");
        let environment = [
            ("TOOLS", &*tools),
            ("FROM", from),
            ("TO", to),
            ("ENDS", &ends),
            ("HOME", &home),
            ("CLASSES", classes()),
        ];
        script(&script_of_row, &environment)
            .output()
            .expect("a shell")
    }

    /// Updates the expected state after a row.
    fn expect(&mut self, verb: Verb, end: End, subject: &str, from: &Path, to: &Path) {
        let before = self.boxes[subject].clone();
        let new = to
            .file_stem()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let new = new.to_owned();
        match verb {
            BackUp => {
                assert_backup(to, &before);
                self.kept = (to.to_owned(), before);
                if end == Moves {
                    self.boxes.remove(subject);
                }
            }
            BackUpArchive => assert_eq!(archive_digest(to), before.live),
            Import => {
                let live = archive_digest(&archive());
                self.boxes.insert(new, Contents::alone(&live));
            }
            Return => drop(self.boxes.insert(new, self.kept.1.clone())),
            RestoreSnapshot => self.contents_of(subject).live = before.of_snapshot("s").to_owned(),
            RestoreFile => {
                let live = self.kept.1.live.clone();
                self.contents_of(subject).live = live;
            }
            CloneBox => drop(self.boxes.insert(new, before)),
            CloneSnapshot => {
                self.boxes
                    .insert(new, Contents::alone(before.of_snapshot("t")));
                if end == Moves {
                    self.contents_of(subject)
                        .snapshots
                        .retain(|(_, name, _)| name != "t");
                }
            }
            RenameBox => {
                self.boxes.remove(subject);
                self.boxes.insert(new, before);
            }
            RenameSnapshot => {
                let snapshots = &mut self.contents_of(subject).snapshots;
                let renamed = snapshots.iter_mut().find(|(_, name, _)| name == "s");
                renamed.expect("s").1 = new;
            }
            DeleteBox => drop(self.boxes.remove(subject)),
            DeleteSnapshot => {
                self.contents_of(subject)
                    .snapshots
                    .retain(|(_, name, _)| name != "t");
            }
        }
        let _ = from;
    }

    fn contents_of(&mut self, name: &str) -> &mut Contents {
        self.boxes.get_mut(name).expect("a box")
    }

    /// Compares the database, the contents, the mount's view and the checks of every image with the
    /// expected state.
    fn assert_as_expected(&self, what: &str) {
        let log = self.mount.log();
        assert_eq!(contents(&self.home), self.boxes, "{what}\n{log}");
        let names: Vec<String> = self.boxes.keys().cloned().collect();
        eventually(
            &format!("{what}: {names:?} and nothing else is listed"),
            || self.mount.names("") == names,
        );
        for (name, contents) in &self.boxes {
            let files = self.mount.names(name);
            let wanted = BOX_FILES;
            assert_eq!(files, wanted, "{what}: {name}");
            let mut snapshots: Vec<&String> = contents.snapshots.iter().map(|s| &s.1).collect();
            snapshots.sort();
            let shown = self.mount.names(format!("{name}/snapshots"));
            assert!(shown.iter().eq(snapshots), "{what}: {name}: {shown:?}");
        }
        self.home.assert_images_clean();
        let (status, said) = self.home.check();
        assert_eq!(status, 0, "{what}: boxlitefs check: {said}\n{log}");
    }

    /// Asserts that BoxLite lists every box and snapshot, and exports the right contents of each
    /// box.
    fn assert_boxlite_agrees(self) {
        let exports = self.home.beside("exports");
        fs::create_dir(&exports).expect("a place for exports");
        let names: Vec<&str> = self.boxes.keys().map(String::as_str).collect();
        let mut commands = vec![vec!["list"]];
        for &name in &names {
            commands.push(vec!["snapshot-list", name]);
            commands.push(vec!["export", name, text(&exports)]);
        }
        let commands: Vec<&[&str]> = commands.iter().map(Vec::as_slice).collect();
        let answers = self.home.wheel_batch(&commands);
        assert_eq!(listed(&answers[0]), names);
        for (name, answers) in names.iter().zip(answers[1..].chunks(2)) {
            let contents = &self.boxes[*name];
            let mut snapshots: Vec<&str> = contents.snapshots.iter().map(|s| &*s.1).collect();
            snapshots.sort_unstable();
            assert_eq!(listed(&answers[0]), snapshots, "{name}");
            let export = answers[1]["path"].as_str().expect("a path");
            assert_eq!(archive_digest(Path::new(export)), contents.live, "{name}");
        }
        self.mount.unmount();
        self.home.assert_whole();
    }
}

/// Returns the sorted names in BoxLite's answer to a list request.
fn listed(answer: &serde_json::Value) -> Vec<&str> {
    let entries = answer.as_array().expect("a list").iter();
    let mut names: Vec<&str> = entries.filter_map(|entry| entry["name"].as_str()).collect();
    names.sort_unstable();
    names
}

fn assert_ended(what: &str, output: &Output, end: End, mount: &Mounted) {
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said);
    let (succeeds, says) = match end {
        Works | Moves => (true, ""),
        Complains(says) | Fails(says) => (false, says),
    };
    let as_it_must = output.status.success() == succeeds && said.contains(says);
    assert!(
        as_it_must,
        "{what}: {}: {said}\n{}",
        output.status,
        mount.log()
    );
}

/// Asserts that a directory contains everything of a box.
fn assert_backup(directory: &Path, of: &Contents) {
    assert!(directory.join("box.json").is_file());
    assert_eq!(archive_digest(&directory.join("export.boxlite")), of.live);
    let mut names: Vec<&String> = of.snapshots.iter().map(|snapshot| &snapshot.1).collect();
    names.sort();
    assert!(names_in(&directory.join("snapshots")).iter().eq(names));
    for (time, name, contents) in &of.snapshots {
        let place = directory.join("snapshots").join(name);
        assert_eq!(archive_digest(&place.join("export.boxlite")), *contents);
        let json = fs::read_to_string(place.join("snapshot.json")).expect("its description");
        assert!(json.contains(&time.to_string()), "{name}: {json}");
    }
}

/// Reads every box of a home, by its rows and through qemu-img.
fn contents(home: &TestHome) -> BTreeMap<String, Contents> {
    let database = home.database();
    let mut boxes = BTreeMap::new();
    let mut names = database
        .prepare("SELECT name FROM box_config")
        .expect("rows");
    let names = names
        .query_map([], |row| row.get::<_, String>(0))
        .expect("rows");
    let mut snapshots = database
        .prepare(
            "SELECT created_at, name FROM snapshot WHERE box_id = ?1 ORDER BY created_at, name",
        )
        .expect("rows");
    for name in names.map(|name| name.expect("a name")) {
        let rows = snapshots.query_map([home.id(&name)], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))
        });
        let rows = rows.expect("rows").map(|row| row.expect("a row"));
        let snapshots = rows.map(|(time, snapshot)| {
            let contents = digest(&home.snapshot_disk(&name, &snapshot));
            (time, snapshot, contents)
        });
        let contents = Contents {
            live: digest(&home.live_disk(&name)),
            snapshots: snapshots.collect(),
        };
        boxes.insert(name, contents);
    }
    boxes
}

/// Returns the directory with the Java program's classes, which are compiled once per process.
fn classes() -> &'static Path {
    static CLASSES: OnceLock<PathBuf> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let classes = crate::common::own_directory().join("classes");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/Copier.java");
        succeed(&["javac", "-d", text(&classes), text(&source)]);
        classes
    })
}
