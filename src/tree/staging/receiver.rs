//! Takes what is written into files that become boxes.

use std::sync::Arc;

use crate::exports::Source;
use crate::store::{self, ComingSnapshot, ImportTarget, ReferenceState, Store};
use crate::tree::nodes::box_json;
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::names::{EXPORT, is_nameless_archive};
use crate::tree::nodes::node::Node;
use crate::tree::staging::box_edit::BoxEdits;
use crate::tree::staging::nameless::name_in_archive;
use crate::tree::staging::role::{FileRole, StagedPlace, is_gio_temporary};
use crate::tree::staging::staged_file::{Stage, StagedContent, StagedFile, StagedState};
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// Bytes read at once when a shared start has to be turned into bytes after all.
const PIECE: usize = 1024 * 1024;

/// Writes files being made, and lets go of what becomes nothing.
pub struct Receiver {
    store: Arc<Store>,
    staging: Arc<StagingArea>,
    boxes: Arc<Boxes>,
    edits: Arc<BoxEdits>,
}

impl Receiver {
    /// Returns one for the files of a staging area.
    pub fn new(
        store: Arc<Store>,
        staging: Arc<StagingArea>,
        boxes: Arc<Boxes>,
        edits: Arc<BoxEdits>,
    ) -> Receiver {
        Receiver {
            store,
            staging,
            boxes,
            edits,
        }
    }

    /// Writes bytes of a file being made. Returns how many were written.
    ///
    /// # Errors
    /// EBADMSG in the write that shows the archive is none; ENOSPC, EIO.
    pub fn write(&self, file: &StagedFile, offset: u64, bytes: &[u8]) -> Result<u32> {
        let mut state = file.state();
        state.refused()?;
        if file.is_edit() || begins_edit(file, &state, offset, bytes) {
            self.put_edit(file, &mut state, offset, bytes)
                .inspect_err(|error| state.refuse(error))?;
        } else if let Err(error) = self.put(file, &mut state, offset, bytes) {
            self.log_refusal(file, &mut state, &error);
            return Err(error);
        }
        file.reaches(offset.saturating_add(bytes.len() as u64));
        u32::try_from(bytes.len()).map_err(|_| Error::new(libc::EINVAL, "too many bytes at once"))
    }

    /// Writes bytes of an edit of box.json. Only a line end may follow one that was recorded.
    fn put_edit(
        &self,
        file: &StagedFile,
        state: &mut StagedState,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        if file.is_committed() {
            let message = "box.json was recorded when it was flushed; open it again";
            let is_blank = bytes.trim_ascii().is_empty();
            return if is_blank {
                Ok(())
            } else {
                Err(Error::new(libc::EPERM, message))
            };
        }
        if !file.is_edit() {
            self.edits.convert(file, state)?;
        }
        state.put_edit(offset, bytes)?;
        self.edits.check(file, state)
    }

    /// Writes bytes by the role of the file.
    fn put(
        &self,
        file: &StagedFile,
        state: &mut StagedState,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        if file.is_committed() {
            return Err(Error::new(libc::EPERM, "it is a box already"));
        }
        match state.role() {
            FileRole::Placeholder if bytes.is_empty() => Ok(()),
            FileRole::Placeholder => Err(Error::new(
                libc::EPERM,
                format!(
                    "{} takes no bytes: it follows from {EXPORT}",
                    state.place.name
                ),
            )),
            FileRole::Json => {
                state.put_text(offset, bytes)?;
                if self.staging.boxes.is_unfinished(&file.box_id) {
                    return Ok(());
                }
                self.edits.describe(file, state, false)
            }
            FileRole::NewBox
            | FileRole::BoxDisk
            | FileRole::SnapshotDisk
            | FileRole::TemporaryArchive => {
                self.receive(file, state, bytes.is_empty())?;
                if offset == 0
                    && let (Some(operation), Some(length)) = (&state.operation, announced(bytes))
                {
                    operation.set_total(length);
                }
                if let Some(operation) = &state.operation {
                    operation.reaches(offset.saturating_add(bytes.len() as u64));
                }
                if let StagedContent::Archive(arrival) = &mut state.content {
                    arrival.write_at(offset, bytes)?;
                }
                self.refuse_taken_name(state)
            }
        }
    }

    /// Refuses an archive in the root that is called by its manifest, if a box has that name: here,
    /// since many programs ignore the result of close.
    fn refuse_taken_name(&self, state: &StagedState) -> Result<()> {
        let place = &state.place;
        let is_nameless = place.parent == Node::Root && is_nameless_archive(&place.name);
        if !is_nameless || !state.content.is_complete() {
            return Ok(());
        }
        let home = (&*self.store, &*self.boxes, &*self.staging);
        name_in_archive(home, &state.content).map(drop)
    }

    /// Makes the content an archive that takes bytes. If the tool has changed from copy_file_range
    /// to writing, the part that was shared is read and becomes bytes. `nothing` says that no bytes
    /// follow.
    fn receive(&self, file: &StagedFile, state: &mut StagedState, nothing: bool) -> Result<()> {
        let start = match std::mem::replace(&mut state.content, StagedContent::Nothing) {
            StagedContent::Nothing if nothing => return Ok(()),
            StagedContent::Archive(arrival) => {
                state.content = StagedContent::Archive(arrival);
                return Ok(());
            }
            StagedContent::FromHome {
                export, covered, ..
            } => Some((export, covered)),
            _ => None,
        };
        let is_box = !file.is_over_export() && !matches!(state.place.parent, Node::Snapshot(..));
        let wanted = if is_box {
            ImportTarget::Box
        } else {
            ImportTarget::Disk
        };
        let reference = self.reference_of(file, state);
        let mut arrival = store::receive(&self.store, wanted, reference)?;
        let what = self.operation_of(file, &state.place);
        state.operation = Some(self.store.operations().begin(what, None));
        if let Some((export, covered)) = start {
            let mut buffer = vec![0; PIECE];
            let mut offset = 0;
            while offset < covered {
                let length = PIECE.min(usize::try_from(covered - offset).unwrap_or(PIECE));
                let read = export.read_at(offset, &mut buffer[..length])?;
                if read == 0 {
                    break;
                }
                arrival.write_at(offset, &buffer[..read])?;
                offset += read as u64;
            }
        }
        state.content = StagedContent::Archive(Box::new(arrival));
        Ok(())
    }

    /// Returns the state of its box that a snapshot is compared with while it is copied in, so that
    /// only the difference is stored. None for anything else.
    fn reference_of(&self, file: &StagedFile, state: &StagedState) -> Option<ReferenceState> {
        let Node::Snapshot(box_id, snapshot_id) = &state.place.parent else {
            return None;
        };
        let boxes = &self.staging.boxes;
        let described = boxes.snapshot_being_made(&file.box_id, &state.place.parent);
        let json = described.ok().and_then(|(_, json)| json);
        let created_at = json.and_then(|json| match &json.state().content {
            StagedContent::Text(text) => box_json::created_at(text),
            _ => None,
        });
        let coming = ComingSnapshot {
            box_id,
            replaces: Some(snapshot_id),
            created_at,
        };
        store::freeze_reference(&self.store, coming)
    }

    /// Has the log say why an archive that is about to be removed was none. The kernel may tell of
    /// its last close later than of its removal.
    pub fn log_unfinished(&self, file: &StagedFile) {
        let mut state = file.state();
        let is_archive = matches!(state.content, StagedContent::Archive(_));
        if is_archive
            && !file.is_committed()
            && !state.is_refused()
            && let Err(error) = state.finish(file.size())
        {
            self.log_refusal(file, &mut state, &error);
        }
    }

    /// Closes one open description of a file, and lets go of it if it was the last and the file
    /// became nothing.
    pub fn close(&self, file: &Arc<StagedFile>) {
        self.staging.note_close(file);
        let mut state = file.state();
        state.open = state.open.saturating_sub(1);
        if state.open > 0 {
            return;
        }
        state.operation = None;
        if file.is_edit() {
            self.edits.close(file, &state);
            return;
        }
        let role = state.role();
        if file.is_committed() || role == FileRole::Placeholder {
            return;
        }
        if role == FileRole::Json {
            let partial = state.refused().and_then(|()| state.refuse_partial_text());
            drop(state);
            if let Err(error) = partial {
                let message = format!("refused: a description: {error}");
                self.store.events().warn(&message);
                self.staging.drop_file(file, true);
            }
            return;
        }
        let is_complete = !state.is_refused() && state.content.is_complete();
        let waits_for_box =
            role == FileRole::SnapshotDisk && self.staging.boxes.is_unfinished(&file.box_id);
        let waits = role == FileRole::TemporaryArchive || waits_for_box || file.is_waiting();
        if is_complete && waits {
            // Its name is still to come, or its box.
            file.set_stage(&mut state, Stage::Waiting);
            return;
        }
        if !state.is_refused()
            && let Err(error) = state.finish(file.size())
        {
            self.log_refusal(file, &mut state, &error);
        }
        state.content = StagedContent::Nothing;
        let refused = state.is_refused();
        drop(state);
        self.staging.drop_file(file, refused);
    }

    /// Keeps a refusal for all later calls, and logs the first one.
    fn log_refusal(&self, file: &StagedFile, state: &mut StagedState, error: &Error) {
        if !state.is_refused() {
            let what = self.operation_of(file, &state.place);
            let message = format!("{what} failed: {error}");
            self.store.events().warn(&message);
        }
        state.refuse(error);
    }

    /// Says what the writing of a file is, in a few words.
    fn operation_of(&self, file: &StagedFile, place: &StagedPlace) -> String {
        let disks = &self.store.exports().disks;
        if file.is_over_export() {
            return match &place.parent {
                Node::Snapshot(box_id, snapshot_id) => {
                    let source = Source::Snapshot {
                        box_id: box_id.clone(),
                        snapshot_id: snapshot_id.clone(),
                    };
                    format!("replacement of {}", disks.describe(&source))
                }
                _ => format!("restore of box {}", disks.name_of(&file.box_id)),
            };
        }
        let name = &place.name;
        match self.staging.boxes.name_of(&file.box_id) {
            Some(of_box) => format!("import of {of_box}/{name}"),
            None => format!("import of {name}"),
        }
    }
}

/// Returns whether a file that was begun over an export, under a name that tells nothing, is a new
/// text of box.json: no archive begins like that.
fn begins_edit(file: &StagedFile, state: &StagedState, offset: u64, bytes: &[u8]) -> bool {
    file.is_over_export()
        && offset == 0
        && is_gio_temporary(&state.place.name)
        && matches!(state.place.parent, Node::Box(_))
        && matches!(state.content, StagedContent::Nothing)
        && bytes.trim_ascii_start().first() == Some(&b'{')
}

/// Returns the length of an archive as its beginning announces it, in bytes: of a plain tar, up to
/// the end of its disk, after which little comes. None for any other. It is for show, and nothing
/// depends on it.
fn announced(beginning: &[u8]) -> Option<u64> {
    const BLOCK: u64 = 512;
    let mut header = 0;
    // The disk may come after the manifest, and each after what pax has to say of it.
    for _ in 0..4 {
        let start = usize::try_from(header).ok()?;
        let field = |from: usize, to: usize| {
            let bytes = beginning.get(start.checked_add(from)?..start.checked_add(to)?)?;
            std::str::from_utf8(bytes).ok()
        };
        field(257, 262).filter(|magic| *magic == "ustar")?;
        let size = field(124, 136)?.trim_matches(['\0', ' ']);
        let size = u64::from_str_radix(size, 8).ok()?;
        let next = size
            .checked_next_multiple_of(BLOCK)?
            .checked_add(BLOCK)?
            .checked_add(header)?;
        if field(0, 11)? == "disk.qcow2\0" {
            return Some(next);
        }
        header = next;
    }
    None
}
