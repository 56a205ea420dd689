//! The command line, defined for clap. Help, manual pages and completions are made from it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::home::GUARD;
use crate::mount::DOCUMENTED_OPTIONS;

const EXAMPLES: &str = "\
Examples:
  boxlitefs mount /mnt/boxlite                        show ~/.boxlite at /mnt/boxlite
  mkdir /mnt/boxlite/web/snapshots/before-upgrade     take a snapshot
  cp /mnt/boxlite/web/export.boxlite /backup/         back a box up
  cp -r /mnt/boxlite/web /mnt/boxlite/web2            clone a box
  boxlitefs status /mnt/boxlite                       see what it is doing
  boxlitefs unmount /mnt/boxlite

/mnt/boxlite/.boxlite/log says why something failed.";

const MOUNT_EXAMPLES: &str = "\
Examples:
  boxlitefs mount /mnt/boxlite
  boxlitefs mount -o ro /srv/boxlite-home /mnt/boxlite
  boxlitefs mount -f -o allow_other /srv/boxlite-home /mnt/boxlite

In /etc/fstab (with mount.boxlite installed):
  /srv/boxlite-home  /mnt/boxlite  boxlite  nofail,allow_other  0  0

In the foreground, RUST_LOG=debug logs more. Under systemd it reports when it serves, and that it is alive.";

const UNMOUNT_EXAMPLES: &str = "\
Examples:
  boxlitefs unmount /mnt/boxlite
  boxlitefs unmount --dead /mnt/boxlite   remove what a killed mount left, and nothing else

Exit status: 0 unmounted, and the process that served it has ended; 1 nothing was unmounted, try again;
3 unmounted here, but still served: the message says what uses it.";

const STATUS_EXAMPLES: &str = "\
Examples:
  boxlitefs status                        all mounts of boxlitefs
  boxlitefs status /mnt/boxlite
  boxlitefs status --watch /mnt/boxlite   follow boxes being copied
  boxlitefs status --json /mnt/boxlite    the same as .boxlite/status in the mount";

const CHECK_EXAMPLES: &str = "\
Examples:
  boxlitefs check                     check ~/.boxlite
  boxlitefs check /srv/boxlite-home
  boxlitefs check --repair            remove what crashes left, while no BoxLite program has it open

Exit status: 0 clean, 1 something was found, 2 the check failed.";

const COMPACT_EXAMPLES: &str = "\
Examples:
  boxlitefs compact                   reclaim the space of deleted snapshots in ~/.boxlite
  boxlitefs compact /srv/boxlite-home

Running boxes and layers that are being read are skipped. It works beside a mount of the same home,
but not while a BoxLite program has it open.";

/// Mounts a BoxLite home as files: snapshot with mkdir, back up and clone with cp.
#[derive(Parser)]
#[command(name = "boxlitefs", version, about, after_help = EXAMPLES, disable_help_subcommand = true)]
pub struct CommandLine {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Mount a BoxLite home on a directory
    #[command(
        override_usage = "boxlitefs mount [OPTIONS] [HOME] MOUNTPOINT",
        after_help = MOUNT_EXAMPLES
    )]
    Mount(MountArguments),
    /// Unmount what `boxlitefs mount` mounted
    #[command(after_help = UNMOUNT_EXAMPLES)]
    Unmount {
        /// Only if its process was killed and no process serves it; else do nothing
        #[arg(long)]
        dead: bool,
        /// Where it is mounted
        mountpoint: PathBuf,
    },
    /// Show what a mount is doing: copies and their progress, space and memory
    #[command(after_help = STATUS_EXAMPLES)]
    Status(StatusArguments),
    /// Look for damage and leftovers in a home, without changing it unless asked to
    #[command(after_help = CHECK_EXAMPLES)]
    Check {
        /// Remove or adopt leftovers, and nothing that is read
        #[arg(long)]
        repair: bool,
        /// The BoxLite home [default: $BOXLITE_HOME, else ~/.boxlite]
        home: Option<PathBuf>,
    },
    /// Merge redundant layers and reclaim their space
    #[command(after_help = COMPACT_EXAMPLES)]
    Compact {
        /// The BoxLite home [default: $BOXLITE_HOME, else ~/.boxlite]
        home: Option<PathBuf>,
    },
    /// Resumes a paused virtual machine if the mount that paused it dies
    #[command(name = GUARD, hide = true)]
    Guard,
}

/// The arguments of `mount`.
#[derive(Args)]
pub struct MountArguments {
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    pub foreground: bool,
    /// Mount options, separated by commas
    #[arg(
        short = 'o',
        value_name = "OPT[,OPT…]",
        help = "Mount options, separated by commas; --help lists them",
        long_help = options_help()
    )]
    pub options: Vec<String>,
    /// Ignore unknown options, as `mount -s` asks
    #[arg(long, hide = true)]
    pub sloppy: bool,
    /// The BoxLite home [default: $BOXLITE_HOME, else ~/.boxlite], and the directory to mount on
    #[arg(required = true, num_args = 1..=2, value_names = ["HOME", "MOUNTPOINT"])]
    pub places: Vec<PathBuf>,
}

/// The arguments of `status`.
#[derive(Args)]
pub struct StatusArguments {
    /// Keep showing it, with a bar for each export and import, until interrupted or unmounted
    #[arg(short, long)]
    pub watch: bool,
    /// Print .boxlite/status as it is
    #[arg(long, conflicts_with = "watch")]
    pub json: bool,
    /// Where it is mounted [default: every mount of boxlitefs]
    pub mountpoint: Option<PathBuf>,
}

/// Describes the mount options, a paragraph each.
fn options_help() -> String {
    let mut help = String::from("Mount options, separated by commas:\n");
    for option in DOCUMENTED_OPTIONS {
        help += &format!("\n  {}: {}", option.form, option.effect);
    }
    help + "\n\nnosuid and nodev are always on. Options of every mount (defaults, nofail, user, x-… and so on) are accepted."
}
