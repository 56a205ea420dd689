//! All frames of an archive: compressed by several threads, handed over in order.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::compressed::{Compressed, Encoder, FrameKey, FrameSizes, Origin, SPAN};
use crate::error::not_panicking;
use crate::{Error, Result};

/// Most threads that compress one archive.
const MOST_THREADS: usize = 6;
/// Frames taken but not handed over yet, at most: enough that nobody waits for the slowest.
const IN_FLIGHT: u64 = 6;
/// Bytes that wait for the checksum, at most, when the next are read: each thread brings a frame more.
const AHEAD_OF_DIGEST: usize = 2 * SPAN as usize;
/// How often the caller is asked whether to go on.
const ASKED: Duration = Duration::from_millis(10);
/// Sizes are worth finding without the frames if at most this part of the bytes has to be compressed
/// for it: they are compressed again when they are read.
const WORTH_MEASURING: u64 = 8;

/// What is done with a frame, given its number and the thread's buffer and encoder.
type FrameWork<'a> = dyn Fn(u64, &mut Vec<u8>, &mut Encoder) -> Result<()> + Sync + 'a;

/// Sizes of frames made before, by key.
pub trait KnownSizes: Sync {
    /// The compressed size of the frame with this key.
    fn size(&self, key: &FrameKey) -> Option<u32>;
    /// A frame with this key has this size.
    fn learn(&self, key: FrameKey, size: u32);
}

/// How many threads compress: one for each core, up to six. At high levels zstd needs so much memory
/// for each that there are fewer.
pub(super) fn threads(level: i32) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let most = match level {
        ..=12 => MOST_THREADS,
        13..=15 => 2,
        _ => 1,
    };
    cores.min(most)
}

/// Has `work` done by so many threads, or by fewer where the system gives no more; returns how many.
/// ([`Scope::spawn`] panics there.)
///
/// # Errors
/// What starting the first one said.
fn start_threads<'scope>(
    scope: &'scope Scope<'scope, '_>,
    most: usize,
    work: impl Fn() + Copy + Send + 'scope,
) -> Result<Vec<ScopedJoinHandle<'scope, ()>>> {
    let mut started = Vec::with_capacity(most);
    while started.len() < most {
        match Builder::new()
            .name("frames".into())
            .spawn_scoped(scope, work)
        {
            Ok(thread) => started.push(thread),
            // One is enough to go on.
            Err(_) if !started.is_empty() => break,
            Err(e) => return Err(Error::io("cannot start a thread to compress", e)),
        }
    }
    Ok(started)
}

/// Waits for their ends, which the scope does as well, but in a way that ThreadSanitizer does not see.
fn join(threads: Vec<ScopedJoinHandle<'_, ()>>) {
    for thread in threads {
        // What they do does not panic.
        let _ = thread.join();
    }
}

/// ECANCELED: whoever wanted it is gone.
fn given_up() -> Error {
    Error::new(libc::ECANCELED, "nobody waits for the archive any more")
}

impl Compressed {
    /// Makes the whole compressed archive and hands it to `sink` in order, piece by piece; the disk's
    /// checksum is worked out beside it. Returns the size of each frame.
    ///
    /// # Errors
    /// ECANCELED soon after `go_on` says no; EIO when the disk changes meanwhile; those of `sink`.
    pub fn produce(
        &self,
        known: &dyn KnownSizes,
        go_on: &dyn Fn() -> bool,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<FrameSizes> {
        let mut sizes = FrameSizes::empty(self);
        let line = Line::new(self);
        let work = || line.work(self, known);
        std::thread::scope(|scope| {
            let started = start_threads(scope, threads(self.level()), work);
            let (started, handed) = match started {
                Err(error) => (Vec::new(), Err(error)),
                Ok(started) => {
                    let handed = not_panicking(|| {
                        line.hand_over(go_on, &mut |frame, bytes| {
                            sizes.set(frame, bytes.len());
                            sink(bytes)
                        })
                    });
                    (started, handed)
                }
            };
            // Whoever still works would wait for room for ever.
            let done = line.stop(handed);
            join(started);
            done
        })?;
        let manifest = self.manifest_frame()?;
        sink(&manifest)?;
        sizes.place();
        Ok(sizes)
    }

    /// Finds the size of each frame, making only those that were never seen; None when those are so
    /// many that [`produce`](Compressed::produce) is the better way.
    ///
    /// # Errors
    /// As [`produce`](Compressed::produce).
    pub fn measure(
        &self,
        known: &dyn KnownSizes,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<FrameSizes>> {
        let found = Mutex::new((FrameSizes::empty(self), Vec::new()));
        let missing = AtomicU64::new(0);
        let worth = self.export().len() / WORTH_MEASURING;
        let too_many = || missing.load(Ordering::Relaxed) > worth;
        self.for_each(&mut FrameNumbers::all(self), go_on, &|frame, raw, _| {
            if too_many() {
                return Err(given_up());
            }
            match self.recognised(frame, raw, known)? {
                Some(size) => found.lock().0.set(frame, size as usize),
                None => {
                    missing.fetch_add(raw.len() as u64, Ordering::Relaxed);
                    found.lock().1.push(frame);
                }
            }
            Ok(())
        })
        .or_else(|error| if too_many() { Ok(()) } else { Err(error) })?;
        if too_many() {
            return Ok(None);
        }
        let (sizes, unknown) = found.into_inner();
        let sizes = Mutex::new(sizes);
        self.for_each(
            &mut FrameNumbers::of(unknown),
            go_on,
            &|frame, raw, encoder| {
                let mut made = Vec::new();
                self.read(frame, raw)?;
                encoder.encode(raw, &mut made)?;
                self.learn(frame, raw, made.len(), known)?;
                sizes.lock().set(frame, made.len());
                Ok(())
            },
        )?;
        let mut sizes = sizes.into_inner();
        sizes.place();
        Ok(Some(sizes))
    }

    /// The size of a frame that was seen before. When it was not, or not where it lies now, its bytes
    /// are in `raw` afterwards.
    fn recognised(
        &self,
        frame: u64,
        raw: &mut Vec<u8>,
        known: &dyn KnownSizes,
    ) -> Result<Option<u32>> {
        raw.clear();
        if self.range(frame)?.is_empty() {
            return Ok(Some(0));
        }
        let origin = self.origin(frame)?;
        if let Origin::Frozen(key) = &origin
            && let Some(size) = known.size(key)
        {
            return Ok(Some(size));
        }
        self.read(frame, raw)?;
        let size = known.size(&self.content_key(raw));
        if let (Origin::Frozen(key), Some(size)) = (origin, size) {
            known.learn(key, size);
        }
        Ok(size)
    }

    /// Remembers the size of a frame with the bytes `raw`.
    fn learn(&self, frame: u64, raw: &[u8], size: usize, known: &dyn KnownSizes) -> Result<()> {
        let key = match self.origin(frame)? {
            Origin::Frozen(key) => key,
            Origin::Live => self.content_key(raw),
        };
        if let Ok(size) = u32::try_from(size) {
            known.learn(key, size);
        }
        Ok(())
    }

    /// Does something with each of some frames, in several threads, with a buffer and an encoder of the
    /// thread's own.
    fn for_each(
        &self,
        frames: &mut FrameNumbers<'_>,
        go_on: &dyn Fn() -> bool,
        work: &FrameWork<'_>,
    ) -> Result<()> {
        let frames = Mutex::new(frames);
        let failed = Mutex::new(None);
        let stop = AtomicBool::new(false);
        // Threads that have ended.
        let ended = (Mutex::new(0), Condvar::new());
        let work = || {
            let mut raw = Vec::new();
            let done = not_panicking(|| {
                let mut encoder = self.encoder()?;
                while !stop.load(Ordering::Relaxed)
                    && let Some(frame) = { frames.lock().next() }
                {
                    work(frame, &mut raw, &mut encoder)?;
                }
                Ok(())
            });
            if let Err(error) = done {
                stop.store(true, Ordering::Relaxed);
                failed.lock().get_or_insert(error);
            }
            *ended.0.lock() += 1;
            ended.1.notify_all();
        };
        std::thread::scope(|scope| {
            let started = start_threads(scope, threads(self.level()), work)
                .inspect_err(|error| *failed.lock() = Some(error.again()))
                .unwrap_or_default();
            let mut ended_now = ended.0.lock();
            while *ended_now < started.len() {
                ended.1.wait_for(&mut ended_now, ASKED);
                if *ended_now < started.len() && !go_on() {
                    stop.store(true, Ordering::Relaxed);
                    failed.lock().get_or_insert_with(given_up);
                }
            }
            drop(ended_now);
            join(started);
        });
        failed.into_inner().map_or(Ok(()), Err)
    }
}

/// Numbers of frames to be looked at, but for the manifest's.
enum FrameNumbers<'a> {
    All { of: &'a Compressed, next: u64 },
    These(std::vec::IntoIter<u64>),
}

impl FrameNumbers<'_> {
    fn all(of: &Compressed) -> FrameNumbers<'_> {
        FrameNumbers::All { of, next: 0 }
    }

    fn of(frames: Vec<u64>) -> FrameNumbers<'static> {
        FrameNumbers::These(frames.into_iter())
    }
}

impl Iterator for FrameNumbers<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        match self {
            FrameNumbers::All { of, next } => {
                let frame = of.next(*next).filter(|frame| *frame < of.last())?;
                *next = frame + 1;
                Some(frame)
            }
            FrameNumbers::These(frames) => frames.next(),
        }
    }
}

/// Frames on their way through the threads, in line.
struct Line<'a> {
    queue: Mutex<Queue<'a>>,
    /// A frame was made, or handed over.
    moved: Condvar,
}

struct Queue<'a> {
    numbers: FrameNumbers<'a>,
    /// Frames taken from `numbers`, and those handed over.
    taken: u64,
    handed: u64,
    all_taken: bool,
    /// Made and waiting for their turn, by place in line: the frame's number and bytes.
    made: BTreeMap<u64, (u64, Vec<u8>)>,
    /// Buffers that were handed over.
    spare: Vec<Vec<u8>>,
    failed: Option<Error>,
    stopped: bool,
}

impl<'a> Line<'a> {
    fn new(of: &'a Compressed) -> Line<'a> {
        Line {
            queue: Mutex::new(Queue {
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
    fn work(&self, of: &Compressed, known: &dyn KnownSizes) {
        let made = not_panicking(|| {
            let mut encoder = of.encoder()?;
            let mut raw = Vec::new();
            while let Some((place, frame, mut bytes)) = self.take(of) {
                of.read(frame, &mut raw)?;
                encoder.encode(&raw, &mut bytes)?;
                let size = bytes.len();
                self.put(place, frame, bytes);
                if size > 0 {
                    // After the frame is handed on: nobody waits for this.
                    of.export().take_along(of.range(frame)?.start, &raw);
                    of.learn(frame, &raw, size, known)?;
                }
            }
            Ok(())
        });
        if let Err(error) = made {
            self.queue.lock().failed.get_or_insert(error);
            self.moved.notify_all();
        }
    }

    /// The next frame to be made: its place in line, its number, and a buffer. Waits while too many are
    /// on their way.
    fn take(&self, of: &Compressed) -> Option<(u64, u64, Vec<u8>)> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped || queue.failed.is_some() || queue.all_taken {
                return None;
            }
            if queue.taken - queue.handed >= IN_FLIGHT {
                self.moved.wait(&mut queue);
            } else if of.export().digest_lags(AHEAD_OF_DIGEST) {
                // The checksum moves without telling.
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

    fn put(&self, place: u64, frame: u64, bytes: Vec<u8>) {
        let mut queue = self.queue.lock();
        queue.made.insert(place, (frame, bytes));
        if place == queue.handed {
            self.moved.notify_all();
        }
    }

    /// Gives each frame to `sink`, in order, until there are no more.
    fn hand_over(
        &self,
        go_on: &dyn Fn() -> bool,
        sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut asked = Instant::now();
        let mut queue = self.queue.lock();
        loop {
            if let Some(error) = queue.failed.take() {
                return Err(error);
            }
            // Also when frames come so fast that nothing is waited for.
            if asked.elapsed() >= ASKED {
                if !go_on() {
                    return Err(given_up());
                }
                asked = Instant::now();
            }
            let place = queue.handed;
            if let Some((frame, bytes)) = queue.made.remove(&place) {
                drop(queue);
                sink(frame, &bytes)?;
                queue = self.queue.lock();
                queue.handed += 1;
                queue.spare.push(bytes);
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
