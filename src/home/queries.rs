//! Queries of BoxLite's rows while a home is changed.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::catalog::{
    read_bases, read_bases_at, read_bases_from, read_bases_of, read_boxes, read_snapshots,
};
use super::connection::failed;
use super::records::{BaseRecord, BoxRecord, SnapshotRecord};
use crate::{Error, Result};

/// The rows as they are now, read by the connection of one change.
pub struct Queries {
    pub(super) connection: Connection,
    pub(super) database: PathBuf,
}

impl Queries {
    /// Gives an error of SQLite's its errno and a message.
    pub(super) fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T> {
        result.map_err(|e| failed(&self.connection, &self.database, e))
    }

    /// Runs statements without parameters.
    pub(super) fn execute(&self, statements: &str) -> Result<()> {
        self.sql(self.connection.execute_batch(statements))
    }

    /// Returns every box as it is now.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn boxes(&self) -> Result<Vec<BoxRecord>> {
        self.sql(read_boxes(&self.connection, None))
    }

    /// Returns the box with this id as it is now.
    ///
    /// # Errors
    /// ENOENT when it is gone.
    pub fn box_by_id(&self, id: &str) -> Result<BoxRecord> {
        self.sql(read_boxes(&self.connection, Some(id)))?
            .pop()
            .ok_or_else(|| Error::new(libc::ENOENT, format!("box {id} is gone")))
    }

    /// Returns whether a box has this name.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn is_name_taken(&self, name: &str) -> Result<bool> {
        self.sql(self.connection.query_row(
            "SELECT EXISTS (SELECT 1 FROM box_config WHERE name = ?1 OR id = ?1)",
            [name],
            |row| row.get(0),
        ))
    }

    /// Returns the snapshots of a box as they are now, oldest first.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn snapshots_of(&self, box_id: &str) -> Result<Vec<SnapshotRecord>> {
        self.sql(read_snapshots(&self.connection, Some(box_id)))
    }

    /// Returns the snapshots of all boxes as they are now, oldest first.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn snapshots(&self) -> Result<Vec<SnapshotRecord>> {
        self.sql(read_snapshots(&self.connection, None))
    }

    /// Returns the ids of the boxes that refer to any base.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn referring_boxes(&self) -> Result<HashSet<String>> {
        let rows = || -> rusqlite::Result<_> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT DISTINCT box_id FROM base_disk_ref")?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        self.sql(rows())
    }

    /// Returns every base disk as it is now.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn bases(&self) -> Result<Vec<BaseRecord>> {
        self.sql(read_bases(&self.connection))
    }

    /// Returns the bases whose row names this path, or (spelled differently, say) a file of that
    /// name.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn bases_at(&self, path: &Path) -> Result<Vec<BaseRecord>> {
        let (Some(text), Some(name)) = (path.to_str(), path.file_name().and_then(|n| n.to_str()))
        else {
            return Ok(Vec::new());
        };
        self.sql(read_bases_at(&self.connection, text, name))
    }

    /// Returns the bases that a box refers to.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn bases_of(&self, box_id: &str) -> Result<Vec<BaseRecord>> {
        self.sql(read_bases_of(&self.connection, box_id))
    }

    /// Returns the bases that were made of a box; ours are of none.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn bases_from(&self, box_id: &str) -> Result<Vec<BaseRecord>> {
        self.sql(read_bases_from(&self.connection, box_id))
    }

    /// Returns the ids of the boxes that refer to a base.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn boxes_referring_to(&self, base_id: &str) -> Result<Vec<String>> {
        let rows = || -> rusqlite::Result<_> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT box_id FROM base_disk_ref WHERE base_disk_id = ?1")?;
            statement.query_map([base_id], |row| row.get(0))?.collect()
        };
        self.sql(rows())
    }

    /// Returns the references of all boxes to the bases that a box refers to: the boxes, by the path
    /// that the row of the base names.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn sharing_boxes(&self, box_id: &str) -> Result<HashMap<PathBuf, Vec<String>>> {
        let rows = || -> rusqlite::Result<Vec<(String, String)>> {
            let mut statement = self.connection.prepare_cached(
                "SELECT base_disk.base_path, others.box_id
                 FROM base_disk_ref own
                 JOIN base_disk ON base_disk.id = own.base_disk_id
                 JOIN base_disk_ref others ON others.base_disk_id = own.base_disk_id
                 WHERE own.box_id = ?1",
            )?;
            let rows = statement.query_map([box_id], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        };
        let mut sharing = HashMap::<PathBuf, Vec<String>>::new();
        for (path, other) in self.sql(rows())? {
            sharing.entry(PathBuf::from(path)).or_default().push(other);
        }
        Ok(sharing)
    }

    /// Returns every reference: the bases that each box refers to, by its id.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn refs(&self) -> Result<HashMap<String, Vec<String>>> {
        let rows = || -> rusqlite::Result<Vec<(String, String)>> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT box_id, base_disk_id FROM base_disk_ref")?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        };
        let mut refs = HashMap::<String, Vec<String>>::new();
        for (box_id, base) in self.sql(rows())? {
            refs.entry(box_id).or_default().push(base);
        }
        Ok(refs)
    }

    /// Returns the ids of the bases that a box refers to.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn refs_of(&self, box_id: &str) -> Result<Vec<String>> {
        let rows = || -> rusqlite::Result<Vec<String>> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT base_disk_id FROM base_disk_ref WHERE box_id = ?1")?;
            statement.query_map([box_id], |row| row.get(0))?.collect()
        };
        self.sql(rows())
    }

    /// Returns the ids of the bases that any box refers to.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn referred_bases(&self) -> Result<HashSet<String>> {
        let rows = || -> rusqlite::Result<_> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT DISTINCT base_disk_id FROM base_disk_ref")?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        self.sql(rows())
    }

    /// Returns the lock numbers of all boxes.
    ///
    /// # Errors
    /// Those of SQLite.
    pub(super) fn lock_ids(&self) -> Result<HashSet<i64>> {
        let rows = || -> rusqlite::Result<_> {
            let mut statement = self.connection.prepare_cached(
                // Only CASE keeps SQLite from reading what is not JSON, which would be an error.
                "SELECT CAST(CASE WHEN json_valid(json) THEN json_extract(json, '$.lock_id') END
                             AS INTEGER)
                 FROM box_state",
            )?;
            let numbers = statement.query_map([], |row| row.get::<_, Option<i64>>(0))?;
            numbers.filter_map(rusqlite::Result::transpose).collect()
        };
        self.sql(rows())
    }

    /// Returns whether a row has a digest of a base's file, as those of some builds do: then its
    /// bytes must stay.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn has_digest(&self, base_id: &str) -> Result<bool> {
        let has_column = self.connection.column_exists(None, "base_disk", "digest");
        if !self.sql(has_column)? {
            return Ok(false);
        }
        self.sql(self.connection.query_row(
            "SELECT EXISTS (SELECT 1 FROM base_disk WHERE id = ?1 AND digest IS NOT NULL)",
            [base_id],
            |row| row.get(0),
        ))
    }
}
