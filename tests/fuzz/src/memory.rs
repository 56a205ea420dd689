//! Limits the size of one allocation. libFuzzer limits resident memory only, and so misses a huge
//! buffer that is never written to.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;

/// The largest allowed allocation. The largest table that is read as a whole is an L1 table of
/// 32 MiB.
const MOST: usize = 48 << 20;

struct Bounded;

#[global_allocator]
static BOUNDED: Bounded = Bounded;

// SAFETY: every call goes to the system's allocator, or ends the process.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller upholds GlobalAlloc's contract; the same holds below.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        check(size);
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Aborts on an allocation above the limit; the fuzzer then keeps the input.
fn check(size: usize) {
    if size > MOST {
        eprintln!(
            "an allocation of {size} bytes\n{}",
            Backtrace::force_capture()
        );
        std::process::abort();
    }
}
