//! Open files: reading exports and descriptions, writing what becomes a box.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::store::{Contents, Form, Packed, Source, Wanted};
use crate::tree::Tree;
use crate::tree::nodes::attr::Attr;
use crate::tree::nodes::box_json;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON};
use crate::tree::nodes::node::Node;
use crate::tree::reading::guest_files::only_for_reading;
use crate::tree::reading::open_file::{Handle, Opened};
use crate::tree::staging::caller::Caller;
use crate::tree::staging::staged_file::{
    Content, FileState, Place, Role, StagedFile, is_complete, is_whole, share,
};
use crate::{Error, Result};

/// Most bytes one copy may report: the reply has 32 bits, and this is a multiple of a page.
const MOST_COPIED: u64 = 0x7fff_f000;

/// Bytes read at once when a shared start has to be turned into bytes after all.
const PIECE: usize = 1024 * 1024;

impl Tree {
    pub(in crate::tree) fn add_handle(&self, handle: Handle) -> u64 {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.lock().insert(number, Arc::new(handle));
        number
    }

    pub(in crate::tree) fn handle(&self, number: u64) -> Result<Arc<Handle>> {
        self.handles
            .lock()
            .get(&number)
            .cloned()
            .ok_or_else(|| Error::new(libc::EBADF, "that file is not open"))
    }

    /// The size an open description had, for fstat.
    pub(in crate::tree) fn size_at_open(&self, handle: u64) -> Option<u64> {
        match &*self.handle(handle).ok()? {
            Handle::Bytes { bytes, .. } => Some(bytes.len() as u64),
            _ => None,
        }
    }

    /// Opens a file. `flags` are open(2)'s.
    ///
    /// # Errors
    /// EPERM for writing to what can't be written, EBUSY for the export of a running box, ENODATA.
    pub fn open_file(self: &Arc<Self>, caller: Caller, ino: u64, flags: i32) -> Result<Opened> {
        let node = self.node(ino)?;
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        if let Some(file) = self.staged_file(caller, &node)
            && (writes || !file.is_there.load(Ordering::Relaxed))
        {
            return self.open_staged(file, writes, flags);
        }
        if writes {
            if let Some(file) = self.description_to_write(caller, &node) {
                return Ok(self.opened_for_writing(file));
            }
            return Err(self.open_for_restore(caller, &node, flags));
        }
        if let Node::Guest(_) | Node::DiskImage(_) = &node {
            return self.open_inside(&node);
        }
        let (handle, keep_pages) = match &node {
            Node::Log => (Handle::Log, false),
            Node::Status(number) => {
                let bytes = self.status_bytes(*number)?;
                (Handle::Bytes { node, bytes }, false)
            }
            Node::BoxJson(id) => {
                let bytes = box_json::box_json(&self.record(id)?, self.store.usage_of_box(id)?)?;
                (Handle::Bytes { node, bytes }, false)
            }
            Node::SnapshotJson(id, snapshot) => {
                let row = self.snapshot(id, snapshot)?;
                let usage = self.store.usage_of(&Source::Snapshot {
                    box_id: id.clone(),
                    snapshot_id: snapshot.clone(),
                })?;
                let bytes = box_json::snapshot_json(&row, usage)?;
                (Handle::Bytes { node, bytes }, false)
            }
            Node::Export(source) => {
                let go_on = || !caller.is_dying();
                let opened = self.store.open_any_export(source, Form::Plain, &go_on);
                let (export, contents) = opened.inspect_err(|error| {
                    self.store.events().warn(&format!(
                        "export of {} failed: {error}",
                        self.store.describe(source)
                    ));
                })?;
                if self.told(&node).is_some_and(|told| told != contents) {
                    // The kernel looks the name up again, gets a new inode, and opens that.
                    self.store.keep_running(source, Form::Plain);
                    return Err(Error::new(libc::ESTALE, "the disk changed just now"));
                }
                self.store.served_running(source, Form::Plain);
                let source = source.clone();
                let what = format!("export of {}", self.store.describe(&source));
                let operation = self.store.operations().begin(what, Some(contents.size));
                let handle = Handle::Export {
                    source,
                    export,
                    contents,
                    operation,
                };
                // The inode and its pages are of these contents and no others.
                (handle, true)
            }
            _ => return Err(Error::new(libc::EISDIR, "that is a directory")),
        };
        Ok(Opened {
            direct: !matches!(handle, Handle::Export { .. }),
            handle: self.add_handle(handle),
            keep_pages,
            spool: None,
        })
    }

    /// The description of a box, or a snapshot, that this caller has made, to bring that of the backup
    /// it copies: checked to be one, it changes nothing but the time of a snapshot.
    fn description_to_write(&self, caller: Caller, node: &Node) -> Option<Arc<StagedFile>> {
        let (parent, name) = match node {
            Node::BoxJson(id) => (Node::Box(id.clone()), BOX_JSON),
            Node::SnapshotJson(id, snapshot) => {
                (Node::Snapshot(id.clone(), snapshot.clone()), SNAPSHOT_JSON)
            }
            _ => return None,
        };
        let mut staging = self.staging.lock();
        let id = staging.made_by(caller, &parent)?.id.clone();
        let place = Place {
            parent,
            name: name.to_owned(),
        };
        let file = StagedFile::new(node.clone(), id, place, caller);
        file.state.lock().open = 1;
        Some(file)
    }

    /// Opens a box's export to write over it. Nothing comes of it before an archive is complete.
    ///
    /// What is written gets an inode of its own, which the kernel finds when it looks the name up again
    /// after ESTALE: a write makes the inode longer, and whoever reads the export meanwhile would get
    /// zeros after its end.
    fn open_for_restore(&self, caller: Caller, node: &Node, flags: i32) -> Error {
        let message = match node {
            Node::Export(Source::Live { box_id }) if flags & libc::O_APPEND == 0 => {
                let directory = Node::Box(box_id.clone());
                let begun = self.create_over(caller, &directory, EXPORT);
                return begun.map_or_else(
                    |error| error,
                    |_| Error::new(libc::ESTALE, "it is written in an inode of its own"),
                );
            }
            Node::Export(Source::Snapshot {
                box_id,
                snapshot_id,
            }) if flags & libc::O_APPEND == 0 => {
                let directory = Node::Snapshot(box_id.clone(), snapshot_id.clone());
                let begun = self.create_over(caller, &directory, EXPORT);
                return begun.map_or_else(
                    |error| error,
                    |_| Error::new(libc::ESTALE, "it is written in an inode of its own"),
                );
            }
            Node::Export(Source::Live { .. }) => {
                "nothing can be added to an export; write a whole archive over it to restore".into()
            }
            Node::Export(source) => format!(
                "{} stays as it is; to restore it, copy its export over that of its box",
                self.store.describe(source)
            ),
            Node::BoxJson(_) => "box.json is only for reading".into(),
            Node::Guest(_) | Node::DiskImage(_) => {
                return only_for_reading();
            }
            _ => "snapshot.json, what is compressed and the log are only for reading".into(),
        };
        if !matches!(node, Node::Export(Source::Live { .. })) {
            self.remember_refused_copy(caller, node);
        }
        self.refuse(libc::EPERM, message)
    }

    /// The file that is being written over an export by this handle.
    pub(in crate::tree) fn written_over(
        &self,
        node: &Node,
        handle: Option<u64>,
    ) -> Option<Arc<StagedFile>> {
        match &*self.handle(handle?).ok()? {
            Handle::Writing(file) if file.node == *node => Some(file.clone()),
            _ => None,
        }
    }

    /// EIO for whoever reads an export of a disk that is not as it was.
    pub(in crate::tree) fn changed_under_reader(&self, source: &Source) -> Error {
        let message = format!(
            "the disk, name or configuration of {} changed while it was read (was the box started?); read it again",
            self.store.describe(source)
        );
        self.store.events().info(&message);
        Error::new(libc::EIO, message)
    }

    /// The contents of an open export: of the given handle, or of one that has the node open, best
    /// of one that reads what the kernel was told last.
    pub(in crate::tree) fn open_export_of(
        &self,
        node: &Node,
        handle: Option<u64>,
    ) -> Option<Contents> {
        let told = self.told(node);
        let of = |handle: &Handle| match handle {
            Handle::Export {
                source, contents, ..
            } if Node::Export(source.clone()) == *node => Some(*contents),
            Handle::Compressed {
                source, contents, ..
            } if Node::Compressed(source.clone()) == *node => Some(*contents),
            _ => None,
        };
        let handles = self.handles.lock();
        match handle.and_then(|number| handles.get(&number)) {
            Some(handle) => of(handle),
            None => {
                let mut open: Vec<Contents> = handles.values().filter_map(|h| of(h)).collect();
                open.sort_by_key(|contents| Some(*contents) != told);
                open.first().copied()
            }
        }
    }

    /// Whether a compressed archive is open that is there as a whole, in a file.
    pub(in crate::tree) fn is_open_as_whole(&self, node: &Node, handle: Option<u64>) -> bool {
        let handles = self.handles.lock();
        let is_whole = |handle: &Handle| {
            matches!(handle, Handle::Compressed { source, packed: Packed::Spooled(_), .. }
                if Node::Compressed(source.clone()) == *node)
        };
        match handle.and_then(|number| handles.get(&number)) {
            Some(handle) => is_whole(handle),
            None => handles.values().any(|handle| is_whole(handle)),
        }
    }

    /// The contents the kernel was last told that an export's inode has.
    pub(in crate::tree) fn told(&self, node: &Node) -> Option<Contents> {
        self.told
            .lock()
            .get(&node.ino())
            .map(|(contents, _)| *contents)
    }

    /// The generation of an export's inode, raised when its contents are not what the kernel was
    /// told last. Without contents (it is being written) it stays.
    pub(in crate::tree) fn generation(&self, node: &Node, contents: Option<Contents>) -> u64 {
        let mut told = self.told.lock();
        let Some(contents) = contents else {
            return told
                .get(&node.ino())
                .map_or(0, |(_, generation)| *generation);
        };
        let (known, generation) = told.entry(node.ino()).or_insert((contents, 0));
        if *known != contents {
            *known = contents;
            *generation += 1;
        }
        *generation
    }

    /// The file being written that this caller sees at a node.
    fn staged_file(&self, caller: Caller, node: &Node) -> Option<Arc<StagedFile>> {
        let mut staging = self.staging.lock();
        if staging.loose_file_at(node).is_none() {
            staging.face(caller, node)?;
        }
        staging.file_at(node)
    }

    fn open_staged(&self, file: Arc<StagedFile>, writes: bool, flags: i32) -> Result<Opened> {
        let mut state = file.state.lock();
        if !writes {
            return Err(Error::new(
                libc::EPERM,
                format!(
                    "{} is being written; read it when it is a box",
                    state.place.name
                ),
            ));
        }
        if flags & libc::O_APPEND != 0 || state.committed {
            let message = format!("nothing can be added to {}", state.place.name);
            drop(state);
            return Err(self.refuse(libc::EPERM, message));
        }
        state.open += 1;
        drop(state);
        Ok(self.opened_for_writing(file))
    }

    pub(in crate::tree) fn opened_for_writing(&self, file: Arc<StagedFile>) -> Opened {
        Opened {
            handle: self.add_handle(Handle::Writing(file)),
            // Writes reach us as they are made, and each gets its own answer.
            direct: true,
            keep_pages: false,
            spool: None,
        }
    }

    /// Fills `buf` with a file's bytes from `offset` on, completely unless it ends; returns how many
    /// bytes that are. [`have_read`](Tree::have_read) is to follow.
    ///
    /// # Errors
    /// EIO when the disk changes while it is read.
    pub fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match &*self.handle(handle)? {
            Handle::Export {
                source,
                export,
                contents,
                operation,
            } => {
                self.refuse_mixture(&Node::Export(source.clone()), source, contents)?;
                let read = self.noted_read(source, export.read_at(offset, buf))?;
                operation.reaches(offset.saturating_add(read as u64));
                Ok(read)
            }
            Handle::Compressed {
                source,
                packed,
                contents,
                operation,
                ..
            } => {
                if let Packed::Streamed(_) = packed {
                    self.refuse_mixture(&Node::Compressed(source.clone()), source, contents)?;
                }
                let read = self.noted_read(source, packed.read_at(offset, buf))?;
                operation.reaches(offset.saturating_add(read as u64));
                Ok(read)
            }
            Handle::Inside { node, inside } => self.read_inside(node, inside, offset, buf),
            Handle::Bytes { bytes, .. } => Ok(copy_out(bytes, offset, buf)),
            Handle::Log => {
                let bytes = self.store.events().read_at(offset, buf.len());
                Ok(copy_out(&bytes, 0, buf))
            }
            Handle::List(_) | Handle::GuestDirectory { .. } | Handle::Writing(_) => {
                Err(Error::new(libc::EBADF, "that is not open for reading"))
            }
        }
    }

    /// Bytes that were read go into the checksum of an export's disk: after they were handed to the
    /// reader, who need not wait for that.
    pub fn have_read(&self, handle: u64, offset: u64, bytes: &[u8]) {
        if let Ok(handle) = self.handle(handle)
            && let Handle::Export { export, .. } = &*handle
        {
            export.take_along(offset, bytes);
        }
    }

    /// EIO when the kernel was told of other contents since: the pages and the size it has are of those.
    fn refuse_mixture(&self, node: &Node, source: &Source, contents: &Contents) -> Result<()> {
        match self.told(node) {
            Some(told) if told != *contents => Err(self.changed_under_reader(source)),
            _ => Ok(()),
        }
    }

    fn noted_read(&self, source: &Source, read: Result<usize>) -> Result<usize> {
        read.inspect_err(|error| {
            self.store.events().warn(&format!(
                "reading the export of {} failed: {error}",
                self.store.describe(source)
            ));
        })
    }

    /// Writes bytes of a file being made.
    ///
    /// # Errors
    /// EBADMSG in the write that shows the archive is none; ENOSPC, EIO.
    pub fn write(&self, handle: u64, offset: u64, bytes: &[u8]) -> Result<u32> {
        let handle = self.handle(handle)?;
        let Handle::Writing(file) = &*handle else {
            return Err(Error::new(libc::EBADF, "that is not open for writing"));
        };
        let mut state = file.state.lock();
        state.refused()?;
        if let Err(error) = self.put(file, &mut state, offset, bytes) {
            self.note_refusal(file, &mut state, &error);
            return Err(error);
        }
        file.reaches(offset.saturating_add(bytes.len() as u64));
        u32::try_from(bytes.len()).map_err(|_| Error::new(libc::EINVAL, "too many bytes at once"))
    }

    fn put(
        &self,
        file: &StagedFile,
        state: &mut FileState,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        if state.committed {
            return Err(Error::new(libc::EPERM, "it is a box already"));
        }
        match state.role() {
            Role::Placeholder if bytes.is_empty() => Ok(()),
            Role::Placeholder => Err(Error::new(
                libc::EPERM,
                format!(
                    "{} takes no bytes: it follows from {EXPORT}",
                    state.place.name
                ),
            )),
            Role::Json => state.put_text(offset, bytes),
            Role::NewBox | Role::BoxDisk | Role::SnapshotDisk | Role::TemporaryArchive => {
                self.receive(file, state, bytes.is_empty())?;
                if offset == 0
                    && let (Some(operation), Some(length)) = (&state.operation, announced(bytes))
                {
                    operation.set_total(length);
                }
                if let Some(operation) = &state.operation {
                    operation.reaches(offset.saturating_add(bytes.len() as u64));
                }
                match &mut state.content {
                    Content::Archive(arrival) => arrival.write_at(offset, bytes),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Makes the content an archive that takes bytes. What was shared so far becomes bytes: the
    /// tool has gone over from copy_file_range to writing.
    fn receive(&self, file: &StagedFile, state: &mut FileState, nothing: bool) -> Result<()> {
        let start = match std::mem::replace(&mut state.content, Content::Nothing) {
            Content::Nothing if nothing => return Ok(()),
            Content::Archive(arrival) => {
                state.content = Content::Archive(arrival);
                return Ok(());
            }
            Content::Shared {
                export, covered, ..
            } => Some((export, covered)),
            _ => None,
        };
        let is_box = !file.restores && !matches!(state.place.parent, Node::Snapshot(..));
        let wanted = if is_box { Wanted::Box } else { Wanted::Disk };
        let mut arrival = self.store.receive(wanted)?;
        let what = self.what_arrives(file, &state.place.name);
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
        state.content = Content::Archive(Box::new(arrival));
        Ok(())
    }

    /// Copies a range from an open file to one being made without moving bytes: what is copied
    /// says what is meant.
    ///
    /// # Errors
    /// EOPNOTSUPP where a tool should read and write instead.
    pub fn copy_range(
        &self,
        from: u64,
        from_offset: u64,
        to: u64,
        to_offset: u64,
        length: u64,
    ) -> Result<u32> {
        let unfit = || Error::new(libc::EOPNOTSUPP, "that can only be read and written");
        let from = self.handle(from)?;
        let to = self.handle(to)?;
        let Handle::Writing(file) = &*to else {
            return Err(unfit());
        };
        let mut state = file.state.lock();
        state.refused()?;
        if state.committed || from_offset != to_offset {
            return Err(unfit());
        }
        let length = length.min(MOST_COPIED);
        let copied = match &*from {
            Handle::Export {
                source,
                export,
                contents,
                ..
            } => share(&mut state, (source, export, contents), from_offset, length)
                .ok_or_else(unfit)?,
            Handle::Bytes { node, bytes }
                if state.role() == Role::Json && state.describes(node) =>
            {
                let source = node.source().ok_or_else(unfit)?;
                if !self.store.has_disk(&source) {
                    // It is to be read: what it says is refused then.
                    return Err(unfit());
                }
                state.content = Content::SharedJson(source);
                length.min((bytes.len() as u64).saturating_sub(from_offset))
            }
            _ => return Err(unfit()),
        };
        file.reaches(to_offset.saturating_add(copied));
        u32::try_from(copied).map_err(|_| unfit())
    }

    /// close(2) of one descriptor: commits what is complete.
    ///
    /// # Errors
    /// EBADMSG for an archive that is incomplete, EEXIST, EBUSY, ENOSPC: the copier sees it.
    pub fn flush(&self, handle: u64) -> Result<()> {
        match &*self.handle(handle)? {
            Handle::Writing(file) => self.settle(file),
            _ => Ok(()),
        }
    }

    fn note_refusal(&self, file: &StagedFile, state: &mut FileState, error: &Error) {
        if state.refused.is_none() {
            let what = self.what_arrives(file, &state.place.name);
            let message = format!("{what} failed: {error}");
            self.store.events().warn(&message);
        }
        state.refuse(error);
    }

    /// What the writing of a file is, in a few words.
    fn what_arrives(&self, file: &StagedFile, name: &str) -> String {
        let source = Source::Live {
            box_id: file.box_id.clone(),
        };
        match self.staged_name(&file.box_id) {
            _ if file.restores => format!("restore of {}", self.store.describe(&source)),
            Ok(of_box) => format!("import of {of_box}/{name}"),
            Err(_) => format!("import of {name}"),
        }
    }

    /// The last descriptor of a handle is gone. What did not become anything is let go.
    pub fn release(&self, handle: u64) {
        let Some(handle) = self.handles.lock().remove(&handle) else {
            return;
        };
        if let Handle::Export { export, .. } = &*handle {
            self.store.note_digest(export);
        }
        let Handle::Writing(file) = &*handle else {
            return;
        };
        self.staging.lock().touch(file);
        let mut state = file.state.lock();
        state.open = state.open.saturating_sub(1);
        if state.open == 0 {
            state.operation = None;
        }
        if state.open > 0 || state.committed || state.role() == Role::Placeholder {
            return;
        }
        if state.role() == Role::Json {
            let partial = state.refused().and_then(|()| state.refuse_partial_text());
            drop(state);
            if let Err(error) = partial {
                self.store
                    .events()
                    .warn(&format!("refused: a description: {error}"));
                self.drop_staged_file(file, true);
            }
            return;
        }
        let complete = state.refused.is_none() && is_whole(&state.content);
        let waits = state.role() == Role::SnapshotDisk && self.waits_for_box(file);
        let waits = waits || file.waits.load(Ordering::Relaxed);
        if complete && (state.role() == Role::TemporaryArchive || waits) {
            // Its name is still to come, or its box.
            file.waits.store(true, Ordering::Relaxed);
            return;
        }
        if state.refused.is_none()
            && let Err(error) = is_complete(&mut state, file.size())
        {
            self.note_refusal(file, &mut state, &error);
        }
        state.content = Content::Nothing;
        let refused = state.refused.is_some();
        drop(state);
        self.drop_staged_file(file, refused);
    }

    /// Has the log say why an archive that is about to be removed was none. Its last close may be told of
    /// later than its removal.
    pub(in crate::tree) fn note_unfinished(&self, file: &Arc<StagedFile>) {
        let mut state = file.state.lock();
        let is_archive = matches!(state.content, Content::Archive(_));
        if is_archive
            && !state.committed
            && state.refused.is_none()
            && let Err(error) = is_complete(&mut state, file.size())
        {
            self.note_refusal(file, &mut state, &error);
        }
    }

    /// Attributes right after making a file.
    pub(in crate::tree) fn attr_of_made(&self, file: &StagedFile) -> Attr {
        self.file(&file.node, file.size(), file.created)
    }
}

/// Copies what of `bytes` lies from `offset` on into `buf`; returns how much that is.
fn copy_out(bytes: &[u8], offset: u64, buf: &mut [u8]) -> usize {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let from = bytes.get(offset..).unwrap_or_default();
    let len = from.len().min(buf.len());
    if let (Some(to), Some(from)) = (buf.get_mut(..len), from.get(..len)) {
        to.copy_from_slice(from);
    }
    len
}

/// The length of an archive as its beginning announces it, in bytes: a plain tar, up to the end of its
/// disk, after which little comes. None for any other; it is for show, and nothing goes by it.
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
