//! Remembers what a request asked for, so that `boxlitefs why` can explain its refusal to the user.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::Request;

use super::reply::caller;
use crate::Result;
use crate::tree::{Attempt, Tree};

/// What a request asks for, and the tree that remembers refusals.
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

    /// Remembers the error, if it is a refusal, and returns the result. Releases the tree before the
    /// answer is sent: the workspace of a mount is removed once nothing holds the tree.
    pub fn answered<T>(self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.tree.note_refusal(&self.attempt, error);
        }
        result
    }
}
