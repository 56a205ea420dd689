//! Compares random sequences of operations with a model of what every disk must contain. The mount,
//! BoxLite and guests make the operations.
//!
//! After each step, the affected boxes and all names must match the model. At the end of a
//! sequence, BoxLite, `qemu-img` and `boxlitefs check` judge everything. Then all boxes are
//! removed, and nothing may be left over.
//!
//! - `MODEL_STEPS`: minimum number of steps (2000; `make model` uses 10000).
//! - `MODEL_SEED`: seed of the first sequence. Each further sequence uses the next number. A
//!   failure prints the seed that repeats it.
//! - `MODEL_SHRINK_SECONDS`: how long to look for a shorter failing sequence (120).

mod act;
mod operation;
mod reference;
mod undo;
mod world;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, RandomState};
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::Once;
use std::time::Instant;

use proptest::test_runner::{
    Config, RngAlgorithm, TestCaseError, TestCaseResult, TestError, TestRng, TestRunner,
};

use crate::common::{TestHome, text};
use operation::{Emphasis, Sequence};
use world::World;

#[test]
#[ignore = "slow"]
fn long_histories_of_boxes_are_what_the_model_says() {
    run_sequences(Emphasis::Histories);
}

#[test]
#[ignore = "slow"]
fn families_of_boxes_are_what_the_model_says() {
    run_sequences(Emphasis::Families);
}

/// Runs half of the steps; the other test runs the other half concurrently.
fn run_sequences(emphasis: Emphasis) {
    let wanted = number("MODEL_STEPS").unwrap_or(1500).div_ceil(2);
    let mut seed =
        number("MODEL_SEED").unwrap_or_else(|| RandomState::new().hash_one(0) % 1_000_000_000);
    let home = first_home();
    let begun = Instant::now();
    let mut steps = 0;
    while steps < wanted {
        eprintln!(
            "{emphasis:?}: MODEL_SEED={seed}; {steps} of {wanted} steps in {:.0} s",
            begun.elapsed().as_secs_f32()
        );
        steps += run_sequence(&home, emphasis, seed);
        seed += 1;
    }
    eprintln!(
        "{emphasis:?}: {steps} steps in {:.0} s",
        begun.elapsed().as_secs_f32()
    );
}

/// Makes the home that each sequence starts with, and puts a copy aside.
fn first_home() -> TestHome {
    let home = TestHome::in_memory();
    home.wheel_batch(&[
        &["remove", "web"],
        &["import", text(&reference::originals()[0].archive), "web"],
    ]);
    home.put_aside("first");
    home
}

/// Runs one sequence, and shorter ones if it fails. Returns its number of steps.
fn run_sequence(home: &TestHome, emphasis: Emphasis, seed: u64) -> u64 {
    let reached = Rc::new(Cell::new(0));
    let steps = Cell::new(0);
    let failed = RefCell::default();
    let first_fault = RefCell::default();
    remember_places_of_faults();
    let mut runner = runner(seed);
    let sequence = Sequence::of(emphasis, &mut runner, reached.clone());
    let result = runner.run_one(sequence, |operations| {
        home.put_back("first");
        // What is kept keeps layers from being merged: half of the sequences keep nothing.
        home.set_keeps(seed.is_multiple_of(2));
        let run = || {
            let mut world = World::new(home, &failed);
            for (index, operation) in operations.iter().enumerate() {
                reached.set(index);
                world.apply(operation);
            }
            reached.set(operations.len());
            steps.set(world.steps);
            world.finish();
        };
        match panic::catch_unwind(AssertUnwindSafe(run)) {
            Ok(()) => Ok(()),
            Err(fault) => same_fault(&first_fault, fault),
        }
    });
    match result {
        Ok(_) => steps.get() as u64,
        Err(TestError::Abort(reason)) => panic!("MODEL_SEED={seed}: {reason}"),
        Err(TestError::Fail(reason, operations)) => panic!(
            "{reason}\n\n{}\nIn words:\n{}\nThe full sequence: MODEL_SEED={seed} MODEL_STEPS=1 make model",
            lines(&operations, |operation| format!("{operation:?}")),
            lines(&failed.take(), String::clone)
        ),
    }
}

thread_local! {
    /// Location of this thread's last panic.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

fn remember_places_of_faults() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let place = info.location().map(ToString::to_string);
            PLACE.with_borrow_mut(|last| *last = place.unwrap_or_default());
            before(info);
        }));
    });
}

/// Turns a panic into a failure. A shorter sequence that fails elsewhere passes, because it shows
/// another fault than the one being reduced.
fn same_fault(first: &RefCell<Option<String>>, fault: Box<dyn Any + Send>) -> TestCaseResult {
    let place = PLACE.take();
    let mut first = first.borrow_mut();
    if *first.get_or_insert_with(|| place.clone()) != place {
        return Ok(());
    }
    let reason = match (fault.downcast_ref::<String>(), fault.downcast_ref::<&str>()) {
        (Some(text), _) => text.clone(),
        (_, Some(text)) => (*text).to_owned(),
        _ => "a panic without a message".to_owned(),
    };
    Err(TestCaseError::fail(format!("{place}: {reason}")))
}

fn lines<T>(of: &[T], line: impl Fn(&T) -> String) -> String {
    of.iter()
        .map(|one| format!("    {}\n", line(one)))
        .collect()
}

fn runner(seed: u64) -> TestRunner {
    let seconds = number("MODEL_SHRINK_SECONDS").unwrap_or(120);
    let config = Config {
        max_shrink_time: u32::try_from(seconds * 1000).unwrap_or(u32::MAX),
        max_shrink_iters: if seconds == 0 { 0 } else { 1000 },
        failure_persistence: None,
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={value} is not a number")))
}
