//! The rows as they are now, read afresh whenever the database changed.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, params_from_iter};

use super::connection::{data_version, failed};
use super::identity::{is_safe_component, is_snapshot_name};
use super::read_connection::{ReadConnection, connect_for_reading};
use super::records::{BaseRecord, BoxRecord, SnapshotRecord};
use crate::{Error, Result};

/// The oldest schema that we change. Below it, snapshot and base tables are missing or different
/// (BoxLite migrates older databases itself at its next start).
const OLDEST_WRITABLE_SCHEMA: i64 = 7;

/// The version of BoxLite's schema, and whether we may change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    /// `schema_version.version`.
    pub version: i64,
    /// Why changes are refused, as a message; None when they are not.
    pub read_only: Option<String>,
}

/// All boxes and snapshots of a home at one moment.
#[derive(Debug)]
pub struct Catalog {
    schema: Schema,
    boxes: Vec<BoxRecord>,
    by_id: HashMap<String, usize>,
    snapshots: HashMap<String, Vec<SnapshotRecord>>,
}

impl Catalog {
    /// The schema they are stored in.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Every box, oldest first.
    pub fn boxes(&self) -> &[BoxRecord] {
        &self.boxes
    }

    /// The box with this id.
    pub fn box_by_id(&self, id: &str) -> Option<&BoxRecord> {
        self.by_id.get(id).map(|index| &self.boxes[*index])
    }

    /// The snapshots of a box, oldest first.
    pub fn snapshots_of(&self, box_id: &str) -> &[SnapshotRecord] {
        self.snapshots.get(box_id).map_or(&[], Vec::as_slice)
    }

    /// The snapshot of a box with this id.
    pub fn snapshot_by_id(&self, box_id: &str, id: &str) -> Option<&SnapshotRecord> {
        self.snapshots_of(box_id).iter().find(|s| s.id == id)
    }

    /// The snapshot of a box with this name.
    pub fn snapshot_by_name(&self, box_id: &str, name: &str) -> Option<&SnapshotRecord> {
        self.snapshots_of(box_id).iter().find(|s| s.name == name)
    }
}

/// A connection kept for reading, with what was read last.
pub(super) struct CatalogReader {
    database: PathBuf,
    open: Option<OpenDatabase>,
}

struct OpenDatabase {
    /// (st_dev, st_ino): a connection kept over a replaced database reads the old one.
    file: (u64, u64),
    connection: ReadConnection,
    /// SQLite's count of commits by others; the rows below are of this version.
    data_version: i64,
    catalog: Arc<Catalog>,
}

impl CatalogReader {
    pub(super) fn new(database: PathBuf) -> Self {
        CatalogReader {
            database,
            open: None,
        }
    }

    pub(super) fn current(&mut self) -> Result<Arc<Catalog>> {
        let file = database_id(&self.database)?;
        let is_other =
            |open: &OpenDatabase| open.file != file || open.connection.is_outdated(&self.database);
        if self.open.as_ref().is_some_and(is_other) {
            self.open = None;
        }
        if let Some(open) = &mut self.open {
            let version = data_version(&open.connection)
                .map_err(|e| failed(&open.connection, &self.database, e))?;
            if version != open.data_version {
                let catalog = Arc::new(read_all(&open.connection, &self.database)?);
                open.catalog = catalog;
                open.data_version = version;
            }
            return Ok(open.catalog.clone());
        }
        let connection = connect_for_reading(&self.database)?;
        // Version first: a commit in between is seen the next time.
        let data_version =
            data_version(&connection).map_err(|e| failed(&connection, &self.database, e))?;
        let catalog = Arc::new(read_all(&connection, &self.database)?);
        self.open = Some(OpenDatabase {
            file,
            connection,
            data_version,
            catalog: catalog.clone(),
        });
        Ok(catalog)
    }
}

/// Returns (st_dev, st_ino) of the database. A missing one is EIO: ENOENT would be taken for a
/// missing box.
pub(super) fn database_id(database: &std::path::Path) -> Result<(u64, u64)> {
    match fs::metadata(database) {
        Ok(meta) => Ok((meta.dev(), meta.ino())),
        Err(e) => Err(Error::damaged(format!(
            "the database {} is gone; put it back or unmount",
            database.display()
        ))
        .caused_by(e)),
    }
}

fn read_all(connection: &Connection, database: &Path) -> Result<Catalog> {
    let schema = read_schema(connection).map_err(|e| failed(connection, database, e))?;
    let boxes = read_boxes(connection, None).map_err(|e| failed(connection, database, e))?;
    let mut snapshots: HashMap<String, Vec<SnapshotRecord>> = HashMap::new();
    if schema.version >= OLDEST_WRITABLE_SCHEMA || has_table(connection, "snapshot") {
        let found =
            read_snapshots(connection, None).map_err(|e| failed(connection, database, e))?;
        for snapshot in found {
            snapshots
                .entry(snapshot.box_id.clone())
                .or_default()
                .push(snapshot);
        }
    }
    let by_id = boxes
        .iter()
        .enumerate()
        .map(|(index, record)| (record.id.clone(), index))
        .collect();
    Ok(Catalog {
        schema,
        boxes,
        by_id,
        snapshots,
    })
}

/// Reads every box, or the one with this id. Leaves out boxes whose id could not be a directory
/// name.
pub(super) fn read_boxes(
    connection: &Connection,
    id: Option<&str>,
) -> rusqlite::Result<Vec<BoxRecord>> {
    // A condition that is always true would keep SQLite from using its indexes.
    let condition = id.map_or("", |_| "WHERE c.id = ?1");
    let mut statement = connection.prepare_cached(&format!(
        "SELECT c.id, c.name, c.created_at, c.json, s.status, s.pid, s.json
         FROM box_config c LEFT JOIN box_state s ON s.id = c.id
         {condition} ORDER BY c.created_at, c.id",
    ))?;
    let rows = statement.query_map(params_from_iter(id), |row| {
        Ok(BoxRecord {
            id: row.get(0)?,
            name: row.get(1)?,
            created_at: row.get(2)?,
            config: row.get(3)?,
            status: row
                .get::<_, Option<String>>(4)?
                .unwrap_or_else(|| "unknown".into()),
            pid: row.get(5)?,
            state: row.get::<_, Option<String>>(6)?.unwrap_or_default(),
        })
    })?;
    let mut boxes = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    boxes.retain(|record| is_safe_component(&record.id));
    Ok(boxes)
}

/// Reads every snapshot, or those of one box, oldest first. Leaves out names that could leave their
/// directory: BoxLite refuses to make them, so BoxLite did not write the row.
pub(super) fn read_snapshots(
    connection: &Connection,
    box_id: Option<&str>,
) -> rusqlite::Result<Vec<SnapshotRecord>> {
    let condition = box_id.map_or("", |_| "WHERE box_id = ?1");
    let mut statement = connection.prepare_cached(&format!(
        "SELECT id, box_id, name, created_at, json FROM snapshot
         {condition} ORDER BY created_at, rowid",
    ))?;
    let rows = statement.query_map(params_from_iter(box_id), |row| {
        Ok(SnapshotRecord {
            id: row.get(0)?,
            box_id: row.get(1)?,
            name: row.get(2)?,
            created_at: row.get(3)?,
            shown_at: row.get(3)?,
            json: row.get(4)?,
        })
    })?;
    let mut snapshots = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    snapshots.retain(|snapshot| is_snapshot_name(&snapshot.name));
    show_one_after_the_other(&mut snapshots);
    Ok(snapshots)
}

/// Gives snapshots of a box that were made in one second distinct times, in the order of rows.
fn show_one_after_the_other(snapshots: &mut [SnapshotRecord]) {
    let mut last: HashMap<&str, i64> = HashMap::new();
    for snapshot in snapshots {
        if let Some(last) = last.get(snapshot.box_id.as_str()) {
            snapshot.shown_at = snapshot.created_at.max(last.saturating_add(1));
        }
        last.insert(&snapshot.box_id, snapshot.shown_at);
    }
}

/// Reads every base disk.
pub(super) fn read_bases(connection: &Connection) -> rusqlite::Result<Vec<BaseRecord>> {
    let mut statement =
        connection.prepare_cached(&format!("SELECT {BASE_COLUMNS} FROM base_disk"))?;
    statement.query_map([], base_of)?.collect()
}

/// Reads the bases whose row names this path, or else those whose row names a file of that name
/// anywhere.
pub(super) fn read_bases_at(
    connection: &Connection,
    path: &str,
    name: &str,
) -> rusqlite::Result<Vec<BaseRecord>> {
    let read = |condition: &str, value: &str| -> rusqlite::Result<Vec<BaseRecord>> {
        let mut statement = connection.prepare_cached(&format!(
            "SELECT {BASE_COLUMNS} FROM base_disk WHERE {condition}"
        ))?;
        statement.query_map([value], base_of)?.collect()
    };
    let exact = read("base_path = ?1", path)?;
    if !exact.is_empty() {
        return Ok(exact);
    }
    let ending = format!("/{name}");
    read("substr(base_path, -length(?1)) = ?1", &ending)
}

/// Reads the bases that a box refers to.
pub(super) fn read_bases_of(
    connection: &Connection,
    box_id: &str,
) -> rusqlite::Result<Vec<BaseRecord>> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {BASE_COLUMNS} FROM base_disk
         WHERE id IN (SELECT base_disk_id FROM base_disk_ref WHERE box_id = ?1)"
    ))?;
    statement.query_map([box_id], base_of)?.collect()
}

/// Reads the bases that were made of a box.
pub(super) fn read_bases_from(
    connection: &Connection,
    box_id: &str,
) -> rusqlite::Result<Vec<BaseRecord>> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {BASE_COLUMNS} FROM base_disk WHERE source_box_id = ?1"
    ))?;
    statement.query_map([box_id], base_of)?.collect()
}

/// The columns that [`base_of`] reads.
const BASE_COLUMNS: &str = "id, source_box_id, kind, base_path, created_at, json";

fn base_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<BaseRecord> {
    Ok(BaseRecord {
        id: row.get(0)?,
        source_box_id: row.get(1)?,
        kind: row.get(2)?,
        base_path: row.get(3)?,
        created_at: row.get(4)?,
        json: row.get(5)?,
    })
}

pub(super) fn has_table(connection: &Connection, table: &str) -> bool {
    connection.table_exists(None, table).unwrap_or(false)
}

/// Tables and columns that our changes use; BoxLite's versions 7 to 11 have them all.
const NEEDED: &[(&str, &[&str])] = &[
    ("box_config", &["id", "name", "created_at", "json"]),
    ("box_state", &["id", "status", "pid", "json"]),
    ("snapshot", &["id", "box_id", "name", "created_at", "json"]),
    (
        "base_disk",
        &[
            "id",
            "source_box_id",
            "name",
            "kind",
            "base_path",
            "created_at",
            "json",
        ],
    ),
    ("base_disk_ref", &["base_disk_id", "box_id"]),
];

/// Reads the schema's version, and whether everything we use is there. A newer version that has the
/// tables and columns works. An older one, or one that lacks something, is read only.
pub(super) fn read_schema(connection: &Connection) -> rusqlite::Result<Schema> {
    let version = connection.query_row(
        "SELECT version FROM schema_version WHERE id = 1",
        [],
        |row| row.get(0),
    )?;
    let mut read_only = None;
    if version < OLDEST_WRITABLE_SCHEMA {
        read_only = Some(format!(
            "the database is of schema {version}, older than {OLDEST_WRITABLE_SCHEMA}; start a current BoxLite once, it migrates it"
        ));
    }
    for (table, columns) in NEEDED {
        for column in *columns {
            if !connection.column_exists(None, *table, *column)? {
                read_only.get_or_insert_with(|| {
                    format!(
                        "the database (schema {version}) has no {table}.{column}; this boxlitefs does not know how to change it"
                    )
                });
            }
        }
    }
    Ok(Schema { version, read_only })
}
