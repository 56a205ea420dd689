//! Decodes an archive in the call that brings its bytes, or in a thread behind it.
//!
//! Decoding zstd takes as long as everything else. So while it is certain that the archive does not
//! end in the bytes at hand, a thread decodes them, and the writer can get the next ones meanwhile.
//! It is certain as long as the tar lacks more bytes than can come out of all blocks that the
//! thread was sent ([`OutputBound`]). Near the end the thread is joined and the calls decode, so
//! that each returns the verdict on its bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::Arrived;
use super::decoder::Decoder;
use super::members::Members;
use super::output_bound::{BLOCK_MAX, OutputBound};
use crate::{Context, Error, Result};

/// Bytes of the tar that must be missing beyond those in progress: for fewer, no thread is started.
const LEAST: u64 = 8 << 20;
/// Bytes sent at once, and how many portions before the sender waits for the thread: 2 MiB.
const PORTION: usize = 128 << 10;
const PORTIONS: usize = 16;

/// The decoder, wherever it is now, and how far it may be from the end of the archive.
pub(super) struct BackgroundDecoder {
    location: Location,
    bound: OutputBound,
    /// An upper bound of the bytes of the tar that come out of what came since the decoder was last
    /// here.
    coming: u64,
    /// A lower bound of the bytes of the tar that were missing then.
    missing: u64,
}

enum Location {
    Here(Box<Decoder>),
    Background(DecoderThread),
    /// It failed.
    Gone,
}

impl BackgroundDecoder {
    pub(super) fn new(members: Members) -> BackgroundDecoder {
        BackgroundDecoder {
            location: Location::Here(Box::new(Decoder::new(members))),
            bound: OutputBound::new(),
            coming: 0,
            missing: 0,
        }
    }

    /// Takes the next bytes of the archive. An error may be about earlier bytes, unless the archive
    /// could end in these.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<()> {
        self.coming = self.coming.saturating_add(self.bound.feed(bytes));
        if self.coming < self.missing {
            return self.send(bytes);
        }
        let decoder = self.call_back()?;
        let taken = decoder.take(bytes);
        let missing = decoder.missing();
        match taken {
            Ok(()) => {
                // A block that began may not have come out yet.
                self.coming = BLOCK_MAX;
                self.missing = missing.saturating_sub(LEAST);
            }
            // Drops its threads and its memory.
            Err(_) => self.location = Location::Gone,
        }
        taken
    }

    /// Waits until everything taken is decoded, hashed and written, as far as that goes.
    ///
    /// # Errors
    /// Those of decoding, hashing and writing.
    pub(super) fn drain(&mut self) -> Result<&Decoder> {
        let drained = self.call_back()?.drain();
        if let Err(error) = drained {
            self.location = Location::Gone;
            return Err(error);
        }
        self.call_back().map(|decoder| &*decoder)
    }

    /// Waits until everything taken is decoded, and returns the decoder.
    fn call_back(&mut self) -> Result<&mut Decoder> {
        if matches!(self.location, Location::Background(_))
            && let Location::Background(thread) =
                std::mem::replace(&mut self.location, Location::Gone)
        {
            self.location = Location::Here(thread.join()?);
        }
        match &mut self.location {
            Location::Here(decoder) => Ok(decoder),
            Location::Background(_) | Location::Gone => Err(Error::damaged(
                "decoding the archive ended early; this is a fault of boxlitefs",
            )),
        }
    }

    /// What came, once the archive is complete.
    pub(super) fn arrived(&self) -> Option<&Arrived> {
        match &self.location {
            Location::Here(decoder) => decoder.arrived(),
            Location::Background(_) | Location::Gone => None,
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        if matches!(self.location, Location::Here(_))
            && let Location::Here(decoder) = std::mem::replace(&mut self.location, Location::Gone)
        {
            self.location = Location::Background(DecoderThread::start(decoder)?);
        }
        match &self.location {
            Location::Background(thread) if thread.send(bytes) => Ok(()),
            _ => self.call_back().map(|_| ()),
        }
    }
}

/// A decoder in a thread. When it is dropped, the thread stops after the current portion and is
/// joined.
struct DecoderThread {
    bytes: Option<SyncSender<Vec<u8>>>,
    /// Decoded portions, to be filled again. If each write allocated new ones in its own thread,
    /// much of the heap would stay unused.
    empty: Receiver<Vec<u8>>,
    /// The decoder comes back unless it failed.
    thread: Option<JoinHandle<Result<Box<Decoder>>>>,
    stop: Arc<AtomicBool>,
}

impl DecoderThread {
    fn start(decoder: Box<Decoder>) -> Result<DecoderThread> {
        let (bytes, portions) = sync_channel(PORTIONS);
        let (decoded, empty) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = Builder::new()
            .name("import-decode".into())
            .spawn(move || decode(decoder, &portions, &decoded, &stopped))
            .context(|| "cannot start a thread to decode the archive")?;
        Ok(DecoderThread {
            bytes: Some(bytes),
            empty,
            thread: Some(thread),
            stop,
        })
    }

    /// Sends bytes; waits while the thread is too far behind. False when it has failed.
    fn send(&self, bytes: &[u8]) -> bool {
        let Some(thread) = &self.bytes else {
            return false;
        };
        bytes.chunks(PORTION).all(|some| {
            let mut portion = self.empty.try_recv().unwrap_or_default();
            portion.clear();
            portion.extend_from_slice(some);
            thread.send(portion).is_ok()
        })
    }

    /// Waits until everything sent is decoded; returns the decoder unless that failed.
    fn join(mut self) -> Result<Box<Decoder>> {
        self.bytes = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) | None => Err(Error::damaged(
                "decoding the archive panicked; this is a fault of boxlitefs",
            )),
        }
    }
}

impl Drop for DecoderThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.bytes = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn decode(
    mut decoder: Box<Decoder>,
    portions: &Receiver<Vec<u8>>,
    decoded: &Sender<Vec<u8>>,
    stop: &AtomicBool,
) -> Result<Box<Decoder>> {
    for bytes in portions {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        decoder.take(&bytes)?;
        // The sender no longer takes them once it waits for the end.
        let _ = decoded.send(bytes);
    }
    Ok(decoder)
}
