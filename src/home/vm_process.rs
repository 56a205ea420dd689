//! The process of a box's virtual machine, and how it is paused: stopped while its disk is copied,
//! and always resumed, even if this process dies meanwhile.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::activity::live_process;
use super::guard::Guard;
use super::paths::Home;
use super::records::BoxRecord;
use crate::process::control::{StoppableProcess, children, has_open_for_writing};
use crate::{Context, Error, Result};

/// After this time a copy gives up, before the guard has to act.
const LONGEST_COPY: Duration = Duration::from_secs(45);
/// How long threads may take to stop: a thread in the middle of a write completes that first.
const STOPPING: Duration = Duration::from_secs(5);
/// The pause before they are checked: then they are certainly stopped.
const MOMENT: Duration = Duration::from_millis(20);

/// A process that is identified by number and start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmProcess {
    pid: u32,
    /// Clock ticks since boot.
    started: u64,
}

/// A virtual machine that is paused until this is dropped.
pub struct Paused {
    processes: Vec<Stopped>,
    /// The next fields tell whether it is still paused: no other process may resume it. The number
    /// of times its threads ran also tells where file times have long ticks.
    disk: File,
    disk_was: (u64, i64, i64),
    ran: u64,
    since: Instant,
    guard: Guard,
}

struct Stopped {
    process: StoppableProcess,
    /// It was running before, so we resume it.
    by_us: bool,
}

impl VmProcess {
    /// Returns the process of a box's virtual machine, if `shim.pid` has its start time and it is
    /// alive.
    pub fn of(home: &Home, record: &BoxRecord) -> Option<VmProcess> {
        let (pid, started) = live_process(&home.box_dir(&record.id).join("shim.pid"))?;
        Some(VmProcess {
            pid,
            started: started?,
        })
    }

    /// Returns whether the process or one of its descendants has a file open for writing.
    pub fn writes_to(self, file: &Path) -> bool {
        let Ok(inode) = fs::metadata(file).map(|meta| meta.ino()) else {
            return false;
        };
        let mut pids = vec![self.pid];
        let mut at = 0;
        while let Some(pid) = pids.get(at).copied() {
            if has_open_for_writing(pid, file, inode) {
                return true;
            }
            pids.extend(children(pid));
            at += 1;
        }
        false
    }

    /// Stops the process, its descendants and all their threads, and waits until they are stopped.
    /// Processes that were stopped before are not resumed by us. `disk` is the file they write to.
    ///
    /// # Errors
    /// EBUSY when another process writes to the disk, or when the process ended, may not be stopped
    /// by us or does not stop.
    pub fn pause(self, disk: &Path) -> Result<Paused> {
        let message = || format!("cannot look at {}", disk.display());
        let file = File::open(disk).context(message)?;
        let mut paused = Paused {
            processes: Vec::new(),
            disk_was: (0, 0, 0),
            ran: 0,
            disk: file,
            since: Instant::now(),
            guard: Guard::begin()?,
        };
        paused.stop_all(self)?;
        paused.wait_until_stopped()?;
        paused.refuse_other_writers(disk)?;
        // A thread that is about to stop is shown as stopped, and runs once more.
        std::thread::sleep(MOMENT);
        paused.ran = paused.runs();
        paused.disk_was = stamp(&paused.disk).context(message)?;
        Ok(paused)
    }
}

impl Paused {
    fn stop_all(&mut self, vm: VmProcess) -> Result<()> {
        let root = StoppableProcess::open(vm.pid, Some(vm.started))
            .map_err(|error| Error::busy(format!("process {} can't be paused: {error}", vm.pid)))?;
        self.stop(root)?;
        // The next look finds what it started meanwhile; stopped processes start nothing.
        loop {
            let known: Vec<u32> = self.processes.iter().map(|it| it.process.pid).collect();
            let found = known.iter().flat_map(|pid| children(*pid));
            let found: Vec<u32> = found.filter(|pid| !known.contains(pid)).collect();
            if found.is_empty() {
                return Ok(());
            }
            for pid in found {
                // A process that is gone is as good as stopped.
                if let Ok(process) = StoppableProcess::open(pid, None) {
                    self.stop(process)?;
                }
            }
        }
    }

    fn stop(&mut self, process: StoppableProcess) -> Result<()> {
        let by_us = !process.is_stopped();
        if by_us {
            self.guard.watch(&process)?;
            let stopped = process.signal(Signal::STOP);
            stopped.map_err(|e| {
                Error::busy(format!("process {} can't be paused: {e}", process.pid))
            })?;
        }
        self.processes.push(Stopped { process, by_us });
        Ok(())
    }

    fn wait_until_stopped(&self) -> Result<()> {
        let deadline = Instant::now() + STOPPING;
        while !self.processes.iter().all(|it| it.process.is_stopped()) {
            if Instant::now() > deadline {
                return Err(Error::busy("the virtual machine does not stop; try again"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// EBUSY when a process that was not stopped is seen to have the disk open for writing.
    fn refuse_other_writers(&self, disk: &Path) -> Result<()> {
        let meta = self.disk.metadata().context(|| "cannot look at the disk")?;
        let entries = fs::read_dir("/proc").context(|| "cannot read /proc")?;
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        for pid in pids {
            let is_stopped = self.processes.iter().any(|it| it.process.pid == pid);
            if !is_stopped && has_open_for_writing(pid, disk, meta.ino()) {
                return Err(Error::busy(format!(
                    "process {pid}, too, has the disk open for writing; end it first"
                )));
            }
        }
        Ok(())
    }

    /// Verifies that it has been stopped all the time, and not for too long.
    ///
    /// # Errors
    /// EBUSY otherwise.
    pub fn still(&self) -> Result<()> {
        if self.since.elapsed() > LONGEST_COPY {
            return Err(Error::busy(format!(
                "copying its disk takes longer than the {} seconds that a virtual machine is paused for; stop the box, or use a file system with reflinks",
                LONGEST_COPY.as_secs()
            )));
        }
        let went_on = || {
            Error::busy(
                "the virtual machine ran while its disk was copied: another process resumed or ended it; try again",
            )
        };
        let now = stamp(&self.disk).map_err(|_| went_on())?;
        let is_still = self.processes.iter().all(|it| it.process.is_stopped());
        if is_still && now == self.disk_was && self.runs() == self.ran {
            return Ok(());
        }
        Err(went_on())
    }
}

impl Paused {
    /// Returns how often the kernel ran its threads until now.
    fn runs(&self) -> u64 {
        let processes = self.processes.iter();
        processes.map(|it| it.process.runs()).sum()
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        for it in self.processes.iter().rev().filter(|it| it.by_us) {
            it.process.go_on();
        }
        self.guard.is_over();
    }
}

fn stamp(file: &File) -> std::io::Result<(u64, i64, i64)> {
    let meta = file.metadata()?;
    Ok((meta.len(), meta.mtime(), meta.mtime_nsec()))
}
