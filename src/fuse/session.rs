//! A mount as it is served: from the kernel's agreement to the last work.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{Config, INodeNo, Session, SessionACL};

use super::BoxliteFs;
use crate::tree::Tree;
use crate::{Error, Result};

/// Threads that take requests from the kernel and answer what needs no disk.
const REQUEST_THREADS: usize = 4;

/// How long the work that an unmount found under way may take before the process ends over it.
const LAST_WORK: Duration = Duration::from_secs(10);

/// Who gets into the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Who mounted it, alone.
    Owner,
    /// root, too.
    RootToo,
    /// Every user, as far as modes allow.
    Everybody,
}

/// Serves the tree to the kernel, whose requests come from `requests`, a descriptor of /dev/fuse, until the
/// file system is unmounted and nothing of it is open. Calls `ready` once the kernel has agreed, and
/// `failed` as soon as it can't be served any more though the kernel still has it. It mounts nothing and
/// unmounts nothing: fuser would, by path, and so what is mounted there by then.
///
/// # Errors
/// What the kernel says, or `failed`.
pub fn serve(
    tree: Arc<Tree>,
    requests: OwnedFd,
    access: Access,
    ready: impl FnOnce(),
    failed: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let filesystem = BoxliteFs::new(tree.clone())?;
    let (acl, config) = session_config(access);
    let session = Session::from_fd(filesystem, requests, acl, config)
        .map_err(|e| Error::io("the kernel does not agree on the mount", e))?;
    let notifier = session.notifier();
    tree.on_drop_pages(move |ino| {
        // ENOENT: the kernel has none.
        if let Err(error) = notifier.inval_inode(INodeNo(ino), 0, 0) {
            log::debug!("inode {ino} keeps its pages: {error}");
        }
    });
    ready();
    let served = session
        .run()
        .map_err(|e| Error::io("serving the mount ended", e));
    let served = served.or_else(|error| failed().and(Err(error)));
    tree.keep_waiting();
    tree.close();
    // What was under way comes to its end, and the workspace goes with the tree.
    let deadline = Instant::now() + LAST_WORK;
    while Arc::strong_count(&tree) > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(tree);
    served
}

fn session_config(access: Access) -> (SessionACL, Config) {
    let acl = match access {
        Access::Owner => SessionACL::Owner,
        Access::RootToo => SessionACL::RootAndOwner,
        Access::Everybody => SessionACL::All,
    };
    let mut session = Config::default();
    session.acl = acl;
    session.n_threads = Some(REQUEST_THREADS);
    session.clone_fd = true;
    (acl, session)
}
