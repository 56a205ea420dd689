//! What a stranger does wrong with the commands: each error names the object, says why and what to do
//! instead.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::common::*;

/// Runs a command in the home's directory, which must fail; returns its message.
fn refused(home: &TestHome, line: &str) -> String {
    let words = line.split(' ');
    let output = Command::new(binary())
        .args(words)
        .current_dir(home.beside(""))
        .env_remove("BOXLITE_HOME")
        .output()
        .unwrap();
    assert!(!output.status.success(), "{line}: {output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("boxlitefs: ") && said.lines().count() == 1,
        "{line}: {said}"
    );
    said
}

#[test]
fn a_wrong_place_is_named_with_the_reason_and_the_remedy() {
    let home = TestHome::new();
    fs::write(home.beside("file"), "text").unwrap();
    for name in ["empty", "full", "cut", "cut/db"] {
        fs::create_dir(home.beside(name)).unwrap();
    }
    fs::write(home.beside("full/notes"), "text").unwrap();
    fs::write(home.beside("cut/db/boxlite.db"), "").unwrap();
    for (line, reason, remedy) in [
        ("mount none mnt", "no BoxLite home at none", "name another"),
        (
            "mount file mnt",
            "file is not a directory",
            "name the directory",
        ),
        ("mount empty mnt", "it is empty", "`boxlitefs init "),
        (
            "mount full mnt",
            "has no db/boxlite.db",
            "name the directory",
        ),
        (
            "mount cut mnt",
            "is empty, or none of BoxLite's",
            "put a backup in its place",
        ),
        ("mount home none", "mountpoint none does not exist", "mkdir"),
        (
            "mount home file",
            "mountpoint file is not a directory",
            "name an empty directory",
        ),
        (
            "mount home home/tmp",
            "lies inside the BoxLite home",
            "name a directory outside",
        ),
        (
            "mount -o bogus home mnt",
            "\"bogus\" is not known",
            "known are ro, ",
        ),
        (
            "mount -o compress=fast home mnt",
            "\"compress=fast\"",
            "needs a level of zstd, from 1",
        ),
        (
            "mount -o undo=soon home mnt",
            "\"undo=soon\"",
            "needs a time such as 30m",
        ),
        (
            "mount -o cache=-1 home mnt",
            "\"cache=-1\"",
            "needs a size in bytes",
        ),
        (
            "unmount none",
            "none does not exist",
            "`findmnt -t fuse.boxlite` lists",
        ),
        (
            "unmount --dead none",
            "none does not exist",
            "`findmnt -t fuse.boxlite` lists",
        ),
        (
            "unmount empty",
            "nothing is mounted on empty",
            "`findmnt -t fuse.boxlite` lists",
        ),
        ("check none", "no BoxLite home at none", "name another"),
        ("check full", "has no db/boxlite.db", "name the directory"),
        (
            "check cut",
            "is empty, or none of BoxLite's",
            "put a backup in its place",
        ),
        ("ls file", "file is not a directory", "name the directory"),
        (
            "du cut",
            "is empty, or none of BoxLite's",
            "put a backup in its place",
        ),
        ("compact empty", "it is empty", "`boxlitefs init "),
        (
            "status empty",
            "is not mounted on empty",
            "`findmnt -t fuse.boxlite` lists",
        ),
        (
            "status none",
            "none, which does not exist",
            "`findmnt -t fuse.boxlite` lists",
        ),
        (
            "status home",
            "is not mounted on home",
            "`findmnt -t fuse.boxlite` lists",
        ),
        (
            "why none",
            "none, which does not exist",
            "`findmnt -t fuse.boxlite` lists",
        ),
        (
            "why empty",
            "is not mounted on empty",
            "`findmnt -t fuse.boxlite` lists",
        ),
        (
            "init file",
            "file is not a directory",
            "name an empty directory",
        ),
        ("init full", "full is not empty", "name an empty directory"),
        ("init none/home", "none does not exist", "`mkdir -p none`"),
        (
            "prune --keep-last 1 --home home api",
            "there is no box api",
            "`boxlitefs ls`",
        ),
    ] {
        let said = refused(&home, line);
        assert!(
            said.contains(reason) && said.contains(remedy),
            "{line}: {said}"
        );
    }
    home.assert_whole();
}

#[test]
fn a_mount_on_a_mount_is_refused_with_the_home_that_is_there() {
    let home = TestHome::new();
    let mount = home.mount();
    let said = refused(&home, "mount home mnt");
    assert!(
        said.contains(&format!("with the home {}", text(home.root()))),
        "{said}"
    );
    // What is in it is neither a home nor a mountpoint.
    for (line, remedy) in [
        ("ls mnt/web", "name that"),
        ("du mnt/web/snapshots", "name that"),
        ("check mnt/.boxlite", "name that"),
        (
            "prune --keep-last 1 mnt/web/snapshots",
            "name a directory in",
        ),
        ("prune --keep-last 1 mnt", "name a directory in"),
    ] {
        let said = refused(&home, line);
        assert!(
            said.contains(text(mount.root())) && said.contains(remedy),
            "{line}: {said}"
        );
    }
    // Any place in it, and the home itself, lead to it.
    for place in [mount.at("web/snapshots"), home.root().to_owned()] {
        let status = succeed(&[binary(), "status", "--json", text(&place)]);
        assert!(status.contains(text(mount.root())), "{status}");
    }
}

#[test]
fn what_a_mount_hides_is_told_and_comes_back() {
    let home = TestHome::new();
    let place = home.beside("full");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("notes"), "text").unwrap();
    let mounted = run(&[binary(), "mount", text(home.root()), text(&place)]);
    assert!(mounted.status.success(), "{mounted:?}");
    let said = String::from_utf8(mounted.stderr).unwrap();
    assert!(
        said.contains("full is not empty: what is in it is hidden until"),
        "{said}"
    );
    assert!(!place.join("notes").exists());
    unmount(&place);
    assert!(place.join("notes").exists());
}

#[test]
fn the_home_and_the_mount_of_another_user_are_called_so() {
    let home = TestHome::new();
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(home.beside(""), open.clone()).unwrap();
    let program = home.beside("boxlitefs");
    fs::copy(binary(), &program).unwrap();
    let as_user = |command: &str, place: &str| {
        let output = run_as_nobody(&[text(&program), command, place]);
        assert!(!output.status.success(), "{command}: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let root = text(home.root());
    let mount = home.mount();
    let place = text(mount.root());
    for mode in [0o700, 0o755] {
        // Our own directory in the home is never open to others.
        fs::set_permissions(home.root(), fs::Permissions::from_mode(mode)).unwrap();
        for command in ["ls", "du", "check"] {
            for of in [root, place] {
                let said = as_user(command, of);
                assert!(
                    said.contains("which belongs to uid 0: run the command as"),
                    "{said}"
                );
            }
        }
    }
    for command in ["status", "why"] {
        let said = as_user(command, place);
        assert!(said.contains("belongs to another user"), "{said}");
    }
    let said = as_user("unmount", place);
    assert!(
        said.contains("another user has mounted") && said.contains("`sudo "),
        "{said}"
    );
    assert!(mount.at("web").is_dir());
}
