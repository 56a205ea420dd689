//! `boxlitefs ls` and `boxlitefs prune`: the boxes of a home and their snapshots. Only reads.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use crate::Result;
use crate::event_log::EventLog;
use crate::exports::display_name;
use crate::home::{Activity, BoxRecord, Home};
use crate::store::Store;
use crate::store::maintenance::usage::usage_of_boxes;

/// A box as a list of boxes shows it.
#[derive(Clone, Debug)]
pub struct BoxSummary {
    /// Its name, or its id if it has none.
    pub name: String,
    /// Its id.
    pub id: String,
    /// BoxLite's status; `running` if the box's machine runs, whatever the row says.
    pub status: String,
    /// The image that it was made from.
    pub image: String,
    /// Bytes on disk that only this box and its snapshots need.
    pub own_bytes: u64,
    /// Bytes on disk that other boxes need as well.
    pub shared_bytes: u64,
    /// The names of its snapshots, oldest first.
    pub snapshots: Vec<String>,
    /// When its disk changed last; None if it never started.
    pub changed_at: Option<SystemTime>,
}

/// A snapshot, as its box lists it.
#[derive(Clone, Debug)]
pub struct SnapshotSummary {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970: later than each one before.
    pub created_at: i64,
}

/// A box with its snapshots, the newest first.
#[derive(Clone, Debug)]
pub struct BoxSnapshots {
    /// Its id.
    pub id: String,
    /// Its name, or its id if it has none.
    pub name: String,
    /// Its snapshots.
    pub snapshots: Vec<SnapshotSummary>,
}

/// Returns the snapshots of every box of a home.
///
/// # Errors
/// Those of opening and reading the home.
pub fn snapshots(home: &Path) -> Result<Vec<BoxSnapshots>> {
    let store = open(home)?;
    let catalog = store.home().catalog()?;
    let of_box = |record: &BoxRecord| {
        let rows = catalog.snapshots_of(&record.id).iter();
        let mut snapshots: Vec<_> = rows
            .map(|row| SnapshotSummary {
                id: row.id.clone(),
                name: row.name.clone(),
                created_at: row.shown_at,
            })
            .collect();
        snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.created_at));
        BoxSnapshots {
            id: record.id.clone(),
            name: display_name(record).to_owned(),
            snapshots,
        }
    };
    Ok(catalog.boxes().map(of_box).collect())
}

/// Opens a home only to read it.
///
/// # Errors
/// Those of opening the home.
pub(super) fn open(home: &Path) -> Result<Store> {
    let home = Home::open(home)?;
    home.refuse_hidden()?;
    let events = EventLog::open(&home, true);
    Ok(Store::without_recovery(home, events))
}

/// Returns the boxes of a home, by name.
///
/// # Errors
/// Those of opening and reading the home.
pub fn boxes(home: &Path) -> Result<Vec<BoxSummary>> {
    let store = open(home)?;
    let catalog = store.home().catalog()?;
    let usages = usage_of_boxes(&store)?;
    let summary = |record: &BoxRecord| {
        let snapshots = catalog.snapshots_of(&record.id).iter();
        let is_active = store.home().activity(record) != Activity::Idle;
        let live = store.home().live_disk(&record.id);
        let usage = usages.get(&record.id).copied().unwrap_or_default();
        BoxSummary {
            name: display_name(record).to_string(),
            id: record.id.clone(),
            status: if is_active {
                "running".to_owned()
            } else {
                record.status.clone()
            },
            image: record.image(),
            own_bytes: usage.own,
            shared_bytes: usage.shared,
            snapshots: snapshots.map(|row| row.name.clone()).collect(),
            changed_at: fs::metadata(live).and_then(|meta| meta.modified()).ok(),
        }
    };
    let mut boxes: Vec<BoxSummary> = catalog.boxes().map(summary).collect();
    boxes.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(boxes)
}
