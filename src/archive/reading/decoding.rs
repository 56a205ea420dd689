//! Where an archive is decoded: in the call that brings its bytes, or behind it.
//!
//! Decoding zstd takes as long as all the rest. So while it is certain that the archive does not end
//! in what was brought, a thread decodes it, and whoever wrote it can get the next bytes meanwhile.
//! It is certain as long as the tar lacks more bytes than can come out of all blocks that the thread
//! was sent ([`Blocks`]). Where the end may be, the thread is waited for and decoding goes on in the
//! calls, so that each says what became of its bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use super::Arrived;
use super::blocks::{BLOCK_MAX, Blocks};
use super::frames::{self, Frames};
use super::members::Members;
use super::unpacking::Unpacking;
use crate::{Context, Error, Result};

/// Bytes of the tar that must be missing beyond those under way: for fewer no thread is started.
const LEAST: u64 = 8 << 20;
/// Bytes sent at once, and how often that before the thread is waited for: 2 MiB.
const PORTION: usize = 128 << 10;
const PORTIONS: usize = 16;

/// The decoder, where it is now, and how far it may be from the end of the archive.
pub(super) struct Decoding {
    at: At,
    blocks: Blocks,
    /// At most so many bytes of the tar come out of what came since the decoder was last here.
    coming: u64,
    /// More than so many bytes of the tar were missing then.
    missing: u64,
}

enum At {
    Here(Box<Decoder>),
    Background(Background),
    /// It failed.
    Gone,
}

impl Decoding {
    pub(super) fn new(members: Members) -> Decoding {
        Decoding {
            at: At::Here(Box::new(Decoder {
                packing: Packing::Unknown(Vec::new()),
                unpacking: Unpacking::of(members),
            })),
            blocks: Blocks::new(),
            coming: 0,
            missing: 0,
        }
    }

    /// Takes the next bytes of the archive. An error may be that of bytes that came earlier, unless
    /// the archive could end in these.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<()> {
        self.coming = self.coming.saturating_add(self.blocks.pass(bytes));
        if self.coming < self.missing {
            return self.send(bytes);
        }
        let decoder = self.call_back()?;
        let taken = decoder.take(bytes);
        let missing = decoder.unpacking.missing();
        match taken {
            Ok(()) => {
                // A block that began may not have come out yet.
                self.coming = BLOCK_MAX;
                self.missing = missing.saturating_sub(LEAST);
            }
            // Its threads and its memory end with it.
            Err(_) => self.at = At::Gone,
        }
        taken
    }

    /// Waits until all that was taken is decoded, hashed and written as far as that goes.
    ///
    /// # Errors
    /// What any of it failed with.
    pub(super) fn settle(&mut self) -> Result<&Decoder> {
        let settled = self.call_back()?.unpacking.members.settle();
        if let Err(error) = settled {
            self.at = At::Gone;
            return Err(error);
        }
        self.call_back().map(|decoder| &*decoder)
    }

    /// Waits for all that was taken to be decoded.
    fn call_back(&mut self) -> Result<&mut Decoder> {
        if matches!(self.at, At::Background(_))
            && let At::Background(thread) = std::mem::replace(&mut self.at, At::Gone)
        {
            self.at = At::Here(thread.join()?);
        }
        match &mut self.at {
            At::Here(decoder) => Ok(decoder),
            At::Background(_) | At::Gone => Err(Error::damaged(
                "decoding the archive has ended early; this is a fault of boxlitefs",
            )),
        }
    }

    /// What came, once the archive is complete.
    pub(super) fn arrived(&self) -> Option<&Arrived> {
        match &self.at {
            At::Here(decoder) => decoder.unpacking.arrived.as_ref(),
            At::Background(_) | At::Gone => None,
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        if matches!(self.at, At::Here(_))
            && let At::Here(decoder) = std::mem::replace(&mut self.at, At::Gone)
        {
            self.at = At::Background(Background::start(decoder)?);
        }
        match &self.at {
            At::Background(thread) if thread.send(bytes) => Ok(()),
            _ => self.call_back().map(|_| ()),
        }
    }
}

/// A decoder at work. Dropped, it stops after the portion at hand, and is gone when `drop` returns.
struct Background {
    bytes: Option<SyncSender<Vec<u8>>>,
    /// Portions that were decoded, to be filled again: made anew each time, by whichever thread
    /// brings a write, they would leave much of the heap unused and not given back.
    empty: Receiver<Vec<u8>>,
    /// The decoder comes back unless it failed.
    thread: Option<JoinHandle<Result<Box<Decoder>>>>,
    stop: Arc<AtomicBool>,
}

impl Background {
    fn start(decoder: Box<Decoder>) -> Result<Background> {
        let (bytes, portions) = sync_channel(PORTIONS);
        let (decoded, empty) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = Builder::new()
            .name("import-decode".into())
            .spawn(move || decode(decoder, &portions, &decoded, &stopped))
            .context(|| "cannot start a thread to decode the archive")?;
        Ok(Background {
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

impl Drop for Background {
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

/// What turns the bytes of an archive into what it brings.
pub(super) struct Decoder {
    packing: Packing,
    unpacking: Unpacking,
}

/// How the tar is packed.
enum Packing {
    /// Fewer bytes than zstd's magic have come, and those there are begin it.
    Unknown(Vec<u8>),
    Plain,
    Zstd(Box<Frames>),
}

impl Decoder {
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<()> {
        if let Packing::Unknown(magic) = &mut self.packing {
            magic.extend_from_slice(bytes);
            let start = std::mem::take(magic);
            match frames::begins_frame(&start) {
                None => self.packing = Packing::Unknown(start),
                Some(compressed) => {
                    self.packing = match compressed {
                        true => Packing::Zstd(Box::new(Frames::new()?)),
                        false => Packing::Plain,
                    };
                    self.unpack(&start)?;
                }
            }
            return Ok(());
        }
        self.unpack(bytes)
    }

    fn unpack(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.packing {
            Packing::Unknown(_) => Ok(()),
            Packing::Plain => {
                self.unpacking.tar(bytes)?;
                self.unpacking.boundary()
            }
            Packing::Zstd(frames) => frames.push(bytes, &mut self.unpacking),
        }
    }

    /// What the next byte would belong to.
    pub(super) fn place(&self) -> String {
        let members = &self.unpacking.members;
        match &self.packing {
            Packing::Unknown(_) => "its first header".into(),
            Packing::Zstd(_) if members.ended() => "its last zstd frame".into(),
            _ => members.place(),
        }
    }
}
