//! A bound on what may be asked of the allocator at once: libFuzzer looks at what is resident, and so
//! does not see a buffer of gigabytes that nothing was written to.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;

/// The largest table that is legitimately read as a whole is an L1 table of 32 MiB.
const MOST: usize = 48 << 20;

struct Bounded;

#[global_allocator]
static BOUNDED: Bounded = Bounded;

// SAFETY: everything is left to the system's allocator, or the process ends.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller keeps what GlobalAlloc asks of him; so below.
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

/// Ends the process for what is too much; the fuzzer then keeps the input.
fn check(size: usize) {
    if size > MOST {
        eprintln!(
            "{size} bytes were asked for at once\n{}",
            Backtrace::force_capture()
        );
        std::process::abort();
    }
}
