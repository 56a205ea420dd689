//! Upkeep goes behind all others: at the processor, and at the disk.

use std::cell::Cell;

thread_local! {
    /// Whether this thread's changes are upkeep and not somebody's wish.
    static IS_UPKEEP: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread does upkeep.
pub fn is_upkeep() -> bool {
    IS_UPKEEP.get()
}

/// This thread does upkeep from now on.
pub fn set_upkeep() {
    IS_UPKEEP.set(true);
}

/// A low priority of setpriority(2): there is no way back from it for who is not root, and this thread
/// holds the lock at times.
const LOW: libc::c_int = 10;
/// `ioprio_set(2)`: of this thread, what its nice says, or: when nobody else has anything for the disk.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_AS_NICE: libc::c_int = 0;
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// Lets everybody else go first at the processor. What the kernel does not grant is done without.
pub fn step_back() {
    // SAFETY: takes no memory; 0 is the calling thread (Linux's nice is a thread's).
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LOW) };
}

/// While this lives, upkeep uses the disk only when nobody else does. Not to be held together with the
/// runtime lock, which avoids priority inversion.
pub struct BehindAll(());

impl BehindAll {
    /// From now on, if this thread does upkeep.
    pub fn begin() -> Option<BehindAll> {
        is_upkeep().then(|| {
            set_disk_priority(IOPRIO_IDLE);
            BehindAll(())
        })
    }
}

impl Drop for BehindAll {
    fn drop(&mut self) {
        set_disk_priority(IOPRIO_AS_NICE);
    }
}

fn set_disk_priority(priority: libc::c_int) {
    // SAFETY: takes no memory; 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
}
