//! SIGTERM, SIGINT and SIGHUP unmount; the serving process then ends by itself, cleanly.

use std::io;
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use super::{mountinfo, service, takedown};
use crate::{Context, Result};

/// How far a mount has come; what a signal has to do depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Phase {
    /// The home is being opened: nothing is mounted, the process may just end.
    Opening,
    /// The mount appears any moment.
    Mounting,
    /// The mount is there, unless somebody unmounted it.
    Serving,
}

/// The phase, shared with the thread that waits for signals.
#[derive(Clone)]
pub(super) struct SharedPhase(Arc<AtomicU8>);

impl SharedPhase {
    /// Notes that the mount has come so far.
    pub fn enter(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::SeqCst);
    }

    /// Whether the mount is in this phase now.
    pub fn is(&self, phase: Phase) -> bool {
        self.0.load(Ordering::SeqCst) == phase as u8
    }
}

/// Blocks the signals in this and every later thread, and starts the thread that waits for them.
/// A signal that was ignored when the process started (nohup) stays ignored.
///
/// # Errors
/// When the thread can't be started.
pub(super) fn watch(mountpoint: &Path) -> Result<SharedPhase> {
    let phase = SharedPhase(Arc::new(AtomicU8::new(Phase::Opening as u8)));
    let signals = block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
        .context(|| "cannot block the signals that unmount")?;
    let mountpoint = mountpoint.to_owned();
    let shared = phase.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || obey(&signals, &mountpoint, &shared))
        .context(|| "cannot start the thread that waits for signals")?;
    Ok(phase)
}

/// Asks this process to end as a SIGTERM from outside would.
pub(super) fn end_this_process() {
    // SAFETY: sends a signal to this very process, where a thread waits for it.
    unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
}

/// The first signal unmounts; a second one, when that did not end the process, ends it at once.
fn obey(signals: &libc::sigset_t, mountpoint: &Path, phase: &SharedPhase) {
    let signal = wait(signals);
    if phase.is(Phase::Opening) {
        exit(signal);
    }
    let mounted = || matches!(mountinfo::at(mountpoint), Ok(Some(entry)) if entry.is_ours());
    while phase.is(Phase::Mounting) && !mounted() {
        thread::sleep(Duration::from_millis(10));
    }
    // Where others mount and unmount, a reader of the mount table may miss a line.
    let is_gone = (0..5).all(|_| {
        let is_missing = !mounted();
        if is_missing {
            thread::sleep(Duration::from_millis(20));
        }
        is_missing
    });
    if is_gone {
        // Somebody detached the mount while files were open in it: no name leads here any more.
        exit(signal);
    }
    log::info!("unmounting {} on a signal", mountpoint.display());
    service::stopping();
    if let Err(error) = takedown::detach(mountpoint) {
        log::error!("{error}");
    }
    exit(wait(signals));
}

fn exit(signal: libc::c_int) -> ! {
    // Shells report an end by a signal so.
    const ENDED_BY_SIGNAL: libc::c_int = 128;
    // SAFETY: ends the process without running destructors of threads that are at work; what a
    // change leaves then is what a crash leaves, and that is recovered from.
    unsafe { libc::_exit(ENDED_BY_SIGNAL.saturating_add(signal)) }
}

/// Blocks those of the signals that are not ignored; returns them as a set.
fn block(signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; the other calls work on it and on numbers of
    // existing signals.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for &signal in signals {
            if !is_ignored(signal) {
                libc::sigaddset(&mut set, signal);
            }
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
            0 => Ok(set),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks for the action only; it is initialised when the call succeeds.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

fn wait(signals: &libc::sigset_t) -> libc::c_int {
    let mut signal = 0;
    // SAFETY: both point to what is ours; an interrupted wait is begun again.
    while unsafe { libc::sigwait(signals, &mut signal) } != 0 {}
    signal
}
