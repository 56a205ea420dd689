//! Mounting and unmounting: options, checks that say what to do, daemonizing, signals, readiness.
//!
//! Knows processes and the mount table; nothing of boxes, and nothing of FUSE beyond its device
//! and its file system type.

mod allocator;
mod attach;
mod daemonize;
mod detach;
mod holders;
mod logging;
mod options;
mod signals;
mod systemd;
mod unmount;
mod validate;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fuse::{self, Access};
use crate::mountinfo;
use crate::tree::{self, MountFacts, Tree};
use crate::{Error, Result};

pub use logging::log_to_stderr;
pub use options::{DOCUMENTED, Documented, Options};
pub use unmount::{Unmounted, remove_dead, unmount};

use detach::OwnMount;
use signals::Phase;
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
    daemonize::start(&paths.mountpoint, |word| {
        logging::log_to_system();
        serve(&paths, &request.options, |_| word.serving())
    })
}

/// Where boxlitefs is mounted now.
///
/// # Errors
/// Those of reading the mount table.
pub fn mountpoints() -> Result<Vec<PathBuf>> {
    mountinfo::ours()
}

/// Opens the home and serves it until it is unmounted; calls `announce` once it serves.
fn serve(
    paths: &MountPaths,
    options: &Options,
    announce: impl FnOnce(&Arc<Tree>) + Send,
) -> Result<()> {
    allocator::bound();
    // First of all: the signals must be blocked before anything starts a thread.
    let phase = signals::watch()?;
    logging::begin_to_write();
    let tree = Arc::new(Tree::open(
        &paths.home,
        tree::Options {
            read_only: options.read_only,
            is_shared: options.shared,
            compression: options.compression,
            compacting: options.compacting,
            imports: options.imports,
            links: options.links,
        },
    )?);
    tree.tell_of_mount(MountFacts {
        mountpoint: paths.mountpoint.clone(),
        options: options.to_json(),
    });
    phase.enter(Phase::Mounting);
    let options = &Options {
        read_only: options.read_only || tree.is_read_only(),
        ..options.clone()
    };
    let (attached, requests) = attach::attach(paths, options).map_err(explain)?;
    let own = attached.own().clone();
    phase.enter(Phase::Serving(own.clone()));
    let access = match (options.allow_other, options.allow_root) {
        (true, _) => Access::Everybody,
        (false, true) => Access::RootToo,
        (false, false) => Access::Owner,
    };
    let served = Arc::downgrade(&tree);
    let ready = || {
        read_further_ahead(&own);
        if let Some(tree) = served.upgrade() {
            announce(&tree);
        }
    };
    // A session that failed answers nobody, so nobody is to come: the mount goes before the last work.
    let failed = || remove_remains(&own).map(|_| ());
    let result = fuse::serve(tree, requests, access, ready, failed);
    let remains = remove_remains(&own);
    result?;
    match remains? {
        None => Ok(()),
        Some(place) => Err(Error::new(
            libc::ECONNABORTED,
            format!(
                "the connection of the mount on {} was aborted by umount -f or through /sys/fs/fuse/connections; it is unmounted",
                place.display()
            ),
        )),
    }
}

/// Takes away what is left of the mount when it is not served any more.
fn remove_remains(own: &OwnMount) -> Result<Option<PathBuf>> {
    detach::remove_remains(own).map_err(|error| {
        let message = format!("a mount that nobody serves is left: {}", error.message());
        Error::new(error.errno(), message)
    })
}

/// Kibibytes the kernel reads ahead in this mount: enough that a copy is read, hashed and written at the
/// same time, each by another core.
const READ_AHEAD_KIB: &str = "2048";

/// Has the kernel read further ahead than its 128 KiB, beyond which FUSE itself can't ask it to. Only
/// root may; for others a copy takes somewhat longer.
fn read_further_ahead(own: &OwnMount) {
    if !validate::is_root() {
        return;
    }
    let file = format!("/sys/class/bdi/{}/read_ahead_kb", own.id().device);
    if let Err(error) = std::fs::write(&file, READ_AHEAD_KIB) {
        log::debug!("{file}: {error}");
    }
}

/// Says what to do when mount(2) itself is not permitted. Through fusermount3 there is no errno,
/// only what it printed.
fn explain(error: Error) -> Error {
    let text = error.to_string();
    if error.errno() != libc::EPERM && !text.contains("Operation not permitted") {
        return error;
    }
    Error::new(
        libc::EPERM,
        format!(
            "{}; mounting is not permitted here: a container needs the capability SYS_ADMIN and the device /dev/fuse for it",
            text.trim_end()
        ),
    )
}

/// The path to compare with the mount table: canonical, or where even that needs an answer from
/// a file system that has none, its canonical directory and its name.
fn resolve(path: &Path) -> std::io::Result<PathBuf> {
    path.canonicalize().or_else(|error| {
        let absolute = std::path::absolute(path)?;
        match (absolute.parent(), absolute.file_name()) {
            (Some(parent), Some(name)) if error.kind() != std::io::ErrorKind::NotFound => {
                Ok(parent.canonicalize()?.join(name))
            }
            _ => Err(error),
        }
    })
}
