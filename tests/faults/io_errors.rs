//! Failing system calls: each call of each change fails in turn. The client must get the error, the
//! change must be complete or undone, nothing may be left over, and the next change must work.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::changes::*;
use super::common::*;
use super::contents::{Boxes, assert_between, contents};
use super::files::Files;
use super::judge::assert_shows;
use super::record::{Done, Flushes, Left, after_power_loss};
use super::server::{CALLS, Call, Fault, FaultyDisk};

/// A change and its home, which can be repeated.
struct Failing<'c> {
    change: &'c Change,
    home: TestHome,
    before: Boxes,
    whole: Boxes,
    files: Files,
}

impl Failing<'_> {
    fn of(change: &Change) -> Failing<'_> {
        let home = (change.prepare)();
        let before = contents(&home);
        let mut whole = before.clone();
        (change.whole)(&mut whole);
        let files = Files::load(home.root());
        Failing {
            change,
            home,
            before,
            whole,
            files,
        }
    }

    /// Makes the change with an armed fault. Returns the result, the number of failed calls, and
    /// the number of calls of each kind.
    fn make(
        &self,
        disk: &FaultyDisk,
        mount: Option<&Mounted>,
        fault: Option<Fault>,
    ) -> (Outcome, usize, HashMap<Call, usize>) {
        disk.arm(fault);
        let outcome = match (mount, self.change.by.command(&self.home)) {
            (Some(mount), _) => (self.change.act)(mount),
            (None, Some(mut command)) => {
                let output = command.output().unwrap();
                let said = [output.stdout, output.stderr].concat();
                if output.status.success() {
                    Ok(())
                } else {
                    Err(String::from_utf8_lossy(&said).into_owned())
                }
            }
            (None, None) => panic!("no program makes the change"),
        };
        let counts = disk.counts();
        (outcome, disk.disarm(), counts)
    }

    fn mount(&self) -> Option<Mounted> {
        (self.change.by == By::Mount).then(|| self.home.mount())
    }

    /// Returns a fault for each call of the change, and for each changing call one that also fails
    /// all later ones.
    fn faults(&self, dice: &mut Dice) -> Vec<Fault> {
        let disk = FaultyDisk::mount(self.home.root(), self.files.clone());
        let mount = self.mount();
        let (outcome, _, counts) = self.make(&disk, mount.as_ref(), None);
        outcome.unwrap();
        drop(mount);
        let mut faults = Vec::new();
        for call in CALLS {
            let count = counts.get(&call).copied().unwrap_or_default();
            for nth in 0..count {
                // One random errno per call is enough: the outcome hardly depends on it.
                let (errno, lasts) = *dice.one_of(ways(call));
                faults.push(Fault {
                    call,
                    nth,
                    errno,
                    lasts,
                });
            }
        }
        faults
    }

    /// Makes one call fail. Returns false if the change did not make that call this time.
    fn assert_survives(&self, fault: Fault, dice: &mut Dice) -> bool {
        let Failing { home, change, .. } = self;
        let disk = FaultyDisk::mount(home.root(), self.files.clone());
        let mut mount = self.mount();
        let (outcome, failed, _) = self.make(&disk, mount.as_ref(), Some(fault));
        if let Some(mount) = &mut mount {
            assert!(mount.is_alive(), "the daemon died");
        }
        if failed == 0 {
            outcome.expect("the change failed although no call did");
            return false;
        }
        let calls = disk.calls();
        let log = || fs::read_to_string(home.root().join(".boxlitefs/log")).unwrap_or_default();
        let mut boxes = contents(home);
        match &outcome {
            // The change did not need the failed call.
            Ok(()) if change.by == By::Mount => assert_eq!(boxes, self.whole, "{}", log()),
            Ok(()) => assert_between(&boxes, &self.before, &self.whole),
            Err(said) => {
                // A program that continues with the next item reports the error in the log.
                let said = match change.by {
                    By::Mount => said.clone(),
                    By::Compact | By::Repair => said.clone() + &log(),
                };
                // SQLite does not report why it could not make a file. boxlitefs then tries it
                // itself, and succeeds if only one call was to fail.
                let is_over = matches!(fault.call, Call::Create) && !fault.lasts;
                // A file that the repair could not remove at its end is a finding.
                let is_found =
                    change.by == By::Repair && said.contains("mounting the home removes it");
                let is_told = tells(&said, fault.errno)
                    || is_found
                    || (is_over && said.contains("cannot be opened just now; try again"));
                assert!(is_told, "unexpected error: {said}; {}", log());
                assert_between(&boxes, &self.before, &self.whole);
            }
        }
        if let Some(mount) = &mount {
            assert_shows(mount, &boxes);
        }
        // A second attempt succeeds.
        if outcome.is_err() && boxes == self.before {
            let (again, ..) = self.make(&disk, mount.as_ref(), None);
            again.unwrap_or_else(|said| panic!("second attempt: {said}; {}", log()));
            boxes = contents(home);
            assert_eq!(boxes, self.whole, "second attempt");
        }
        // Later changes work and leave nothing over.
        let mount = mount.unwrap_or_else(|| home.mount());
        for (name, contents) in &mut boxes {
            mount.snapshot(name, "afterwards").unwrap();
            let live = contents.live.clone();
            contents.snapshots.insert("afterwards".to_owned(), live);
        }
        assert_shows(&mount, &boxes);
        let staging = home.root().join(".boxlitefs");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !in_workspaces(&staging).is_empty() {
            let left = in_workspaces(&staging);
            assert!(
                Instant::now() < deadline,
                "left in the workspace: {left:?}; {}",
                log()
            );
            std::thread::sleep(Duration::from_millis(100));
            // A removal in the background may have failed after the change above had begun.
            if let Some(name) = boxes.keys().next() {
                mount.snapshot(name, "once more").unwrap();
                mount.remove_snapshot(name, "once more").unwrap();
            }
        }
        mount.unmount();
        drop(home.mount());
        assert_eq!(contents(home), boxes);
        let staging = names_in(&staging);
        assert!(
            !staging.iter().any(|name| is_workspace(name)),
            "left behind: {staging:?}"
        );
        if change.by == By::Repair {
            let repaired = change.by.command(home).unwrap().output().unwrap();
            assert!(repaired.status.success(), "{repaired:?}");
        }
        let (status, said) = home.check();
        assert_eq!(status, 0, "boxlitefs check: {said}; {}", log());
        home.assert_images_clean();
        let all_calls = disk.calls();
        drop(disk);
        self.assert_power_may_be_lost(&calls, outcome.is_ok(), dice);
        // After a power loss at the end, the later changes are there, too.
        for mut left in [Left::Nothing, random(dice)] {
            after_power_loss(&self.files, &all_calls, &mut left, Flushes::Count).store(home.root());
            assert_eq!(
                contents(home),
                boxes,
                "lost in a power loss at the end, {left:?}"
            );
        }
        true
    }

    /// Checks that a power loss right after the change loses nothing, whether or not the contents
    /// of a failed flush are on the disk.
    fn assert_power_may_be_lost(&self, calls: &[Done], was_done: bool, dice: &mut Dice) {
        for mut left in [Left::Nothing, Left::Names, random(dice)] {
            let files = after_power_loss(&self.files, calls, &mut left, Flushes::Count);
            files.store(self.home.root());
            let then = contents(&self.home);
            assert_between(&then, &self.before, &self.whole);
            if was_done && self.change.by == By::Mount {
                assert_eq!(then, self.whole, "a power loss undid a confirmed change");
            }
        }
    }
}

fn is_workspace(name: &str) -> bool {
    name.starts_with("work-") || name.starts_with("new-")
}

/// Lists everything in workspaces except their locks.
fn in_workspaces(staging: &Path) -> Vec<String> {
    let mut workspaces = names_in(staging);
    workspaces.retain(|name| is_workspace(name));
    let names = workspaces
        .iter()
        .flat_map(|name| names_in(&staging.join(name)));
    names.filter(|name| name != "lock").collect()
}

fn random(dice: &mut Dice) -> Left {
    Left::Random(Dice::of(dice.below(1 << 40), 0))
}

/// Returns the errors of a kind of call, and whether the later calls of the kind fail, too.
fn ways(call: Call) -> &'static [(i32, bool)] {
    match call {
        Call::Read | Call::Flush | Call::FlushDirectory | Call::Unlink | Call::RemoveDirectory => {
            &[(libc::EIO, false)]
        }
        Call::Write | Call::Create | Call::MakeDirectory => &[
            (libc::EIO, false),
            (libc::ENOSPC, false),
            (libc::EDQUOT, false),
        ],
        Call::Link | Call::Rename | Call::Resize | Call::Describe => {
            &[(libc::EIO, false), (libc::ENOSPC, false)]
        }
        Call::Change => &[(libc::EIO, true), (libc::EROFS, true), (libc::ENOSPC, true)],
    }
}

/// Returns whether a message of a tool or of boxlitefs reports the errno. SQLite reports a database
/// as damaged if it cannot read the header.
fn tells(said: &str, errno: i32) -> bool {
    let messages: &[&str] = match errno {
        libc::EIO => &["Input/output error", "disk I/O error", "is damaged"],
        libc::ENOSPC => &["No space left on device", "the disk is full"],
        libc::EDQUOT => &["Disk quota exceeded", "may use no more of the disk"],
        libc::EROFS => &["Read-only file system", "cannot be written"],
        other => panic!("errno {other}"),
    };
    messages.iter().any(|message| said.contains(message))
}

/// Tries up to `each` of the selected faults of each change, in random order.
fn assert_all_survive(what: &str, each: usize, of: impl Fn(&Change, &Fault) -> bool + Sync) {
    let seed = seed(what);
    let all = Mutex::new(Tally::default());
    each_in_parallel(&ONE_OF_EACH, |change| {
        let failing = Failing::of(change);
        let mut dice = Dice::of(seed, change.name);
        let mut faults = failing.faults(&mut dice);
        faults.retain(|fault| of(change, fault));
        let mut tally = Tally::default();
        while !faults.is_empty() && tally.faults < each {
            let fault = faults.swap_remove(dice.below(faults.len() as u64) as usize);
            tally.operations += 1;
            tally.compared += failing.before.len();
            let mut met = false;
            let case = attempt(|| met = failing.assert_survives(fault, &mut dice));
            tally.faults += usize::from(met || case.is_err());
            if let Err(why) = case {
                let loss = format!("{}: {fault:?}: {why}", change.name);
                eprintln!("{loss}");
                tally.losses.push(loss);
            }
        }
        all.lock().unwrap().add(tally);
    });
    all.into_inner().unwrap().finish(what);
}

/// Returns whether the fault also fails the rollback, so that the next change finds files that may
/// not be on the disk.
fn leaves_unflushed(change: &Change, fault: &Fault) -> bool {
    let comes_back = ["restore", "rename of a snapshot"].contains(&change.name);
    fault.call == Call::FlushDirectory || (fault.lasts && comes_back)
}

#[test]
fn a_failed_call_is_reported_and_loses_nothing() {
    let each = how_many(2, 4, usize::MAX);
    assert_all_survive("failed calls", each, |change, fault| {
        !leaves_unflushed(change, fault)
    });
}

#[test]
fn no_change_relies_on_a_failed_flush() {
    let each = how_many(2, 15, usize::MAX);
    assert_all_survive("failed flushes", each, leaves_unflushed);
}

#[test]
fn disks_are_replaced_where_names_cannot_be_exchanged() {
    for change in [&SNAPSHOT, &RESTORE, &RESTORE_FROM_ANOTHER, &RESTORE_BACKUP] {
        let failing = Failing::of(change);
        let disk = FaultyDisk::mount(failing.home.root(), failing.files.clone());
        let disk = disk.without_exchange();
        let mount = failing.home.mount();
        (change.act)(&mount)
            .unwrap_or_else(|said| panic!("{}: {said}\n{}", change.name, mount.log()));
        assert_eq!(contents(&failing.home), failing.whole, "{}", change.name);
        mount.unmount();
        failing.home.assert_whole();
        drop(disk);
    }
}
