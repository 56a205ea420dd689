//! Serving a home, from opening it to the end of the mount.

use std::path::PathBuf;
use std::sync::Arc;

use super::detach::{self, OwnMount};
use super::signals::{self, Phase};
use super::validate::{self, MountPaths};
use super::{Options, allocator, attach, logging};
use crate::fuse::{self, Access};
use crate::tree::{self, MountFacts, Tree};
use crate::{Error, Result};

/// Opens the home and serves it until it is unmounted; calls `announce` once it serves.
pub(super) fn serve(
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
