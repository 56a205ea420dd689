//! Serves a home, from opening it to the end of the mount.

use std::path::PathBuf;
use std::sync::Arc;

use super::detach::{self, OwnMount};
use super::signals::{self, Phase};
use super::validate::{self, MountPaths};
use super::{Options, allocator, attach, logging};
use crate::fuse::{self, Access};
use crate::tree::{self, MountFacts, Tree};
use crate::{Error, Result};

/// Opens the home and serves it until it is unmounted. Calls `announce` once it serves.
///
/// # Errors
/// Those of opening the home, of mounting and of serving. ECONNABORTED when the connection was
/// aborted; the mount is removed then.
pub(super) fn serve(
    paths: &MountPaths,
    options: &Options,
    announce: impl FnOnce(&Arc<Tree>) + Send,
) -> Result<()> {
    allocator::limit_kept_memory();
    // First of all, since the signals must be blocked before anything starts a thread.
    let phase = signals::watch()?;
    logging::begin_to_write();
    let tree = open_tree(paths, options)?;
    phase.enter(Phase::Mounting);
    let options = &Options {
        read_only: options.read_only || tree.is_read_only(),
        ..options.clone()
    };
    let (attached, requests) = attach::attach(paths, options).map_err(explain)?;
    let own = attached.own().clone();
    phase.enter(Phase::Serving(own.clone()));
    let served = Arc::downgrade(&tree);
    let ready = || {
        read_further_ahead(&own);
        if let Some(tree) = served.upgrade() {
            announce(&tree);
        }
    };
    // A session that failed answers no requests, so no process must enter any more: the mount is
    // removed before the last work is waited for.
    let failed = || remove_remains(&own).map(|_| ());
    let result = fuse::serve(tree, requests, access(options), ready, failed);
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

/// Opens the home.
///
/// # Errors
/// When it is not a home, or can't be read.
fn open_tree(paths: &MountPaths, options: &Options) -> Result<Arc<Tree>> {
    let tree = Tree::open(
        &paths.home,
        tree::Options {
            read_only: options.read_only,
            is_exclusive: options.exclusive,
            compression: options.compression,
            compacting: options.compacting,
            imports: options.imports,
            links: options.links,
            undo: options.undo,
        },
    )?;
    tree.set_mount_facts(MountFacts {
        mountpoint: paths.mountpoint.clone(),
        options: options.to_json(),
    });
    Ok(Arc::new(tree))
}

/// Which users may enter a mount with these options.
fn access(options: &Options) -> Access {
    if options.allow_other {
        Access::Everybody
    } else if options.allow_root {
        Access::RootToo
    } else {
        Access::Owner
    }
}

/// Removes the mount if it is still there when it is no longer served.
fn remove_remains(own: &OwnMount) -> Result<Option<PathBuf>> {
    detach::remove_remains(own).map_err(|error| {
        let message = format!("a dead mount is left: {}", error.message());
        Error::new(error.errno(), message)
    })
}

/// Kibibytes that the kernel reads ahead in this mount: enough for a copy to be read, hashed and
/// written at the same time, each by another core.
const READ_AHEAD_KIB: &str = "2048";

/// Lets the kernel read further ahead than its 128 KiB, which FUSE itself can't raise. Only root
/// may do so; for other users a copy takes somewhat longer.
fn read_further_ahead(own: &OwnMount) {
    if !validate::is_root() {
        return;
    }
    let file = format!("/sys/class/bdi/{}/read_ahead_kb", own.id().device);
    if let Err(error) = std::fs::write(&file, READ_AHEAD_KIB) {
        log::debug!("{file}: {error}");
    }
}

/// Adds what to do when mount(2) is not permitted. fusermount3 gives no errno, only its message.
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
