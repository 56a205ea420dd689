//! The commands that ask about a home, or make one. The judge of a new home is BoxLite.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::*;

/// Returns the tables and indexes of a database, without the spaces that lay them out.
fn schema(home: &std::path::Path) -> Vec<String> {
    let database = home.join("db/boxlite.db");
    let select = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name";
    let said = succeed(&["sqlite3", "-json", text(&database), select]);
    let rows: Value = serde_json::from_str(&said).unwrap();
    let rows = rows.as_array().unwrap().iter();
    let plain = rows.map(|row| {
        row["sql"]
            .as_str()
            .unwrap()
            .split_whitespace()
            .collect::<Vec<_>>()
    });
    plain.map(|words| words.concat().replace(' ', "")).collect()
}

#[test]
fn an_empty_home_is_one_that_boxlite_takes_as_its_own() {
    let theirs = TestHome::new();
    let home = TestHome::empty();
    let place = home.beside("new");
    let said = succeed(&[binary(), "init", text(&place)]);
    assert!(said.contains("is an empty BoxLite home"), "{said}");
    assert_eq!(schema(&place), schema(theirs.root()));
    let answers = wheel::ask(
        &place,
        &[
            &["list"],
            &["import", text(&archive()), "web"],
            &["snapshot-create", "web", "s"],
            &["list"],
        ],
    );
    assert_eq!(answers[0].as_array().map(Vec::len), Some(0));
    assert_eq!(answers[3][0]["name"], "web", "{answers:?}");
    let said = fail(&[binary(), "init", text(&place)]);
    assert!(said.contains("is not empty"), "{said}");
}

#[test]
fn commands_take_the_place_where_a_home_is_mounted() {
    let home = TestHome::new();
    let mount = home.mount();
    mount.snapshot("web", "s").unwrap();
    let link = home.beside("link");
    std::os::unix::fs::symlink(mount.root(), &link).unwrap();
    for place in [mount.root(), home.root(), &link] {
        let listed = succeed(&[binary(), "ls", "--json", text(place)]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        assert_eq!(listed[0]["name"], "web", "{}", place.display());
        assert_eq!(listed[0]["snapshots"][0], "s");
        let checked = succeed(&[binary(), "check", "--json", text(place)]);
        let checked: Value = serde_json::from_str(&checked).unwrap();
        assert_eq!(
            (
                checked["boxes"].as_u64(),
                checked["findings"].as_array().map(Vec::len)
            ),
            (Some(1), Some(0))
        );
        let compacted = succeed(&[binary(), "compact", "--json", text(place)]);
        let compacted: Value = serde_json::from_str(&compacted).unwrap();
        assert_eq!(compacted["freed_bytes"], 0);
    }
    let table = succeed(&[binary(), "ls", text(home.root())]);
    assert_eq!(table.lines().count(), 2, "{table}");
    // A directory in the mount is no home.
    let said = fail(&[binary(), "ls", text(&mount.at("web"))]);
    assert!(said.contains("is not a BoxLite home"), "{said}");
    mount.unmount();
    home.assert_whole();
}

#[test]
fn a_live_view_ends_with_its_reader() {
    let home = TestHome::new();
    let mount = home.mount();
    let mut watch = Command::new(binary())
        .args(["status", "--watch"])
        .arg(mount.root())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut shown = BufReader::new(watch.stdout.take().unwrap());
    shown.read_line(&mut line).unwrap();
    assert!(!line.is_empty());
    assert!(watch.try_wait().unwrap().is_none(), "{line}");
    drop(shown);
    eventually("it ends", || watch.try_wait().unwrap().is_some());
    assert!(watch.wait().unwrap().success());
    fs::metadata(mount.at("web")).unwrap();
}
