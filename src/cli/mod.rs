//! The command line: mount, unmount, status, undo, check, compact, ls, du, why, prune, init, version.

mod arguments;
mod disk_usage;
mod examine;
mod list;
mod output;
mod place;
mod prune;
mod status;
mod undo;
mod why;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use crate::Result;
use crate::home::{init_home, run_guard};
use crate::mount::{self, Mount, Options, Unmounted};

pub use arguments::CommandLine;

use arguments::{Command, MountArguments};
use output::{done, failed, print};
use place::home_of;

/// The exit status of an unmount after which the file system is still served.
const STILL_SERVED: u8 = 3;

/// Runs the command line of this process; returns its exit status.
pub fn run() -> ExitCode {
    match CommandLine::parse().command {
        Command::Mount(arguments) => done(run_mount(arguments)),
        Command::Unmount {
            dead: false,
            mountpoint,
        } => run_unmount(&mountpoint),
        Command::Unmount { mountpoint, .. } => done(mount::remove_dead(&mountpoint)),
        Command::Status(arguments) => done(status::run(&arguments)),
        Command::Check { repair, json, home } => match examine::check(home, repair, json) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(1),
            Err(error) => failed(error, 2),
        },
        Command::Compact {
            purge_undo,
            json,
            home,
        } => done(examine::compact(home, purge_undo, json)),
        Command::Undo { mountpoint } => done(undo::run(&mountpoint)),
        Command::Ls { json, home } => done(list::run(home, json)),
        Command::Du { json, home } => done(disk_usage::run(home, json)),
        Command::Why { all, json, place } => done(why::run(place.as_deref(), all, json)),
        Command::Prune(arguments) => done(prune::run(&arguments)),
        Command::Init { home } => done(run_init(&home)),
        Command::Version { json } => done(print_version(json)),
        Command::Guard => {
            run_guard();
            ExitCode::SUCCESS
        }
    }
}

fn run_mount(mut arguments: MountArguments) -> Result<()> {
    let options = Options::parse(&arguments.options, arguments.sloppy)?;
    if arguments.foreground {
        mount::log_to_stderr();
    }
    // One path is the mountpoint; two are the home and the mountpoint.
    let mountpoint = arguments.places.pop().unwrap_or_default();
    mount::run(Mount {
        home: home_to_mount(arguments.places.pop())?,
        mountpoint,
        options,
        foreground: arguments.foreground,
    })
}

fn run_unmount(mountpoint: &Path) -> ExitCode {
    let unmounted = mount::unmount(mountpoint, |message| eprintln!("boxlitefs: {message}"));
    match unmounted {
        Ok(Unmounted::Entirely) => ExitCode::SUCCESS,
        Ok(Unmounted::OnlyHere(error)) => failed(error, STILL_SERVED),
        Err(error) => failed(error, 1),
    }
}

/// Returns the home to mount: the one that is named, which need not be a mount, or the default.
fn home_to_mount(asked: Option<PathBuf>) -> Result<PathBuf> {
    asked.map_or_else(|| home_of(None), Ok)
}

fn run_init(home: &Path) -> Result<()> {
    let root = init_home(home)?;
    print(&format!("{} is an empty BoxLite home\n", root.display()))
}

fn print_version(as_json: bool) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let text = if as_json {
        serde_json::json!({"boxlitefs": version}).to_string()
    } else {
        format!("boxlitefs {version}")
    };
    print(&(text + "\n"))
}
