//! The absolute paths in BoxLite's rows. BoxLite compares them as strings with the paths it
//! computes.

use std::path::Path;

use rusqlite::Connection;

use super::catalog::has_table;
use super::connection::failed;
use super::paths::Home;
use super::queries::Queries;
use super::read_connection::connect_for_reading;
use super::transactions::Transaction;
use crate::Result;

/// The value of a row that holds a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordedIn {
    /// `base_disk.base_path`. BoxLite's start deletes every base that no row names by this column.
    BaseColumn,
    /// `base_path` in `base_disk.json`: what BoxLite opens.
    BaseJson,
    /// `base_path` in `snapshot.json`.
    Snapshot,
    /// `box_home` in `box_config.json`.
    BoxHome,
}

impl RecordedIn {
    /// Returns the statement that selects id and path of all such values.
    fn select(self) -> &'static str {
        match self {
            RecordedIn::BaseColumn => "SELECT id, base_path FROM base_disk",
            RecordedIn::BaseJson => {
                "SELECT id, json_extract(json, '$.base_path') FROM base_disk WHERE json_valid(json)"
            }
            RecordedIn::Snapshot => {
                "SELECT id, json_extract(json, '$.base_path') FROM snapshot WHERE json_valid(json)"
            }
            RecordedIn::BoxHome => {
                "SELECT id, json_extract(json, '$.box_home') FROM box_config WHERE json_valid(json)"
            }
        }
    }

    /// Returns the statement that replaces a known path by another (the third parameter).
    fn update(self) -> &'static str {
        match self {
            RecordedIn::BaseColumn => {
                "UPDATE base_disk SET base_path = ?3 WHERE id = ?1 AND base_path = ?2"
            }
            RecordedIn::BaseJson => {
                "UPDATE base_disk SET json = json_set(json, '$.base_path', ?3)
                 WHERE id = ?1 AND json_valid(json) AND json_extract(json, '$.base_path') = ?2"
            }
            RecordedIn::Snapshot => {
                "UPDATE snapshot SET json = json_set(json, '$.base_path', ?3)
                 WHERE id = ?1 AND json_valid(json) AND json_extract(json, '$.base_path') = ?2"
            }
            RecordedIn::BoxHome => {
                "UPDATE box_config SET json = json_set(json, '$.box_home', ?3)
                 WHERE id = ?1 AND json_valid(json) AND json_extract(json, '$.box_home') = ?2"
            }
        }
    }

    fn table(self) -> &'static str {
        match self {
            RecordedIn::BaseColumn | RecordedIn::BaseJson => "base_disk",
            RecordedIn::Snapshot => "snapshot",
            RecordedIn::BoxHome => "box_config",
        }
    }
}

/// One path in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedPath {
    /// Which value of the row it is.
    pub place: RecordedIn,
    /// The id of the base, the snapshot or the box.
    pub id: String,
    /// The path as stored.
    pub path: String,
}

impl RecordedPath {
    /// Reads every path in the rows of a home as they are now, without the lock.
    ///
    /// # Errors
    /// EIO when the database is damaged.
    pub fn all(home: &Home) -> Result<Vec<RecordedPath>> {
        let database = home.database();
        let connection = connect_for_reading(&database)?;
        read_paths(&connection).map_err(|e| failed(&connection, &database, e))
    }
}

impl Queries {
    /// Reads every path in the rows.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn recorded_paths(&self) -> Result<Vec<RecordedPath>> {
        self.sql(read_paths(&self.connection))
    }
}

impl Transaction<'_> {
    /// Makes a row name a file by another path. Does nothing if the row no longer has the known
    /// path.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn record_path(&self, known: &RecordedPath, path: &Path) -> Result<()> {
        let path = path.display().to_string();
        self.touch_any();
        self.run(known.place.update(), [&known.id, &known.path, &path])?;
        Ok(())
    }
}

fn read_paths(connection: &Connection) -> rusqlite::Result<Vec<RecordedPath>> {
    let mut paths = Vec::new();
    for place in [
        RecordedIn::BaseColumn,
        RecordedIn::BaseJson,
        RecordedIn::Snapshot,
        RecordedIn::BoxHome,
    ] {
        if !has_table(connection, place.table()) {
            continue;
        }
        let mut statement = connection.prepare_cached(place.select())?;
        let rows = statement.query_map([], |row| {
            Ok((row.get(0)?, row.get::<_, rusqlite::types::Value>(1)?))
        })?;
        for row in rows {
            // BoxLite writes paths as text.
            let (id, rusqlite::types::Value::Text(path)) = row? else {
                continue;
            };
            paths.push(RecordedPath { place, id, path });
        }
    }
    Ok(paths)
}
