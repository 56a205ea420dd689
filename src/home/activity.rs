//! Tells whether a box is running, whatever its row says.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Once;

use super::paths::Home;
use super::records::BoxRecord;
use crate::process::control::{ignore_signals, start_time};

/// The activity of a box, as far as its disk is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Nothing writes to its disk.
    Idle,
    /// A process may; the message says which.
    Active(String),
}

impl Home {
    /// Determines it from shim.pid, the row and the live disk.
    ///
    /// A live process in shim.pid means active, whatever the row says: while a VM boots, the row
    /// says failed with no pid, and a shim outlives its runtime by seconds with the runtime lock
    /// free. The kernel refuses a read lease while any process has the disk open for writing.
    pub fn activity(&self, record: &BoxRecord) -> Activity {
        if let Some(writer) = self.writers.lock().get(&record.id) {
            return Activity::Active(format!("{writer} has its disk.img open for writing"));
        }
        if let Some(pid) = live_shim(&self.box_dir(&record.id).join("shim.pid")) {
            return Activity::Active(format!("its virtual machine runs as process {pid}"));
        }
        if matches!(record.status.as_str(), "running" | "paused" | "stopping")
            && let Some(pid) = record.pid
            && u32::try_from(pid).is_ok_and(|pid| start_time(pid).is_some())
        {
            return Activity::Active(format!(
                "BoxLite says it is {} as process {pid}",
                record.status
            ));
        }
        if is_open_for_writing(&self.live_disk(&record.id)) {
            return Activity::Active("a process has its disk open for writing".into());
        }
        Activity::Idle
    }

    /// Returns whether a box's disk is open for writing in this mount.
    pub fn is_written(&self, box_id: &str) -> bool {
        self.writers.lock().contains_key(box_id)
    }

    /// Notes that a box's disk is open for writing in this mount, and who opened it; None when it is
    /// closed.
    pub fn note_writer(&self, box_id: &str, who: Option<String>) {
        let mut writers = self.writers.lock();
        match who {
            Some(who) => writers.insert(box_id.to_owned(), who),
            None => writers.remove(box_id),
        };
    }
}

/// Returns the pid in shim.pid if that process is alive. Line 1 is the pid. Line 2 is its start
/// time (field 22 of /proc/PID/stat), which tells it from a later process of the same number.
fn live_shim(path: &Path) -> Option<u32> {
    live_process(path).map(|(pid, _)| pid)
}

/// Returns the pid as [`live_shim`] does, and the start time if the file has one.
pub(super) fn live_process(path: &Path) -> Option<(u32, Option<u64>)> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.lines();
    let pid: u32 = lines.next()?.trim().parse().ok()?;
    let started = start_time(pid)?;
    match lines.next().map(str::trim).filter(|line| !line.is_empty()) {
        Some(line) if line.parse() != Ok(started) => None,
        Some(_) => Some((pid, Some(started))),
        None => Some((pid, None)),
    }
}

/// Returns whether any process has the file open for writing. The kernel refuses (EAGAIN) a read
/// lease then; a lease it grants is given back. False where leases do not work at all.
pub fn is_open_for_writing(path: &Path) -> bool {
    is_refused_a_lease(path, libc::F_RDLCK)
}

/// Returns whether any process, including this one, has the file open at all. The kernel refuses a
/// write lease then.
pub fn is_open(path: &Path) -> bool {
    is_refused_a_lease(path, libc::F_WRLCK)
}

fn is_refused_a_lease(path: &Path, kind: i32) -> bool {
    let Ok(file) = File::open(path) else {
        return false;
    };
    ignore_lease_breaks();
    match set_lease(&file, kind) {
        Ok(()) => {
            // Closing the descriptor would release it too.
            let _ = set_lease(&file, libc::F_UNLCK);
            false
        }
        Err(e) => e.raw_os_error() == Some(libc::EAGAIN),
    }
}

/// The kernel announces with SIGIO that a process wants to write to a leased file, and SIGIO ends a
/// process that does not handle it. Ours holds leases for microseconds and needs no notice.
fn ignore_lease_breaks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        ignore_signals(&[libc::SIGIO]);
    });
}

fn set_lease(file: &File, kind: i32) -> std::io::Result<()> {
    // SAFETY: F_SETLEASE takes a descriptor, which `file` keeps open, and an integer.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_process_with_the_recorded_start_time_is_active() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shim.pid");
        let me = std::process::id();
        let started = start_time(me).unwrap();
        fs::write(&path, format!("{me}\n{started}\n")).unwrap();
        assert_eq!(live_shim(&path), Some(me));
        fs::write(&path, format!("{me}\n{}\n", started + 1)).unwrap();
        assert_eq!(live_shim(&path), None, "another process of the same number");
        fs::write(&path, format!("{me}\n")).unwrap();
        assert_eq!(live_shim(&path), Some(me), "an older shim.pid has one line");
        fs::write(&path, "garbage").unwrap();
        assert_eq!(live_shim(&path), None);
    }

    #[test]
    fn a_layer_that_is_open_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        fs::write(&path, "").unwrap();
        assert!(!is_open(&path));
        let reader = File::open(&path).unwrap();
        assert!(is_open(&path));
        drop(reader);
        assert!(!is_open(&path));
        assert!(!is_open(&dir.path().join("absent")));
    }

    #[test]
    fn a_disk_open_for_writing_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let writer = File::create(&path).unwrap();
        assert!(is_open_for_writing(&path));
        drop(writer);
        assert!(!is_open_for_writing(&path));
        assert!(!is_open_for_writing(&dir.path().join("absent")));
    }
}
