//! Serves a mount: from the handshake with the kernel to the last work.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{Config, INodeNo, Notifier, Session, SessionACL};

use super::BoxliteFs;
use crate::tree::{KernelCache, Tree};
use crate::{Error, Result};

/// Threads that take requests from the kernel, and answer those that need no disk.
const REQUEST_THREADS: usize = 4;

/// How long work that is under way at an unmount may take before the process ends anyway.
const LAST_WORK: Duration = Duration::from_secs(10);

/// Which users may enter the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only the user who mounted it.
    Owner,
    /// That user, and root.
    RootToo,
    /// Every user, as far as the modes of files allow.
    Everybody,
}

/// Serves the tree to the kernel until the file system is unmounted and nothing of it is open.
///
/// `requests` is the descriptor of /dev/fuse that the kernel's requests come from. Calls `ready`
/// after the handshake with the kernel, and `failed` if serving ends while the kernel still has the
/// file system. Neither mounts nor unmounts: fuser would do that by path, and so unmount whatever
/// is mounted there by then.
///
/// # Errors
/// What the kernel says, or what `failed` returns.
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
        .map_err(|e| Error::io("the handshake with the kernel failed", e))?;
    tree.set_kernel_cache(NotifiedKernel(session.notifier()));
    ready();
    let served = session
        .run()
        .map_err(|e| Error::io("serving the mount failed", e));
    let served = served.or_else(|error| failed().and(Err(error)));
    tree.make_boxes_of_waiting_archives();
    tree.close();
    // Work under way completes, and the workspace is removed with the tree.
    let deadline = Instant::now() + LAST_WORK;
    while Arc::strong_count(&tree) > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(tree);
    served
}

/// The kernel, which is told by notifications what to drop.
struct NotifiedKernel(Notifier);

impl KernelCache for NotifiedKernel {
    fn drop_pages(&self, ino: u64) {
        // ENOENT: the kernel has no pages of it.
        if let Err(error) = self.0.inval_inode(INodeNo(ino), 0, 0) {
            log::debug!("inode {ino} keeps its pages: {error}");
        }
    }

    fn drop_name(&self, directory: u64, name: &OsStr) {
        // ENOENT: the kernel does not have the name.
        if let Err(error) = self.0.inval_entry(INodeNo(directory), name) {
            log::debug!("{} in inode {directory} is kept: {error}", name.display());
        }
    }
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
