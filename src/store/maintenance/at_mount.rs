//! What a mount does first: it recovers what a crash left.

use crate::files::workspace::{Abandoned, remove_but_waiting};
use crate::files::{durable, workspace};
use crate::store::Store;
use crate::store::access::home_recovery::recover_home;
use crate::store::access::path_spelling::{put_paths_right, warn_of_paths};
use crate::store::verbs::waiting::keep_left_archives;

/// Everything that can be recovered when a mount begins. What can't be done now (a runtime
/// holds the lock, a box runs) is done before the next change of each box.
pub fn recover_at_mount(store: &Store) {
    let abandoned = workspace::abandoned(&store.home().staging_dir());
    if !abandoned.is_empty()
        && let Err(error) = durable::sync_file_system(store.home().root())
    {
        // Its owner was killed: what he had done, and had not come to flush, is built on below. The error
        // may be an old one, of anybody's file: each step flushes what it needs, and tells its own.
        store.events().info(&error.to_string());
    }
    let abandoned: Vec<Abandoned> = abandoned
        .into_iter()
        .filter_map(Abandoned::take_over)
        .collect();
    for workspace in &abandoned {
        if let Err(error) = remove_but_waiting(workspace.dir()) {
            store.events().info(&error.to_string());
        }
    }
    // What recovery and all after it write, and look for, are canonical paths.
    let change = put_paths_right(store).and_then(|()| store.home().change());
    let has_recovered = match change {
        Ok(change) => {
            let recovered = recover_home(store, change, false);
            // What was put back may name others by another path.
            let recovered = recovered.and_then(|()| put_paths_right(store));
            if let Err(error) = &recovered {
                store.events().info(&format!("recovery stopped: {error}"));
            }
            recovered.is_ok()
        }
        Err(error) => {
            store.events().info(&format!("recovery waits: {error}"));
            warn_of_paths(store, &error.to_string());
            false
        }
    };
    keep_left_archives(store, abandoned, has_recovered);
}
