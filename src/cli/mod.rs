//! The command line: mount, unmount, status, check, compact.

mod arguments;
mod output;
mod status;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use crate::home::run_guard;
use crate::mount::{self, Mount, Options, Unmounted};
use crate::store::{check, compact};
use crate::{Error, Result};

pub use arguments::CommandLine;

use arguments::{Command, MountArguments};
use output::{Bar, Findings, done, failed};

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
        Command::Check { repair, home } => match run_check(home, repair) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::from(1),
            Err(error) => failed(error, 2),
        },
        Command::Compact { home } => done(run_compact(home)),
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
        home: home_or_default(arguments.places.pop())?,
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

fn run_check(home: Option<PathBuf>, repair: bool) -> Result<bool> {
    let home = home_or_default(home)?;
    let mut findings = Findings::begin(&home);
    let checked = check::run(&home, repair, &mut findings);
    findings.finish();
    checked
}

fn run_compact(home: Option<PathBuf>) -> Result<()> {
    compact::run(&home_or_default(home)?, &mut io::stdout(), &Bar::new())
}

/// Returns the home that was asked for, or the one that BoxLite itself would use: $BOXLITE_HOME,
/// else ~/.boxlite.
///
/// # Errors
/// ENOENT when neither is known.
fn home_or_default(asked: Option<PathBuf>) -> Result<PathBuf> {
    let from_environment = || std::env::var_os("BOXLITE_HOME").filter(|path| !path.is_empty());
    let below_user_home = || Some(std::env::home_dir()?.join(".boxlite").into_os_string());
    asked
        .map(OsString::from)
        .or_else(from_environment)
        .or_else(below_user_home)
        .map(PathBuf::from)
        .ok_or_else(|| {
            Error::new(
                libc::ENOENT,
                "the BoxLite home is unknown: name it, or set BOXLITE_HOME",
            )
        })
}
