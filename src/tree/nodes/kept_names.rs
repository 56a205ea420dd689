//! The names of what can be had back, and what its `why.json` says.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::json;

use crate::home::{Catalog, Home, KeptBox, KeptRows, rfc3339};
use crate::tree::nodes::names::encode;

/// The longest name, in bytes.
const LONGEST: usize = 255;

/// Returns the entries whose box, snapshot or disk is gone, each with its name, oldest first.
pub fn kept_names(home: &Home, catalog: &Catalog) -> Vec<(String, Arc<KeptBox>)> {
    let mut taken = HashSet::new();
    let gone = catalog.kept().iter();
    let gone = gone.filter(|entry| home.is_gone(entry, catalog));
    gone.map(|entry| {
        let mut name = name_of(&entry.rows);
        if !taken.insert(name.clone()) {
            // Two mounts made entries of the same second at the same moment.
            name = entry.id().to_owned();
        }
        (name, entry.clone())
    })
    .collect()
}

/// Returns `WHEN-BOX` or `WHEN-BOX-SNAPSHOT`, and a number for the second of a name and later ones.
fn name_of(rows: &KeptRows) -> String {
    let number = match rows.number {
        1 => String::new(),
        number => format!("-{number}"),
    };
    let of = rows.record.name.as_deref().and_then(encode);
    let mut label = of.unwrap_or_else(|| rows.record.id.clone());
    if let Some(snapshot) = rows.removed_snapshot() {
        label = format!("{label}-{}", snapshot.name);
    }
    let when = rows.when();
    let mut room = LONGEST.saturating_sub(when.len() + 1 + number.len());
    while !label.is_char_boundary(room.min(label.len())) {
        room -= 1;
    }
    label.truncate(room);
    format!("{when}-{label}{number}")
}

/// Returns the text of `why.json`: what was done, when, and until when it can be undone. It has no
/// secrets.
pub fn why_json(rows: &KeptRows) -> Vec<u8> {
    let snapshot = rows.removed_snapshot();
    let until = i64::try_from(rows.keep_for).unwrap_or(i64::MAX);
    let value = json!({
        "action": rows.action.name(),
        "what": rows.what,
        "at": rfc3339(rows.seconds()),
        "until": rfc3339(rows.seconds().saturating_add(until)),
        "box": rows.record.name,
        "box_id": rows.record.id,
        "snapshot": snapshot.map(|row| row.name.clone()),
        "snapshot_id": snapshot.map(|row| row.id.clone()),
    });
    format!("{value:#}\n").into_bytes()
}
