//! Connections that only read BoxLite's database, wherever it is. SQLite wants to create files
//! beside it; on read-only media, and in another user's backup, it can't.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::connection::{connect, damaged, data_version, failed};
use super::identity::base_id;
use crate::{Context, Error, Result};

/// How often a database that changes while it is copied is copied again.
const TRIES: usize = 5;

/// A file that changed this recently may have changed again without another time: file times have
/// ticks, of at most two seconds.
const TICK: Duration = Duration::from_secs(2);

/// A connection for reading.
pub(super) struct ReadConnection {
    connection: Connection,
    /// The state of the files, if SQLite does not notice itself that they changed.
    unlocked: Option<UnlockedRead>,
}

impl Deref for ReadConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

/// The state of the files that were read without SQLite's locks.
struct UnlockedRead {
    files: Files,
    /// When they were read, if they had changed just before.
    unsettled: Option<Instant>,
}

impl ReadConnection {
    /// Returns the connection itself, for queries that are over soon.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    /// Returns whether the files have changed since this connection was opened.
    pub fn is_outdated(&self, database: &Path) -> bool {
        let Some(unlocked) = &self.unlocked else {
            return false;
        };
        let is_late = unlocked.unsettled.is_some_and(|at| at.elapsed() > TICK);
        let real = fs::canonicalize(database).unwrap_or_else(|_| database.to_owned());
        is_late || Files::of(&real) != unlocked.files
    }
}

/// Inode, length, and time of change (ns) of a file; None without a file.
type Stamp = Option<(u64, u64, i128)>;

/// The files of a database.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Files {
    database: Stamp,
    wal: Stamp,
}

impl Files {
    fn of(database: &Path) -> Files {
        Files {
            database: stamp_of(database),
            wal: stamp_of(&beside(database, "-wal")),
        }
    }

    fn has_wal(&self) -> bool {
        self.wal.is_some_and(|(_, length, _)| length > 0)
    }

    /// Returns the later time of change.
    fn changed(&self) -> i128 {
        let times = [self.database, self.wal].into_iter().flatten();
        times.map(|(_, _, changed)| changed).max().unwrap_or(0)
    }
}

fn stamp_of(path: &Path) -> Stamp {
    let meta = fs::metadata(path).ok()?;
    let changed = i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec());
    Some((meta.ino(), meta.len(), changed))
}

/// Returns the path of a file that SQLite keeps beside a database.
fn beside(database: &Path, ending: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

/// Connects for reading only. The last connection to close moves the WAL into the database, and a
/// reader must not write. Without a WAL, closing removes the empty one that opening creates.
pub(super) fn connect_for_reading(database: &Path) -> Result<ReadConnection> {
    // SQLite follows a link, and keeps its files beside the target.
    let real = fs::canonicalize(database).unwrap_or_else(|_| database.to_owned());
    let writable = real.parent().is_none_or(|dir| may_write(dir).is_ok());
    if !writable {
        return read_unlocked(&real);
    }
    let has_wal = Files::of(database).has_wal();
    let connection = connect(database)?;
    keep_wal(&connection, database, has_wal)?;
    Ok(ReadConnection {
        connection,
        unlocked: None,
    })
}

fn keep_wal(connection: &Connection, database: &Path, keep: bool) -> Result<()> {
    connection
        .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep)
        .map(drop)
        .map_err(|e| damaged(database, e))
}

/// Checks that this process may create files in a directory, by its permissions and its mount.
pub(super) fn may_write(dir: &Path) -> io::Result<()> {
    accessat(CWD, dir, Access::WRITE_OK, AtFlags::EACCESS).map_err(io::Error::from)
}

/// Reads a database beside which no file can be created: the file itself if everything is in it,
/// else a copy of it and its WAL. If it is changed by another path, it is read anew.
fn read_unlocked(database: &Path) -> Result<ReadConnection> {
    for _ in 0..TRIES {
        let files = Files::of(database);
        let connection = if files.has_wal() {
            open_copy(database)
        } else {
            open_immutable(database)
        };
        if Files::of(database) != files {
            continue;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_or(0, |now| i128::try_from(now.as_nanos()).unwrap_or(0));
        let is_settled = now - files.changed() > TICK.as_nanos() as i128;
        return Ok(ReadConnection {
            connection: connection?,
            unlocked: Some(UnlockedRead {
                files,
                unsettled: (!is_settled).then(Instant::now),
            }),
        });
    }
    Err(Error::busy(format!(
        "the database {} changes while it is copied; try again",
        database.display()
    )))
}

/// Opens a database without locks, and without the files SQLite would create.
fn open_immutable(database: &Path) -> Result<Connection> {
    let mut uri = String::from("file:");
    for byte in database.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
                uri.push(char::from(*byte));
            }
            other => uri.push_str(&format!("%{other:02X}")),
        }
    }
    uri.push_str("?immutable=1");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_URI;
    Connection::open_with_flags(uri, flags).map_err(|e| damaged(database, e))
}

/// A private directory that is removed when this is dropped.
struct PrivateDir(PathBuf);

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Opens a copy, which has no name any more when this returns: it holds the secrets of boxes.
fn open_copy(database: &Path) -> Result<Connection> {
    let dir = std::env::temp_dir().join(format!("boxlitefs-{}", base_id()?));
    let message = || format!("cannot copy {} to {}", database.display(), dir.display());
    DirBuilder::new()
        .mode(0o700)
        .create(&dir)
        .context(message)?;
    let dir_guard = PrivateDir(dir.clone());
    let copy = dir.join("boxlite.db");
    copy_private(database, &copy).context(message)?;
    copy_private(&beside(database, "-wal"), &beside(&copy, "-wal")).context(message)?;
    let connection = connect(&copy)?;
    keep_wal(&connection, database, true)?;
    // In exclusive mode, SQLite keeps its index of the WAL in memory, and needs no name after the
    // first read.
    connection
        .pragma_update(None, "locking_mode", "EXCLUSIVE")
        .and_then(|()| connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(())))
        .and_then(|()| data_version(&connection))
        .map_err(|e| failed(&connection, database, e))?;
    drop(dir_guard);
    Ok(connection)
}

fn copy_private(from: &Path, to: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut target = options.write(true).create_new(true).mode(0o600).open(to)?;
    io::copy(&mut File::open(from)?, &mut target)?;
    Ok(())
}
