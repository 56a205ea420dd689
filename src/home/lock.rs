//! The locks of a home: our own, BoxLite's runtime lock, and its holder.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::paths::Home;
use super::placement::reject_scattered;
use crate::process::control::named;
use crate::{Context, Error, Result};

/// How long we wait for another boxlitefs, which holds the lock for milliseconds. A BoxLite runtime
/// holds it for its whole life.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_millis(150);

/// Keeps other boxlitefs from changing the home, including those in shared access. It is the flock
/// of our own directory.
pub(super) fn take_turn(home: &Home) -> Result<File> {
    if let Some(error) = home.unwritable() {
        return Err(error);
    }
    let dir = home.make_staging_dir()?;
    reject_scattered(home)?;
    let message = || format!("cannot lock {}", dir.display());
    let file = File::open(&dir).context(message)?;
    if flock_within(&file, LOCK_PATIENCE).context(message)? {
        Ok(file)
    } else {
        Err(Error::busy(format!(
            "another boxlitefs is changing {}; try again",
            home.root().display()
        )))
    }
}

/// Takes the runtime lock with flock(LOCK_EX | LOCK_NB) on a descriptor of our own, as a runtime
/// does (runtime/lock.rs). None when another process holds it for longer than `patience`.
pub(super) fn take_lock(home: &Home, patience: Duration) -> Result<Option<File>> {
    let path = home.runtime_lock();
    let fresh = !path.exists();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .context(|| format!("cannot open the runtime lock {}", path.display()))?;
    if fresh {
        home.give_to_owner(&path)?;
    }
    let is_taken = flock_within(&file, patience).context(|| "cannot take the runtime lock")?;
    Ok(is_taken.then_some(file))
}

/// Takes a file's flock; false when another process holds it for longer than `patience`.
fn flock_within(file: &File, patience: Duration) -> std::io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        match flock_exclusive(file) {
            Ok(()) => return Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => {
                if Instant::now() >= deadline {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_millis(3));
            }
            Err(e) => return Err(e),
        }
    }
}

impl Home {
    /// Returns the process, as messages name it, that has a BoxLite runtime open on the home. None if
    /// nobody has, or it can't be seen from here. Waits for nothing.
    pub fn runtime(&self) -> Option<String> {
        let holder = holder_of(self).ok().flatten();
        holder.filter(|pid| *pid != std::process::id()).map(named)
    }
}

/// Returns the process that holds the runtime lock, by the kernel's list. None if it is not in the
/// list, such as a process in another namespace. Call it while it is our turn ([`take_turn`]): our
/// own lock shows how the list names the file system. Some (btrfs) have one device in stat and
/// another in the list.
pub(super) fn holder_of(home: &Home) -> Result<Option<u32>> {
    /// The list comes in pages, and a lock may be missed where the list changes between two.
    const LOOKS: u32 = 3;
    for _ in 1..LOOKS {
        if let Some(holder) = listed_holder_of(home)? {
            return Ok(Some(holder));
        }
    }
    listed_holder_of(home)
}

fn listed_holder_of(home: &Home) -> Result<Option<u32>> {
    let look =
        |path: &Path| fs::metadata(path).context(|| format!("cannot look at {}", path.display()));
    // The first runtime of a home makes it.
    if !home.runtime_lock().exists() {
        return Ok(None);
    }
    let lock = look(&home.runtime_lock())?;
    let ours = look(&home.staging_dir())?;
    let table = fs::read_to_string("/proc/locks").context(|| "cannot read /proc/locks")?;
    // 1: FLOCK ADVISORY WRITE 1234 fe:00:5678 0 EOF; a waiting process has an arrow in front.
    let flocks = table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let kind = fields.next()?;
        let (pid, place) = (fields.nth(2)?, fields.next()?);
        let (device, inode) = place.rsplit_once(':')?;
        let (pid, inode) = (pid.parse::<u32>().ok()?, inode.parse::<u64>().ok()?);
        (kind == "FLOCK").then_some((pid, device, inode))
    });
    let flocks: Vec<(u32, &str, u64)> = flocks.collect();
    let by_stat = format!(
        "{:02x}:{:02x}",
        libc::major(lock.dev()),
        libc::minor(lock.dev())
    );
    let is_our_turn = |(pid, device, inode): &&(u32, &str, u64)| {
        *pid == std::process::id() && *inode == ours.ino() && *device != by_stat
    };
    let holder_on = |device: &str| {
        let mut flocks = flocks.iter();
        flocks.find(|(_, of, inode)| *of == device && *inode == lock.ino())
    };
    let by_our_turn = flocks
        .iter()
        .find(is_our_turn)
        .map(|(_, device, _)| *device);
    let holder = holder_on(&by_stat).or_else(|| by_our_turn.and_then(holder_on));
    Ok(holder.map(|(pid, ..)| *pid))
}

/// Returns whether the kernel's list shows every process that holds a lock in the home. It leaves
/// out those of pid namespaces that can't be seen from here, and of other computers.
pub(super) fn shows_all_locks(home: &Home) -> bool {
    /// The inode of the first pid namespace (PROC_PID_INIT_INO in linux/proc_ns.h).
    const FIRST_NAMESPACE: &str = "pid:[4026531836]";
    /// File systems on local disks and in memory, by the magic numbers of statfs(2): ext4, btrfs,
    /// xfs, f2fs, bcachefs, zfs, tmpfs, overlayfs.
    const LOCAL: [u64; 8] = [
        0xef53,
        0x9123_683e,
        0x5846_5342,
        0xf2f5_2010,
        0xca45_1a4e,
        0x2fc1_2fc1,
        0x0102_1994,
        0x794c_7630,
    ];
    let namespace = fs::read_link("/proc/self/ns/pid");
    let is_first = namespace.is_ok_and(|name| name == Path::new(FIRST_NAMESPACE));
    let kind = rustix::fs::statfs(home.root()).map(|found| found.f_type as u64);
    is_first && kind.is_ok_and(|kind| LOCAL.contains(&(kind & 0xffff_ffff)))
}

/// Opens the file of a lock and takes its flock if that is free. It is held until the file is closed.
///
/// # Errors
/// ENOENT when there is no such file, EWOULDBLOCK when another process holds it.
pub fn lock_file(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    flock_exclusive(&file)?;
    Ok(file)
}

/// Takes a file's flock if it is free. The kernel releases it when the process dies, in whatever
/// way.
///
/// # Errors
/// EWOULDBLOCK when another process holds it.
pub fn flock_exclusive(file: &File) -> std::io::Result<()> {
    // std's try_lock is not promised to be flock, and BoxLite uses flock.
    let operation = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(file, operation).map_err(std::io::Error::from)
}
