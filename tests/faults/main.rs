//! What goes wrong: killed processes, lost power, failing and full disks, many at once.
//!
//! - Crashes: the process that serves the mount, or that compacts or repairs the home, is killed at
//!   every named point of every change, and at random moments. Then the home is mounted again, or
//!   BoxLite starts first and uses the box. Whatever happens next, the box is there with its
//!   contents, and what was under way is complete or gone.
//! - Faulty disks: a home lies on a file system that the test serves. It records every call with
//!   its data, so that each state a loss of power could leave can be built, and it fails any call
//!   it is told to.

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
