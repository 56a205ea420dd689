//! Symbolic links, rewritten so that they stay inside their file system.
//!
//! In a guest an absolute link begins at the guest's root, and `..` in the root is the root. In a
//! mount, the kernel would begin at the caller's root and go up beyond the mount point. So a target
//! is rewritten: an absolute target becomes as many `..` as lead to the root of the file system,
//! and each `..` that would go above it is left out. Targets that lead to the right file stay as
//! they are.
//!
//! This is right only if the way up from a directory is the way it was reached by. So a directory
//! may be entered only by the one name that its own `..` agrees with ([`is_entered_from`]), and
//! [`depth`] follows `..`, too. A link may have names in several directories, so its target depends
//! on where it is: [`LinkPlace`].

use super::block_reader::BlockReader;
use super::contents::read_link;
use super::directory::{Directory, is_entered_from, parent};
use super::inode::{FileKind, ROOT};
use crate::{Error, Result};
use std::ops::Range;

/// Deeper directories count as this deep: no target could lead to the root.
pub const DEEPEST: u16 = 4096;
/// The longest target that a link may have.
const MAX_WORDS: usize = 4095;
/// The most links that the kernel follows on one way.
const MAX_LINKS: usize = 40;
/// The most steps that are followed for one link.
const MAX_STEPS: usize = 2000;

/// Where a symbolic link is, as far as its target depends on that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkPlace {
    /// In any directory this many steps below the root.
    Depth(u16),
    /// In this directory.
    Directory(u32),
}

/// Returns where the link `inode` in `directory` is.
pub(super) fn place(blocks: &BlockReader, inode: u32, directory: u32) -> Result<LinkPlace> {
    let own = read_link(blocks, inode)?;
    let words = Words::of(&own);
    Ok(if words.turns_back() && !words.absolute {
        LinkPlace::Directory(directory)
    } else {
        LinkPlace::Depth(depth(blocks, directory)?)
    })
}

/// Returns the target of a link so that following it from `place` leads to where the guest would
/// get.
pub(super) fn target_within(blocks: &BlockReader, inode: u32, place: LinkPlace) -> Result<Vec<u8>> {
    let own = read_link(blocks, inode)?;
    let words = Words::of(&own);
    let within = match place {
        _ if words.absolute => {
            let depth = match place {
                LinkPlace::Depth(depth) => depth,
                LinkPlace::Directory(directory) => depth(blocks, directory)?,
            };
            let rest = if words.turns_back() {
                words.rebuilt(&steps_within(blocks, vec![ROOT], &words)?)
            } else {
                words.rest(0).to_vec()
            };
            from_root(depth, &rest)?
        }
        LinkPlace::Depth(depth) if !words.turns_back() => {
            if words.ups() <= usize::from(depth) {
                own
            } else {
                from_root(depth, words.rest(words.ups()))?
            }
        }
        LinkPlace::Depth(_) => {
            return Err(blocks.damaged(format_args!("link {inode} has changed")));
        }
        LinkPlace::Directory(directory) => {
            let kept = steps_within(blocks, way_to(blocks, directory)?, &words)?;
            if kept.len() == words.steps.len() {
                own
            } else {
                words.rebuilt(&kept)
            }
        }
    };
    if within.len() <= MAX_WORDS {
        Ok(within)
    } else {
        Err(too_long())
    }
}

/// Returns how many steps a directory is below the root, at most [`DEEPEST`].
pub(super) fn depth(blocks: &BlockReader, directory: u32) -> Result<u16> {
    let mut at = directory;
    for depth in 0..DEEPEST {
        if at == ROOT {
            return Ok(depth);
        }
        at = parent(blocks, at)?;
    }
    Ok(DEEPEST)
}

/// Returns the directories from the root to `directory`.
fn way_to(blocks: &BlockReader, directory: u32) -> Result<Vec<u32>> {
    let mut way = vec![directory];
    let mut at = directory;
    while at != ROOT {
        if way.len() > usize::from(DEEPEST) {
            return Err(too_long());
        }
        at = parent(blocks, at)?;
        way.push(at);
    }
    way.reverse();
    Ok(way)
}

/// Returns the steps of `words` without those that would go above the root. They begin in the last
/// directory of `way`.
fn steps_within<'w>(
    blocks: &BlockReader,
    way: Vec<u32>,
    words: &Words<'w>,
) -> Result<Vec<&'w [u8]>> {
    let mut walk = LinkWalk {
        blocks,
        way,
        lost: None,
        links: 0,
        steps: 0,
    };
    let last_up = words.steps.iter().rposition(|step| *step == b"..");
    let mut kept = Vec::new();
    for (index, step) in words.steps.iter().enumerate() {
        let is_kept = match *step {
            b".." => walk.up(),
            name => {
                // Nothing depends on where the steps after the last `..` lead.
                if last_up.is_some_and(|last| index < last) {
                    walk.enter(name)?;
                }
                true
            }
        };
        if is_kept {
            kept.push(*step);
        }
    }
    Ok(kept)
}

fn too_long() -> Error {
    let message = "a symbolic link's target would be longer than a path may be";
    Error::new(libc::ENAMETOOLONG, message)
}

/// Returns as many `..` as lead to the root, and then `rest`.
fn from_root(depth: u16, rest: &[u8]) -> Result<Vec<u8>> {
    if usize::from(depth) * 3 > MAX_WORDS {
        return Err(too_long());
    }
    let mut words = b"../".repeat(depth.into());
    words.extend(rest);
    if rest.is_empty() {
        words.pop();
    }
    if words.is_empty() {
        words.push(b'.');
    }
    Ok(words)
}

/// The target of a link, split into steps.
struct Words<'w> {
    own: &'w [u8],
    absolute: bool,
    /// Its steps, without empty ones and `.`.
    steps: Vec<&'w [u8]>,
    /// Where each of them is.
    places: Vec<Range<usize>>,
}

impl<'w> Words<'w> {
    fn of(own: &'w [u8]) -> Words<'w> {
        let (mut steps, mut places, mut at) = (Vec::new(), Vec::new(), 0);
        for step in own.split(|byte| *byte == b'/') {
            let place = at..at + step.len();
            at = place.end + 1;
            if !step.is_empty() && step != b"." {
                steps.push(step);
                places.push(place);
            }
        }
        Words {
            own,
            absolute: own.first() == Some(&b'/'),
            steps,
            places,
        }
    }

    /// Returns how many `..` it begins with.
    fn ups(&self) -> usize {
        self.steps.iter().take_while(|step| **step == b"..").count()
    }

    /// Returns whether a `..` follows a name: where it leads depends on the steps before it.
    fn turns_back(&self) -> bool {
        let begin = if self.absolute { 0 } else { self.ups() };
        let rest = self.steps.get(begin..).unwrap_or_default();
        rest.contains(&&b".."[..])
    }

    /// Returns the target from a step on, as it is.
    fn rest(&self, from: usize) -> &'w [u8] {
        let place = self.places.get(from);
        place
            .and_then(|place| self.own.get(place.start..))
            .unwrap_or_default()
    }

    /// Joins these steps to a target. A trailing slash stays.
    fn rebuilt(&self, steps: &[&[u8]]) -> Vec<u8> {
        let mut words = steps.join(&b'/');
        if !words.is_empty() && self.own.last() == Some(&b'/') {
            words.push(b'/');
        }
        if words.is_empty() && !self.absolute {
            words.push(b'.');
        }
        words
    }
}

/// A walk through directories, as the guest would take it.
struct LinkWalk<'a> {
    blocks: &'a BlockReader,
    /// The directories from the root to where it is.
    way: Vec<u32>,
    /// How far below the root the walk ran into nothing; the way ends there.
    lost: Option<usize>,
    links: usize,
    steps: usize,
}

impl LinkWalk<'_> {
    /// Goes up; false in the root.
    fn up(&mut self) -> bool {
        match &mut self.lost {
            Some(0) => false,
            Some(depth) => {
                *depth -= 1;
                true
            }
            None if self.way.len() > 1 => {
                self.way.pop();
                true
            }
            None => false,
        }
    }

    /// Enters a name, through all the links on the way.
    fn enter(&mut self, name: &[u8]) -> Result<()> {
        if let Some(depth) = &mut self.lost {
            *depth += 1;
            return Ok(());
        }
        let below = self.way.len();
        let mut left = vec![name.to_vec()];
        while let Some(step) = left.pop() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                let message = "a symbolic link leads through too many others";
                return Err(Error::new(libc::ELOOP, message));
            }
            if step == b".." {
                self.up();
            } else if !self.step(&step, &mut left)? {
                self.lost = Some(below);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Goes to one name; `left` gets the steps after it. False if it leads nowhere.
    fn step(&mut self, name: &[u8], left: &mut Vec<Vec<u8>>) -> Result<bool> {
        let here = self.way.last().copied().unwrap_or(ROOT);
        let Some(inode) = Directory::open(self.blocks, here)?.lookup(name)? else {
            return Ok(false);
        };
        match self.blocks.inode(inode)?.kind {
            FileKind::Directory => {
                let may_enter = is_entered_from(self.blocks, inode, here)?;
                if may_enter {
                    self.way.push(inode);
                }
                Ok(may_enter)
            }
            FileKind::Symlink => {
                self.links += 1;
                let target = read_link(self.blocks, inode)?;
                let words = Words::of(&target);
                if words.absolute {
                    self.way.truncate(1);
                }
                left.extend(words.steps.iter().rev().map(|step| step.to_vec()));
                Ok(self.links <= MAX_LINKS)
            }
            _ => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_taken_apart_at_slashes() {
        let words = |own: &'static str| Words::of(own.as_bytes());
        assert!(words("/").absolute && words("/").steps.is_empty());
        assert_eq!(words("./..//../a/./b/").ups(), 2);
        assert_eq!(words("./..//../a/./b/").rest(2), b"a/./b/");
        assert!(!words("../../a/b").turns_back());
        assert!(words("../a/../b").turns_back() && words("/../b").turns_back());
        assert!(!words("...").turns_back() && words("..").rest(1).is_empty());
    }

    #[test]
    fn the_way_from_the_root_begins_with_the_way_to_it() {
        let from = |depth, rest: &str| from_root(depth, rest.as_bytes()).unwrap();
        assert_eq!(from(0, "etc/passwd"), b"etc/passwd");
        assert_eq!(from(2, "etc/"), b"../../etc/");
        assert_eq!(from(2, ""), b"../..");
        assert_eq!(from(0, ""), b".");
        let errno = from_root(DEEPEST, b"").unwrap_err().errno();
        assert_eq!(errno, libc::ENAMETOOLONG);
    }
}
