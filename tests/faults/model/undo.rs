//! What was removed or restored over, and can be had back.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::operation::*;
use super::reference::Disk;
use super::world::{ModelBox, Snapshot, World, shown};
use crate::common::*;

/// An entry of `.boxlite/undo`, and what it must contain.
#[derive(Clone)]
pub struct KeptEntry {
    name: String,
    action: String,
    /// The id of the box that it is of.
    box_id: String,
    disk: Disk,
    snapshots: Vec<Snapshot>,
}

impl World<'_> {
    fn entry_at(&self, entry: &KeptEntry) -> PathBuf {
        self.at(".boxlite/undo").join(&entry.name)
    }

    /// Adds the entries that an operation has left. Those from before are still there. What the boxes
    /// had before the operation is in the new ones.
    pub fn follow_undo(&mut self, before: &[ModelBox], operation: &Operation) {
        let names: BTreeSet<String> = self.mount().names(".boxlite/undo").into_iter().collect();
        for entry in &self.entries {
            assert!(names.contains(&entry.name), "{} is gone", entry.name);
        }
        let known = |name: &String| self.entries.iter().any(|entry| entry.name == *name);
        let new: Vec<String> = names.into_iter().filter(|name| !known(name)).collect();
        self.assert_kept(before, operation, new.is_empty());
        for name in new {
            let why = self.at(".boxlite/undo").join(&name).join("why.json");
            let why: Value = serde_json::from_slice(&fs::read(why).unwrap()).unwrap();
            let word = |field: &str| why[field].as_str().unwrap_or_default().to_owned();
            let of = before.iter().find(|it| it.name == word("box"));
            let of = of.unwrap_or_else(|| panic!("{name} is of no box: {why}"));
            let action = word("action");
            let (disk, snapshots) = match action.as_str() {
                "disk-replaced" => (of.disk.clone(), Vec::new()),
                "box-removed" => (of.disk.clone(), of.snapshots.clone()),
                _ => {
                    let mut all = of.snapshots.iter();
                    let snapshot = all.find(|it| it.name == word("snapshot")).unwrap();
                    (snapshot.disk.clone(), Vec::new())
                }
            };
            let box_id = word("box_id");
            let entry = KeptEntry {
                name,
                action,
                box_id,
                disk,
                snapshots,
            };
            let export = self.entry_at(&entry).join("export.boxlite");
            entry.disk.assert_in_archive(&export, &entry.name);
            self.entries.push(entry);
        }
    }

    /// Fails if an operation removed or replaced something and left no entry: unless the mount keeps
    /// nothing, or a snapshot has what was replaced.
    fn assert_kept(&self, before: &[ModelBox], operation: &Operation, is_nothing_new: bool) {
        if !(self.home.keeps() && is_nothing_new) {
            return;
        }
        let is_there = |of: &ModelBox| self.boxes.iter().find(|it| it.number == of.number);
        match operation {
            Operation::RemoveBox { .. } => {
                assert!(before.iter().all(|of| is_there(of).is_some()), "not kept");
            }
            Operation::RemoveSnapshot { .. } => {
                let count = |of: &ModelBox| of.snapshots.len();
                let is_same = |of| is_there(of).is_some_and(|now| count(now) == count(of));
                assert!(before.iter().all(is_same), "not kept");
            }
            Operation::Restore { .. } | Operation::RestoreBackup { .. } => {
                let is_had = |of: &ModelBox| {
                    let Some(now) = is_there(of) else {
                        return false;
                    };
                    let mut had = of.snapshots.iter().map(|it| &it.disk).chain([&now.disk]);
                    had.any(|disk| !disk.differs_from(&of.disk))
                };
                assert!(before.iter().all(is_had), "the disk is not kept");
            }
            _ => {}
        }
    }

    /// Checks the contents of all entries.
    pub fn check_entries(&self, mount: &Mounted) {
        for entry in &self.entries {
            let at = mount.at(".boxlite/undo").join(&entry.name);
            let export = at.join("export.boxlite");
            entry.disk.assert_in_archive(&export, &entry.name);
            for snapshot in &entry.snapshots {
                let export = at.join("snapshots").join(&snapshot.name);
                let what = format!("snapshot {} of {}", snapshot.name, entry.name);
                let export = export.join("export.boxlite");
                snapshot.disk.assert_in_archive(&export, &what);
            }
        }
    }

    fn pick_entry(&self, which: Pick) -> Option<usize> {
        let count = self.entries.len();
        (count > 0).then(|| usize::from(which) % count)
    }

    /// Moves what was removed to where it was; copies it where that is refused.
    pub fn have_back(&mut self, which: Pick, name: Pick) -> Option<()> {
        let which = self.pick_entry(which)?;
        let entry = self.entries[which].clone();
        let from = self.entry_at(&entry);
        if entry.action == "box-removed" {
            if !self.has_room() {
                return self.remove_box(name);
            }
            return self.have_back_box(which, name);
        }
        let of = (0..self.boxes.len()).find(|of| {
            self.home.id(&self.boxes[*of].name) == entry.box_id && self.has_room_in(*of)
        });
        let Some(of) = of else {
            return self.copy_entry(&entry, name);
        };
        let name = self.free_snapshot_name(of, name);
        let to = self.box_at(of).join("snapshots").join(&name);
        self.note(format!("mv {} {}", from.display(), to.display()));
        succeed(&["mv", "-T", text(&from), text(&to)]);
        self.entries.remove(which);
        let created_at = self.dated(&self.boxes[of].name, &name);
        self.boxes[of].snapshots.push(Snapshot {
            name,
            disk: entry.disk,
            created_at,
        });
        self.check_box(of);
        Some(())
    }

    fn have_back_box(&mut self, which: usize, name: Pick) -> Option<()> {
        let entry = self.entries[which].clone();
        let from = self.entry_at(&entry);
        let new = self.free_box_name(name);
        let to = self.at(shown(&new));
        self.note(format!("mv {} {}", from.display(), to.display()));
        let moved = run(&["mv", "-T", text(&from), text(&to)]);
        if !moved.status.success() {
            // Others read its disk, and the chain has no room for a layer.
            let said = String::from_utf8_lossy(&moved.stderr);
            assert!(said.contains("Operation not permitted"), "{said}");
            return self.copy_entry(&entry, name);
        }
        self.entries.remove(which);
        // Its exports have another name in them, for those as well who opened them before.
        let boxes = &self.boxes;
        let is_gone = |number: usize| boxes.iter().all(|of| of.number != number);
        let readers = self.readers.iter_mut();
        readers
            .filter(|reader| is_gone(reader.of))
            .for_each(|reader| reader.may_fail = true);
        let new = self.add_box(&new, entry.disk, entry.snapshots);
        self.check_box(new);
        Some(())
    }

    /// Makes a box of what was removed, with `cp -r`.
    fn copy_entry(&mut self, entry: &KeptEntry, name: Pick) -> Option<()> {
        if !self.has_room() {
            return self.remove_box(name);
        }
        let new = self.free_box_name(name);
        let (from, to) = (self.entry_at(entry), self.at(shown(&new)));
        self.note(format!("cp -r {} {}", from.display(), to.display()));
        succeed(&["cp", "-r", text(&from), text(&to)]);
        let new = self.add_box(&new, entry.disk.clone(), entry.snapshots.clone());
        self.check_box(new);
        Some(())
    }

    /// Ends the keeping of what was removed.
    pub fn end_keeping(&mut self, which: Pick) -> Option<()> {
        let which = self.pick_entry(which)?;
        let at = self.entry_at(&self.entries[which]);
        self.note(format!("rm -r {}", at.display()));
        succeed(&["rm", "-r", text(&at)]);
        self.entries.remove(which);
        Some(())
    }
}
