//! Produces whole archives: frames compressed by several threads, handed over in order.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::compressed::Compressed;
use super::frame_maker::{AHEAD_OF_DIGEST, FrameCache, FrameMaker};
use super::frame_sizes::{FrameKey, FrameSizes, KnownSizes, learn};
use super::workers::{ASKED, FrameNumbers, given_up, join, start_threads, threads};
use crate::error::not_panicking;
use crate::{Error, Result};

/// The most frames taken but not handed over: enough that no thread waits for the slowest.
const IN_FLIGHT: u64 = 6;

/// Makes the whole compressed archive and offers it to `cache` in order, frame by frame; what is
/// found there is not compressed again. The disk's checksum is computed on the way. Returns the
/// size of each frame.
///
/// # Errors
/// ECANCELED soon after `go_on` returns false; EIO when the disk changes meanwhile.
pub fn produce(
    of: &Compressed,
    known: &dyn KnownSizes,
    cache: &dyn FrameCache,
    go_on: &dyn Fn() -> bool,
) -> Result<FrameSizes> {
    let mut sizes = FrameSizes::empty(of);
    let mut end = 0;
    let line = FrameLine::new(of);
    let work = || line.work(of, known, cache);
    std::thread::scope(|scope| {
        let started = start_threads(scope, threads(of.level()), work);
        let (started, handed) = match started {
            Err(error) => (Vec::new(), Err(error)),
            Ok(started) => {
                let handed = not_panicking(|| {
                    line.hand_over(go_on, &mut |made| {
                        sizes.set(made.frame, made.bytes.len());
                        cache.offer(end, made.key, &made.bytes);
                        end += made.bytes.len() as u64;
                    })
                });
                (started, handed)
            }
        };
        // Threads that still work would wait for room for ever.
        let done = line.stop(handed);
        join(started);
        done
    })?;
    let manifest = of.manifest_frame()?;
    cache.offer(end, None, &manifest);
    sizes.place();
    Ok(sizes)
}

/// The frames in progress, in order.
struct FrameLine<'a> {
    queue: Mutex<LineQueue<'a>>,
    /// A frame was made, or handed over.
    moved: Condvar,
}

struct LineQueue<'a> {
    numbers: FrameNumbers<'a>,
    /// Frames taken from `numbers`, and those handed over.
    taken: u64,
    handed: u64,
    all_taken: bool,
    /// Frames that wait for their turn, by place in line.
    made: BTreeMap<u64, LineFrame>,
    /// Buffers that were handed over.
    spare: Vec<Vec<u8>>,
    failed: Option<Error>,
    stopped: bool,
}

/// A frame that was made.
struct LineFrame {
    frame: u64,
    key: Option<FrameKey>,
    bytes: Vec<u8>,
}

impl<'a> FrameLine<'a> {
    fn new(of: &'a Compressed) -> FrameLine<'a> {
        FrameLine {
            queue: Mutex::new(LineQueue {
                numbers: FrameNumbers::all(of),
                taken: 0,
                handed: 0,
                all_taken: false,
                made: BTreeMap::new(),
                spare: Vec::new(),
                failed: None,
                stopped: false,
            }),
            moved: Condvar::new(),
        }
    }

    /// Makes frames until there are none left.
    fn work(&self, of: &Compressed, known: &dyn KnownSizes, cache: &dyn FrameCache) {
        let made = not_panicking(|| {
            let mut maker = FrameMaker::new(of, cache)?;
            while let Some((place, frame, mut bytes)) = self.take(of) {
                let key = maker.make(frame, &mut bytes)?;
                let size = bytes.len();
                self.put(place, LineFrame { frame, key, bytes });
                if let Some(key) = key {
                    // After the frame is handed on, so nothing waits for this.
                    maker.take_along(frame)?;
                    learn(key, size, known);
                }
            }
            Ok(())
        });
        if let Err(error) = made {
            self.queue.lock().failed.get_or_insert(error);
            self.moved.notify_all();
        }
    }

    /// Returns the next frame to be made: its place in line, its number, and a buffer. Waits while
    /// too many are in progress.
    fn take(&self, of: &Compressed) -> Option<(u64, u64, Vec<u8>)> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped || queue.failed.is_some() || queue.all_taken {
                return None;
            }
            if queue.taken - queue.handed >= IN_FLIGHT {
                self.moved.wait(&mut queue);
            } else if of.export().digest_lags(AHEAD_OF_DIGEST) {
                // The checksum gives no signal.
                self.moved.wait_for(&mut queue, Duration::from_millis(1));
            } else {
                break;
            }
        }
        let Some(frame) = queue.numbers.next() else {
            queue.all_taken = true;
            self.moved.notify_all();
            return None;
        };
        let place = queue.taken;
        queue.taken += 1;
        Some((place, frame, queue.spare.pop().unwrap_or_default()))
    }

    fn put(&self, place: u64, made: LineFrame) {
        let mut queue = self.queue.lock();
        queue.made.insert(place, made);
        if place == queue.handed {
            self.moved.notify_all();
        }
    }

    /// Passes each frame to `sink`, in order, until there are no more.
    fn hand_over(&self, go_on: &dyn Fn() -> bool, sink: &mut dyn FnMut(&LineFrame)) -> Result<()> {
        let mut asked = Instant::now();
        let mut queue = self.queue.lock();
        loop {
            if let Some(error) = queue.failed.take() {
                return Err(error);
            }
            // Also when frames come so fast that there is no wait.
            if asked.elapsed() >= ASKED {
                if !go_on() {
                    return Err(given_up());
                }
                asked = Instant::now();
            }
            let place = queue.handed;
            if let Some(made) = queue.made.remove(&place) {
                drop(queue);
                sink(&made);
                queue = self.queue.lock();
                queue.handed += 1;
                queue.spare.push(made.bytes);
                self.moved.notify_all();
                continue;
            }
            if queue.all_taken && queue.handed == queue.taken {
                return Ok(());
            }
            self.moved.wait_for(&mut queue, ASKED);
        }
    }

    fn stop(&self, result: Result<()>) -> Result<()> {
        self.queue.lock().stopped = true;
        self.moved.notify_all();
        result
    }
}
