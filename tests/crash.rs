//! Crashes: the process that serves the mount, or that compacts or repairs the home, is killed at every
//! named point of every change, and at random moments of it, and then the home is mounted again, or
//! BoxLite is started first and uses the box. Whatever happens next, the box is there with its contents,
//! and what was under way is whole or gone.

#[path = "crash/changes.rs"]
mod changes;
mod common;
#[path = "crash/contents.rs"]
mod contents;
#[path = "crash/judge.rs"]
mod judge;
#[cfg(feature = "crash-points")]
#[path = "crash/named_points.rs"]
mod named_points;
#[path = "crash/next.rs"]
mod next;
#[path = "crash/random_moments.rs"]
mod random_moments;

#[cfg(not(feature = "crash-points"))]
#[test]
fn the_crash_tests_need_the_crash_points() {
    panic!("no crash point is built in: run `cargo test --features crash-points`, or `make test`");
}
