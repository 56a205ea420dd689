//! Applies operations to the home and to the model of it.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use super::operation::*;
use super::world::*;
use crate::common::*;

/// Crash points at which a merge may be killed.
const MERGE_POINTS: [&str; 8] = [
    "merge.prepared",
    "merge.written",
    "merge.renamed",
    "merge.rebased",
    "merge.claimed",
    "merge.promoted",
    "free.claimed",
    "free.unlinked",
];

impl World<'_> {
    /// Applies one operation and checks the affected boxes and all names.
    pub fn apply(&mut self, operation: &Operation) {
        let before = self.boxes.clone();
        if self.act(operation).is_some() {
            self.steps += match operation {
                Operation::BoxLite { .. } => 0, // its operations are counted one by one
                _ => 1,
            };
            self.check_names();
            self.follow_undo(&before, operation);
        }
    }

    /// Returns None if there is nothing that the operation could work on.
    fn act(&mut self, operation: &Operation) -> Option<()> {
        match operation {
            Operation::Guest { of, writes } => self.guest(*of, writes),
            Operation::Snapshot { of, name } => self.snapshot(*of, *name),
            Operation::RemoveSnapshot { which, by } => self.remove_snapshot(*which, *by),
            Operation::RenameSnapshot { which, name } => self.rename_snapshot(*which, *name),
            Operation::RenameBox { of, name } => self.rename_box(*of, *name),
            Operation::RemoveBox { of } => self.remove_box(*of),
            Operation::Clone { of, name, by } => self.clone_box(*of, *name, *by),
            Operation::Promote { state, name, by } => self.promote(*state, *name, *by),
            Operation::Restore { of, state, by } => self.restore(*of, *state, *by),
            Operation::RestoreBackup { of, backup, by } => self.restore_backup(*of, *backup, *by),
            Operation::Export { state, zst, by } => self.export(*state, *zst, *by),
            Operation::BackUp { of, by } => self.back_up(*of, *by),
            Operation::Import {
                backup,
                name,
                by,
                into_directory,
            } => self.import(*backup, *name, *by, *into_directory),
            Operation::Refused { of, other, what } => self.is_refused(*of, *other, *what),
            Operation::Running { of } => self.running(*of),
            Operation::Reader { state } => {
                let state = self.pick_state(*state)?;
                self.note(format!("open {}", self.export_at(state).display()));
                self.begin_reading(state);
                Some(())
            }
            Operation::Compact { at_rest, killed_at } => self.compact(*at_rest, *killed_at),
            Operation::HaveBack { which, name } => self.have_back(*which, *name),
            Operation::EndKeeping { which } => self.end_keeping(*which),
            Operation::Remount => {
                self.note("remount".into());
                self.remount();
                self.check_all();
                Some(())
            }
            Operation::BoxLite {
                does,
                try_meanwhile,
            } => self.boxlite(does, *try_meanwhile),
        }
    }

    // ---- guests, snapshots and boxes ----

    fn guest(&mut self, of: Pick, writes: &[Write]) -> Option<()> {
        let of = self.pick_box(of)?;
        let image = self.home.live_disk(&self.boxes[of].name);
        let mut disk = self.boxes[of].disk.clone();
        // Hold the home's lock, like BoxLite while a guest runs, so that the mount does not merge
        // the layers.
        let lock = self.home.root().join(".lock");
        let mut command: Vec<String> = ["flock", text(&lock), "qemu-io", "-f", "qcow2"]
            .map(str::to_owned)
            .into();
        for write in writes {
            command.push("-c".into());
            command.push(disk.write(write));
        }
        command.push(text(&image).into());
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        // qemu-io reports a failed write on its output, but exits successfully.
        self.note(format!(
            "guest of {}: {:?}",
            self.boxes[of].name,
            &words[5..]
        ));
        assert_eq!(succeed(&words), "");
        self.changes_disk(of, disk);
        self.check_live(of);
        Some(())
    }

    fn snapshot(&mut self, of: Pick, name: Pick) -> Option<()> {
        let picked = self.pick_box(of)?;
        if !self.has_room_in(picked) {
            let last = self.boxes[picked].snapshots.len() - 1;
            let snapshot = Some(usize::from(name) % (last + 1));
            return self.remove_this(
                State {
                    of: picked,
                    snapshot,
                },
                Removal::Rmdir,
            );
        }
        let name = self.free_snapshot_name(picked, name);
        let since = now();
        self.note(format!(
            "mkdir {}/snapshots/{name}",
            self.boxes[picked].name
        ));
        fs::create_dir(self.box_at(picked).join("snapshots").join(&name)).expect("a snapshot");
        self.add_snapshot(picked, &name, since);
        self.check_box(picked);
        Some(())
    }

    fn remove_snapshot(&mut self, which: Pick, by: Removal) -> Option<()> {
        self.remove_this(self.pick_snapshot(which)?, by)
    }

    fn remove_this(&mut self, state: State, by: Removal) -> Option<()> {
        let at = self.state_at(state);
        self.note(format!("{by:?} {}", at.display()));
        match by {
            Removal::Rmdir => fs::remove_dir(&at).expect("rmdir of a snapshot"),
            Removal::Rm => drop(succeed(&["rm", "-r", text(&at)])),
        }
        self.boxes[state.of].snapshots.remove(state.snapshot?);
        self.check_box(state.of);
        Some(())
    }

    fn rename_snapshot(&mut self, which: Pick, name: Pick) -> Option<()> {
        let state = self.pick_snapshot(which)?;
        let name = self.free_snapshot_name(state.of, name);
        let from = self.state_at(state);
        self.note(format!("mv {} {name}", from.display()));
        fs::rename(&from, from.with_file_name(&name)).expect("rename of a snapshot");
        self.boxes[state.of].snapshots[state.snapshot?].name = name;
        self.check_box(state.of);
        Some(())
    }

    fn rename_box(&mut self, of: Pick, name: Pick) -> Option<()> {
        let of = self.pick_box(of)?;
        let name = self.free_box_name(name);
        self.note(format!("mv {} {name}", self.boxes[of].name));
        fs::rename(self.box_at(of), self.at(shown(&name))).expect("rename of a box");
        self.changes_name(of, &name);
        self.check_box(of);
        Some(())
    }

    /// `rm -r` of a box.
    pub fn remove_box(&mut self, of: Pick) -> Option<()> {
        let of = self.pick_box(of)?;
        let at = self.box_at(of);
        self.note(format!("rm -r {}", at.display()));
        succeed(&["rm", "-r", text(&at)]);
        assert!(!at.exists(), "{} is still there", at.display());
        self.boxes.remove(of);
        Some(())
    }

    fn clone_box(&mut self, of: Pick, name: Pick, by: TreeTool) -> Option<()> {
        if !self.has_room() {
            return self.remove_box(of);
        }
        let of = self.pick_box(of)?;
        let name = self.free_box_name(name);
        self.note(format!("{by:?} -r {} {name}", self.boxes[of].name));
        copy_tree(by, &self.box_at(of), &self.at(shown(&name)));
        let original = self.boxes[of].clone();
        let new = self.add_box(&name, original.disk, original.snapshots);
        self.check_box(of);
        self.check_box(new);
        Some(())
    }

    fn promote(&mut self, state: Pick, name: Pick, by: Promotion) -> Option<()> {
        if !self.has_room() {
            return self.remove_box(name);
        }
        let state = self.pick_state(state)?;
        let name = self.free_box_name(name);
        let (from, export) = (self.state_at(state), self.export_at(state));
        let to = self.at(shown(&name));
        let archive = self.at(shown(&name) + ".boxlite");
        let disk = self.disk(state).clone();
        self.note(format!("{by:?} {} {name}", from.display()));
        match (by, state.snapshot) {
            (Promotion::Export(tool), _) => copy(tool, &export, &archive),
            (Promotion::Directory, _) => copy_into_directory(&export, &to),
            (Promotion::CopyDirectory, Some(_)) => copy_tree(TreeTool::Cp, &from, &to),
            (Promotion::Move, Some(snapshot)) => {
                drop(succeed(&["mv", text(&from), text(&to)]));
                self.boxes[state.of].snapshots.remove(snapshot);
            }
            // The export of a box survives `mv`, because it is generated from the disk.
            (Promotion::Move, None) => drop(succeed(&["mv", text(&export), text(&archive)])),
            (Promotion::CopyDirectory, None) => copy(Tool::Cp, &export, &archive),
        }
        let new = self.add_box(&name, disk, Vec::new());
        self.check_box(state.of);
        self.check_box(new);
        Some(())
    }

    fn restore(&mut self, of: Pick, state: Pick, by: Tool) -> Option<()> {
        let (of, state) = (self.pick_box(of)?, self.pick_state(state)?);
        let target = State { of, snapshot: None };
        if state == target {
            // Copy tools notice that source and target are the same file.
            return self.refused(of, of, Refusal::RestoreItself);
        }
        let disk = self.disk(state).clone();
        let (from, to) = (self.export_at(state), self.export_at(target));
        self.note(format!("{by:?} {} {}", from.display(), to.display()));
        copy(by, &from, &to);
        self.changes_disk(of, disk);
        self.check_box(of);
        self.check_box(state.of);
        Some(())
    }

    // ---- backups ----

    fn restore_backup(&mut self, of: Pick, backup: Pick, by: Tool) -> Option<()> {
        let of = self.pick_box(of)?;
        let backup = self.pick_backup(backup);
        let (path, disk) = match backup.of {
            Kept::Archive(disk) => (backup.path, disk),
            Kept::Directory(kept) => (backup.path.join("export.boxlite"), kept.disk),
        };
        let to = self.export_at(State { of, snapshot: None });
        self.note(format!("{by:?} {} {}", path.display(), to.display()));
        copy(by, &path, &to);
        self.changes_disk(of, disk);
        self.check_box(of);
        Some(())
    }

    fn export(&mut self, state: Pick, zst: bool, by: Tool) -> Option<()> {
        let state = self.pick_state(state)?;
        let to = self.backup_place();
        let mut from = self.export_at(state);
        if zst {
            from.set_extension("boxlite.zst");
        }
        self.note(format!("{by:?} {} {}", from.display(), to.display()));
        copy(by, &from, &to);
        let disk = self.disk(state).clone();
        disk.assert_in_archive(&to, "a backup");
        self.add_backup(to, Kept::Archive(disk));
        Some(())
    }

    fn back_up(&mut self, of: Pick, by: TreeTool) -> Option<()> {
        let of = self.pick_box(of)?;
        let to = self.backup_place();
        let from = self.box_at(of);
        self.note(format!("{by:?} -r {} {}", from.display(), to.display()));
        copy_tree(by, &from, &to);
        let kept = self.boxes[of].clone();
        kept.disk
            .assert_in_archive(&to.join("export.boxlite"), "a backup");
        for snapshot in &kept.snapshots {
            let archive = to.join("snapshots").join(&snapshot.name);
            let archive = archive.join("export.boxlite");
            snapshot.disk.assert_in_archive(&archive, "a backup");
        }
        self.add_backup(to, Kept::Directory(kept));
        Some(())
    }

    fn import(&mut self, backup: Pick, name: Pick, by: Tool, into_directory: bool) -> Option<()> {
        if !self.has_room() {
            return self.remove_box(name);
        }
        let backup = self.pick_backup(backup);
        let name = self.free_box_name(name);
        let to = self.at(shown(&name));
        let way = if into_directory { "mkdir and " } else { "" };
        let from = backup.path.display();
        self.note(format!("{way}{by:?} {from} {}", to.display()));
        let new = match backup.of {
            Kept::Archive(disk) => {
                if into_directory {
                    copy_into_directory(&backup.path, &to);
                } else {
                    copy(by, &backup.path, &self.at(shown(&name) + ".boxlite"));
                }
                self.add_box(&name, disk, Vec::new())
            }
            Kept::Directory(kept) => {
                let tool = match by {
                    Tool::Cp | Tool::Cat => TreeTool::Cp,
                    Tool::Rsync | Tool::Gio => TreeTool::Rsync,
                };
                copy_tree(tool, &backup.path, &to);
                self.add_box(&name, kept.disk, kept.snapshots)
            }
        };
        self.check_box(new);
        Some(())
    }

    // ---- refused operations ----

    fn is_refused(&mut self, of: Pick, other: Pick, what: Refusal) -> Option<()> {
        let of = self.pick_box(of)?;
        let other = self.pick_box(other)?;
        let (name, second) = (&self.boxes[of].name, &self.boxes[other].name);
        self.note(format!("refused: {what:?} of {name} ({second})"));
        self.refused(of, other, what)?;
        self.check_box(of);
        Some(())
    }

    /// Makes a box look running, with a live process in its pid file. Changes must fail, and so
    /// must reads of its export.
    fn running(&mut self, of: Pick) -> Option<()> {
        let of = self.pick_box(of)?;
        let mut machine = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep");
        self.note(format!("{} is running", self.boxes[of].name));
        let pid_file = self.home.box_dir(&self.boxes[of].name).join("shim.pid");
        fs::write(&pid_file, format!("{}\n", machine.id())).expect("cannot write the pid file");

        let at = self.box_at(of);
        let snapshots = at.join("snapshots");
        let busy = "Device or resource busy";
        let new = self.free_snapshot_name(of, 0);
        assert_eq!(errno(fs::create_dir(snapshots.join(new))), libc::EBUSY);
        let to = self.at(shown(&self.free_box_name(0)));
        assert_eq!(errno(fs::rename(&at, &to)), libc::EBUSY);
        if let Some(snapshot) = self.boxes[of].snapshots.first() {
            let one = snapshots.join(&snapshot.name);
            let renamed = snapshots.join("renamed");
            assert_eq!(errno(fs::rename(&one, &renamed)), libc::EBUSY);
            assert_eq!(errno(fs::remove_dir(&one)), libc::EBUSY);
            refused_copy(
                &one.join("export.boxlite"),
                &at.join("export.boxlite"),
                busy,
            );
        }
        refused_by(&["rm", "-r", text(&at)], busy);
        refused_copy(&self.backups[0].path, &at.join("export.boxlite"), busy);
        refused_copy(&at.join("export.boxlite"), &self.backup_place(), busy);

        machine.kill().expect("cannot kill the process");
        machine.wait().expect("cannot wait for the process");
        fs::remove_file(&pid_file).expect("cannot remove the pid file");
        self.check_box(of);
        Some(())
    }

    /// Merges layers, which may be killed. No contents may change.
    fn compact(&mut self, at_rest: bool, killed_at: Option<Pick>) -> Option<()> {
        if at_rest {
            self.finish_readers();
        }
        match killed_at {
            None => {
                let (status, said) = self.home.compact();
                self.note(format!("compact: {said}"));
                assert_eq!(status, 0, "{said}");
            }
            Some(pick) => {
                let point = MERGE_POINTS[usize::from(pick) % MERGE_POINTS.len()];
                let said = self.home.compact_crashing_at(point);
                self.note(format!("compact, killed at {point}: {said:?}"));
            }
        }
        self.check_all();
        Some(())
    }

    /// Tries an operation that must fail with the documented error. Returns None if there is
    /// nothing to try it on.
    fn refused(&mut self, of: usize, other: usize, what: Refusal) -> Option<()> {
        match what {
            Refusal::SnapshotTaken
            | Refusal::SnapshotName(_)
            | Refusal::RmdirSnapshots
            | Refusal::RenameSnapshotOntoSnapshot { .. }
            | Refusal::RenameSnapshotName(_)
            | Refusal::SnapshotToOtherBox
            | Refusal::SnapshotIntoRoot
            | Refusal::WriteSnapshotExport => self.refused_of_snapshots(of, other, what),
            Refusal::ImportTaken
            | Refusal::ImportName(_)
            | Refusal::ImportGarbage
            | Refusal::ImportHalf
            | Refusal::RestoreGarbage
            | Refusal::RestoreHalf
            | Refusal::RestoreNothing
            | Refusal::RestoreItself
            | Refusal::AppendToExport => self.refused_archive(of, what),
            _ => self.refused_of_boxes(of, other, what),
        }
    }

    fn refused_of_snapshots(&self, of: usize, other: usize, what: Refusal) -> Option<()> {
        let dir = self.box_at(of).join("snapshots");
        let snapshots = &self.boxes[of].snapshots;
        let first = || snapshots.first().map(|snapshot| dir.join(&snapshot.name));
        let wrong = |pick: Pick| {
            let long = "x".repeat(256);
            let names: [&std::ffi::OsStr; 4] = [
                ".b".as_ref(),
                "b\\c".as_ref(),
                long.as_ref(),
                std::os::unix::ffi::OsStrExt::from_bytes(b"\xff"),
            ];
            dir.join(names[usize::from(pick) % names.len()])
        };
        let (found, wanted) = match what {
            Refusal::SnapshotTaken => (errno(fs::create_dir(first()?)), libc::EEXIST),
            Refusal::SnapshotName(pick) => (errno(fs::create_dir(wrong(pick))), libc::EINVAL),
            Refusal::RmdirSnapshots => {
                // Without snapshots, rmdir is allowed: it may be the first step of removing a box.
                first()?;
                (errno(fs::remove_dir(&dir)), libc::ENOTEMPTY)
            }
            Refusal::RenameSnapshotOntoSnapshot { keep } => {
                let last = dir.join(&snapshots.get(1..)?.last()?.name);
                rename_onto(&first()?, &last, keep)
            }
            Refusal::RenameSnapshotName(pick) => {
                (errno(fs::rename(first()?, wrong(pick))), libc::EPERM)
            }
            Refusal::SnapshotToOtherBox if of != other => {
                let to = self.box_at(other).join("snapshots/elsewhere");
                (errno(fs::rename(first()?, to)), libc::EPERM)
            }
            Refusal::SnapshotIntoRoot => {
                // On EXDEV, mv copies.
                let to = self.at(shown(&self.free_box_name(0)));
                (errno(fs::rename(first()?, to)), libc::EXDEV)
            }
            Refusal::WriteSnapshotExport => {
                // A snapshot that equals the live disk may be overwritten: nothing is lost.
                let live = &self.boxes[of].disk;
                let mut others = snapshots.iter();
                let other = others.find(|snapshot| snapshot.disk.differs_from(live))?;
                let to = dir.join(&other.name).join("export.boxlite");
                refused_copy(&self.backups[0].path, &to, "Operation not permitted");
                return Some(());
            }
            _ => return None,
        };
        assert_eq!(found, wanted, "{what:?}");
        Some(())
    }

    fn refused_of_boxes(&self, of: usize, other: usize, what: Refusal) -> Option<()> {
        let at = self.box_at(of);
        let two = (of != other).then(|| self.box_at(other));
        let long = "x".repeat(256);
        let (found, wanted) = match what {
            Refusal::BoxTaken => (errno(fs::create_dir(&at)), libc::EEXIST),
            Refusal::BoxName(pick) => {
                let names = [
                    (".Trash-0", libc::EPERM),
                    ("50%", libc::EINVAL),
                    ("a%2fb", libc::EINVAL),
                    (long.as_str(), libc::EINVAL),
                ];
                let (name, wanted) = names[usize::from(pick) % names.len()];
                (errno(fs::create_dir(self.at(name))), wanted)
            }
            Refusal::DirectoryInBox => (errno(fs::create_dir(at.join("elsewhere"))), libc::EPERM),
            Refusal::FileInBox => (errno(fs::write(at.join("notes"), "")), libc::EPERM),
            Refusal::RmdirBox => (errno(fs::remove_dir(&at)), libc::ENOTEMPTY),
            Refusal::RmdirNothing => {
                let none = self.at(shown(&self.free_box_name(0)));
                (errno(fs::remove_dir(none)), libc::ENOENT)
            }
            Refusal::RenameBoxOntoBox { keep } => rename_onto(&at, &two?, keep),
            Refusal::RenameBoxName(pick) => {
                let names = [
                    (".x", libc::EPERM),
                    ("50%", libc::EPERM),
                    (long.as_str(), libc::EPERM),
                    (".boxlite", libc::ENOTEMPTY),
                ];
                let (name, wanted) = names[usize::from(pick) % names.len()];
                (errno(fs::rename(&at, self.at(name))), wanted)
            }
            Refusal::Exchange => (
                errno(rename_with(&at, &two?, libc::RENAME_EXCHANGE)),
                libc::EINVAL,
            ),
            Refusal::BoxIntoBox => (errno(fs::rename(&at, two?.join("in"))), libc::EPERM),
            Refusal::CopyBoxIntoBox => {
                let command = ["cp", "-r", text(&at), text(two.as_deref()?)];
                refused_by(&command, "Operation not permitted");
                return Some(());
            }
            Refusal::RemoveJsonAlone => {
                succeed(&["rm", text(&at.join("box.json"))]);
                return Some(());
            }
            Refusal::HardLink => (
                errno(fs::hard_link(at.join("box.json"), at.join("hard"))),
                libc::EPERM,
            ),
            _ => return None,
        };
        assert_eq!(found, wanted, "{what:?}");
        Some(())
    }

    fn refused_archive(&mut self, of: usize, what: Refusal) -> Option<()> {
        let export = self.export_at(State { of, snapshot: None });
        let export_text = text(&export);
        let new = self.at(shown(&self.free_box_name(0)) + ".boxlite");
        let bad = "Bad message";
        match what {
            Refusal::ImportTaken => {
                let taken = self.at(self.boxes[of].shown() + ".boxlite");
                refused_copy(&self.backups[0].path, &taken, "File exists");
            }
            Refusal::ImportName(pick) => {
                let names = [
                    ("50%.boxlite", "Invalid argument"),
                    ("web.tar", "Operation not permitted"),
                    (".x.boxlite", "Operation not permitted"),
                ];
                let (name, wanted) = names[usize::from(pick) % names.len()];
                refused_copy(&self.backups[0].path, &self.at(name), wanted);
            }
            Refusal::ImportGarbage => refused_copy(&self.garbage(), &new, bad),
            Refusal::ImportHalf => refused_copy(&self.half(of), &new, bad),
            Refusal::RestoreGarbage => refused_copy(&self.garbage(), &export, bad),
            Refusal::RestoreHalf => refused_copy(&self.half(of), &export, bad),
            Refusal::RestoreNothing => {
                succeed(&["sh", "-c", ": > \"$1\"", "sh", export_text]);
            }
            Refusal::RestoreItself => {
                refused_copy(&export, &export, "are the same file");
                fail(&["sh", "-c", "cat \"$1\" > \"$1\"", "sh", export_text]);
            }
            Refusal::AppendToExport => {
                let opened = OpenOptions::new().append(true).open(&export);
                assert_eq!(errno(opened), libc::EPERM);
            }
            _ => return None,
        }
        // The mount drops an incomplete archive when the kernel releases the file, which happens
        // after close(2) has returned.
        eventually("the refused archive has disappeared", || {
            !new.exists() && !new.with_extension("").exists()
        });
        Some(())
    }

    fn garbage(&self) -> std::path::PathBuf {
        let garbage = self.home.beside("garbage");
        fs::write(&garbage, "no archive\n".repeat(1000)).expect("garbage");
        garbage
    }

    fn half(&self, pick: usize) -> std::path::PathBuf {
        let (archive, _) = self.pick_archive(Pick::try_from(pick).unwrap_or(0));
        let bytes = fs::read(archive).expect("an archive");
        let half = self.home.beside("half");
        fs::write(&half, &bytes[..bytes.len() / 2]).expect("half of it");
        half
    }

    // ---- BoxLite ----

    fn boxlite(&mut self, does: &[ByBoxLite], try_meanwhile: bool) -> Option<()> {
        self.note("BoxLite starts".into());
        let mut boxlite = Session::start(self.home);
        if try_meanwhile {
            self.is_held();
        }
        for one in does {
            if self.boxlite_does(&mut boxlite, one).is_some() {
                self.steps += 1;
            }
        }
        drop(boxlite);
        self.check_all_soon();
        Some(())
    }

    /// Checks that boxes can't be renamed, and that snapshots and boxes can be deleted, while BoxLite
    /// holds the home.
    fn is_held(&mut self) {
        let Some(of) = self.pick_box(0) else {
            return;
        };
        let at = self.box_at(of);
        let name = shown(&self.free_box_name(0));
        assert_eq!(errno(fs::rename(&at, self.at(&name))), libc::EBUSY);
        self.check_box(of);
        self.rename_snapshot(0, 0);
        let before = self.boxes.clone();
        if self.steps.is_multiple_of(2) {
            self.remove_snapshot(0, Removal::Rmdir);
        }
        self.follow_undo(&before, &Operation::Remount);
        let before = self.boxes.clone();
        if !self.has_room() {
            self.remove_box(0);
        }
        self.follow_undo(&before, &Operation::Remount);
    }

    fn boxlite_does(&mut self, boxlite: &mut Session, what: &ByBoxLite) -> Option<()> {
        match what {
            ByBoxLite::Snapshot { of, name } => {
                let of = self.pick_box(*of).filter(|of| self.has_room_in(*of))?;
                let name = self.free_snapshot_name(of, *name);
                let since = now();
                self.note(format!(
                    "    BoxLite: snapshot {name} of {}",
                    self.boxes[of].name
                ));
                boxlite.must(&["snapshot-create", &self.boxes[of].name, &name]);
                self.dates_disk(of);
                self.add_snapshot(of, &name, since);
            }
            ByBoxLite::RestoreSnapshot { which } => {
                let state = self.pick_snapshot(*which)?;
                let snapshot = &self.boxes[state.of].snapshots[state.snapshot?];
                let (of, name) = (&self.boxes[state.of].name, &snapshot.name);
                self.note(format!("    BoxLite: restore {name} of {of}"));
                boxlite.must(&["snapshot-restore", of, name]);
                let disk = snapshot.disk.clone();
                self.changes_disk(state.of, disk);
            }
            ByBoxLite::RemoveSnapshot { which } => {
                let state = self.pick_snapshot(*which)?;
                let of = &self.boxes[state.of];
                let name = &of.snapshots[state.snapshot?].name;
                // BoxLite may refuse this because of other boxes, by rules the model does not have.
                let answer = boxlite.ask(&["snapshot-remove", &of.name, name]);
                self.note(format!(
                    "    BoxLite: remove snapshot {name} of {}: {answer:?}",
                    of.name
                ));
                if answer.is_ok() {
                    self.boxes[state.of].snapshots.remove(state.snapshot?);
                }
            }
            ByBoxLite::Clone { of, name } => {
                let of = self.pick_box(*of).filter(|_| self.has_room())?;
                let name = self.free_box_name(*name);
                self.note(format!(
                    "    BoxLite: clone {name} of {}",
                    self.boxes[of].name
                ));
                boxlite.must(&["clone", &self.boxes[of].name, &name]);
                self.dates_disk(of);
                let disk = self.boxes[of].disk.clone();
                self.add_box(&name, disk, Vec::new());
            }
            ByBoxLite::Export { of } => {
                let of = self.pick_box(*of)?;
                let place = self.home.beside("exported");
                let _ = fs::create_dir(&place);
                self.note(format!("    BoxLite: export {}", self.boxes[of].name));
                let path = export_by_boxlite(boxlite, &self.boxes[of], &place)?;
                let to = self.backup_place();
                fs::rename(path, &to).expect("BoxLite's export");
                let disk = self.boxes[of].disk.clone();
                disk.assert_in_archive(&to, "BoxLite's export");
                self.has_boxlites_disks = true;
                self.add_backup(to, Kept::Archive(disk));
            }
            ByBoxLite::Import { backup, name } => {
                let (path, disk) = self.pick_archive(*backup);
                let name = self.has_room().then(|| self.free_box_name(*name))?;
                self.note(format!(
                    "    BoxLite: import {name} from {}",
                    path.display()
                ));
                boxlite.must(&["import", text(&path), &name]);
                self.add_box(&name, disk, Vec::new());
            }
            ByBoxLite::Remove { of } => {
                let of = self.pick_box(*of)?;
                let name = &self.boxes[of].name;
                let answer = boxlite.ask(&["remove", name]);
                self.note(format!("    BoxLite: remove {name}: {answer:?}"));
                if answer.is_ok() {
                    self.boxes.remove(of);
                }
            }
        }
        Some(())
    }
}

// ---- programs ----

/// Copies one file in a separate process, because the mount treats files differently for the
/// process that has just made them.
fn copy(tool: Tool, from: &Path, to: &Path) {
    let (from, to) = (text(from), text(to));
    match tool {
        Tool::Cp => succeed(&["cp", from, to]),
        Tool::Cat => succeed(&["sh", "-c", "cat \"$1\" > \"$2\"", "sh", from, to]),
        // By default, rsync skips files with equal size and time.
        Tool::Rsync => succeed(&["rsync", "-L", "--ignore-times", from, to]),
        Tool::Gio => succeed(&["gio", "copy", from, to]),
    };
}

fn copy_tree(tool: TreeTool, from: &Path, to: &Path) {
    let (from, to) = (text(from), text(to));
    match tool {
        TreeTool::Cp => succeed(&["cp", "-r", from, to]),
        TreeTool::Rsync => succeed(&["rsync", "-a", &format!("{from}/"), to]),
    };
}

fn copy_into_directory(archive: &Path, to: &Path) {
    let script = "mkdir \"$2\" && cp \"$1\" \"$2/export.boxlite\"";
    succeed(&["sh", "-c", script, "sh", text(archive), text(to)]);
}

fn refused_copy(from: &Path, to: &Path, complaint: &str) {
    refused_by(&["cp", text(from), text(to)], complaint);
}

fn refused_by(command: &[&str], complaint: &str) {
    let said = fail(command);
    assert!(said.contains(complaint), "{command:?}: {said}");
}

/// Renames onto an existing entry. Returns the errno and the expected one.
fn rename_onto(from: &Path, to: &Path, keep: bool) -> (i32, i32) {
    if keep {
        (
            errno(rename_with(from, to, libc::RENAME_NOREPLACE)),
            libc::EEXIST,
        )
    } else {
        (errno(fs::rename(from, to)), libc::ENOTEMPTY)
    }
}

fn rename_with(from: &Path, to: &Path, flags: u32) -> std::io::Result<()> {
    let path = |path: &Path| std::ffi::CString::new(text(path)).expect("no NUL in it");
    let (from, to) = (path(from), path(to));
    let at = libc::AT_FDCWD;
    // SAFETY: both strings end in NUL and outlive the call.
    match unsafe { libc::renameat2(at, from.as_ptr(), at, to.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
