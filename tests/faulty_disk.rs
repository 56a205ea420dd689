//! Disks that lose what was not flushed, and disks that fail. A home lies on a file system that the test
//! serves: it records every call with its data, so that for each moment there can be made what a loss of
//! power would have left, and it fails any call it is told to.

#[path = "crash/changes.rs"]
mod changes;
mod common;
#[path = "crash/contents.rs"]
mod contents;
#[path = "faulty_disk/files.rs"]
mod files;
#[path = "faulty_disk/io_errors.rs"]
mod io_errors;
#[path = "crash/judge.rs"]
mod judge;
#[path = "crash/next.rs"]
mod next;
#[path = "faulty_disk/power_loss.rs"]
mod power_loss;
#[path = "faulty_disk/record.rs"]
mod record;
#[path = "faulty_disk/server.rs"]
mod server;
