//! SIGTERM, SIGINT and SIGHUP unmount; the serving process then ends by itself, cleanly.

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

/// How often a mount that another one keeps from being unmounted is tried again.
const AGAIN: Duration = Duration::from_millis(250);

/// How far a mount has come; what a signal has to do depends on it.
#[derive(Clone)]
pub(super) enum Phase {
    /// The home is being opened: nothing is mounted, the process may just end.
    Opening,
    /// The mount appears any moment.
    Mounting,
    /// The mount is there, unless somebody unmounted it.
    Serving(OwnMount),
}

/// The phase, shared with the thread that waits for signals.
#[derive(Clone)]
pub(super) struct SharedPhase(Arc<(Mutex<Phase>, Condvar)>);

impl SharedPhase {
    fn new() -> SharedPhase {
        SharedPhase(Arc::new((Mutex::new(Phase::Opening), Condvar::new())))
    }

    /// Notes that the mount has come so far.
    pub fn enter(&self, phase: Phase) {
        let (current, changed) = &*self.0;
        *current.lock() = phase;
        changed.notify_all();
    }

    /// The mount, waited for while it appears; None while the home is being opened. Where mounting fails,
    /// the process ends and nobody waits.
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

/// Blocks the signals in this and every later thread, and starts the thread that waits for them.
/// A signal that was ignored when the process started (nohup) stays ignored.
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

/// Asks this process to end as a SIGTERM from outside would.
pub(super) fn end_this_process() {
    // A thread of this very process waits for it.
    if let Err(error) = kill_process(getpid(), Signal::TERM) {
        log::error!("cannot end this process: {error}");
    }
}

/// The first signal unmounts; a second one, when that did not end the process, ends it at once.
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
            "what is open is served until it is closed, by {users}; another signal ends that"
        );
    }
    exit(wait(signals));
}

/// Unmounts what this process serves, as soon as no other mount is in the way.
fn unmount(signals: &libc::sigset_t, signal: libc::c_int, own: &OwnMount) {
    let mut is_told = false;
    loop {
        match detach::detach_own(own) {
            Detached::Done => return,
            // Somebody detached the mount while files were open in it: no name leads here any more.
            Detached::NotMounted => exit(signal),
            Detached::Blocked(error) if !is_told => {
                log::error!("{error}; it is served until then, and another signal ends it at once");
                is_told = true;
            }
            Detached::Blocked(_) => {}
        }
        if let Some(signal) = wait_for(signals, AGAIN) {
            exit(signal);
        }
    }
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

/// A signal that comes within the time.
fn wait_for(signals: &libc::sigset_t, limit: Duration) -> Option<libc::c_int> {
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // SAFETY: both point to what is ours; nothing is asked of what came with the signal.
    let signal = unsafe { libc::sigtimedwait(signals, std::ptr::null_mut(), &limit) };
    (signal > 0).then_some(signal)
}
