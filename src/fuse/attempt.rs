//! What a request asks for, so that its refusal can be explained to the user who made it.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::Request;

use super::reply::caller;
use crate::Result;
use crate::tree::{Attempt, Tree};

/// A request, and the tree that remembers what was refused.
#[derive(Clone)]
pub(super) struct Asked {
    tree: Arc<Tree>,
    attempt: Attempt,
}

impl Asked {
    /// Returns what a request asks of an inode, or of a name in that directory.
    pub fn of(
        tree: &Arc<Tree>,
        request: &Request,
        operation: &'static str,
        ino: u64,
        name: Option<&OsStr>,
    ) -> Asked {
        Asked {
            tree: tree.clone(),
            attempt: Attempt {
                uid: request.uid(),
                caller: caller(request),
                operation,
                ino,
                name: name.map(OsStr::to_owned),
                target: None,
            },
        }
    }

    /// Adds the new name of a rename.
    pub fn to(mut self, parent: u64, name: &OsStr) -> Asked {
        self.attempt.target = Some((parent, name.to_owned()));
        self
    }

    /// Remembers a refusal. Returns the result. The tree is let go of before the answer is sent: what
    /// a mount leaves is removed when nothing holds it any more.
    pub fn answered<T>(self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.tree.note_refusal(&self.attempt, error);
        }
        result
    }
}
