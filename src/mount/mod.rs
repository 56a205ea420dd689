//! Mounts and unmounts: options, checks that say what to do, daemonizing, signals, readiness.
//!
//! This room knows processes and the mount table. It knows nothing of boxes, and of FUSE only its
//! device and its file system type.

mod allocator;
mod attach;
mod daemonize;
mod detach;
mod documented;
mod fusermount;
mod holders;
mod logging;
mod options;
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

/// A request to mount.
#[derive(Clone, Debug)]
pub struct Mount {
    /// The BoxLite home; may be relative.
    pub home: PathBuf,
    /// The directory to mount on; may be relative.
    pub mountpoint: PathBuf,
    /// The options of `-o`.
    pub options: Options,
    /// Serve from this process and return after the unmount, instead of returning once it serves.
    pub foreground: bool,
}

/// Mounts a home. In the foreground it returns after the unmount (by any process, or by SIGTERM,
/// SIGINT or SIGHUP). Otherwise it forks a process that serves, and returns once that serves. Call
/// it before the process has started a thread.
///
/// # Errors
/// ENOENT or ENOTDIR for a home or mountpoint that is missing; EBUSY when a FUSE file system is
/// mounted on the mountpoint; EINVAL when one lies inside the other or the home is not a home;
/// ENODEV without FUSE; EPERM when the user may not mount with these options; else the error of
/// serving.
pub fn run(request: Mount) -> Result<()> {
    let paths = MountPaths::check(&request.home, &request.mountpoint)?;
    validate::check_permission(&request.options)?;
    if !request.options.read_only
        && let Some(why) = paths.unwritable()
    {
        // As mount(8) does with a write-protected device.
        eprintln!("boxlitefs: {why}: mounting read-only");
    }
    if paths.hides_files() {
        let place = paths.mountpoint.display();
        eprintln!(
            "boxlitefs: {place} is not empty: what is in it is hidden until `boxlitefs unmount {place}`"
        );
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

/// Returns where boxlitefs is mounted now, each place once.
///
/// # Errors
/// Those of reading the mount table.
pub fn mountpoints() -> Result<Vec<PathBuf>> {
    mountinfo::ours()
}
