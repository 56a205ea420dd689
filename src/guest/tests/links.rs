//! Where links lead: what `readlink` says is walked as a kernel outside of the guest would.

use super::images::{Image, debugfs, mke2fs};
use super::{FileKind, FileSystem, LinkPlace, open, resolve};
use crate::disk::judges::Numbers;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// What a walk comes to: a file, or an error.
type End = Result<u32, i32>;

/// Walks as the guest would (`outside` is false), or as a program in a mount, to which `..` from
/// the root leads out.
struct Walker<'a> {
    fs: &'a FileSystem,
    outside: bool,
    links: usize,
}

impl Walker<'_> {
    fn go(&mut self, way: &mut Vec<u32>, path: &[u8]) -> End {
        if path.first() == Some(&b'/') {
            assert!(!self.outside, "an absolute target");
            way.truncate(1);
        }
        let steps: Vec<&[u8]> = path
            .split(|b| *b == b'/')
            .filter(|s| !s.is_empty())
            .collect();
        let mut end = *way.last().unwrap();
        for (index, step) in steps.iter().enumerate() {
            end = self.step(way, step, index + 1 == steps.len())?;
        }
        Ok(end)
    }

    fn step(&mut self, way: &mut Vec<u32>, step: &[u8], is_last: bool) -> End {
        let here = *way.last().unwrap();
        if step == b"." {
            return Ok(here);
        }
        if step == b".." {
            assert!(!self.outside || way.len() > 1, "it leads out");
            if way.len() > 1 {
                way.pop();
            }
            return Ok(*way.last().unwrap());
        }
        let inode = self.fs.lookup(here, step).unwrap().ok_or(libc::ENOENT)?;
        match self.fs.attributes(inode).unwrap().kind {
            FileKind::Directory => {
                way.push(inode);
                Ok(inode)
            }
            FileKind::Symlink => {
                self.links += 1;
                if self.links > 40 {
                    return Err(libc::ELOOP);
                }
                let target = if self.outside {
                    let place = self.fs.link_place(inode, here).unwrap();
                    self.fs.link_within(inode, place).unwrap()
                } else {
                    self.fs.read_link(inode).unwrap()
                };
                let end = self.go(way, &target)?;
                let is_directory = *way.last().unwrap() == end;
                if is_last || is_directory {
                    Ok(end)
                } else {
                    Err(libc::ENOTDIR)
                }
            }
            _ if is_last => Ok(inode),
            _ => Err(libc::ENOTDIR),
        }
    }
}

/// Every link of an image leads to the same from inside and from outside.
fn assert_same_ends(image: &Image) {
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let mut left = vec![vec![FileSystem::ROOT]];
    let (mut links, mut good) = (0, 0);
    while let Some(way) = left.pop() {
        let here = *way.last().unwrap();
        assert_eq!(usize::from(fs.depth(here).unwrap()) + 1, way.len());
        for (name, (inode, kind)) in super::list(fs, here, 1000).unwrap() {
            if kind == Some(FileKind::Directory) {
                assert!(fs.is_entered_from(inode, here).unwrap());
                left.push([&way[..], &[inode]].concat());
            }
            if kind != Some(FileKind::Symlink) {
                continue;
            }
            let end = |outside| {
                let mut walker = Walker {
                    fs,
                    outside,
                    links: 0,
                };
                walker.step(&mut way.clone(), &name, true)
            };
            let inside = end(false);
            assert_eq!(end(true), inside, "{:?}", String::from_utf8_lossy(&name));
            links += 1;
            good += usize::from(inside.is_ok());
        }
    }
    assert!(links > 20 && good > links / 8, "{good} of {links}");
}

/// A tree of directories with links to anywhere, in and above it.
fn random_links(root: &Path, seed: u64, count: usize) {
    let mut numbers = Numbers(seed);
    let directories = ["", "a", "a/b", "a/b/c", "d", "d/b"];
    for directory in directories {
        fs::create_dir_all(root.join(directory)).unwrap();
        fs::write(root.join(directory).join("file"), "x").unwrap();
    }
    for number in 0..count {
        let steps = 1 + numbers.below(6);
        let mut target = match numbers.below(3) {
            0 => "/".to_owned(),
            _ => String::new(),
        };
        for step in 0..steps {
            let link = format!("l{}", numbers.below(count as u64));
            let name = ["..", "..", "..", "a", "b", "c", "d", "file", ".", "", &link];
            if step > 0 {
                target.push('/');
            }
            target += name[numbers.below(name.len() as u64) as usize];
        }
        if target.is_empty() {
            target.push('.');
        }
        let directory = directories[numbers.below(directories.len() as u64) as usize];
        symlink(target, root.join(directory).join(format!("l{number}"))).unwrap();
        // So that further links find it.
        if numbers.below(3) == 0 {
            let (from, to) = (format!("l{number}"), format!("a/l{number}"));
            let _ = fs::hard_link(root.join(directory).join(from), root.join(to));
        }
    }
}

#[test]
#[ignore = "needs programs"]
fn links_to_anywhere_lead_to_the_same_file_and_never_out() {
    for seed in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        random_links(dir.path(), seed, 150);
        let image = mke2fs("4M", "-t ext4 -b 1024 -N 1000", Some(dir.path()));
        assert_same_ends(&image);
    }
}

/// What a link in the directory at `path` is shown to say.
fn shown(fs: &FileSystem, directory: &str, name: &str) -> String {
    let directory = resolve(fs, directory);
    let link = fs.lookup(directory, name.as_bytes()).unwrap().unwrap();
    let place = fs.link_place(link, directory).unwrap();
    String::from_utf8(fs.link_within(link, place).unwrap()).unwrap()
}

#[test]
#[ignore = "needs programs"]
fn what_needs_no_other_words_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b")).unwrap();
    symlink("b", at("a/by another way")).unwrap();
    let long = "t/".repeat(2000);
    let absolute = format!("/{}", "t".repeat(200));
    for (directory, target, words) in [
        ("a/b", "x//y/./z/", "x//y/./z/"),
        ("a/b", "../../etc/passwd", "../../etc/passwd"),
        ("a/b", "../../../etc/passwd", "../../etc/passwd"),
        ("a/b", "/etc/passwd", "../../etc/passwd"),
        ("a/b", "//etc//passwd/", "../../etc//passwd/"),
        ("a/b", "/", "../.."),
        ("a/b", "/..", "../.."),
        ("a/b", "/../proc/self/root", "../../proc/self/root"),
        ("a/b", "../b/../../x", "../b/../../x"),
        ("a/b", "../b/../../../x", "../b/../../x"),
        ("a", "by another way/../..", "by another way/../.."),
        ("a", "by another way/../../..", "by another way/../.."),
        ("a", "none/../../../../x/", "none/../../x/"),
        ("", "/", "."),
        ("", "..", "."),
        ("", "../..", "."),
        ("", "../x", "x"),
        ("", "/x", "x"),
        ("", "x", "x"),
        ("a", &long, &long),
        ("a", &absolute, &format!("..{absolute}")),
    ] {
        let link = at(directory).join("link");
        symlink(target, &link).unwrap();
        let image = mke2fs("4M", "-t ext4 -b 4096", Some(dir.path()));
        let guest = open(&image.path);
        let fs = guest.file_system().unwrap();
        assert_eq!(shown(fs, directory, "link"), words, "{directory} {target}");
        fs::remove_file(link).unwrap();
    }
}

#[test]
#[ignore = "needs programs"]
fn words_that_would_be_too_long_are_an_error_and_never_cut() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("a")).unwrap();
    symlink(
        "/".to_owned() + &"t/".repeat(2047),
        dir.path().join("a/link"),
    )
    .unwrap();
    let image = mke2fs("4M", "-t ext4 -b 4096", Some(dir.path()));
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    let link = resolve(fs, "a/link");
    assert_eq!(fs.read_link(link).unwrap().len(), 4095);
    let error = fs.link_within(link, LinkPlace::Depth(1)).unwrap_err();
    assert_eq!(error.errno(), libc::ENAMETOOLONG);
    assert!(fs.link_within(link, LinkPlace::Depth(0)).is_ok());
}

#[test]
#[ignore = "needs programs"]
fn a_directory_is_entered_only_from_where_its_way_up_leads() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b/c/deep")).unwrap();
    fs::create_dir(dir.path().join("other")).unwrap();
    for options in ["-t ext4 -b 1024", "-t ext4 -b 1024 -O inline_data"] {
        let image = mke2fs("4M", options, Some(dir.path()));
        debugfs(
            &image.path,
            &["link a/b/c/deep deep", "link / a/root", "link a a/b/c/up"],
        );
        let guest = open(&image.path);
        let fs = guest.file_system().unwrap();
        let entered = |from: &str, name: &str| {
            let from = resolve(fs, from);
            let child = fs.lookup(from, name.as_bytes()).unwrap().unwrap();
            fs.is_entered_from(child, from).unwrap()
        };
        assert!(entered("", "a") && entered("a/b/c", "deep") && entered("", "other"));
        assert!(!entered("", "deep") && !entered("a", "root") && !entered("a/b/c", "up"));
    }
}

#[test]
#[ignore = "needs programs"]
fn a_loop_of_links_ends() {
    let dir = tempfile::tempdir().unwrap();
    symlink("second/../x/..", dir.path().join("first")).unwrap();
    symlink("first/../x/..", dir.path().join("second")).unwrap();
    symlink("itself/..", dir.path().join("itself")).unwrap();
    let image = mke2fs("4M", "-t ext4 -b 1024", Some(dir.path()));
    let guest = open(&image.path);
    let fs = guest.file_system().unwrap();
    for name in ["first", "second", "itself"] {
        assert!(!shown(fs, "", name).contains("../../"), "{name}");
    }
}
