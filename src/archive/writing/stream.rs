//! Streams of compressed archives, made where they are read. With the size of every frame known,
//! any place can be made by itself, and nothing is stored.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::compressed::Compressed;
use super::frame_maker::{FrameCache, FrameMaker};
use super::frame_sizes::{FrameKey, FrameSizes, Placed};
use super::workers::threads;
use crate::error::not_panicking;
use crate::{Error, Result};

/// The most frames that are kept.
const KEPT: usize = 12;
/// The most frames made before a reader asks for them.
const AHEAD: usize = 6;
/// The most sequential readers that are told apart: the number of recent places.
const PLACES: usize = 16;
/// How long an idle thread waits before it ends.
const IDLE: Duration = Duration::from_millis(500);

/// A compressed archive for reading; thread-safe. Its threads end soon after the last read, and
/// when it is dropped.
pub struct Stream {
    shared: Arc<SharedStream>,
}

struct SharedStream {
    of: Arc<Compressed>,
    sizes: Arc<FrameSizes>,
    cache: Arc<dyn FrameCache>,
    state: Mutex<StreamState>,
    /// A frame was made.
    made: Condvar,
    /// A frame is wanted.
    wanted: Condvar,
    /// A frame had another size than expected.
    wrong: Arc<AtomicBool>,
}

#[derive(Default)]
struct StreamState {
    kept: VecDeque<MadeFrame>,
    queue: VecDeque<Placed>,
    /// Frames being made.
    busy: Vec<u64>,
    /// The frames read last, the newest at the end.
    read: VecDeque<u64>,
    /// Frames that readers wait for.
    awaited: Vec<u64>,
    threads: usize,
    closed: bool,
}

struct MadeFrame {
    frame: u64,
    bytes: Result<Arc<Vec<u8>>>,
    /// A reader has had it.
    used: bool,
}

impl Stream {
    /// A stream of an archive whose frames have these sizes. Frames that are in `cache` are taken
    /// from there, and each that is made is offered to it.
    pub fn new(of: Arc<Compressed>, sizes: Arc<FrameSizes>, cache: Arc<dyn FrameCache>) -> Stream {
        Stream {
            shared: Arc::new(SharedStream {
                of,
                sizes,
                cache,
                state: Mutex::default(),
                made: Condvar::new(),
                wanted: Condvar::new(),
                wrong: Arc::default(),
            }),
        }
    }

    /// Length of the compressed archive in bytes.
    #[allow(clippy::len_without_is_empty)] // There always is a manifest.
    pub fn len(&self) -> u64 {
        self.shared.sizes.total()
    }

    /// Returns whether a frame had another size than expected. Then what is remembered of the
    /// archive is to be forgotten, also after this stream is gone.
    pub fn is_wrong(&self) -> Arc<AtomicBool> {
        self.shared.wrong.clone()
    }

    /// Fills `buf` with the compressed archive's bytes from `offset` on, completely unless it ends.
    /// Returns how many bytes that are.
    ///
    /// # Errors
    /// EIO when the disk changed, or is damaged.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let Some(placed) = self.shared.sizes.at(&self.shared.of, at) else {
                break;
            };
            let bytes = SharedStream::frame(&self.shared, placed)?;
            let part = usize::try_from(at - placed.start)
                .ok()
                .and_then(|within| bytes.get(within..))
                .unwrap_or_default();
            let len = part.len().min(rest.len());
            let (to, from) = (rest.get_mut(..len), part.get(..len));
            if let (Some(to), Some(from)) = (to, from) {
                to.copy_from_slice(from);
            }
            done += len;
        }
        Ok(done)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.wanted.notify_all();
    }
}

impl SharedStream {
    /// Returns a frame's bytes, made now unless they are kept. If reading is sequential, the frames
    /// after it are made meanwhile.
    fn frame(this: &Arc<SharedStream>, placed: Placed) -> Result<Arc<Vec<u8>>> {
        let mut state = this.state.lock();
        this.look_ahead(&mut state, placed);
        state.want(placed);
        let bytes = loop {
            if let Some(bytes) = state.had(placed.frame) {
                break bytes;
            }
            if !state.has(placed.frame) {
                // It was made, and dropped again for others.
                state.queue.push_front(placed);
            }
            if let Err(error) = SharedStream::start_threads(this, &mut state) {
                break Err(error);
            }
            this.made.wait(&mut state);
        };
        if let Some(index) = state
            .awaited
            .iter()
            .position(|frame| *frame == placed.frame)
        {
            state.awaited.swap_remove(index);
        }
        // For what was queued ahead.
        SharedStream::start_threads(this, &mut state)?;
        bytes
    }

    /// Queues the frames after `placed` if the one before it was read recently.
    fn look_ahead(&self, state: &mut StreamState, placed: Placed) {
        let before = placed.start.checked_sub(1);
        let previous = before.and_then(|at| self.sizes.at(&self.of, at));
        let in_order = previous.is_none_or(|previous| {
            state.read.contains(&previous.frame) || state.read.contains(&placed.frame)
        });
        if !state.read.contains(&placed.frame) {
            state.read.push_back(placed.frame);
            if state.read.len() > PLACES {
                state.read.pop_front();
            }
        }
        if !in_order {
            return;
        }
        let mut end = placed.start + placed.len;
        for ahead in 0..AHEAD {
            let Some(next) = self.sizes.at(&self.of, end) else {
                break;
            };
            end = next.start + next.len;
            if state.has(next.frame) {
                continue;
            }
            // Frames made for a reader that went away fill the room until newer ones take it. So
            // the very next frame is queued in any case.
            if ahead > 0 && state.on_the_way() >= KEPT {
                break;
            }
            state.queue.push_back(next);
        }
    }

    fn start_threads(this: &Arc<SharedStream>, state: &mut StreamState) -> Result<()> {
        while state.threads < threads(this.of.level()) && !state.queue.is_empty() {
            let shared = this.clone();
            let started = std::thread::Builder::new()
                .name("stream".into())
                .spawn(move || shared.work());
            match started {
                Ok(_) => state.threads += 1,
                // One is enough to go on.
                Err(_) if state.threads > 0 => break,
                Err(e) => return Err(Error::io("cannot start a thread", e)),
            }
        }
        this.wanted.notify_all();
        Ok(())
    }

    /// Makes the frames in the queue.
    fn work(&self) {
        let mut maker = FrameMaker::new(&self.of, &*self.cache);
        let mut state = self.state.lock();
        loop {
            let Some(placed) = state.queue.pop_front() else {
                let waited = self.wanted.wait_for(&mut state, IDLE);
                if state.closed || (waited.timed_out() && state.queue.is_empty()) {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            if state.closed {
                state.threads -= 1;
                return;
            }
            state.busy.push(placed.frame);
            drop(state);
            let made = match &mut maker {
                Ok(maker) => not_panicking(|| self.make(placed, maker)),
                Err(error) => Err(Error::new(error.errno(), error.to_string())),
            };
            let (bytes, offered) = match made {
                Ok((key, bytes)) => (Ok(bytes.clone()), Some((key, bytes))),
                Err(error) => (Err(error), None),
            };
            state = self.state.lock();
            state.busy.retain(|frame| *frame != placed.frame);
            state.keep(MadeFrame {
                frame: placed.frame,
                bytes,
                used: false,
            });
            self.made.notify_all();
            if let Some((key, bytes)) = offered {
                drop(state);
                // After it is handed on, so nothing waits for this.
                self.pass_on(placed, key, &bytes, &mut maker);
                state = self.state.lock();
            }
        }
    }

    /// Offers a frame that was made to the cache, and its bytes to the disk's checksum.
    fn pass_on(
        &self,
        placed: Placed,
        key: Option<FrameKey>,
        bytes: &[u8],
        maker: &mut Result<FrameMaker<'_>>,
    ) {
        let passed = not_panicking(|| {
            self.cache.offer(placed.start, key, bytes);
            match maker {
                Ok(maker) if placed.frame != self.of.last() => maker.take_along(placed.frame),
                _ => Ok(()),
            }
        });
        if let Err(error) = passed {
            // The frame itself is right; the next one finds what is wrong with the disk.
            log::debug!("a frame is not passed on: {error}");
        }
    }

    /// Makes a frame. Returns its key, if it has one, and its bytes.
    fn make(
        &self,
        placed: Placed,
        maker: &mut FrameMaker<'_>,
    ) -> Result<(Option<FrameKey>, Arc<Vec<u8>>)> {
        let mut bytes = Vec::new();
        let mut key = None;
        if placed.frame == self.of.last() {
            bytes = self.of.manifest_frame()?;
        } else {
            key = maker.make(placed.frame, &mut bytes)?;
            bytes.shrink_to_fit();
        }
        if bytes.len() as u64 != placed.len {
            self.wrong.store(true, Ordering::Relaxed);
            return Err(Error::damaged(
                "the compressed archive came out with another size than it had before; read it again",
            ));
        }
        Ok((key, Arc::new(bytes)))
    }
}

impl StreamState {
    fn has(&self, frame: u64) -> bool {
        self.busy.contains(&frame)
            || self.is_queued(frame)
            || self.kept.iter().any(|kept| kept.frame == frame)
    }

    fn is_queued(&self, frame: u64) -> bool {
        self.queue.iter().any(|queued| queued.frame == frame)
    }

    /// Returns how many frames are made or queued that no reader has had.
    fn on_the_way(&self) -> usize {
        let unused = self.kept.iter().filter(|kept| !kept.used).count();
        unused + self.busy.len() + self.queue.len()
    }

    /// Moves a frame that a reader waits for to the front of the queue.
    fn want(&mut self, placed: Placed) {
        self.awaited.push(placed.frame);
        if self.is_queued(placed.frame) {
            self.queue.retain(|queued| queued.frame != placed.frame);
            self.queue.push_front(placed);
        }
    }

    /// Returns the bytes of a frame that is kept. An error is returned once; then the frame is made
    /// again.
    fn had(&mut self, frame: u64) -> Option<Result<Arc<Vec<u8>>>> {
        let index = self.kept.iter().position(|kept| kept.frame == frame)?;
        if let Some(kept) = self.kept.get_mut(index)
            && let Ok(bytes) = &kept.bytes
        {
            kept.used = true;
            return Some(Ok(bytes.clone()));
        }
        self.kept.remove(index).map(|kept| kept.bytes)
    }

    /// Keeps a frame in place of others: first those that readers have had, never one that is
    /// waited for.
    fn keep(&mut self, made: MadeFrame) {
        while self.kept.len() >= KEPT {
            let awaited = |kept: &MadeFrame| self.awaited.contains(&kept.frame);
            let had = self
                .kept
                .iter()
                .position(|kept| kept.used && !awaited(kept));
            let any = || self.kept.iter().position(|kept| !awaited(kept));
            match had.or_else(any) {
                Some(index) => self.kept.remove(index),
                None => break,
            };
        }
        self.kept.push_back(made);
    }
}
