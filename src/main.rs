//! The command line: mount, unmount, check, compact.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use boxlitefs::home::{GUARD, run_guard};
use boxlitefs::mount::{self, Mount, Options};
use boxlitefs::store::{check, compact};
use boxlitefs::{Error, Result};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const EXAMPLES: &str = "\
Examples:
  boxlitefs mount /mnt/boxlite                        show ~/.boxlite at /mnt/boxlite
  mkdir /mnt/boxlite/web/snapshots/before-upgrade     take a snapshot
  cp /mnt/boxlite/web/export.boxlite /backup/         back a box up
  cp -r /mnt/boxlite/web /mnt/boxlite/web2            clone a box
  boxlitefs unmount /mnt/boxlite

Why something failed is in /mnt/boxlite/.boxlite/log.";

const MOUNT_EXAMPLES: &str = "\
Examples:
  boxlitefs mount /mnt/boxlite
  boxlitefs mount -o ro /srv/boxlite-home /mnt/boxlite
  boxlitefs mount -f -o allow_other /srv/boxlite-home /mnt/boxlite

In /etc/fstab (with mount.boxlite installed):
  /srv/boxlite-home  /mnt/boxlite  boxlite  nofail,allow_other  0  0

In the foreground, RUST_LOG=debug says more.";

const UNMOUNT_EXAMPLES: &str = "\
Examples:
  boxlitefs unmount /mnt/boxlite";

const CHECK_EXAMPLES: &str = "\
Examples:
  boxlitefs check                     look at ~/.boxlite
  boxlitefs check /srv/boxlite-home
  boxlitefs check --repair            remove what crashes left, once no BoxLite program has it open

Exit status: 0 clean, 1 something was found, 2 the check could not be made.";

const COMPACT_EXAMPLES: &str = "\
Examples:
  boxlitefs compact                   give back what deleted snapshots took in ~/.boxlite
  boxlitefs compact /srv/boxlite-home

Boxes that run and layers that are being read are left for another time. It works beside a mount of
the same home, but not while a BoxLite program has it open.";

/// What is logged in the foreground unless RUST_LOG says otherwise. fuser calls it a failed unmount
/// when somebody else unmounted, which is how a mount normally ends, and an error when somebody was
/// killed while he waited for a reply.
const LOGGED: &str = "info,fuser=warn,fuser::mnt=error,fuser::reply=off";

/// Mounts a BoxLite home as files: snapshot with mkdir, back up and clone with cp.
#[derive(Parser)]
#[command(name = "boxlitefs", version, about, after_help = EXAMPLES)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount a BoxLite home on a directory
    #[command(
        override_usage = "boxlitefs mount [OPTIONS] [HOME] MOUNTPOINT",
        after_help = MOUNT_EXAMPLES
    )]
    Mount(MountArguments),
    /// Unmount what `boxlitefs mount` mounted
    #[command(after_help = UNMOUNT_EXAMPLES)]
    Unmount {
        /// Where it is mounted
        mountpoint: PathBuf,
    },
    /// Look for damage and leftovers in a home, without changing it unless asked to
    #[command(after_help = CHECK_EXAMPLES)]
    Check {
        /// Remove or adopt leftovers; nothing that anything reads from
        #[arg(long)]
        repair: bool,
        /// The BoxLite home [default: $BOXLITE_HOME, else ~/.boxlite]
        home: Option<PathBuf>,
    },
    /// Sets a paused virtual machine going if the mount that paused it dies
    #[command(name = GUARD, hide = true)]
    Guard,
    /// Merge layers that nothing needs by themselves, and give their space back, now
    #[command(after_help = COMPACT_EXAMPLES)]
    Compact {
        /// The BoxLite home [default: $BOXLITE_HOME, else ~/.boxlite]
        home: Option<PathBuf>,
    },
}

#[derive(Args)]
struct MountArguments {
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    foreground: bool,
    /// Mount options, separated by commas: ro, noexec, noatime, allow_other, allow_root, shared (take
    /// snapshots, clone, import and restore also while a BoxLite program has the home open),
    /// compress=LEVEL (of export.boxlite.zst, 1 to 19; 3 unless said), cache=SIZE (most disk space
    /// for finished ones; 4G unless said), compact=SECONDS (how long nothing has to go on until layers
    /// that nothing needs by themselves are merged; 30 unless said, or off), and those every mount takes
    #[arg(short = 'o', value_name = "OPT[,OPT…]")]
    options: Vec<String>,
    /// Ignore options that are not known, as `mount -s` asks
    #[arg(long, hide = true)]
    sloppy: bool,
    /// The BoxLite home [default: $BOXLITE_HOME, else ~/.boxlite], and the directory to mount on
    #[arg(required = true, num_args = 1..=2, value_names = ["HOME", "MOUNTPOINT"])]
    places: Vec<PathBuf>,
}

fn main() -> ExitCode {
    match CommandLine::parse().command {
        Command::Mount(arguments) => done(run_mount(arguments)),
        Command::Unmount { mountpoint } => done(mount::unmount(&mountpoint)),
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
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(LOGGED)).init();
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

fn run_check(home: Option<PathBuf>, repair: bool) -> Result<bool> {
    check::run(&home_or_default(home)?, repair, &mut io::stdout().lock())
}

fn run_compact(home: Option<PathBuf>) -> Result<()> {
    compact::run(&home_or_default(home)?, &mut io::stdout(), &Bar::new())
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
