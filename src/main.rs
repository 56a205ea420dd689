//! The command line: mount, unmount, status, check, compact.

mod command_line;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use boxlitefs::home::run_guard;
use boxlitefs::mount::{self, Mount, Options, Unmounted};
use boxlitefs::store::{check, compact};
use boxlitefs::{Error, Result};
use clap::Parser;
use command_line::{Command, CommandLine, MountArguments, manual, status};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The exit status of an unmount after which what was mounted is still served.
const STILL_SERVED: u8 = 3;

fn main() -> ExitCode {
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
        Command::Manual { directory } => done(manual::write(&directory)),
    }
}

fn run_mount(mut arguments: MountArguments) -> Result<()> {
    let options = Options::parse(&arguments.options, arguments.sloppy)?;
    if arguments.foreground {
        mount::log_to_stderr();
    }
    // One place is the mountpoint; two are the home and the mountpoint.
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
    findings.bar.finish_and_clear();
    checked
}

fn run_compact(home: Option<PathBuf>) -> Result<()> {
    compact::run(&home_or_default(home)?, &mut io::stdout(), &Bar::new())
}

/// Standard output, with something that moves on a terminal while nothing is found.
struct Findings {
    bar: ProgressBar,
}

impl Findings {
    fn begin(home: &Path) -> Findings {
        if !io::stderr().is_terminal() {
            return Findings {
                bar: ProgressBar::hidden(),
            };
        }
        let bar = ProgressBar::new_spinner();
        bar.set_message(format!("looking at {}", home.display()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Findings { bar }
    }
}

impl Write for Findings {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bar.suspend(|| io::stdout().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

/// A progress bar, on a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let style = "{msg}: {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Bar(bar)
    }
}

impl compact::Meter for Bar {
    fn begin(&self, what: &str, bytes: u64) {
        if io::stderr().is_terminal() {
            self.0.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.0.reset();
        self.0.set_length(bytes);
        self.0.set_message(what.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}

/// The home asked for, or the one BoxLite itself would use: $BOXLITE_HOME, else ~/.boxlite.
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
                "it is not known where the BoxLite home is: name it, or set BOXLITE_HOME",
            )
        })
}

fn done(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(error, 1),
    }
}

/// Prints what failed as one line, whatever line breaks a cause brought along.
fn failed(error: impl Display, status: u8) -> ExitCode {
    let text = error.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    eprintln!("boxlitefs: {}", lines.join("; "));
    ExitCode::from(status)
}
