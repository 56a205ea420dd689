//! Mounting and unmounting: options, checks that say what to do, daemonizing, signals, readiness.
//!
//! Knows processes and the mount table; nothing of boxes, and nothing of FUSE beyond its device
//! and its file system type.

mod allocator;
mod attach;
mod connection;
mod daemonize;
mod detach;
mod documented;
mod fusermount;
mod holders;
mod logging;
mod options;
mod process;
mod serve;
mod signals;
mod systemd;
mod unmount;
mod validate;

use std::path::PathBuf;

use crate::{Result, mountinfo};

pub use documented::{DOCUMENTED_OPTIONS, DocumentedOption};
pub use logging::log_to_stderr;
pub use options::Options;
pub use unmount::{Unmounted, remove_dead, unmount};

use serve::serve;
use validate::MountPaths;

/// A mount that is asked for.
#[derive(Clone, Debug)]
pub struct Mount {
    /// The BoxLite home; may be relative.
    pub home: PathBuf,
    /// The directory to mount on; may be relative.
    pub mountpoint: PathBuf,
    /// What `-o` asked for.
    pub options: Options,
    /// Serve from this process and return after unmount, instead of returning once it serves.
    pub foreground: bool,
}

/// Mounts a home. In the foreground it returns after unmount (by anyone, or by SIGTERM, SIGINT or
/// SIGHUP); else it forks a process that serves and returns once that really serves. To be called
/// before the process has started a thread.
///
/// # Errors
/// ENOENT or ENOTDIR for a home or mountpoint that is not there; EBUSY when something is mounted
/// on the mountpoint; EINVAL when one lies inside the other or the home is none; ENODEV without
/// FUSE; EPERM when the user may not mount so; else what serving failed with.
pub fn run(request: Mount) -> Result<()> {
    let paths = MountPaths::check(&request.home, &request.mountpoint)?;
    validate::check_permission(&request.options)?;
    if !request.options.read_only
        && let Some(why) = paths.unwritable()
    {
        // What mount(8) does with a write-protected device.
        eprintln!("boxlitefs: {why}: mounting read-only");
    }
    if request.foreground {
        let served = serve(&paths, &request.options, |tree| {
            log::info!(
                "{} is mounted on {}",
                paths.home.display(),
                paths.mountpoint.display()
            );
            systemd::serving(tree, &paths);
        });
        logging::write_last_lines();
        return served;
    }
    daemonize::start(&paths.mountpoint, |pipe| {
        logging::log_to_system();
        serve(&paths, &request.options, |_| pipe.report_ready())
    })
}

/// Where boxlitefs is mounted now.
///
/// # Errors
/// Those of reading the mount table.
pub fn mountpoints() -> Result<Vec<PathBuf>> {
    mountinfo::ours()
}
