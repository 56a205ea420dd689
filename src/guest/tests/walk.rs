//! A walk through everything that a guest's disk has, which checks that the answers agree. The
//! tests of damaged images use it, and so does the fuzz target.

use super::{FileKind, FileSystem, Guest};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

/// Runs of a file that are looked at.
const RUNS: usize = 40;
/// Bytes of a file that are compared.
const COMPARED: usize = 80 << 10;

/// How much of one file system is looked at.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Files.
    pub files: usize,
    /// Names in one directory.
    pub names: usize,
    /// Bytes of a directory: in larger ones nothing is looked up.
    pub searched: u64,
}

/// Asks for everything that is on a disk.
pub fn look_at(guest: &Guest, limits: Limits) {
    if let Some(fs) = guest.file_system() {
        walk(fs, limits);
    }
    assert!(guest.partitions().len() <= 256);
    for partition in guest.partitions().iter().take(8) {
        assert!(guest.partition(partition.number()).is_some());
        if let Ok(fs) = partition.file_system() {
            walk(fs, limits);
        }
    }
}

/// Asks for everything in a file system, as far as it goes.
fn walk(fs: &FileSystem, limits: Limits) {
    // With the directories from the root to each, if it may be entered from there.
    let mut left = vec![(FileSystem::ROOT, vec![FileSystem::ROOT])];
    let mut seen = BTreeSet::from([FileSystem::ROOT]);
    while let Some((inode, way)) = left.pop() {
        for inode in names_in(fs, inode, limits) {
            let mut below = way.clone();
            if !way.is_empty() && step_into(fs, &mut below, inode, &mut 40).is_none() {
                below.clear();
            }
            if seen.len() < limits.files && seen.insert(inode) {
                left.push((inode, below));
            }
        }
        attributes_of(fs, inode);
        match fs.attributes(inode).map(|attributes| attributes.kind) {
            Ok(FileKind::Symlink) => {
                if let Ok(target) = fs.read_link(inode) {
                    assert!(!target.is_empty() && target.len() <= 4096 && !target.contains(&0));
                }
            }
            Ok(FileKind::Regular) => contents_of(fs, inode),
            _ => {}
        }
    }
}

/// Enters a file as a program in a mount would, which no link may lead outside. None if the way
/// ends here.
fn step_into(fs: &FileSystem, way: &mut Vec<u32>, inode: u32, left: &mut u32) -> Option<()> {
    let here = *way.last()?;
    match fs.attributes(inode).ok()?.kind {
        FileKind::Directory if fs.is_entered_from(inode, here).ok()? => way.push(inode),
        FileKind::Symlink => {
            *left = left.checked_sub(1)?;
            let place = fs.link_place(inode, here).ok()?;
            let words = fs.link_within(inode, place).ok()?;
            assert!(!words.is_empty() && words[0] != b'/' && words.len() < 4096);
            for step in words.split(|byte| *byte == b'/') {
                match step {
                    b"" | b"." => {}
                    b".." => {
                        way.pop();
                        assert!(!way.is_empty(), "link {inode} leads out");
                    }
                    name => {
                        let next = fs.lookup(*way.last()?, name).ok()??;
                        step_into(fs, way, next, left)?;
                    }
                }
            }
        }
        _ => return None,
    }
    Some(())
}

fn attributes_of(fs: &FileSystem, inode: u32) {
    for name in fs.xattr_names(inode).unwrap_or_default() {
        if let Ok(value) = fs.xattr(inode, &name) {
            assert!(value.is_some(), "an attribute is listed and not there");
        }
    }
    let _ = fs.xattr(inode, b"user.none");
}

/// The inodes of the names in a directory, which are listed as a whole, in portions and looked up.
fn names_in(fs: &FileSystem, directory: u32, limits: Limits) -> BTreeSet<u32> {
    let mut names: BTreeMap<Vec<u8>, BTreeSet<u32>> = BTreeMap::new();
    let (mut whole, mut count) = (Vec::new(), 0);
    let listed = fs.list(directory, 0, &mut |entry| {
        assert!(!entry.name.is_empty() && !entry.name.iter().any(|b| matches!(b, 0 | b'/')));
        assert!(entry.next >= 12);
        whole.push((entry.next, entry.inode));
        names
            .entry(entry.name.to_vec())
            .or_default()
            .insert(entry.inode);
        count += 1;
        if count < limits.names {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    if listed.is_ok() && count < limits.names {
        assert_eq!(in_portions(fs, directory), whole);
    }
    let small = |size| size <= limits.searched;
    if fs.attributes(directory).is_ok_and(|said| small(said.size)) {
        let _ = fs.lookup(directory, b"no such name");
        for (name, inodes) in names.iter().take(10) {
            let found = fs.lookup(directory, name);
            if listed.is_ok() && count < limits.names {
                let found = found.unwrap().expect("a name is listed and not found");
                assert!(inodes.contains(&found));
            }
        }
    }
    whole.into_iter().map(|(_, inode)| inode).collect()
}

fn in_portions(fs: &FileSystem, directory: u32) -> Vec<(u64, u32)> {
    let (mut all, mut from) = (Vec::new(), 0);
    loop {
        let mut count = 0;
        let listed = fs.list(directory, from, &mut |entry| {
            assert!(entry.next > from);
            from = entry.next;
            all.push((entry.next, entry.inode));
            count += 1;
            if count < 7 {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        listed.unwrap();
        if count < 7 {
            return all;
        }
    }
}

/// The contents of a file, read at once and in pieces, and where its holes are.
fn contents_of(fs: &FileSystem, inode: u32) {
    let Ok(said) = fs.attributes(inode) else {
        return;
    };
    let mut some = [0; 3000];
    for at in [said.size / 2, said.size.saturating_sub(5), u64::MAX] {
        let _ = fs.read_at(inode, at, &mut some);
    }
    let mut whole = vec![0x55; COMPARED];
    let Ok(len) = fs.read_at(inode, 0, &mut whole) else {
        holes(fs, inode, &[]);
        return;
    };
    assert_eq!(len as u64, said.size.min(COMPARED as u64));
    whole.truncate(len);
    for (at, part) in (0..).step_by(some.len()).zip(whole.chunks(some.len())) {
        // No further than what was read before: behind that there may be damage.
        let some = &mut some[..part.len()];
        assert_eq!(fs.read_at(inode, at, some).unwrap(), part.len());
        assert!(some == part, "two reads differ");
    }
    holes(fs, inode, &whole);
}

/// What is called a hole has to be zeros, in `begin`, which the file begins with.
fn holes(fs: &FileSystem, inode: u32, begin: &[u8]) {
    let within = |at: u64| at.min(begin.len() as u64) as usize;
    let mut at = 0;
    for _ in 0..RUNS {
        let Ok(data) = fs.next_data(inode, at) else {
            return;
        };
        let hole = &begin[within(at)..within(data.unwrap_or(u64::MAX))];
        assert!(are_zeros(hole), "data in a hole");
        let Some(data) = data else {
            return;
        };
        let Ok(hole) = fs.next_hole(inode, data) else {
            return;
        };
        let hole = hole.expect("data ends with a hole, the end of the file at the latest");
        assert!(at <= data && data < hole);
        at = hole;
    }
}

/// Returns whether all of `bytes` are zeros. It compares many at once: byte by byte, a fuzzer would
/// be told of each.
fn are_zeros(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(4096).all(|some| *some == ZEROS[..some.len()])
}
