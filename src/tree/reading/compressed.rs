//! `export.boxlite.zst`, and the hidden view its names point into.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::store::{Form, OpenedCompressed, Packed, Source, Waiter};
use crate::tree::Tree;
use crate::tree::nodes::names::{HIDDEN, SNAPSHOTS, VIEW};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::reading::open_file::{Handle, Opened};
use crate::tree::staging::caller::Caller;
use crate::{Error, Result};

/// Takes the answer to an open that may have to wait.
pub type OpenAnswer = Box<dyn FnOnce(Result<Opened>) + Send>;

impl Tree {
    /// Opens a file and gives the result to `answer`, for a compressed archive when its exact size is
    /// known: nobody's thread waits for that. `flags` are open(2)'s.
    pub fn open_and_answer(
        self: &Arc<Self>,
        caller: Caller,
        ino: u64,
        flags: i32,
        answer: OpenAnswer,
    ) {
        let reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
        match self.node(ino) {
            Ok(Node::Compressed(source)) if reads => {
                let tree = self.clone();
                let waits = self.waits_first(&source, Form::Compressed);
                let open = move |answer| tree.open_compressed(caller, source, answer);
                self.waiting(waits, open, answer);
            }
            Ok(Node::Export(source)) if reads && self.waits_first(&source, Form::Plain) => {
                let tree = self.clone();
                let open = move |answer: OpenAnswer| answer(tree.open_file(caller, ino, flags));
                self.waiting(true, open, answer);
            }
            _ => answer(self.open_file(caller, ino, flags)),
        }
    }

    /// Whether a virtual machine is paused before an export is opened, or the clock of its file
    /// system waited for.
    fn waits_first(&self, source: &Source, form: Form) -> bool {
        self.store.pauses(source, form) || self.store.may_wait(source)
    }

    /// Opens in a thread of its own what something is waited for first.
    fn waiting(
        &self,
        waits: bool,
        open: impl FnOnce(OpenAnswer) + Send + 'static,
        answer: OpenAnswer,
    ) {
        if !waits {
            return open(answer);
        }
        let answer = Arc::new(Mutex::new(Some(answer)));
        let of_thread = answer.clone();
        let work = move || {
            if let Some(answer) = of_thread.lock().take() {
                open(answer);
            }
        };
        let started = std::thread::Builder::new().name("wait".into()).spawn(work);
        if let Err(error) = started
            && let Some(answer) = answer.lock().take()
        {
            answer(Err(Error::io(
                "cannot start a thread to copy a disk",
                error,
            )));
        }
    }

    fn open_compressed(self: &Arc<Self>, caller: Caller, source: Source, answer: OpenAnswer) {
        let tree = self.clone();
        let node = Node::Compressed(source.clone());
        // What the kernel was told before, not what others were told while this one waited: the size
        // in the caller's inode is that.
        let told = self.told(&node);
        let opened_by = source.clone();
        let done = move |opened: Result<OpenedCompressed>| {
            let opened = opened.and_then(|opened| {
                if told.is_some_and(|told| told != opened.contents) {
                    tree.store.keep_running(&opened_by, Form::Compressed);
                    // The kernel looks the name up again, gets a new inode, and opens that.
                    return Err(Error::new(libc::ESTALE, "the size is known just now"));
                }
                tree.store.served_running(&opened_by, Form::Compressed);
                Ok(tree.opened_compressed(opened_by.clone(), opened))
            });
            if let Err(error) = &opened
                && !matches!(error.errno(), libc::ESTALE | libc::EINTR)
            {
                let what = tree.store.describe(&opened_by);
                tree.store
                    .events()
                    .warn(&format!("compressed export of {what} failed: {error}"));
            }
            answer(opened);
        };
        let waiter = Waiter {
            is_dying: Box::new(move || caller.is_dying()),
            answer: Box::new(done),
        };
        self.store.open_compressed(&source, waiter);
    }

    fn opened_compressed(&self, source: Source, opened: OpenedCompressed) -> Opened {
        let OpenedCompressed {
            packed,
            contents,
            export,
        } = opened;
        let spool = match &packed {
            Packed::Spooled(spool) => Some(spool.clone()),
            Packed::Streamed(_) => None,
        };
        let what = format!("compressed export of {}", self.store.describe(&source));
        let operation = self.store.operations().begin(what, Some(contents.size));
        let handle = Handle::Compressed {
            source,
            packed,
            contents,
            _of: export,
            operation,
        };
        Opened {
            handle: self.add_handle(handle),
            direct: true,
            keep_pages: false,
            spool,
        }
    }

    /// Where the link in the directory of a box or a snapshot points: into the hidden view. By names, so
    /// that a box and its backup have the same links.
    pub(in crate::tree) fn link_target(
        &self,
        derived: Derived,
        source: &Source,
    ) -> Result<PathBuf> {
        let names = self.names()?;
        let gone = || Error::new(libc::ENOENT, "that is gone");
        let shown = names.of_id(source.box_id()).ok_or_else(gone)?;
        let what = derived.name();
        Ok(match source {
            Source::Live { .. } => format!("../{HIDDEN}/{VIEW}/{shown}/{what}").into(),
            Source::Snapshot {
                box_id,
                snapshot_id,
            } => {
                let row = names.catalog().snapshot_by_id(box_id, snapshot_id);
                let name = &row.ok_or_else(gone)?.name;
                format!("../../../{HIDDEN}/{VIEW}/{shown}/{SNAPSHOTS}/{name}/{what}").into()
            }
        })
    }
}
