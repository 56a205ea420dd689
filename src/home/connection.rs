//! Connections to BoxLite's database, and messages for SQLite's errors.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::{Error, Result};

/// Opens the database the way BoxLite does (db/mod.rs: WAL stays as it is, foreign keys on).
/// Only SQLite may open this file: closing any other descriptor of it drops SQLite's locks.
pub(super) fn connect(database: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection =
        Connection::open_with_flags(database, flags).map_err(|e| damaged(database, e))?;
    connection
        .busy_timeout(Duration::from_secs(10))
        .and_then(|()| connection.pragma_update(None, "foreign_keys", true))
        .and_then(|()| connection.pragma_update(None, "synchronous", "FULL"))
        .map_err(|e| failed(&connection, database, e))?;
    Ok(connection)
}

pub(super) fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "data_version", |row| row.get(0))
}

/// Returns a message for an error of SQLite.
pub(super) fn damaged(database: &Path, error: rusqlite::Error) -> Error {
    told(database, error, 0)
}

/// Returns a message for an error of SQLite, with the errno of the system call behind it. SQLite
/// itself calls everything but a full disk an I/O error, or says that a file can't be opened.
pub(super) fn failed(connection: &Connection, database: &Path, error: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode::{CannotOpen, SystemIoFailure};
    let errno = match error.sqlite_error_code() {
        Some(CannotOpen | SystemIoFailure) => system_errno(connection),
        _ => 0,
    };
    told(database, error, errno)
}

/// Returns the errno of the last system call that failed for SQLite.
fn system_errno(connection: &Connection) -> i32 {
    // SAFETY: the handle is that of an open connection, borrowed for the call, which only reads a
    // number.
    unsafe { rusqlite::ffi::sqlite3_system_errno(connection.handle()) }
}

/// Reading needs a little room, too.
const FULL: (i32, &str) = (libc::ENOSPC, "cannot grow, the disk is full");

/// Returns the errno of creating a file beside a database, 0 if that succeeds: SQLite does not say
/// why it can't create its own files.
fn errno_beside(database: &Path) -> i32 {
    /// As much as SQLite wants at first.
    static WANTED: [u8; 64 << 10] = [1; 64 << 10];
    let path = database.with_extension("boxlitefs-room");
    let made = fs::write(&path, WANTED);
    let _ = fs::remove_file(&path);
    made.err()
        .and_then(|error| error.raw_os_error())
        .unwrap_or(0)
}

fn told(database: &Path, error: rusqlite::Error, errno: i32) -> Error {
    let code = error.sqlite_error_code();
    let errno = match code {
        // For other errors, the last errno may be that of a file that was only looked for.
        Some(_) if matches!(errno, libc::EMFILE | libc::ENFILE) => errno,
        Some(rusqlite::ErrorCode::CannotOpen) => errno_beside(database),
        _ => errno,
    };
    let (errno, what) = match code {
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => (
            libc::EIO,
            "is damaged; put a backup in its place, or recover it with sqlite3's .recover",
        ),
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
            (libc::EBUSY, "is in use; try again")
        }
        Some(rusqlite::ErrorCode::DiskFull) => FULL,
        _ if errno == libc::ENOSPC => FULL,
        _ if errno == libc::EDQUOT => (errno, "cannot grow, its owner may use no more of the disk"),
        _ if matches!(errno, libc::EMFILE | libc::ENFILE) => {
            (errno, "cannot be opened, too many files are open")
        }
        _ if errno == libc::EROFS => (errno, "cannot be written"),
        _ if errno == libc::EIO => (errno, "cannot be used, the disk fails (Input/output error)"),
        Some(rusqlite::ErrorCode::ReadOnly) => (libc::EROFS, "cannot be written"),
        Some(rusqlite::ErrorCode::PermissionDenied | rusqlite::ErrorCode::CannotOpen) => (
            libc::EACCES,
            "cannot be opened just now; try again, or run as the user whose home it is",
        ),
        _ if error.to_string().starts_with("no such table") => (
            libc::EIO,
            "is empty, or none of BoxLite's; put a backup in its place, or name another home",
        ),
        _ => (libc::EIO, "cannot be used"),
    };
    Error::new(errno, format!("the database {} {what}", database.display())).caused_by(error)
}
