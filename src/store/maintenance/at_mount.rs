//! Recovery when a mount begins.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::Result;
use crate::files::workspace::{Abandoned, remove_but_waiting};
use crate::files::{durable, workspace};
use crate::store::Store;
use crate::store::access::home_recovery::recover_home;
use crate::store::access::path_spelling::{put_paths_right, warn_of_paths};
use crate::store::access::reserve::keep_reserve;
use crate::store::access::settled::is_settled;
use crate::store::maintenance::left_snapshots::find_left_snapshots;
use crate::store::verbs::waiting_files::keep_left_archives;

/// Takes over what dead processes left in the workspaces, which comes before any change. The rest is
/// done by [`recover`].
pub fn begin_recovery(store: &Store) {
    let abandoned = workspace::abandoned(&store.home().staging_dir());
    if !abandoned.is_empty()
        && let Err(error) = durable::sync_file_system(store.home().root())
    {
        // A killed mount may have left writes unflushed, and the steps below build on them. The
        // error may be an old one of an unrelated file: each step flushes what it needs and reports
        // its own.
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
    *store.unrecovered.lock() = Some(abandoned);
    store.is_unrecovered.store(true, Ordering::Release);
}

/// Returns whether it is certain that a home needs no recovery. This reads all headers, so that the
/// scans under the lock need not.
fn needs_none(store: &Store) -> bool {
    let settled = || -> Result<bool> {
        let catalog = store.home().catalog()?;
        let layers = store.layers.scan()?;
        let is_settled = is_settled(store, &catalog, &layers)?;
        Ok(is_settled && Arc::ptr_eq(&catalog, &store.home().catalog()?))
    };
    settled().unwrap_or(false)
}

/// Recovers what a crash left in the home, then makes boxes of archives that a killed mount had
/// waiting. What cannot be recovered now, because a runtime holds the lock or a box runs, is
/// recovered before the next change of each box. Failures are logged. Does nothing the second time.
pub fn recover(store: &Store) {
    let Some(abandoned) = store.unrecovered.lock().take() else {
        return;
    };
    recover_all(store, abandoned);
    keep_reserve(store);
    store.is_unrecovered.store(false, Ordering::Release);
}

fn recover_all(store: &Store, abandoned: Vec<Abandoned>) {
    if store.layers.is_large() && abandoned.is_empty() && needs_none(store) {
        store.access.note_right_paths();
        return;
    }
    // Recovery, like every change, reads and writes canonical paths only.
    let change = put_paths_right(store).and_then(|()| store.home().change());
    let has_recovered = match change {
        Ok(change) => {
            let recovered = recover_home(store, change, false);
            // The headers of restored bases may name files by another path.
            let recovered = recovered.and_then(|()| put_paths_right(store));
            if let Err(error) = &recovered {
                store.events().info(&format!("recovery stopped: {error}"));
            }
            recovered.is_ok()
        }
        Err(error) => {
            store
                .events()
                .info(&format!("recovery is postponed: {error}"));
            warn_of_paths(store, &error.to_string());
            if let Err(error) = find_left_snapshots(store) {
                store.events().info(&error.to_string());
            }
            false
        }
    };
    keep_left_archives(store, abandoned, has_recovered);
}
