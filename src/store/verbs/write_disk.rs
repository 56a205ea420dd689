//! `mount -o loop web/disk.img /mnt`: writes to the disk of a stopped box.
//!
//! While a disk is open for writing, BoxLite's own lock of the box is held, so that BoxLite can't
//! start it, and nothing else: runtimes start, and other boxes can be changed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use crate::disk::{DiskWriter, FlushStep};
use crate::exports::{DiskState, Source};
use crate::files::crash_points::crash_point;
use crate::home::{Home, lock_file};
use crate::process::Caller;
use crate::process::control::named;
use crate::store::Store;
use crate::store::access::lock::{lock_shared, made_again_on};
use crate::{Error, Result};

/// How often to look whether a runtime that starts has replaced the lock files. BoxLite takes longer
/// than that to start a box.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The disk of a box that is open for writing.
pub struct DiskWriting {
    home: Arc<Home>,
    state: Arc<DiskState>,
    writer: DiskWriter,
    lock: Arc<StartLock>,
}

/// Disks that are open for writing, by the id of the box, each with the number of its open files.
pub type Writings = HashMap<String, (Arc<DiskWriting>, usize)>;

/// BoxLite's lock of a box.
struct StartLock {
    held: Mutex<Option<(PathBuf, File)>>,
    /// BoxLite took it though we held it: the box was started.
    is_lost: AtomicBool,
}

impl StartLock {
    /// Takes the lock again if a runtime that started made its file again.
    fn look(&self) {
        let mut held = self.held.lock();
        let Some((path, file)) = &mut *held else {
            return;
        };
        let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let (there, ours) = (fs::metadata(&*path).map(id), file.metadata().map(id));
        match (there, ours) {
            (Ok(there), Ok(ours)) if there != ours => match lock_file(path) {
                Ok(again) => *file = again,
                Err(_) => self.is_lost.store(true, Ordering::Release),
            },
            // Without the file BoxLite can't start the box.
            _ => {}
        }
    }
}

impl DiskWriting {
    /// Returns the state that the disk was in when it was opened.
    pub fn state(&self) -> &Arc<DiskState> {
        &self.state
    }

    /// Fills `buf` from `offset` on; returns how many bytes there were.
    ///
    /// # Errors
    /// EIO for what is damaged.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let rest = self.writer.size().saturating_sub(offset);
        let length = usize::try_from(rest).map_or(buf.len(), |rest| rest.min(buf.len()));
        let buf = buf.get_mut(..length).unwrap_or_default();
        self.writer.read_at(offset, buf)?;
        Ok(length)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// EFBIG past the end, ENOSPC, EIO.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.refuse_lost()?;
        self.writer.write_at(offset, bytes)
    }

    /// Makes a range zeros, and gives its room back.
    ///
    /// # Errors
    /// Those of [`DiskWriting::write`].
    pub fn zero(&self, offset: u64, length: u64) -> Result<()> {
        self.refuse_lost()?;
        self.writer.zero(offset, length)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// ENOSPC, EIO.
    pub fn flush(&self) -> Result<()> {
        self.refuse_lost()?;
        self.writer.flush()
    }

    fn refuse_lost(&self) -> Result<()> {
        if !self.lock.is_lost.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::damaged(
            "BoxLite started the box, so its disk is not written to any more",
        ))
    }
}

impl Drop for DiskWriting {
    fn drop(&mut self) {
        self.home.note_writer(self.state.source().box_id(), None);
        self.lock.held.lock().take();
    }
}

/// Names the steps of a flush for tests.
fn reached(step: FlushStep) {
    match step {
        FlushStep::Refcounts => crash_point("write.refcounts"),
        FlushStep::Tables => crash_point("write.tables"),
        FlushStep::Roots => crash_point("write.roots"),
        FlushStep::Lowered => crash_point("write.lowered"),
    }
}

/// Opens the disk of a stopped box for writing. All that have it open share it. To be closed with
/// [`close_disk`].
///
/// # Errors
/// EBUSY while the box is in use, EROFS for a snapshot or a disk that can't be written to,
/// ESTALE for another state of it.
pub fn open_disk(
    store: &Store,
    caller: Caller,
    state: &Arc<DiskState>,
) -> Result<Arc<DiskWriting>> {
    store.refuse_read_only()?;
    let Source::Live { box_id } = state.source() else {
        let message = "a snapshot stays as it is; clone it with cp -r, and write to the clone";
        return Err(Error::new(libc::EROFS, message));
    };
    let mut open = store.writings.lock();
    if let Some(writing) = join(&mut open, box_id) {
        return Ok(writing);
    }
    let pid = caller.process().unwrap_or(caller.tid);
    let writing = made_again_on(store, state.source(), &|| begin(store, box_id, state, pid))?;
    open.insert(box_id.clone(), (writing.clone(), 1));
    Ok(writing)
}

fn begin(
    store: &Store,
    box_id: &str,
    state: &Arc<DiskState>,
    pid: u32,
) -> Result<Arc<DiskWriting>> {
    let locked = lock_shared(store, box_id)?;
    let held = locked.change.lock_start(&locked.record)?;
    let disks = &store.exports.disks;
    let top = disks.existing_top(state.source(), &locked.record)?;
    let chain = disks.open_chain(&top)?;
    if chain.virtual_size() != state.size() {
        let message = "the disk changed after the file was looked up; open it again";
        return Err(Error::new(libc::ESTALE, message));
    }
    let writer = DiskWriter::open(chain, reached)?;
    let lock = Arc::new(StartLock {
        held: Mutex::new(Some(held)),
        is_lost: AtomicBool::new(false),
    });
    watch(&lock)?;
    store.home().note_writer(box_id, Some(named(pid)));
    Ok(Arc::new(DiskWriting {
        home: store.opened.home.clone(),
        state: state.clone(),
        writer,
        lock,
    }))
}

/// Watches a lock in a thread for as long as it is held.
fn watch(lock: &Arc<StartLock>) -> Result<()> {
    let lock: Weak<StartLock> = Arc::downgrade(lock);
    let look = move || {
        while let Some(lock) = lock.upgrade() {
            lock.look();
            drop(lock);
            std::thread::sleep(LOOK_EVERY);
        }
    };
    let started = std::thread::Builder::new().name("lock".into()).spawn(look);
    started.map_err(|error| Error::io("cannot start a thread", error))?;
    Ok(())
}

/// Shares a disk that is open for writing, to be closed with [`close_disk`]; None if it is not.
pub fn join_disk(store: &Store, source: &Source) -> Option<Arc<DiskWriting>> {
    let Source::Live { box_id } = source else {
        return None;
    };
    join(&mut store.writings.lock(), box_id)
}

fn join(open: &mut Writings, box_id: &str) -> Option<Arc<DiskWriting>> {
    let (writing, count) = open.get_mut(box_id)?;
    *count += 1;
    Some(writing.clone())
}

/// Returns the disk of a source, if it is open for writing.
pub fn written_disk(store: &Store, source: &Source) -> Option<Arc<DiskWriting>> {
    let Source::Live { box_id } = source else {
        return None;
    };
    let open = store.writings.lock();
    open.get(box_id).map(|(writing, _)| writing.clone())
}

/// Closes a disk that was opened with [`open_disk`]. After the last one the box is as stopped as
/// before.
pub fn close_disk(store: &Store, writing: &Arc<DiskWriting>) {
    let box_id = writing.state.source().box_id();
    let mut open = store.writings.lock();
    let Some((_, count)) = open.get_mut(box_id) else {
        return;
    };
    *count = count.saturating_sub(1);
    if *count > 0 {
        return;
    }
    if let Err(error) = writing.flush() {
        let name = store.exports.disks.name_of(box_id);
        let message = format!("writing to the disk of box {name} failed: {error}");
        store.events().warn(&message);
    }
    open.remove(box_id);
}
