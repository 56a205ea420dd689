//! What each process did to boxes that exist. A box is removed, or copied over, file by file, and
//! only the last step shows what all of it means.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::process::{Caller, ProcessGroup};
use crate::store::{SeenBox, SeenDisk};
use crate::tree::nodes::node::Node;

/// A process that lists a box this long after its last step looks at the box anew. A shorter time
/// may lie between two portions of a listing.
const ANEW: Duration = Duration::from_secs(2);

/// What one process did to one box. Its children do something else: a shell that was refused a
/// redirection runs programs that have nothing to do with it, and what one of them removed must not
/// be hidden from another.
struct HistoryEntry {
    /// The process.
    group: ProcessGroup,
    /// Its command line: a shell becomes its last program.
    command: Vec<String>,
    last: Instant,
    /// Names that it removed, by the inode of their directory. They are hidden from it alone.
    removed: HashMap<u64, BTreeSet<String>>,
    /// What it saw of the box: the snapshots that it removed after box.json, which are removed with
    /// the box or stay, and the disk that the box had when the process first read its export or began
    /// to remove it.
    seen: SeenBox,
    /// The snapshots that the box had then: id → name.
    snapshots: BTreeMap<String, String>,
    /// It is a program that copies, and has read the export. It lists the box once to copy it, and
    /// once more to remove it.
    has_copied: bool,
    /// It was not allowed to remove a file, and has not looked at the box anew since, however long
    /// ago that was.
    refused_removal: bool,
    /// When it was last refused to put something into the box.
    refused_copy: Option<Instant>,
    /// When it last began to edit box.json.
    edited: Option<Instant>,
}

impl HistoryEntry {
    fn begin(caller: Caller) -> HistoryEntry {
        HistoryEntry {
            group: ProcessGroup::begin(caller),
            command: caller.command_line(),
            last: Instant::now(),
            removed: HashMap::new(),
            seen: SeenBox::default(),
            snapshots: BTreeMap::new(),
            has_copied: false,
            refused_removal: false,
            refused_copy: None,
            edited: None,
        }
    }

    fn is_of(&self, caller: Caller) -> bool {
        self.group.has(caller) && self.command == caller.command_line()
    }

    /// Records the box as it is now, unless that was done before.
    fn see(&mut self, see: impl FnOnce() -> BoxNow) {
        if self.seen.disk.is_none() && self.snapshots.is_empty() {
            let now = see();
            self.seen.disk = now.disk;
            self.snapshots = now.snapshots;
        }
    }

    fn remove(&mut self, dir: &Node, name: &str) {
        self.last = Instant::now();
        self.removed
            .entry(dir.ino())
            .or_default()
            .insert(name.to_owned());
    }

    fn has_removed(&self, dir: &Node, name: &str) -> bool {
        let names = self.removed.get(&dir.ino());
        names.is_some_and(|names| names.contains(name))
    }

    fn has_removed_in(&self, dir: &Node) -> bool {
        let names = self.removed.get(&dir.ino());
        names.is_some_and(|names| !names.is_empty())
    }

    fn refuse_removal(&mut self) {
        self.last = Instant::now();
        self.refused_removal = true;
    }

    fn refuse_copy(&mut self) {
        self.last = Instant::now();
        self.refused_copy = Some(self.last);
    }
}

/// The entries of each box, by its id.
#[derive(Default)]
struct Entries(HashMap<String, Vec<HistoryEntry>>);

impl Entries {
    /// Drops the entries of processes that have ended.
    fn sweep(&mut self) {
        self.0.retain(|_, entries| {
            entries.retain(|entry| entry.group.any_alive());
            !entries.is_empty()
        });
    }

    /// Returns what the caller did to a box.
    fn of(&mut self, caller: Caller, box_id: &str) -> Option<&mut HistoryEntry> {
        if self.0.is_empty() {
            return None;
        }
        self.sweep();
        let entries = self.0.get_mut(box_id)?;
        entries.iter_mut().find(|entry| entry.is_of(caller))
    }

    /// Returns what the caller did to a box, in a new entry if it did nothing before.
    fn begin(&mut self, caller: Caller, box_id: &str) -> &mut HistoryEntry {
        self.sweep();
        let entries = self.0.entry(box_id.to_owned()).or_default();
        let index = entries.iter().position(|entry| entry.is_of(caller));
        let index = index.unwrap_or_else(|| {
            entries.push(HistoryEntry::begin(caller));
            entries.len() - 1
        });
        &mut entries[index]
    }

    fn end(&mut self, caller: Caller, box_id: &str) {
        if let Some(entries) = self.0.get_mut(box_id) {
            entries.retain_mut(|entry| !entry.is_of(caller));
        }
    }
}

/// What all processes did to all boxes.
#[derive(Default)]
pub struct CallerHistory {
    entries: Mutex<Entries>,
}

/// A box at the moment in which a process begins to read or to remove it.
pub struct BoxNow {
    /// Its live disk, if it has one.
    pub disk: Option<SeenDisk>,
    /// Its snapshots: id → name.
    pub snapshots: BTreeMap<String, String>,
}

/// What removing a snapshot means, after what its remover did before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotRemoval {
    /// The snapshot is deleted now.
    Now,
    /// The whole box is being removed: the snapshot goes with it.
    WithBox,
    /// The whole box is being removed, and the snapshot was taken or renamed since that began.
    Unseen,
    /// A file of the box could not be removed, so its snapshots stay.
    Refused,
}

impl CallerHistory {
    /// Returns whether any process did something to a box.
    pub fn has_entries_for(&self, box_id: &str) -> bool {
        let mut entries = self.entries.lock();
        if entries.0.is_empty() {
            return false;
        }
        entries.sweep();
        entries.0.contains_key(box_id)
    }

    /// Returns whether the caller removed a name, which all others still see.
    pub fn has_removed(&self, caller: Caller, dir: &Node, name: &str) -> bool {
        let Some(box_id) = dir.box_id() else {
            return false;
        };
        let mut entries = self.entries.lock();
        let entry = entries.of(caller, box_id);
        entry.is_some_and(|entry| entry.has_removed(dir, name))
    }

    /// Returns whether the caller removed any name in a directory of a box, and whether it removed
    /// this one.
    pub fn removed_in(&self, caller: Caller, dir: &Node, name: &str) -> (bool, bool) {
        let Some(box_id) = dir.box_id() else {
            return (false, false);
        };
        let mut entries = self.entries.lock();
        let entry = entries.of(caller, box_id);
        entry.map_or((false, false), |entry| {
            (entry.has_removed_in(dir), entry.has_removed(dir, name))
        })
    }

    /// Returns whether the caller goes on with a removal: it removed other names in the box, and was
    /// refused none.
    pub fn goes_on_removing(&self, caller: Caller, box_id: &str) -> bool {
        let mut entries = self.entries.lock();
        let entry = entries.of(caller, box_id);
        entry.is_some_and(|entry| !entry.refused_removal && !entry.removed.is_empty())
    }

    /// Records that the caller begins to read the export of a box, which it may remove next. Then
    /// only what it can have read goes. `see` is the box as it is now.
    pub fn read(&self, caller: Caller, box_id: &str, copies: bool, see: impl FnOnce() -> BoxNow) {
        let mut entries = self.entries.lock();
        let entry = entries.begin(caller, box_id);
        entry.see(see);
        entry.last = Instant::now();
        entry.has_copied |= copies;
    }

    /// Records that the caller removed a name. `see` is the box as it is now.
    pub fn remove(
        &self,
        caller: Caller,
        box_id: &str,
        (dir, name): (&Node, &str),
        see: impl FnOnce() -> BoxNow,
    ) {
        let mut entries = self.entries.lock();
        let entry = entries.begin(caller, box_id);
        entry.see(see);
        entry.remove(dir, name);
    }

    /// Records that the caller was refused the removal of a file: it must not get on to the
    /// snapshots.
    pub fn refuse_removal(&self, caller: Caller, box_id: &str) {
        self.entries.lock().begin(caller, box_id).refuse_removal();
    }

    /// Returns what it means that the caller removes a snapshot. Once the caller has removed
    /// `last_file` of the box, the snapshot goes with the box.
    pub fn removal_of_snapshot(
        &self,
        caller: Caller,
        box_id: &str,
        (snapshot, name): (&str, &str),
        last_file: &str,
    ) -> SnapshotRemoval {
        let mut entries = self.entries.lock();
        let Some(entry) = entries.of(caller, box_id) else {
            return SnapshotRemoval::Now;
        };
        if entry.refused_removal {
            // Counts as its last step: it may have more to remove.
            entry.refuse_removal();
            return SnapshotRemoval::Refused;
        }
        if !entry.has_removed(&Node::Box(box_id.to_owned()), last_file) {
            return SnapshotRemoval::Now;
        }
        if entry
            .snapshots
            .get(snapshot)
            .is_some_and(|then| then == name)
        {
            SnapshotRemoval::WithBox
        } else {
            SnapshotRemoval::Unseen
        }
    }

    /// Records that the caller removed a snapshot, which goes with the box.
    pub fn remove_with_box(&self, caller: Caller, box_id: &str, (snapshot, name): (&str, &str)) {
        let mut entries = self.entries.lock();
        let entry = entries.begin(caller, box_id);
        entry.remove(&Node::Snapshots(box_id.to_owned()), name);
        let snapshots = &mut entry.seen.snapshots;
        snapshots.insert(snapshot.to_owned(), name.to_owned());
    }

    /// Returns what the caller, who removes a box, saw of it.
    pub fn seen_by(&self, caller: Caller, box_id: &str) -> Option<SeenBox> {
        let mut entries = self.entries.lock();
        entries.of(caller, box_id).map(|entry| entry.seen.clone())
    }

    /// Records that the caller was refused to put something into a box. It may be copying a whole
    /// box over this one, in whatever order.
    pub fn refuse_copy(&self, caller: Caller, box_id: &str) {
        self.entries.lock().begin(caller, box_id).refuse_copy();
    }

    /// Returns whether the caller was refused to put something into a box, and has not looked at
    /// the box anew since.
    pub fn goes_on_copying(&self, caller: Caller, box_id: &str) -> bool {
        let mut entries = self.entries.lock();
        let entry = entries.of(caller, box_id);
        let Some(entry) = entry.filter(|entry| entry.refused_copy.is_some()) else {
            return false;
        };
        // Counts as its last step: it may have more to copy.
        entry.refuse_copy();
        true
    }

    /// Records that the caller begins to edit box.json. It may be copying a whole box over this one.
    pub fn note_edit(&self, caller: Caller, box_id: &str) {
        let mut entries = self.entries.lock();
        let entry = entries.begin(caller, box_id);
        entry.last = Instant::now();
        entry.edited = Some(entry.last);
    }

    /// Returns whether the caller edited box.json, and has not looked at the box anew since.
    pub fn has_edited(&self, caller: Caller, box_id: &str) -> bool {
        let mut entries = self.entries.lock();
        let entry = entries.of(caller, box_id);
        entry.is_some_and(|entry| entry.edited.is_some())
    }

    /// Returns whether one of these processes was refused to copy other files of a box over its own,
    /// or edited box.json, since then.
    pub fn tried_to_copy(&self, box_id: &str, group: &ProcessGroup, since: Instant) -> bool {
        let entries = self.entries.lock();
        let entries = entries.0.get(box_id).into_iter().flatten();
        let mut tried = entries.filter(|entry| {
            let last = entry.refused_copy.max(entry.edited);
            last.is_some_and(|at| at >= since)
        });
        tried.any(|entry| entry.group.shares_member(group))
    }

    /// Shows a name to all processes again.
    pub fn bring_back(&self, box_id: &str, dir: &Node, name: &str) {
        let mut entries = self.entries.lock();
        for entry in entries.0.get_mut(box_id).into_iter().flatten() {
            if let Some(names) = entry.removed.get_mut(&dir.ino()) {
                names.remove(name);
            }
        }
    }

    /// Records that the caller lists a box. If its last step was long ago, it begins anew and sees
    /// the whole box. Time alone does not do that: a process that was stopped half way continues
    /// where it was. Nor does it for a program that has copied the box: mv lists it again to remove it.
    pub fn note_listing(&self, caller: Caller, box_id: &str) {
        let mut entries = self.entries.lock();
        let is_anew = entries
            .of(caller, box_id)
            .is_some_and(|entry| !entry.has_copied && entry.last.elapsed() > ANEW);
        if is_anew {
            entries.end(caller, box_id);
        }
    }

    /// Cancels the removal of a box by the caller, after a step that no removal has. The caller
    /// sees the whole box again.
    pub fn cancel(&self, caller: Caller, box_id: &str) {
        self.entries.lock().end(caller, box_id);
    }

    /// Drops all that was done to a box: the box is gone.
    pub fn forget(&self, box_id: &str) {
        self.entries.lock().0.remove(box_id);
    }
}
