//! What ext4-view, another reader, says of the same image.

use super::images::{ODD, debugfs, index_directories, mke2fs, tree};
use super::{FileKind, FileSystem, contents, open, resolve};
use ext4_view::{Ext4, PathBuf};
use std::collections::BTreeSet;

/// Reads the whole image, which is small.
fn view(image: &std::path::Path) -> Ext4 {
    Ext4::load(Box::new(std::fs::read(image).unwrap())).unwrap()
}

#[test]
#[ignore = "needs programs"]
fn another_reader_sees_the_same_files() {
    let tree = tree(1024);
    let image = mke2fs("96M", "-t ext4 -b 1024", Some(tree.path()));
    debugfs(&image.path, ODD);
    index_directories(&image.path);
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let view = view(&image.path);
    let mut left = vec![(FileSystem::ROOT, PathBuf::new("/"))];
    while let Some((inode, path)) = left.pop() {
        let said = fs.attributes(inode).unwrap();
        let Ok(meta) = view.symlink_metadata(&path) else {
            // It does not know times before 1970.
            assert!(said.modified.seconds < 0, "{path:?}");
            continue;
        };
        assert_eq!((said.size, said.permissions), (meta.len(), meta.mode()));
        assert_eq!((said.uid, said.gid), (meta.uid(), meta.gid()));
        match said.kind {
            FileKind::Directory => {
                let mut names = BTreeSet::new();
                for entry in view.read_dir(&path).unwrap() {
                    let entry = entry.unwrap();
                    let name = entry.file_name();
                    names.insert(name.as_ref().to_vec());
                    if name != "." && name != ".." {
                        let found = fs.lookup(inode, name.as_ref()).unwrap();
                        left.push((found.unwrap(), entry.path()));
                    }
                }
                // Two of them are of no interest here.
                assert_eq!(super::list(fs, inode, 1000).unwrap().len() + 2, names.len());
            }
            FileKind::Regular => assert!(view.read(&path).unwrap() == contents(fs, inode)),
            // It takes no longer names in targets.
            FileKind::Symlink if said.size <= 255 => {
                let target = view.read_link(&path).unwrap();
                assert_eq!(fs.read_link(inode).unwrap(), target.as_ref());
            }
            _ => {}
        }
    }
    assert_eq!(contents(fs, resolve(fs, "a/b/c/d/e/deep")).len(), 5000);
}
