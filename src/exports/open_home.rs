//! An open home, with what all of its readers and changes use.

use std::sync::Arc;

use crate::event_log::EventLog;
use crate::files::workspace::Workspace;
use crate::home::{Home, SizeCache};
use crate::progress::{Foreground, Operations};

/// An open home, and what there is one of per home in this process.
pub(crate) struct OpenHome {
    pub home: Arc<Home>,
    /// The directory for temporary and unnamed files.
    pub workspace: Arc<Workspace>,
    /// The log that a user sees in the mount.
    pub events: Arc<EventLog>,
    /// The cache of sizes and checksums, on disk.
    pub sizes: Arc<SizeCache>,
    /// The progress of long operations.
    pub operations: Arc<Operations>,
    /// The use of the mount, which background work waits for.
    pub foreground: Arc<Foreground>,
    /// Whether nothing may be written to the home.
    pub is_read_only: bool,
}

impl Drop for OpenHome {
    fn drop(&mut self) {
        self.workspace.end();
    }
}

impl OpenHome {
    /// Returns an open home with an empty workspace, whose directory is made when it is first
    /// needed.
    pub fn new(home: Home, events: EventLog, is_read_only: bool) -> OpenHome {
        let home = Arc::new(home);
        OpenHome {
            workspace: Arc::new(Workspace::new(home.clone())),
            events: Arc::new(events),
            sizes: Arc::new(SizeCache::open(&home, is_read_only)),
            operations: Arc::default(),
            foreground: Arc::default(),
            is_read_only,
            home,
        }
    }
}
