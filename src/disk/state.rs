//! States of files, and whether a file can change without showing another state.
//!
//! A file system stamps writes with a clock that moves in ticks: nanoseconds with multigrain time
//! stamps, else 1 to 10 ms, a whole second (ext4 with inodes of 128 bytes, NFS on such), or two.
//! Two writes within one tick leave the same time. So a state identifies a file's bytes only once
//! the clock has moved on since: then any later write gets another time.
//!
//! The length of a tick need not be known. A [`FileClock`] changes a file without a name on the
//! same file system and reads the time that got: a [`Moment`]. A state that was read after a
//! moment, and that is older than it, can't change unseen.

use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use super::FileId;
use super::file::FileTimes;

/// The longest tick of any file system (FAT). A file that was unchanged for this long shows the
/// next change, whatever its clock says.
pub const LONGEST_TICK: Duration = Duration::from_secs(2);

/// How far the clock of a file server may be from ours, if it can't be asked for its time.
const ASTRAY: Duration = Duration::from_secs(24 * 3600);

/// The longest pause between two looks at a clock that is waited for.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The identity of a file, and its state. A rebase, a new name and a rename leave it as it is. A
/// later file with the same inode number has another birth time. As long as this is the same, so
/// are the bytes, if a [`Moment`] taken before it was read is after it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileState {
    /// Which file.
    pub id: FileId,
    /// Length in bytes.
    pub len: u64,
    /// When it was last written, in nanoseconds since 1970.
    pub modified: i128,
    /// When it was created, in nanoseconds since 1970. Where the file system does not keep that:
    /// below 0, from the inode's generation, or 0 if neither is known.
    pub born: i128,
}

impl FileState {
    /// The state that `meta` describes.
    pub fn of(meta: &Metadata) -> FileState {
        let nanoseconds = |time: SystemTime| {
            time.duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as i128)
        };
        FileState {
            id: FileId::of(meta),
            len: meta.len(),
            modified: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
            born: meta.created().map_or(0, nanoseconds),
        }
    }

    /// Returns the state of an open file. Where the file system keeps no birth time, the inode's
    /// generation tells the file from earlier files with the same inode number.
    pub fn of_open(file: &File, meta: &Metadata) -> FileState {
        let state = FileState::of(meta);
        match state.born {
            0 => FileState {
                born: generation(file).map_or(0, |number| -1 - i128::from(number)),
                ..state
            },
            _ => state,
        }
    }

    /// Returns whether `meta`, read by a path, describes this state.
    pub fn is_of(&self, meta: &Metadata) -> bool {
        let now = FileState::of(meta);
        let born = if self.born < 0 { self.born } else { now.born };
        *self == FileState { born, ..now }
    }

    /// Returns it as bytes, for hashing.
    pub fn bytes(&self) -> [u8; 56] {
        let mut bytes = [0; 56];
        let (id, rest) = bytes.split_at_mut(24);
        for (part, value) in id
            .chunks_exact_mut(8)
            .zip([self.id.dev, self.id.ino, self.len])
        {
            part.copy_from_slice(&value.to_le_bytes());
        }
        for (part, value) in rest.chunks_exact_mut(16).zip([self.modified, self.born]) {
            part.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }
}

/// Returns the generation of an inode: another one each time its number is reused.
fn generation(file: &File) -> Option<u32> {
    let mut number: libc::c_long = 0;
    // SAFETY: the descriptor is open as long as `file` is; the kernel writes an int into `number`,
    // which is as long or longer. std has no call for it.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETVERSION, &mut number) };
    let bytes = number.to_ne_bytes();
    let written = bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
    written.filter(|_| done == 0)
}

/// The times of file systems at one moment. A state that is read from then on, and is older, can't
/// change unseen.
#[derive(Clone, Debug, Default)]
pub struct Moment(Vec<(u64, i128)>);

impl Moment {
    /// Returns whether a file of this file system gets another time when it is changed. `time` (in
    /// nanoseconds since 1970) is the time it was seen to have after the moment was taken.
    pub fn is_after(&self, dev: u64, time: i128) -> bool {
        self.0.iter().any(|(of, now)| *of == dev && time < *now)
    }

    /// Returns the same for a state that was read after the moment was taken.
    pub fn is_after_state(&self, state: &FileState) -> bool {
        self.is_after(state.id.dev, state.modified)
    }
}

/// A file, and its time on its file system.
#[derive(Clone, Debug)]
pub struct Stamped {
    /// Where it is.
    pub path: PathBuf,
    /// Its file system.
    pub dev: u64,
    /// In nanoseconds since 1970.
    pub time: i128,
}

/// The clocks of the file systems that layers lie on.
#[derive(Default)]
pub struct FileClock {
    known: Mutex<HashMap<u64, Clock>>,
}

/// The clock of one file system.
#[derive(Default)]
struct Clock {
    /// A file without a name on it. The inner None: new files lie on another file system (overlayfs
    /// has several in one).
    probe: Option<Option<Arc<File>>>,
    /// Its latest time.
    latest: Option<i128>,
    /// Our own time then. If our clock goes back, theirs may have gone back as well.
    at: Option<SystemTime>,
}

/// Creates a file without a name where a file system can't do so by itself.
pub type MakeProbe<'a> = dyn Fn() -> Option<File> + 'a;

impl FileClock {
    /// Returns the latest known moment.
    pub fn latest(&self) -> Moment {
        let now = SystemTime::now();
        let mut known = self.known.lock();
        for clock in known.values_mut().filter(|clock| clock.at > Some(now)) {
            clock.latest = None;
        }
        let moments = known.iter();
        Moment(
            moments
                .filter_map(|(dev, clock)| Some((*dev, clock.latest?)))
                .collect(),
        )
    }

    /// Asks the clocks of these files, unless they are known to have moved on since. Returns
    /// whether all have.
    pub fn advance(&self, files: &[Stamped], make: &MakeProbe<'_>) -> bool {
        let latest = self.latest();
        let mut all = true;
        for file in files.iter().filter(|it| !latest.is_after(it.dev, it.time)) {
            let asked_at = SystemTime::now();
            let now = self
                .ask(file, make)
                .unwrap_or_else(|| by_our_clock(&file.path));
            let mut known = self.known.lock();
            let clock = known.entry(file.dev).or_default();
            clock.at = Some(asked_at);
            clock.latest = clock.latest.max(Some(now));
            all &= file.time < now;
        }
        all
    }

    /// Returns the time of a file system now; None if nothing can be changed on it. It takes no
    /// lock while it changes the file, since that may take a while.
    fn ask(&self, file: &Stamped, make: &MakeProbe<'_>) -> Option<i128> {
        let probe = match self.probe_on(file.dev) {
            Some(probe) => probe,
            None => {
                let probe = unnamed_beside(&file.path).or_else(make)?;
                let is_there = probe.metadata().is_ok_and(|it| it.dev() == file.dev);
                let probe = Some(Arc::new(probe)).filter(|_| is_there);
                self.known.lock().entry(file.dev).or_default().probe = Some(probe.clone());
                probe
            }
        }?;
        FileTimes::now().set(&probe).ok()?;
        Some(FileState::of(&probe.metadata().ok()?).modified)
    }

    fn probe_on(&self, dev: u64) -> Option<Option<Arc<File>>> {
        let known = self.known.lock();
        known.get(&dev).and_then(|clock| clock.probe.clone())
    }

    /// Waits until the clocks of these files have moved on, at most for the longest tick there is:
    /// a file that did not change for this long shows the next change.
    pub fn wait(&self, files: &[Stamped], make: &MakeProbe<'_>) {
        let began = Instant::now();
        let mut pause = Duration::from_millis(1);
        while !self.advance(files, make) {
            let left = LONGEST_TICK.saturating_sub(began.elapsed());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Creates a file without a name in the directory of another.
fn unnamed_beside(path: &Path) -> Option<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(path.parent()?)
        .ok()
}

/// Returns a time that the file system of `path` has certainly passed, by our own clock, for file
/// systems on which nothing can be changed. A file server's clock may differ.
fn by_our_clock(path: &Path) -> i128 {
    let margin = if is_local(path) { LONGEST_TICK } else { ASTRAY };
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH + margin)
        .map_or(0, |since| since.as_nanos() as i128)
}

/// Returns whether a file is on a file system that this kernel stamps.
fn is_local(path: &Path) -> bool {
    /// ext2 to ext4, XFS, btrfs, f2fs, tmpfs, overlayfs, squashfs, erofs, ISO 9660, FAT, ZFS,
    /// bcachefs.
    const LOCAL: [u32; 12] = [
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0xf2f5_2010,
        0x0102_1994,
        0x794c_7630,
        0x7371_7368,
        0xe0f5_e1e2,
        0x9660,
        0x4d44,
        0x2fc1_2fc1,
        0xca45_1a4e,
    ];
    // Opened for fstatfs only; whatever is there by now is not read.
    let open = |path: &Path| {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
    };
    let Ok(file) = open(path).or_else(|_| open(path.parent().unwrap_or(path))) else {
        return false;
    };
    let found = rustix::fs::fstatfs(&file);
    found.is_ok_and(|found| {
        let kind = i128::from(found.f_type);
        LOCAL.iter().any(|local| i128::from(*local) == kind)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamped(path: &Path) -> (FileState, Stamped) {
        let state = FileState::of(&std::fs::metadata(path).unwrap());
        let stamped = Stamped {
            path: path.to_owned(),
            dev: state.id.dev,
            time: state.modified,
        };
        (state, stamped)
    }

    #[test]
    fn a_state_is_trusted_once_the_clock_of_its_file_system_moved_on_and_a_change_shows_then() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let clock = FileClock::default();
        for round in 0..20u8 {
            std::fs::write(&path, [round]).unwrap();
            let (written, file) = stamped(&path);
            assert!(!clock.latest().is_after_state(&written), "{round}");
            clock.wait(std::slice::from_ref(&file), &|| None);
            assert!(clock.latest().is_after_state(&written));
            assert!(written.is_of(&std::fs::metadata(&path).unwrap()));
            std::fs::write(&path, [round + 1]).unwrap();
            assert!(!written.is_of(&std::fs::metadata(&path).unwrap()));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_time_in_the_future_is_never_passed_and_is_waited_for_no_longer_than_the_longest_tick() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = File::create(&path).unwrap();
        let future = SystemTime::now() + Duration::from_secs(1000);
        file.set_modified(future).unwrap();
        let clock = FileClock::default();
        let (state, file) = stamped(&path);
        clock.wait(&[file], &|| None);
        assert!(!clock.latest().is_after_state(&state));
    }

    #[test]
    fn what_lies_where_nothing_can_be_written_goes_by_our_clock() {
        let version = Path::new("/proc/version");
        let dev = std::fs::metadata(version).unwrap().dev();
        let clock = FileClock::default();
        let at = |time: SystemTime| Stamped {
            path: version.to_owned(),
            dev,
            time: time
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap()
                .as_nanos() as i128,
        };
        let hour = Duration::from_secs(3600);
        // It is no file system that is known to go by this kernel's clock.
        assert!(!clock.advance(&[at(SystemTime::now() - hour)], &|| None));
        assert!(clock.advance(&[at(SystemTime::now() - 25 * hour)], &|| None));
    }

    #[test]
    fn a_file_with_the_number_of_one_that_is_gone_has_another_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let make = || {
            let file = File::create(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            let state = FileState::of_open(&file, &file.metadata().unwrap());
            std::fs::remove_file(&path).unwrap();
            state
        };
        assert_ne!(make(), make());
    }
}
