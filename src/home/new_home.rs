//! `boxlitefs init`: an empty home that BoxLite takes as its own.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, params};

use super::connection::damaged;
use super::identity::rfc3339_at;
use crate::{Context, Error, Result};

/// The version of [`TABLES`], which BoxLite 0.10.8 and 0.11.0 write.
const SCHEMA: u32 = 10;

/// The tables as BoxLite makes them (db/schema.rs).
const TABLES: &str = "\
CREATE TABLE schema_version (
    id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, updated_at TEXT NOT NULL
);
CREATE TABLE box_config (
    id TEXT PRIMARY KEY NOT NULL, name TEXT UNIQUE, created_at INTEGER NOT NULL, json TEXT NOT NULL
);
CREATE INDEX idx_box_config_created_at ON box_config(created_at);
CREATE INDEX idx_box_config_name ON box_config(name);
CREATE TABLE box_state (
    id TEXT PRIMARY KEY NOT NULL, status TEXT NOT NULL, pid INTEGER, json TEXT NOT NULL,
    FOREIGN KEY (id) REFERENCES box_config(id) ON DELETE CASCADE
);
CREATE INDEX idx_box_state_status ON box_state(status);
CREATE INDEX idx_box_state_pid ON box_state(pid);
CREATE TABLE alive (
    id INTEGER PRIMARY KEY CHECK (id = 1), boot_id TEXT NOT NULL, started_at INTEGER NOT NULL
);
CREATE TABLE image_index (
    reference TEXT PRIMARY KEY NOT NULL, manifest_digest TEXT NOT NULL, config_digest TEXT NOT NULL,
    layers TEXT NOT NULL, cached_at TEXT NOT NULL, complete INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX idx_image_index_manifest_digest ON image_index(manifest_digest);
CREATE TABLE base_disk (
    id TEXT PRIMARY KEY NOT NULL, source_box_id TEXT NOT NULL, name TEXT,
    kind TEXT NOT NULL CHECK(kind IN ('snapshot', 'clone_base', 'rootfs')), base_path TEXT NOT NULL,
    created_at INTEGER NOT NULL, json TEXT NOT NULL, UNIQUE(source_box_id, name)
);
CREATE INDEX idx_base_disk_source ON base_disk(source_box_id);
CREATE INDEX idx_base_disk_kind ON base_disk(kind);
CREATE INDEX idx_base_disk_path ON base_disk(base_path);
CREATE TABLE base_disk_ref (
    base_disk_id TEXT NOT NULL, box_id TEXT NOT NULL, PRIMARY KEY (base_disk_id, box_id)
);
CREATE TABLE snapshot (
    id TEXT PRIMARY KEY NOT NULL, box_id TEXT NOT NULL, name TEXT NOT NULL,
    created_at INTEGER NOT NULL, json TEXT NOT NULL, UNIQUE(box_id, name)
);
CREATE INDEX idx_snapshot_box ON snapshot(box_id);
";

/// The directories of a home.
const DIRECTORIES: [&str; 6] = ["bases", "boxes", "db", "images", "locks", "tmp"];

/// Makes an empty home in an empty directory, or in a new one. Returns its path. The database comes
/// last, and under its final name only when it is complete: without it a directory is no home.
///
/// # Errors
/// ENOTEMPTY for a directory with anything in it, ENOTDIR, and those of the file system.
pub fn init_home(path: &Path) -> Result<PathBuf> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let shown = path.display();
            let parent = path.parent().unwrap_or(path).display();
            return Err(Error::new(
                libc::ENOENT,
                format!(
                    "cannot make {shown}: {parent} does not exist; make it with `mkdir -p {parent}`"
                ),
            ));
        }
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(Error::io(format!("cannot make {}", path.display()), error));
        }
        _ => {}
    }
    let message = || format!("cannot look into {}", path.display());
    let root = fs::canonicalize(path).context(message)?;
    if !root.is_dir() {
        return Err(Error::new(
            libc::ENOTDIR,
            format!(
                "{} is not a directory: name an empty directory, or one that is not there yet",
                root.display()
            ),
        ));
    }
    if fs::read_dir(&root).context(message)?.next().is_some() {
        return Err(Error::new(
            libc::ENOTEMPTY,
            format!(
                "{} is not empty: name an empty directory, or one that is not there yet",
                root.display()
            ),
        ));
    }
    for name in DIRECTORIES {
        let dir = root.join(name);
        let made = DirBuilder::new().mode(0o755).create(&dir);
        made.context(|| format!("cannot make {}", dir.display()))?;
    }
    let unfinished = root.join("db/boxlite.db.new");
    write_database(&unfinished)?;
    let database = root.join("db/boxlite.db");
    let made = fs::rename(&unfinished, &database)
        .and_then(|()| File::open(root.join("db"))?.sync_all())
        .and_then(|()| File::open(&root)?.sync_all());
    made.context(|| format!("cannot make {}", database.display()))?;
    Ok(root)
}

fn write_database(path: &Path) -> Result<()> {
    let made = Connection::open(path).and_then(|connection| {
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.execute_batch(&format!("BEGIN;{TABLES}"))?;
        connection.execute(
            "INSERT INTO schema_version (id, version, updated_at) VALUES (1, ?1, ?2)",
            params![SCHEMA, rfc3339_at(std::time::SystemTime::now())],
        )?;
        connection.execute_batch("COMMIT; PRAGMA wal_checkpoint(TRUNCATE)")
    });
    made.map_err(|error| damaged(path, error))
}
