//! What all that reads or changes a home works with.

use std::sync::Arc;

use crate::event_log::EventLog;
use crate::files::workspace::Workspace;
use crate::home::{Home, SizeCache};
use crate::progress::{Foreground, Operations};

/// A home that is open, and what belongs to it once in this process.
pub(crate) struct Shared {
    pub home: Arc<Home>,
    pub workspace: Arc<Workspace>,
    /// The log that a user sees in the mount.
    pub events: Arc<EventLog>,
    /// Sizes and checksums of disk states.
    pub sizes: Arc<SizeCache>,
    pub operations: Arc<Operations>,
    pub foreground: Arc<Foreground>,
    /// Nothing is written into the home.
    pub is_read_only: bool,
}

impl Shared {
    /// Returns these for a home; its workspace is made when it is needed.
    pub fn new(home: Home, events: EventLog, is_read_only: bool) -> Shared {
        let home = Arc::new(home);
        Shared {
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
