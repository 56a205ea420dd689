//! Power loss at every moment of every change. Whichever unflushed changes had reached the disk,
//! the boxes must be there and confirmed changes must be complete.

use std::collections::HashSet;
use std::sync::Mutex;

use super::changes::*;
use super::common::*;
use super::contents::{Boxes, KeptStates, assert_between, contents};
use super::files::Files;
use super::judge::{assert_comes_back, assert_recovers};
use super::next::NEXT;
use super::record::{Done, Flushes, Left, after_power_loss};
use super::server::FaultyDisk;

/// A change whose calls a disk has recorded.
struct Recorded<'c> {
    change: &'c Change,
    home: TestHome,
    before: Boxes,
    whole: Boxes,
    kept: KeptStates,
    files: Files,
    calls: Vec<Done>,
    /// The number of calls before the change was confirmed.
    answered: usize,
}

/// The moment of a power loss, and the unflushed changes that survive it.
#[derive(Clone, Debug)]
struct Loss {
    after: usize,
    left: Left,
}

impl Recorded<'_> {
    fn of(change: &Change) -> Recorded<'_> {
        let home = (change.prepare)();
        let before = contents(&home);
        let mut whole = before.clone();
        (change.whole)(&mut whole);
        let kept = KeptStates::of(&home, &before);
        let files = Files::load(home.root());
        let disk = FaultyDisk::mount(home.root(), files.clone());
        let answered = match change.by.command(&home) {
            None => {
                let mount = home.mount();
                (change.act)(&mount).unwrap();
                let answered = disk.calls_so_far();
                mount.unmount();
                answered
            }
            Some(mut command) => {
                let output = command.output().unwrap();
                assert!(output.status.success(), "{output:?}");
                disk.calls_so_far()
            }
        };
        let calls = disk.calls();
        drop(disk);
        let flushes = |call: &&Done| matches!(call, Done::Flush { .. });
        assert!(calls.iter().filter(flushes).count() > 0);
        Recorded {
            change,
            home,
            before,
            whole,
            kept,
            files,
            calls,
            answered,
        }
    }

    /// Returns a power loss for each moment and kind of surviving changes, in random order. Of the
    /// random subsets of changes, it tries three per moment.
    fn losses(&self, dice: &mut Dice) -> Vec<Loss> {
        let mut losses = Vec::new();
        for after in 0..=self.calls.len() {
            let seed = dice.below(1 << 40);
            let random = |number: u64| Left::Random(Dice::of(seed, number));
            let left = [Left::Nothing, Left::Names, Left::Contents, Left::All];
            for left in left.into_iter().chain((0..3).map(random)) {
                let at = dice.below(losses.len() as u64 + 1) as usize;
                losses.push(Loss { after, left });
                let last = losses.len() - 1;
                losses.swap(at, last);
            }
        }
        losses
    }

    /// Returns the home after a power loss; None if this state was seen before.
    fn files_after(&self, loss: &Loss, flushes: Flushes, seen: &mut HashSet<u64>) -> Option<Files> {
        let calls = &self.calls[..loss.after];
        let files = after_power_loss(&self.files, calls, &mut loss.left.clone(), flushes);
        seen.insert(files.fingerprint()).then_some(files)
    }

    /// Fails unless every box and snapshot is in its state before or after the change, and after it
    /// if the change was confirmed. Then the home must recover, also if BoxLite uses it first.
    fn assert_nothing_is_lost(&self, loss: &Loss, files: &Files, dice: &mut Dice) {
        let Recorded { home, change, .. } = self;
        files.store(home.root());
        let left = contents(home);
        assert_between(&left, &self.before, &self.whole);
        if loss.after >= self.answered {
            assert_eq!(left, self.whole, "a confirmed change is undone");
        }
        // Reading the rows made SQLite recover its database, so restore the files.
        files.store(home.root());
        let next = dice.one_of(&NEXT);
        if dice.below(4) > 0 || next.loses_by_itself(home, &left) {
            assert_comes_back(home, change, &self.whole, left.clone());
        } else {
            assert_recovers(home, change, &self.whole, left.clone(), next);
        }
        if !change.ends_keeping() {
            self.kept.assert_kept(home, &left);
        }
    }

    fn lose(&self, wanted: usize, seed: u64, flushes: Flushes) -> Tally {
        let mut tally = Tally::default();
        let mut dice = Dice::of(seed, self.change.name);
        let mut seen = HashSet::new();
        tally.operations += 1;
        for loss in self.losses(&mut dice) {
            let Some(files) = self.files_after(&loss, flushes, &mut seen) else {
                continue;
            };
            tally.faults += 1;
            tally.compared += self.before.len();
            let case = attempt(|| self.assert_nothing_is_lost(&loss, &files, &mut dice));
            if let Err(why) = case {
                let Loss { after, left } = &loss;
                let of = self.calls.len();
                let last = after
                    .checked_sub(1)
                    .map(|last| described(&self.calls[last]));
                tally.losses.push(format!(
                    "{}: power lost after call {after} of {of} ({last:?}), left: {left:?}: {why}",
                    self.change.name
                ));
            }
            if tally.faults == wanted || flushes == Flushes::AreLies && !tally.losses.is_empty() {
                break;
            }
        }
        tally
    }
}

/// Describes a call without its data.
fn described(call: &Done) -> String {
    let text = format!("{call:?}");
    text.chars().take(120).collect()
}

#[test]
fn a_loss_of_power_at_any_moment_loses_nothing() {
    let each = how_many(2, 4, 150);
    let seed = seed("power loss");
    let all = Mutex::new(Tally::default());
    each_in_parallel(&ONE_OF_EACH, |change| {
        let tally = Recorded::of(change).lose(each, seed, Flushes::Count);
        all.lock().unwrap().add(tally);
    });
    all.into_inner().unwrap().finish("power lost");
}

#[test]
fn a_disk_that_only_says_it_has_flushed_is_noticed() {
    let seed = seed("power loss on a lying disk");
    each_in_parallel(&[&SNAPSHOT, &IMPORT, &RESTORE, &REMOVE], |change| {
        let tally = Recorded::of(change).lose(usize::MAX, seed, Flushes::AreLies);
        assert!(
            !tally.losses.is_empty(),
            "{} needs no flush, by {} losses of power",
            change.name,
            tally.faults
        );
    });
}
