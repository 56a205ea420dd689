//! Threads that work on frames.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::compressed::Compressed;
use super::encoder::FrameEncoder;
use crate::error::not_panicking;
use crate::{Error, Result};

/// Most threads that compress one archive.
const MOST_THREADS: usize = 6;
/// How often the caller is asked whether to go on.
pub(super) const ASKED: Duration = Duration::from_millis(10);

/// What is done with a frame, given its number and the thread's buffer and encoder.
pub(super) type FrameWork<'a> =
    dyn Fn(u64, &mut Vec<u8>, &mut FrameEncoder) -> Result<()> + Sync + 'a;

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
pub(super) fn start_threads<'scope>(
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
pub(super) fn join(threads: Vec<ScopedJoinHandle<'_, ()>>) {
    for thread in threads {
        // What they do does not panic.
        let _ = thread.join();
    }
}

/// ECANCELED: whoever wanted it is gone.
pub(super) fn given_up() -> Error {
    Error::new(libc::ECANCELED, "nobody waits for the archive any more")
}

/// Numbers of frames to be looked at, but for the manifest's.
pub(super) enum FrameNumbers<'a> {
    All { of: &'a Compressed, next: u64 },
    These(std::vec::IntoIter<u64>),
}

impl FrameNumbers<'_> {
    pub fn all(of: &Compressed) -> FrameNumbers<'_> {
        FrameNumbers::All { of, next: 0 }
    }

    pub fn of(frames: Vec<u64>) -> FrameNumbers<'static> {
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

/// Does something with each of some frames, in several threads, with a buffer and an encoder of the
/// thread's own.
pub(super) fn for_each(
    of: &Compressed,
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
            let mut encoder = of.encoder()?;
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
        let started = start_threads(scope, threads(of.level()), work)
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
