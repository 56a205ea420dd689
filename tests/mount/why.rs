//! `boxlitefs why` explains a refusal to the user it concerned, and to no other.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::*;

/// Returns what `boxlitefs why --json` says to root.
fn why(arguments: &[&str]) -> Vec<Value> {
    let mut command = vec![binary(), "why", "--json"];
    command.extend(arguments);
    serde_json::from_str(&succeed(&command)).expect("JSON")
}

/// Returns operation, path and errno of each refusal.
fn shown(refusals: &[Value]) -> Vec<String> {
    let text = |refusal: &Value, name: &str| refusal[name].as_str().unwrap().to_owned();
    let refusals = refusals.iter().map(|it| {
        let parts = ["operation", "path", "errno"].map(|name| text(it, name));
        parts.join(" ")
    });
    refusals.collect()
}

#[test]
fn each_refusal_names_what_was_tried_and_says_why() {
    let home = TestHome::new();
    let mount = home.mount();
    let place = text(mount.root());
    assert!(why(&[place]).is_empty());
    let said = succeed(&[binary(), "why", place]);
    assert!(said.contains("nothing was refused"), "{said}");
    // A name that is not there is no refusal.
    assert_eq!(errno(fs::metadata(mount.at("none"))), libc::ENOENT);
    assert_eq!(errno(fs::remove_dir(mount.at("none"))), libc::ENOENT);
    assert!(why(&[place]).is_empty());
    assert_eq!(errno(fs::remove_dir(mount.at("web"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::create_dir(mount.at("web/notes"))), libc::EPERM);
    assert_eq!(errno(fs::create_dir(mount.at("web/notes"))), libc::EPERM);
    let renamed = fs::rename(mount.at("web"), mount.at("web/snapshots/x"));
    assert!(renamed.is_err());
    fs::write(home.beside("bad"), [1; 100_000]).unwrap();
    fail(&[
        "cp",
        text(&home.beside("bad")),
        text(&mount.at("new.boxlite")),
    ]);
    let refusals = why(&[place]);
    let all = shown(&refusals);
    assert_eq!(all[0], "rmdir web ENOTEMPTY");
    assert_eq!(all[1], "mkdir web/notes EPERM");
    assert_eq!(refusals[1]["times"], 2);
    assert!(
        all.contains(&"write new.boxlite EBADMSG".to_owned()),
        "{all:?}"
    );
    for refusal in &refusals {
        assert!(refusal["message"].as_str().unwrap().len() > 15, "{refusal}");
        assert_eq!(refusal["uid"], 0);
    }
    assert_eq!(refusals.last().unwrap()["program"], "cp");
    // Which box a guest's file is of is not known where it is refused.
    assert!(fs::write(mount.at("web/rootfs/new"), "text").is_err());
    assert_eq!(shown(&why(&[place])).last().unwrap(), "create …/new EROFS");
    // Newest last, as text, and from any place in the mount.
    let said = succeed(&[binary(), "why", text(&mount.at("web/snapshots"))]);
    let last = said.lines().rev().nth(3).unwrap();
    assert!(last.contains("new.boxlite by cp: EBADMSG"), "{said}");
    assert!(
        said.contains(", 2 times: EPERM\n    notes: a directory means something"),
        "{said}"
    );
    // The mount that the working directory is in, and the one of a home.
    let here = Command::new(binary())
        .arg("why")
        .current_dir(mount.at("web"))
        .output();
    assert_eq!(String::from_utf8(here.unwrap().stdout).unwrap(), said);
    assert_eq!(succeed(&[binary(), "why", text(home.root())]), said);
    let said = fail(&[binary(), "why", text(&home.beside(""))]);
    assert!(said.contains("boxlitefs is not mounted on"), "{said}");
}

#[test]
fn a_refusal_is_told_to_who_met_it_and_to_root() {
    let home = TestHome::new();
    succeed(&["chown", "-R", "65534:65534", text(home.root())]);
    fs::set_permissions(home.root(), fs::Permissions::from_mode(0o700)).unwrap();
    let open = |place: &Path| fs::set_permissions(place, fs::Permissions::from_mode(0o755));
    open(&home.beside("")).unwrap();
    let mount = home.mount_with(&["-o", "allow_other"], &[]);
    let place = text(mount.root());
    let of_user = mount.at("web/of-user");
    let made = run_as_nobody(&["mkdir", text(&of_user)]);
    assert!(!made.status.success(), "{made:?}");
    assert!(fs::create_dir(mount.at("web/of-root")).is_err());
    let ask = |attribute: &str| {
        let arguments = ["--absolute-names", "--only-values", "-n", attribute, place];
        let mut command = vec!["getfattr"];
        command.extend(arguments);
        run_as_nobody(&command)
    };
    let told = ask("user.boxlite.why");
    let said = String::from_utf8(told.stdout).unwrap();
    assert!(
        said.contains("web/of-user") && !said.contains("of-root"),
        "{said}"
    );
    // Nobody but root is told of others, and copies of attributes do not bring it along.
    assert!(!ask("user.boxlite.why.all").status.success());
    let listed = succeed(&["getfattr", "--absolute-names", "-d", place]);
    assert!(!listed.contains("why"), "{listed}");
    assert_eq!(shown(&why(&[place])), ["mkdir web/of-root EPERM"]);
    let all = shown(&why(&["--all", place]));
    assert_eq!(all, ["mkdir web/of-user EPERM", "mkdir web/of-root EPERM"]);
}

#[test]
fn what_copy_tools_try_in_passing_is_no_refusal() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "a").unwrap();
    succeed(&["cp", "-r", text(&mount.at("web")), text(&mount.at("copy"))]);
    succeed(&[
        "cp",
        "-a",
        text(&mount.at("web")),
        text(&home.beside("kept")),
    ]);
    succeed(&[
        "cp",
        "-a",
        text(&home.beside("kept")),
        text(&mount.at("back")),
    ]);
    succeed(&["mv", text(&mount.at("copy")), text(&mount.at("moved"))]);
    succeed(&["rm", "-r", text(&mount.at("moved"))]);
    let refusals = why(&[text(mount.root())]);
    assert!(refusals.is_empty(), "{refusals:#?}");
}
