//! The threads that work on requests.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::{Error, Result};

type Job = Box<dyn FnOnce() + Send>;

/// Threads that do one job after another and sleep in between. (A work-stealing pool, and channels
/// too, look for work for a while before they sleep; with a job for every request that takes more
/// time than the requests, of cores the reader needs.) They end with the pool, after what is under
/// way.
pub(super) struct WorkerPool {
    queue: Arc<JobQueue>,
}

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
    /// The next job, waited for; None when there will be no more.
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
    pub fn start(name: &'static str, count: usize) -> Result<WorkerPool> {
        let queue = Arc::new(JobQueue::default());
        for index in 0..count {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("{name}-{index}"))
                .spawn(move || {
                    while let Some(job) = queue.next() {
                        // A fault of ours costs the one request, which fuser answers with EIO, and
                        // not the mount.
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

/// Does in a thread of its own what waits for a clock. Without one, the request is answered with
/// EIO.
pub(super) fn spawn_thread(work: impl FnOnce() + Send + 'static) {
    let started = std::thread::Builder::new().name("wait".into()).spawn(work);
    if let Err(error) = started {
        log::warn!("cannot start a thread to wait in: {error}");
    }
}
