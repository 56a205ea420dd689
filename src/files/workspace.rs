//! This process's own directory below `.boxlitefs/`, where changes are prepared, and the removal of
//! directories that dead processes left.

use std::fs::{self, File, OpenOptions};
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::files::durable;
use crate::files::listing::names_in;
use crate::files::waiting_archive::{WaitingArchive, waiting_in};
use crate::home::{Home, base_id, flock_exclusive};
use crate::process::control::start_time;
use crate::{Context, Error, Result};

/// Prefix of a workspace's name. Entries of `.boxlitefs/` without it are left alone.
const PREFIX: &str = "work-";

/// Prefix of a workspace that is not locked yet. The pid and the start time of its creator follow.
const UNLOCKED: &str = "new-";

/// The longest time to lock a new workspace. An older unlocked one was left by a crash.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3600);

/// The file that the process that owns the workspace keeps locked.
const LOCK: &str = "lock";

/// A directory that only this process uses. It is removed when the process ends, or by the next
/// mount.
struct OwnDirectory {
    dir: PathBuf,
    _lock: File,
}

impl OwnDirectory {
    fn create(home: &Home) -> Result<OwnDirectory> {
        let staging = home.make_staging_dir()?;
        let id = base_id()?;
        let pid = std::process::id();
        let started = start_time(pid).unwrap_or(0);
        let unlocked = staging.join(format!("{UNLOCKED}{pid}-{started}-{id}"));
        let dir = staging.join(format!("{PREFIX}{id}"));
        let locked = make_locked(home, &unlocked).and_then(|lock| {
            fs::rename(&unlocked, &dir).context(|| format!("cannot make {}", dir.display()))?;
            Ok(lock)
        });
        let lock = locked.inspect_err(|_| discard(&unlocked))?;
        Ok(OwnDirectory { dir, _lock: lock })
    }
}

/// Makes a workspace and locks it, before it gets the name by which another mount would remove it.
fn make_locked(home: &Home, dir: &Path) -> Result<File> {
    home.make_dir(dir)?;
    let path = dir.join(LOCK);
    let lock = File::create_new(&path).context(|| format!("cannot make {}", path.display()))?;
    flock_exclusive(&lock).context(|| format!("cannot lock {}", path.display()))?;
    Ok(lock)
}

impl Drop for OwnDirectory {
    fn drop(&mut self) {
        // The next mount removes what can't be removed now, and makes boxes of the archives that
        // wait.
        let _ = remove_but_waiting(&self.dir);
    }
}

/// Removes a workspace, except for archives that wait in it. A missing workspace is not an error.
///
/// # Errors
/// Those of removing files.
pub fn remove_but_waiting(workspace: &Path) -> Result<()> {
    let message = || format!("cannot remove the leftover {}", workspace.display());
    let waiting = waiting_in(workspace);
    if waiting.is_empty() {
        return match fs::remove_dir_all(workspace) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.context(message),
        };
    }
    let is_kept = |path: &Path| {
        let mut disks = waiting.iter().map(|archive| &archive.disk);
        disks.any(|disk| path == disk || path == WaitingArchive::note_of(disk))
    };
    for name in names_in(workspace)? {
        let path = workspace.join(&name);
        if !is_kept(&path) && name != LOCK {
            discard(&path);
        }
    }
    Ok(())
}

/// A workspace of a dead process. While this is held, no other process treats it as abandoned.
pub struct Abandoned {
    dir: PathBuf,
    _lock: Option<File>,
}

impl Abandoned {
    /// Takes a workspace over. Returns None if another mount has done that.
    pub fn take_over(dir: PathBuf) -> Option<Abandoned> {
        let lock = OpenOptions::new().read(true).open(dir.join(LOCK)).ok();
        if let Some(lock) = &lock {
            flock_exclusive(lock).ok()?;
        }
        Some(Abandoned { dir, _lock: lock })
    }

    /// Returns the directory of the workspace.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// A path in the workspace. Dropping it removes the file or directory there, with all its contents:
/// either that was moved into place and nothing is left to remove, or the change failed.
pub struct Scratch(PathBuf);

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        discard(&self.0);
    }
}

/// Paths that could not be removed when they should have been.
static UNREMOVED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes a file or directory of the workspace, if it exists. If that fails, for example because
/// the disk fails, it is removed when the next change begins, or with the workspace.
pub fn discard(path: &Path) {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    if let Err(error) = removed
        && error.kind() != std::io::ErrorKind::NotFound
    {
        log::warn!("cannot remove {}: {error}", path.display());
        UNREMOVED.lock().push(path.to_owned());
    }
}

/// Removes the paths that could not be removed before.
fn retry_discards() {
    let unremoved = std::mem::take(&mut *UNREMOVED.lock());
    unremoved.iter().for_each(|path| discard(path));
}

/// Returns the workspaces of dead processes in a home's staging directory.
pub fn abandoned(staging: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(staging) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok())
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let old = || entry.metadata().is_ok_and(|meta| is_old(&meta));
            match name.strip_prefix(UNLOCKED) {
                Some(rest) => !is_creator_alive(rest) || old(),
                None => name.starts_with(PREFIX) && !is_owned(&entry.path()),
            }
        })
        .map(|entry| entry.path())
        .collect()
}

/// Returns whether the process that makes the workspace `PID-STARTED-ID` is alive; a process with a
/// reused pid has another start time. A process of another PID namespace looks dead: its workspace
/// is removed, its change fails and can be repeated.
fn is_creator_alive(name: &str) -> bool {
    let mut fields = name.split('-');
    let pid = fields.next().and_then(|pid| pid.parse().ok());
    let started = fields.next().and_then(|started| started.parse().ok());
    started.is_some_and(|started: u64| pid.and_then(start_time) == Some(started))
}

fn is_old(meta: &fs::Metadata) -> bool {
    let age = meta.modified().ok().and_then(|time| time.elapsed().ok());
    age.is_some_and(|age| age > LOCK_TIMEOUT)
}

fn is_owned(dir: &Path) -> bool {
    let open = OpenOptions::new().read(true).open(dir.join(LOCK));
    open.is_ok_and(|file| flock_exclusive(&file).is_err())
}

/// The place where this process prepares changes: a directory of its own, made when it is first
/// needed.
pub struct Workspace {
    home: Arc<Home>,
    state: Mutex<WorkspaceState>,
}

enum WorkspaceState {
    Unused,
    Made(OwnDirectory),
    Ended,
}

impl Workspace {
    /// Returns the workspace of a home, without making its directory.
    pub fn new(home: Arc<Home>) -> Workspace {
        Workspace {
            home,
            state: Mutex::new(WorkspaceState::Unused),
        }
    }

    /// Removes the directory, and makes none any more. Threads that make what nobody reads any more
    /// may hold the workspace for a moment longer, and the process does not wait for them.
    pub fn end(&self) {
        *self.state.lock() = WorkspaceState::Ended;
    }

    /// Makes a file in the workspace and removes its name. The file disappears when it is closed.
    /// Its name begins with `prefix` in messages.
    ///
    /// # Errors
    /// Those of making it.
    pub fn unnamed_file(&self, prefix: &str) -> Result<File> {
        let path = self.fresh_path(prefix)?;
        let message = || format!("cannot make the spool {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .context(message)?;
        fs::remove_file(&path).context(message)?;
        Ok(file)
    }

    /// Moves `new` over `target`, durably. If the move can't be flushed, restores the old `target`:
    /// a guest would keep writing to a file that a power loss would remove. Meanwhile the old file
    /// has a name in the workspace, where a crash leaves it.
    ///
    /// # Errors
    /// Those of system calls.
    pub fn replace(&self, new: &Path, target: &Path) -> Result<()> {
        let aside = self.scratch("old")?;
        fs::hard_link(target, &*aside)
            .context(|| format!("cannot link {} to {}", target.display(), aside.display()))?;
        let replaced = durable::rename(new, target);
        if replaced.is_err() {
            // If the first rename failed, both names are of the same file, and this does nothing.
            let _ = durable::rename(&aside, target);
        }
        replaced
    }

    /// Returns an unused path as [`Workspace::fresh_path`] does. Dropping it removes what is there.
    ///
    /// # Errors
    /// Those of making the workspace.
    pub fn scratch(&self, prefix: &str) -> Result<Scratch> {
        self.fresh_path(prefix).map(Scratch)
    }

    /// Returns an unused path in the workspace, for a file or directory about to be made. Its name
    /// begins with `prefix`.
    ///
    /// # Errors
    /// Those of making the workspace.
    pub fn fresh_path(&self, prefix: &str) -> Result<PathBuf> {
        Ok(self.make()?.join(format!("{prefix}-{}", base_id()?)))
    }

    /// Returns the directory of the workspace. Makes it if it does not exist.
    ///
    /// # Errors
    /// ECANCELED once it has ended; those of making it.
    pub fn make(&self) -> Result<PathBuf> {
        retry_discards();
        let mut state = self.state.lock();
        match &*state {
            WorkspaceState::Made(own) => Ok(own.dir.clone()),
            WorkspaceState::Ended => Err(Error::new(libc::ECANCELED, "boxlitefs is ending")),
            WorkspaceState::Unused => {
                let own = OwnDirectory::create(&self.home)?;
                let dir = own.dir.clone();
                *state = WorkspaceState::Made(own);
                Ok(dir)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::home::init_home;

    #[test]
    fn a_workspace_that_ended_is_gone_though_a_thread_still_holds_it() {
        let place = tempfile::tempdir().unwrap();
        let root = init_home(&place.path().join("home")).unwrap();
        let home = Arc::new(Home::open(&root).unwrap());
        let workspace = Arc::new(Workspace::new(home));
        let held = workspace.clone();
        let dir = workspace.make().unwrap();
        assert!(dir.is_dir());

        workspace.end();

        assert!(!dir.exists());
        assert_eq!(held.make().unwrap_err().errno(), libc::ECANCELED);
        let left = abandoned(dir.parent().unwrap());
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn a_workspace_of_a_dead_process_is_abandoned_even_if_its_pid_is_reused() {
        let place = tempfile::tempdir().unwrap();
        let pid = std::process::id();
        let started = start_time(pid).unwrap();
        let dead = BTreeSet::from([
            format!("new-{pid}-{}-b", started + 1),
            format!("new-{}-{started}-c", u32::MAX),
            "new-d".to_owned(),
        ]);
        let others = [format!("new-{pid}-{started}-a"), "kept".to_owned()];
        for name in dead.iter().chain(&others) {
            fs::create_dir(place.path().join(name)).unwrap();
        }

        let abandoned: BTreeSet<String> = abandoned(place.path())
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();

        assert_eq!(abandoned, dead);
    }
}
