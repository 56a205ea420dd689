//! Unmounts on SIGTERM, SIGINT and SIGHUP. The serving process then ends by itself, cleanly.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::process::{Signal, getpid, kill_process};

use super::detach::{self, Detached, OwnMount};
use super::{holders, systemd};
use crate::{Context, Result};

/// How long to wait before another try to unmount, while another mount is in the way.
const AGAIN: Duration = Duration::from_millis(250);

/// How far a mount has come. The effect of a signal depends on it.
#[derive(Clone)]
pub(super) enum Phase {
    /// The home is being opened. Nothing is mounted, so the process can simply end.
    Opening,
    /// The mount may appear at any moment.
    Mounting,
    /// The mount is there, unless another process unmounted it.
    Serving(OwnMount),
}

/// The phase, shared with the thread that waits for signals.
#[derive(Clone)]
pub(super) struct SharedPhase(Arc<(Mutex<Phase>, Condvar)>);

impl SharedPhase {
    fn new() -> SharedPhase {
        SharedPhase(Arc::new((Mutex::new(Phase::Opening), Condvar::new())))
    }

    /// Enters a phase.
    pub fn enter(&self, phase: Phase) {
        let (current, changed) = &*self.0;
        *current.lock() = phase;
        changed.notify_all();
    }

    /// Returns the mount, and waits while it appears. None while the home is being opened. If
    /// mounting fails, the process ends, and the wait with it.
    fn mount(&self) -> Option<OwnMount> {
        let (current, changed) = &*self.0;
        let mut phase = current.lock();
        loop {
            match &*phase {
                Phase::Opening => return None,
                Phase::Serving(own) => return Some(own.clone()),
                Phase::Mounting => changed.wait(&mut phase),
            }
        }
    }
}

/// Blocks the signals in this and every later thread, and starts the thread that waits for them. A
/// signal that was ignored when the process started (nohup) stays ignored.
///
/// # Errors
/// When the thread can't be started.
pub(super) fn watch() -> Result<SharedPhase> {
    let phase = SharedPhase::new();
    let signals = block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
        .context(|| "cannot block the signals that unmount")?;
    let shared = phase.clone();
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || obey(&signals, &shared))
        .context(|| "cannot start the thread that waits for signals")?;
    Ok(phase)
}

/// Makes this process end as a SIGTERM from outside would.
pub(super) fn end_this_process() {
    // A thread of this process waits for the signal.
    if let Err(error) = kill_process(getpid(), Signal::TERM) {
        log::error!("cannot end this process: {error}");
    }
}

/// Unmounts at the first signal. If that does not end the process, a second signal ends it at once.
fn obey(signals: &libc::sigset_t, phase: &SharedPhase) {
    let signal = wait(signals);
    let Some(own) = phase.mount() else {
        exit(signal);
    };
    if own.is_connected() {
        log::info!("unmounting on a signal");
        systemd::stopping();
        unmount(signals, signal, &own);
    }
    if own.is_connected()
        && let Some(users) = holders::users_of(own.id().device, None)
    {
        log::info!(
            "open files are served until they are closed; in use by {users}; another signal ends the process at once"
        );
    }
    exit(wait(signals));
}

/// Unmounts the mount of this process as soon as no other mount is in the way.
fn unmount(signals: &libc::sigset_t, signal: libc::c_int, own: &OwnMount) {
    let mut is_told = false;
    loop {
        match detach::detach_own(own) {
            Detached::Done => return,
            // The mount was detached while files were open in it: no name leads here any more.
            Detached::NotMounted => exit(signal),
            Detached::Blocked(error) if !is_told => {
                log::error!(
                    "{error}; the mount is served until then, and another signal ends the process at once"
                );
                is_told = true;
            }
            Detached::Blocked(_) => {}
        }
        if let Some(signal) = wait_for(signals, AGAIN) {
            exit(signal);
        }
    }
}

/// Ends the process at once.
fn exit(signal: libc::c_int) -> ! {
    // As shells report an end by a signal.
    const ENDED_BY_SIGNAL: libc::c_int = 128;
    // SAFETY: it ends the process without running destructors of working threads. A change under
    // way then leaves what a crash leaves, which recovery handles.
    unsafe { libc::_exit(ENDED_BY_SIGNAL.saturating_add(signal)) }
}

/// Blocks the signals that are not ignored; returns those as a set.
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

/// Whether this process ignores a signal.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: it only reads the action, which is initialised when the call succeeds.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Waits for one of the signals.
fn wait(signals: &libc::sigset_t) -> libc::c_int {
    let mut signal = 0;
    // SAFETY: both pointers are to our own data; an interrupted wait is repeated.
    while unsafe { libc::sigwait(signals, &mut signal) } != 0 {}
    signal
}

/// Waits for a signal; None if none comes within the time.
fn wait_for(signals: &libc::sigset_t, limit: Duration) -> Option<libc::c_int> {
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // SAFETY: both pointers are to our own data; the details of the signal are not requested.
    let signal = unsafe { libc::sigtimedwait(signals, std::ptr::null_mut(), &limit) };
    (signal > 0).then_some(signal)
}
