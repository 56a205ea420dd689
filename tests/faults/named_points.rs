//! Kills every change at each of its named points, followed by each possible next event.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use super::changes::*;
use super::common::*;
use super::contents::{KeptStates, assert_between, contents};
use super::judge::assert_recovers;
use super::next::{NEXT, Next};

/// Kills the change at each of its points and checks that the home survives each next event.
fn survives(change: &Change) {
    let home = (change.prepare)();
    let before = contents(&home);
    let mut whole = before.clone();
    (change.whole)(&mut whole);
    let kept = KeptStates::of(&home, &before);
    home.put_aside("before");
    let mut tally = Tally::default();
    for point in change.points {
        home.put_back("before");
        tally.operations += 1;
        match change.by.command(&home) {
            None => {
                let mut mount = home.mount_crashing_at(point);
                let _ = (change.act)(&mount);
                assert!(mount.has_crashed(), "{} never reached {point}", change.name);
            }
            Some(mut command) => {
                let said = crashing_at(&mut command, point);
                assert_eq!(said, None, "{} never reached {point}", change.name);
            }
        }
        tally.faults += 1;
        let crashed = contents(&home);
        assert_between(&crashed, &before, &whole);
        home.put_aside(point);
        for next in after(change, point) {
            home.put_back(point);
            if next.loses_by_itself(&home, &crashed) {
                continue;
            }
            tally.operations += next.by_boxlite.len();
            let case = attempt(|| {
                assert_recovers(&home, change, &whole, crashed.clone(), next);
                if !change.ends_keeping() {
                    kept.assert_kept(&home, &crashed);
                }
            });
            tally.compared += crashed.len();
            if let Err(why) = case {
                let case = format!("killed at {point}, then {}: {why}", next.name);
                tally.losses.push(format!("{} {case}", change.name));
            }
        }
    }
    tally.finish(&format!("killed at each named point: {}", change.name));
}

/// Returns the events to try after a kill at this point: the home is mounted at once, or BoxLite
/// uses it first. The slice tries only one of the latter, a different one at each point.
fn after(change: &Change, point: &str) -> Vec<&'static Next> {
    let (mounted, others) = NEXT.split_first().unwrap();
    if extent() != Extent::Slice {
        return NEXT.iter().collect();
    }
    let index = change.points.iter().position(|it| *it == point).unwrap();
    vec![mounted, &others[(index + change.name.len()) % others.len()]]
}

/// Runs a program that kills itself at a named point. Returns its output if it did not reach that
/// point.
fn crashing_at(command: &mut Command, point: &str) -> Option<String> {
    let output = command.env("BOXLITEFS_CRASH_AT", point).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let killed = output.status.signal() == Some(libc::SIGKILL);
    (!killed).then(|| String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn a_snapshot_that_is_cut_off_is_whole_or_gone() {
    survives(&SNAPSHOT);
}

#[test]
fn an_adoption_that_is_cut_off_changes_no_contents() {
    survives(&ADOPT);
}

#[test]
fn a_snapshot_of_a_long_chain_that_is_cut_off_is_whole_or_gone() {
    survives(&LONG);
}

#[test]
fn a_snapshot_that_merges_first_and_is_cut_off_is_whole_or_gone() {
    survives(&LONG_MERGING);
}

#[test]
fn a_deletion_that_is_cut_off_is_whole_or_undone() {
    survives(&REMOVE);
}

#[test]
fn a_deletion_of_a_layers_only_name_that_is_cut_off_is_whole_or_undone() {
    survives(&REMOVE_ONLY_NAME);
}

#[test]
fn a_deletion_that_adopts_and_is_cut_off_is_whole_or_undone() {
    survives(&REMOVE_ADOPTING);
}

#[test]
fn a_clone_that_is_cut_off_is_whole_or_gone() {
    survives(&CLONE);
}

#[test]
fn a_clone_with_snapshots_that_is_cut_off_keeps_those_already_made() {
    survives(&CLONE_WITH_SNAPSHOTS);
}

#[test]
fn a_clone_of_a_snapshot_that_is_cut_off_is_whole_or_gone() {
    survives(&CLONE_OF_SNAPSHOT);
}

#[test]
fn a_clone_of_a_long_chain_that_is_cut_off_is_whole_or_gone() {
    survives(&CLONE_OF_LONG);
}

#[test]
fn an_import_that_is_cut_off_is_whole_or_gone() {
    survives(&IMPORT);
}

#[test]
fn a_restore_that_is_cut_off_leaves_the_old_disk_or_the_new() {
    survives(&RESTORE);
}

#[test]
fn a_restore_from_another_box_that_is_cut_off_leaves_the_old_disk_or_the_new() {
    survives(&RESTORE_FROM_ANOTHER);
}

#[test]
fn a_restore_of_a_backup_that_is_cut_off_leaves_the_old_disk_or_the_new() {
    survives(&RESTORE_BACKUP);
}

#[test]
fn a_replacement_of_a_snapshot_that_is_cut_off_leaves_the_old_or_the_new() {
    survives(&REPLACE);
}

#[test]
fn a_snapshots_rename_that_is_cut_off_leaves_one_of_its_names() {
    survives(&RENAME);
}

#[test]
fn a_boxs_rename_that_is_cut_off_leaves_one_of_its_names() {
    survives(&RENAME_BOX);
}

#[test]
fn an_edit_of_box_json_that_is_cut_off_is_whole_or_undone() {
    survives(&EDIT_BOX);
}

#[test]
fn a_boxs_removal_that_is_cut_off_is_whole_or_undone() {
    survives(&REMOVE_BOX);
}

#[test]
fn a_boxs_removal_that_adopts_and_is_cut_off_is_whole_or_undone() {
    survives(&REMOVE_BOX_ADOPTING);
}

#[test]
fn a_deletion_that_keeps_and_is_cut_off_loses_nothing() {
    survives(&REMOVE_KEPT);
}

#[test]
fn a_deletion_of_a_layers_only_name_that_keeps_and_is_cut_off_loses_nothing() {
    survives(&REMOVE_ONLY_NAME_KEPT);
}

#[test]
fn a_restore_that_keeps_and_is_cut_off_loses_nothing() {
    survives(&RESTORE_KEPT);
}

#[test]
fn a_restore_of_a_backup_that_keeps_and_is_cut_off_loses_nothing() {
    survives(&RESTORE_BACKUP_KEPT);
}

#[test]
fn a_boxs_removal_that_keeps_and_is_cut_off_loses_nothing() {
    survives(&REMOVE_BOX_KEPT);
}

#[test]
fn a_removal_of_boxlites_clone_that_keeps_and_is_cut_off_loses_nothing() {
    survives(&REMOVE_CLONE_KEPT);
}

#[test]
fn a_boxs_return_that_is_cut_off_leaves_the_box_or_what_is_kept() {
    survives(&BOX_BACK);
}

#[test]
fn a_boxs_return_onto_its_disk_that_others_read_is_whole_or_undone() {
    survives(&BOX_BACK_SHARED);
}

#[test]
fn a_snapshots_return_that_is_cut_off_loses_nothing() {
    survives(&SNAPSHOT_BACK);
}

#[test]
fn an_end_of_keeping_that_is_cut_off_leaves_no_rest() {
    survives(&END_KEEPING);
}

#[test]
fn a_repair_of_what_is_kept_that_is_cut_off_is_done_again() {
    survives(&COMPLETE_KEPT);
}

#[test]
fn a_merge_that_is_cut_off_changes_no_contents() {
    survives(&MERGE);
}

#[test]
fn a_merge_into_a_live_disk_that_is_cut_off_changes_no_contents() {
    survives(&MERGE_INTO_LIVE);
}

#[test]
fn a_merge_that_moves_a_base_and_is_cut_off_changes_no_contents() {
    survives(&PROMOTE);
}

#[test]
fn a_merge_of_empty_layers_that_is_cut_off_changes_no_contents() {
    survives(&SKIP);
}

#[test]
fn a_shortening_that_is_cut_off_changes_no_contents() {
    survives(&SHORTEN);
}

#[test]
fn a_repair_that_is_cut_off_is_done_again() {
    survives(&REPAIR);
}

#[test]
fn a_repair_of_paths_that_is_cut_off_changes_no_contents() {
    survives(&PATHS);
}

#[test]
fn a_repair_of_deleted_bases_that_is_cut_off_is_done_again() {
    survives(&PUT_BACK);
}

#[test]
fn every_crash_point_is_tried() {
    let tried: BTreeSet<&str> = CHANGES
        .iter()
        .flat_map(|change| change.points)
        .copied()
        .collect();
    let mut named = BTreeSet::new();
    let mut places = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(place) = places.pop() {
        for name in names_in(&place) {
            let path = place.join(name);
            if path.is_dir() {
                places.push(path);
                continue;
            }
            let source = fs::read_to_string(path).unwrap();
            for call in source.split("crash_point(\"").skip(1) {
                named.insert(call.split('"').next().unwrap().to_owned());
            }
        }
    }
    assert!(!named.is_empty());
    let mut tried: BTreeSet<String> = tried.into_iter().map(str::to_owned).collect();
    // Other tests try the points that need a BoxLite runtime, a running box or an unfinished copy.
    for (point, test) in [
        ("waiting.noted", include_str!("waiting.rs")),
        ("beside.exchanged", include_str!("../mount/shared.rs")),
        ("unfreed.taken", include_str!("../mount/large.rs")),
        ("unfreed.dropped", include_str!("../mount/large.rs")),
        ("running.paused", include_str!("../mount/running.rs")),
        ("running.copied", include_str!("../mount/running.rs")),
        ("running.begun", include_str!("../mount/running.rs")),
        ("running.referred", include_str!("../mount/running.rs")),
        ("write.refcounts", include_str!("../mount/writing.rs")),
        ("write.tables", include_str!("../mount/writing.rs")),
        ("write.roots", include_str!("../mount/writing.rs")),
        ("write.lowered", include_str!("../mount/writing.rs")),
    ] {
        assert!(
            test.contains(&format!("\"{point}\"")),
            "no test tries {point}"
        );
        tried.insert(point.to_owned());
    }
    assert_eq!(tried, named);
}
