//! Judged by the kernel, which mounts the same images, and by ext4-view.

mod damage;
mod images;
mod index;
mod kernel;
mod links;
mod partitions;
mod recovery;
mod view;
mod walk;

use super::*;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The chain that is one image.
fn chain(image: &Path) -> Arc<Chain> {
    let home = image.parent().unwrap();
    let owner = std::fs::metadata(home).unwrap().uid();
    Arc::new(Chain::open(image, home, owner).unwrap())
}

/// What is on an image.
fn open(image: &Path) -> Guest {
    Guest::open(chain(image), &Arc::default()).unwrap()
}

/// Names, with their inodes and kinds.
type Names = BTreeMap<Vec<u8>, (u32, Option<FileKind>)>;

/// The names in a directory, listed in portions of `portion`.
fn list(fs: &FileSystem, directory: u32, portion: usize) -> Result<Names> {
    let mut all = BTreeMap::new();
    let mut from = 0;
    loop {
        let mut count = 0;
        fs.list(directory, from, &mut |entry| {
            assert!(entry.next > from && entry.next >= 12);
            let twice = all.insert(entry.name.to_vec(), (entry.inode, entry.kind));
            assert!(twice.is_none(), "{:?} is listed twice", entry.name);
            from = entry.next;
            count += 1;
            if count == portion {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        if count < portion {
            return Ok(all);
        }
    }
}

/// The inode at a path.
fn resolve(fs: &FileSystem, path: &str) -> u32 {
    let names = path.split('/').filter(|name| !name.is_empty());
    names.fold(FileSystem::ROOT, |inode, name| {
        let found = fs.lookup(inode, name.as_bytes()).unwrap();
        found.unwrap_or_else(|| panic!("{path} is not there"))
    })
}

/// All of a file.
fn contents(fs: &FileSystem, inode: u32) -> Vec<u8> {
    let mut bytes = vec![0xaa; fs.attributes(inode).unwrap().size as usize];
    assert_eq!(fs.read_at(inode, 0, &mut bytes).unwrap(), bytes.len());
    bytes
}
