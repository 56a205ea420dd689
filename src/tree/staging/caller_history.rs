//! What processes did to boxes that exist, name by name: a box is removed file by file, and only the
//! last step shows that all of it is meant.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::store::Gone;
use crate::tree::nodes::node::Node;
use crate::tree::staging::caller::{Caller, Makers};

/// A process that lists a box so long after it last did something to it looks at it anew; a
/// shorter time may lie between two portions of a listing.
const ANEW: Duration = Duration::from_secs(2);

/// What one process and its descendants did to one box.
pub(in crate::tree) struct Dealing {
    makers: Makers,
    last: Instant,
    /// Names it removed, by the inode of their directory: gone for it alone.
    removed: HashMap<u64, BTreeSet<String>>,
    /// What goes with the box: the snapshots it removed after box.json, which go so or not at all, and the disk
    /// that was there when it began.
    pub gone: Gone,
    refused_removal: bool,
    refused_copy: Option<Instant>,
}

impl Dealing {
    fn begin(caller: Caller) -> Dealing {
        Dealing {
            makers: Makers::begin(caller),
            last: Instant::now(),
            removed: HashMap::new(),
            gone: Gone::default(),
            refused_removal: false,
            refused_copy: None,
        }
    }

    fn is_over(&self) -> bool {
        !self.makers.any_alive()
    }

    /// It removed a name.
    pub fn remove(&mut self, dir: &Node, name: &str) {
        self.last = Instant::now();
        self.removed
            .entry(dir.ino())
            .or_default()
            .insert(name.to_owned());
    }

    /// Whether it removed a name.
    pub fn has_removed(&self, dir: &Node, name: &str) -> bool {
        let names = self.removed.get(&dir.ino());
        names.is_some_and(|names| names.contains(name))
    }

    /// Whether it removed any name in a directory.
    pub fn has_removed_in(&self, dir: &Node) -> bool {
        let names = self.removed.get(&dir.ino());
        names.is_some_and(|names| !names.is_empty())
    }

    /// It was not allowed to remove a file: it is not to get on to the snapshots.
    pub fn removal_was_refused(&mut self) {
        self.last = Instant::now();
        self.refused_removal = true;
    }

    /// Whether that is so, and it has not looked at the box anew since, however long ago it was.
    pub fn goes_on_removing(&self) -> bool {
        self.refused_removal
    }

    /// It tried to put something into the box that can't be put there: it may be copying a whole box over
    /// this one, in whatever order.
    pub fn copying_was_refused(&mut self) {
        self.last = Instant::now();
        self.refused_copy = Some(self.last);
    }

    /// Whether that is so, and it has not looked at the box anew since.
    pub fn goes_on_copying(&self) -> bool {
        self.refused_copy.is_some()
    }
}

/// What all processes did to all boxes.
#[derive(Default)]
pub(in crate::tree) struct Dealings {
    of_box: HashMap<String, Vec<Dealing>>,
}

impl Dealings {
    fn sweep(&mut self) {
        self.of_box.retain(|_, dealings| {
            dealings.retain(|dealing| !dealing.is_over());
            !dealings.is_empty()
        });
    }

    /// Whether anybody did anything to a box.
    pub fn concern(&mut self, box_id: &str) -> bool {
        if self.of_box.is_empty() {
            return false;
        }
        self.sweep();
        self.of_box.contains_key(box_id)
    }

    /// What the caller did to a box, if he did anything.
    pub fn of(&mut self, caller: Caller, box_id: &str) -> Option<&mut Dealing> {
        if self.of_box.is_empty() {
            return None;
        }
        self.sweep();
        let dealings = self.of_box.get_mut(box_id)?;
        dealings
            .iter_mut()
            .find_map(|dealing| dealing.makers.includes(caller).then_some(dealing))
    }

    /// Whether one of these processes tried to copy other files of a box over its own since then.
    pub fn tried_to_copy(&self, box_id: &str, makers: &Makers, since: Instant) -> bool {
        let dealings = self.of_box.get(box_id).into_iter().flatten();
        let mut tried =
            dealings.filter(|dealing| dealing.refused_copy.is_some_and(|at| at >= since));
        tried.any(|dealing| dealing.makers.share(makers))
    }

    /// Likewise; from now on he did something.
    pub fn begin(&mut self, caller: Caller, box_id: &str) -> &mut Dealing {
        self.sweep();
        let dealings = self.of_box.entry(box_id.to_owned()).or_default();
        let index = dealings
            .iter_mut()
            .position(|dealing| dealing.makers.includes(caller));
        let index = index.unwrap_or_else(|| {
            dealings.push(Dealing::begin(caller));
            dealings.len() - 1
        });
        &mut dealings[index]
    }

    /// A name is there again, for all.
    pub fn bring_back(&mut self, box_id: &str, dir: &Node, name: &str) {
        for dealing in self.of_box.get_mut(box_id).into_iter().flatten() {
            if let Some(names) = dealing.removed.get_mut(&dir.ino()) {
                names.remove(name);
            }
        }
    }

    /// The caller lists a box: after a while, that is a new beginning, and it sees the box whole. No time
    /// alone makes one: a process that was stopped half way goes on where it was.
    pub fn look(&mut self, caller: Caller, box_id: &str) {
        let is_anew = self
            .of(caller, box_id)
            .is_some_and(|dealing| dealing.last.elapsed() > ANEW);
        if is_anew && let Some(dealings) = self.of_box.get_mut(box_id) {
            dealings.retain_mut(|dealing| !dealing.makers.includes(caller));
        }
    }

    /// The caller does something to a box that nobody does who removes it: it sees the box whole again.
    pub fn end(&mut self, caller: Caller, box_id: &str) {
        if let Some(dealings) = self.of_box.get_mut(box_id) {
            dealings.retain_mut(|dealing| !dealing.makers.includes(caller));
        }
    }

    /// The box is gone.
    pub fn forget(&mut self, box_id: &str) {
        self.of_box.remove(box_id);
    }
}
