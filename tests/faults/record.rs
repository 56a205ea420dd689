//! A record of all calls on a disk, and the states that a power loss could leave.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;

use super::common::Dice;
use super::files::{Attributes, Files, Kind, Node, Number, pages};

/// A call that changed or flushed something.
#[derive(Clone, Debug)]
pub enum Done {
    /// A file, directory or symlink was made. A call that gives it a name follows.
    Make { number: Number, node: Node },
    /// Bytes were written to a file.
    Write {
        number: Number,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// The length of a file was changed.
    Resize { number: Number, length: u64 },
    /// Mode, owner or times were changed. A disk may write them at any time. This one writes them
    /// at once, because the contents of a home do not depend on them.
    Describe {
        number: Number,
        attributes: Attributes,
    },
    /// A directory got a name.
    Enter {
        directory: Number,
        name: OsString,
        number: Number,
    },
    /// A directory lost a name.
    Leave { directory: Number, name: OsString },
    /// A name was moved within or between directories, replacing the target, if any.
    Move {
        from: (Number, OsString),
        to: (Number, OsString),
        number: Number,
    },
    /// Two files exchanged their names.
    Exchange {
        one: (Number, OsString, Number),
        other: (Number, OsString, Number),
    },
    /// A file or directory was flushed, or the flush failed. After a failed flush, the contents may
    /// or may not be on the disk, and no later flush writes them: Linux marks those pages clean.
    /// Names are on the disk once a later flush succeeds: if a file system cannot write its
    /// journal, it shuts down and no flush succeeds any more.
    Flush { number: Number, succeeded: bool },
}

/// The part of the unflushed changes that survives a power loss.
#[derive(Clone, Debug)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// All names, but no contents.
    Names,
    /// All contents, but no names.
    Contents,
    /// Everything.
    All,
    /// Random pages of the contents, and of each directory the first few changes of names.
    Random(Dice),
}

/// Whether the disk obeys flushes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flushes {
    Count,
    /// Flushes succeed but do nothing. The tests must detect such a disk.
    AreLies,
}

/// Returns a state that a power loss after these calls could leave.
pub fn after_power_loss(
    before: &Files,
    calls: &[Done],
    left: &mut Left,
    flushes: Flushes,
) -> Files {
    let kept = Kept::choose(calls, left, flushes);
    let mut files = before.clone();
    let mut at_in: HashMap<Number, usize> = HashMap::new();
    for (index, call) in calls.iter().enumerate() {
        let mut names = |directory: Number| {
            let at = at_in.entry(directory).or_default();
            *at += 1;
            *at <= kept.names.get(&directory).copied().unwrap_or_default()
        };
        match call {
            Done::Make { number, node } => {
                files.nodes.insert(*number, node.clone());
            }
            Done::Describe { number, attributes } => {
                if let Some(node) = files.nodes.get_mut(number) {
                    node.attributes = attributes.clone();
                }
            }
            Done::Write {
                number,
                offset,
                bytes,
            } => {
                for (page, range) in pages(*offset, bytes.len() as u64).enumerate() {
                    if kept.contents.contains(&(index, page)) {
                        let part = (range.start - offset) as usize..(range.end - offset) as usize;
                        files.bytes_mut(*number).write(range.start, &bytes[part]);
                    }
                }
            }
            Done::Resize { number, length } => {
                if kept.contents.contains(&(index, 0)) {
                    files.bytes_mut(*number).set_len(*length);
                }
            }
            Done::Enter {
                directory,
                name,
                number,
            } => {
                if names(*directory) {
                    files.entries_mut(*directory).insert(name.clone(), *number);
                }
            }
            Done::Leave { directory, name } => {
                if names(*directory) {
                    files.entries_mut(*directory).remove(name);
                }
            }
            Done::Move { from, to, number } => {
                let moved = names(from.0);
                if to.0 != from.0 {
                    assert_eq!(names(to.0), moved, "half a rename");
                }
                if moved {
                    files.entries_mut(from.0).remove(&from.1);
                    files.entries_mut(to.0).insert(to.1.clone(), *number);
                }
            }
            Done::Exchange { one, other } => {
                let exchanged = names(one.0);
                if other.0 != one.0 {
                    assert_eq!(names(other.0), exchanged, "half an exchange");
                }
                if exchanged {
                    files.entries_mut(one.0).insert(one.1.clone(), other.2);
                    files.entries_mut(other.0).insert(other.1.clone(), one.2);
                }
            }
            Done::Flush { .. } => {}
        }
    }
    files
}

/// The changes that are on the disk after a power loss.
struct Kept {
    /// Changes of contents: the index of the call and, for a write, the index of the page in it.
    contents: HashSet<(usize, usize)>,
    /// For each directory, the number of its changes of names that are on the disk.
    names: HashMap<Number, usize>,
}

impl Kept {
    fn choose(calls: &[Done], left: &mut Left, flushes: Flushes) -> Kept {
        let mut contents = HashSet::new();
        // For each file, the changes since its last flush. `doubtful` are those whose flush failed.
        let mut pending: HashMap<Number, Vec<(usize, usize)>> = HashMap::new();
        let mut doubtful = Vec::new();
        let mut made: HashMap<Number, usize> = HashMap::new();
        let mut flushed: HashMap<Number, usize> = HashMap::new();
        // Calls that changed names in two directories, with their position among the changes of
        // each.
        let mut moves = Vec::new();
        for (index, call) in calls.iter().enumerate() {
            let mut count = |directory: Number| {
                let count = made.entry(directory).or_default();
                *count += 1;
                (directory, *count)
            };
            match call {
                Done::Write {
                    number,
                    offset,
                    bytes,
                } => {
                    let pages = pages(*offset, bytes.len() as u64).count();
                    let parts = (0..pages).map(|page| (index, page));
                    pending.entry(*number).or_default().extend(parts);
                }
                Done::Resize { number, .. } => {
                    pending.entry(*number).or_default().push((index, 0));
                }
                Done::Enter { directory, .. } | Done::Leave { directory, .. } => {
                    count(*directory);
                }
                Done::Move { from, to, .. } => {
                    let from_count = count(from.0);
                    if from.0 != to.0 {
                        moves.push((from_count, count(to.0)));
                    }
                }
                Done::Exchange { one, other } => {
                    let one_count = count(one.0);
                    if one.0 != other.0 {
                        moves.push((one_count, count(other.0)));
                    }
                }
                Done::Flush { .. } if flushes == Flushes::AreLies => {}
                Done::Flush { number, succeeded } => {
                    let parts = pending.remove(number).unwrap_or_default();
                    let names = made.get(number).copied().unwrap_or_default();
                    if *succeeded {
                        contents.extend(parts);
                        flushed.insert(*number, names);
                    } else {
                        doubtful.extend(parts);
                    }
                }
                Done::Make { .. } | Done::Describe { .. } => {}
            }
        }
        let mut unflushed: Vec<(usize, usize)> = pending.into_values().flatten().collect();
        unflushed.extend(doubtful);
        unflushed.sort_unstable();
        let mut directories: Vec<(Number, usize)> = made.into_iter().collect();
        directories.sort_unstable();
        let mut names = flushed;
        match left {
            Left::Nothing => {}
            Left::Names => names.extend(directories),
            Left::Contents => contents.extend(unflushed),
            Left::All => {
                names.extend(directories);
                contents.extend(unflushed);
            }
            Left::Random(dice) => {
                // Most files of a home are written by few calls, so vary how many of them survive.
                let often = 1 + dice.below(3);
                contents.extend(unflushed.into_iter().filter(|_| dice.below(4) < often));
                for (directory, all) in directories {
                    let least = names.get(&directory).copied().unwrap_or_default();
                    let more = dice.below((all - least) as u64 + 1) as usize;
                    names.insert(directory, least + more);
                }
            }
        }
        complete(&mut names, &moves);
        Kept { contents, names }
    }
}

/// A directory, and the position of a change among its changes.
type Place = (Number, usize);

/// Completes renames: one that is kept in one of its directories is kept in both.
fn complete(names: &mut HashMap<Number, usize>, moves: &[(Place, Place)]) {
    loop {
        let mut is_complete = true;
        for (from, to) in moves {
            let mut has = |place: &Place| *names.entry(place.0).or_default() >= place.1;
            let lacking = match (has(from), has(to)) {
                (true, false) => to,
                (false, true) => from,
                _ => continue,
            };
            names.insert(lacking.0, lacking.1);
            is_complete = false;
        }
        if is_complete {
            return;
        }
    }
}

/// Makes a node with one name.
pub fn empty(kind: Kind, attributes: Attributes) -> Node {
    Node {
        kind,
        attributes,
        names: 1,
    }
}
