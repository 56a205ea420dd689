//! Calls that fail: each call of each change, one after the other. Whoever asked for the change is told, and
//! the change is made or not; nothing is left behind, and the next one works.

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

/// A change, and what it needs to be made again and again.
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

    /// Makes the change while a fault waits for it. What was answered, how many calls failed, and how many
    /// of each kind there were.
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
            (None, None) => panic!("nobody makes the change"),
        };
        let counts = disk.counts();
        (outcome, disk.disarm(), counts)
    }

    fn mount(&self) -> Option<Mounted> {
        (self.change.by == By::Mount).then(|| self.home.mount())
    }

    /// A fault of every call that the change makes, and one from each on that changes something.
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
                // What becomes of it depends little on which it is.
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

    /// Has one call fail. False if the change did not come to it this time.
    fn assert_survives(&self, fault: Fault, dice: &mut Dice) -> bool {
        let Failing { home, change, .. } = self;
        let disk = FaultyDisk::mount(home.root(), self.files.clone());
        let mut mount = self.mount();
        let (outcome, failed, _) = self.make(&disk, mount.as_ref(), Some(fault));
        if let Some(mount) = &mut mount {
            assert!(mount.is_alive(), "the daemon died");
        }
        if failed == 0 {
            outcome.expect("it met no fault");
            return false;
        }
        let calls = disk.calls();
        let log = || fs::read_to_string(home.root().join(".boxlitefs/log")).unwrap_or_default();
        let mut boxes = contents(home);
        match &outcome {
            // What failed was not needed for it.
            Ok(()) if change.by == By::Mount => assert_eq!(boxes, self.whole, "{}", log()),
            Ok(()) => assert_between(&boxes, &self.before, &self.whole),
            Err(said) => {
                // A program that goes on with the next says why in the log.
                let said = match change.by {
                    By::Mount => said.clone(),
                    By::Compact | By::Repair => said.clone() + &log(),
                };
                // SQLite does not tell why it could not make a file, and when that is looked for it can.
                let is_over = matches!(fault.call, Call::Create) && !fault.lasts;
                // What it could not remove at its end is a finding like others.
                let is_found =
                    change.by == By::Repair && said.contains("mounting the home removes it");
                let is_told = tells(&said, fault.errno)
                    || is_found
                    || (is_over && said.contains("cannot be opened just now; try again"));
                assert!(is_told, "said: {said}; {}", log());
                assert_between(&boxes, &self.before, &self.whole);
            }
        }
        if let Some(mount) = &mount {
            assert_shows(mount, &boxes);
        }
        // Whoever tries again finds nothing in his way.
        if outcome.is_err() && boxes == self.before {
            let (again, ..) = self.make(&disk, mount.as_ref(), None);
            again.unwrap_or_else(|said| panic!("tried again: {said}; {}", log()));
            boxes = contents(home);
            assert_eq!(boxes, self.whole, "tried again");
        }
        // The next change finds everything in order, and leaves it so.
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
            // What is removed aside may have failed only after that change had begun.
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
        // And had it been lost in the end, what was made since then is there.
        for mut left in [Left::Nothing, random(dice)] {
            after_power_loss(&self.files, &all_calls, &mut left, Flushes::Count).store(home.root());
            assert_eq!(
                contents(home),
                boxes,
                "lost with the power in the end, {left:?}"
            );
        }
        true
    }

    /// Had the power been lost right then, nothing would be lost either: what a failed flush was to bring to
    /// the disk may be there or not.
    fn assert_power_may_be_lost(&self, calls: &[Done], was_done: bool, dice: &mut Dice) {
        for mut left in [Left::Nothing, Left::Names, random(dice)] {
            let files = after_power_loss(&self.files, calls, &mut left, Flushes::Count);
            files.store(self.home.root());
            let then = contents(&self.home);
            assert_between(&then, &self.before, &self.whole);
            if was_done && self.change.by == By::Mount {
                assert_eq!(then, self.whole, "answered, and lost with the power");
            }
        }
    }
}

fn is_workspace(name: &str) -> bool {
    name.starts_with("work-") || name.starts_with("new-")
}

/// What is in workspaces but the lock of each.
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

/// The errors that a call of this kind may meet, and whether those that follow meet it too.
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

/// Whether a complaint is that of the errno: a tool's, or that of boxlitefs on a terminal. A database whose
/// header can't be read is a damaged one to SQLite.
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

/// Has `each` of these faults of each change met, in an order by chance.
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

/// What fails in the way back, too, so that the next change finds what may not be on the disk.
fn leaves_unflushed(change: &Change, fault: &Fault) -> bool {
    let comes_back = ["restore", "rename of a snapshot"].contains(&change.name);
    fault.call == Call::FlushDirectory || (fault.lasts && comes_back)
}

#[test]
fn a_call_that_fails_is_told_and_loses_nothing() {
    let each = how_many(2, 5, usize::MAX);
    assert_all_survive("failed calls", each, |change, fault| {
        !leaves_unflushed(change, fault)
    });
}

#[test]
fn what_could_not_be_flushed_is_not_built_on() {
    let each = how_many(2, 20, usize::MAX);
    assert_all_survive("failed flushes", each, leaves_unflushed);
}
