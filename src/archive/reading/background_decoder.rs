//! Where an archive is decoded: in the call that brings its bytes, or behind it.
//!
//! Decoding zstd takes as long as all the rest. So while it is certain that the archive does not end
//! in what was brought, a thread decodes it, and whoever wrote it can get the next bytes meanwhile.
//! It is certain as long as the tar lacks more bytes than can come out of all blocks that the thread
//! was sent ([`OutputBound`]). Where the end may be, the thread is waited for and decoding goes on in the
//! calls, so that each says what became of its bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::Arrived;
use super::decoder::Decoder;
use super::members::Members;
use super::output_bound::{BLOCK_MAX, OutputBound};
use crate::{Context, Error, Result};

/// Bytes of the tar that must be missing beyond those under way: for fewer no thread is started.
const LEAST: u64 = 8 << 20;
/// Bytes sent at once, and how often that before the thread is waited for: 2 MiB.
const PORTION: usize = 128 << 10;
const PORTIONS: usize = 16;

/// The decoder, where it is now, and how far it may be from the end of the archive.
pub(super) struct BackgroundDecoder {
    location: Location,
    bound: OutputBound,
    /// Location most so many bytes of the tar come out of what came since the decoder was last here.
    coming: u64,
    /// More than so many bytes of the tar were missing then.
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

    /// Takes the next bytes of the archive. An error may be that of bytes that came earlier, unless
    /// the archive could end in these.
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
            // Its threads and its memory end with it.
            Err(_) => self.location = Location::Gone,
        }
        taken
    }

    /// Waits until all that was taken is decoded, hashed and written as far as that goes.
    ///
    /// # Errors
    /// What any of it failed with.
    pub(super) fn drain(&mut self) -> Result<&Decoder> {
        let drained = self.call_back()?.drain();
        if let Err(error) = drained {
            self.location = Location::Gone;
            return Err(error);
        }
        self.call_back().map(|decoder| &*decoder)
    }

    /// Waits for all that was taken to be decoded.
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
                "decoding the archive has ended early; this is a fault of boxlitefs",
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

/// A decoder at work. Dropped, it stops after the portion at hand, and is gone when `drop` returns.
struct DecoderThread {
    bytes: Option<SyncSender<Vec<u8>>>,
    /// Portions that were decoded, to be filled again: made anew each time, by whichever thread
    /// brings a write, they would leave much of the heap unused and not given back.
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

    /// Sends bytes, and waits while the thread is too far behind; false when it has failed.
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

    /// Waits until all that was sent is decoded; the decoder comes back unless that failed.
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
        // Nobody takes them any more once the end is waited for.
        let _ = decoded.send(bytes);
    }
    Ok(decoder)
}
