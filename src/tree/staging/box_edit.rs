//! Edits of the `box.json` of boxes that exist, as they are written.
//!
//! What is written is compared with the row when it is complete: in the write that completes it,
//! where that can be told, since many programs ignore the result of close. It is recorded when it is
//! closed, flushed, or gets its final name.

use std::sync::Arc;

use crate::process::Caller;
use crate::store::{self, Store};
use crate::tree::nodes::box_json::{self, parse_object};
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::names::BOX_JSON;
use crate::tree::nodes::node::Node;
use crate::tree::nodes::refusal::{refuse, refuse_copied_box};
use crate::tree::staging::caller_history::CallerHistory;
use crate::tree::staging::program::Program;
use crate::tree::staging::role::StagedPlace;
use crate::tree::staging::staged_box::StagedBox;
use crate::tree::staging::staged_file::{Stage, StagedContent, StagedFile, StagedState};
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// Checks and records edits.
pub struct BoxEdits {
    store: Arc<Store>,
    boxes: Arc<Boxes>,
    staging: Arc<StagingArea>,
    history: Arc<CallerHistory>,
}

impl BoxEdits {
    /// Returns the edits of the boxes of a home.
    pub fn new(
        store: Arc<Store>,
        boxes: Arc<Boxes>,
        staging: Arc<StagingArea>,
        history: Arc<CallerHistory>,
    ) -> BoxEdits {
        BoxEdits {
            store,
            boxes,
            staging,
            history,
        }
    }

    /// Opens the box.json of a box to write over its present text.
    ///
    /// It keeps its inode: editors look whether it has another one when they have opened it.
    ///
    /// # Errors
    /// Those of [`BoxEdits::create`].
    pub fn open(&self, caller: Caller, id: &str) -> Result<Arc<StagedFile>> {
        self.begin(caller, id, BOX_JSON)?;
        let usage = store::usage_of_box(&self.store, id)?;
        let text = box_json::box_json(&self.boxes.record(id)?, usage)?;
        let place = place_in(id, BOX_JSON);
        let node = Node::BoxJson(id.to_owned());
        let file = StagedFile::editing(node, id.to_owned(), (place, Some(text)), caller);
        file.state().open = 1;
        Ok(file)
    }

    /// Begins an edit of a box under the name of its box.json, which the caller has removed before,
    /// or under a temporary one.
    ///
    /// # Errors
    /// EPERM for what copies a whole box over this one, EBUSY while the box runs, while an archive
    /// is written over its disk, or while a BoxLite runtime has the home.
    pub fn create(&self, caller: Caller, id: &str, name: &str) -> Result<Arc<StagedFile>> {
        self.begin(caller, id, name)?;
        let parent = Node::Box(id.to_owned());
        let node = self.staging.new_node();
        let place = place_in(id, name);
        let file = StagedFile::editing(node, id.to_owned(), (place, None), caller);
        let loose = &self.staging.loose;
        loose.add(caller, &parent, name, file.clone())?;
        Ok(file)
    }

    /// Makes a file that was begun over an export an edit: the text of one is written under a name
    /// that tells nothing (gio's).
    ///
    /// # Errors
    /// Those of [`BoxEdits::create`].
    pub fn convert(&self, file: &StagedFile, state: &mut StagedState) -> Result<()> {
        let name = state.place.name.clone();
        self.begin(file.by, &file.box_id, &name)?;
        file.become_edit(state);
        Ok(())
    }

    fn begin(&self, caller: Caller, id: &str, name: &str) -> Result<()> {
        if self.history.goes_on_copying(caller, id) {
            return Err(refuse_copied_box(&self.store, name));
        }
        let of = || self.store.exports().disks.name_of(id);
        let program = Program::of(caller);
        if program.may_copy() && !program.copies_only(BOX_JSON) {
            self.history.refuse_copy(caller, id);
            return Err(refuse(
                &self.store,
                libc::EPERM,
                format!(
                    "{name}: a whole directory may be copied over box {}; copy that to a new name; to \
                     change the options of the box, name {BOX_JSON} alone in the command",
                    of()
                ),
            ));
        }
        if program.only_destroys() {
            let message = format!("{name}: box {} needs its {BOX_JSON}; edit it", of());
            return Err(refuse(&self.store, libc::EPERM, message));
        }
        let ready = if self.staging.loose.is_written_over(id) {
            self.history.refuse_copy(caller, id);
            Err(Error::busy("an archive is being written over its disk"))
        } else {
            store::refuse_unready_for_edit(&self.store, id)
        };
        ready.map_err(|error| {
            let message = format!("edit of box {}: {error}", of());
            refuse(&self.store, error.errno(), message)
        })?;
        self.history.note_edit(caller, id);
        Ok(())
    }

    /// Checks what was written so far, if it is complete.
    ///
    /// # Errors
    /// EINVAL for what can't become a box.json, or changes what can't be changed, and those of
    /// [`BoxEdits::create`].
    pub fn check(&self, file: &StagedFile, state: &StagedState) -> Result<()> {
        let StagedContent::Text(text) = &state.content else {
            return Ok(());
        };
        let written = match parse_object(text) {
            // Not all of the present text may be written over yet.
            Err(_) if state.is_patch() => None,
            parsed => parsed.inspect_err(|error| self.warn(file, error))?,
        };
        match written {
            Some(written) if !file.is_committed() => {
                store::check_edit(&self.store, &file.box_id, &written)
            }
            _ => Ok(()),
        }
    }

    fn warn(&self, file: &StagedFile, error: &Error) {
        let name = self.store.exports().disks.name_of(&file.box_id);
        let message = format!("edit of box {name} failed: {error}");
        self.store.events().warn(&message);
    }

    /// Records an edit that is complete and has its final name.
    ///
    /// # Errors
    /// EINVAL for a text that ends in the middle, which may still go on; those of
    /// [`BoxEdits::check`].
    pub fn commit(&self, file: &StagedFile, state: &mut StagedState) -> Result<()> {
        let StagedContent::Text(text) = &state.content else {
            return Ok(());
        };
        if state.is_untouched() || text.trim_ascii().is_empty() {
            return Ok(());
        }
        let written = parse_object(text)?.ok_or_else(|| {
            Error::new(
                libc::EINVAL,
                format!("{BOX_JSON} ends in the middle, so the box stays as it is"),
            )
        })?;
        if state.place.name != BOX_JSON {
            return Ok(());
        }
        let id = &file.box_id;
        let edit = || store::edit_box(&self.store, id, &written);
        self.boxes.change(id, edit).inspect_err(|error| {
            state.refuse(error);
        })?;
        // Whoever wrote it may have removed the name before.
        let directory = Node::Box(id.clone());
        self.history.bring_back(id, &directory, BOX_JSON);
        file.set_stage(state, Stage::Committed);
        Ok(())
    }

    /// Lets go of an edit whose last descriptor was closed, unless its final name is still to come.
    pub fn close(&self, file: &Arc<StagedFile>, state: &StagedState) {
        if file.is_committed() {
            return;
        }
        let (is_empty, is_whole) = match &state.content {
            StagedContent::Text(text) => {
                let is_whole = parse_object(text).is_ok_and(|parsed| parsed.is_some());
                (text.trim_ascii().is_empty(), is_whole)
            }
            _ => (true, false),
        };
        let is_final = state.place.name == BOX_JSON;
        if !is_final && is_whole && !state.is_refused() {
            return;
        }
        if !state.is_untouched() && !state.is_refused() && is_final {
            let why = if is_empty {
                "nothing was written"
            } else {
                "it ends in the middle"
            };
            let name = self.store.exports().disks.name_of(&file.box_id);
            let message = format!("{BOX_JSON} of box {name} stays as it is: {why}");
            self.store.events().warn(&message);
        }
        self.staging.loose.drop_file(file);
    }

    /// Gives a box that was just made the options of the box.json that came with it, if that is
    /// complete. One of the box itself, and not of a backup, is an edit like others.
    ///
    /// # Errors
    /// EINVAL for options that can't be as they are in it, and those of [`BoxEdits::create`].
    pub fn describe(&self, json: &StagedFile, state: &StagedState, records: bool) -> Result<()> {
        let StagedContent::Text(text) = &state.content else {
            return Ok(());
        };
        let is_final = state.place.name == BOX_JSON && matches!(state.place.parent, Node::Box(_));
        let Some(written) = parse_object(text)?.filter(|_| is_final) else {
            return Ok(());
        };
        let id = &json.box_id;
        if written["id"] == *id.as_str() {
            return if records {
                self.boxes
                    .change(id, || store::edit_box(&self.store, id, &written))
            } else {
                store::check_edit(&self.store, id, &written)
            };
        }
        let original = |staged: &mut StagedBox| staged.original_options.clone();
        match self.staging.boxes.with(id, original).flatten() {
            Some((options, version)) if records => self.boxes.change(id, || {
                store::describe_box(&self.store, id, (&options, version), &written)
            }),
            Some((options, version)) => {
                store::check_description(&self.store, id, (&options, version), &written)
            }
            None => Ok(()),
        }
    }
}

fn place_in(id: &str, name: &str) -> StagedPlace {
    StagedPlace {
        parent: Node::Box(id.to_owned()),
        name: name.to_owned(),
    }
}
