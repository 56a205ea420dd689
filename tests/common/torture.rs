//! The extent of the fault tests, and their counters.
//!
//! `make test` runs a slice of the cases, `make test-all` a longer slice (`EXTENT=longer`), and
//! `make torture` all of them (`EXTENT=whole`). At its end, each test prints its counters; with
//! `TORTURE_TABLE` they become a row of the table that `make torture` prints.

use std::any::Any;
use std::env;
use std::fs::OpenOptions;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many cases are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// In `make test`.
    Slice,
    /// In `make test-all`.
    Longer,
    /// In `make torture`.
    Whole,
}

/// Returns the extent of this run: `EXTENT`, else a slice.
pub fn extent() -> Extent {
    match env::var("EXTENT").as_deref() {
        Err(_) | Ok("" | "slice") => Extent::Slice,
        Ok("longer") => Extent::Longer,
        Ok("whole") => Extent::Whole,
        Ok(other) => panic!("EXTENT must be slice, longer or whole, not {other}"),
    }
}

/// Returns one of these numbers, depending on [`extent`].
pub fn how_many(slice: usize, longer: usize, whole: usize) -> usize {
    match extent() {
        Extent::Slice => slice,
        Extent::Longer => longer,
        Extent::Whole => whole,
    }
}

/// Returns the random seed of a fault test and prints it, so that the run can be repeated. The seed
/// is `TORTURE_SEED`; else it is random in the whole extent and fixed in smaller ones.
pub fn seed(what: &str) -> u64 {
    let set = env::var("TORTURE_SEED").ok();
    let seed = match set {
        Some(seed) => seed.parse().expect("TORTURE_SEED must be a number"),
        None if extent() == Extent::Whole => RandomState::new().hash_one(0) % 1_000_000_000,
        None => 1,
    };
    println!("{what}: TORTURE_SEED={seed}");
    seed
}

/// A generator of pseudorandom numbers.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Makes the generator of one case.
    pub fn of(seed: u64, case: impl Hash) -> Dice {
        let mut hasher = DefaultHasher::new();
        (seed, case).hash(&mut hasher);
        Dice(hasher.finish() | 1)
    }

    /// Returns a number in `0..bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    /// Tosses a coin.
    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    /// Picks one element.
    pub fn one_of<'a, T>(&mut self, several: &'a [T]) -> &'a T {
        &several[self.below(several.len() as u64) as usize]
    }
}

/// Runs `work` for each of `cases` on one thread per processor.
pub fn each_in_parallel<T: Sync>(cases: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(case);
                }
            });
        }
    });
}

/// Runs a case; a panic becomes an error with its message.
pub fn attempt(case: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(case)).map_err(|why| message(&*why))
}

fn message(why: &(dyn Any + Send)) -> String {
    let text = why.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| why.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked").to_owned()
}

/// Counters of a fault test.
#[derive(Debug, Default)]
pub struct Tally {
    /// Kills, failed system calls, full disks, damaged archives, and so on.
    pub faults: usize,
    /// Changes that the mount or BoxLite began.
    pub operations: usize,
    /// Disks of boxes and snapshots that were compared with their expected contents.
    pub compared: usize,
    /// Descriptions of losses. A test continues after the first, so that the table counts them all.
    pub losses: Vec<String>,
}

impl Tally {
    /// Adds the counters of another tally.
    pub fn add(&mut self, other: Tally) {
        self.faults += other.faults;
        self.operations += other.operations;
        self.compared += other.compared;
        self.losses.extend(other.losses);
    }

    /// Prints the counters.
    ///
    /// # Panics
    /// If anything was lost, or if nothing was tried.
    pub fn finish(self, what: &str) {
        let Tally {
            faults,
            operations,
            compared,
            losses,
        } = &self;
        println!(
            "{what}: {faults} faults, {operations} operations, {compared} compared, {} losses",
            losses.len()
        );
        if let Some(table) = env::var_os("TORTURE_TABLE") {
            let mut table = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&table)
                .expect("the table of make torture");
            let row = format!(
                "{what}\t{faults}\t{operations}\t{compared}\t{}\n",
                losses.len()
            );
            table.write_all(row.as_bytes()).expect("a row of the table");
        }
        assert!(losses.is_empty(), "{what}:\n{}", losses.join("\n"));
        assert!(
            *operations > 0 && *compared > 0,
            "{what}: nothing was tried"
        );
    }
}

/// Returns incompressible bytes that depend on the seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
