//! Measures a lower bound for exports: compression and hashing alone, with boxlitefs's crates.
//!
//!     cargo bench --bench floor -- DISK [LEVEL]
//!
//! Reads DISK (the flattened disk of an export) in the windows that an export compresses, once for
//! sha256 and once for zstd, on one thread. Prints the user CPU time of each as one JSON object.
//! Reading is system time and is not counted: the copy that this is compared with has it, too.

use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

use sha2::{Digest, Sha256};

/// Bytes of one window. Each is an independent zstd frame, so that a change stays local.
const WINDOW: usize = 2 << 20;

/// The default compression level of exports.
const LEVEL: i32 = 3;

fn main() -> io::Result<()> {
    // `cargo bench` adds a `--bench` of its own.
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"));
    let Some(disk) = arguments.next() else {
        return Err(io::Error::other("usage: floor DISK [LEVEL]"));
    };
    let level = match arguments.next() {
        Some(word) => word.parse().map_err(io::Error::other)?,
        None => LEVEL,
    };

    let mut hash = Sha256::new();
    let sha = user_time_of(&disk, |window| {
        hash.update(window);
        Ok(())
    })?;
    std::hint::black_box(hash.finalize());

    let mut context = zstd::bulk::Compressor::new(level)?;
    let mut frame = vec![0; zstd::zstd_safe::compress_bound(WINDOW)];
    let zstd = user_time_of(&disk, |window| {
        std::hint::black_box(context.compress_to_buffer(window, &mut frame)?);
        Ok(())
    })?;

    println!(
        r#"{{"sha_user": {:.6}, "zstd_user": {:.6}}}"#,
        sha.as_secs_f64(),
        zstd.as_secs_f64(),
    );
    Ok(())
}

/// Returns the user time of `work` on every window of the file at `path`.
fn user_time_of(path: &str, mut work: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<Duration> {
    let mut file = File::open(path)?;
    let mut window = Vec::with_capacity(WINDOW);
    let begun = user_time()?;
    loop {
        window.clear();
        if file.by_ref().take(WINDOW as u64).read_to_end(&mut window)? == 0 {
            return Ok(user_time()?.saturating_sub(begun));
        }
        work(&window)?;
    }
}

/// Returns the time this thread has spent in user mode.
fn user_time() -> io::Result<Duration> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to an rusage of our own, which the call fills.
    if unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeros is a valid rusage, and so is what the call wrote.
    let time = unsafe { usage.assume_init() }.ru_utime;
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let micros = u64::try_from(time.tv_usec).map_err(io::Error::other)?;
    Ok(Duration::from_secs(seconds) + Duration::from_micros(micros))
}
