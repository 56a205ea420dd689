//! Keeps the rows of a home as they are now: all are read when somebody else has recorded something,
//! and those of the boxes concerned after a change of our own.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::Connection;

use super::catalog::{
    BoxRows, Catalog, OLDEST_WRITABLE_SCHEMA, has_table, read_boxes, read_schema, read_snapshots,
};
use super::connection::{data_version, failed};
use super::read_connection::{ReadConnection, connect_for_reading};
use super::records::SnapshotRecord;
use crate::{Error, Result};

/// Reads the catalog, and caches it together with an open connection.
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

    /// Prepares for a commit of the connection `writer`. Call it in that transaction, which keeps
    /// others from committing. Returns None if the catalog is out of date.
    pub(super) fn before_commit(&self, writer: &Connection) -> Option<BeforeCommit> {
        let open = self.open.as_ref()?;
        let is_same_file = database_id(&self.database).is_ok_and(|file| file == open.file);
        let is_current = data_version(&open.connection).is_ok_and(|it| it == open.data_version);
        (is_same_file && is_current).then_some(())?;
        Some(BeforeCommit {
            by_others: data_version(writer).ok()?,
        })
    }

    /// Updates the catalog after `writer` has committed changes to the rows of these boxes only. If
    /// another connection has committed as well, the catalog stays out of date, and
    /// [`CatalogReader::current`] reads everything.
    pub(super) fn after_commit(
        &mut self,
        before: &BeforeCommit,
        writer: &Connection,
        boxes: &HashSet<String>,
    ) {
        let Some(open) = &mut self.open else { return };
        let read = || -> rusqlite::Result<(i64, Catalog)> {
            let version = data_version(&open.connection)?;
            let mut catalog = Catalog::clone(&open.catalog);
            for id in boxes {
                let record = read_boxes(&open.connection, Some(id))?.pop();
                let snapshots = read_snapshots(&open.connection, Some(id))?;
                catalog.set(id, record.map(|record| BoxRows { record, snapshots }));
            }
            Ok((version, catalog))
        };
        // A failure is met again, and reported, when the rows are asked for.
        let Ok((version, catalog)) = read() else {
            return;
        };
        // The writer's own commits do not count: nobody else has committed until now.
        if data_version(writer).is_ok_and(|now| now == before.by_others) {
            open.data_version = version;
            open.catalog = Arc::new(catalog);
        }
    }
}

/// The state before a commit that is followed by reading only what it recorded.
pub(super) struct BeforeCommit {
    /// SQLite's count, by the writer's connection, of commits by others.
    by_others: i64,
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
    let boxes = boxes.into_iter().map(|record| {
        let snapshots = snapshots.remove(&record.id).unwrap_or_default();
        Arc::new(BoxRows { record, snapshots })
    });
    Ok(Catalog::new(schema, boxes.collect()))
}
