//! Tells systemd when a mount serves, that it is alive, and that it ends. Without systemd, nothing
//! happens.

use std::sync::{Arc, Weak};
use std::thread;

use sd_notify::NotifyState;

use super::MountPaths;
use crate::tree::Tree;

/// Tells systemd that the mount serves. If a watchdog is set, tells it from now on that the mount
/// answers, twice in its period.
pub(super) fn serving(tree: &Arc<Tree>, paths: &MountPaths) {
    let home = paths.home.display();
    let status = format!("{home} is mounted on {}", paths.mountpoint.display());
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
    let Some(patience) = sd_notify::watchdog_enabled() else {
        return;
    };
    let watched = Arc::downgrade(tree);
    let started = thread::Builder::new()
        .name("watchdog".into())
        .spawn(move || {
            while is_alive(&watched) {
                tell(&[NotifyState::Watchdog]);
                thread::sleep(patience / 2);
            }
        });
    if let Err(error) = started {
        log::error!("cannot start the thread that tells systemd that the mount is alive: {error}");
    }
}

/// Whether the tree exists and answers. It does not return while something holds the tree's locks,
/// which is what a watchdog is for.
///
/// It asks the tree and not the mount: a thread that waits for its own mount keeps /dev/fuse open,
/// and the process could not be killed.
fn is_alive(tree: &Weak<Tree>) -> bool {
    let Some(tree) = tree.upgrade() else {
        return false;
    };
    if let Err(error) = tree.check_alive() {
        log::debug!("the home can't be read at the moment: {error}");
    }
    true
}

/// Tells systemd that the mount ends on a signal.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("cannot notify systemd: {error}");
    }
}
