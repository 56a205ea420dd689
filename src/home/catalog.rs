//! The rows of a home at one moment, and how they are read.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::{Connection, params_from_iter};

use super::identity::{is_safe_component, is_snapshot_name};
use super::kept::{KeptBox, KeptBoxes, is_kept_id};
use super::records::{BaseRecord, BoxRecord, SnapshotRecord, show_one_after_the_other};

/// The oldest schema that we change. Below it, snapshot and base tables are missing or different
/// (BoxLite migrates older databases itself at its next start).
pub(super) const OLDEST_WRITABLE_SCHEMA: i64 = 7;

/// The version of BoxLite's schema, and whether we may change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    /// `schema_version.version`.
    pub version: i64,
    /// Why changes are refused, as a message; None when they are not.
    pub read_only: Option<String>,
}

/// A box and its snapshots, oldest first, as their rows were at one moment.
#[derive(Debug, PartialEq)]
pub(super) struct BoxRows {
    pub record: BoxRecord,
    pub snapshots: Vec<SnapshotRecord>,
}

impl BoxRows {
    /// The order in which boxes are listed.
    fn order(&self) -> (i64, &str) {
        (self.record.created_at, &self.record.id)
    }
}

/// All boxes and snapshots of a home at one moment. A copy shares the rows.
#[derive(Clone, Debug)]
pub struct Catalog {
    schema: Schema,
    /// Oldest first.
    boxes: Vec<Arc<BoxRows>>,
    by_id: HashMap<String, Arc<BoxRows>>,
    /// What can be had back. It is found by the ids of entries, and is in no list of boxes.
    kept: Arc<KeptBoxes>,
}

/// A box before and after something was recorded; None where there is no such box.
pub type ChangedBox<'c> = (Option<&'c BoxRecord>, Option<&'c BoxRecord>);

impl Catalog {
    /// Returns the catalog of these boxes, oldest first.
    pub(super) fn new(schema: Schema, boxes: Vec<Arc<BoxRows>>) -> Catalog {
        let id_of = |rows: &Arc<BoxRows>| (rows.record.id.clone(), rows.clone());
        Catalog {
            schema,
            by_id: boxes.iter().map(id_of).collect(),
            boxes,
            kept: Arc::default(),
        }
    }

    /// The schema they are stored in.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Every box, oldest first.
    pub fn boxes(&self) -> impl ExactSizeIterator<Item = &BoxRecord> + Clone {
        self.boxes.iter().map(|rows| &rows.record)
    }

    /// The box with this id.
    pub fn box_by_id(&self, id: &str) -> Option<&BoxRecord> {
        let rows = self.by_id.get(id).map(|rows| &rows.record);
        rows.or_else(|| self.kept.by_id.get(id).map(|entry| &entry.record))
    }

    /// Returns this catalog with these entries.
    pub(super) fn with_kept(&self, kept: Arc<KeptBoxes>) -> Catalog {
        Catalog {
            kept,
            ..self.clone()
        }
    }

    /// What was removed or restored over and can be had back, oldest first.
    pub fn kept(&self) -> &[Arc<KeptBox>] {
        &self.kept.all
    }

    /// The entry with this id.
    pub fn kept_by_id(&self, id: &str) -> Option<&Arc<KeptBox>> {
        self.kept.by_id.get(id)
    }

    /// The rows of all entries, as those of boxes in their directories.
    pub fn kept_boxes(&self) -> impl Iterator<Item = &BoxRecord> {
        self.kept.all.iter().map(|entry| &entry.record)
    }

    /// The snapshots of a box, oldest first.
    pub fn snapshots_of(&self, box_id: &str) -> &[SnapshotRecord] {
        match self.by_id.get(box_id) {
            Some(rows) => &rows.snapshots,
            None => self
                .kept
                .by_id
                .get(box_id)
                .map_or(&[], |entry| &entry.snapshots),
        }
    }

    /// The snapshot of a box with this id.
    pub fn snapshot_by_id(&self, box_id: &str, id: &str) -> Option<&SnapshotRecord> {
        self.snapshots_of(box_id).iter().find(|s| s.id == id)
    }

    /// The snapshot of a box with this name.
    pub fn snapshot_by_name(&self, box_id: &str, name: &str) -> Option<&SnapshotRecord> {
        self.snapshots_of(box_id).iter().find(|s| s.name == name)
    }

    /// Returns the boxes whose rows, or whose snapshots' rows, differ from those of `before`.
    pub fn changes_since<'c>(&'c self, before: &'c Catalog) -> Vec<ChangedBox<'c>> {
        let mut changes = Vec::new();
        let (mut old, mut new) = (before.boxes.iter().peekable(), self.boxes.iter().peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (Some(old), Some(new)) => old.order().cmp(&new.order()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return changes,
            };
            let was = old.next_if(|_| order.is_le());
            let is = new.next_if(|_| order.is_ge());
            let is_same = match (was, is) {
                (Some(was), Some(is)) => Arc::ptr_eq(was, is) || was == is,
                _ => false,
            };
            if !is_same {
                changes.push((was.map(|rows| &rows.record), is.map(|rows| &rows.record)));
            }
        }
    }

    /// Records the rows that a box has now; None if it is gone.
    pub(super) fn set(&mut self, box_id: &str, rows: Option<BoxRows>) {
        if let Some(old) = self.by_id.remove(box_id)
            && let Ok(at) = self
                .boxes
                .binary_search_by(|rows| rows.order().cmp(&old.order()))
        {
            self.boxes.remove(at);
        }
        let Some(rows) = rows.map(Arc::new) else {
            return;
        };
        let at = self
            .boxes
            .partition_point(|other| other.order() < rows.order());
        self.by_id.insert(box_id.to_owned(), rows.clone());
        self.boxes.insert(at, rows);
    }
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
    boxes.retain(|record| is_safe_component(&record.id) && !is_kept_id(&record.id));
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

#[cfg(test)]
impl Catalog {
    /// Returns a catalog without boxes.
    pub(crate) fn empty() -> Catalog {
        let schema = Schema {
            version: 10,
            read_only: None,
        };
        Catalog::new(schema, Vec::new())
    }

    /// Records a box of this id and name, or that it is gone.
    pub(crate) fn set_name(&mut self, id: &str, created_at: i64, name: Option<&str>) {
        let record = BoxRecord {
            id: id.to_owned(),
            name: name.map(str::to_owned),
            created_at,
            config: String::new(),
            status: "stopped".to_owned(),
            pid: None,
            state: String::new(),
        };
        let snapshots = Vec::new();
        self.set(id, name.map(|_| BoxRows { record, snapshots }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(catalog: &Catalog) -> Vec<&str> {
        catalog.boxes().map(|record| record.id.as_str()).collect()
    }

    #[test]
    fn rows_that_are_set_take_their_place_by_time_and_id() {
        let mut catalog = Catalog::empty();
        for (id, at) in [("c", 2), ("a", 2), ("z", 1), ("b", 2)] {
            catalog.set_name(id, at, Some(id));
        }
        assert_eq!(ids(&catalog), ["z", "a", "b", "c"]);
        catalog.set_name("a", 3, Some("a"));
        catalog.set_name("z", 1, None);
        catalog.set_name("unknown", 1, None);
        assert_eq!(ids(&catalog), ["b", "c", "a"]);
        assert!(catalog.box_by_id("z").is_none());
        assert_eq!(catalog.box_by_id("a").unwrap().created_at, 3);
    }

    #[test]
    fn the_changes_are_the_boxes_whose_rows_differ() {
        let mut before = Catalog::empty();
        for (id, at) in [("a", 1), ("b", 2), ("c", 3)] {
            before.set_name(id, at, Some(id));
        }
        assert!(before.changes_since(&before.clone()).is_empty());
        let mut after = before.clone();
        after.set_name("a", 1, Some("renamed"));
        after.set_name("b", 2, None);
        after.set_name("d", 4, Some("d"));
        // Read again, it is still the same.
        after.set_name("c", 3, Some("c"));
        let changes = after.changes_since(&before);
        let name = |record: Option<&BoxRecord>| record.and_then(|it| it.name.clone());
        let names: Vec<_> = changes
            .iter()
            .map(|(was, is)| (name(*was), name(*is)))
            .collect();
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(
            names,
            [
                (some("a"), some("renamed")),
                (some("b"), None),
                (None, some("d"))
            ]
        );
    }
}
