//! `db/boxlitefs.db`: sizes and digests that were computed before and are expensive to compute, and
//! headers of image files (`known_headers`).
//!
//! A cache: it may be deleted at any time, and its failures are no errors. Its keys are hashes of
//! everything that determines a value, so nothing has to be invalidated.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use super::Home;

/// The most rows of frames: those of 2 TiB of disks, some 40 MB.
const MOST_FRAMES: i64 = 1_000_000;
/// The most archives, and the most digests.
const MOST_ARCHIVES: i64 = 1000;
/// How long we wait for another process to release the database before we do without it.
const BUSY: Duration = Duration::from_millis(500);
/// What each version of the tables adds to the one before. SQLite's user_version counts the
/// versions that were applied. Never edit a version; add one.
const VERSIONS: &[&str] = &[
    "
    CREATE TABLE frame (key BLOB PRIMARY KEY, size INTEGER NOT NULL, used INTEGER NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE archive (key BLOB PRIMARY KEY, size INTEGER NOT NULL, sizes BLOB NOT NULL,
        used INTEGER NOT NULL);
    CREATE TABLE disk (key BLOB PRIMARY KEY, sha256 BLOB NOT NULL, used INTEGER NOT NULL);",
    "
    CREATE TABLE header (device INTEGER NOT NULL, inode INTEGER NOT NULL, length INTEGER NOT NULL,
        modified INTEGER NOT NULL, changed INTEGER NOT NULL, backing BLOB, boot TEXT NOT NULL,
        PRIMARY KEY (device, inode)) WITHOUT ROWID;",
];

/// The cache of sizes and digests.
pub struct SizeCache {
    path: PathBuf,
    /// None where it can't be used.
    connection: Mutex<Option<Connection>>,
    /// A message, if a newer boxlitefs made it.
    newer: Option<String>,
    writable: bool,
}

impl SizeCache {
    /// Opens the database of a home, or creates it unless `read_only`. Without a usable database
    /// the cache is empty; a damaged one is created anew.
    pub fn open(home: &Home, read_only: bool) -> SizeCache {
        SizeCache::of(home, read_only, VERSIONS)
    }

    fn of(home: &Home, read_only: bool, versions: &[&str]) -> SizeCache {
        let path = home.size_cache_file();
        let mut connection = open(&path, read_only, versions);
        if connection.is_err() && !read_only && is_ours_to_replace(&connection) {
            let _ = std::fs::remove_file(&path);
            connection = open(&path, read_only, versions);
        }
        if !read_only && connection.is_ok() {
            // The owner's own mount could not use it otherwise.
            let _ = home.give_to_owner(&path);
        }
        let mut newer = None;
        if let Err(error) = &connection {
            let message = format!("{} is not used: {error}", path.display());
            match error {
                Unusable::Newer { .. } => newer = Some(message),
                Unusable::Sqlite(_) => log::info!("{message}"),
            }
        }
        SizeCache {
            path,
            newer,
            connection: Mutex::new(connection.ok()),
            writable: !read_only,
        }
    }

    /// Returns a message if a newer boxlitefs made the database. It is left as it is and not used.
    pub fn newer(&self) -> Option<&str> {
        self.newer.as_deref()
    }

    /// Returns the compressed size of a frame in bytes.
    pub fn frame(&self, key: &[u8; 16]) -> Option<u32> {
        self.get("SELECT size FROM frame WHERE key = ?1", key)
    }

    /// Remembers compressed sizes of frames.
    pub fn put_frames(&self, frames: &[([u8; 16], u32)]) {
        self.change(|transaction, now| {
            let mut insert =
                transaction.prepare_cached("INSERT OR REPLACE INTO frame VALUES (?1, ?2, ?3)")?;
            for (key, size) in frames {
                insert.execute(params![key, size, now])?;
            }
            prune(transaction, "frame", MOST_FRAMES)
        });
    }

    /// Returns the sizes of all frames of a compressed archive.
    pub fn archive(&self, key: &[u8; 32]) -> Option<Vec<u8>> {
        self.get("SELECT sizes FROM archive WHERE key = ?1", key)
    }

    /// Returns the length of a compressed archive in bytes.
    pub fn archive_size(&self, key: &[u8; 32]) -> Option<u64> {
        self.get("SELECT size FROM archive WHERE key = ?1", key)
            .and_then(|size: i64| u64::try_from(size).ok())
    }

    /// Remembers the length of a compressed archive and the sizes of all its frames.
    pub fn put_archive(&self, key: &[u8; 32], size: u64, sizes: &[u8]) {
        self.change(|transaction, now| {
            transaction.execute(
                "INSERT OR REPLACE INTO archive VALUES (?1, ?2, ?3, ?4)",
                params![key, i64::try_from(size).unwrap_or(i64::MAX), sizes, now],
            )?;
            prune(transaction, "archive", MOST_ARCHIVES)
        });
    }

    /// Removes a compressed archive, and the sizes of all frames, one of which was wrong.
    pub fn forget_archive(&self, key: &[u8; 32]) {
        self.change(|transaction, _| {
            transaction.execute("DELETE FROM archive WHERE key = ?1", params![key])?;
            transaction.execute("DELETE FROM frame", [])?;
            Ok(())
        });
    }

    /// Returns the sha256 of a flattened disk.
    pub fn digest(&self, key: &[u8; 32]) -> Option<[u8; 32]> {
        self.get("SELECT sha256 FROM disk WHERE key = ?1", key)
    }

    /// Remembers the sha256 of a flattened disk.
    pub fn put_digest(&self, key: &[u8; 32], sha256: &[u8; 32]) {
        self.change(|transaction, now| {
            transaction.execute(
                "INSERT OR REPLACE INTO disk VALUES (?1, ?2, ?3)",
                params![key, sha256, now],
            )?;
            prune(transaction, "disk", MOST_ARCHIVES)
        });
    }

    fn get<T: rusqlite::types::FromSql>(&self, query: &str, key: &[u8]) -> Option<T> {
        let found = self.read(|connection| {
            let mut query = connection.prepare_cached(query)?;
            query.query_row([key], |row| row.get(0)).optional()
        });
        found.flatten()
    }

    /// Returns what `work` reads; None where the database can't be read.
    pub(super) fn read<T>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Option<T> {
        let connection = self.connection.lock();
        let read = work(connection.as_ref()?);
        read.inspect_err(|error| log::debug!("{}: {error}", self.path.display()))
            .ok()
    }

    /// Runs `work` in one transaction, with the present time in seconds since 1970. A failure is only
    /// logged.
    pub(super) fn change(
        &self,
        work: impl FnOnce(&rusqlite::Transaction, i64) -> rusqlite::Result<()>,
    ) {
        let mut connection = self.connection.lock();
        let Some(connection) = connection.as_mut().filter(|_| self.writable) else {
            return;
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(0));
        let changed = connection.transaction().and_then(|transaction| {
            work(&transaction, now)?;
            transaction.commit()
        });
        if let Err(error) = changed {
            log::debug!("{}: {error}", self.path.display());
        }
    }
}

/// Removes the oldest rows, a tenth of `most` at a time.
fn prune(transaction: &rusqlite::Transaction, table: &str, most: i64) -> rusqlite::Result<()> {
    let count: i64 =
        transaction.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| {
            row.get(0)
        })?;
    if count > most {
        transaction.execute(
            &format!(
                "DELETE FROM {table} WHERE key IN
                    (SELECT key FROM {table} ORDER BY used LIMIT ?1)"
            ),
            [count - most + most / 10],
        )?;
    }
    Ok(())
}

/// Why the database is not used: an error of SQLite, or a newer version.
#[derive(Debug)]
enum Unusable {
    Sqlite(rusqlite::Error),
    Newer { is: i64, known: i64 },
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unusable::Sqlite(error) => error.fmt(f),
            Unusable::Newer { is, known } => write!(
                f,
                "a newer boxlitefs made it (its tables have version {is}, {known} is known): mount with the newer one, or delete the file, which is a cache"
            ),
        }
    }
}

impl From<rusqlite::Error> for Unusable {
    fn from(error: rusqlite::Error) -> Self {
        Unusable::Sqlite(error)
    }
}

/// Returns whether it is damaged, rather than locked, newer, or forbidden.
fn is_ours_to_replace(connection: &Result<Connection, Unusable>) -> bool {
    matches!(connection, Err(Unusable::Sqlite(error)) if matches!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt)
    ))
}

/// Opens the database, and upgrades an older one. Read-only, an older one is used for what it has.
fn open(path: &Path, read_only: bool, versions: &[&str]) -> Result<Connection, Unusable> {
    let known = i64::try_from(versions.len()).unwrap_or(i64::MAX);
    let access = if read_only {
        OpenFlags::SQLITE_OPEN_READ_ONLY
    } else {
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE
    };
    // Root may mount a user's home: following a link of the user would have root write elsewhere.
    let access = access | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut connection =
        Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(BUSY)?;
    // No WAL: a read-only mount could not read it without writing.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let is: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if is > known {
        return Err(Unusable::Newer { is, known });
    }
    if is < known && !read_only {
        let transaction =
            connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        // Another mount may have created the tables meanwhile.
        let is: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        for step in versions.iter().skip(usize::try_from(is).unwrap_or(0)) {
            transaction.execute_batch(step)?;
        }
        if is < known {
            transaction.pragma_update(None, "user_version", known)?;
        }
        transaction.commit()?;
    }
    Ok(connection)
}

/// Makes a home without boxes in `dir`, or opens it.
#[cfg(test)]
pub(crate) fn home_in(dir: &Path) -> Home {
    std::fs::create_dir_all(dir.join("db")).unwrap();
    let connection = Connection::open(dir.join("db/boxlite.db")).unwrap();
    connection
        .execute_batch(
            "CREATE TABLE IF NOT EXISTS schema_version (id INTEGER PRIMARY KEY, version INTEGER, updated_at TEXT);
             INSERT OR REPLACE INTO schema_version VALUES (1, 6, '');
             CREATE TABLE IF NOT EXISTS box_config (id TEXT PRIMARY KEY, name TEXT, created_at INTEGER, json TEXT);
             CREATE TABLE IF NOT EXISTS box_state (id TEXT PRIMARY KEY, status TEXT, pid INTEGER, json TEXT);",
        )
        .unwrap();
    Home::open(dir).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(dir: &Path) -> Home {
        home_in(dir)
    }

    #[test]
    fn what_was_put_is_there_for_the_next_that_opens_it() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        let cache = SizeCache::open(&home, false);
        assert_eq!(cache.frame(&[1; 16]), None);
        cache.put_frames(&[([1; 16], 7), ([2; 16], 8)]);
        cache.put_archive(&[3; 32], 1 << 40, b"sizes");
        cache.put_digest(&[4; 32], &[5; 32]);
        drop(cache);
        for read_only in [true, false] {
            let cache = SizeCache::open(&home, read_only);
            assert_eq!(cache.frame(&[2; 16]), Some(8));
            assert_eq!(cache.archive(&[3; 32]).as_deref(), Some(&b"sizes"[..]));
            assert_eq!(cache.archive_size(&[3; 32]), Some(1 << 40));
            assert_eq!(cache.digest(&[4; 32]), Some([5; 32]));
        }
        let cache = SizeCache::open(&home, false);
        cache.forget_archive(&[3; 32]);
        assert_eq!(cache.archive(&[3; 32]), None);
        assert_eq!(cache.frame(&[1; 16]), None);
    }

    #[test]
    fn a_read_only_mount_makes_no_database_and_does_without() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        let cache = SizeCache::open(&home, true);
        cache.put_digest(&[4; 32], &[5; 32]);
        assert_eq!(cache.digest(&[4; 32]), None);
        assert!(!home.size_cache_file().exists());
    }

    #[test]
    fn a_damaged_database_is_made_anew_and_a_newer_one_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        std::fs::write(home.size_cache_file(), vec![b'x'; 8192]).unwrap();
        let cache = SizeCache::open(&home, false);
        cache.put_digest(&[4; 32], &[5; 32]);
        assert_eq!(cache.digest(&[4; 32]), Some([5; 32]));
        drop(cache);
        let connection = Connection::open(home.size_cache_file()).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        let before = std::fs::read(home.size_cache_file()).unwrap();
        let cache = SizeCache::open(&home, false);
        cache.put_digest(&[6; 32], &[5; 32]);
        assert_eq!(cache.digest(&[4; 32]), None);
        assert_eq!(std::fs::read(home.size_cache_file()).unwrap(), before);
    }

    #[test]
    fn a_newer_version_takes_over_what_an_older_one_learnt_and_the_older_one_then_does_without() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        let older = SizeCache::open(&home, false);
        assert_eq!(older.newer(), None);
        older.put_digest(&[4; 32], &[5; 32]);
        drop(older);
        let step = "ALTER TABLE disk ADD COLUMN note TEXT; CREATE TABLE more (x)";
        let next: Vec<&str> = VERSIONS.iter().copied().chain([step]).collect();
        // Read-only, nothing is brought up to date, and what is there is used.
        let looking = SizeCache::of(&home, true, &next);
        assert_eq!(looking.digest(&[4; 32]), Some([5; 32]));
        drop(looking);
        let newer = SizeCache::of(&home, false, &next);
        assert_eq!(newer.digest(&[4; 32]), Some([5; 32]));
        drop(newer);
        let columns: i64 = Connection::open(home.size_cache_file())
            .unwrap()
            .query_row(
                "SELECT count(*) FROM pragma_table_info('disk')",
                [],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(columns, 4);
        let before = std::fs::read(home.size_cache_file()).unwrap();
        let older = SizeCache::open(&home, false);
        let message = older.newer().expect("a message");
        assert!(
            message.contains("newer boxlitefs") && message.contains("boxlitefs.db"),
            "{message}"
        );
        older.put_digest(&[6; 32], &[5; 32]);
        assert_eq!(older.digest(&[4; 32]), None);
        assert_eq!(std::fs::read(home.size_cache_file()).unwrap(), before);
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        let elsewhere = dir.path().join("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, home.size_cache_file()).unwrap();
        let cache = SizeCache::open(&home, false);
        cache.put_digest(&[4; 32], &[5; 32]);
        assert!(!elsewhere.exists());
    }

    #[test]
    fn old_rows_go_when_there_are_too_many() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        let cache = SizeCache::open(&home, false);
        for number in 0..=MOST_ARCHIVES {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            cache.put_digest(&key, &[5; 32]);
        }
        let connection = Connection::open(home.size_cache_file()).unwrap();
        let count: i64 = connection
            .query_row("SELECT count(*) FROM disk", [], |row| row.get(0))
            .unwrap();
        assert_eq!(count, MOST_ARCHIVES - MOST_ARCHIVES / 10);
    }
}
