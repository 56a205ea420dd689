//! Checks that a home recovers from an interrupted change and can be used as before.

// Not every test uses all of these items.
#![allow(dead_code)]

use super::changes::{By, Change};
use super::common::*;
use super::contents::{Boxes, contents};
use super::next::Next;

/// Lets `next` happen to the home and mounts it. Fails unless every box and snapshot has its
/// contents and `check` finds nothing. `whole` is the state after the interrupted change.
pub fn assert_recovers(
    home: &TestHome,
    change: &Change,
    whole: &Boxes,
    mut boxes: Boxes,
    next: &Next,
) {
    next.happen(home, &mut boxes);
    let mount = mount_recovered(home, change, whole, &mut boxes);
    // The home can be used as before.
    for (name, contents) in &mut boxes {
        mount.snapshot(name, "afterwards").unwrap();
        let live = contents.live.clone();
        contents.snapshots.insert("afterwards".to_owned(), live);
    }
    if let Some(web) = boxes.get("web") {
        assert_eq!(mount.export_digest("web/export.boxlite"), web.live);
    }
    drop(mount);
    assert_eq!(contents(home), boxes);
    home.assert_whole_once_mounted();
    if next.by_boxlite.is_empty() {
        assert_boxlite_goes_on(home, &boxes);
    }
}

/// Mounts the home. Fails unless every box and snapshot has its contents and `check` finds nothing.
pub fn assert_comes_back(home: &TestHome, change: &Change, whole: &Boxes, mut boxes: Boxes) {
    drop(mount_recovered(home, change, whole, &mut boxes));
    assert_eq!(contents(home), boxes);
    home.assert_images_clean();
}

fn mount_recovered(home: &TestHome, change: &Change, whole: &Boxes, boxes: &mut Boxes) -> Mounted {
    if change.by == By::Repair
        && let Some(web) = boxes.get_mut("web")
    {
        // A user would repeat an interrupted repair.
        let mut repair = change.by.command(home).unwrap();
        let output = repair.output().unwrap();
        assert!(output.status.success(), "check --repair: {output:?}");
        if let Some(orphan) = whole["web"].snapshots.get("orphan") {
            web.snapshots.insert("orphan".to_owned(), orphan.clone());
        }
    }
    let mount = home.mount();
    assert_shows(&mount, boxes);
    let (status, said) = home.check();
    assert_eq!(status, 0, "boxlitefs check after the mount: {said}");
    mount
}

/// Fails unless the mount lists exactly these boxes and snapshots.
pub fn assert_shows(mount: &Mounted, boxes: &Boxes) {
    let names: Vec<&String> = boxes.keys().collect();
    let shown = mount.names("");
    assert_eq!(shown.iter().collect::<Vec<_>>(), names, "{}", mount.log());
    for (name, contents) in boxes {
        let snapshots: Vec<&String> = contents.snapshots.keys().collect();
        let shown = mount.names(format!("{name}/snapshots"));
        assert_eq!(shown.iter().collect::<Vec<_>>(), snapshots);
    }
}

/// Fails unless BoxLite lists and exports every box with its contents.
fn assert_boxlite_goes_on(home: &TestHome, boxes: &Boxes) {
    let place = tempfile::tempdir().unwrap();
    let mut commands = vec![vec!["list"]];
    for name in boxes.keys() {
        commands.push(vec!["export", name, text(place.path())]);
    }
    let commands: Vec<&[&str]> = commands.iter().map(Vec::as_slice).collect();
    let answers = home.wheel_batch(&commands);
    assert_eq!(answers[0].as_array().unwrap().len(), boxes.len());
    for (answer, contents) in answers[1..].iter().zip(boxes.values()) {
        let archive = answer["path"].as_str().unwrap();
        assert_eq!(archive_digest(archive.as_ref()), contents.live);
    }
}
