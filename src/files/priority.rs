//! Keeps upkeep behind all other work, at the processor and at the disk.

use std::cell::Cell;

thread_local! {
    /// Whether this thread does upkeep, which no user asked for.
    static IS_UPKEEP: Cell<bool> = const { Cell::new(false) };
}

/// Returns whether this thread does upkeep.
pub fn is_upkeep() -> bool {
    IS_UPKEEP.get()
}

/// Marks this thread as one that does upkeep.
pub fn set_upkeep() {
    IS_UPKEEP.set(true);
}

/// A low priority for setpriority(2). It is not the lowest, because only root can raise it again
/// and this thread holds the lock at times.
const LOW: libc::c_int = 10;
/// `ioprio_set(2)`: addresses a thread.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// The disk priority follows the thread's nice value.
const IOPRIO_AS_NICE: libc::c_int = 0;
/// The thread gets the disk only when no other process uses it.
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// Lowers this thread's processor priority. Ignores a refusal of the kernel.
pub fn step_back() {
    // SAFETY: accesses no memory; 0 is the calling thread (nice is per thread on Linux).
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LOW) };
}

/// While held, this thread uses the disk only when no other process does. Not to be held together
/// with the runtime lock, which avoids priority inversion.
pub struct BehindAll(());

impl BehindAll {
    /// Lowers the disk priority of this thread if it does upkeep.
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

/// Sets this thread's disk priority. Ignores a refusal of the kernel.
fn set_disk_priority(priority: libc::c_int) {
    // SAFETY: accesses no memory; 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
}
