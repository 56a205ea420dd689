//! Transactions: what is recorded in BoxLite's rows.

use std::cell::RefCell;
use std::collections::HashSet;

use rusqlite::params;
use serde_json::{Value, json};

use super::identity::rfc3339;
use super::options::normalize_imported;
use super::queries::Queries;
use super::records::{BaseRecord, KeptBoxRows, NewBase, NewBox, NewSnapshot, OUR_SOURCE_BOX};
use crate::{Error, Result};

/// The rows of one transaction.
pub struct Transaction<'t> {
    rows: &'t Queries,
    /// The ids of the boxes whose rows, or whose snapshots' rows, it touched; None if those of any
    /// box may be touched.
    boxes: RefCell<Option<HashSet<String>>>,
}

impl<'t> Transaction<'t> {
    /// The transaction that is open on the connection of `rows`.
    pub(super) fn of(rows: &'t Queries) -> Transaction<'t> {
        Transaction {
            rows,
            boxes: RefCell::new(Some(HashSet::new())),
        }
    }

    /// Returns the ids of the boxes whose rows, or whose snapshots' rows, were touched; None if those
    /// of any box may be.
    pub(super) fn boxes(&self) -> Option<HashSet<String>> {
        self.boxes.borrow_mut().take()
    }

    fn touch(&self, box_id: &str) {
        if let Some(boxes) = &mut *self.boxes.borrow_mut() {
            boxes.insert(box_id.to_owned());
        }
    }

    /// Notes that the rows of any box may be touched.
    pub(super) fn touch_any(&self) {
        *self.boxes.borrow_mut() = None;
    }

    /// Runs one statement; returns the number of rows it changed.
    pub(super) fn run(&self, statement: &str, params: impl rusqlite::Params) -> Result<usize> {
        let prepared = self.rows.connection.prepare_cached(statement);
        self.rows
            .sql(prepared.and_then(|mut statement| statement.execute(params)))
    }

    /// Records a base of ours. Its name stays NULL and its source is the id of no box, so BoxLite
    /// never collects it, not even when a box is removed by force.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn insert_base(&self, base: &NewBase) -> Result<()> {
        let json = json!({
            "id": base.id,
            "source_box_id": OUR_SOURCE_BOX,
            "kind": "snapshot",
            "base_path": base.path,
            "container_disk_bytes": base.virtual_size,
            "size_bytes": base.file_size,
            "created_at": base.created_at,
        });
        self.run(
            "INSERT INTO base_disk (id, source_box_id, name, kind, base_path, created_at, json)
             VALUES (?1, ?2, NULL, 'snapshot', ?3, ?4, ?5)",
            params![
                base.id,
                OUR_SOURCE_BOX,
                base.path,
                base.created_at,
                json.to_string()
            ],
        )?;
        Ok(())
    }

    /// Removes a base and every reference to it.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn delete_base(&self, base_id: &str) -> Result<()> {
        self.run(
            "DELETE FROM base_disk_ref WHERE base_disk_id = ?1",
            [base_id],
        )?;
        self.run("DELETE FROM base_disk WHERE id = ?1", [base_id])?;
        Ok(())
    }

    /// Makes any base ours. BoxLite no longer collects it, and after a crash it can't be taken for
    /// BoxLite's.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn claim_base(&self, base_id: &str) -> Result<()> {
        self.run(
            "UPDATE base_disk SET source_box_id = ?2, kind = 'snapshot',
                 json = json_set(json, '$.source_box_id', ?2, '$.kind', 'snapshot')
             WHERE id = ?1",
            [base_id, OUR_SOURCE_BOX],
        )?;
        Ok(())
    }

    /// Records that the file of a base or a snapshot has another length.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn resize_layer(&self, path: &str, file_size: u64) -> Result<()> {
        self.touch_any();
        let file_size = i64::try_from(file_size).unwrap_or(i64::MAX);
        for (table, at) in [
            ("base_disk", "base_path = ?1"),
            (
                "snapshot",
                "json_valid(json) AND json_extract(json, '$.base_path') = ?1",
            ),
        ] {
            let statement =
                format!("UPDATE {table} SET json = json_set(json, '$.size_bytes', ?2) WHERE {at}");
            self.run(&statement, params![path, file_size])?;
        }
        Ok(())
    }

    /// Records that a chain of the box reaches the base. The box's own row must exist, or be made
    /// in this transaction: because of a reference without a box, BoxLite refuses to remove the
    /// source.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn insert_ref(&self, base_id: &str, box_id: &str) -> Result<()> {
        self.run(
            "INSERT OR IGNORE INTO base_disk_ref (base_disk_id, box_id) VALUES (?1, ?2)",
            [base_id, box_id],
        )?;
        Ok(())
    }

    /// Records that no chain of the box reaches the base any more.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn delete_ref(&self, base_id: &str, box_id: &str) -> Result<()> {
        self.run(
            "DELETE FROM base_disk_ref WHERE base_disk_id = ?1 AND box_id = ?2",
            [base_id, box_id],
        )?;
        Ok(())
    }

    /// Gives a box another name, in the column and in the JSON.
    ///
    /// # Errors
    /// EEXIST when a box has that name, ENOENT when the box is gone.
    pub fn rename_box(&self, id: &str, name: &str) -> Result<()> {
        self.touch(id);
        let renamed = self.run(
            "UPDATE box_config SET name = ?2, json = json_set(json, '$.name', ?2) WHERE id = ?1",
            [id, name],
        );
        match renamed.map_err(|e| taken(e, "a box has that name"))? {
            0 => Err(Error::new(libc::ENOENT, "the box is gone")),
            _ => Ok(()),
        }
    }

    /// Gives a box other options. All other fields of its configuration stay.
    ///
    /// # Errors
    /// ENOENT when the box is gone, or what SQLite says.
    pub fn set_options(&self, id: &str, options: &Value) -> Result<()> {
        self.touch(id);
        match self.run(
            "UPDATE box_config SET json = json_set(json, '$.options', json(?2)) WHERE id = ?1",
            [id, &options.to_string()],
        )? {
            0 => Err(Error::new(libc::ENOENT, "the box is gone")),
            _ => Ok(()),
        }
    }

    /// Removes every row of a box: its snapshots, its references, its state, its configuration.
    ///
    /// # Errors
    /// ENOENT when it is gone, or what SQLite says.
    pub fn delete_box(&self, id: &str) -> Result<()> {
        self.touch(id);
        self.run("DELETE FROM snapshot WHERE box_id = ?1", [id])?;
        self.run("DELETE FROM base_disk_ref WHERE box_id = ?1", [id])?;
        self.run("DELETE FROM box_state WHERE id = ?1", [id])?;
        match self.run("DELETE FROM box_config WHERE id = ?1", [id])? {
            0 => Err(Error::new(libc::ENOENT, "the box is gone")),
            _ => Ok(()),
        }
    }

    /// Records a snapshot, as BoxLite's snapshot_mgr does.
    ///
    /// # Errors
    /// EEXIST when the box has one of that name.
    pub fn insert_snapshot(&self, snapshot: &NewSnapshot) -> Result<()> {
        self.touch(&snapshot.box_id);
        let json = json!({
            "id": snapshot.id,
            "box_id": snapshot.box_id,
            "name": snapshot.name,
            "created_at": snapshot.created_at,
            "base_path": snapshot.path,
            "container_disk_bytes": snapshot.virtual_size,
            "size_bytes": snapshot.file_size,
        });
        self.run(
            "INSERT INTO snapshot (id, box_id, name, created_at, json) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                snapshot.id,
                snapshot.box_id,
                snapshot.name,
                snapshot.created_at,
                json.to_string()
            ],
        )
        .map_err(|e| taken(e, "the box has a snapshot of that name"))?;
        Ok(())
    }

    /// Gives a snapshot another creation time, in the column and in the JSON.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn date_snapshot(&self, box_id: &str, id: &str, created_at: i64) -> Result<()> {
        self.touch(box_id);
        self.run(
            "UPDATE snapshot SET created_at = ?3, json = json_set(json, '$.created_at', ?3)
             WHERE box_id = ?1 AND id = ?2",
            params![box_id, id, created_at],
        )?;
        Ok(())
    }

    /// Gives a snapshot another name and its layer another path, in the columns and in the JSON.
    ///
    /// # Errors
    /// EEXIST when the box has one of that name, ENOENT when it is gone.
    pub fn rename_snapshot(&self, box_id: &str, id: &str, name: &str, path: &str) -> Result<()> {
        self.touch(box_id);
        let renamed = self.run(
            "UPDATE snapshot
             SET name = ?3, json = json_set(json, '$.name', ?3, '$.base_path', ?4)
             WHERE box_id = ?1 AND id = ?2",
            [box_id, id, name, path],
        );
        match renamed.map_err(|e| taken(e, "the box has a snapshot of that name"))? {
            0 => Err(Error::new(libc::ENOENT, "the snapshot is gone")),
            _ => Ok(()),
        }
    }

    /// Removes a snapshot's row; ENOENT when it is gone.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn delete_snapshot(&self, box_id: &str, id: &str) -> Result<()> {
        self.touch(box_id);
        match self.run(
            "DELETE FROM snapshot WHERE box_id = ?1 AND id = ?2",
            [box_id, id],
        )? {
            0 => Err(Error::new(libc::ENOENT, "the snapshot is gone")),
            _ => Ok(()),
        }
    }

    /// Records a stopped box.
    ///
    /// # Errors
    /// EEXIST when a box has that name.
    pub fn insert_box(&self, new: &NewBox) -> Result<()> {
        self.touch(&new.id);
        let config = config_of(new);
        let state = state_of(new);
        self.run(
            "INSERT INTO box_config (id, name, created_at, json) VALUES (?1, ?2, ?3, ?4)",
            params![new.id, new.name, new.created_at, config.to_string()],
        )
        .map_err(|e| taken(e, "a box has that name"))?;
        self.run(
            "INSERT INTO box_state (id, status, pid, json) VALUES (?1, 'stopped', NULL, ?2)",
            params![new.id, state.to_string()],
        )?;
        Ok(())
    }

    /// Records a removed box and its snapshots again. The box is stopped and has another lock number.
    /// `auto_remove` and `auto_delete` are off, or BoxLite would delete it at its next start.
    ///
    /// # Errors
    /// EEXIST when a box has that name or id, EIO when its rows were damaged.
    pub fn insert_kept_box(&self, kept: &KeptBoxRows<'_>) -> Result<()> {
        let record = kept.record;
        self.touch(&record.id);
        let mut config = record.config()?;
        config["name"] = json!(kept.name);
        config["box_home"] = json!(kept.box_home);
        config["options"] = normalize_imported(config["options"].take(), None);
        let state = if record.state.is_empty() {
            json!({})
        } else {
            record.state()?
        };
        let mut state = stopped(state);
        state["lock_id"] = json!(kept.lock_id);
        self.run(
            "INSERT INTO box_config (id, name, created_at, json) VALUES (?1, ?2, ?3, ?4)",
            params![record.id, kept.name, record.created_at, config.to_string()],
        )
        .map_err(|e| taken(e, "a box has that name or that id"))?;
        self.run(
            "INSERT INTO box_state (id, status, pid, json) VALUES (?1, 'stopped', NULL, ?2)",
            params![record.id, state.to_string()],
        )?;
        for row in kept.snapshots {
            self.run(
                "INSERT INTO snapshot (id, box_id, name, created_at, json)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![row.id, record.id, row.name, row.created_at, row.json],
            )?;
        }
        Ok(())
    }

    /// Records a base of ours again that was removed.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn restore_base(&self, base: &BaseRecord) -> Result<()> {
        self.run(
            "INSERT INTO base_disk (id, source_box_id, name, kind, base_path, created_at, json)
             VALUES (?1, ?2, NULL, ?3, ?4, ?5, ?6)",
            params![
                base.id,
                base.source_box_id,
                base.kind,
                base.base_path,
                base.created_at,
                base.json
            ],
        )?;
        Ok(())
    }
}

/// Makes a violated UNIQUE constraint EEXIST: the name is taken.
fn taken(error: Error, message: &str) -> Error {
    let constraint = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<rusqlite::Error>())
        .and_then(rusqlite::Error::sqlite_error_code)
        == Some(rusqlite::ErrorCode::ConstraintViolation);
    if constraint {
        Error::new(libc::EEXIST, message)
    } else {
        error
    }
}

/// Returns `box_config.json` of a new box: BoxLite's fields are set, unknown ones of a cloned box
/// kept.
fn config_of(new: &NewBox) -> Value {
    let mut config = new.config_of_source.clone().unwrap_or_else(|| json!({}));
    config["id"] = json!(new.id);
    config["name"] = json!(new.name);
    config["created_at"] = json!(rfc3339(new.created_at));
    if !config["container"].is_object() {
        config["container"] = json!({});
    }
    config["container"]["id"] = json!(new.container_id);
    config["options"] = new.options.clone();
    if !config["engine_kind"].is_string() {
        config["engine_kind"] = json!("Libkrun");
    }
    config["box_home"] = json!(new.box_home);
    config
}

/// Returns `box_state.json` of a new box: stopped, with a lock number (null would make its start
/// fail).
fn state_of(new: &NewBox) -> Value {
    let mut state = stopped(new.state_of_source.clone().unwrap_or_else(|| json!({})));
    if let Some(state) = state.as_object_mut() {
        // It is in the options of the copy.
        state.remove("outbound_policy");
    }
    state["last_updated"] = json!(rfc3339(new.created_at));
    state["lock_id"] = json!(new.lock_id);
    state
}

/// Returns a state without what it says of a run.
fn stopped(mut state: Value) -> Value {
    for gone in [
        "container_id",
        "error_reason",
        "exit_code",
        "started_at",
        "pid",
    ] {
        state[gone] = Value::Null;
    }
    state["status"] = json!("stopped");
    state["health_status"] = json!({"state": "None", "failures": 0, "last_check": null});
    state
}
