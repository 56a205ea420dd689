//! The threads that work on requests.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::{Error, Result};

type Job = Box<dyn FnOnce() + Send>;

/// Threads that run one job after another and sleep in between. They end with the pool, after the
/// jobs under way.
///
/// A work-stealing pool, or a channel, spins for a while before it sleeps. With a job for every
/// request the spinning takes more time than the requests, on cores that the reader needs.
pub(super) struct WorkerPool {
    queue: Arc<JobQueue>,
}

/// The jobs that no thread has taken yet.
#[derive(Default)]
struct JobQueue {
    waiting: Mutex<QueuedJobs>,
    more: Condvar,
}

#[derive(Default)]
struct QueuedJobs {
    jobs: VecDeque<Job>,
    is_over: bool,
}

impl JobQueue {
    /// Waits for the next job; None when there will be no more.
    fn next(&self) -> Option<Job> {
        let mut waiting = self.waiting.lock();
        loop {
            if let Some(job) = waiting.jobs.pop_front() {
                return Some(job);
            }
            if waiting.is_over {
                return None;
            }
            self.more.wait(&mut waiting);
        }
    }
}

impl WorkerPool {
    /// Starts `count` threads, named after `name`.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn start(name: &'static str, count: usize) -> Result<WorkerPool> {
        let queue = Arc::new(JobQueue::default());
        for index in 0..count {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("{name}-{index}"))
                .spawn(move || {
                    while let Some(job) = queue.next() {
                        // A panic costs the one request, which fuser answers with EIO, and not the
                        // mount.
                        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                        if done.is_err() {
                            log::error!("a request failed; this is a fault of boxlitefs");
                        }
                    }
                })
                .map_err(|e| Error::io("cannot start threads", e))?;
        }
        Ok(WorkerPool { queue })
    }

    /// Queues a job for the next free thread.
    pub fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        self.queue.waiting.lock().jobs.push_back(Box::new(job));
        self.queue.more.notify_one();
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.queue.waiting.lock().is_over = true;
        self.queue.more.notify_all();
    }
}

/// Runs work that waits for a clock in a thread of its own. Where no thread can be started, the
/// request is answered with EIO.
pub(super) fn spawn_thread(work: impl FnOnce() + Send + 'static) {
    let started = std::thread::Builder::new().name("wait".into()).spawn(work);
    if let Err(error) = started {
        log::warn!("cannot start a thread to wait in: {error}");
    }
}
