//! Kills at random moments: between the named points, within a system call, shortly after the end.

use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::changes::*;
use super::common::*;
use super::contents::{Boxes, KeptStates, assert_between, contents};
use super::judge::assert_recovers;
use super::next::NEXT;

/// A change and its home, which can be repeated.
struct Rounds<'c> {
    change: &'c Change,
    home: TestHome,
    before: Boxes,
    whole: Boxes,
    kept: KeptStates,
    /// How long the undisturbed change takes.
    long: Duration,
}

impl Rounds<'_> {
    fn of(change: &Change) -> Rounds<'_> {
        let home = (change.prepare)();
        let before = contents(&home);
        let mut whole = before.clone();
        (change.whole)(&mut whole);
        let kept = KeptStates::of(&home, &before);
        home.put_aside("before");
        let long = undisturbed(change, &home);
        assert_eq!(contents(&home), whole, "{}, undisturbed", change.name);
        Rounds {
            change,
            home,
            before,
            whole,
            kept,
            long,
        }
    }

    /// Kills the change after a random time, lets a random event happen, and checks the home.
    fn round(&self, dice: &mut Dice, tally: &mut Tally) -> Result<(), String> {
        let Rounds { change, home, .. } = self;
        home.put_back("before");
        // Mostly during the change, sometimes after its end.
        let micros = self.long.as_micros() as u64;
        let after = Duration::from_micros(dice.below(micros + micros / 4 + 2000));
        tally.operations += 1;
        tally.faults += usize::from(kill_after(change, home, after));
        let what = format!("{} killed after {after:?} of {:?}", change.name, self.long);
        let mut crashed = Boxes::new();
        attempt(|| {
            crashed = contents(home);
            assert_between(&crashed, &self.before, &self.whole);
        })
        .map_err(|why| format!("{what}: {why}"))?;
        let (mounted, others) = NEXT.split_first().unwrap();
        let next = if dice.coin() {
            mounted
        } else {
            dice.one_of(others)
        };
        let next = if next.loses_by_itself(home, &crashed) {
            mounted
        } else {
            next
        };
        tally.operations += next.by_boxlite.len();
        tally.compared += crashed.len();
        let lost = crashed.clone();
        attempt(|| {
            assert_recovers(home, change, &self.whole, crashed, next);
            if !change.ends_keeping() {
                self.kept.assert_kept(home, &lost);
            }
        })
        .map_err(|why| format!("{what}, then {}: {why}", next.name))
    }
}

/// Makes the change and returns how long it took.
fn undisturbed(change: &Change, home: &TestHome) -> Duration {
    match change.by.command(home) {
        None => {
            let mount = home.mount();
            let begun = Instant::now();
            (change.act)(&mount).unwrap();
            begun.elapsed()
        }
        Some(mut command) => {
            let begun = Instant::now();
            let output = command.output().unwrap();
            assert!(output.status.success(), "{output:?}");
            begun.elapsed()
        }
    }
}

/// Begins the change and kills the process that makes it. Returns false if it had already ended.
fn kill_after(change: &Change, home: &TestHome, after: Duration) -> bool {
    match change.by.command(home) {
        None => {
            let mut mount = home.mount();
            let process = mount.process();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(after);
                    kill(process);
                });
                // The change may fail in any way.
                let _ = (change.act)(&mount);
            });
            mount.has_crashed()
        }
        Some(mut command) => {
            let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = quiet.spawn().unwrap();
            std::thread::sleep(after);
            let is_there = matches!(child.try_wait(), Ok(None));
            child.kill().unwrap();
            child.wait().unwrap();
            is_there
        }
    }
}

fn kill(process: u32) {
    let process = libc::pid_t::try_from(process).unwrap();
    // SAFETY: kill accesses no memory. The process is a child that was not reaped, so no other
    // process has its pid.
    unsafe { libc::kill(process, libc::SIGKILL) };
}

#[test]
fn a_kill_at_a_random_moment_loses_nothing() {
    let kills = how_many(22, 60, 1000).div_ceil(ONE_OF_EACH.len());
    let seed = seed("kills at random moments");
    let all = Mutex::new(Tally::default());
    each_in_parallel(&ONE_OF_EACH, |change| {
        let rounds = Rounds::of(change);
        let mut tally = Tally::default();
        // A kill after the end of a command does not count, so allow further rounds.
        for round in 0..40 * kills {
            if tally.faults == kills {
                break;
            }
            let mut dice = Dice::of(seed, (change.name, round));
            if let Err(why) = rounds.round(&mut dice, &mut tally) {
                tally.losses.push(why);
            }
        }
        all.lock().unwrap().add(tally);
    });
    let tally = all.into_inner().unwrap();
    assert!(
        tally.faults >= kills * ONE_OF_EACH.len(),
        "only {} were killed",
        tally.faults
    );
    tally.finish("killed at random moments");
}
