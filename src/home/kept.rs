//! Kept states: what was removed or restored over, and can be had back for a while.
//!
//! An entry is a directory `HOME/.boxlitefs/undo/ID`, laid out like that of a box. Its `why.json` has
//! the rows of what is gone; its disks are hard links of layers.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::identity::{is_safe_component, is_snapshot_name, rfc3339};
use super::records::{BoxRecord, SnapshotRecord, show_one_after_the_other};
use crate::{Context, Error, Result};

/// What the id of every entry begins with. BoxLite's ids have no dash.
const PREFIX: &str = "undo-";

/// The file in an entry that has the rows.
pub const WHY: &str = "why.json";

/// The version of `why.json`. A file of a later one is not read.
const VERSION: u64 = 1;

/// The most bytes of a `why.json` that are read.
const MOST_BYTES: u64 = 64 << 20;

/// Returns whether an id is that of an entry, and of no box.
pub fn is_kept_id(id: &str) -> bool {
    id.starts_with(PREFIX)
}

/// Returns whether a name in the directory of the entries is one that we give entries.
pub(super) fn is_entry_name(name: &str) -> bool {
    is_kept_id(name) && is_safe_component(name)
}

/// What was done to a box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptFrom {
    /// The box was removed, with all its snapshots.
    BoxRemoved,
    /// A snapshot was removed.
    SnapshotRemoved,
    /// The disk was replaced by another state.
    DiskReplaced,
}

impl KeptFrom {
    const ALL: [KeptFrom; 3] = [
        KeptFrom::BoxRemoved,
        KeptFrom::SnapshotRemoved,
        KeptFrom::DiskReplaced,
    ];

    /// Returns its name in `why.json`.
    pub fn name(self) -> &'static str {
        match self {
            KeptFrom::BoxRemoved => "box-removed",
            KeptFrom::SnapshotRemoved => "snapshot-removed",
            KeptFrom::DiskReplaced => "disk-replaced",
        }
    }
}

/// `why.json`: what was done, when, and the rows of what is gone.
#[derive(Clone, Debug)]
pub struct KeptRows {
    /// What was done.
    pub action: KeptFrom,
    /// When, in nanoseconds since 1970.
    pub at: u64,
    /// Seconds that the entry stays.
    pub keep_for: u64,
    /// What was done, for people.
    pub what: String,
    /// Tells entries of one second and one name apart; 1 for the first.
    pub number: u64,
    /// The row of the box, as stored, secrets included.
    pub record: BoxRecord,
    /// The rows of a removed box's snapshots, or of the one that was removed; oldest first.
    pub snapshots: Vec<SnapshotRecord>,
}

impl KeptRows {
    /// Returns the rows of an entry that is made now. `what` says what was done, for people.
    pub fn new(
        action: KeptFrom,
        what: String,
        keep_for: Duration,
        record: &BoxRecord,
        snapshots: Vec<SnapshotRecord>,
    ) -> KeptRows {
        KeptRows {
            action,
            at: nanoseconds(SystemTime::now()),
            keep_for: keep_for.as_secs().max(1),
            what,
            number: 1,
            record: record.clone(),
            snapshots,
        }
    }

    /// Returns `why.json` as it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        let snapshots = self.snapshots.iter().map(|row| {
            json!({
                "id": row.id,
                "name": row.name,
                "created_at": row.created_at,
                "json": row.json,
            })
        });
        let snapshots: Vec<Value> = snapshots.collect();
        let value = json!({
            "version": VERSION,
            "action": self.action.name(),
            "at": self.at,
            "keep_for": self.keep_for,
            "what": self.what,
            "number": self.number,
            "box": {
                "id": self.record.id,
                "name": self.record.name,
                "created_at": self.record.created_at,
                "json": self.record.config,
                "state": self.record.state,
            },
            "snapshots": snapshots,
        });
        format!("{value:#}\n").into_bytes()
    }

    /// Returns the rows in a `why.json`. None if a field is missing, of another type or unsafe: the
    /// file is of a later boxlitefs, or somebody else wrote it.
    fn parse(text: &str) -> Option<KeptRows> {
        let value: Value = serde_json::from_str(text).ok()?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let of = &value["box"];
        let id = text(&of["id"])?;
        let action = value["action"].as_str()?;
        let rows = KeptRows {
            action: KeptFrom::ALL.into_iter().find(|it| it.name() == action)?,
            at: value["at"].as_u64()?,
            keep_for: value["keep_for"].as_u64()?,
            what: text(&value["what"])?,
            number: value["number"].as_u64()?,
            record: BoxRecord {
                name: text(&of["name"]),
                created_at: of["created_at"].as_i64()?,
                config: text(&of["json"])?,
                status: "stopped".to_owned(),
                pid: None,
                state: text(&of["state"])?,
                id,
            },
            snapshots: value["snapshots"]
                .as_array()?
                .iter()
                .map(|row| {
                    Some(SnapshotRecord {
                        id: text(&row["id"])?,
                        box_id: text(&of["id"])?,
                        name: text(&row["name"])?,
                        created_at: row["created_at"].as_i64()?,
                        shown_at: row["created_at"].as_i64()?,
                        json: text(&row["json"])?,
                    })
                })
                .collect::<Option<_>>()?,
        };
        let is_safe = value["version"] == VERSION
            && is_safe_component(&rows.record.id)
            && !is_kept_id(&rows.record.id)
            && rows
                .snapshots
                .iter()
                .all(|row| is_safe_component(&row.id) && is_snapshot_name(&row.name));
        is_safe.then_some(rows)
    }

    /// Returns the snapshot that was removed, if one was.
    pub fn removed_snapshot(&self) -> Option<&SnapshotRecord> {
        let is_snapshot = self.action == KeptFrom::SnapshotRemoved;
        self.snapshots.first().filter(|_| is_snapshot)
    }

    /// Returns when it was done, in seconds since 1970.
    pub fn seconds(&self) -> i64 {
        i64::try_from(self.at / 1_000_000_000).unwrap_or(0)
    }

    /// Returns when it was done, as `20261129T150405Z`.
    pub fn when(&self) -> String {
        rfc3339(self.seconds()).replace(['-', ':'], "")
    }

    /// Returns whether its time is over at `now`.
    pub fn is_over(&self, now: SystemTime) -> bool {
        let long = self.keep_for.saturating_mul(1_000_000_000);
        nanoseconds(now) >= self.at.saturating_add(long)
    }

    /// Returns whether an entry has the same time, in seconds, and the same names.
    pub fn looks_like(&self, other: &KeptRows) -> bool {
        let snapshot = |rows: &KeptRows| rows.removed_snapshot().map(|row| row.name.clone());
        self.when() == other.when()
            && (&self.record.name, snapshot(self)) == (&other.record.name, snapshot(other))
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// An entry: the rows as they were, and as those of a box whose directory is the entry's.
#[derive(Debug)]
pub struct KeptBox {
    /// What is stored.
    pub rows: KeptRows,
    pub(super) record: BoxRecord,
    pub(super) snapshots: Vec<SnapshotRecord>,
}

impl KeptBox {
    /// Reads the entry with this id in the directory of entries.
    ///
    /// # Errors
    /// ENOENT when it is gone; EIO when `why.json` is damaged, or is not of the user `owner`.
    pub(super) fn read(undo_dir: &Path, id: &str, owner: u32) -> Result<KeptBox> {
        let dir = undo_dir.join(id);
        let path = dir.join(WHY);
        let message = || format!("cannot read {}", path.display());
        let meta = fs::symlink_metadata(&path).context(message)?;
        let is_ours = meta.is_file() && meta.uid() == owner && meta.len() <= MOST_BYTES;
        let mut text = String::new();
        if is_ours {
            let mut file = fs::File::open(&path).context(message)?.take(MOST_BYTES);
            file.read_to_string(&mut text).context(message)?;
        }
        let rows = KeptRows::parse(&text).ok_or_else(|| {
            Error::damaged(format!(
                "{} is damaged, or a later boxlitefs wrote it; what it keeps can't be had back with this one",
                path.display()
            ))
        })?;
        Ok(KeptBox::of(&dir, id, rows))
    }

    fn of(dir: &Path, id: &str, rows: KeptRows) -> KeptBox {
        let record = BoxRecord {
            id: id.to_owned(),
            ..rows.record.clone()
        };
        let mut snapshots = rows.snapshots.clone();
        // A snapshot that was removed alone is the disk of its entry.
        snapshots.retain(|_| rows.action == KeptFrom::BoxRemoved);
        for row in &mut snapshots {
            let path = dir.join("snapshots").join(&row.id).join("disk.qcow2");
            let mut value: Value = serde_json::from_str(&row.json).unwrap_or_default();
            if value.is_object() {
                value["base_path"] = path.display().to_string().into();
            }
            row.json = value.to_string();
            id.clone_into(&mut row.box_id);
        }
        show_one_after_the_other(&mut snapshots);
        KeptBox {
            rows,
            record,
            snapshots,
        }
    }

    /// Returns the id of the entry.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// Returns the id of the box that it is of.
    pub fn box_id(&self) -> &str {
        &self.rows.record.id
    }
}

/// All entries at one moment.
#[derive(Debug, Default)]
pub(super) struct KeptBoxes {
    /// Oldest first.
    pub all: Vec<Arc<KeptBox>>,
    pub by_id: HashMap<String, Arc<KeptBox>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> KeptRows {
        let record = BoxRecord {
            id: "a1".into(),
            name: Some("we/b".into()),
            created_at: 7,
            config: r#"{"id":"a1","options":{"secrets":[{"value":"s3cret"}]}}"#.into(),
            status: "stopped".into(),
            pid: None,
            state: "{}".into(),
        };
        let snapshot = SnapshotRecord {
            id: "s1".into(),
            box_id: "a1".into(),
            name: "first".into(),
            created_at: 9,
            shown_at: 9,
            json: r#"{"base_path":"/elsewhere/disk.qcow2","more":1}"#.into(),
        };
        let keep_for = Duration::from_secs(60);
        let what = "removal of box we/b".to_owned();
        KeptRows::new(
            KeptFrom::BoxRemoved,
            what,
            keep_for,
            &record,
            vec![snapshot],
        )
    }

    #[test]
    fn rows_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let written = rows();
        let entry = dir.path().join("undo-x");
        fs::create_dir(&entry).unwrap();
        fs::write(entry.join(WHY), written.to_bytes()).unwrap();
        let owner = fs::metadata(&entry).unwrap().uid();
        let read = KeptBox::read(dir.path(), "undo-x", owner).unwrap();
        assert_eq!(read.rows.record, written.record);
        assert_eq!(read.rows.snapshots, written.snapshots);
        assert_eq!((read.id(), read.box_id()), ("undo-x", "a1"));
        let path = entry.join("snapshots/s1/disk.qcow2");
        let shown = read.snapshots[0].base_path().unwrap();
        assert_eq!(Path::new(&shown), path);
        let error = KeptBox::read(dir.path(), "undo-x", owner + 1).unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
    }

    #[test]
    fn rows_that_could_leave_their_directory_are_not_read() {
        let text = String::from_utf8(rows().to_bytes()).unwrap();
        assert!(KeptRows::parse(&text).is_some());
        for (from, to) in [
            (r#""id": "a1""#, r#""id": "../a1""#),
            (r#""id": "a1""#, r#""id": "undo-a1""#),
            (r#""id": "s1""#, r#""id": "..""#),
            (r#""name": "first""#, r#""name": "../first""#),
            (r#""version": 1"#, r#""version": 2"#),
            (r#""at""#, r#""then""#),
        ] {
            assert!(text.contains(from), "{from}");
            assert!(KeptRows::parse(&text.replace(from, to)).is_none(), "{to}");
        }
    }

    #[test]
    fn an_entry_is_over_when_its_time_is() {
        let rows = rows();
        let made = UNIX_EPOCH + Duration::from_nanos(rows.at);
        assert!(!rows.is_over(made));
        assert!(!rows.is_over(made + Duration::from_secs(59)));
        assert!(rows.is_over(made + Duration::from_secs(60)));
    }
}
