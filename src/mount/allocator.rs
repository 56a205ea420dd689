//! Limits how much freed memory the allocator keeps.

/// Blocks of at least this many bytes get a mapping of their own and return to the system when they
/// are freed. The buffers for whole windows and frames are that large.
#[cfg(target_env = "gnu")]
const MAPPED_BY_ITSELF: libc::c_int = 1 << 20;

/// Limits the memory that glibc keeps after it was freed. glibc has up to eight arenas for each
/// core, and each keeps the most it ever held. So a process with many short-lived threads would
/// grow with the number of archives it has made (180 to 310 MiB after some dozen, instead of about
/// 60). Call it before the first thread starts.
#[cfg(target_env = "gnu")]
pub(super) fn limit_kept_memory() {
    // SAFETY: mallopt(3) only sets parameters, and no other thread allocates yet.
    let done = unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2) != 0
            && libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BY_ITSELF) != 0
    };
    if !done {
        log::debug!("mallopt: the limits of memory that is kept could not be set");
    }
}

/// Other C libraries have no arenas to limit.
#[cfg(not(target_env = "gnu"))]
pub(super) fn limit_kept_memory() {}
