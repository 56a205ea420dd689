//! A file that a copy tool is writing. What has come so far is kept here until its name is final
//! and its data complete.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};

use crate::archive::Export;
use crate::exports::{Contents, Source};
use crate::process::{Caller, ProcessGroup};
use crate::progress::Operation;
use crate::store::ImportStream;
use crate::tree::nodes::box_json;
use crate::tree::nodes::names::{SNAPSHOT_JSON, WHY_JSON};
use crate::tree::nodes::node::Node;
use crate::tree::staging::program::Program;
use crate::tree::staging::role::{FileRole, StagedPlace, role_of};
use crate::{Error, Result};

/// Most bytes of a small text (snapshot.json) that are kept.
const MOST_TEXT: usize = 1024 * 1024;

/// What has come of a file so far.
pub enum StagedContent {
    /// Nothing.
    Nothing,
    /// Bytes of an archive.
    Archive(Box<ImportStream>),
    /// The start of an export, asked for with copy_file_range: no byte moved.
    FromHome {
        /// What the export is of.
        source: Source,
        /// The export.
        export: Arc<Export>,
        /// What the export's bytes are of.
        contents: Contents,
        /// How many bytes were asked for.
        covered: u64,
    },
    /// box.json or snapshot.json of a box or snapshot, asked for in the same way.
    JsonFromHome(Source),
    /// A small text.
    Text(Vec<u8>),
}

impl StagedContent {
    /// Returns whether the data is complete.
    pub fn is_complete(&self) -> bool {
        match self {
            StagedContent::Archive(arrival) => arrival.is_complete(),
            StagedContent::FromHome {
                export, covered, ..
            } => *covered == export.len(),
            _ => false,
        }
    }
}

/// How far a written file has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Its data still comes, or its name is not final.
    Arriving,
    /// It is a complete archive that was closed, and waits for its final name or its box. The
    /// program that copied it got success, so its source may be gone. The source of
    /// [`StagedContent::FromHome`] is in the home, and is not removed meanwhile.
    Waiting,
    /// It has become what its name says. From then on that is what is seen of it.
    Committed,
}

/// What a file was begun as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// Something new.
    New,
    /// What is written over an export.
    OverExport,
    /// What is written over a box.json.
    OverJson,
}

/// A file being written.
pub struct StagedFile {
    /// Its node.
    pub node: Node,
    /// The id of the box that it belongs to: one that exists, one being made, or one that will be
    /// made of this file.
    pub box_id: String,
    /// Whether it was begun over the export of a box or snapshot that exists.
    overwrites_export: bool,
    /// Whether it is a new text of the box.json of a box that exists; written only with `state`
    /// locked.
    edits: AtomicBool,
    /// The thread that made it.
    pub by: Caller,
    /// The processes that began to write over an export or box.json; empty for other files.
    pub writer: ProcessGroup,
    /// The process that made it, if its program leaves the source in place, as cp does.
    pub source_keeper: Option<u32>,
    /// When it was made.
    pub created: SystemTime,
    /// The same by the clock that is never set.
    pub begun: Instant,
    /// Bytes written so far, as stat shows them.
    size: AtomicU64,
    /// A [`Stage`]; written only with `state` locked.
    stage: AtomicU8,
    state: Mutex<StagedState>,
}

/// The part of a file that changes while it is written.
pub struct StagedState {
    /// Where it is now.
    pub place: StagedPlace,
    /// What has come of it.
    pub content: StagedContent,
    /// How often it is open.
    pub open: usize,
    /// What is shown of an archive that arrives.
    pub operation: Option<Operation>,
    /// The first refusal: errno and message. All later calls get it as well.
    refused: Option<(i32, String)>,
    /// What has become of the text that an edit began with.
    overwritten: Overwritten,
}

/// What has become of the text that an edit of box.json began with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overwritten {
    /// Nothing was written.
    Untouched,
    /// Parts of it were written over.
    InPart,
    /// It was cut, or there was none: what is there was written.
    Whole,
}

impl StagedFile {
    /// Begins a file in a box being made, or an archive in the root.
    pub fn new(node: Node, box_id: String, place: StagedPlace, by: Caller) -> Arc<StagedFile> {
        StagedFile::begin(node, box_id, place, by, Begun::New)
    }

    /// Begins a file that is written over the export of a box or snapshot that exists.
    pub fn overwriting_export(
        node: Node,
        box_id: String,
        place: StagedPlace,
        by: Caller,
    ) -> Arc<StagedFile> {
        StagedFile::begin(node, box_id, place, by, Begun::OverExport)
    }

    /// Begins an edit of the box.json of a box that exists, with its present text where that is
    /// written over.
    pub fn editing(
        node: Node,
        box_id: String,
        (place, text): (StagedPlace, Option<Vec<u8>>),
        by: Caller,
    ) -> Arc<StagedFile> {
        let file = StagedFile::begin(node, box_id, place, by, Begun::OverJson);
        let mut state = file.state();
        file.become_edit(&mut state);
        if let Some(text) = text {
            file.size.store(text.len() as u64, Ordering::Relaxed);
            state.content = StagedContent::Text(text);
            state.overwritten = Overwritten::Untouched;
        }
        drop(state);
        file
    }

    /// Makes it an edit of box.json. Takes the state as proof that it is locked.
    pub fn become_edit(&self, state: &mut StagedState) {
        state.content = StagedContent::Text(Vec::new());
        self.edits.store(true, Ordering::Relaxed);
    }

    /// Returns whether it is a new text of the box.json of a box that exists.
    pub fn is_edit(&self) -> bool {
        self.edits.load(Ordering::Relaxed)
    }

    /// Returns whether all of an edit has come.
    pub fn is_whole_edit(&self) -> bool {
        match &self.state().content {
            StagedContent::Text(text) => {
                box_json::parse_object(text).is_ok_and(|parsed| parsed.is_some())
            }
            _ => false,
        }
    }

    /// Returns whether it is written over the export of a box or snapshot that exists.
    pub fn is_over_export(&self) -> bool {
        self.overwrites_export && !self.is_edit()
    }

    fn begin(
        node: Node,
        box_id: String,
        place: StagedPlace,
        by: Caller,
        begun: Begun,
    ) -> Arc<StagedFile> {
        let writer = match begun {
            Begun::New => ProcessGroup::default(),
            Begun::OverExport | Begun::OverJson => ProcessGroup::begin(by),
        };
        let process = by.process();
        Arc::new(StagedFile {
            node,
            box_id,
            overwrites_export: begun == Begun::OverExport,
            edits: AtomicBool::new(false),
            by,
            writer,
            source_keeper: process.filter(|_| Program::of(by).keeps_sources()),
            created: SystemTime::now(),
            begun: Instant::now(),
            size: AtomicU64::new(0),
            stage: AtomicU8::new(Stage::Arriving as u8),
            state: Mutex::new(StagedState {
                place,
                content: StagedContent::Nothing,
                open: 0,
                operation: None,
                refused: None,
                overwritten: Overwritten::Whole,
            }),
        })
    }

    /// Locks the part that changes while it is written. A commit holds that lock for as long as it
    /// takes, so no other lock of staging may be held while waiting for it.
    pub fn state(&self) -> MutexGuard<'_, StagedState> {
        self.state.lock()
    }

    /// Returns its length in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Makes its length at least `end`.
    pub fn reaches(&self, end: u64) {
        self.size.fetch_max(end, Ordering::Relaxed);
    }

    /// Returns whether it is a complete archive that waits for its final name or its box.
    pub fn is_waiting(&self) -> bool {
        self.stage.load(Ordering::Relaxed) == Stage::Waiting as u8
    }

    /// Returns whether it has become what its name says.
    pub fn is_committed(&self) -> bool {
        self.stage.load(Ordering::Relaxed) == Stage::Committed as u8
    }

    /// Returns what was written, if it is the description of a box or a snapshot.
    pub fn text(&self) -> Option<Vec<u8>> {
        match &self.state().content {
            StagedContent::Text(text) => Some(text.clone()),
            _ => None,
        }
    }

    /// Records how far it has come. Takes the state as proof that it is locked.
    pub fn set_stage(&self, _state: &mut StagedState, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    /// Records that its name was removed, or given to another file. Later writes are refused.
    pub fn was_removed(&self, name: &str) {
        let mut state = self.state();
        if self.is_committed() {
            return;
        }
        self.set_stage(&mut state, Stage::Arriving);
        state.content = StagedContent::Nothing;
        let error = Error::new(libc::ENOENT, format!("{name} was removed"));
        state.refuse(&error);
    }

    /// Starts it anew at a size of 0, or leaves a hole at its end (truncate(2)).
    ///
    /// # Errors
    /// EINVAL for any other size.
    pub fn resize(&self, size: u64) -> Result<()> {
        let mut state = self.state();
        if self.is_committed() {
            return Ok(());
        }
        if self.is_edit() {
            state.resize_text(size)?;
            self.size.store(size, Ordering::Relaxed);
            return Ok(());
        }
        if size == 0 {
            self.set_stage(&mut state, Stage::Arriving);
            state.content = StagedContent::Nothing;
            state.refused = None;
            self.size.store(0, Ordering::Relaxed);
            return Ok(());
        }
        if size < self.size() {
            return Err(Error::new(
                libc::EINVAL,
                "an archive can't be cut; copy it again from the start",
            ));
        }
        if let StagedContent::Archive(arrival) = &mut state.content {
            arrival.set_length(size);
        }
        self.reaches(size);
        Ok(())
    }
}

impl StagedState {
    /// Returns what it will be, by its place.
    pub fn role(&self) -> FileRole {
        role_of(&self.place.parent, &self.place.name).unwrap_or(FileRole::Placeholder)
    }

    /// Returns the refusal that it got, if any.
    pub fn refused(&self) -> Result<()> {
        match &self.refused {
            Some((errno, message)) => Err(Error::new(*errno, message.clone())),
            None => Ok(()),
        }
    }

    /// Returns whether it got a refusal.
    pub fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// Keeps a refusal for all later calls; the first one stays.
    pub fn refuse(&mut self, error: &Error) {
        self.refused
            .get_or_insert_with(|| (error.errno(), error.to_string()));
    }

    /// Adds bytes to a small text.
    ///
    /// # Errors
    /// EFBIG, and EINVAL as soon as it can't be a description of ours.
    pub fn put_text(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let (is_of_snapshot, is_of_kept) = (self.is_of_snapshot(), self.is_of_kept());
        let StagedContent::Text(text) = &mut self.content else {
            self.content = StagedContent::Text(Vec::new());
            return self.put_text(offset, bytes);
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(bytes.len());
        if end > MOST_TEXT {
            return Err(Error::new(
                libc::EFBIG,
                "a box.json or snapshot.json is a few kilobytes long",
            ));
        }
        if text.len() < end {
            text.resize(end, 0);
        }
        text[start..end].copy_from_slice(bytes);
        if is_of_kept {
            return box_json::refuse_foreign_why(text);
        }
        box_json::refuse_foreign(is_of_snapshot, text)
    }

    /// Adds bytes to an edit.
    ///
    /// # Errors
    /// EFBIG.
    pub fn put_edit(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let end = offset.saturating_add(bytes.len() as u64);
        let text = self.text_to(end)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(to) = text.get_mut(start..start.saturating_add(bytes.len())) {
            to.copy_from_slice(bytes);
        }
        if self.overwritten == Overwritten::Untouched {
            self.overwritten = Overwritten::InPart;
        }
        Ok(())
    }

    /// Cuts an edit, or makes it longer by zeros.
    fn resize_text(&mut self, size: u64) -> Result<()> {
        let text = self.text_to(size)?;
        text.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        self.overwritten = match (size, self.overwritten) {
            (0, _) => Overwritten::Whole,
            (_, Overwritten::Untouched) => Overwritten::InPart,
            (_, other) => other,
        };
        if size == 0 {
            self.refused = None;
        }
        Ok(())
    }

    /// Returns the text of an edit, at least `end` bytes long.
    fn text_to(&mut self, end: u64) -> Result<&mut Vec<u8>> {
        if !matches!(self.content, StagedContent::Text(_)) {
            self.content = StagedContent::Text(Vec::new());
        }
        let end = usize::try_from(end).unwrap_or(usize::MAX);
        match &mut self.content {
            StagedContent::Text(text) if end <= MOST_TEXT => {
                if text.len() < end {
                    text.resize(end, 0);
                }
                Ok(text)
            }
            _ => Err(Error::new(
                libc::EFBIG,
                "a box.json is a few kilobytes long",
            )),
        }
    }

    /// Returns whether nothing was written of an edit that began with the present text.
    pub fn is_untouched(&self) -> bool {
        self.overwritten == Overwritten::Untouched
    }

    /// Returns whether an edit still has parts of the text that it began with.
    pub fn is_patch(&self) -> bool {
        self.overwritten != Overwritten::Whole
    }

    /// Returns whether it is to be a snapshot.json, and no box.json.
    fn is_of_snapshot(&self) -> bool {
        self.place.name.contains(SNAPSHOT_JSON)
    }

    /// Returns whether it is to be the why.json of what was kept.
    fn is_of_kept(&self) -> bool {
        self.place.name.contains(WHY_JSON)
    }

    /// Returns whether a description is of the kind that this one is: of a box, or of a snapshot.
    pub fn describes(&self, node: &Node) -> bool {
        if self.is_of_kept() {
            false
        } else if self.is_of_snapshot() {
            matches!(node, Node::SnapshotJson(..))
        } else {
            matches!(node, Node::BoxJson(_))
        }
    }

    /// Refuses a box.json or snapshot.json that ended in the middle.
    ///
    /// # Errors
    /// EINVAL.
    pub fn refuse_partial_text(&self) -> Result<()> {
        match &self.content {
            StagedContent::Text(text) => box_json::refuse_partial(text),
            _ => Ok(()),
        }
    }

    /// Records that a range of an export was copied. Returns the bytes taken, or None when it is
    /// not the next part of one and the same export.
    pub fn share(
        &mut self,
        (source, export, contents): (&Source, &Arc<Export>, &Contents),
        offset: u64,
        length: u64,
    ) -> Option<u64> {
        let end = export.len();
        let next = offset.saturating_add(length).min(end);
        match (self.role(), &mut self.content) {
            (FileRole::Json | FileRole::Placeholder, _) => None,
            (_, StagedContent::Nothing) if offset == 0 => {
                self.content = StagedContent::FromHome {
                    source: source.clone(),
                    export: export.clone(),
                    contents: *contents,
                    covered: next,
                };
                Some(next)
            }
            (
                _,
                StagedContent::FromHome {
                    source: known,
                    export: same,
                    covered,
                    ..
                },
            ) if known == source && Arc::ptr_eq(same, export) && *covered == offset => {
                *covered = next;
                Some(next.saturating_sub(offset))
            }
            _ => None,
        }
    }

    /// Ends the data, if it is complete, and returns whether it is. `size` is the file's length in
    /// bytes. An empty file is no error.
    ///
    /// # Errors
    /// EBADMSG for a part of an archive, and for a file that is only a hole.
    pub fn finish(&mut self, size: u64) -> Result<bool> {
        let only_hole = || match size {
            0 => Ok(false),
            _ => Err(Error::bad_archive(
                "the file is only a hole, and no archive; copy it again",
            )),
        };
        match &mut self.content {
            StagedContent::Text(_) | StagedContent::JsonFromHome(_) => Ok(false),
            StagedContent::Nothing => only_hole(),
            StagedContent::Archive(arrival) if arrival.is_untouched() => only_hole(),
            StagedContent::Archive(arrival) => arrival.finish().map(|()| true),
            StagedContent::FromHome {
                export, covered, ..
            } if *covered < export.len() => {
                Err(Error::bad_archive("only a part of the archive was copied"))
            }
            StagedContent::FromHome { .. } => Ok(true),
        }
    }
}
