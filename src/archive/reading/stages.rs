//! The stages of a disk after decoding: hashing, then writing. For a large disk each has a thread,
//! so both go on while the next bytes arrive and are decoded.
//!
//! ```text
//!             pieces               pieces                  file
//!  decoding ─────────▶ hashing ─────────────▶ writing ─────────▶
//!      ▲                                        │
//!      └────────────── empty pieces ────────────┘
//! ```
//!
//! The number of pieces is fixed: a stage that is ahead waits for one. A stage that fails drops its
//! ends of the channels. Then the others end, too, and decoding notices where it waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use sha2::{Digest, Sha256};

use super::disk_writer::{DiskWriter, Piece, zeros};
use crate::disk::LeftOut;
use crate::{Context, Error, Result};

/// The most pieces of 1 MiB in progress, including the one being filled. A drive that pauses to
/// flush its cache delays the import only when these are used up.
const PIECES: usize = 8;
/// Bytes of a disk that are hashed and written where they are decoded: threads would take longer to
/// start than they save.
const ALONE: u64 = 4 << 20;

/// Bytes of the disk, in order.
enum Part {
    Data(Piece),
    /// Whole blocks of zeros.
    Zeros(u64),
    /// Makes the stage of this name panic.
    #[cfg(test)]
    Fault(&'static str),
}

/// The stages, and how they run.
pub(super) struct Stages {
    state: StageState,
    /// Bytes taken so far.
    came: u64,
}

enum StageState {
    /// In the calls that bring the bytes.
    Here(Sha256, DiskWriter),
    Threads(Threads),
    /// All is written.
    Ended(DiskWriter),
    /// A stage failed, and its error was told.
    Failed,
}

impl Stages {
    pub(super) fn new(writer: DiskWriter) -> Stages {
        Stages {
            state: StageState::Here(Sha256::new(), writer),
            came: 0,
        }
    }

    /// Takes the next bytes, whole blocks unless they are the last, and leaves an empty piece.
    ///
    /// # Errors
    /// Those of a stage, about this piece or an earlier one.
    pub(super) fn data(&mut self, piece: &mut Piece) -> Result<()> {
        self.will_take(piece.bytes().len() as u64)?;
        match &mut self.state {
            StageState::Here(sha256, writer) => {
                sha256.update(piece.bytes());
                writer.data(piece.bytes())?;
                piece.clear();
                Ok(())
            }
            StageState::Threads(threads) => {
                if threads.exchange(piece) {
                    Ok(())
                } else {
                    Err(self.failure())
                }
            }
            StageState::Ended(_) | StageState::Failed => Err(over()),
        }
    }

    /// Takes `count` zeros, whole blocks of them.
    ///
    /// # Errors
    /// As [`Stages::data`].
    pub(super) fn zeros(&mut self, count: u64) -> Result<()> {
        self.will_take(count)?;
        match &mut self.state {
            StageState::Here(sha256, writer) => {
                hash_zeros(sha256, count, || false);
                writer.hole(count);
                Ok(())
            }
            StageState::Threads(threads) => {
                if threads.send(Part::Zeros(count)) {
                    Ok(())
                } else {
                    Err(self.failure())
                }
            }
            StageState::Ended(_) | StageState::Failed => Err(over()),
        }
    }

    /// Waits until everything taken so far is hashed and written.
    ///
    /// # Errors
    /// As [`Stages::data`].
    pub(super) fn drain(&mut self) -> Result<()> {
        let drained = match &mut self.state {
            StageState::Threads(threads) => threads.drain(),
            _ => true,
        };
        if drained { Ok(()) } else { Err(self.failure()) }
    }

    /// No more bytes come: waits for all stages, gives the file its length and returns the digest.
    ///
    /// # Errors
    /// As [`Stages::data`].
    pub(super) fn end(&mut self) -> Result<[u8; 32]> {
        let (sha256, writer) = match std::mem::replace(&mut self.state, StageState::Failed) {
            StageState::Here(sha256, writer) => (sha256, writer),
            StageState::Threads(threads) => threads.join()?,
            StageState::Ended(_) | StageState::Failed => return Err(over()),
        };
        writer.end()?;
        self.state = StageState::Ended(writer);
        Ok(sha256.finalize().into())
    }

    /// Returns what was left out of the disk, once all is written.
    pub(super) fn take_left_out(&mut self) -> Option<LeftOut> {
        match &mut self.state {
            StageState::Ended(writer) => writer.take_left_out(),
            _ => None,
        }
    }

    /// Makes the disk durable. The caller flushes its directory.
    ///
    /// # Errors
    /// Those of the flush.
    pub(super) fn sync(&self) -> Result<()> {
        match &self.state {
            StageState::Ended(writer) => writer.sync(),
            _ => Err(Error::damaged("a disk is flushed before its end")),
        }
    }

    /// Starts the threads once the disk is large enough.
    fn will_take(&mut self, count: u64) -> Result<()> {
        self.came = self.came.saturating_add(count);
        if self.came <= ALONE || !matches!(self.state, StageState::Here(..)) {
            return Ok(());
        }
        if let StageState::Here(sha256, writer) =
            std::mem::replace(&mut self.state, StageState::Failed)
        {
            self.state = StageState::Threads(Threads::start(sha256, writer)?);
        }
        Ok(())
    }

    /// Returns the error that made the threads end early.
    fn failure(&mut self) -> Error {
        match std::mem::replace(&mut self.state, StageState::Failed) {
            StageState::Threads(threads) => threads.stop().err().unwrap_or_else(over),
            _ => over(),
        }
    }
}

/// The threads of both stages, and our ends of the channels.
struct Threads {
    ends: Option<Ends>,
    hashing: Option<JoinHandle<Sha256>>,
    writing: Option<JoinHandle<Result<DiskWriter>>>,
    /// The result is not wanted any more.
    stop: Arc<AtomicBool>,
}

struct Ends {
    parts: SyncSender<Part>,
    empty: Receiver<Piece>,
    /// Pieces that were made, the caller's included.
    made: usize,
}

impl Threads {
    fn start(sha256: Sha256, writer: DiskWriter) -> Result<Threads> {
        let (parts, to_hash) = sync_channel(PIECES);
        let (hashed, to_write) = sync_channel(PIECES);
        let (emptied, empty) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Threads {
            ends: Some(Ends {
                parts,
                empty,
                made: 1,
            }),
            hashing: None,
            writing: None,
            stop: stop.clone(),
        };
        let stopped = stop.clone();
        threads.writing = Some(
            spawn("import-write")
                .spawn(move || write(writer, &to_write, &emptied, &stopped))
                .context(unstartable)?,
        );
        threads.hashing = Some(
            spawn("import-hash")
                .spawn(move || hash(sha256, &to_hash, &hashed, &stop))
                .context(unstartable)?,
        );
        Ok(threads)
    }

    /// Sends a part; false when a stage failed.
    fn send(&self, part: Part) -> bool {
        self.ends
            .as_ref()
            .is_some_and(|ends| ends.parts.send(part).is_ok())
    }

    /// Sends a full piece in exchange for an empty one; false when a stage failed.
    fn exchange(&mut self, piece: &mut Piece) -> bool {
        match self.empty_piece() {
            Some(empty) => self.send(Part::Data(std::mem::replace(piece, empty))),
            None => false,
        }
    }

    /// A piece to fill, once there is one; none when a stage failed.
    fn empty_piece(&mut self) -> Option<Piece> {
        let ends = self.ends.as_mut()?;
        match ends.empty.try_recv() {
            Ok(piece) => Some(piece),
            Err(TryRecvError::Empty) if ends.made < PIECES => {
                ends.made = ends.made.saturating_add(1);
                Some(Piece::new())
            }
            Err(TryRecvError::Empty) => ends.empty.recv().ok(),
            Err(TryRecvError::Disconnected) => None,
        }
    }

    /// Waits until all pieces but the caller's are back; false when a stage failed.
    fn drain(&mut self) -> bool {
        let Some(ends) = &mut self.ends else {
            return false;
        };
        while ends.made > 1 {
            if ends.empty.recv().is_err() {
                return false;
            }
            // The piece is freed; another is made when it is needed.
            ends.made = ends.made.saturating_sub(1);
        }
        true
    }

    /// Lets both stages finish what they were sent.
    fn join(mut self) -> Result<(Sha256, DiskWriter)> {
        self.ends = None;
        let (hashed, written) = (self.hashing.take(), self.writing.take());
        let sha256 = hashed.and_then(|thread| thread.join().ok());
        let writer = written.and_then(|thread| thread.join().ok());
        match (sha256, writer) {
            (Some(sha256), Some(writer)) => Ok((sha256, writer?)),
            // One panicked.
            _ => Err(over()),
        }
    }

    /// Ends both stages without waiting for what they were sent.
    fn stop(self) -> Result<(Sha256, DiskWriter)> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.ends = None;
        if let Some(thread) = self.hashing.take() {
            let _ = thread.join();
        }
        if let Some(thread) = self.writing.take() {
            let _ = thread.join();
        }
    }
}

/// Hashes what comes and sends it on, until nothing comes or writing has ended.
fn hash(
    mut sha256: Sha256,
    parts: &Receiver<Part>,
    hashed: &SyncSender<Part>,
    stop: &AtomicBool,
) -> Sha256 {
    let stopped = || stop.load(Ordering::Relaxed);
    for part in parts {
        match &part {
            _ if stopped() => break,
            Part::Data(piece) => sha256.update(piece.bytes()),
            Part::Zeros(count) => hash_zeros(&mut sha256, *count, stopped),
            #[cfg(test)]
            Part::Fault(stage) => assert_ne!(*stage, "hash"),
        }
        if hashed.send(part).is_err() {
            break;
        }
    }
    sha256
}

/// Writes what comes and sends the empty pieces back.
fn write(
    mut writer: DiskWriter,
    parts: &Receiver<Part>,
    emptied: &Sender<Piece>,
    stop: &AtomicBool,
) -> Result<DiskWriter> {
    for part in parts {
        match part {
            _ if stop.load(Ordering::Relaxed) => break,
            Part::Data(mut piece) => {
                writer.data(piece.bytes())?;
                piece.clear();
                // A sender that does not wait for pieces needs none.
                let _ = emptied.send(piece);
            }
            Part::Zeros(count) => writer.hole(count),
            #[cfg(test)]
            Part::Fault(stage) => assert_ne!(stage, "write"),
        }
    }
    Ok(writer)
}

/// Hashes `count` zeros, which may take minutes, or fewer when told to stop.
fn hash_zeros(sha256: &mut Sha256, mut count: u64, stopped: impl Fn() -> bool) {
    while count > 0 && !stopped() {
        let some = zeros(count);
        sha256.update(some);
        count = count.saturating_sub(some.len() as u64);
    }
}

fn spawn(name: &str) -> Builder {
    Builder::new().name(name.to_owned())
}

fn unstartable() -> &'static str {
    "cannot start the threads that receive an archive"
}

fn over() -> Error {
    Error::damaged("receiving the archive's disk ended early; this is a fault of boxlitefs")
}

#[cfg(test)]
mod tests;
