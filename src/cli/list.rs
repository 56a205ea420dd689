//! `boxlitefs ls`: lists the boxes of a home.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::output::{print, table};
use super::place::home_of;
use crate::Result;
use crate::home::rfc3339_at;
use crate::store::summary::{self, BoxSummary};

/// The titles of the columns.
const TITLES: [&str; 6] = ["NAME", "STATUS", "IMAGE", "DISK", "SNAPSHOTS", "CHANGED"];

/// Prints a line, or an object, for each box.
///
/// # Errors
/// Those of opening the home, and of writing.
pub(super) fn run(home: Option<PathBuf>, as_json: bool) -> Result<()> {
    let boxes = summary::boxes(&home_of(home)?)?;
    if as_json {
        let boxes: Vec<Value> = boxes.iter().map(value_of).collect();
        return print(&format!("{:#}\n", Value::from(boxes)));
    }
    print(&table_of(&boxes))
}

fn value_of(summary: &BoxSummary) -> Value {
    json!({
        "name": summary.name,
        "id": summary.id,
        "status": summary.status,
        "image": summary.image,
        "own_bytes": summary.own_bytes,
        "shared_bytes": summary.shared_bytes,
        "snapshots": summary.snapshots,
        "changed_at": summary.changed_at.map(rfc3339_at),
    })
}

fn table_of(boxes: &[BoxSummary]) -> String {
    let mut rows = vec![TITLES.map(str::to_owned)];
    rows.extend(boxes.iter().map(row_of));
    table(&rows)
}

fn row_of(summary: &BoxSummary) -> [String; 6] {
    [
        // A name can't begin another line.
        summary.name.escape_debug().to_string(),
        summary.status.clone(),
        summary.image.escape_debug().to_string(),
        crate::store::compact::amount(summary.own_bytes),
        summary.snapshots.len().to_string(),
        summary.changed_at.map_or_else(never, rfc3339_at),
    ]
}

fn never() -> String {
    "never started".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_text() {
        let summary = BoxSummary {
            name: "a\nb".into(),
            id: "i".into(),
            status: "stopped".into(),
            image: "alpine:latest".into(),
            own_bytes: 5 << 20,
            shared_bytes: 0,
            snapshots: vec!["s".into()],
            changed_at: Some(std::time::SystemTime::UNIX_EPOCH),
        };
        let text = table_of(&[summary]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[1].starts_with("a\\nb  stopped  alpine:latest  5.0 MiB  1"),
            "{text}"
        );
        assert_eq!(lines[0].find("IMAGE"), lines[1].find("alpine"));
        assert!(lines[1].ends_with("1970-01-01T00:00:00Z"), "{text}");
    }
}
