//! Threads that work on frames.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::compressed::Compressed;
use super::encoder::FrameEncoder;
use crate::error::not_panicking;
use crate::{Error, Result};

/// The most threads that compress one archive.
const MOST_THREADS: usize = 6;
/// How often the caller is asked whether to go on.
pub(super) const ASKED: Duration = Duration::from_millis(10);

/// The work on a frame, given its number and the thread's buffer and encoder.
pub(super) type FrameWork<'a> =
    dyn Fn(u64, &mut Vec<u8>, &mut FrameEncoder) -> Result<()> + Sync + 'a;

/// Returns how many threads compress: one for each core, up to six. There are fewer at high levels,
/// for which zstd needs much memory.
pub(super) fn threads(level: i32) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let most = match level {
        ..=12 => MOST_THREADS,
        13..=15 => 2,
        _ => 1,
    };
    cores.min(most)
}

/// Starts this many threads for `work`, or fewer if the system refuses more. ([`Scope::spawn`]
/// would panic then.)
///
/// # Errors
/// That of starting the first thread.
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
            // One thread is enough.
            Err(_) if !started.is_empty() => break,
            Err(e) => return Err(Error::io("cannot start a thread to compress", e)),
        }
    }
    Ok(started)
}

/// Joins the threads. The scope does that as well, but in a way that ThreadSanitizer does not see.
pub(super) fn join(threads: Vec<ScopedJoinHandle<'_, ()>>) {
    for thread in threads {
        // Their work does not panic.
        let _ = thread.join();
    }
}

/// ECANCELED: there is no reader any more.
pub(super) fn given_up() -> Error {
    Error::new(
        libc::ECANCELED,
        "there is no reader of the archive any more",
    )
}

/// Numbers of frames, without the manifest's.
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

/// Does work on each of these frames, in several threads, each with its own buffer and encoder.
pub(super) fn for_each(
    of: &Compressed,
    frames: &mut FrameNumbers<'_>,
    go_on: &dyn Fn() -> bool,
    work: &FrameWork<'_>,
) -> Result<()> {
    let frames = Mutex::new(frames);
    let failed = Mutex::new(None);
    let stop = AtomicBool::new(false);
    // The number of threads that have ended.
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
