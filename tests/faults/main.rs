//! Fault tests: killed processes, power loss, failing and full disks, many concurrent clients.
//!
//! - Crashes: the tests kill the process that serves the mount, or that compacts or repairs the
//!   home, at every named point of every change and at random moments. Then the home is mounted
//!   again, or BoxLite first uses the box. In each case the box must keep its contents, and the
//!   interrupted change must be complete or undone.
//! - Faulty disks: the home lies on a file system that the test serves. It records every call with
//!   its data, so that the tests can build each state that a power loss could leave. It can also
//!   fail any call.

#[path = "../common/mod.rs"]
mod common;

mod changes;
mod contents;
mod files;
mod full_disk;
mod io_errors;
mod judge;
mod many;
mod model;
mod named_points;
mod next;
mod power_loss;
mod random_moments;
mod record;
mod server;
mod waiting;
