//! Mounting and unmounting: options, checks that say what to do, daemonizing, signals, readiness.
//!
//! Knows processes and the mount table; nothing of boxes, and nothing of FUSE beyond its device
//! and its file system type.

mod background;
mod logging;
mod memory;
mod options;
mod places;
mod service;
mod signals;
mod takedown;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fuse::{self, ServeConfig};
use crate::mountinfo;
use crate::tree::{self, MountFacts, Tree};
use crate::{Error, Result};

pub use logging::log_to_stderr;
pub use options::{DOCUMENTED, Documented, Options};
pub use takedown::unmount;

use places::Places;
use signals::Phase;

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
    let places = Places::check(&request.home, &request.mountpoint)?;
    places::check_permission(&request.options)?;
    if !request.options.read_only
        && let Some(why) = places.unwritable()
    {
        // What mount(8) does with a write-protected device.
        eprintln!("boxlitefs: {why}: mounting read-only");
    }
    if request.foreground {
        let served = serve(&places, &request.options, |tree| {
            log::info!(
                "{} is mounted on {}",
                places.home.display(),
                places.mountpoint.display()
            );
            service::serving(tree, &places);
        });
        logging::write_last_lines();
        return served;
    }
    background::start(&places.mountpoint, |word| {
        logging::log_to_system();
        serve(&places, &request.options, |_| word.serving())
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
    places: &Places,
    options: &Options,
    announce: impl FnOnce(&Arc<Tree>) + Send,
) -> Result<()> {
    memory::bound();
    // First of all: the signals must be blocked before anything starts a thread.
    let phase = signals::watch(&places.mountpoint)?;
    logging::begin_to_write();
    let tree = Arc::new(Tree::open(
        &places.home,
        tree::Options {
            read_only: options.read_only,
            is_shared: options.shared,
            compression: options.compression,
            compacting: options.compacting,
            imports: options.imports,
        },
    )?);
    tree.tell_of_mount(MountFacts {
        mountpoint: places.mountpoint.clone(),
        options: options.to_json(),
    });
    phase.enter(Phase::Mounting);
    let config = ServeConfig {
        source: source_name(places.home.as_os_str(), places::is_root()),
        read_only: options.read_only || tree.is_read_only(),
        allow_other: options.allow_other,
        allow_root: options.allow_root,
        noexec: options.noexec,
        noatime: options.noatime,
    };
    let served = Arc::downgrade(&tree);
    fuse::serve(tree, &places.mountpoint, config, || {
        phase.enter(Phase::Serving);
        read_further_ahead(&places.mountpoint);
        if let Some(tree) = served.upgrade() {
            announce(&tree);
        }
    })
    .map_err(|error| {
        if phase.is(Phase::Serving) {
            error
        } else {
            explain(error)
        }
    })
}

/// Kibibytes the kernel reads ahead in this mount: enough that a copy is read, hashed and written at the
/// same time, each by another core.
const READ_AHEAD_KIB: &str = "2048";

/// Has the kernel read further ahead than its 128 KiB, beyond which FUSE itself can't ask it to. Only
/// root may; for others a copy takes somewhat longer.
fn read_further_ahead(mountpoint: &Path) {
    if !places::is_root() {
        return;
    }
    let Ok(Some(mount)) = mountinfo::at(mountpoint) else {
        return;
    };
    // FUSE's devices have no driver: their major number is 0.
    let file = format!("/sys/class/bdi/0:{}/read_ahead_kb", mount.minor);
    if let Err(error) = std::fs::write(&file, READ_AHEAD_KIB) {
        log::debug!("{file}: {error}");
    }
}

/// The home as the mount table's source. Who is not root mounts through fusermount3, which takes
/// options as one string: commas would end the name, and it undoes these backslashes.
fn source_name(home: &OsStr, root: bool) -> String {
    let name = home.to_string_lossy();
    if root {
        return name.into_owned();
    }
    name.replace('\\', "\\\\").replace(',', "\\,")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_the_home_does_not_end_the_source_name_for_fusermount() {
        assert_eq!(
            source_name(OsStr::new(r"/a,allow_other\b"), false),
            r"/a\,allow_other\\b"
        );
        assert_eq!(source_name(OsStr::new("/a,b"), true), "/a,b");
    }
}
