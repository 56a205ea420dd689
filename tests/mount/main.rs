//! Everything judged through a real mount of a home that BoxLite made.

#[path = "../common/mod.rs"]
mod common;

mod accepted;
mod beside_boxlite;
mod browse;
mod check;
mod commands;
mod compacting;
mod copying;
mod deleting;
mod differences;
mod disk_usage;
mod editing;
mod ending;
mod full_paths;
mod guests;
mod help;
mod hostile;
mod inside;
mod kept;
mod large;
mod mistakes;
mod mounting;
mod moved_homes;
mod never_lost;
mod restoring;
mod reviewed;
mod running;
mod second_copies;
mod semantics;
mod shared;
mod snapshot;
mod staging;
mod states;
mod undo;
mod undo_beside;
mod why;
mod writing;
