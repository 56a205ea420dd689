//! `boxlitefs du`: shows what takes the space of a home, and what removals would free.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::output::{print, table};
use super::place::home_of;
use crate::Result;
use crate::store::compact::amount;
use crate::store::space::{self, BoxSpace, Freed, HomeSpace, Item, Owner};

/// The titles of the columns.
const TITLES: [&str; 5] = ["NAME", "OWN", "SHARED", "FREES", "COMPACTED"];

/// Prints what takes the space of a home.
///
/// # Errors
/// Those of opening and reading the home, and of writing.
pub(super) fn run(home: Option<PathBuf>, as_json: bool) -> Result<()> {
    let space = space::report(&home_of(home)?)?;
    if as_json {
        return print(&format!("{:#}\n", value_of(&space)));
    }
    for directory in &space.unread {
        eprintln!("boxlitefs: cannot count {directory}");
    }
    print(&text_of(&space))
}

fn value_of(space: &HomeSpace) -> Value {
    let parts = space.parts.iter();
    let parts: Map<String, Value> = parts
        .map(|(owner, bytes)| (format!("{}_bytes", owner.name()), json!(bytes)))
        .collect();
    let boxes: Vec<Value> = space.boxes.iter().map(value_of_box).collect();
    let entries: Vec<Value> = space
        .entries
        .iter()
        .map(|entry| {
            json!({
                "id": entry.id,
                "what": entry.what,
                "frees_bytes": entry.freed.now,
                "frees_compacted_bytes": entry.freed.compacted,
            })
        })
        .collect();
    json!({
        "home": space.home,
        "total_bytes": space.total,
        "parts": parts,
        "compact_frees_bytes": space.compacting,
        "boxes": boxes,
        "undo": entries,
        "unread": space.unread,
    })
}

fn value_of_box(of: &BoxSpace) -> Value {
    let snapshots: Vec<Value> = of.snapshots.iter().map(value_of_item).collect();
    let mut value = value_of_item(&of.whole);
    value["disk"] = json!({"own_bytes": of.disk.own, "shared_bytes": of.disk.shared});
    value["snapshots"] = snapshots.into();
    value
}

fn value_of_item(item: &Item) -> Value {
    json!({
        "name": item.name,
        "id": item.id,
        "own_bytes": item.usage.own,
        "shared_bytes": item.usage.shared,
        "frees_bytes": item.freed.now,
        "frees_compacted_bytes": item.freed.compacted,
    })
}

fn text_of(space: &HomeSpace) -> String {
    let mut rows = vec![TITLES.map(str::to_owned)];
    for of in &space.boxes {
        // A name can't begin another line.
        rows.push(row_of(of.whole.name.escape_debug().to_string(), &of.whole));
        for snapshot in &of.snapshots {
            let name = format!("  snapshots/{}", snapshot.name.escape_debug());
            rows.push(row_of(name, snapshot));
        }
    }
    for entry in &space.entries {
        let name = format!("undo: {}", entry.what.escape_debug());
        let [now, compacted] = cells_of(entry.freed);
        rows.push([name, String::new(), String::new(), now, compacted]);
    }
    let mut sums: Vec<[String; 2]> = space
        .parts
        .iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(owner, bytes)| [meaning_of(*owner).to_owned(), amount(*bytes)])
        .collect();
    sums.push(["total, as du -s counts".to_owned(), amount(space.total)]);
    let mut text = format!("{}\n{}", table(&rows), table(&sums));
    if let Some(bytes @ 1..) = space.compacting {
        text += &format!("\n`boxlitefs compact` frees {} now\n", amount(bytes));
    }
    text
}

fn row_of(name: String, item: &Item) -> [String; 5] {
    let [now, compacted] = cells_of(item.freed);
    let (own, shared) = (amount(item.usage.own), amount(item.usage.shared));
    [name, own, shared, now, compacted]
}

fn cells_of(freed: Freed) -> [String; 2] {
    let compacted = freed.compacted.map_or_else(|| "?".to_owned(), amount);
    [amount(freed.now), compacted]
}

fn meaning_of(owner: Owner) -> &'static str {
    match owner {
        Owner::Boxes => "boxes, each its own",
        Owner::Shared => "shared by several boxes",
        Owner::Undo => "only kept to be had back",
        Owner::Unread => "layers that nothing reads",
        Owner::Images => "images of BoxLite",
        Owner::Volumes => "volumes",
        Owner::Database => "database",
        Owner::Caches => "caches of boxlitefs",
        Owner::Other => "other files",
    }
}
