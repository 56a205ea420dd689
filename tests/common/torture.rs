//! How long the tests of faults go on, and what they count.
//!
//! `make test` has a slice of them; `make torture` sets `TORTURE` and has all of it. Each such test says
//! at its end what it did; with `TORTURE_TABLE` that becomes a row of the table `make torture` prints.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;

/// `slice` in `make test`, `whole` in `make torture`.
pub fn how_many(slice: usize, whole: usize) -> usize {
    match env::var_os("TORTURE").is_some_and(|set| !set.is_empty()) {
        true => whole,
        false => slice,
    }
}

/// What a test of faults has done so far.
#[derive(Debug, Default)]
pub struct Tally {
    /// Kills, failed system calls, full disks, damaged archives, and so on.
    pub faults: usize,
    /// Changes that were begun, by the mount or by BoxLite.
    pub operations: usize,
    /// Contents of boxes and snapshots that were compared with what they have to be.
    pub compared: usize,
    /// Sentences about what was lost. A test goes on after the first, so that the table tells how many.
    pub losses: Vec<String>,
}

impl Tally {
    /// Says what was done, and fails if anything was lost, or if nothing was tried at all.
    ///
    /// # Panics
    /// That is how it fails.
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
