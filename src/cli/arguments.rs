//! The command line, defined for clap. Help, manual pages and completions are made from it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::home::GUARD;
use crate::mount::DOCUMENTED_OPTIONS;
use crate::tree::Undo;

const EXAMPLES: &str = "\
Examples:
  boxlitefs mount /mnt/boxlite                        show ~/.boxlite at /mnt/boxlite
  mkdir /mnt/boxlite/web/snapshots/before-upgrade     take a snapshot
  cp /mnt/boxlite/web/export.boxlite /backup/         back a box up
  cp -r /mnt/boxlite/web /mnt/boxlite/web2            clone a box
  boxlitefs status /mnt/boxlite                       see what it is doing
  boxlitefs unmount /mnt/boxlite

`boxlitefs why` says why something failed, and what to do instead.";

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

const UNDO_EXAMPLES: &str = "\
Examples:
  boxlitefs undo /mnt/boxlite
  mv /mnt/boxlite/.boxlite/undo/20261129T150405Z-web /mnt/boxlite/web     have a removed box back
  cp /mnt/boxlite/.boxlite/undo/20261129T150405Z-web/export.boxlite /mnt/boxlite/web/export.boxlite
                                          undo a restore";

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
  boxlitefs compact --purge-undo      also free what was removed and could be had back

Running boxes and layers that are being read are skipped. It works beside a mount of the same home,
but not while a BoxLite program has it open.";

const LIST_EXAMPLES: &str = "\
Examples:
  boxlitefs ls                        the boxes of ~/.boxlite
  boxlitefs ls /mnt/boxlite           those of the home that is mounted there
  boxlitefs ls --json /srv/boxlite-home

DISK is what the box and its snapshots need, and no other box. CHANGED is when its disk changed last.";

const DU_EXAMPLES: &str = "\
Examples:
  boxlitefs du                        what the boxes of ~/.boxlite take
  boxlitefs du --json /mnt/boxlite    the same of the home that is mounted there

OWN is what nothing else reads, SHARED what others read as well. FREES is what deleting the box (with
its snapshots) or the snapshot gives back, and COMPACTED what is back once the layers that remain are
merged, which `boxlitefs compact` does now and a mount does later. A removed box or snapshot can be
had back for a while, and frees its space when that is over. Bytes are blocks on the disk, and the sum
is that of `du -s`. Blocks that two files share (reflinks) count for each of them.";

const WHY_EXAMPLES: &str = "\
Examples:
  boxlitefs why                       why something failed in the mount that you are in
  boxlitefs why /mnt/boxlite
  boxlitefs why --json /mnt/boxlite   an object for each refusal

A shell says only `Device or resource busy`. The mount remembers the last hundred refusals of each
user until it is unmounted, and tells them to that user and to root alone.";

const PRUNE_EXAMPLES: &str = "\
Examples:
  boxlitefs prune --keep-hourly 24 --keep-daily 7 ~/boxes/*
  boxlitefs prune --prefix hourly- --keep-last 24 ~/boxes/web
  boxlitefs prune --keep-last 3 --dry-run web     show what would be deleted

A snapshot stays if any rule keeps it, by the rules of restic: periods without a snapshot do not
count, and the oldest one stays while a rule has kept fewer than it may. Hours, days, weeks and months
are those of UTC. Without --prefix, snapshots that somebody took by hand are deleted like others.";

const INIT_EXAMPLES: &str = "\
Examples:
  boxlitefs init /tmp/look && boxlitefs mount /tmp/look /mnt/boxlite
  cp web.boxlite /mnt/boxlite/        look into an archive where there is no BoxLite";

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
    #[command(visible_alias = "umount", after_help = UNMOUNT_EXAMPLES)]
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
    /// List what was removed or restored over in a mount and can be had back
    #[command(after_help = UNDO_EXAMPLES)]
    Undo {
        /// Where it is mounted
        mountpoint: PathBuf,
    },
    /// Look for damage and leftovers in a home, without changing it unless asked to
    #[command(after_help = CHECK_EXAMPLES)]
    Check {
        /// Remove or adopt leftovers, and nothing that is read
        #[arg(long)]
        repair: bool,
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
        /// The BoxLite home, or where it is mounted [default: $BOXLITE_HOME, else ~/.boxlite]
        #[arg(value_name = "HOME|MOUNTPOINT")]
        home: Option<PathBuf>,
    },
    /// Merge redundant layers and reclaim their space
    #[command(after_help = COMPACT_EXAMPLES)]
    Compact {
        /// First free what is only kept to be had back
        #[arg(long)]
        purge_undo: bool,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
        /// The BoxLite home, or where it is mounted [default: $BOXLITE_HOME, else ~/.boxlite]
        #[arg(value_name = "HOME|MOUNTPOINT")]
        home: Option<PathBuf>,
    },
    /// List the boxes of a home
    #[command(after_help = LIST_EXAMPLES)]
    Ls {
        /// Print the list as JSON
        #[arg(long)]
        json: bool,
        /// The BoxLite home, or where it is mounted [default: $BOXLITE_HOME, else ~/.boxlite]
        #[arg(value_name = "HOME|MOUNTPOINT")]
        home: Option<PathBuf>,
    },
    /// Show what boxes and snapshots take on the disk, and what deleting them would give back
    #[command(after_help = DU_EXAMPLES)]
    Du {
        /// Print the result as JSON, in bytes
        #[arg(long)]
        json: bool,
        /// The BoxLite home, or where it is mounted [default: $BOXLITE_HOME, else ~/.boxlite]
        #[arg(value_name = "HOME|MOUNTPOINT")]
        home: Option<PathBuf>,
    },
    /// Say why the mount refused something lately, and what to do instead
    #[command(after_help = WHY_EXAMPLES)]
    Why {
        /// Show the refusals of all users, as root
        #[arg(long)]
        all: bool,
        /// Print the refusals as JSON
        #[arg(long)]
        json: bool,
        /// Where it is mounted, any place in it, or its home [default: the mount that the working
        /// directory is in, else the only one]
        #[arg(value_name = "MOUNTPOINT")]
        place: Option<PathBuf>,
    },
    /// Delete the snapshots of boxes that no rule keeps
    #[command(after_help = PRUNE_EXAMPLES)]
    Prune(PruneArguments),
    /// Make an empty home, which BoxLite takes as its own
    #[command(after_help = INIT_EXAMPLES)]
    Init {
        /// The directory: an empty one, or one that is made
        home: PathBuf,
    },
    /// Print the version
    #[command(after_help = "Examples:\n  boxlitefs version\n  boxlitefs version --json")]
    Version {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
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
    /// Where it is mounted, any place in it, or its home [default: every mount of boxlitefs]
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: Option<PathBuf>,
}

/// The arguments of `prune`.
#[derive(Args)]
pub struct PruneArguments {
    /// Keep the N newest snapshots
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_last: u32,
    /// Keep the newest snapshot of each of N hours that have any
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_hourly: u32,
    /// Keep the newest snapshot of each of N days that have any
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_daily: u32,
    /// Keep the newest snapshot of each of N weeks that have any
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_weekly: u32,
    /// Keep the newest snapshot of each of N months that have any
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_monthly: u32,
    /// Look only at snapshots whose names begin with this; all others stay
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub prefix: String,
    /// How long what is deleted of boxes that are given by name can be had back: such as 30m, 24h
    /// or 7d, or off. A mount deletes with its own option
    #[arg(long, value_name = "TIME", default_value = "24h")]
    pub undo: Undo,
    /// Show what would be deleted, and delete nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print what was done as JSON
    #[arg(long)]
    pub json: bool,
    /// The home of boxes that are given by name, or where it is mounted [default: $BOXLITE_HOME,
    /// else ~/.boxlite]
    #[arg(long, value_name = "HOME|MOUNTPOINT")]
    pub home: Option<PathBuf>,
    /// The boxes: their directories in a mount, or their names
    #[arg(required = true, value_name = "BOX")]
    pub boxes: Vec<PathBuf>,
}

/// Describes the mount options, a paragraph each.
fn options_help() -> String {
    let mut help = String::from("Mount options, separated by commas:\n");
    for option in DOCUMENTED_OPTIONS {
        help += &format!("\n  {}: {}", option.form, option.effect);
    }
    help + "\n\nnosuid and nodev are always on. Options of every mount (defaults, nofail, user, x-… and so on) are accepted."
}
